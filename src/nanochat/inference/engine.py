"""The engine for programs that wait for their answers: evaluation, samples, `nanochat chat`.

It runs a batch of its own (`nanochat.inference.batch`) in the thread that asks. What serves several
clients at once is the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nanochat.data.conversations import Part
from nanochat.inference.batch import Batch
from nanochat.inference.calculator import Calculator
from nanochat.inference.generation import Generation, Request
from nanochat.inference.prefixes import PrefixCache
from nanochat.inference.sampling import Sampling
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer


class Engine:
    """Generates with one model. Not for several threads at once.

    max_batch: prompts that are worked on together; more are done as places become free.
    prefix_cache_bytes: keys and values that are kept of what was read and said, so that a chat's next
    turn reads the new question only. For a model whose weights change between two calls: 0.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        calculator: Calculator | None = None,
        *,
        max_batch: int = 64,
        prefix_cache_bytes: int = 0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.calculator = calculator or Calculator()
        self.max_batch = max_batch
        self._prefixes = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.model.config.context

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """One generation for each prompt, in their order. A prompt is ids, `<|bos|>` included.

        Ends at `<|assistant_end|>` or `<|bos|>`. Raises ValueError for a prompt that is empty or
        fills the context.
        """
        batch = self._batch()
        requests = [
            Request(prompt=prompt, sampling=sampling, stream=stream) for stream, prompt in enumerate(prompts)
        ]
        for number, request in enumerate(requests, start=1):
            _check(batch, request, number)
        # Prompts of like length waste the least padding.
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt))
        rows = {index: batch.add(requests[index]).rows[0] for index in order}
        while not batch.idle:
            batch.step()
        return [rows[index].generation() for index in range(len(requests))]

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """The text of one generation as it comes, in whole characters. Raises as `generate` does."""
        return (part.text for part in self.stream_parts(prompt, sampling) if part.type == "text")

    def stream_parts(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Part]:
        """One generation as it comes: text, code and outputs, each in whole characters.

        Consecutive pieces of one type belong together. Raises as `generate` does, at the call.
        """
        batch, request = self._batch(), Request(prompt=prompt, sampling=sampling)
        _check(batch, request, 1)
        return self._stream(batch, request)

    def _stream(self, batch: Batch, request: Request) -> Iterator[Part]:
        answered = batch.add(request)
        (row,) = answered.rows
        try:
            while not row.ended:
                batch.step()
                yield from row.take_news()[0]
        finally:
            batch.cancel(answered)
            batch.step()  # what was said so far is kept for the next turn

    def _batch(self) -> Batch:
        return Batch(
            self.model, self.tokenizer, self.calculator, max_rows=self.max_batch, prefixes=self._prefixes
        )


def _check(batch: Batch, request: Request, number: int) -> None:
    try:
        batch.check(request)
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from None
