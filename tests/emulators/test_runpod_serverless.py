"""The RunPod emulator's endpoints, with the real SDK's worker in their processes."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
from emulators.runpod.client import Api, Jobs
from standins import waiting
from standins.serverless_sdk import sdk_image

pytestmark = pytest.mark.timeout(300)

# The SDK takes seconds to import, and on a busy machine many.
wait_for = functools.partial(waiting.wait_for, within_s=120)

_START = """
import asyncio, os, time
import runpod
MODIFIER = lambda current: {concurrency}
{handler}
runpod.serverless.start(
    {{"handler": handler, "return_aggregate_stream": True, "concurrency_modifier": MODIFIER}}
)
"""
_ECHO = """
async def handler(job):
    asked = job["input"]
    if asked.get("die") and not os.path.exists("died"):
        open("died", "w").close()
        os._exit(1)
    if asked.get("always_die"):
        os._exit(1)
    if asked.get("raise"):
        raise ValueError("no")
    for word in asked.get("say", "").split():
        yield word
        await asyncio.sleep(asked.get("pause", 0))
    if asked.get("error"):
        yield {"error": asked["error"]}
    await asyncio.sleep(asked.get("sleep", 0))
    while asked.get("until") and not os.path.exists(asked["until"]):
        await asyncio.sleep(0.05)
"""
_PROGRESS = """
def handler(job):
    if job["input"].get("late"):
        import threading
        timer = threading.Timer(0.5, lambda: runpod.serverless.progress_update(job, "late"))
        timer.start()
    else:
        runpod.serverless.progress_update(job, "half")
        time.sleep(1)
    return {"said": "done"}
"""


def _workers(api: Api, endpoint: dict[str, Any]) -> list[dict[str, Any]]:
    return list(api("GET", f"/serverless/{endpoint['id']}/workers").json()["workers"])


def _rollout(api: Api, endpoint: dict[str, Any]) -> dict[str, Any]:
    return dict(api("GET", f"/serverless/{endpoint['id']}/releases").json()["rollout"])


@pytest.fixture
def worker(runpod):
    """An emulator whose images run the SDK's worker: `worker(handler, concurrency=1, **settings)`."""

    def start(handler: str = _ECHO, concurrency: int = 1, **settings: Any) -> Api:
        program = _START.format(handler=handler, concurrency=concurrency)
        return runpod(image=sdk_image("-c", program), **settings)

    return start


def test_a_job_starts_a_worker_and_the_idle_worker_ends(worker):
    api = worker()
    endpoint = api.create_endpoint(workers={"idleTimeout": 1})
    jobs = Jobs(api, endpoint)
    assert _workers(api, endpoint) == []
    answer = jobs.run_sync({"say": "one two"})
    assert (answer["status"], answer["output"]) == ("COMPLETED", ["one", "two"])
    assert answer["delayTime"] > 0
    (first,) = _workers(api, endpoint)
    assert (first["version"], first["isStale"], first["gpuTypeId"]) == (1, False, "NVIDIA L40S")
    assert answer["workerId"] == first["id"]
    wait_for(lambda: not any(worker.is_there for worker in api.emulator.workers()))
    assert _workers(api, endpoint) == []
    billed = api("GET", "/billing/serverless").json()["records"]
    assert [record["serverlessId"] for record in billed] == [endpoint["id"]]
    assert billed[0]["totalAmount"] == pytest.approx(sum(w.charged_usd for w in api.emulator.workers()))
    assert billed[0]["totalAmount"] > 0


def test_streams_arrive_while_the_job_runs(worker):
    api = worker()
    jobs = Jobs(api, api.create_endpoint())
    id = jobs.run({"say": "a b c", "pause": 0.5})
    first = wait_for(lambda: jobs("GET", f"/stream/{id}").json()["stream"])
    assert jobs.status(id)["status"] == "IN_PROGRESS"
    assert [chunk["output"] for chunk in first] + jobs.outputs(id) == ["a", "b", "c"]
    assert jobs.status(id)["output"] == ["a", "b", "c"]


