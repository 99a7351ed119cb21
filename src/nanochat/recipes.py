"""Named model recipes: every decision of a training run, as data.

A recipe is a frozen, printable, JSON-serialisable value. It holds the data, the architecture and
every hyper-parameter of every stage. What is *not* here is what may differ between two machines
that train the same model: paths, world size, thread count, prices. `hardware` is the one section
that says something about machines, and it never enters a fingerprint.

The named recipes `d4` … `d32` are derived from their depth alone (`from_depth`), each step with its
source. `quick` trains on two CPU cores in minutes from text that is already on the machine.

A user's own recipes stand beside them in `nanochat.recipe_book`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

# The nine special tokens, in id order. They follow the merges in the vocabulary, so their ids are
# vocab_size - 9 … vocab_size - 1 in every stage.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)


def gpt4_pattern(digits: str) -> str:
    r"""GPT-4's split pattern with its own number group, e.g. ``\p{N}{1,2}``.

    Source: tiktoken's cl100k_base, whose group is ``\p{N}{1,3}``; nanochat shortens it to two
    digits so that a small vocabulary is not spent on numbers.
    """
    return (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )


_strict = ConfigDict(extra="forbid", strict=False)

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=60)]


@dataclass(frozen=True, kw_only=True, config=_strict)
class Data:
    """Which text: the first `shards` training shards of `source`, and the source's validation shard."""

    source: Name
    shards: PositiveInt


@dataclass(frozen=True, kw_only=True, config=_strict)
class Tokenizer:
    """How the byte-pair vocabulary is learned.

    vocab_size: total ids, special tokens included (so merges = vocab_size - 256 - 9).
    shards: the first so many shards of the data section are counted.
    document_cap: characters of a document that are looked at; max_chars: characters in all.
    """

    vocab_size: Annotated[int, Field(ge=256 + len(SPECIAL_TOKENS))]
    shards: PositiveInt
    pattern: str = gpt4_pattern(r"\p{N}{1,2}")
    document_cap: PositiveInt = 10_000
    max_chars: PositiveInt = 2_000_000_000


@dataclass(frozen=True, kw_only=True, config=_strict)
class Model:
    """The October 2025 nanochat architecture (the one `transformers` calls NanoChat)."""

    depth: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    context: PositiveInt
    rope_theta: PositiveFloat = 10_000.0
    logit_softcap: PositiveFloat = 15.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if (self.width // self.heads) % 2:
            raise ValueError(f"head dimension {self.width // self.heads} is odd; RoPE rotates pairs")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True, config=_strict)
class Optimizer:
    """Muon for the matrices, AdamW for embedding and unembedding.

    Learning rates are those at width 768; AdamW's are multiplied by (width / 768)^-0.5 (nanochat,
    October 2025). Muon's momentum rises linearly over the first `muon_momentum_steps` steps.
    """

    embedding_lr: PositiveFloat = 0.2
    unembedding_lr: PositiveFloat = 0.004
    matrix_lr: PositiveFloat = 0.02
    lr_factor: PositiveFloat = 1.0
    adam_beta1: Fraction = 0.8
    adam_beta2: Fraction = 0.95
    adam_eps: PositiveFloat = 1e-10
    weight_decay: NonNegativeFloat = 0.0
    muon_momentum_start: Fraction = 0.85
    muon_momentum_end: Fraction = 0.95
    muon_momentum_steps: PositiveInt = 300
    muon_newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    grad_clip: PositiveFloat | None = 1.0


@dataclass(frozen=True, kw_only=True, config=_strict)
class Schedule:
    """Learning-rate multiplier over a stage, as fractions of its steps: linear up, constant, linear down."""

    warmup: Fraction = 0.0
    warmdown: Fraction = 0.2
    final: Fraction = 0.0


@dataclass(frozen=True, kw_only=True, config=_strict)
class Base:
    """Pretraining: `steps` optimisation steps of `batch_tokens` tokens each (the global batch).

    ngram_baselines: at the end, fit n-gram models to the same tokens and report them beside the model.
    """

    steps: PositiveInt
    batch_tokens: PositiveInt
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    eval_every: PositiveInt = 250
    eval_tokens: PositiveInt = 10_485_760
    checkpoint_every: PositiveInt = 500
    sample_prompts: tuple[str, ...] = (
        "The capital of France is",
        "The chemical symbol of gold is",
        "If yesterday was Friday, then tomorrow will be",
        "The opposite of hot is",
        "The planets of the solar system are:",
    )
    ngram_baselines: bool = False
    seed: int = 42


@dataclass(frozen=True, kw_only=True, config=_strict)
class Ingredient:
    """One part of a mixture of conversations.

    task: a name known to `nanochat.data.tasks`, or ``jsonl:<path>`` for the user's own file.
    rows: how many conversations (None: all the task has). repeat: how often each is seen.
    """

    task: str
    rows: PositiveInt | None = None
    repeat: PositiveInt = 1


