"""A chat with a trained model of the store: find its weights, keep the history, ask.

The weights are those of a receipt, and the tokenizer is the one of that receipt's own lineage, so
a tokenizer that was trained anew since cannot be mixed with an older model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanochat.data.conversations import Conversation, Message, Part
from nanochat.inference.formats import WeightFormat
from nanochat.inference.sampling import Sampling
from nanochat.inference.tools import join_pieces
from nanochat.recipe_book import load_recipes
from nanochat.store.local import local_copy
from nanochat.store.objects import ObjectStore
from nanochat.store.receipts import FileRef, Receipt, current_receipt, read_receipt

if TYPE_CHECKING:
    from nanochat.inference.engine import Engine
    from nanochat.inference.generation import Generation

Source = Literal["base", "mid", "sft"]

STAGE_OF: dict[Source, str] = {"base": "base", "mid": "midtrain", "sft": "sft"}

TOKENIZER = "tokenizer.json"

# Older turns are forgotten so that at least this part of the context is left for an answer.
_ANSWER_SHARE = 0.25


class ChatError(ValueError):
    """There is no such model to talk to, or it cannot take the question: why, and the next step."""


class ChatSession:
    """A conversation with a model that was trained to chat.

    history: the turns so far, calculator calls included. When they no longer fit the context, the
    oldest exchanges are left out of what the model reads.
    """

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        self.engine = engine
        self.sampling = sampling or Sampling()
        self.history: list[Message] = []

    def ask(self, text: str) -> Generation:
        """The whole answer. Raises ChatError for a question that is empty or longer than the context."""
        (generation,) = self.engine.generate([self._prompt(text)], self.sampling)
        self._remember(text, generation.parts)
        return generation

    def stream(self, text: str) -> Iterator[Part]:
        """The answer as it comes. Raises as `ask` does, at the call.

        An answer that is broken off stays in the history as far as it got.
        """
        return self._stream(text, self.engine.stream_parts(self._prompt(text), self.sampling))

    def take_back(self, question: str) -> None:
        """Forget the last turn, if that is what it asked."""
        if len(self.history) >= 2 and self.history[-2] == Message("user", question):
            del self.history[-2:]

    def reset(self) -> None:
        """Forget all turns."""
        self.history = []

    def _stream(self, text: str, pieces: Iterator[Part]) -> Iterator[Part]:
        said: list[Part] = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            self._remember(text, join_pieces(said))

    def _remember(self, text: str, parts: tuple[Part, ...]) -> None:
        if parts:
            self.history += [Message("user", text), Message("assistant", parts)]

    def _prompt(self, text: str) -> list[int]:
        if not text.strip():
            raise ChatError("the question is empty")
        context = self.engine.context
        room = context - min(self.sampling.max_tokens, int(context * _ANSWER_SHARE))
        messages = (*self.history, Message("user", text))
        prompt = self.engine.tokenizer.render_prompt(Conversation(messages))
        while len(prompt) > room and len(messages) > 1:
            messages = messages[2:]
            prompt = self.engine.tokenizer.render_prompt(Conversation(messages))
        if len(prompt) >= context:
            raise ChatError(
                f"the question is {len(prompt)} tokens long; this model reads {context}, answer included: "
                "shorten it"
            )
        return prompt


def load_chat(
    store: ObjectStore, model: str, source: Source = "sft", sampling: Sampling | None = None
) -> ChatSession:
    """A chat with a model's current stage. Raises ChatError (see `load_engine`)."""
    return ChatSession(load_engine(store, model, source), sampling)


def load_engine(
    store: ObjectStore,
    model: str,
    source: Source = "sft",
    device: str = "auto",
    *,
    weights: WeightFormat = WeightFormat.FLOAT,
    as_trained: bool = False,
) -> Engine:
    """The engine over a model's current `source` stage (see `open_engine`).

    Raises ChatError where that stage is not built, CheckpointError where a file is not what its receipt
    says.
    """
    receipt = built_receipt(store, model, source)
    return receipt_engine(store, receipt, device, weights=weights, as_trained=as_trained)


