"""The RunPod emulator: every fault that can be asked for strikes, and only where it was asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pytest
from emulators.runpod.client import GPU, Api
from standins import s3, s3_faults
from standins.waiting import wait_for

_POD = {"name": "a", "image": "img", "gpu": {"id": GPU}}
_TALK = "import time\nfor i in range(100000): print('line', i, flush=True); time.sleep(0.02)"


def _truth(api: Api, id: str) -> Any:
    return next(pod for pod in api.emulator.pods() if pod.id == id)


def _running(api: Api, **fields: Any) -> str:
    """A new pod's id, once its command runs."""
    id = str(api.create(**fields)["id"])
    wait_for(lambda: _truth(api, id).living_process_ids, within_s=10)
    return id


@contextmanager
def _streaming(api: Api, id: str, *, within_s: float = 2.0, **options: Any) -> Iterator[Iterator[str]]:
    headers = {"Authorization": f"Bearer {api.emulator.api_key}", **options.pop("headers", {})}
    with (
        httpx.Client(trust_env=False, timeout=within_s) as client,
        client.stream("GET", f"{api.emulator.url}/pods/{id}/logs", headers=headers, **options) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield answer.iter_lines()


@pytest.mark.parametrize("status", [401, 402, 403, 404, 409, 422, 429, 500, 502, 503])
def test_a_route_answers_with_a_status_for_a_while(runpod, status: int):
    api = runpod()
    id = api.emulator.faults.add("status", match="POST /v2/pods$", status=status, times=2, detail="because")
    refused = [api("POST", "/pods", json=_POD) for _ in range(2)]
    assert [answer.status_code for answer in refused] == [status] * 2
    assert refused[0].json()["detail"] == "because"
    assert ("Retry-After" in refused[0].headers) == (status == 429)
    assert api.emulator.pods() == []
    api.create()
    assert api.emulator.faults.hits(id) == 2


def test_a_pod_can_exist_although_its_creation_failed(runpod):
    api = runpod()
    api.emulator.faults.add("status_after", match="POST /v2/pods$", status=500)
    assert api("POST", "/pods", json=_POD).status_code == 500
    assert [pod["name"] for pod in api("GET", "/pods").json()["pods"]] == ["a"]
    api.emulator.faults.add("hang_after", match="POST /v2/pods$", seconds=0.2)
    with pytest.raises(httpx.RemoteProtocolError):
        api("POST", "/pods", json={**_POD, "name": "b"})
    assert [pod["name"] for pod in api("GET", "/pods").json()["pods"]] == ["a", "b"]


def test_a_connection_can_be_held_and_closed_with_nothing_done(runpod):
    api = runpod()
    api.emulator.faults.add("hang", match="POST", seconds=0.3)
    start = time.monotonic()
    with pytest.raises(httpx.RemoteProtocolError):
        api("POST", "/pods", json=_POD)
    assert time.monotonic() - start > 0.25
    assert api.emulator.pods() == []
    api.emulator.faults.add("slow", match="POST", seconds=0.3)
    start = time.monotonic()
    api.create()
    assert time.monotonic() - start > 0.25


def test_capacity_is_missing_for_chosen_types_a_number_of_times_or_until_it_is_cleared(runpod):
    api = runpod()
    id = api.emulator.faults.add("no_capacity", gpu="H100", times=None)
    api.emulator.faults.add("no_capacity", gpu="L40S", cloud="SECURE", times=2)
    codes = [api("POST", "/pods", json=_POD).status_code for _ in range(3)]
    assert codes == [400, 400, 201]
    h100 = {**_POD, "gpu": {"id": "NVIDIA H100 PCIe"}}
    refused = [api("POST", "/pods", json=h100) for _ in range(3)]
    assert {answer.status_code for answer in refused} == {400}
    assert "no longer any instances" in refused[0].json()["detail"]
    api.emulator.faults.clear(id)
    assert api("POST", "/pods", json=h100).status_code == 201
    api.emulator.faults.add("no_capacity", data_center="US-KS-2", times=None)
    assert api.create()["dataCenterId"] == "EU-RO-1"
    only = {**_POD, "dataCenterIds": ["US-KS-2"]}
    assert api("POST", "/pods", json=only).status_code == 400


def test_chance_is_the_same_for_the_same_seed(runpod):
    api = runpod()

    def failures() -> list[int]:
        api.emulator.faults.clear()
        api.emulator.faults.add("status", match="GET", times=None, probability=0.5, seed=3)
        return [number for number in range(20) if api("GET", "/pods").status_code == 500]

    assert failures() == failures()
    assert 0 < len(failures()) < 20


def test_only_one_kind_of_key_can_be_refused(runpod):
    api = runpod()
    id = _running(api)
    api.emulator.faults.add("status", match="DELETE", key="pod", status=403, times=None)
    own = Api(api.emulator, api.emulator.pod_key(id))
    assert own("DELETE", f"/pods/{id}").status_code == 403
    assert own("POST", f"/pods/{id}/action", json={"action": "terminate"}).status_code == 204
    other = _running(api)
    assert api("DELETE", f"/pods/{other}").status_code == 204


@pytest.mark.parametrize("state", ["EXITED", "ERROR"])
def test_a_pod_dies_and_is_not_started_again(runpod, state: str):
    api = runpod()
    id = _running(api)
    process = psutil.Process(_truth(api, id).process_ids[0])
    api.emulator.faults.add("dies", pod=id, state=state)
    wait_for(lambda: api.get(id)["status"] == state, within_s=10)
    assert not process.is_running()
    assert (api.get(id)["runtime"], api.get(id)["actions"]) == (None, ["start", "terminate"])
    time.sleep(0.2)
    assert len(_truth(api, id).process_ids) == 1
    spent = _truth(api, id).charged_usd
    assert api.get(id)["cost"] > 0
    assert _truth(api, id).charged_usd > spent


def test_a_pod_vanishes_some_time_after_its_creation(runpod):
    api = runpod()
    api.emulator.faults.add("vanishes", gpu="L40S", after_s=0.4)
    id = _running(api)
    process = psutil.Process(_truth(api, id).process_ids[0])
    wait_for(lambda: api("GET", f"/pods/{id}").status_code == 404, within_s=10)
    assert not process.is_running()
    assert api("GET", "/pods").json()["pods"] == []
    _running(api)  # the next one stays


def test_a_frozen_pod_looks_as_before_and_can_still_be_deleted(runpod):
    api = runpod(_TALK)
    id = _running(api)
    process = psutil.Process(_truth(api, id).process_ids[0])
    api.emulator.faults.add("freezes", pod=id)
    wait_for(lambda: process.status() == psutil.STATUS_STOPPED, within_s=10)
    said = len(api.emulator.logs(id))
    assert api.get(id)["status"] == "RUNNING"
    assert api.get(id)["runtime"] is not None
    time.sleep(0.1)
    assert len(api.emulator.logs(id)) - said <= 1
    api.emulator.thaw(id)
    wait_for(lambda: len(api.emulator.logs(id)) > said + 1, within_s=10)
    api.emulator.faults.add("freezes", pod=id)
    api("DELETE", f"/pods/{id}")
    wait_for(lambda: not process.is_running(), within_s=10)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("pull_stuck", "error creating container: image pull: img: pending"),
        ("pull_fails", "failed to pull image"),
        ("start_fails", "error starting container: nvidia-container-cli: requirement error"),
    ],
)
def test_a_pod_says_running_and_never_runs(runpod, kind: str, line: str):
    api = runpod()
    api.emulator.faults.add(kind)
    id = api.create()["id"]
    wait_for(lambda: any(line in said for said in api.emulator.logs(id)), within_s=10)
    time.sleep(0.2)
    shown = api.get(id)
    assert (shown["status"], shown["runtime"], shown["startedAt"]) == ("RUNNING", None, None)
    assert _truth(api, id).process_ids == ()
    assert _truth(api, id).charged_usd > 0