@dataclass(frozen=True, kw_only=True, config=_strict)
class Midtrain:
    """Midtraining on packed conversations, every token in the loss.

    steps: None means one pass over the mixture.
    """

    mixture: tuple[Ingredient, ...]
    batch_tokens: PositiveInt
    steps: PositiveInt | None = None
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    eval_every: PositiveInt = 150
    checkpoint_every: PositiveInt = 100
    seed: int = 42


@dataclass(frozen=True, kw_only=True, config=_strict)
class Sft:
    """Supervised fine-tuning: one conversation a row, loss on what the assistant says.

    batch_rows: conversations in the global batch. max_tokens: longer conversations are clipped and
    counted. steps: None means one pass over the mixture. mmlu_task, arc_easy_task: where the questions
    come from that are asked every `eval_every` steps (None: not asked). skills: at the end, ask the
    held-out questions of `nanochat.data.heldout`.
    """

    mixture: tuple[Ingredient, ...]
    batch_rows: PositiveInt = 32
    max_tokens: PositiveInt | None = None
    steps: PositiveInt | None = None
    optimizer: Optimizer = dataclasses.field(
        default_factory=lambda: Optimizer(lr_factor=0.02, muon_momentum_start=0.95, muon_momentum_end=0.95)
    )
    schedule: Schedule = dataclasses.field(default_factory=lambda: Schedule(warmdown=1.0))
    eval_every: PositiveInt = 100
    checkpoint_every: PositiveInt = 100
    mmlu_task: str | None = "mmlu"
    arc_easy_task: str | None = "arc_easy"
    eval_questions: PositiveInt = 1024
    skills: bool = False
    seed: int = 42


@dataclass(frozen=True, kw_only=True, config=_strict)
class Evaluation:
    """Thresholds of the asset checks, and what is measured beside them. Enters no fingerprint."""

    max_val_bpb: PositiveFloat | None = None
    min_mmlu_accuracy: Fraction = 0.28
    min_arc_easy_accuracy: Fraction = 0.30
    min_compression_ratio: PositiveFloat = 1.5
    max_extra_tokens_vs_gpt2: NonNegativeFloat = 0.30


@dataclass(frozen=True, kw_only=True, config=_strict)
class Hardware:
    """What to run on. Never part of a fingerprint. runpod: settings of that launcher for this model."""

    gpus: PositiveInt = 1
    min_gpu_memory_gib: PositiveInt = 24
    device_batch_rows: PositiveInt = 16
    runpod: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=_strict)
class Recipe:
    """Everything that determines a model, stage by stage. A stage that is None is switched off."""

    name: Name
    description: str
    data: Data
    tokenizer: Tokenizer
    model: Model
    base: Base
    midtrain: Midtrain | None = None
    sft: Sft | None = None
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    hardware: Hardware = dataclasses.field(default_factory=Hardware)

    def __post_init__(self) -> None:
        if self.tokenizer.shards > self.data.shards:
            raise ValueError(
                f"tokenizer.shards ({self.tokenizer.shards}) is more than data.shards ({self.data.shards})"
            )
        if self.base.batch_tokens % self.model.context:
            raise ValueError(
                f"base.batch_tokens ({self.base.batch_tokens}) is not a multiple of model.context "
                f"({self.model.context})"
            )
        if self.midtrain and self.midtrain.batch_tokens % self.model.context:
            raise ValueError(
                f"midtrain.batch_tokens ({self.midtrain.batch_tokens}) is not a multiple of "
                f"model.context ({self.model.context})"
            )
        if self.sft and self.sft.max_tokens and self.sft.max_tokens > self.model.context:
            raise ValueError(
                f"sft.max_tokens ({self.sft.max_tokens}) is more than model.context ({self.model.context})"
            )
        if self.sft and not self.midtrain:
            raise ValueError("sft needs midtrain: chat formatting is learned there")

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values (tuples become lists)."""
        return _ADAPTER.dump_python(self, mode="json")

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Recipe:
        """Raises `RecipeError` naming the recipe and the field."""
        try:
            return _ADAPTER.validate_python(dict(document))
        except ValidationError as error:
            raise RecipeError(str(document.get("name", "?")), explain(error)) from error

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other sections: ``recipe.replace(base=dataclasses.replace(recipe.base, steps=9))``."""
        return dataclasses.replace(self, **changes)


_ADAPTER = TypeAdapter(Recipe)


class RecipeError(ValueError):
    """A recipe that cannot be used: which, and why."""

    def __init__(self, recipe: str, reason: str) -> None:
        super().__init__(f"recipe {recipe!r}: {reason}")
        self.recipe = recipe
        self.reason = reason


