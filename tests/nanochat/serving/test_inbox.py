from __future__ import annotations

import asyncio
import threading

from nanochat.data.conversations import Part
from nanochat.inference.generation import Generation, Token
from nanochat.inference.scheduler import Delta, End, Event, Finish, Usage
from nanochat.serving.inbox import Inbox

GENERATION = Generation(tokens=(), parts=(), tool_calls=(), finish_reason="stop", stop_id=None)
END = End(Usage(1, 2, 0))


def delta(choice: int, text: str, kind: str = "text") -> Delta:
    parts = (Part(kind, text),) if text else ()  # type: ignore[arg-type]
    return Delta(choice, parts, (Token(len(text), False),))


def taken(*events: Event) -> list[Event]:
    async def take() -> list[Event]:
        inbox = Inbox()
        for event in events:
            inbox.deliver(event)
        return await inbox.take()

    return asyncio.run(take())


def test_what_piled_up_of_an_answer_is_one_event_and_each_answer_keeps_its_order() -> None:
    finish = Finish(0, "stop", GENERATION)
    got = taken(delta(0, "a"), delta(1, "x"), delta(0, ""), delta(0, "bc"), finish, delta(1, "y"), END)
    assert got == [
        Delta(
            0, (Part("text", "a"), Part("text", "bc")), (Token(1, False), Token(0, False), Token(2, False))
        ),
        Delta(1, (Part("text", "x"), Part("text", "y")), (Token(1, False), Token(1, False))),
        finish,
        END,
    ]


def test_text_and_calls_stay_apart() -> None:
    events = [delta(0, "a"), delta(0, "1+", "python"), delta(0, "1", "python"), delta(0, "b")]
    got = taken(*events)
    assert [
        [(part.type, part.text) for part in event.parts] for event in got if isinstance(event, Delta)
    ] == [
        [("text", "a")],
        [("python", "1+"), ("python", "1")],
        [("text", "b")],
    ]


def test_events_of_another_thread_all_come_whatever_the_pace() -> None:
    async def main() -> list[Event]:
        inbox = Inbox()

        def send() -> None:
            for number in range(500):
                inbox.deliver(delta(0, str(number % 10)))
            inbox.deliver(END)

        thread = threading.Thread(target=send)
        thread.start()
        got: list[Event] = []
        while END not in got:
            got += await inbox.take()
            await asyncio.sleep(0.001)
        thread.join()
        return got

    got = asyncio.run(main())
    text = "".join(part.text for event in got if isinstance(event, Delta) for part in event.parts)
    assert text == "0123456789" * 50
    assert len(got) < 501
