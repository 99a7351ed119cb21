from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanochat.data.conversations import Part
from nanochat.inference.calculator import Calculator, Refusal, Result
from nanochat.inference.generation import Request
from nanochat.inference.sampling import Sampling
from nanochat.inference.scheduler import (
    ClosedError,
    Delta,
    End,
    Event,
    Finish,
    QueueFullError,
    Scheduler,
    Usage,
)
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

Spell = Callable[[str], list[int]]
Script = Callable[..., GPT]


class Gate(GPT):
    """Wraps a model: every forward pass waits until the gate is open."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model.config, model.vocab_size)
        self.wrapped = model
        self.open = threading.Event()
        self.passes = 0

    def forward(self, *args: Tensor, **options: object) -> Tensor:
        assert self.open.wait(20)
        self.passes += 1
        return self.wrapped(*args, **options)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def long_request(prompt: int = 1, max_tokens: int = 1000) -> Request:
    return Request(prompt=[prompt], sampling=Sampling(max_tokens=max_tokens))


def test_events_come_in_order_and_join_to_the_answer(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    said = "s<|python_start|>'été'.count('é')<|python_end|><|output_start|>2<|output_end|>2 é😀"
    with Scheduler(script({(1,): spell(said)}), byte_tokenizer) as scheduler:
        events = list(scheduler.submit(Request(prompt=[1])))
    *deltas, finish, end = events
    assert all(isinstance(event, Delta) for event in deltas)
    assert isinstance(finish, Finish)
    assert (finish.choice, finish.reason) == (0, "stop")
    said_text = [piece for delta in deltas for piece in delta.parts if piece.type == "text"]
    assert "".join(piece.text for piece in said_text) == finish.generation.text == "s2 é😀"
    assert Part("python_output", "2") in finish.generation.parts
    assert all("\ufffd" not in piece.text for piece in said_text)
    tokens = [token for delta in deltas for token in delta.tokens]
    assert tuple(tokens) == finish.generation.tokens
    assert end == End(Usage(prompt_tokens=1, completion_tokens=len(tokens), cached_tokens=0))


def test_many_threads_get_their_own_answers(byte_tokenizer: Tokenizer, script: Script, spell: Spell) -> None:
    texts = {number: f"answer {number} " * (number % 4 + 1) for number in range(24)}
    model = script({(number,): spell(text) for number, text in texts.items()}, context=200)
    answers: dict[int, str] = {}
    with Scheduler(model, byte_tokenizer, max_rows=5) as scheduler:

        def ask(number: int) -> None:
            (generation,) = scheduler.submit(Request(prompt=[number])).result()
            answers[number] = generation.text

        threads = [threading.Thread(target=ask, args=(number,)) for number in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        stats = scheduler.stats()
    assert answers == texts
    assert max(model.rows_read) <= 5
    assert (stats.running, stats.waiting, stats.requests, stats.prompt_tokens) == (0, 0, 24, 24)


def test_a_request_joins_while_another_runs(byte_tokenizer: Tokenizer, script: Script, spell: Spell) -> None:
    model = script({(1,): spell("x" * 1900), (2,): spell("short")}, context=2000)
    with Scheduler(model, byte_tokenizer) as scheduler:
        first = scheduler.submit(long_request(max_tokens=1900))
        wait_until(lambda: scheduler.stats().running == 1)
        assert scheduler.submit(Request(prompt=[2])).result()[0].text == "short"
        assert scheduler.stats().running == 1
        first.cancel()
        (generation,) = first.result()
    assert generation.finish_reason == "cancelled"
    assert 2 in model.rows_read


def test_a_callback_serves_asyncio(byte_tokenizer: Tokenizer, script: Script, spell: Spell) -> None:
    model = script({(1,): spell("one"), (2,): spell("two")})

    async def ask(scheduler: Scheduler, prompt: int) -> str:
        events: asyncio.Queue[Event] = asyncio.Queue()
        deliver = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, events.put_nowait)
        scheduler.submit(Request(prompt=[prompt]), deliver)
        text = ""
        while not isinstance(event := await events.get(), End):
            if isinstance(event, Delta):
                text += "".join(part.text for part in event.parts)
        return text

    async def both(scheduler: Scheduler) -> list[str]:
        return await asyncio.gather(ask(scheduler, 1), ask(scheduler, 2))

    with Scheduler(model, byte_tokenizer) as scheduler:
        assert asyncio.run(both(scheduler)) == ["one", "two"]


def test_a_callback_that_fails_ends_its_own_request_only(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(event: Event) -> None:
        raise RuntimeError("the event loop is closed")

    model = script({(1,): spell("x" * 1900), (2,): spell("fine")}, context=2000)
    with Scheduler(model, byte_tokenizer) as scheduler:
        lost = scheduler.submit(long_request(max_tokens=1900), gone)
        assert scheduler.submit(Request(prompt=[2])).result()[0].text == "fine"
        assert lost.wait(20)
        assert scheduler.stats().completion_tokens < 1000
    assert "the event loop is closed" in caplog.text


def test_cancelling_frees_the_place_at_the_next_step(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    gate = Gate(script({(1,): spell("x" * 1900), (2,): spell("y")}, context=2000))
    with Scheduler(gate, byte_tokenizer, max_rows=1) as scheduler:
        running, waiting = scheduler.submit(long_request()), scheduler.submit(Request(prompt=[2]))
        dropped = scheduler.submit(Request(prompt=[2]))
        dropped.cancel()
        running.cancel()
        gate.open.set()
        assert waiting.result()[0].text == "y"
        for handle in (running, dropped):
            *_, finish, end = handle
            assert isinstance(finish, Finish)
            assert finish.reason == "cancelled"
            assert isinstance(end, End)
        # The prompt's pass may have been under way, and with it one more token.
        assert len(running.request.prompt) == 1
        assert gate.passes <= 6


def test_a_full_queue_refuses_and_recovers(byte_tokenizer: Tokenizer, script: Script, spell: Spell) -> None:
    gate = Gate(script({(1,): spell("abc")}))
    with Scheduler(gate, byte_tokenizer, max_rows=1, max_waiting=2) as scheduler:
        handles = [scheduler.submit(Request(prompt=[1]))]
        wait_until(lambda: scheduler.stats().waiting == 0)
        handles += [scheduler.submit(Request(prompt=[1])) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait"):
            scheduler.submit(Request(prompt=[1]))
        gate.open.set()
        assert [handle.result()[0].text for handle in handles] == ["abc"] * 3
        assert scheduler.submit(Request(prompt=[1])).result()[0].text == "abc"


def test_closing_finishes_what_was_accepted(byte_tokenizer: Tokenizer, script: Script, spell: Spell) -> None:
    gate = Gate(script({(1,): spell("abc")}))
    scheduler = Scheduler(gate, byte_tokenizer, max_rows=1)
    handles = [scheduler.submit(Request(prompt=[1])) for _ in range(3)]
    gate.open.set()
    scheduler.close()
    assert [handle.result()[0].text for handle in handles] == ["abc"] * 3
    with pytest.raises(ClosedError):
        scheduler.submit(Request(prompt=[1]))


def test_closing_cancels_what_takes_too_long(byte_tokenizer: Tokenizer, script: Script, spell: Spell) -> None:
    scheduler = Scheduler(script({(1,): spell("x" * 10**5)}, context=10**5), byte_tokenizer)
    handle = scheduler.submit(long_request(max_tokens=10**5 - 1))
    wait_until(lambda: scheduler.stats().running == 1)
    scheduler.close(timeout_s=0.1)
    assert handle.result()[0].finish_reason == "cancelled"


def test_a_model_that_breaks_fails_its_requests_and_not_the_next(byte_tokenizer: Tokenizer) -> None:
    from nanochat.recipes import Model

    class Breaks(GPT):
        broken = True

        def forward(self, *args: Tensor, **options: object) -> Tensor:
            if self.broken:
                raise RuntimeError("out of memory")
            return super().forward(*args, **options)  # type: ignore[arg-type]

    model = Breaks(Model(depth=1, width=8, heads=1, kv_heads=1, context=32), byte_tokenizer.vocab_size)
    torch.nn.init.normal_(model.lm_head.weight)
    with Scheduler(model, byte_tokenizer) as scheduler:
        with pytest.raises(RuntimeError, match="out of memory"):
            scheduler.submit(Request(prompt=[1])).result()
        model.broken = False
        assert scheduler.submit(Request(prompt=[1], sampling=Sampling(max_tokens=3))).result()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(prompt=[]), "empty"),
        (Request(prompt=[1] * 64), "64 tokens"),
        (Request(prompt=[1, 999]), "999 is not in the vocabulary"),
        (Request(prompt=[-1]), "-1 is not in the vocabulary"),
        (Request(prompt=[1], n=0), "n must be 1 to 4"),
        (Request(prompt=[1], n=5), "n must be 1 to 4"),
    ],
)
def test_what_can_never_be_answered_is_refused_at_once(
    byte_tokenizer: Tokenizer, script: Script, request_: Request, reason: str
) -> None:
    with (
        Scheduler(script({(1,): []}), byte_tokenizer, max_rows=4) as scheduler,
        pytest.raises(ValueError, match=reason),
    ):
        scheduler.submit(request_)


class SlowCalculator(Calculator):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def evaluate(self, expression: str) -> Result | Refusal:
        assert self.go.wait(20)
        if expression == "break":
            raise RuntimeError("the interpreter is gone")
        return super().evaluate(expression)


def test_a_slow_call_holds_up_its_own_answer_only(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    call = "a<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>b"
    model = script({(1,): spell(call), (2,): spell("quick answer")})
    calculator = SlowCalculator()
    with Scheduler(model, byte_tokenizer, calculator) as scheduler:
        slow = scheduler.submit(Request(prompt=[1]))
        for _ in range(2):
            assert scheduler.submit(Request(prompt=[2])).result()[0].text == "quick answer"
        calculator.go.set()
        (generation,) = slow.result()
    assert generation.text == "ab"
    assert Part("python_output", "42") in generation.parts


def test_a_calculator_that_breaks_ends_no_answer(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    call = "a<|python_start|>break<|python_end|><|output_start|>error<|output_end|>b"
    calculator = SlowCalculator()
    calculator.go.set()
    with Scheduler(script({(1,): spell(call)}), byte_tokenizer, calculator) as scheduler:
        (generation,) = scheduler.submit(Request(prompt=[1])).result()
    assert generation.text == "ab"
    assert generation.tool_calls[0].outcome == Refusal("the interpreter is gone")


def test_a_request_may_be_cancelled_while_the_calculator_works(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    calculator = SlowCalculator()
    with Scheduler(
        script({(1,): spell("<|python_start|>1<|python_end|>")}), byte_tokenizer, calculator
    ) as one:
        handle = one.submit(Request(prompt=[1]))
        wait_until(lambda: one.stats().running == 1)
        handle.cancel()
        assert handle.result()[0].finish_reason == "cancelled"
        calculator.go.set()
