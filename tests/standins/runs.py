"""Runs of the tiny models over a store of their own, in this process or killable in one of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import psutil
import pytest
from standins.waiting import wait_for

from nanochat.stages import resolve
from nanochat.store import open_store
from nanochat.store.leases import read_lease, utc_now
from nanochat.training.job import TrainingJob

# A run in a process of its own: Dagster sets logging up anew for each, which several threads of one
# process do not survive. Its leases end soon after it is killed.
ORCHESTRATOR = """
import json, sys
import dagster as dg
from dagster_nanochat import holding, stage_attempt
from standins.runs import execute
holding.HELD_TTL_S, stage_attempt.WATCH_GRACE_S = 3.0, float(sys.argv[2])
execute(dg.DagsterInstance.get(), **json.loads(sys.argv[1]))
"""


def execute(
    instance: dg.DagsterInstance, run_id: str, asset: str, tags: dict[str, str], config: dict[str, Any]
) -> None:
    from dagster_nanochat.definitions import defs

    dg.Definitions(
        assets=defs().assets,
        resources=defs().resources,
        jobs=[dg.define_asset_job("one", selection=[asset])],
        executor=dg.in_process_executor,
    ).resolve_job_def("one").execute_in_process(
        instance=instance,
        run_id=run_id,
        tags=tags,
        run_config={"ops": {asset: {"config": config}}} if config else None,
        raise_on_error=False,
    )


class Run:
    """A run of one asset for one model, in a thread or in a process of its own."""

    def __init__(
        self,
        instance: dg.DagsterInstance,
        *,
        in_process: bool = False,
        watch_grace_s: float = 120.0,
        **how: Any,
    ) -> None:
        self.id = str(uuid.uuid4())
        self._instance = instance
        how["run_id"] = self.id
        self.process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        if in_process:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", ORCHESTRATOR, json.dumps(how), str(watch_grace_s)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stderr=subprocess.DEVNULL,
            )
        else:
            self._thread = threading.Thread(target=execute, args=(instance,), kwargs=how, daemon=True)
            self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive() if self._thread else self.process.poll() is None

    def said(self, text: str) -> bool:
        records = self._instance.all_logs(self.id)
        told = (record.user_message or (record.dagster_event or record).message for record in records)
        return any(text in (words or "") for words in told)

    def cancel(self) -> None:
        run = self._instance.get_run_by_id(self.id)
        if run is not None and not run.is_finished:
            self._instance.report_run_canceling(run)

    def end(self, *, within_s: float = 60.0) -> Run:
        wait_for(lambda: not self.running, within_s=within_s)
        return self

    @property
    def status(self) -> dg.DagsterRunStatus:
        return self._instance.get_run_by_id(self.id).status

    @property
    def succeeded(self) -> bool:
        return self.status is dg.DagsterRunStatus.SUCCESS

    @property
    def materialization(self) -> dg.AssetMaterialization:
        (event,) = (event for event in self._events() if event.is_step_materialization)
        return event.materialization

    @property
    def reused(self) -> bool:
        return self.materialization.metadata["reused"].value

    def observations(self, asset: str, *, of_this_run: bool = False) -> list[dg.AssetObservation]:
        """What was observed of an asset by all runs of this history, or by this one, the oldest first."""
        records = self._instance.fetch_observations(dg.AssetKey(asset), limit=100).records
        return [
            record.asset_observation
            for record in reversed(records)
            if not of_this_run or record.event_log_entry.run_id == self.id
        ]

    @property
    def reason(self) -> str:
        """Why it failed."""
        (event,) = (event for event in self._events() if event.is_step_failure)
        return event.step_failure_data.user_failure_data.description

    def _events(self) -> list[dg.DagsterEvent]:
        records = self._instance.all_logs(self.id)
        return [record.dagster_event for record in records if record.dagster_event]


@contextlib.contextmanager
def ready_project(store_url: str, home: Path, environment: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A store with the tiny models' shards and tokenizer, and a Dagster history."""
    from dagster_nanochat.definitions import defs

    environment.setenv("NANOCHAT_STORE", store_url)
    with dg.instance_for_test(temp_dir=str(home)) as instance:
        environment.setenv("DAGSTER_HOME", str(home))
        ingested = (
            defs()
            .resolve_job_def("ingest_shards")
            .execute_in_process(
                instance=instance,
                tags={
                    "dagster/asset_partition_range_start": "tinytext_part_0",
                    "dagster/asset_partition_range_end": "tinytext_part_1",
                },
            )
        )
        assert ingested.success
        tags = {"dagster/partition": "tiny"}
        for asset in ("validation_files", "tokenizer_training"):
            assert Run(instance, asset=asset, tags=tags, config={}).end(within_s=300).succeeded
        yield SimpleNamespace(instance=instance, store=open_store())


def state_of(project: SimpleNamespace, model: str, stage: str = "base") -> Any:
    from dagster_nanochat.partitions import recipe_book

    return resolve(recipe_book()[model], project.store)[stage]


def jobs_of(project: SimpleNamespace, model: str) -> list[TrainingJob]:
    prefix = state_of(project, model).prefix
    keys = [info.key for info in project.store.list(f"{prefix}/attempts/") if info.key.endswith("/job.json")]
    return [TrainingJob.read(project.store, key) for key in keys]


def supervisor_of(project: SimpleNamespace, model: str) -> psutil.Process:
    """The supervisor that has the stage's lease, once training is under way below it."""

    def found() -> psutil.Process | None:
        lease = read_lease(project.store, f"{state_of(project, model).prefix}/lease.json")
        if lease is None or lease.owner != "supervisor" or not lease.live(utc_now()):
            return None
        try:
            process = psutil.Process(lease.pid)
            return process if len(process.children(recursive=True)) >= 2 else None
        except psutil.NoSuchProcess:  # one that was killed, whose lease has not run out yet
            return None

    return wait_for(found)