def built_receipt(store: ObjectStore, model: str, source: Source) -> Receipt:
    """The current one of a model's stage. Raises ChatError where that is not built."""
    receipt = current_receipt(store, model, STAGE_OF[source])
    if receipt is None:
        raise ChatError(_why_missing(store, model, source))
    return receipt


def receipt_engine(
    store: ObjectStore,
    receipt: Receipt,
    device: str = "auto",
    *,
    weights: WeightFormat = WeightFormat.FLOAT,
    as_trained: bool = False,
) -> Engine:
    """The engine over what a stage's receipt names, and the tokenizer of its lineage. Raises as
    `load_engine`."""
    tokenizer_file = _tokenizer_of(store, receipt)
    # Only now that there is something to load: torch takes a second.
    from nanochat.training.checkpoint import MODEL_FILES, load_card, verify_file

    with tempfile.TemporaryDirectory(prefix="nanochat-chat-") as temporary:
        folder = Path(temporary)
        for file in (*(receipt.output(name) for name in MODEL_FILES), tokenizer_file):
            place = folder / file.name
            place.symlink_to(local_copy(store, file).resolve())
            verify_file(place, file, store.url)
        if load_card(folder).tokenizer_sha256 != tokenizer_file.sha256:
            raise ChatError(
                f"stage {receipt.stage} ({receipt.fingerprint[:12]}) was trained with another tokenizer than "
                f"{tokenizer_file.key}; rebuild it with --force"
            )
        return open_engine(folder, device, weights=weights, as_trained=as_trained)


def open_engine(
    folder: Path,
    device: str = "auto",
    *,
    weights: WeightFormat = WeightFormat.FLOAT,
    as_trained: bool = False,
) -> Engine:
    """The engine over a folder with weights, model card and tokenizer; `auto` is an NVIDIA GPU where there
    is one, else the CPU (an Apple GPU only where `mps` is asked for).

    Weights are bfloat16 where that is faster: on an NVIDIA GPU, and on a CPU that multiplies it natively
    (one with AVX2 alone takes longer than with fp32); else fp32. They are laid out for inference. weights:
    the matrices' format. as_trained: fp32, as the checkpoint has them. Raises CheckpointError naming the
    file, ChatError where the weights cannot be in that format.
    """
    import torch

    from nanochat.inference.engine import Engine
    from nanochat.inference.prefixes import PREFIX_CACHE_BYTES
    from nanochat.inference.quantized import quantize
    from nanochat.tokenizer import Tokenizer
    from nanochat.training.checkpoint import load_model
    from nanochat.training.runtime import cpu_has_fast_bf16

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    fast_bf16 = chosen.startswith("cuda") or (chosen == "cpu" and cpu_has_fast_bf16())
    dtype = torch.bfloat16 if fast_bf16 and not as_trained else torch.float32
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    loaded = load_model(folder, device=chosen, dtype=dtype)
    if not as_trained:
        try:
            quantize(loaded.fuse(), weights)
        except ValueError as error:
            raise ChatError(str(error)) from error
    return Engine(loaded, tokenizer, prefix_cache_bytes=PREFIX_CACHE_BYTES)


def _why_missing(store: ObjectStore, model: str, source: Source) -> str:
    book = load_recipes()
    try:
        recipe = book[model]
    except KeyError as error:
        return str(error.args[0])
    built = [other for other, stage in STAGE_OF.items() if current_receipt(store, model, stage)]
    if built:
        return (
            f"model {model!r} has no finished {STAGE_OF[source]} stage in {store.url}, but you can talk to "
            f"what it has: --source {' or '.join(built)}"
        )
    return (
        f"model {recipe.name!r} is not built yet (nothing of it in {store.url}). `make quickstart` builds "
        f"quick; `nanochat plan --model {recipe.name}` shows what building a model takes"
    )


def _tokenizer_of(store: ObjectStore, receipt: Receipt) -> FileRef:
    """The tokenizer that the stage was trained with."""
    for used in receipt.inputs:
        if used.stage == "tokenizer":
            made = read_receipt(store, "tokenizer", used.fingerprint)
            if made is not None:
                return made.output(TOKENIZER)
    raise ChatError(
        f"the tokenizer that stage {receipt.stage} ({receipt.fingerprint[:12]}) was trained with has no "
        f"receipt in {store.url}; materialize tokenizer_training for this model again"
    )
