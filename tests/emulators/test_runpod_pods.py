"""The RunPod emulator: pods are processes that live, are started again, cost and end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from emulators.runpod import Image
from emulators.runpod.client import GPU, Api
from standins.waiting import wait_for

_TELL_ENVIRONMENT = (
    "import json, os, time; open('environment.json', 'w').write(json.dumps(dict(os.environ)));"
    "os.rename('environment.json', 'told.json'); time.sleep(600)"
)


def _truth(api: Api, id: str) -> Any:
    return next(pod for pod in api.emulator.pods() if pod.id == id)


def _runs(api: Api, id: str) -> int:
    """The process id of the pod's command, once it runs."""
    return int(wait_for(lambda: _truth(api, id).living_process_ids, within_s=10)[0])


def _environment(api: Api, id: str) -> dict[str, str]:
    told = _truth(api, id).folder / "told.json"
    wait_for(told.exists, within_s=10)
    return dict(json.loads(told.read_text()))


def test_a_pod_runs_its_command_until_it_is_deleted_and_is_then_gone(runpod):
    api = runpod()
    pod = api.create(ports=["22/tcp", "8888/http"])
    assert (pod["status"], pod["runtime"], pod["startedAt"]) == ("RUNNING", None, None)
    process = psutil.Process(_runs(api, pod["id"]))
    shown = wait_for(lambda: api.get(pod["id"])["runtime"] and api.get(pod["id"]), within_s=10)
    assert shown["actions"] == ["stop", "restart", "terminate"]
    assert [port["public"] is None for port in shown["runtime"]["ports"]] == [False, True]
    assert "exit" not in str(shown).lower()
    answer = api("DELETE", f"/pods/{pod['id']}")
    assert (answer.status_code, answer.content) == (204, b"")
    wait_for(lambda: api("GET", f"/pods/{pod['id']}").status_code == 404, within_s=10)
    assert not process.is_running()
    assert _truth(api, pod["id"]).deleted_at is not None


def test_the_documented_mode_goes_through_provisioning_and_starting(runpod):
    api = runpod(mode="phased", provisioning_s=0.2, pull_s=0.2)
    pod = api.create()
    assert (pod["status"], pod["actions"]) == ("PROVISIONING", ["stop", "terminate"])
    seen = ["PROVISIONING"]
    while seen[-1] != "RUNNING":
        status = api.get(pod["id"])["status"]
        if status != seen[-1]:
            seen.append(status)
    assert seen == ["PROVISIONING", "STARTING", "RUNNING"]


def test_what_a_command_started_ends_with_it_in_sessions_of_its_own_too(runpod):
    api = runpod(
        "import subprocess, time;"
        "subprocess.Popen(['sleep', '600'], start_new_session=True);"
        "subprocess.Popen(['sh', '-c', 'sleep 601 & exit']).wait(); time.sleep(600)"
    )
    pod = api.create()
    family = wait_for(lambda: len(ids := _truth(api, pod["id"]).living_process_ids) == 3 and ids, within_s=10)
    api("POST", f"/pods/{pod['id']}/action", json={"action": "terminate"})
    wait_for(lambda: not any(psutil.pid_exists(id) for id in family), within_s=10)


def test_an_ended_container_starts_again_in_the_same_folder_and_bills_on(runpod):
    api = runpod("import os; open('starts', 'a').write(f'{os.getpid()}\\n')", clock_speed=3600)
    pod = api.create()
    wait_for(lambda: len(_truth(api, pod["id"]).process_ids) >= 3, within_s=10)
    truth = _truth(api, pod["id"])
    starts = [int(line) for line in (truth.folder / "starts").read_text().split()]
    assert len(set(starts)) == len(starts) >= 2
    assert set(starts) <= set(_truth(api, pod["id"]).process_ids)
    assert api.get(pod["id"])["status"] == "RUNNING"
    assert _truth(api, pod["id"]).charged_usd > truth.charged_usd > 0