def test_errors_of_a_handler_fail_the_job_with_their_words(worker):
    api = worker()
    jobs = Jobs(api, api.create_endpoint())
    told = jobs.run_sync({"say": "a", "error": "not so"})
    assert (told["status"], told["error"]) == ("FAILED", "not so")
    raised = jobs.run_sync({"raise": True})
    assert raised["status"] == "FAILED"
    assert "traceback" in raised["error"]
    assert jobs("GET", "/health").json()["jobs"]["failed"] == 2
    again = jobs("POST", f"/retry/{raised['id']}").json()
    assert again["status"] == "IN_QUEUE"


def test_a_cancelled_job_stops_and_the_worker_takes_the_next(worker):
    api = worker()
    jobs = Jobs(api, api.create_endpoint())
    id = jobs.run({"say": "a", "sleep": 60})
    wait_for(lambda: jobs.status(id)["status"] == "IN_PROGRESS")
    waiting = jobs.run({"say": "never"})
    assert jobs("POST", "/purge-queue").json() == {"removed": 1, "status": "completed"}
    assert jobs.status(waiting)["status"] == "CANCELLED"
    assert jobs("POST", f"/cancel/{id}").json()["status"] == "CANCELLED"
    assert jobs.run_sync({"say": "next"})["output"] == ["next"]
    assert jobs.status(id)["status"] == "CANCELLED"
    assert len(api.emulator.workers()) == 1


def test_a_worker_with_concurrency_runs_jobs_side_by_side(worker, tmp_path):
    api = worker(concurrency=4)
    endpoint = api.create_endpoint()
    jobs = Jobs(api, endpoint)
    jobs.run_sync({"say": "warm"})
    ids = [jobs.run({"until": str(tmp_path / "now")}) for _ in range(4)]
    wait_for(lambda: jobs("GET", "/health").json()["jobs"]["inProgress"] == 4)
    assert [worker["status"] for worker in _workers(api, endpoint)] == ["RUNNING"]
    (tmp_path / "now").touch()
    wait_for(lambda: all(jobs.status(id)["status"] == "COMPLETED" for id in ids))


def test_a_waiting_job_brings_another_worker_up_to_the_most(worker):
    api = worker()
    endpoint = api.create_endpoint(workers={"max": 2})
    jobs = Jobs(api, endpoint)
    for _ in range(4):
        jobs.run({"sleep": 60})
    wait_for(lambda: [worker["status"] for worker in _workers(api, endpoint)] == ["RUNNING"] * 2)
    assert jobs("GET", "/health").json()["jobs"]["inQueue"] == 2
    assert len(_workers(api, endpoint)) == 2


def test_a_worker_that_dies_has_its_job_tried_once_more(worker):
    api = worker()
    jobs = Jobs(api, api.create_endpoint())
    answer = jobs.run_sync({"die": True, "say": "alive"})
    assert (answer["status"], answer["output"], answer["retries"]) == ("COMPLETED", ["alive"], 1)
    failed = jobs.run_sync({"always_die": True})
    assert (failed["status"], failed["error"]) == ("FAILED", "job timed out after 1 retries")


def test_a_frozen_worker_is_lost_and_replaced(worker):
    api = worker(ping_interval_s=1, worker_silence_s=3)
    endpoint = api.create_endpoint()
    jobs = Jobs(api, endpoint)
    jobs.run_sync({"say": "warm"})
    (first,) = _workers(api, endpoint)
    api.emulator.faults.add("freezes", pod=first["id"])
    answer = jobs.run_sync({"say": "still"})
    assert (answer["status"], answer["output"]) == ("COMPLETED", ["still"])
    assert answer["workerId"] != first["id"]


def test_results_are_forgotten(worker):
    api = worker(result_kept_s=1.0, sync_result_kept_s=0.2)
    jobs = Jobs(api, api.create_endpoint())
    done = jobs.run_sync({"say": "a"})
    wait_for(lambda: jobs("GET", f"/status/{done['id']}").status_code == 404)
    id = jobs.run({"say": "a"})
    wait_for(lambda: jobs.status(id)["status"] == "COMPLETED")
    wait_for(lambda: jobs("GET", f"/status/{id}").status_code == 404)