def test_an_image_that_nobody_has_is_never_pulled(runpod):
    api = runpod()
    api.emulator.images["team/*"] = api.emulator.images.pop("*")
    id = api.create(image="other/img:1")["id"]
    wait_for(lambda: any("failed to pull" in line for line in api.emulator.logs(id)), within_s=10)
    assert _running(api, image="team/img@sha256:12")


def test_runtime_can_stay_null_while_the_command_runs(runpod):
    api = runpod()
    api.emulator.faults.add("runtime_null", seconds=0.5)
    id = _running(api)
    assert api.get(id)["runtime"] is None
    wait_for(lambda: api.get(id)["runtime"] is not None, within_s=10)


def test_logs_are_streamed_and_a_stream_can_be_taken_up_again(runpod):
    api = runpod(_TALK)
    id = _running(api)
    wait_for(lambda: len(api.emulator.logs(id)) > 10, within_s=10)
    with _streaming(api, id, params={"source": "container", "tail": "2"}) as lines:
        events = [next(lines) for _ in range(12)]
    assert events[0].startswith("id: 2")
    told = [line.partition(" ")[2] for line in events if line.startswith("data")]
    numbers = [int(line.split('"line ')[1].rstrip('"}')) for line in told]
    assert numbers == list(range(numbers[0], numbers[0] + 4))
    last = events[9].removeprefix("id: ")
    with _streaming(api, id, params={"source": "container"}, headers={"Last-Event-ID": last}) as lines:
        following = [next(lines) for _ in range(2)][1]
    assert f"line {numbers[3] + 1}" in following
    with _streaming(api, id, params={"source": "system"}) as lines:
        assert "create container img" in [next(lines) for _ in range(2)][1]


def test_a_log_stream_can_hang_without_a_word(runpod):
    api = runpod(_TALK)
    id = _running(api)
    api.emulator.faults.add("logs_hang", pod=id, lines=1)
    with _streaming(api, id, within_s=0.5) as lines:
        assert [next(lines) for _ in range(3)][1].startswith("data")
        with pytest.raises(httpx.ReadTimeout):
            next(lines)
    with _streaming(api, id) as lines:
        assert len([next(lines) for _ in range(9)]) == 9


