"""An account at an emulated RunPod whose pods train on this machine: what the launcher is told of it, and
a project in a bucket to train with."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from emulators.runpod import Emulator, Image, serve
from standins import nvidia_smi, s3
from standins.runs import ready_project

from nanochat.store.ledger import entries

# Of every machine, whatever is rented of it.
GPUS = 2
IMAGE = "registry.example/nanochat-training@sha256:" + "ab" * 32


@contextlib.contextmanager
def account(
    folder: Path, environment: pytest.MonkeyPatch, *, silent_s: float, network: Any = None
) -> Iterator[Emulator]:
    """Its secrets are those of the environment's S3 server. silent_s: how long a pod may be silent. network:
    see `emulators.runpod.serve`."""
    from dagster_nanochat.launch.base import Patience
    from dagster_nanochat.launch.runpod import launcher

    smi = nvidia_smi.write(folder / "bin", count=GPUS)
    programs = [str(smi), str(Path(sys.executable).parent), os.environ["PATH"]]
    image = Image(environment={"PATH": os.pathsep.join(programs)})
    with serve(state_dir=folder / "runpod", images={"*": image}, network=network) as emulator:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            emulator.set_secret(name, os.environ[name])
        environment.setenv("NANOCHAT_LAUNCHER", "runpod")
        environment.setenv("RUNPOD_API_URL", emulator.url)
        environment.setenv("RUNPOD_API_KEY", emulator.api_key)
        environment.setattr(launcher, "_LOOK_EVERY_S", 1.0)
        environment.setattr(launcher, "_LIST_EVERY_S", 0.2)
        patience = Patience(ready_s=60.0, silent_s=silent_s, capacity_s=30.0)
        environment.setattr(launcher, "PATIENCE", patience)
        yield emulator


@contextlib.contextmanager
def bucket_project(
    folders: pytest.TempPathFactory, environment: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    """A bucket with the tiny models' shards and tokenizer, and a Dagster history; RunPod's image is set.

    `folders` of it: where all of it is written.
    """
    root, home = folders.mktemp("project").resolve(), folders.mktemp("dagster")
    environment.setattr("dagster_nanochat.views.project_root", lambda: root)
    environment.setenv("NANOCHAT_CACHE", str(root / "cache"))
    with s3.serve(root / "s3") as server:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        environment.setenv("NANOCHAT_RUNPOD_IMAGE_NAME", IMAGE)
        with ready_project(f"s3://{s3.BUCKET}/models", home, environment) as made:
            made.folders = (root / "s3", home)
            yield made


@contextlib.contextmanager
def audited_account(
    project: SimpleNamespace, folder: Path, environment: pytest.MonkeyPatch
) -> Iterator[Emulator]:
    """An account; at the end nothing of it runs, and all it charged is in the project's ledger."""
    before = {entry.token for entry in entries(project.store)}
    with account(folder, environment, silent_s=20.0) as emulator:
        yield emulator
        assert emulator.violations == []
        assert [pod.id for pod in emulator.pods() if pod.deleted_at is None] == []
        charged = sum(pod.charged_usd for pod in emulator.pods() if "NANOCHAT_JOB" in pod.env)
        accounted = sum(entry.dollars() for entry in entries(project.store) if entry.token not in before)
        assert accounted >= charged