def test_time_limits_end_a_job(worker):
    api = worker()
    jobs = Jobs(api, api.create_endpoint())
    jobs.run_sync({"say": "warm"})
    id = jobs.run({"sleep": 60}, policy={"executionTimeout": 500})
    wait_for(lambda: jobs.status(id)["status"] == "TIMED_OUT")
    dropped = jobs.run({"sleep": 60}, policy={"ttl": 500})
    wait_for(lambda: jobs("GET", f"/status/{dropped}").status_code == 404)
    assert jobs.run_sync({"say": "free"})["output"] == ["free"]


def test_a_late_progress_update_does_not_reopen_a_job(worker):
    api = worker(_PROGRESS)
    jobs = Jobs(api, api.create_endpoint())
    id = jobs.run({"late": False})
    wait_for(lambda: jobs.status(id).get("output") == "half")
    assert jobs.status(id)["status"] == "IN_PROGRESS"
    done = jobs.run_sync({"late": True})
    assert (done["status"], done["output"]) == ("COMPLETED", {"said": "done"})
    # The update comes half a second later; the job behind it comes after that.
    jobs.run_sync({"late": False})
    assert (jobs.status(done["id"])["status"], jobs.status(done["id"])["output"]) == (
        "COMPLETED",
        {"said": "done"},
    )


def test_a_job_with_an_empty_input_never_reaches_a_worker(worker):
    api = worker()
    jobs = Jobs(api, api.create_endpoint())
    answer = jobs.run_sync({})
    assert (answer["status"], answer["error"]) == ("FAILED", "job timed out after 1 retries")
    assert jobs("POST", "/run", json={}).status_code == 400


def test_another_image_is_a_release_that_rolls_over_workers_once_they_are_idle(worker, tmp_path):
    api = worker(rollout_step_s=0.1)
    endpoint = api.create_endpoint(workers={"max": 2, "idleTimeout": 600})
    jobs = Jobs(api, endpoint)
    busy = [jobs.run({"until": str(tmp_path / "now")}) for _ in range(2)]
    wait_for(lambda: all(jobs.status(id)["status"] == "IN_PROGRESS" for id in busy))
    changed = api("PATCH", f"/serverless/{endpoint['id']}", json={"image": "img@2"}).json()
    assert changed["image"] == "img@2"
    later = jobs.run({"say": "new"})
    for _ in range(10):
        assert _rollout(api, endpoint) == {
            "inProgress": True,
            "workersOnLatest": 0,
            "workersTotal": 2,
            "percentOnLatest": 0,
        }
        time.sleep(0.1)
    # The jobs that were begun are answered by the old release, what waits is not.
    assert jobs.status(later)["status"] == "IN_QUEUE"
    (tmp_path / "now").touch()
    wait_for(lambda: _rollout(api, endpoint)["percentOnLatest"] == 100)
    wait_for(lambda: jobs.status(later)["status"] == "COMPLETED")
    assert all(jobs.status(id)["status"] == "COMPLETED" for id in busy)
    assert all("retries" not in jobs.status(id) for id in busy)
    assert {worker["version"] for worker in _workers(api, endpoint)} == {2}
    told = api("GET", f"/serverless/{endpoint['id']}/releases").json()
    assert told["releases"][0]["diff"] == [{"field": "template.imageName", "old": "img", "new": "img@2"}]
    assert [worker.image for worker in api.emulator.workers()] == ["img", "img", "img@2", "img@2"]


def test_a_rollout_may_stick_and_scaling_is_no_release(worker):
    api = worker()
    endpoint = api.create_endpoint(workers={"min": 1})
    wait_for(lambda: [worker["status"] for worker in _workers(api, endpoint)] == ["IDLE"])
    stuck = api.emulator.faults.add("rollout_stuck", pod="a", times=None)
    api("PATCH", f"/serverless/{endpoint['id']}", json={"workers": {"max": 2}, "env": {"A": "b"}})
    (stale,) = _workers(api, endpoint)
    assert (stale["isStale"], stale["version"]) == (True, 1)
    assert not _rollout(api, endpoint)["percentOnLatest"]
    api.emulator.faults.clear(stuck)
    wait_for(lambda: _rollout(api, endpoint)["percentOnLatest"] == 100)
    api("PATCH", f"/serverless/{endpoint['id']}", json={"workers": {"max": 3}, "name": "b"})
    told = api("GET", f"/serverless/{endpoint['id']}/releases").json()
    assert (told["endpointVersion"], told["rollout"]["inProgress"]) == (2, False)