def test_a_stopped_pod_forgets_what_its_container_said_and_starts_with_an_empty_disk(runpod):
    api = runpod("import time; open('mark', 'x').close(); print('hello', flush=True); time.sleep(600)")
    pod = api.create()
    wait_for(lambda: "hello" in api.emulator.logs(pod["id"]), within_s=10)
    stopped = api("POST", f"/pods/{pod['id']}/action", json={"action": "stop"})
    assert (stopped.status_code, stopped.json()["status"]) == (200, "EXITED")
    wait_for(lambda: not _truth(api, pod["id"]).living_process_ids, within_s=10)
    wait_for(lambda: "hello" not in api.emulator.logs(pod["id"]), within_s=10)
    assert "stop container" in api.emulator.logs(pod["id"])
    assert api("POST", f"/pods/{pod['id']}/action", json={"action": "stop"}).status_code == 409
    api("POST", f"/pods/{pod['id']}/action", json={"action": "start"})
    wait_for(lambda: "hello" in api.emulator.logs(pod["id"]), within_s=10)


def test_a_patched_environment_replaces_the_old_one_in_a_new_container(runpod):
    api = runpod(_TELL_ENVIRONMENT)
    pod = api.create(env={"A": "1", "B": "2"})
    first = _runs(api, pod["id"])
    changed = api("PATCH", f"/pods/{pod['id']}", json={"env": {"A": "3"}})
    assert changed.json()["env"] == {"A": "3"}
    wait_for(lambda: _truth(api, pod["id"]).living_process_ids not in [(), (first,)], within_s=10)
    environment = _environment(api, pod["id"])
    assert (environment["A"], environment.get("B")) == ("3", None)


def test_args_replace_the_images_command_and_as_json_its_entry_point(runpod):
    api = runpod()
    api.emulator.images["*"] = Image(entrypoint=("echo", "entry"), command=("default",))
    said = {}
    for args in ("", "'one word' two", '{"entrypoint": ["echo", "other"], "cmd": ["end"]}'):
        pod = api.create(args=args)
        said[args] = wait_for(
            lambda id=pod["id"]: [line for line in api.emulator.logs(id) if "container" not in line],
            within_s=10,
        )[0]
    assert list(said.values()) == ["entry default", "entry one word two", "other end"]


def test_the_platforms_variables_come_last_and_secrets_are_filled_in(runpod):
    api = runpod(_TELL_ENVIRONMENT)
    made = api("POST", "/account/secrets", json={"name": "token", "value": "s3cr3t"})
    assert made.status_code == 201
    assert "s3cr3t" not in made.text + api("GET", "/account/secrets").text
    env = {
        "RUNPOD_API_KEY": "mine",
        "TOKEN": "{{ RUNPOD_SECRET_token }}",
        "NONE": "{{ RUNPOD_SECRET_other }}",
        "X": "1",
    }
    pod = api.create(
        env=env, ports=["22/tcp"], gpu={"id": GPU, "count": 2, "minCudaVersion": "12.8", "minRamPerGpu": 8}
    )
    environment = _environment(api, pod["id"])
    assert environment["TOKEN"] == "s3cr3t"
    assert environment["NONE"] == "{{ RUNPOD_SECRET_other }}"
    assert environment["RUNPOD_API_KEY"] not in ("mine", api.emulator.api_key)
    assert environment["RUNPOD_POD_ID"] == pod["id"]
    assert environment["RUNPOD_GPU_COUNT"] == "2"
    assert environment["CUDA_VERSION"] == pod["cudaVersion"] == "13.2"
    assert environment["RUNPOD_DC_ID"] == pod["dataCenterId"]
    assert environment["RUNPOD_API_URL"] == api.emulator.url
    assert "AWS_SECRET_ACCESS_KEY" not in environment
    assert api.get(pod["id"])["env"] == env
    assert os.environ.get("RUNPOD_POD_ID") is None


def test_a_pods_own_key_reaches_itself_only_and_may_end_itself(runpod):
    api = runpod(
        "import os, urllib.request;"
        "r = urllib.request.Request(os.environ['RUNPOD_API_URL'] + '/pods/' + os.environ['RUNPOD_POD_ID'],"
        " method='DELETE', headers={'User-Agent': 'test',"
        " 'Authorization': 'Bearer ' + os.environ['RUNPOD_API_KEY']});"
        "open('go') and urllib.request.urlopen(r)"
    )
    pod, other = api.create(), api.create()
    own = Api(api.emulator, api.emulator.pod_key(pod["id"]))
    assert own("GET", f"/pods/{pod['id']}").status_code == 200
    refused = [
        own("GET", f"/pods/{other['id']}"),
        own("DELETE", f"/pods/{other['id']}"),
        own("GET", "/pods"),
        own("GET", "/account/secrets"),
    ]
    assert [answer.status_code for answer in refused] == [403] * 4
    (_truth(api, pod["id"]).folder / "go").touch()
    wait_for(lambda: api("GET", f"/pods/{pod['id']}").status_code == 404, within_s=10)
    assert api.get(other["id"])["status"] == "RUNNING"
    assert Api(api.emulator, "nobody's")("GET", "/pods").status_code == 401


