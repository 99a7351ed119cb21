"""Plans: what every stage of a model will take, before anything is spent.

Everything is derived from the recipe and the store. Where data is not there yet the plan has no
fingerprint and says what it needs, and gives everything else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from nanochat import costs
from nanochat.data.identity import DataNeeded, shard_digests
from nanochat.recipes import Ingredient, Recipe, parameters
from nanochat.stages import StageState, resolve
from nanochat.store import ObjectStore
from nanochat.store.documents import Document
from nanochat.store.objects import ObjectNotFound

# Rows of a task where the recipe says "all" (the published sizes of the training splits), and tokens of
# an average conversation: for estimates before the mixture is written.
TASK_ROWS: Mapping[str, int] = {
    "smoltalk": 460_341,
    "mmlu_auxiliary_train": 99_842,
    "gsm8k": 7_473,
    "arc_easy": 2_251,
    "arc_challenge": 1_119,
}
UNKNOWN_TASK_ROWS = 1_000
TOKENS_PER_CONVERSATION = 400
# Characters of a shard of karpathy/fineweb-edu-100b-shuffle, and its size on disk (nanochat's
# documentation of the data set: ~250M characters, ~100 MB compressed).
SHARD_BYTES = 100_000_000


class StagePlan(Document):
    """One stage. Numbers that cannot be known yet are None; `estimated` names the guessed ones."""

    schema_name: ClassVar[str] = "nanochat.plan"

    model: str
    stage: str
    status: str
    reasons: tuple[str, ...]
    needs: tuple[str, ...]
    fingerprint: str | None
    receipt: str | None
    section: dict[str, Any]
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    hours: float | None = None
    dollars: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    estimated: tuple[str, ...] = ()


class ModelPlan(BaseModel):
    """A model's plan: its size, its shards, its stages."""

    model_config = ConfigDict(frozen=True)
    model: str
    description: str
    recipe: dict[str, Any]
    parameters: int
    matmul_parameters: int
    flops_per_token: int
    kv_bytes_per_token: int
    machine: str
    machine_flops_per_s: float
    shards_needed: int
    shards_missing: str | None
    stages: tuple[StagePlan, ...]


def plan_model(
    recipe: Recipe, store: ObjectStore, *, machine: str, flops_per_s: float, usd_per_h: float = 0.0
) -> ModelPlan:
    """The plan of every enabled stage on a machine that trains at `flops_per_s`."""
    states = resolve(recipe, store)
    try:
        shard_digests(store, recipe, count=recipe.data.shards, validation=True)
        missing = None
    except DataNeeded as error:
        missing = str(error)
    vocab = recipe.tokenizer.vocab_size
    return ModelPlan(
        model=recipe.name,
        description=recipe.description,
        recipe=recipe.to_json(),
        parameters=parameters(recipe.model, vocab),
        matmul_parameters=costs.matmul_parameters(recipe.model, vocab),
        flops_per_token=costs.flops_per_token(recipe.model, vocab),
        kv_bytes_per_token=costs.kv_bytes_per_token(recipe.model),
        machine=machine,
        machine_flops_per_s=flops_per_s,
        shards_needed=recipe.data.shards + 1,
        shards_missing=missing,
        stages=tuple(
            plan_stage(recipe, name, states, store, flops_per_s=flops_per_s, usd_per_h=usd_per_h)
            for name in states
        ),
    )


def plan_stage(
    recipe: Recipe,
    stage: str,
    states: Mapping[str, StageState],
    store: ObjectStore,
    *,
    flops_per_s: float | None = None,
    usd_per_h: float = 0.0,
) -> StagePlan:
    """The plan of one stage; its hours and dollars are those of a machine that trains at `flops_per_s`,
    where that is given."""
    state = states[stage]
    steps, tokens, estimated = _work(recipe, stage, states, store)
    flops = hours = None
    memory = disk = None
    if tokens is not None:
        flops = float(tokens) * costs.flops_per_token(recipe.model, recipe.tokenizer.vocab_size)
        hours = None if flops_per_s is None else flops / flops_per_s / 3600
        memory = costs.training_memory_bytes(
            recipe.model, recipe.tokenizer.vocab_size, recipe.hardware.device_batch_rows
        )
        disk = 2 * costs.checkpoint_bytes(recipe.model, recipe.tokenizer.vocab_size)
        if stage == "base":
            disk += _shard_bytes(recipe)
    return StagePlan(
        model=recipe.name,
        stage=stage,
        status=state.status.value,
        reasons=state.reasons,
        needs=state.needs,
        fingerprint=state.fingerprint,
        receipt=state.receipt.digest() if state.receipt else None,
        section=_section(recipe, stage),
        steps=steps,
        tokens=tokens,
        flops=flops,
        hours=hours,
        dollars=None if hours is None else hours * usd_per_h,
        memory_bytes=memory,
        disk_bytes=disk,
        estimated=estimated,
    )