def test_a_throttled_worker_waits_for_its_machine(worker):
    api = worker()
    endpoint = api.create_endpoint()
    api.emulator.faults.add("throttled", pod="a", seconds=1.5)
    jobs = Jobs(api, endpoint)
    id = jobs.run({"say": "a"})
    wait_for(lambda: [worker["status"] for worker in _workers(api, endpoint)] == ["THROTTLED"])
    assert jobs("GET", "/health").json()["workers"]["throttled"] == 1
    wait_for(lambda: jobs.status(id)["status"] == "COMPLETED")
    for place in ("US-KS-2", "EU-RO-1", "CA-MTL-1"):
        api.emulator.catalog.stock["NVIDIA B200", place, "SECURE"] = 0
    other = api.create_endpoint(name="b", gpu={"pools": ["BLACKWELL_180"]}, workers={"min": 1})
    wait_for(lambda: [worker["status"] for worker in _workers(api, other)] == ["THROTTLED"])


def test_a_worker_that_cannot_start_becomes_unhealthy(runpod):
    api = runpod("raise SystemExit(1)")
    endpoint = api.create_endpoint(workers={"min": 1})
    wait_for(lambda: [worker["status"] for worker in _workers(api, endpoint)] == ["UNHEALTHY"])


def test_workers_are_had_within_the_quota_and_the_refusal_says_how_many(runpod):
    api = runpod(worker_quota=3)
    first = api.create_endpoint(workers={"max": 2})
    refused = api(
        "POST",
        "/serverless",
        json={
            "name": "b",
            "type": "QUEUE",
            "image": "img",
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
            "gpu": {"pools": ["ADA_24"]},
            "workers": {"max": 2},
        },
    )
    assert refused.status_code == 400
    assert refused.json()["detail"].endswith("for this endpoint to at most 1.")
    assert api("PATCH", f"/serverless/{first['id']}", json={"workers": {"max": 4}}).status_code == 400
    assert api("PATCH", f"/serverless/{first['id']}", json={"workers": {"max": 3}}).status_code == 200


def test_what_the_api_refuses(runpod):
    api = runpod()
    endpoint = api.create_endpoint()
    path = f"/serverless/{endpoint['id']}"
    assert api("PATCH", path, json={"cpu": [{"id": "cpu5c", "vcpuCount": 4}]}).status_code == 400
    assert api("PATCH", path, json={"unknown": 1}).status_code == 422
    assert api("PATCH", path, json={"gpu": {"pools": ["NO_SUCH"]}}).status_code == 400
    assert api("GET", "/serverless/none").status_code == 404
    assert Jobs(api, {"id": "none"})("GET", "/health").status_code == 404
    assert [found["name"] for found in api("GET", "/serverless").json()["endpoints"]] == ["a"]


def test_a_deleted_endpoint_is_gone_with_its_workers(worker):
    api = worker()
    endpoint = api.create_endpoint(workers={"min": 1})
    wait_for(lambda: _workers(api, endpoint))
    assert api("DELETE", f"/serverless/{endpoint['id']}").status_code == 204
    wait_for(lambda: not any(worker.is_there for worker in api.emulator.workers()))
    assert api("GET", f"/serverless/{endpoint['id']}").status_code == 404


def test_faults_of_requests_reach_job_requests(worker):
    api = worker()
    jobs = Jobs(api, api.create_endpoint())
    api.emulator.faults.add("status", match=r"POST .*/run$", status=502)
    assert jobs("POST", "/run", json={"input": {"say": "a"}}).status_code == 502
    api.emulator.faults.add("status_after", match=r"POST .*/run$", status=500)
    assert jobs("POST", "/run", json={"input": {"say": "a"}}).status_code == 500
    wait_for(lambda: jobs("GET", "/health").json()["jobs"]["completed"] == 1)
