"""`serverless/handler.py` under RunPod's own SDK, asked through the emulated platform."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from emulators.runpod import Emulator, Settings, find_spec, serve
from emulators.runpod.client import Api, Jobs
from standins.serverless_sdk import HANDLER, sdk_image
from standins.trained_model import bake
from standins.waiting import wait_for

from nanochat.store import ObjectStore
from nanochat.store.receipts import current_receipt

pytestmark = pytest.mark.timeout(300)

QUESTION, SAID = "What is your name?", "I am NanoChat 😀."
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
# Some six seconds where nothing else runs.
COLD_START_S = 100.0


@pytest.fixture(scope="module")
def deployed(
    module_chat_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Emulator, Jobs]]:
    """An endpoint with one worker that has answered once; the baked weights of `quick`."""
    if find_spec() is None:
        pytest.skip("no OpenAPI file of RunPod (set NANOCHAT_RUNPOD_SPEC)")
    folder = tmp_path_factory.mktemp("handler")
    bake(module_chat_store, folder / "checkpoint")
    with serve(state_dir=folder / "runpod", images={"*": sdk_image(OMP_NUM_THREADS="1")}) as emulator:
        endpoint = Api(emulator).create_endpoint(
            env={"NANOCHAT_CHECKPOINT": str(folder / "checkpoint"), "NANOCHAT_MAX_ROWS": "4"},
            workers={"min": 1, "idleTimeout": 600},
        )
        jobs = Jobs(Api(emulator), endpoint)
        answer = jobs.run_sync({"question": QUESTION, "temperature": 0})
        assert answer["status"] == "COMPLETED", answer
        yield emulator, jobs
        said = "\n".join(line for worker in emulator.workers() for line in emulator.logs(worker.id))
        assert QUESTION not in said
        assert "NanoChat 😀" not in said
        assert "Traceback" not in said
    assert emulator.violations == []


def refused(answer: dict[str, Any]) -> dict[str, Any]:
    assert answer["status"] == "FAILED", answer
    return dict(json.loads(answer["error"]))


def test_a_question_gets_one_document_that_names_the_receipt(
    deployed: tuple[Emulator, Jobs], module_chat_store: ObjectStore
) -> None:
    _, jobs = deployed
    (said,) = jobs.run_sync({"question": QUESTION, "temperature": 0})["output"]
    receipt = current_receipt(module_chat_store, "quick", "sft")
    assert receipt is not None
    assert (said["text"], said["finish_reason"]) == (SAID, "stop")
    assert (said["model"], said["stage"], said["receipt_sha256"]) == ("quick", "sft", receipt.digest())
    assert said["usage"]["completion_tokens"] > 5
    (same,) = jobs.run_sync({"messages": MESSAGES, "temperature": 0})["output"]
    assert same["text"] == SAID


def test_a_stream_comes_in_few_posts_and_adds_up(deployed: tuple[Emulator, Jobs]) -> None:
    _, jobs = deployed
    id = jobs.run({"question": QUESTION, "temperature": 0, "stream": True})
    *pieces, last = jobs.outputs(id)
    assert "".join(piece["text"] for piece in pieces) == SAID
    assert (last["text"], last["finish_reason"]) == ("", "stop")
    assert len(pieces) < last["usage"]["completion_tokens"]
    assert jobs.status(id)["output"] == [*pieces, last]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"question": ""}, "question"),
        ({"question": QUESTION, "messages": MESSAGES}, "input"),
        ({"question": QUESTION, "max_tokens": 0}, "max_tokens"),
        ({"question": QUESTION, "max_tokens": 99_999}, "max_tokens"),
        ({"question": QUESTION, "temperature": "warm"}, "temperature"),
        ({"question": QUESTION, "top_p": 7}, "top_p"),
        ({"question": QUESTION, "topk": 7}, "topk"),
        ({"question": "long " * 200}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"openai_route": "/v1/chat/completions", "openai_input": {"model": "quick"}}, "messages"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_field(
    deployed: tuple[Emulator, Jobs], given: dict[str, Any], param: str
) -> None:
    answer = deployed[1].run_sync(given)
    error = refused(answer)
    assert error["param"] == param
    assert error["status"] in (400, 422)
    assert "Traceback" not in answer["error"]


def test_the_openai_client_is_answered_as_by_our_api(deployed: tuple[Emulator, Jobs]) -> None:
    emulator, jobs = deployed
    client = openai.OpenAI(base_url=f"{jobs.url}/openai/v1", api_key=emulator.api_key, max_retries=0)
    assert [model.id for model in client.models.list()] == ["quick"]
    whole = client.chat.completions.create(model="quick", messages=MESSAGES, temperature=0)
    assert whole.choices[0].message.content == SAID
    assert whole.usage is not None
    stream = client.chat.completions.create(
        model="quick",
        messages=MESSAGES,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    said = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(said) == SAID
    assert chunks[-1].usage == whole.usage
    completion = client.completions.create(model="quick", prompt="Once upon", temperature=0, max_tokens=8)
    assert completion.choices[0].finish_reason == "length"
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert error.value.body == {
        "status": 404,
        "message": "there is no model 'other' here, only 'quick'",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_jobs_run_side_by_side(deployed: tuple[Emulator, Jobs]) -> None:
    _, jobs = deployed
    ids = [jobs.run({"question": QUESTION, "temperature": 0, "seed": seed}) for seed in range(12)]
    wait_for(lambda: all(jobs.status(id)["status"] == "COMPLETED" for id in ids))
    assert {jobs.status(id)["output"][0]["text"] for id in ids} == {SAID}
    assert len({jobs.status(id)["workerId"] for id in ids}) == 1


@pytest.fixture
def slow(module_chat_store: ObjectStore, tmp_path: Path) -> Iterator[Callable[..., tuple[Emulator, Jobs]]]:
    """slow(program, **settings): a worker whose process runs `program` before the handler."""
    bake(module_chat_store, tmp_path / "checkpoint")
    with contextlib.ExitStack() as stack:

        def start(program: str, **settings: Any) -> tuple[Emulator, Jobs]:
            if find_spec() is None:
                pytest.skip("no OpenAPI file of RunPod (set NANOCHAT_RUNPOD_SPEC)")
            script = tmp_path / "before.py"
            script.write_text(
                f"{program}\nimport runpy\nrunpy.run_path({str(HANDLER)!r}, run_name='__main__')"
            )
            worker = sdk_image(str(script), OMP_NUM_THREADS="1")
            emulator = stack.enter_context(
                serve(state_dir=tmp_path / "runpod", images={"*": worker}, settings=Settings(**settings))
            )
            endpoint = Api(emulator).create_endpoint(
                env={"NANOCHAT_CHECKPOINT": str(tmp_path / "checkpoint"), "NANOCHAT_MAX_ROWS": "1"},
                workers={"min": 1, "idleTimeout": 600},
            )
            return emulator, Jobs(Api(emulator), endpoint)

        yield start


_STEP = "from nanochat.inference.batch import Batch\nstep = Batch.step\nimport os, time\n"


def test_a_cancelled_job_frees_its_place(slow: Callable[..., tuple[Emulator, Jobs]]) -> None:
    _, jobs = slow(
        f"{_STEP}def slowly(batch):\n    time.sleep(2)\n    return step(batch)\nBatch.step = slowly"
    )
    endless = {"prompt": "Once", "max_tokens": 90, "stream": True}
    id = jobs.run(endless)
    wait_for(lambda: jobs("GET", f"/stream/{id}").json()["stream"], within_s=COLD_START_S)
    began = time.monotonic()
    assert jobs("POST", f"/cancel/{id}").json()["status"] == "CANCELLED"
    answer = jobs.run_sync({"prompt": "Once", "max_tokens": 1})
    assert answer["status"] == "COMPLETED", answer
    # 90 tokens would have taken three minutes.
    assert time.monotonic() - began < 90
    assert jobs.status(id)["status"] == "CANCELLED"


def test_a_model_that_breaks_ends_the_worker_and_the_next_one_answers(
    slow: Callable[..., tuple[Emulator, Jobs]],
) -> None:
    emulator, jobs = slow(
        f"{_STEP}def breaks(batch):\n"
        "    if os.path.exists('broken'):\n"
        "        raise RuntimeError('CUDA error: unspecified launch failure')\n"
        "    return step(batch)\n"
        "Batch.step = breaks"
    )
    assert jobs.run_sync({"question": QUESTION, "temperature": 0})["status"] == "COMPLETED"
    (worker,) = emulator.workers()
    (worker.folder / "broken").touch()
    answer = jobs.run_sync({"question": QUESTION, "temperature": 0})
    assert refused(answer)["code"] == "model_failed"
    assert "CUDA" not in answer["error"]
    wait_for(lambda: not emulator.workers()[0].living_process_ids)
    (worker.folder / "broken").unlink()
    assert jobs.run_sync({"question": QUESTION, "temperature": 0})["output"][0]["text"] == SAID
    assert len(emulator.workers()[0].process_ids) == 2


def test_a_worker_without_weights_says_why_and_is_unhealthy(
    slow: Callable[..., tuple[Emulator, Jobs]], tmp_path: Path
) -> None:
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.unlink()  # it is the store's own file, which others read
    weights.write_bytes(b"torn")
    emulator, jobs = slow("")
    wait_for(lambda: jobs("GET", "/health").json()["workers"]["unhealthy"] == 1, within_s=COLD_START_S)
    (worker,) = emulator.workers()
    said = "\n".join(emulator.logs(worker.id))
    assert "model.safetensors is not the file that" in said
    assert jobs("GET", "/health").json()["workers"]["ready"] == 0


def test_weights_are_pulled_from_the_store_by_their_receipt_and_http_is_served(
    module_chat_store: ObjectStore, tmp_path: Path
) -> None:
    """As a load-balancer endpoint, from zero workers."""
    if find_spec() is None:
        pytest.skip("no OpenAPI file of RunPod (set NANOCHAT_RUNPOD_SPEC)")
    receipt = current_receipt(module_chat_store, "quick", "sft")
    assert receipt is not None
    with serve(state_dir=tmp_path / "runpod", images={"*": sdk_image(OMP_NUM_THREADS="1")}) as emulator:
        endpoint = Api(emulator).create_endpoint(
            type="LOAD_BALANCER",
            scaling={"type": "REQUEST_COUNT", "requestCount": 4},
            env={
                "NANOCHAT_WORKER": "http",
                "NANOCHAT_HOST": "127.0.0.1",
                "NANOCHAT_STORE": module_chat_store.url,
                "NANOCHAT_MODEL": "quick",
                "NANOCHAT_FINGERPRINT": receipt.fingerprint,
                "NANOCHAT_RECEIPT_SHA256": receipt.digest(),
            },
        )
        client = openai.OpenAI(
            base_url=f"{endpoint['requestUrls']['base']}/v1", api_key=emulator.api_key, timeout=COLD_START_S
        )
        whole = client.chat.completions.create(model="quick", messages=MESSAGES, temperature=0)
        assert whole.choices[0].message.content == SAID
        stream = client.chat.completions.create(model="quick", messages=MESSAGES, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == SAID


def test_cold_start(deployed: tuple[Emulator, Jobs], record_property: Callable[[str, object], None]) -> None:
    """From nothing to the first piece of text: a process, imports, weights, warm-up, the first token."""
    emulator, jobs = deployed
    api = Api(emulator)
    path = f"/serverless/{jobs.url.rsplit('/', 1)[1]}"
    api("PATCH", path, json={"workers": {"min": 0, "max": 0}})
    wait_for(lambda: not any(worker.is_there for worker in emulator.workers()))
    api("PATCH", path, json={"workers": {"min": 0, "max": 1}})
    began = time.monotonic()
    id = jobs.run({"question": QUESTION, "stream": True})
    wait_for(lambda: jobs("GET", f"/stream/{id}").json()["stream"], within_s=COLD_START_S)
    seconds = time.monotonic() - began
    record_property("cold_start_s", seconds)
    print(f"cold start to the first piece: {seconds:.1f} s on {os.cpu_count()} cores, of these:")
    print(*(line for line in emulator.logs(emulator.workers()[-1].id) if "checks passed" in line))
    api("PATCH", path, json={"workers": {"min": 1, "max": 1}})
    assert seconds < COLD_START_S
