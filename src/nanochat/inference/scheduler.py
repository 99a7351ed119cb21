"""Many clients, one model: requests come from any thread, and a thread of the scheduler's own answers them.

    with Scheduler(model, tokenizer) as scheduler:
        handle = scheduler.submit(Request(prompt=ids, sampling=Sampling(max_tokens=64)))
        for event in handle:                        # blocks; for asyncio give submit a callback instead
            match event:
                case Delta(): ...                   # pieces of text, calls and outputs, and tokens
                case Finish(): ...                  # one of the request's n answers has ended
                case End(): ...                     # the last event: what it took, or what went wrong

For asyncio::

    events: asyncio.Queue[Event] = asyncio.Queue()
    deliver = functools.partial(loop.call_soon_threadsafe, events.put_nowait)
    handle = scheduler.submit(request, deliver)     # and handle.cancel() when the client goes away

Every request gets its events in this order: any number of Delta, for each answer a Finish behind
its last Delta, one End. The End comes whatever happens: cancelled, failed or cut short by `close`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from nanochat.data.conversations import Part
from nanochat.inference.batch import Batch, Prompt
from nanochat.inference.calculator import Calculator
from nanochat.inference.generation import FinishReason, Generation, Request, Row, Token
from nanochat.inference.prefixes import PREFIX_CACHE_BYTES, PrefixCache
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many requests wait as may: ask again later."""