def test_dollars_accrue_from_creation_to_deletion_at_the_price_of_the_creation(runpod):
    api = runpod(clock_speed=3600)
    api.emulator.catalog.set_price(GPU, secure=2.0)
    pod = api.create(gpu={"id": GPU, "count": 4})
    api.emulator.catalog.set_price(GPU, secure=9.0)
    assert pod["cost"] == 8.0
    api("POST", f"/pods/{pod['id']}/action", json={"action": "stop"})
    api("DELETE", f"/pods/{pod['id']}")
    wait_for(lambda: _truth(api, pod["id"]).deleted_at, within_s=10)
    truth = _truth(api, pod["id"])
    seconds = (truth.deleted_at - truth.created_at).total_seconds()
    assert truth.charged_usd == pytest.approx(seconds * 8.0, rel=0.2)
    billed = api("GET", "/billing/pods", params={"podId": pod["id"], "bucketSize": "hour"}).json()
    assert billed["records"][0]["gpuAmount"] == billed["metadata"]["totals"]["totalAmount"]
    assert billed["records"][0]["totalAmount"] == truth.charged_usd == _truth(api, pod["id"]).charged_usd


def test_without_an_hours_price_in_hand_nothing_is_rented(runpod):
    api = runpod(balance_usd=0.5)
    body = {"name": "a", "image": "img", "gpu": {"id": GPU}}
    assert api("POST", "/pods", json=body).status_code == 402
    api.emulator.settings.balance_usd = 1.0
    assert api("POST", "/pods", json=body).status_code == 201


def test_a_clusters_members_know_their_ranks_and_are_managed_together(runpod):
    api = runpod(_TELL_ENVIRONMENT)
    compute = {"gpuTypeId": GPU, "gpuCountPerPod": 2, "podCount": 3}
    made = api(
        "POST", "/clusters", json={"name": "c", "type": "TRAINING", "image": "img", "compute": compute}
    )
    assert made.status_code == 201, made.text
    cluster = made.json()["id"]
    members = api("GET", f"/clusters/{cluster}/pods").json()["pods"]
    assert [member["cluster"]["rank"] for member in members] == [0, 1, 2]
    environments = [_environment(api, member["id"]) for member in members]
    assert [environment["NODE_RANK"] for environment in environments] == ["0", "1", "2"]
    assert {(e["NUM_NODES"], e["NUM_TRAINERS"], e["WORLD_SIZE"]) for e in environments} == {("3", "2", "6")}
    assert len({(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in environments}) == 1
    first = members[0]["id"]
    assert api("DELETE", f"/pods/{first}").status_code == 409
    assert api("POST", f"/pods/{first}/action", json={"action": "terminate"}).status_code == 409
    assert api("GET", "/pods").json()["pods"] == []
    assert len(api("GET", "/pods", params={"includeClusterPods": "true"}).json()["pods"]) == 3
    assert api("DELETE", f"/clusters/{cluster}").status_code == 204
    wait_for(lambda: not any(pod.living_process_ids for pod in api.emulator.pods()), within_s=10)
    assert api("GET", f"/clusters/{cluster}").status_code == 404


_EMULATOR = """
import pathlib, sys, time
from emulators.runpod import Image, serve
from emulators.runpod.client import Api

images = {"*": Image(entrypoint=("sleep", "600"))}
with serve(state_dir=pathlib.Path(sys.argv[1]), images=images) as emulator:
    Api(emulator).create()
    while not emulator.pods()[0].process_ids:
        time.sleep(0.02)
    print(emulator.pods()[0].process_ids[0], flush=True)
    time.sleep(600)
"""


def test_nothing_outlives_an_emulator_that_is_killed(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", _EMULATOR, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert psutil.pid_exists(child)
        process.kill()
    wait_for(lambda: not psutil.pid_exists(child), within_s=10)
