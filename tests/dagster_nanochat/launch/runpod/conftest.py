"""Clients of RunPod that a test answers, RunPod's specification, and an account at its emulator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from emulators.runpod import Emulator
from standins.runpod_account import audited_account, bucket_project
from standins.runpod_api import CANARY, Clock, Specification

from dagster_nanochat.launch.runpod.client import RunPodClient

SPECIFICATION_ENV = "NANOCHAT_RUNPOD_SPEC"
REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="session")
def specification() -> Specification:
    """Skips, saying why, where the file is not (it is RunPod's, and not part of the repository)."""
    beside = REPOSITORY.parent / "shared" / "reference" / "runpod-rest-v2-openapi.json"
    path = Path(os.environ.get(SPECIFICATION_ENV) or beside)
    if not path.is_file():
        pytest.skip(f"RunPod's specification is not at {path} (set {SPECIFICATION_ENV})")
    return Specification(path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client_of(clock: Clock) -> Callable[..., RunPodClient]:
    """A client that a function answers: ``client_of(lambda request: httpx.Response(204))``."""

    def make(handler: Callable[[httpx.Request], httpx.Response], **options: Any) -> RunPodClient:
        transport = httpx.MockTransport(handler)
        return RunPodClient(CANARY, transport=transport, sleep=clock.sleep, clock=clock, **options)

    return make


@pytest.fixture(scope="module")
def project(tmp_path_factory, module_environment) -> Iterator[SimpleNamespace]:
    """See `bucket_project`."""
    with bucket_project(tmp_path_factory, module_environment) as made:
        yield made


@pytest.fixture
def runpod(project: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """See `audited_account`."""
    with audited_account(project, tmp_path, monkeypatch) as emulator:
        yield emulator