class ClosedError(Exception):
    """The scheduler takes no more requests."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What came anew in answer number `choice` (from 0).

    tokens: the new ones. parts: the text that became certain, in whole characters, so a token may come
    without text, and text one or more tokens later than it. Consecutive parts of one type belong
    together.
    """

    choice: int
    parts: tuple[Part, ...]
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """Answer number `choice` has ended; `generation` is all of it."""

    choice: int
    reason: FinishReason
    generation: Generation


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt, of all answers together (the calculator's included), and of the prompt's
    beginning whose keys and values were known.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class End:
    """The request's last event. error: what broke it off, which is no fault of the request's."""

    usage: Usage
    error: BaseException | None = None


Event = Delta | Finish | End


@dataclass(frozen=True, slots=True)
class Stats:
    """What the scheduler does now, and has done since it was started.

    running: answers that are being written. waiting: requests whose turn has not come. requests: all that
    were accepted. The tokens are those of requests that have ended.
    """

    running: int
    waiting: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Handle:
    """One request on its way. Iterated by one thread, where `submit` was given no callback."""

    def __init__(
        self, scheduler: Scheduler, request: Request, on_event: Callable[[Event], object] | None
    ) -> None:
        self.request = request
        self._scheduler = scheduler
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._deliver = on_event or self._events.put
        self._own_queue = on_event is None
        self._ended = threading.Event()
        self._cancelled = False
        self._deaf = False
        self._prompt: Prompt | None = None
        self._finished: set[int] = set()

    def __iter__(self) -> Iterator[Event]:
        """The events up to the End, waiting for each; to be done once. Raises the End's error, if any."""
        assert self._own_queue, "the callback gets the events"
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, End):
                if event.error is not None:
                    raise event.error
                return

    def result(self) -> list[Generation]:
        """Wait for the End; the answers in their order. Instead of iterating. Raises as iterating does."""
        finished = {event.choice: event.generation for event in self if isinstance(event, Finish)}
        return [finished[choice] for choice in sorted(finished)]

    def cancel(self) -> None:
        """Break the request off at the next step, from any thread; its answers end as `cancelled`."""
        self._cancelled = True
        self._scheduler._wake()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the End has been delivered; False where that took longer."""
        return self._ended.wait(timeout_s)


class Scheduler:
    """Owns a model, on one thread of its own, until `close`.

    calculator: its own from now on, closed with it. max_rows: answers that are worked on together.
    max_waiting: requests that may wait for their prompt to be read. The running rows take up to max_rows ·
    context · `kv_bytes_per_token` of memory, as far as they are used; keys and values of earlier requests
    take as much besides, at most `prefix_cache_bytes`.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        calculator: Calculator | None = None,
        *,
        max_rows: int = 32,
        max_waiting: int = 128,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_waiting = max_waiting
        self._calculator = calculator or Calculator()
        self._executor = ThreadPoolExecutor(self._calculator.workers, thread_name_prefix="calculator")
        self._max_rows = max_rows
        rows_bytes = max_rows * model.config.context * model.kv_bytes_per_token(model.dtype)
        self._prefix_cache_bytes = min(prefix_cache_bytes, rows_bytes)
        self._batch = self._new_batch()
        self._changed = threading.Condition()
        self._submitted: list[Handle] = []
        self._active: list[Handle] = []
        self._closing = False
        self._cancel_all = False
        self._requests = 0
        self._spent = Usage(0, 0, 0)
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(timeout_s=None if error is None else 0.0)

    # ----------------------------------------------------------------------------------------------
    # For any thread

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.model.config.context

    @property
    def alive(self) -> bool:
        """Whether its thread runs: False once it is closed."""
        return self._thread.is_alive()

    def submit(self, request: Request, on_event: Callable[[Event], object] | None = None) -> Handle:
        """Put a request in the queue.

        on_event: gets every event, in the scheduler's thread, so it must return at once; where it
        raises, the request is cancelled and gets no more events. Without it the handle is iterated.

        Raises ValueError where the request can never be answered, QueueFullError, ClosedError.
        """
        # A copy: what the caller does to its list afterwards must not reach the batch.
        request = replace(request, prompt=tuple(request.prompt))
        self._batch.check(request)
        handle = Handle(self, request, on_event)
        with self._changed:
            if self._closing:
                raise ClosedError("the scheduler is closing and takes no more requests")
            if self._waiting() >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests wait already, which is as many as may")
            self._submitted.append(handle)
            self._requests += 1
            self._changed.notify()
        return handle

    def stats(self) -> Stats:
        """What the scheduler does now, and has done."""
        with self._changed:
            return Stats(
                running=len(self._batch.rows),
                waiting=self._waiting(),
                requests=self._requests,
                prompt_tokens=self._spent.prompt_tokens,
                completion_tokens=self._spent.completion_tokens,
                cached_tokens=self._spent.cached_tokens,
            )

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more requests, finish those accepted, and stop.

        timeout_s: after so long the rest is cancelled (None: never).
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._changed:
                self._cancel_all = True
                self._changed.notify()
            self._thread.join()
        self._executor.shutdown()
        self._calculator.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _waiting(self) -> int:
        return len(self._submitted) + len(self._batch.waiting)

    # ----------------------------------------------------------------------------------------------
    # In the scheduler's thread

    def _run(self) -> None:
        while self._next_work():
            try:
                self._batch.step()
            except Exception as error:
                self._fail(error)
            else:
                self._report()

    def _next_work(self) -> bool:
        """Wait for work and take it in; False when there is none and none will come."""
        with self._changed:
            while not (self._active or self._submitted or self._closing):
                self._changed.wait()
            for handle in self._submitted:
                handle._prompt = self._batch.add(handle.request)
            self._active += self._submitted
            self._submitted = []
            for handle in self._active:
                if handle._prompt is not None and (handle._cancelled or self._cancel_all):
                    self._batch.cancel(handle._prompt)
            return bool(self._active)

    def _report(self) -> None:
        """Deliver what is new."""
        for handle in list(self._active):
            assert handle._prompt is not None, "active requests are in the batch"
            for choice, row in enumerate(handle._prompt.rows):
                if choice not in handle._finished:
                    self._report_row(handle, choice, row)
            if handle._prompt.ended:
                self._end(handle, None)

    def _report_row(self, handle: Handle, choice: int, row: Row) -> None:
        parts, tokens = row.take_news()
        if parts or tokens:
            self._deliver(handle, Delta(choice, parts, tokens))
        if row.finish_reason is not None:
            handle._finished.add(choice)
            self._deliver(handle, Finish(choice, row.finish_reason, row.generation()))

    def _fail(self, error: Exception) -> None:
        """A step broke: whatever was in the batch ends with the error, and the next begins anew."""
        for handle in list(self._active):
            self._end(handle, error)
        self._batch = self._new_batch()

    def _end(self, handle: Handle, error: Exception | None) -> None:
        assert handle._prompt is not None, "active requests are in the batch"
        prompt = handle._prompt
        usage = Usage(len(prompt.ids), sum(len(row.tokens) for row in prompt.rows), prompt.reused)
        with self._changed:
            self._active.remove(handle)
            self._spent = Usage(
                self._spent.prompt_tokens + usage.prompt_tokens,
                self._spent.completion_tokens + usage.completion_tokens,
                self._spent.cached_tokens + usage.cached_tokens,
            )
        self._deliver(handle, End(usage, error))
        handle._ended.set()

    @staticmethod
    def _deliver(handle: Handle, event: Event) -> None:
        if handle._deaf:
            return
        try:
            handle._deliver(event)
        except Exception:
            # Whoever listened is gone (a closed event loop, say), and needs no answer.
            _log.warning("a request's callback failed; the request is cancelled", exc_info=True)
            handle._deaf = handle._cancelled = True

    def _new_batch(self) -> Batch:
        return Batch(
            self.model,
            self.tokenizer,
            self._calculator,
            max_rows=self._max_rows,
            prefixes=PrefixCache(self._prefix_cache_bytes) if self._prefix_cache_bytes else None,
            executor=self._executor,
        )
