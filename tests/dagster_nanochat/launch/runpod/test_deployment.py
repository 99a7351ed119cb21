"""A model on an endpoint: an emulator that runs the workers, a real S3 server, the real assets."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dagster as dg
import pytest
from emulators.runpod import Emulator, find_spec, serve
from standins import plain_worker, s3
from standins.runs import Run
from standins.waiting import wait_for

from dagster_nanochat import endpoints, pods
from dagster_nanochat.launch.images import RECEIPT_LABEL, recorded_image
from dagster_nanochat.launch.runpod import asking, deployment
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.deployment import STORE_OF_ENDPOINT_ENV, read_endpoint
from nanochat.store import ObjectStore, open_store
from nanochat.store.digests import digest_bytes
from nanochat.store.receipts import Receipt, current_receipt, point, write_receipt

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(s3.program() is None, reason="versitygw, the S3 server of tests, is not installed"),
    pytest.mark.skipif(find_spec() is None, reason="RunPod's OpenAPI file is not there"),
]

SECRET = "s3cr3t-canary-9f2"
GOOD = {
    "val_bpb": 2.0,
    **{
        f"{name}_{what}": number
        for name in ("mmlu", "arc_easy")
        for what, number in (("correct", 20), ("questions", 20), ("chance", 0.25))
    },
}
BAD = {**GOOD, "mmlu_correct": 0}


def build(store: ObjectStore, seconds: float = 1.0, metrics: dict[str, float] = GOOD) -> Receipt:
    """What the endpoint needs to know of a model that is trained: its receipts."""
    for stage in ("base", "midtrain", "sft"):
        receipt = Receipt(
            stage=stage,
            stage_version=1,
            fingerprint=digest_bytes(stage.encode()),
            token="t1",
            created_at=datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC),
            seconds=seconds,
            outputs=(),
            metrics=metrics,
        )
        write_receipt(store, receipt)
        point(store, "tiny", stage, receipt.fingerprint)
    return receipt


@pytest.fixture(scope="module")
def bucket(
    tmp_path_factory: pytest.TempPathFactory, module_environment: pytest.MonkeyPatch
) -> Iterator[None]:
    with s3.serve(tmp_path_factory.mktemp("s3") / "data") as server:
        for name, value in server.environment.items():
            module_environment.setenv(name, value)
        yield


@pytest.fixture
def store(bucket: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("NANOCHAT_STORE", f"s3://{s3.BUCKET}/{tmp_path.name}")
    opened = open_store()
    build(opened)
    return opened


@pytest.fixture(scope="module")
def instance(
    tmp_path_factory: pytest.TempPathFactory, module_environment: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    home = str(tmp_path_factory.mktemp("dagster"))
    with dg.instance_for_test(temp_dir=home) as made:
        module_environment.setenv("DAGSTER_HOME", home)
        yield made


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    from dagster_nanochat.definitions import defs

    return defs()


@pytest.fixture
def runpod(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """An account whose images do what their name says; at the end no worker of it runs on."""
    names = ("answers", "errs", "says-nothing", "sleeps", "has-other-weights")
    images = {f"*/{name}@*": plain_worker.image(name.replace("-", " ")) for name in names}
    monkeypatch.setattr(deployment, "_POLL_S", 0.1)
    monkeypatch.setattr(deployment, "_LOOK_FOR_LOST_S", (0.1, 0.2))
    monkeypatch.setattr(asking, "POLL_S", 0.1)
    with serve(state_dir=tmp_path / "runpod", images=images) as emulator:
        emulator.set_secret("AWS_ACCESS_KEY_ID", os.environ["AWS_ACCESS_KEY_ID"])
        emulator.set_secret("AWS_SECRET_ACCESS_KEY", SECRET)
        for name in names:
            emulator.registry.publish(name, "1")
        monkeypatch.setenv("NANOCHAT_LAUNCHER", "runpod")
        monkeypatch.setenv("RUNPOD_API_URL", emulator.url)
        monkeypatch.setenv("RUNPOD_API_KEY", emulator.api_key)
        monkeypatch.setenv("NANOCHAT_SERVERLESS_IMAGE", image(emulator, "answers"))
        yield emulator
        assert emulator.violations == []


@pytest.fixture
def client(runpod: Emulator) -> Iterator[RunPodClient]:
    with RunPodClient.from_environment() as made:
        yield made


def image(runpod: Emulator, name: str) -> str:
    return f"{urlsplit(runpod.registry_url).netloc}/{name}:1"


@dataclasses.dataclass
class Told:
    """What a run said: `why` it failed, what each asset shows, which checks failed."""

    result: dg.ExecuteInProcessResult
    instance: dg.DagsterInstance

    @property
    def why(self) -> str:
        (event,) = (event for event in self.result.all_events if event.is_step_failure)
        return event.step_failure_data.user_failure_data.description

    def shown(self, asset: str) -> dict[str, Any]:
        (event,) = (
            event
            for event in self.result.all_events
            if event.is_step_materialization and event.asset_key == dg.AssetKey(asset)
        )
        return {name: value.value for name, value in event.materialization.metadata.items()}

    def check(self, name: str) -> Any:
        (found,) = (one for one in self.result.get_asset_check_evaluations() if one.check_name == name)
        return found

    @property
    def everything(self) -> str:
        """All that Dagster keeps of the run."""
        return "\n".join(entry.to_json() for entry in self.instance.all_logs(self.result.run_id))


Deploy = Callable[..., Told]


@pytest.fixture
def deploy(instance: dg.DagsterInstance, definitions: dg.Definitions, store: ObjectStore) -> Deploy:
    """deploy(serverless_endpoint={config}, chat_inference={config}, …) runs the job `deploy_model`."""

    def run(**config: Any) -> Told:
        result = definitions.resolve_job_def("deploy_model").execute_in_process(
            instance=instance,
            tags={"dagster/partition": "tiny"},
            run_config={"ops": {asset: {"config": given} for asset, given in config.items()}},
            raise_on_error=False,
        )
        return Told(result, instance)

    return run


def test_a_model_is_deployed_tried_and_asked(
    runpod: Emulator, client: RunPodClient, store: ObjectStore, deploy: Deploy
) -> None:
    told = deploy(chat_inference={"question": "Who are you?"})
    assert told.result.success, told.why
    (endpoint,) = client.list_endpoints()
    receipt, pinned = current_receipt(store, "tiny", "sft"), recorded_image(store, "serverless/tiny")
    assert receipt is not None
    assert pinned is not None
    assert (endpoint.name, endpoint.image) == ("nanochat-tiny", pinned.reference)
    assert (endpoint.workers.min, endpoint.workers.max, endpoint.workers.idle_timeout) == (0, 2, 60)
    assert endpoint.env is not None
    assert endpoint.env["NANOCHAT_MODEL"] == "tiny"
    assert endpoint.env["NANOCHAT_FINGERPRINT"] == receipt.fingerprint
    assert endpoint.env["NANOCHAT_RECEIPT_SHA256"] == receipt.digest()
    assert endpoint.env["AWS_SECRET_ACCESS_KEY"] == "{{ RUNPOD_SECRET_AWS_SECRET_ACCESS_KEY }}"
    record = read_endpoint(store, "tiny")
    assert record is not None
    assert (record.id, record.image, record.receipt) == (endpoint.id, pinned.reference, receipt.digest())

    shown = told.shown("serverless_endpoint")
    assert (shown["did"], shown["release"], shown["id"]) == ("created", 1, endpoint.id)
    assert shown["smoke_answer"] == "You asked: What is your name?"
    assert shown["smoke_cold_start"] is True
    answered = told.shown("chat_inference")
    assert (answered["question"], answered["answer"]) == ("Who are you?", "You asked: Who are you?")
    assert (answered["tokens"], answered["cold_start"]) == (7, False)
    assert answered["answered_by"] == f"endpoint nanochat-tiny ({endpoint.id})"
    assert answered["receipt"] == receipt.digest()[:12]
    price = next(gpu.serverless for gpu in runpod.catalog.gpus.values() if gpu.id == answered["gpu"])
    assert answered["dollars"] == pytest.approx(answered["execution_s"] * price / 3600)
    assert shown["smoke_dollars"] > answered["dollars"]
    for check in ("serverless_endpoint_exists", "endpoint_runs_latest_image"):
        assert told.check(check).passed, told.check(check).description
        assert told.check(check).partition == "tiny"
    assert told.check("serverless_endpoint_exists").blocking
    # The store's credentials reach the worker, and nothing else.
    (worker,) = runpod.workers()
    assert SECRET not in json.dumps(worker.env)
    assert SECRET not in told.everything
    assert runpod.api_key not in told.everything


def test_what_is_deployed_and_proven_is_left_alone(
    runpod: Emulator, client: RunPodClient, deploy: Deploy
) -> None:
    assert deploy().result.success
    jobs = [request for request in runpod.requests if request["path"].endswith("/run")]
    again = deploy(chat_inference={"messages": [{"role": "user", "content": "Again?"}]})
    assert again.result.success
    shown = again.shown("serverless_endpoint")
    assert (shown["did"], shown["release"]) == ("unchanged", 1)
    assert "smoke_answer" not in shown
    # The question, and no smoke prompt.
    assert len([r for r in runpod.requests if r["path"].endswith("/run")]) == len(jobs) + 1
    assert [r for r in runpod.requests if r["method"] == "PATCH"] == []


def test_new_weights_are_a_release_that_every_worker_takes_on(
    runpod: Emulator, client: RunPodClient, store: ObjectStore, deploy: Deploy
) -> None:
    assert deploy(serverless_endpoint={"min_workers": 1}).result.success
    (old,) = [worker for worker in runpod.workers() if worker.is_there]
    receipt = build(store, seconds=2.0)
    told = deploy(serverless_endpoint={"min_workers": 1})
    assert told.result.success, told.why
    shown = told.shown("serverless_endpoint")
    assert (shown["did"], shown["release"], shown["receipt"]) == ("updated", 2, receipt.digest()[:12])
    wait_for(lambda: not next(worker for worker in runpod.workers() if worker.id == old.id).is_there)
    assert told.shown("chat_inference")["receipt"] == receipt.digest()[:12]
    assert told.check("endpoint_runs_latest_image").passed
    (endpoint,) = client.list_endpoints()
    assert client.endpoint_releases(endpoint.id).endpoint_version == 2


def test_an_old_worker_that_does_not_leave_ends_the_run_by_name(
    runpod: Emulator, client: RunPodClient, store: ObjectStore, deploy: Deploy
) -> None:
    assert deploy(serverless_endpoint={"min_workers": 1}).result.success
    (old,) = [worker for worker in runpod.workers() if worker.is_there]
    build(store, seconds=2.0)
    runpod.faults.add("rollout_stuck", pod="nanochat-tiny", times=None)
    told = deploy(serverless_endpoint={"min_workers": 1, "release_s": 1.0})
    assert "DEADLINE: release 2 of endpoint nanochat-tiny is not everywhere after 1 s" in told.why
    assert old.id in told.why
    (endpoint,) = client.list_endpoints()
    assert client.endpoint_releases(endpoint.id).endpoint_version == 2
    # Once it has gone the same command proves the release.
    runpod.faults.clear()
    told = deploy(serverless_endpoint={"min_workers": 1})
    assert told.result.success, told.why
    assert told.shown("serverless_endpoint")["did"] == "unchanged"
    assert "smoke_answer" in told.shown("serverless_endpoint")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("errs", r"FAILED: the smoke prompt failed: job .* is FAILED: I do not want to\."),
        ("says-nothing", r"FAILED: the smoke prompt failed: job .* answered nothing\."),
        ("sleeps", r"DEADLINE: the smoke prompt failed: .* has not answered in time; .*: 1 running\."),
        (
            "has-other-weights",
            r"FAILED: the smoke prompt failed: it answers with the weights of receipt 0000",
        ),
    ],
)
def test_a_release_that_does_not_answer_is_rolled_back(
    name: str, why: str, runpod: Emulator, client: RunPodClient, store: ObjectStore, deploy: Deploy
) -> None:

    assert deploy().result.success
    before, proven = client.list_endpoints()[0], read_endpoint(store, "tiny")
    told = deploy(
        nanochat_serverless_image={"image": image(runpod, name)},
        serverless_endpoint={"smoke_s": 2.0 if name == "sleeps" else 30.0},
    )
    assert re.search(why, told.why), told.why
    assert f"Endpoint nanochat-tiny was rolled back to {before.image}" in told.why
    (after,) = client.list_endpoints()
    assert (after.image, after.env, after.workers) == (before.image, before.env, before.workers)
    assert read_endpoint(store, "tiny") == proven
    assert client.endpoint_releases(after.id).endpoint_version == 3
    with client.jobs(after) as jobs:
        job = [r["path"].split("/")[-1] for r in runpod.requests if "/status/" in r["path"]][-1]
        assert jobs.status(job).status.final
    # What is deployed answers on.
    assert (
        asking.ask(client, after, {"question": "Still?"}, within_s=30, say=print).text == "You asked: Still?"
    )


def test_a_first_release_that_does_not_answer_is_left_without_workers(
    runpod: Emulator, client: RunPodClient, store: ObjectStore, deploy: Deploy
) -> None:
    told = deploy(nanochat_serverless_image={"image": image(runpod, "errs")})
    assert "has no release to go back to, and is left with 0 workers" in told.why
    (endpoint,) = client.list_endpoints()
    assert (endpoint.workers.min, endpoint.workers.max) == (0, 0)
    assert read_endpoint(store, "tiny") is None
    wait_for(lambda: not any(worker.is_there for worker in runpod.workers()))
    told = deploy()
    assert told.result.success, told.why
    assert client.list_endpoints()[0].workers.max == 2


def test_a_quota_that_does_not_suffice_is_explained(
    runpod: Emulator, client: RunPodClient, deploy: Deploy
) -> None:
    runpod.settings.worker_quota = 1
    told = deploy()
    assert "BAD_REQUEST: POST /serverless: HTTP 400" in told.why
    assert "for this endpoint to at most 1" in told.why
    assert "`nanochat endpoints rm MODEL`" in told.why
    assert client.list_endpoints() == []
    assert deploy(serverless_endpoint={"max_workers": 1}).result.success


def test_a_creation_whose_answer_is_lost_makes_one_endpoint(
    runpod: Emulator, client: RunPodClient, deploy: Deploy
) -> None:
    runpod.faults.add("status_after", match=r"POST .*/serverless$", status=500)
    told = deploy()
    assert told.result.success, told.why
    assert len(client.list_endpoints()) == 1


def test_an_endpoint_of_another_store_is_left_alone(
    runpod: Emulator,
    client: RunPodClient,
    deploy: Deploy,
    store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert deploy().result.success
    before = client.list_endpoints()
    monkeypatch.setenv("NANOCHAT_STORE", f"{store.url}-other")
    build(open_store())
    told = deploy()
    assert f"is of {store.url}, not of {store.url}-other" in told.why
    assert client.list_endpoints() == before
    told = deploy(serverless_endpoint={"name": "mine"})
    assert told.result.success, told.why
    assert {(one.env or {})[STORE_OF_ENDPOINT_ENV] for one in client.list_endpoints()} == {
        store.url,
        f"{store.url}-other",
    }


def test_a_model_whose_checks_did_not_pass_is_not_promoted(
    runpod: Emulator, client: RunPodClient, store: ObjectStore, deploy: Deploy
) -> None:
    build(store, metrics=BAD)
    told = deploy()
    assert "tiny is not deployed, its checks did not pass: sft_mmlu_accuracy (0.0% of 20" in told.why
    assert client.list_endpoints() == []
    assert deploy(serverless_endpoint={"despite_checks": True}).result.success


def test_a_check_that_had_nothing_to_measure_holds_no_model_back(
    runpod: Emulator, store: ObjectStore, deploy: Deploy
) -> None:
    build(store, metrics={**GOOD, "mmlu_correct": 0, "mmlu_questions": 0})
    told = deploy()
    assert told.result.success, told.why
    assert "sft_mmlu_accuracy says nothing of tiny: mmlu was not measured" in told.everything


def test_an_image_with_other_weights_in_it_is_refused(
    runpod: Emulator, client: RunPodClient, store: ObjectStore, deploy: Deploy
) -> None:
    receipt = current_receipt(store, "tiny", "sft")
    assert receipt is not None
    for tag, inside in (("old", "0" * 64), ("new", receipt.digest())):
        runpod.registry.publish("answers", tag, labels={RECEIPT_LABEL: inside})
    name = image(runpod, "answers").removesuffix(":1")
    told = deploy(nanochat_serverless_image={"image": f"{name}:old"})
    assert "answers:old has the weights of receipt 000000000000 in it, and tiny is at" in told.why
    told = deploy(nanochat_serverless_image={"image": f"{name}:new"})
    assert told.result.success, told.why
    assert told.shown("nanochat_serverless_image")["weights"] == f"receipt {receipt.digest()[:12]}"
    (endpoint,) = client.list_endpoints()
    assert endpoint.env is not None
    # They are not pulled, so the worker is told no way to the store.
    assert sorted(endpoint.env) == [STORE_OF_ENDPOINT_ENV, "NANOCHAT_RECEIPT_SHA256"]


def test_without_an_image_nothing_is_deployed_and_a_check_says_so(
    runpod: Emulator, client: RunPodClient, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANOCHAT_SERVERLESS_IMAGE")
    told = deploy()
    assert told.shown("nanochat_serverless_image")["needed"] is False
    assert told.shown("serverless_endpoint")["deployed"] is False
    check = told.check("serverless_endpoint_exists")
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "set NANOCHAT_SERVERLESS_IMAGE" in check.description
    assert client.list_endpoints() == []


def test_an_endpoint_that_was_removed_by_hand_is_missed(
    runpod: Emulator, client: RunPodClient, deploy: Deploy, instance: dg.DagsterInstance
) -> None:
    assert deploy().result.success
    (endpoint,) = client.list_endpoints()
    client.delete_endpoint(endpoint.id)
    run = Run(instance, asset="chat_inference", tags={"dagster/partition": "tiny"}, config={}).end()
    assert "RunPod has no endpoint" in run.reason
    assert "--job deploy_model" in run.reason
    assert deploy().result.success


def test_terminating_the_run_cancels_its_job(
    runpod: Emulator, client: RunPodClient, deploy: Deploy, instance: dg.DagsterInstance
) -> None:
    assert deploy().result.success
    (endpoint,) = client.list_endpoints()
    known = len(runpod.requests)
    config = {"question": plain_worker.SLEEP}
    run = Run(instance, asset="chat_inference", tags={"dagster/partition": "tiny"}, config=config)

    def job() -> str | None:
        asked = (r["path"] for r in runpod.requests[known:] if "/status/" in r["path"])
        return next((path.split("/")[-1] for path in asked), None)

    asked = wait_for(job)
    with client.jobs(endpoint) as jobs:
        wait_for(lambda: jobs.status(asked).status == "IN_PROGRESS")
        run.cancel()
        run.end(within_s=60)
        assert run.status is dg.DagsterRunStatus.CANCELED
        assert jobs.status(asked).status == "CANCELLED"


def test_terminating_a_deployment_takes_its_release_back(
    runpod: Emulator,
    client: RunPodClient,
    store: ObjectStore,
    deploy: Deploy,
    instance: dg.DagsterInstance,
) -> None:
    assert deploy().result.success
    (before,) = client.list_endpoints()
    tags = {"dagster/partition": "tiny"}
    config = {"image": image(runpod, "sleeps")}
    assert Run(instance, asset="nanochat_serverless_image", tags=tags, config=config).end().succeeded
    known = len(runpod.requests)
    run = Run(instance, asset="serverless_endpoint", tags=tags, config={})
    asked = wait_for(lambda: next((r for r in runpod.requests[known:] if "/status/" in r["path"]), None))
    run.cancel()
    run.end()
    assert run.status is dg.DagsterRunStatus.CANCELED
    (after,) = client.list_endpoints()
    assert (after.image, after.env, after.workers) == (before.image, before.env, before.workers)
    with client.jobs(after) as jobs:
        assert jobs.status(asked["path"].split("/")[-1]).status == "CANCELLED"


def test_a_question_that_is_not_answered_in_time_is_cancelled_and_fails(
    runpod: Emulator, client: RunPodClient, deploy: Deploy, instance: dg.DagsterInstance
) -> None:
    assert deploy(serverless_endpoint={"idle_timeout_s": 1}).result.success
    wait_for(lambda: not any(worker.is_there for worker in runpod.workers()))
    runpod.faults.add("throttled", pod="nanochat-tiny", seconds=60)
    tags = {"dagster/partition": "tiny"}
    run = Run(instance, asset="chat_inference", tags=tags, config={"within_s": 1.5}).end()
    assert "chat with tiny: DEADLINE: endpoint nanochat-tiny has not answered in time" in run.reason
    assert "1 throttled" in run.reason
    cancelled = [r for r in runpod.requests if "/cancel/" in r["path"]]
    assert [request["status"] for request in cancelled] == [200]


def test_an_answer_that_is_an_error_fails_the_asset(
    runpod: Emulator, client: RunPodClient, deploy: Deploy, instance: dg.DagsterInstance
) -> None:
    assert deploy(serverless_endpoint={"idle_timeout_s": 1}).result.success
    wait_for(lambda: not any(worker.is_there for worker in runpod.workers()))
    for does, why in (("errs", "is FAILED: I do not want to"), ("says nothing", "answered nothing")):
        runpod.images["*/answers@*"] = plain_worker.image(does)
        run = Run(instance, asset="chat_inference", tags={"dagster/partition": "tiny"}, config={}).end()
        assert f"{why}" in run.reason
        wait_for(lambda: not any(worker.is_there for worker in runpod.workers()))


def test_what_is_deployed_is_listed_asked_and_removed(
    runpod: Emulator,
    client: RunPodClient,
    store: ObjectStore,
    deploy: Deploy,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert endpoints.list_endpoints() == 0
    assert capsys.readouterr().out == f"no model of {store.url} has an endpoint\n"
    assert deploy(serverless_endpoint={"min_workers": 1}).result.success
    (endpoint,) = client.list_endpoints()
    capsys.readouterr()
    assert endpoints.list_endpoints() == 0
    listed = capsys.readouterr().out
    for part in ("nanochat-tiny", endpoint.id, "1 to 2", "IDLE", "$0."):
        assert part in listed
    assert f"endpoint nanochat-tiny ({endpoint.id}) always has 1 workers" in listed
    assert pods.sweep_pods() == 0
    assert "always has 1 workers, and they are always paid for" in capsys.readouterr().out

    question = {"question": "Who?", "max_tokens": 8, "temperature": 0}
    assert endpoints.ask_endpoint("tiny", question, within_s=30) == 0
    said = capsys.readouterr()
    assert said.out == "You asked: Who?\n"
    assert said.err.startswith("(7 tokens in ")
    assert endpoints.ask_endpoint("quick", question, within_s=30) == 1
    assert "quick has no endpoint" in capsys.readouterr().err

    assert endpoints.remove("tiny") == 0
    assert capsys.readouterr().out.startswith(f"endpoint nanochat-tiny ({endpoint.id}) is gone")
    assert client.list_endpoints() == []
    assert read_endpoint(store, "tiny") is None
    wait_for(lambda: not any(worker.is_there for worker in runpod.workers()))
    assert endpoints.remove("tiny") == 1
    assert "no endpoint of" in capsys.readouterr().err