def test_a_deletion_can_fail_and_a_deleted_pod_can_linger(runpod):
    api = runpod()
    api.emulator.faults.add("status", match="DELETE /v2/pods/", status=502, times=2)
    api.emulator.faults.add("lingers", seconds=0.6)
    id = _running(api)
    codes = [api("DELETE", f"/pods/{id}").status_code for _ in range(3)]
    assert codes == [502, 502, 204]
    assert api.get(id)["status"] == "RUNNING"
    assert _truth(api, id).living_process_ids
    wait_for(lambda: api("GET", f"/pods/{id}").status_code == 404, within_s=10)


def test_answers_can_have_fields_that_came_later(runpod):
    api = runpod()
    api.emulator.faults.add("extra_fields", times=2)
    pod = api.create()
    assert pod["addedLater"] == {"by": "the platform"}
    assert api("GET", "/pods").json()["pods"][0]["addedLater"]
    assert "addedLater" not in api.get(pod["id"])


def test_a_pod_is_cut_off_from_its_store_and_the_others_are_not(runpod, tmp_path: Path):
    if s3.program() is None:
        pytest.skip("versitygw is not installed")
    program = (
        "import boto3, os, time\n"
        "bucket = boto3.client('s3')\n"
        "while True:\n"
        f"    bucket.put_object(Bucket='{s3.BUCKET}', Key=os.environ['RUNPOD_POD_ID'], Body=b'1')\n"
        "    time.sleep(0.05)\n"
    )
    with (
        s3.serve(tmp_path / "data") as server,
        s3_faults.proxy(server.endpoint) as proxy,
    ):
        api = runpod(program, network=proxy)
        env = {**server.environment, "AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "1"}
        ids = [str(api.create(env=env)["id"]) for _ in range(2)]
        requests = [f"PUT /{s3.BUCKET}/{id}" for id in ids]
        # Who asks a second time has put its object.
        wait_for(lambda: all(proxy.requests.count(request) > 1 for request in requests), within_s=20)
        api.emulator.faults.add("network", pod=ids[0])
        wait_for(lambda: any("Error" in line for line in api.emulator.logs(ids[0])), within_s=10)
        proxy.requests.clear()
        wait_for(lambda: proxy.requests.count(requests[1]) > 3, within_s=10)
        assert not any("Error" in line for line in api.emulator.logs(ids[1]))
        assert requests[0] not in proxy.requests
        fault = {"kind": "status", "match": ids[1], "status": 403}
        url = f"{api.emulator.control_url}/s3/faults"
        assert httpx.post(url, json=fault, trust_env=False).status_code == 201
        wait_for(lambda: any("AccessDenied" in line for line in api.emulator.logs(ids[1])), within_s=10)
        assert httpx.post(url, json={"kind": "explodes"}, trust_env=False).status_code == 422
        assert api.get(ids[0])["status"] == "RUNNING"
        for id in ids:
            api("DELETE", f"/pods/{id}")
        listed = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=s3.ACCESS_KEY,
            aws_secret_access_key=s3.SECRET_KEY,
            region_name="us-east-1",
        ).list_objects_v2(Bucket=s3.BUCKET)
        assert sorted(entry["Key"] for entry in listed["Contents"]) == sorted(ids)
    assert "AWS_ENDPOINT_URL" not in os.environ


def test_faults_prices_and_the_truth_are_had_over_http_too(runpod):
    api = runpod()
    with httpx.Client(base_url=api.emulator.control_url, trust_env=False) as control:
        fault = control.post("/faults", json={"kind": "no_capacity", "gpu": "L40S", "times": None})
        assert fault.status_code == 201
        assert api("POST", "/pods", json=_POD).status_code == 400
        assert control.get("/faults").json()[0]["hits"] == 1
        assert control.delete(f"/faults/{fault.json()['id']}").json() == []
        assert control.post("/faults", json={"kind": "explodes"}).status_code == 422
        assert control.post("/faults", json={"kind": "dies", "typo": 1}).status_code == 422
        assert control.patch("/settings", json={"clock_speed": 3600}).json()["clock_speed"] == 3600
        assert control.patch("/settings", json={"clock_speed": -1}).status_code == 422
        assert control.put("/prices", json={"gpu": GPU, "secure": 5}).status_code == 204
        assert control.put("/prices", json={"gpu": "none", "secure": 5}).status_code == 422
        place = {"gpu": GPU, "data_center": "US-KS-2", "cloud": "SECURE", "free": 0}
        assert control.put("/stock", json=place).status_code == 204
        digest = control.put("/images", json={"name": "n", "tag": "1"}).json()["digest"]
        assert digest == api.emulator.registry.publish("n", "1")
        id = _running(api)
        assert control.post("/faults", json={"kind": "dies", "pod": id}).status_code == 201
        wait_for(lambda: control.get("/pods").json()[0]["status"] == "EXITED", within_s=10)
        truth = control.get("/pods").json()[0]
        assert (truth["id"], truth["living_process_ids"], truth["price_usd_per_h"]) == (id, [], 5)
        assert control.get("/requests").json()[-1]["path"] == "/v2/pods"
        assert control.get("/violations").json() == []
