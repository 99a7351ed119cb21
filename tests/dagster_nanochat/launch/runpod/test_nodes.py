"""Several nodes, which no stage can be trained on yet."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from dagster_nanochat.launch.base import Request
from dagster_nanochat.launch.runpod.config import resolve_settings
from dagster_nanochat.launch.runpod.launcher import PATIENCE, RunPodLauncher
from nanochat.failures import AttemptFailed, Failure


def test_a_stage_that_asks_for_several_nodes_is_refused_before_runpod_is_asked(
    client_of: Callable[..., Any],
) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(500)

    launcher = RunPodLauncher(
        SimpleNamespace(url="s3://bucket"),  # type: ignore[arg-type]
        client_of(answer),
        resolve_settings(hardware=None, environment={"NANOCHAT_RUNPOD_NODES": "2"}, run=None),
        image="registry.example/x@sha256:0",
        patience=PATIENCE,
    )
    with pytest.raises(AttemptFailed, match="NANOCHAT_RUNPOD_NODES=2: this version trains") as refused:
        launcher.offers(Request(gpus=8, min_gpu_memory_gib=80))
    assert refused.value.failure is Failure.BAD_REQUEST
    assert asked == []
