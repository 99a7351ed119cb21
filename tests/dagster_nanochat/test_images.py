"""The asset of the training image: what it records for the launcher, and what it says where it cannot."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from standins.registry import MISSING, running_registry

from dagster_nanochat.defs.images.assets import nanochat_training_image
from dagster_nanochat.launch.images import BuildFailed, build_serverless_image, recorded_image
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.config import RunPodSettings
from dagster_nanochat.launch.runpod.launcher import PATIENCE, RunPodLauncher
from dagster_nanochat.resources import LauncherResource, StoreResource
from nanochat.failures import AttemptFailed
from nanochat.store import FileStore
from nanochat.store.documents import DocumentError

needs_registry = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


class RentedLauncher(LauncherResource):
    """Stands in for any launcher that runs images."""

    def create(self, store: object) -> object:
        return type("Rented", (), {"name": "rented"})()


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NANOCHAT_TRAINING_IMAGE", "NANOCHAT_LAUNCHER", "REGISTRY_AUTH_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


def materialize(
    store: FileStore, launcher: LauncherResource | None = None, image: str | None = None
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [nanochat_training_image],
        resources={"store": StoreResource(url=store.url), "launcher": launcher or LauncherResource()},
        run_config={"ops": {"nanochat_training_image": {"config": {"image": image}}}} if image else None,
        raise_on_error=False,
    )


def metadata(result: dg.ExecuteInProcessResult) -> dict[str, object]:
    (event,) = result.get_asset_materialization_events()
    return {name: value.value for name, value in event.materialization.metadata.items()}


def failure(result: dg.ExecuteInProcessResult) -> str:
    (event,) = (event for event in result.all_events if event.is_step_failure)
    return event.step_failure_data.user_failure_data.description


def test_the_local_launcher_needs_no_image(tmp_store: FileStore) -> None:
    result = materialize(tmp_store)
    assert result.success
    assert metadata(result) == {"needed": False}
    assert recorded_image(tmp_store, "training") is None


def test_a_launcher_that_rents_machines_needs_one_and_says_how_to_get_it(tmp_store: FileStore) -> None:
    result = materialize(tmp_store, RentedLauncher())
    assert not result.success
    assert "make images IMAGE=" in failure(result)
    assert "NANOCHAT_TRAINING_IMAGE" in failure(result)


@needs_registry
def test_an_image_is_recorded_by_its_digest_for_the_launcher(
    tmp_store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_registry(tmp_path / "registry") as registry:
        name = f"{registry.address}/team/nanochat"
        digest = registry.put_image("team/nanochat", "1")
        monkeypatch.setenv("NANOCHAT_TRAINING_IMAGE", f"{name}:1")
        result = materialize(tmp_store, RentedLauncher())
        assert result.success
        record = recorded_image(tmp_store, "training")
        assert record is not None
        assert (record.image, record.reference) == (f"{name}:1", f"{name}@{digest}")
        shown = metadata(result)
        assert (shown["reference"], shown["digest"]) == (record.reference, digest)
        assert shown["registry"] == registry.address
        assert shown["size_bytes"] == record.size_bytes > 0
        assert shown["created"] == "2026-01-02T03:04:05Z"
        (event,) = result.get_asset_materialization_events()
        assert event.materialization.tags["dagster/data_version"] == digest

        second = registry.put_image("team/nanochat", "2", layer=b"another")
        assert materialize(tmp_store, image=f"{name}:2").success
        record = recorded_image(tmp_store, "training")
        assert record is not None
        assert record.digest == second != digest


@needs_registry
def test_a_launch_pins_the_image_that_the_environment_names_where_none_is_recorded(
    tmp_store: FileStore, tmp_path: Path
) -> None:
    with running_registry(tmp_path / "registry") as registry, RunPodClient("key") as client:
        name = f"{registry.address}/team/nanochat"
        digest = registry.put_image("team/nanochat", "1")

        def launcher(image: str | None) -> RunPodLauncher:
            environment = {"NANOCHAT_TRAINING_IMAGE": image} if image else {}
            how = {"image": None, "patience": PATIENCE, "environment": environment}
            return RunPodLauncher(tmp_store, client, RunPodSettings(), **how)

        with pytest.raises(AttemptFailed, match="no training image is known: set NANOCHAT_TRAINING_IMAGE"):
            launcher(None).image()
        with pytest.raises(AttemptFailed, match=f"BAD_REQUEST: .*{name}:2 is not at its registry"):
            launcher(f"{name}:2").image()
        assert recorded_image(tmp_store, "training") is None
        assert launcher(f"{name}:1").next_image() == f"{name}@{digest}"
        assert recorded_image(tmp_store, "training") is None
        assert launcher(f"{name}:1").image() == f"{name}@{digest}"
        record = recorded_image(tmp_store, "training")
        assert record is not None
        assert record.digest == digest


@needs_registry
def test_an_image_that_is_not_there_fails_and_leaves_the_record_alone(
    tmp_store: FileStore, tmp_path: Path
) -> None:
    with running_registry(tmp_path / "registry") as registry:
        name = f"{registry.address}/team/nanochat"
        digest = registry.put_image("team/nanochat", "1")
        assert materialize(tmp_store, image=f"{name}:1").success
        result = materialize(tmp_store, image=f"{name}:2")
        assert f"{name}:2 is not at its registry" in failure(result)
    record = recorded_image(tmp_store, "training")
    assert record is not None
    assert record.digest == digest


def test_a_record_of_something_else_is_refused(tmp_store: FileStore) -> None:
    tmp_store.put("images/training.json", b'{"schema": "nanochat.receipt", "version": 1}')
    with pytest.raises(DocumentError, match=r"images/training.json is not a nanochat.image"):
        recorded_image(tmp_store, "training")


def test_a_build_that_fails_tells_what_the_script_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagster_nanochat.launch.images.project_root", lambda: tmp_path)
    script = tmp_path / "build_and_push_serverless.sh"
    script.write_text('#!/bin/sh\necho "$1 of $2" > asked\necho "There is no checkpoint/tiny" >&2\nexit 3\n')
    script.chmod(0o755)
    with pytest.raises(BuildFailed, match=r"ended with 3:\nThere is no checkpoint/tiny"):
        build_serverless_image("tiny", "r.example/n:1")
    assert (tmp_path / "asked").read_text() == "r.example/n:1 of tiny\n"