def explain(error: ValidationError) -> str:
    """A pydantic error as one line: every field with what is wrong."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'recipe'}: {item['msg']} (got {item['input']!r:.80})"
        for item in error.errors(include_url=False, include_context=False)
    )


# --------------------------------------------------------------------------------------------------
# Recipes from depth


def parameters(model: Model, vocab_size: int) -> int:
    """Parameters in all: 12·depth·width² in the blocks (less with grouped KV heads) and two
    vocab_size x width tables.

    The published guides call a 12-layer model "1280 wide, 10M parameters". By this arithmetic
    d12 is 768 wide and has 12·12·768² + 2·65,536·768 = 185,597,952 parameters; 1280 is d20's width.
    """
    kv_width = model.kv_heads * model.head_dim
    attention = 2 * model.width * model.width + 2 * model.width * kv_width
    mlp = 8 * model.width * model.width
    return model.depth * (attention + mlp) + 2 * vocab_size * model.width


# Validation bits per byte on fineweb-edu that a base model must not exceed, by depth. Published for
# nanochat (its dev/LOG.md): 0.7483 at d24 and 0.7450 at d26, of a later architecture that learns faster;
# a tenth is left for that. d20's 0.755 (a third party's) is of a tree that trains on ClimbMix, where
# nanochat's own runs have 0.7185 for fineweb-edu's 0.7465: 0.785, and the same tenth. d32 must not be
# worse than d26. Of smaller models nothing is published.
MAX_VAL_BPB: Mapping[int, float] = {20: 0.86, 24: 0.82, 26: 0.82, 32: 0.82}


def from_depth(
    depth: int,
    *,
    name: str | None = None,
    vocab_size: int = 65_536,
    source: str = "fineweb-edu",
    gpus: int = 8,
    description: str | None = None,
) -> Recipe:
    """Derive a whole recipe from an even `depth`, as nanochat did in October 2025 (commit dfc8833).

    1. width = 64·depth, which for an even depth is a whole number of heads of dimension 128; multi-head
       attention, context 2048.
    2. tokens = 20 per parameter, all parameters counted (Hoffmann et al. 2022, arXiv:2203.15556).
    3. batch = 524,288 tokens, so steps = tokens / batch, rounded down.
    4. shards = tokens at 4.8 characters a token over 250 million characters a shard, a tenth to
       spare, rounded up to ten, at least 8 (nanochat's speedrun uses 240 at d20, 450 at d26).
    5. learning rates: 0.2 embedding, 0.004 unembedding, 0.02 matrices (see `Optimizer`).
    6. midtraining: one pass over the mixture in batches of the same size, at base's rates with Muon's
       momentum rising anew, the last fifth linear to 0 (its mid_train.py).
    7. fine-tuning: one pass, 32 conversations a step, rates times 0.02 and linear to 0 from the start,
       momentum constant at 0.95, Muon's default there (its chat_sft.py has no ramp).
    8. rows a GPU takes at once, such that `costs.training_memory_bytes` fits into the memory asked for:
       24 GiB up to d12 (32 rows up to d8, then 16), 80 GiB above (32 up to d20, 16 up to d26, then 8).
    9. checkpoints: ten in a short base, every 500 steps in a long one; every 100 steps in midtraining
       and fine-tuning (some 650 and 680 by the plan's estimate). Evaluations of base: ten, or every
       250 steps. Neither changes what is trained.

    Raises RecipeError, naming the recipe, where these make no model.
    """
    name = name or f"d{depth}"
    if not isinstance(depth, int) or depth < 2 or depth % 2:
        raise RecipeError(
            name,
            f"depth: must be an even number from 2 on (got {depth!r}): the width, 64·depth, is made of "
            "heads of 128",
        )
    width, context, batch = 64 * depth, 2048, 524_288
    heads = width // 128
    identity = Ingredient(task="identity", repeat=2)
    try:
        model = Model(depth=depth, width=width, heads=heads, kv_heads=heads, context=context)
        tokenizer = Tokenizer(vocab_size=vocab_size, shards=8)
        tokens = 20 * parameters(model, tokenizer.vocab_size)
        steps = max(1, tokens // batch)
        shards = max(8, 10 * math.ceil(tokens * 4.8 / 250e6 * 1.1 / 10))
        if tokens * 4.8 * 1.1 <= 8 * 250e6:
            shards = 8
        return Recipe(
            name=name,
            description=description
            or f"{depth} layers, {width} wide, {parameters(model, vocab_size) / 1e6:.0f}M parameters, "
            f"{tokens / 1e9:.2f}B tokens",
            data=Data(source=source, shards=shards),
            tokenizer=tokenizer,
            model=model,
            base=Base(
                steps=steps,
                batch_tokens=batch,
                eval_every=max(1, min(250, steps // 10)),
                checkpoint_every=max(1, min(500, steps // 10)),
            ),
            midtrain=Midtrain(
                batch_tokens=batch,
                mixture=(
                    Ingredient(task="smoltalk", rows=460_000),
                    Ingredient(task="mmlu_auxiliary_train", rows=100_000),
                    Ingredient(task="gsm8k", rows=8_000),
                    identity,
                    Ingredient(task="simple_spelling", rows=200_000),
                    Ingredient(task="spelling_bee", rows=80_000),
                ),
            ),
            sft=Sft(
                mixture=(
                    Ingredient(task="arc_easy"),
                    Ingredient(task="arc_challenge"),
                    Ingredient(task="gsm8k"),
                    Ingredient(task="smoltalk", rows=10_000),
                    Ingredient(task="identity"),
                    Ingredient(task="simple_spelling", rows=300),
                    Ingredient(task="spelling_bee", rows=300),
                ),
            ),
            evaluation=Evaluation(
                max_val_bpb=MAX_VAL_BPB.get(depth) if source == "fineweb-edu" else None,
            ),
            hardware=Hardware(
                gpus=gpus,
                min_gpu_memory_gib=24 if depth <= 12 else 80,
                device_batch_rows=32 if depth <= 8 or 12 < depth <= 20 else 16 if depth <= 26 else 8,
            ),
        )
    except ValidationError as error:
        raise RecipeError(name, explain(error)) from error


def quick() -> Recipe:
    """Two CPU cores, minutes: trained on the text of this Python installation.

    Shape, rates and mixture are those of the project's prototype; what they reach on two cores is in
    benchmarks/RESULTS.md.
    """
    optimizer = Optimizer(embedding_lr=0.4, unembedding_lr=0.008, grad_clip=None)
    fine = dataclasses.replace(optimizer, muon_momentum_start=0.95, muon_momentum_end=0.95)

    def mixture(rows: int) -> tuple[Ingredient, ...]:
        shares = {
            "identity_small": 0.24,
            "simple_spelling_small": 0.18,
            "letter_count_tool": 0.16,
            "letter_count_by_hand": 0.12,
            "docstring_chat": 0.10,
            "arithmetic": 0.06,
            "direct_sums": 0.06,
            "offline_mmlu": 0.03,
            "offline_arc_easy": 0.03,
            "word_problems": 0.02,
        }
        return tuple(
            Ingredient(task=task, rows=max(1, round(rows * share))) for task, share in shares.items()
        )

    return Recipe(
        name="quick",
        description="4 layers, 128 wide: learns to chat on two CPU cores in minutes",
        data=Data(source="offline", shards=8),
        tokenizer=Tokenizer(vocab_size=2048, shards=8, pattern=gpt4_pattern(r"\p{N}")),
        model=Model(depth=4, width=128, heads=2, kv_heads=2, context=256),
        base=Base(
            steps=1600,
            batch_tokens=16 * 256,
            optimizer=optimizer,
            schedule=Schedule(warmdown=0.4),
            eval_every=400,
            eval_tokens=200_000,
            checkpoint_every=400,
            sample_prompts=(
                "Return the",
                "The string is",
                "A list of",
                "This module provides",
                "If the file",
            ),
            ngram_baselines=True,
        ),
        midtrain=Midtrain(
            mixture=mixture(60_000),
            batch_tokens=16 * 256,
            steps=900,
            optimizer=fine,
            schedule=Schedule(warmdown=0.6),
            eval_every=300,
            checkpoint_every=300,
        ),
        sft=Sft(
            mixture=mixture(12_800),
            batch_rows=32,
            max_tokens=160,
            steps=400,
            optimizer=dataclasses.replace(fine, lr_factor=0.2),
            eval_every=200,
            checkpoint_every=200,
            mmlu_task="offline_mmlu",
            arc_easy_task="offline_arc_easy",
            eval_questions=200,
            skills=True,
        ),
        evaluation=Evaluation(
            # 1.509-1.512 measured (benchmarks/RESULTS.md): text, tokenizer or training is broken above this.
            max_val_bpb=1.60,
            # A model of this size guesses (chance is 1 in 4 and 1 in 3), so what these can find is a broken
            # evaluation: answers that are wrong more often than guesses, by two standard deviations of 200.
            min_mmlu_accuracy=0.19,
            min_arc_easy_accuracy=0.27,
            max_extra_tokens_vs_gpt2=1.2,
        ),
        hardware=Hardware(gpus=1, min_gpu_memory_gib=4, device_batch_rows=16),
    )


def named_recipes() -> dict[str, Recipe]:
    """The recipes the project ships, in partition order."""
    shipped = [
        quick(),
        from_depth(4, vocab_size=10_000, gpus=1),
        from_depth(12, gpus=1),
        *(from_depth(depth) for depth in (20, 24, 26, 32)),
    ]
    return {recipe.name: recipe for recipe in shipped}
