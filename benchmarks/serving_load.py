"""Load `nanochat serve` with many clients at once, and hold what comes back against what it promises.

    python benchmarks/serving_load.py --seconds 120 --clients 64

The server is the program itself, over the architecture of `quick` with random weights and a tokenizer of
single bytes, so that characters are cut everywhere. Each client asks one question after the other: streamed
or whole, chat or completion, one answer or two; some leave in the middle. Then the server gets SIGTERM while
all of them go on. The report is one JSON document; the exit code is 1 where a promise was broken:

- Nothing is refused but by 429 and 503, each with Retry-After.
- Every stream is UTF-8, made of events, and ends with [DONE]; every answer has its finish_reason.
- What the server has open is never more than what clients have had open within the last second.
- From the second minute on, the server's resident memory grows by less than 5 MB a minute.
- After SIGTERM whatever was accepted is answered, newcomers are told 503, and the server ends with code 0
  and not a word on standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

KEYS = ("one", "two")
LEAVE_SHARE = 0.15
MOST_GROWTH_MB_PER_MINUTE = 5.0
FREED_WITHIN_S = 1.0
WARM_UP_S = 60.0
WORDS = ("the", "12 + 30", "naïve", "東京", "😀", "strawberry", "<|assistant_end|>", "\u200d", "لماذا")


class Broken(Exception):
    """A promise that the server did not keep."""


@dataclass
class Tally:
    """What all clients saw. spans: from when to when each request was open; None is still."""

    statuses: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    spans: list[list[float | None]] = field(default_factory=list)
    left: int = 0
    left_unanswered: int = 0
    tokens: int = 0
    at_the_door: int = 0
    problems: list[str] = field(default_factory=list)

    def open_since(self, begin_s: float) -> int:
        return sum(end is None or end >= begin_s for _, end in self.spans)


class Client:
    """Asks until it is told that the server ends."""

    def __init__(self, number: int, url: str, tally: Tally, ending: asyncio.Event) -> None:
        self._random = random.Random(number)
        self._tally = tally
        self._ending = ending
        # A connection for each request: one that is kept could be closed just when it is used again.
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {KEYS[number % len(KEYS)]}"},
            limits=httpx.Limits(max_keepalive_connections=0),
            timeout=120,
        )

    async def run(self) -> None:
        async with self._http:
            while True:
                span: list[float | None] = [time.monotonic(), None]
                self._tally.spans.append(span)
                try:
                    goes_on = await self._ask()
                except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError) as error:
                    # Told to end, a server at last closes its door, and whoever stands before it sees that.
                    if not self._ending.is_set():
                        self._tally.problems.append(f"the connection broke: {error!r}")
                    self._tally.at_the_door += 1
                    return
                except Broken as error:
                    self._tally.problems.append(str(error))
                    goes_on = True
                finally:
                    span[1] = time.monotonic()
                if not goes_on:
                    return

    async def _ask(self) -> bool:
        path, body = self._question()
        leaves = self._random.random() < LEAVE_SHARE
        begin_s = time.monotonic()
        if leaves and not body["stream"]:
            task = asyncio.ensure_future(self._http.post(path, json=body))
            await asyncio.wait([task], timeout=self._random.uniform(0, 0.5))
            if not task.done():
                task.cancel()
                self._tally.left_unanswered += 1
                return True
            answer = task.result()
            return await self._answered(answer, answer.content, begin_s, body)
        async with self._http.stream("POST", path, json=body) as answer:
            if answer.status_code != 200 or not body["stream"]:
                return await self._answered(answer, await answer.aread(), begin_s, body)
            after = self._random.randrange(1, 30) if leaves else None
            await self._read_stream(answer, begin_s, body["n"], after)
        return True

    def _question(self) -> tuple[str, dict[str, Any]]:
        draw = self._random
        text = " ".join(draw.choices(WORDS, k=draw.randrange(1, 12)))
        body: dict[str, Any] = {
            "model": "quick",
            "stream": draw.random() < 0.7,
            "n": draw.choice((1, 1, 1, 2)),
            "max_tokens": draw.randrange(4, 120),
            "temperature": draw.choice((0, 0.7, 1.2)),
            "stop": draw.choice((None, ["x!"])),
        }
        if draw.random() < 0.5:
            return "/v1/completions", {**body, "prompt": text}
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}

    async def _answered(
        self, answer: httpx.Response, content: bytes, begin_s: float, body: dict[str, Any]
    ) -> bool:
        document = json.loads(content)
        self._tally.statuses[str(answer.status_code)] += 1
        if answer.status_code == 200:
            if not all(choice["finish_reason"] for choice in document["choices"]):
                raise Broken(f"an answer has no finish_reason: {document}")
            if len(document["choices"]) != body["n"]:
                raise Broken(f"{body['n']} answers were asked for: {document}")
            self._tally.whole_s.append(time.monotonic() - begin_s)
            self._tally.tokens += document["usage"]["completion_tokens"]
            return True
        if answer.status_code not in (429, 503):
            raise Broken(f"status {answer.status_code}: {content!r}")
        wait_s = int(answer.headers["Retry-After"])
        if document["error"]["code"] == "shutting_down":
            return False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), wait_s)
        return True

    async def _read_stream(
        self, answer: httpx.Response, begin_s: float, n: int, leave_after: int | None
    ) -> None:
        events = 0
        finished: set[int] = set()
        last = ""
        async for data in _events(answer):
            events += 1
            if events == n + 1:
                self._tally.first_s.append(time.monotonic() - begin_s)
            if events == leave_after:
                self._tally.left += 1
                return
            last = data
            if data == "[DONE]":
                continue
            document = json.loads(data)
            if "error" in document:
                raise Broken(f"an error in a stream: {data}")
            for choice in document["choices"]:
                self._tally.tokens += choice["finish_reason"] is None
                if choice["finish_reason"]:
                    finished.add(choice["index"])
        if last != "[DONE]" or finished != set(range(n)):
            raise Broken(f"a stream of {n} answers ended with {last!r}, finished: {sorted(finished)}")
        self._tally.statuses["200"] += 1
        self._tally.whole_s.append(time.monotonic() - begin_s)


async def _events(answer: httpx.Response) -> AsyncIterator[str]:
    """The data of each event. Raises Broken where the bytes are no UTF-8 or no events."""
    held = b""
    async for chunk in answer.aiter_bytes():
        held += chunk
        *whole, held = held.split(b"\n\n")
        for event in whole:
            try:
                text = event.decode()
            except UnicodeDecodeError as error:
                raise Broken(f"an event is no UTF-8: {event!r}") from error
            if not text.startswith("data: ") or "\n" in text:
                raise Broken(f"no event: {text!r}")
            yield text.removeprefix("data: ")
    if held:
        raise Broken(f"a stream ended within an event: {held!r}")


class Watch:
    """Looks at the server once a second."""

    def __init__(self, server: psutil.Process, url: str, tally: Tally) -> None:
        self._server = server
        self._url = url
        self._tally = tally
        self._begin_s = time.monotonic()
        self.rss_mb: list[tuple[float, float]] = []
        self.accepted = 0
        self.most_open = 0

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=30) as http:
            while True:
                await self._look(http)
                await asyncio.sleep(1)

    async def _look(self, http: httpx.AsyncClient) -> None:
        asked_s = time.monotonic()
        try:
            figures = (await http.get(f"{self._url}/metrics")).text
        except httpx.TransportError:  # it has ended, or will be found to have
            return
        self.accepted = _figure(figures, 'nanochat_requests_total{model="quick"}')
        server_open = _figure(figures, "nanochat_open")
        clients_open = self._tally.open_since(asked_s - FREED_WITHIN_S)
        self.most_open = max(self.most_open, server_open)
        if server_open > clients_open:
            self._tally.problems.append(
                f"the server has {server_open} requests open; clients had {clients_open} within a second"
            )
        with contextlib.suppress(psutil.NoSuchProcess):
            rss_mb = self._server.memory_info().rss / 1e6
            self.rss_mb.append((time.monotonic() - self._begin_s, rss_mb))

    def growth_mb_per_minute(self) -> float | None:
        """From the second minute on, by least squares; None where there was no second minute."""
        late = [(at_s / 60, rss_mb) for at_s, rss_mb in self.rss_mb if at_s >= WARM_UP_S]
        if len(late) < 10:
            return None
        return statistics.linear_regression(*zip(*late, strict=True)).slope


def _figure(figures: str, name: str) -> int:
    return next(int(float(line.split()[-1])) for line in figures.splitlines() if line.startswith(f"{name} "))


@contextlib.contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`nanochat serve` over random weights, and its address."""
    with tempfile.TemporaryDirectory() as folder:
        store = _random_model(Path(folder))
        process = subprocess.Popen(
            [sys.executable, "-c", "from nanochat.cli import main; main()", "serve", "--port", "0", *options],
            env={**os.environ, "NANOCHAT_STORE": store, "NANOCHAT_API_KEY": ",".join(KEYS)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"quick answers at (http://\S+)/v1", line)
            if found is None:
                raise SystemExit(f"the server did not start: {line}{process.communicate(timeout=20)[1]}")
            yield process, found[1]
        finally:
            process.kill()
            process.communicate()


def _random_model(folder: Path) -> str:
    """A store in which `quick` is trained, as far as a server can tell."""
    import torch
    from safetensors.torch import save_file
    from standins.trained_model import put_receipt

    from nanochat.model.gpt import GPT
    from nanochat.recipes import SPECIAL_TOKENS, gpt4_pattern, quick
    from nanochat.store import open_store
    from nanochat.store.digests import digest_file
    from nanochat.store.receipts import InputRef
    from nanochat.tokenizer import Tokenizer
    from nanochat.training.checkpoint import MODEL_CARD, MODEL_WEIGHTS, ModelCard

    tokenizer = Tokenizer.from_json(
        {
            "schema": "nanochat.tokenizer",
            "version": 1,
            "pattern": gpt4_pattern(r"\p{N}"),
            "ranks": [base64.b64encode(bytes([byte])).decode() for byte in range(256)],
            "special_tokens": {name: 256 + index for index, name in enumerate(SPECIAL_TOKENS)},
            "provenance": {},
        }
    )
    tokenizer.save(folder / "tokenizer.json")
    torch.manual_seed(0)
    model = GPT(quick().model, tokenizer.vocab_size)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(dict(model.state_dict()), folder / MODEL_WEIGHTS)
    sha256 = digest_file(folder / "tokenizer.json")
    card = ModelCard(model=model.config, vocab_size=model.vocab_size, tokenizer_sha256=sha256)
    (folder / MODEL_CARD).write_bytes(card.to_bytes())

    store = open_store(str(folder / "store"))
    inputs: tuple[InputRef, ...] = ()
    for stage, names in (("tokenizer", ["tokenizer.json"]), ("sft", [MODEL_WEIGHTS, MODEL_CARD])):
        receipt = put_receipt(store, "quick", stage, [folder / name for name in names], inputs)
        inputs = (InputRef(stage=stage, fingerprint=receipt.fingerprint, receipt_sha256=receipt.digest()),)
    return store.url


async def load(process: subprocess.Popen[str], url: str, seconds: float, clients: int) -> dict[str, Any]:
    """The report. `problems` are the promises that were broken."""
    tally, ending = Tally(), asyncio.Event()
    watch = Watch(psutil.Process(process.pid), url, tally)
    watching = asyncio.ensure_future(watch.run())
    asking = [asyncio.ensure_future(Client(number, url, tally, ending).run()) for number in range(clients)]
    begin_s = time.monotonic()
    await asyncio.sleep(seconds)
    answered_before = tally.statuses["200"]
    took_s = time.monotonic() - begin_s
    open_at_end = tally.open_since(time.monotonic())
    ending.set()
    process.send_signal(signal.SIGTERM)
    told_s = time.monotonic()
    await asyncio.gather(*asking)
    code = await asyncio.to_thread(process.wait, 90)
    ended_s = time.monotonic() - told_s
    watching.cancel()
    assert process.stderr is not None
    said = process.stderr.read()
    if code != 0 or said:
        tally.problems.append(f"the server ended with code {code}, saying: {said[:2000]!r}")
    surely = tally.statuses["200"] + tally.left
    if not surely <= watch.accepted <= surely + tally.left_unanswered:
        tally.problems.append(
            f"{watch.accepted} requests were accepted; {surely} were answered or left by their client, and "
            f"{tally.left_unanswered} were left before an answer"
        )
    growth = watch.growth_mb_per_minute()
    if growth is not None and growth >= MOST_GROWTH_MB_PER_MINUTE:
        tally.problems.append(f"resident memory grows by {growth:.1f} MB a minute")
    if not tally.statuses["200"]:
        tally.problems.append("nothing was answered")
    return {
        "clients": clients,
        "seconds": round(took_s, 1),
        "statuses": dict(sorted(tally.statuses.items())),
        "accepted": watch.accepted,
        "left_in_a_stream": tally.left,
        "left_before_an_answer": tally.left_unanswered,
        "answers_per_s": round(answered_before / took_s, 1),
        "stream_events_and_tokens_per_s": round(tally.tokens / took_s),
        "first_piece_s": _spread(tally.first_s),
        "answer_s": _spread(tally.whole_s),
        "most_open": watch.most_open,
        "rss_mb": [round(rss_mb, 1) for _, rss_mb in watch.rss_mb[:: max(1, len(watch.rss_mb) // 12)]],
        "growth_mb_per_minute": None if growth is None else round(growth, 2),
        "open_at_sigterm": open_at_end,
        "answered_after_sigterm": tally.statuses["200"] - answered_before,
        "came_to_a_closed_door": tally.at_the_door,
        "ended_after_s": round(ended_s, 2),
        "problems": tally.problems[:20],
    }


def _spread(values_s: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values_s, n=20) if len(values_s) > 1 else [0.0] * 19
    return {"median": round(cuts[9], 3), "p95": round(cuts[18], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=64)
    arguments = parser.parse_args()
    # Fewer places than clients, so that some are refused: in all by 503, and of one key by 429.
    clients = arguments.clients
    options = {
        "--max-rows": clients // 2,
        "--max-waiting": clients // 4,
        "--client-requests": clients // 2 - clients // 16,
        "--max-tokens": 128,
    }
    with serving(*(str(word) for option in options.items() for word in option)) as (process, url):
        report = asyncio.run(load(process, url, arguments.seconds, clients))
    print(json.dumps(report, indent=2))
    sys.exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
