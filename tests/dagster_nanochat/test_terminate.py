"""Terminate, however a run was started: its processes end, and it shows as cancelled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from standins.checkout import make_checkout, serve
from standins.waiting import wait_for

from nanochat.attempts import live_attempt
from nanochat.stages import resolve
from nanochat.store import FileStore

pytestmark = pytest.mark.timeout(400)

BIN = Path(sys.executable).parent
# The project's definitions, and a schedule that is not worth a week's waiting.
DEFINITIONS = """
import dagster as dg
from dagster_nanochat import definitions as project

job = dg.define_asset_job(
    "slow_base", selection=["base_model_checkpoint"], tags={"dagster/partition": "slow"}
)
often = dg.ScheduleDefinition(name="often", job=job, cron_schedule="* * * * *")
defs = dg.Definitions.merge(project.defs(), dg.Definitions(jobs=[job], schedules=[often]))
"""

REPOSITORIES = """{ repositoriesOrError { __typename
  ... on RepositoryConnection { nodes { name location { name } } } ... on PythonError { message }
} }"""
LAUNCH = """mutation($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) { __typename ... on LaunchRunSuccess { run { runId } } }
}"""
RUNS = "{ runsOrError(limit: 20) { ... on Runs { results { runId status } } } }"
TERMINATE = """mutation($id: String!, $policy: TerminateRunPolicy) {
  terminateRun(runId: $id, terminatePolicy: $policy) { __typename }
}"""
START_SCHEDULE = """mutation($selector: ScheduleSelector!) {
  startSchedule(scheduleSelector: $selector) { __typename }
}"""
STOP_SCHEDULE = "mutation($id: String!) { stopRunningSchedule(id: $id) { __typename } }"
SCHEDULE = """query($selector: ScheduleSelector!) {
  scheduleOrError(scheduleSelector: $selector) { ... on Schedule { id scheduleState { id } } }
}"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, module_environment) -> Iterator[SimpleNamespace]:
    """A checkout whose model `slow` only lacks its base, and the pages and the daemon over it."""
    from dagster_nanochat.partitions import recipe_book

    root = tmp_path_factory.mktemp("project").resolve()
    environment = {**os.environ, **make_checkout(root), "OMP_NUM_THREADS": "1"}
    (root / "everything.py").write_text(DEFINITIONS)

    def command(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(BIN / words[0]), *words[1:]],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    shards = "tinytext_part_0...tinytext_part_1"
    for words in (
        ("dg", "launch", "--job", "ingest_shards", "--partition-range", shards),
        ("dg", "launch", "--assets", "validation_files,tokenizer_training", "--partition", "slow"),
    ):
        assert command(*words).wait(timeout=120) == 0
    store = FileStore(root / "data" / "store")

    def prefix() -> str:
        return resolve(recipe_book()["slow"], store)["base"].prefix

    with serve(root, environment, "dagster", "dev", "-f", "everything.py") as url:

        def ask(query: str, **variables: Any) -> dict[str, Any]:
            answer = httpx.post(f"{url}/graphql", json={"query": query, "variables": variables}, timeout=60)
            document = answer.json()
            assert "errors" not in document, document
            return document["data"]

        found = ask(REPOSITORIES)["repositoriesOrError"]
        (repository,) = found["nodes"]
        where = {
            "repositoryLocationName": repository["location"]["name"],
            "repositoryName": repository["name"],
        }
        yield SimpleNamespace(ask=ask, command=command, store=store, prefix=prefix, where=where)


def from_the_ui(project: SimpleNamespace) -> None:
    params = {
        "selector": {**project.where, "pipelineName": "slow_base"},
        "mode": "default",
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": "slow"}]},
    }
    launched = project.ask(LAUNCH, params=params)["launchPipelineExecution"]
    assert launched["__typename"] == "LaunchRunSuccess", launched


def by_dg_launch(project: SimpleNamespace) -> subprocess.Popen[bytes]:
    return project.command("dg", "launch", "--assets", "base_model_checkpoint", "--partition", "slow")


def by_quickstart(project: SimpleNamespace) -> subprocess.Popen[bytes]:
    return project.command("nanochat", "quickstart", "--model", "slow")


def by_a_schedule(project: SimpleNamespace) -> None:
    selector = {**project.where, "scheduleName": "often"}
    started = project.ask(START_SCHEDULE, selector=selector)["startSchedule"]
    assert started["__typename"] == "ScheduleStateResult", started


@pytest.mark.parametrize("start", [from_the_ui, by_dg_launch, by_quickstart, by_a_schedule])
def test_terminate_ends_the_processes_and_the_run_shows_as_cancelled(
    project: SimpleNamespace, start: Callable[[SimpleNamespace], subprocess.Popen[bytes] | None]
) -> None:
    process = start(project)
    family = wait_for(lambda: training(project), within_s=150)
    if start is by_a_schedule:
        found = project.ask(SCHEDULE, selector={**project.where, "scheduleName": "often"})["scheduleOrError"]
        project.ask(STOP_SCHEDULE, id=found["scheduleState"]["id"])
    (run,) = [run for run in runs(project) if run["status"] == "STARTED"]
    # The button; and, where Dagster cannot interrupt the run's process, the one that it offers instead.
    for policy in ("SAFE_TERMINATE", "MARK_AS_CANCELED_IMMEDIATELY"):
        answer = project.ask(TERMINATE, id=run["runId"], policy=policy)["terminateRun"]["__typename"]
        if answer == "TerminateRunSuccess":
            break
    assert answer == "TerminateRunSuccess"
    assert psutil.wait_procs(family, timeout=30)[1] == []
    if process is not None:
        process.wait(timeout=30)
    wait_for(lambda: status(project, run["runId"]) == "CANCELED")
    time.sleep(2)  # nothing overwrites it afterwards
    assert status(project, run["runId"]) == "CANCELED"


def training(project: SimpleNamespace) -> list[psutil.Process] | None:
    """The supervisor that works on the stage, and all below it, once torchrun and its worker are there."""
    lease = live_attempt(project.store, project.prefix())
    if lease is None or lease.owner != "supervisor":
        return None
    supervisor = psutil.Process(lease.pid)
    below = supervisor.children(recursive=True)
    return [supervisor, *below] if len(below) >= 2 else None


def runs(project: SimpleNamespace) -> list[dict[str, str]]:
    return project.ask(RUNS)["runsOrError"]["results"]


def status(project: SimpleNamespace, run: str) -> str:
    return next(one["status"] for one in runs(project) if one["runId"] == run)
