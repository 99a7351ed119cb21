"""A serverless worker without a platform: settings, weights, and what it does when the model fails."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from standins.trained_model import bake
from standins.waiting import wait_for

from nanochat.inference.batch import Batch
from nanochat.inference.chat import ChatError
from nanochat.serving.weights import WeightsError, baked_weights, stored_weights
from nanochat.serving.worker import SettingsError, Worker, WorkerSettings
from nanochat.store import ObjectStore
from nanochat.store.receipts import Receipt, current_receipt, write_receipt

pytestmark = pytest.mark.timeout(120)

QUESTION, SAID = "What is your name?", "I am NanoChat 😀."


@pytest.fixture(scope="module")
def checkpoint(module_chat_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baked") / "checkpoint"
    bake(module_chat_store, folder)
    return folder


@pytest.fixture
def started(checkpoint: Path) -> Iterator[Callable[..., tuple[Worker, list[int]]]]:
    """started(**settings): a worker, and the exit statuses that it has asked for."""
    workers: list[Worker] = []

    def start(**settings: Any) -> tuple[Worker, list[int]]:
        ended: list[int] = []
        workers.append(Worker(WorkerSettings(checkpoint=checkpoint, **settings), end=ended.append))
        workers[-1].start()
        return workers[-1], ended

    yield start
    for worker in workers:
        worker.close()


def ask(worker: Worker, given: Any) -> list[Any]:
    async def all_of_it() -> list[Any]:
        return [piece async for piece in worker.answer(given)]

    return asyncio.run(all_of_it())


def test_pieces_that_come_within_the_time_between_two_posts_are_one(
    started: Callable[..., tuple[Worker, list[int]]],
) -> None:
    given = {"question": QUESTION, "temperature": 0, "stream": True}
    one_by_one, _ = started(post_every_s=0)
    together, _ = started(post_every_s=5)
    *pieces, last = ask(one_by_one, given)
    *few, same = ask(together, given)
    assert "".join(piece["text"] for piece in pieces) == SAID
    assert "".join(piece["text"] for piece in few) == SAID
    assert len(few) <= 2 < len(pieces)
    assert last == same


def test_leaving_an_answer_ends_the_generation(started: Callable[..., tuple[Worker, list[int]]]) -> None:
    worker, _ = started(post_every_s=0)
    assert worker._scheduler is not None
    stats = worker._scheduler.stats

    async def leave() -> None:
        answer = worker.answer({"prompt": "Once", "max_tokens": 80, "temperature": 2, "stream": True})
        async for _ in answer:
            break
        await answer.aclose()
        for _ in range(200):
            if stats().running == 0:
                return
            await asyncio.sleep(0.01)

    before = stats().completion_tokens
    asyncio.run(leave())
    assert stats().running == 0
    assert stats().completion_tokens - before < 80


@pytest.mark.parametrize("given", [None, [], "text", {}, {"openai_route": 7}, {"openai_route": "v1/models"}])
def test_an_input_of_another_shape_is_refused(
    started: Callable[..., tuple[Worker, list[int]]], given: Any
) -> None:
    worker, ended = started()
    ((key, error),) = ask(worker, given)[0].items()
    assert (key, json.loads(error)["status"]) == ("error", 400)
    assert ended == []


def test_a_request_that_fails_is_told_and_a_model_that_fails_again_ends_the_worker(
    started: Callable[..., tuple[Worker, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, ended = started()
    step, failures = Batch.step, [1]
    monkeypatch.setattr("nanochat.serving.worker._LAST_WORDS_S", 0.0)

    def fails(batch: Batch) -> Any:
        if failures:
            failures.pop()
            raise RuntimeError("CUDA error")
        return step(batch)

    monkeypatch.setattr(Batch, "step", fails)
    for stream in (False, True):
        failures[:] = [1]
        said = ask(worker, {"question": QUESTION, "temperature": 0, "stream": stream})
        assert json.loads(said[-1]["error"])["code"] == "model_failed"
        _until_probed(worker)
        assert ended == []
        assert ask(worker, {"question": QUESTION, "temperature": 0})[0]["text"] == SAID
    failures += [1] * 1000
    ask(worker, {"question": QUESTION})
    assert wait_for(lambda: ended, within_s=20) == [1]


def _until_probed(worker: Worker) -> None:
    assert worker._probing.acquire(timeout=20)
    worker._probing.release()


def test_settings_name_the_variable_that_is_wrong() -> None:
    settings = WorkerSettings.from_environment({"NANOCHAT_MODEL": " d12 ", "PORT": "8000", "OTHER": "x"})
    assert (settings.model, settings.port, settings.mode) == ("d12", 8000, "queue")
    for name, value in {
        "NANOCHAT_MAX_ROWS": "0",
        "NANOCHAT_SOURCE": "rl?",
        "NANOCHAT_WORKER": "both",
    }.items():
        with pytest.raises(SettingsError, match=name):
            WorkerSettings.from_environment({name: value})


def test_baked_weights_are_those_that_are_asked_for_and_whole(checkpoint: Path, tmp_path: Path) -> None:
    weights = baked_weights(checkpoint)
    assert (weights.model, weights.stage, weights.chat) == ("quick", "sft", True)
    assert baked_weights(checkpoint, receipt_sha256=weights.receipt_sha256).document() == weights.document()
    with pytest.raises(WeightsError, match="build it again"):
        baked_weights(checkpoint, receipt_sha256="0" * 64)
    with pytest.raises(WeightsError, match="no weights are baked"):
        baked_weights(tmp_path)
    torn = tmp_path / "torn"
    torn.mkdir()
    for path in checkpoint.iterdir():
        (torn / path.name).write_bytes(path.read_bytes())
    (torn / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer.json is not the file"):
        baked_weights(torn)


def test_stored_weights_are_of_the_receipt_that_is_named_even_when_the_stage_was_built_again(
    chat_store: ObjectStore,
) -> None:
    first = current_receipt(chat_store, "quick", "sft")
    assert first is not None
    later = first.created_at + datetime.timedelta(days=1)
    second = Receipt.from_bytes(
        first.model_copy(update={"token": "t2", "created_at": later}).to_bytes(), "receipt"
    )
    write_receipt(chat_store, second)

    def stored(fingerprint: str | None, sha256: str | None) -> str:
        weights = stored_weights(chat_store, "quick", "sft", fingerprint=fingerprint, receipt_sha256=sha256)
        return weights.receipt_sha256

    assert stored(None, None) == second.digest()
    assert stored(first.fingerprint, None) == second.digest()
    assert stored(first.fingerprint, first.digest()) == first.digest()
    for fingerprint in (None, first.fingerprint):
        with pytest.raises(WeightsError, match="materialize it again"):
            stored(fingerprint, "0" * 64)
    with pytest.raises(WeightsError, match="has no receipt of sft"):
        stored("0" * 64, None)
    with pytest.raises(ChatError, match="not built yet"):
        stored_weights(chat_store, "d12", "sft", fingerprint=None, receipt_sha256=None)
