"""A request's events on their way from the scheduler's thread to the coroutine that sends them on."""

from __future__ import annotations

import asyncio

from nanochat.inference.scheduler import Delta, Event


class Inbox:
    """Takes events from any thread, and gives them to one coroutine of the loop that it was made in.

    Where the coroutine is slow, because its client reads slowly, what came of an answer in the meantime is
    one event. So what waits here is no more than the answer itself, and the model does not wait for anybody.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    def deliver(self, event: Event) -> None:
        """For the scheduler's thread. Raises RuntimeError where the loop is closed."""
        self._loop.call_soon_threadsafe(self._put, event)

    async def take(self) -> list[Event]:
        """What has come, waiting for it where there is nothing; neighbouring deltas of one answer joined."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return _joined(events)

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()


def _joined(events: list[Event]) -> list[Event]:
    """Each answer's neighbouring deltas as one; text and calls stay apart, since their order counts."""
    groups: list[list[Delta] | Event] = []
    last: dict[int, list[Delta]] = {}
    for event in events:
        if not isinstance(event, Delta):
            groups.append(event)
        elif event.choice in last and _calls(last[event.choice][-1]) == _calls(event):
            last[event.choice].append(event)
        else:
            last[event.choice] = [event]
            groups.append(last[event.choice])
    return [_one(group) if isinstance(group, list) else group for group in groups]


def _calls(delta: Delta) -> bool:
    return any(part.type != "text" for part in delta.parts)


def _one(deltas: list[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    return Delta(
        deltas[0].choice,
        tuple(part for delta in deltas for part in delta.parts),
        tuple(token for delta in deltas for token in delta.tokens),
    )