def _section(recipe: Recipe, stage: str) -> dict[str, Any]:
    document = recipe.to_json()
    section: Any = document[{"midtrain_data": "midtrain", "sft_data": "sft"}.get(stage, stage)]
    return dict(section)


def _shard_bytes(recipe: Recipe) -> int:
    return (recipe.data.shards + 1) * (SHARD_BYTES if recipe.data.source != "offline" else 4_000_000)


def _work(
    recipe: Recipe, stage: str, states: Mapping[str, StageState], store: ObjectStore
) -> tuple[int | None, int | None, tuple[str, ...]]:
    """Steps and tokens of a training stage, and which of them are guesses. (None, None) for others."""
    if stage == "base":
        return recipe.base.steps, recipe.base.steps * recipe.base.batch_tokens, ()
    data, tokenizer = states.get(f"{stage}_data"), states.get("tokenizer")
    if stage == "midtrain" and recipe.midtrain:
        midtrain = recipe.midtrain
        if midtrain.steps:
            return midtrain.steps, midtrain.steps * midtrain.batch_tokens, ()
        counted = counted_tokens(store, data, tokenizer)
        tokens = counted or _guessed_tokens(midtrain.mixture, data)
        # How full the rows will be is known when they are packed.
        guesses = ("steps",) if counted else ("steps", "tokens")
        return math.ceil(tokens / midtrain.batch_tokens), tokens, guesses
    if stage == "sft" and recipe.sft:
        sft = recipe.sft
        known = _counted_rows(data)
        rows = known or mixture_rows(sft.mixture)
        steps = sft.steps or math.ceil(rows / sft.batch_rows)
        counted = counted_tokens(store, data, tokenizer)
        tokens = counted or _guessed_tokens(sft.mixture, data)
        guessed = {"steps": not (sft.steps or known), "tokens": not (counted and known)}
        seen = round(tokens * steps * sft.batch_rows / rows)
        return steps, seen, tuple(name for name, is_guess in guessed.items() if is_guess)
    return None, None, ()


def mixture_rows(mixture: tuple[Ingredient, ...]) -> int:
    """Conversations of one pass, where "all" is the published size of the task."""
    return sum((part.rows or _task_rows(part.task)) * part.repeat for part in mixture)


def _task_rows(task: str) -> int:
    # Only now that it is needed: what makes the data takes a third of a second to load.
    from nanochat.data.stage_data import identity_path

    if task == "identity" and identity_path().is_file():
        with identity_path().open(encoding="utf-8") as file:
            return sum(1 for _ in file)
    return TASK_ROWS.get(task, UNKNOWN_TASK_ROWS)


def token_count_key(train_key: str, tokenizer_fingerprint: str) -> str:
    """Where the tokens of a stage's ``train.jsonl`` are kept, as counted with one tokenizer."""
    return f"{train_key}.tokens/{tokenizer_fingerprint[:12]}.json"


def counted_tokens(store: ObjectStore, data: StageState | None, tokenizer: StageState | None) -> int | None:
    """Tokens of the training conversations, where the store has them counted."""
    if not (data and data.receipt and tokenizer and tokenizer.fingerprint):
        return None
    key = token_count_key(data.receipt.output("train.jsonl").key, tokenizer.fingerprint)
    try:
        return int(json.loads(store.get(key))["tokens"])
    except ObjectNotFound:
        return None


def _counted_rows(data: StageState | None) -> int | None:
    """Conversations of one pass, where the mixture is written."""
    rows = data.receipt.metrics.get("rows") if data and data.receipt else None
    return int(rows) if rows else None


def _guessed_tokens(mixture: tuple[Ingredient, ...], data: StageState | None) -> int:
    if data and data.receipt and "characters" in data.receipt.metrics:
        # 3.3 characters a token lies between the quick tokenizer (2.8) and a large one (4.2).
        return math.ceil(data.receipt.metrics["characters"] / 3.3)
    return mixture_rows(mixture) * TOKENS_PER_CONVERSATION
