"""What a model becomes does not depend on where it was trained: on one machine or on pods that were lost."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import dagster as dg
import pytest
from emulators.runpod import Emulator, find_spec
from standins import s3
from standins.runs import Run, state_of
from standins.waiting import wait_for

from nanochat.attempts import attempts, read_events

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(s3.program() is None, reason="versitygw, the S3 server of tests, is not installed"),
    pytest.mark.skipif(find_spec() is None, reason="RunPod's OpenAPI file is not there"),
]
MODEL = "killed"
STEPS = 1000


@pytest.fixture(scope="module")
def whole(project: SimpleNamespace, module_environment) -> dict[int, tuple[float, float]]:
    """The steps of a training on this machine that nothing interrupts."""
    module_environment.setenv("NANOCHAT_LAUNCHER", "local")
    training = Run(project.instance, asset="base_model_checkpoint", tags=tags(), config={})
    assert training.end(within_s=120).succeeded, training.reason
    module_environment.delenv("NANOCHAT_LAUNCHER")
    return steps(project, project_attempts(project)[-1])


def tags() -> dict[str, str]:
    return {"dagster/partition": MODEL}


def project_attempts(project: SimpleNamespace) -> list[str]:
    return attempts(project.store, state_of(project, MODEL).prefix)


def steps(project: SimpleNamespace, token: str) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, as an attempt has told them."""
    told = read_events(project.store, state_of(project, MODEL).prefix, token)
    return {one["step"]: (one["loss"], one["grad_norm"]) for one in told if one["type"] == "step"}


def checkpoint_after(project: SimpleNamespace, token: str, step: int) -> bool:
    told = read_events(project.store, state_of(project, MODEL).prefix, token)
    return any(one["type"] == "checkpoint" and one["step"] >= step for one in told)


def test_a_training_that_loses_three_pods_ends_with_the_losses_of_one_that_lost_none(
    project: SimpleNamespace,
    runpod: Emulator,
    run: Callable[..., Run],
    whole: dict[int, tuple[float, float]],
) -> None:
    before = len(project_attempts(project))
    training = run(MODEL, force=True)
    for number, (until, fault) in enumerate([(100, "vanishes"), (300, "dies"), (600, "vanishes")]):
        wait_for(
            lambda number=number, until=until: (
                len(runpod.pods()) == number + 1
                and len(project_attempts(project)) == before + number + 1
                and checkpoint_after(project, project_attempts(project)[-1], until)
            ),
            within_s=120,
        )
        *_, pod = runpod.pods()
        runpod.faults.add("no_capacity", gpu=pod.gpu, times=None)
        runpod.faults.add(fault, pod=pod.id)
    assert training.end(within_s=150).succeeded, training.reason
    assert len({pod.gpu for pod in runpod.pods()}) == 4
    interrupted: dict[int, tuple[float, float]] = {}
    for token in project_attempts(project)[before:]:
        interrupted |= steps(project, token)
    # What a machine has not told when it is lost, nobody tells.
    assert interrupted.items() <= whole.items()
    assert len(interrupted) > 0.9 * STEPS
    assert interrupted[STEPS] == whole[STEPS]


def test_a_training_that_goes_on_with_another_number_of_gpus_sees_the_same_data(
    project: SimpleNamespace,
    runpod: Emulator,
    run: Callable[..., Run],
    whole: dict[int, tuple[float, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run(MODEL, force=True)
    before = len(project_attempts(project))
    wait_for(
        lambda: (
            len(project_attempts(project)) > before - 1
            and runpod.pods()
            and checkpoint_after(project, project_attempts(project)[-1], 200)
        ),
        within_s=120,
    )
    first.cancel()
    assert first.end(within_s=30).status is dg.DagsterRunStatus.CANCELED
    monkeypatch.setenv("NANOCHAT_RUNPOD_GPU_COUNT", "2")
    second = run(MODEL, force=True)
    assert second.end(within_s=150).succeeded, second.reason
    told = second.observations("base_model_checkpoint", of_this_run=True)
    assert [one.metadata["offer"].value[:3] for one in told if "offer" in one.metadata] == ["2 x"]
    resumed = steps(project, project_attempts(project)[-1])
    assert min(resumed) > 200
    for step in list(resumed)[:20]:
        assert resumed[step] == pytest.approx(whole[step], abs=1e-4), step
    # Sums in another order drift apart; what is learned does not.
    last = range(STEPS - 49, STEPS + 1)
    differences = [resumed[step][0] - whole[step][0] for step in last]
    assert abs(sum(differences) / len(last)) < 0.01
