"""What doctor says of a machine that lacks something, with the next step."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from emulators.runpod import serve
from standins import plain_s3, s3

from dagster_nanochat.doctor import Finding, Verdict, examine, print_doctor
from nanochat.store import FileStore, S3Store


def finding(what: str) -> Finding:
    return next(found for found in examine() if found.what == what)


@pytest.fixture(autouse=True)
def healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").touch()
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NANOCHAT_STORE", str(tmp_path / "store"))


def test_a_machine_in_order_passes_and_the_store_is_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_doctor() == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"ok       store: {(tmp_path / 'store').as_uri()} can be written and read" in lines
    assert "ok       store's conditional puts: kept, so no stage has two builders" in lines
    assert list(FileStore(tmp_path / "store").list("")) == []


@pytest.mark.parametrize(
    ("variable", "value", "what", "verdict", "message"),
    [
        ("DAGSTER_HOME", "history", "Dagster's history", Verdict.FAILED, "is not absolute"),
        ("DAGSTER_HOME", "/proc", "Dagster's history", Verdict.WARNING, "has no dagster.yaml"),
        ("NANOCHAT_LAUNCHER", "moon", "launcher", Verdict.FAILED, "unknown launcher 'moon'"),
        ("NANOCHAT_THREADS", "many", "launcher", Verdict.FAILED, "NANOCHAT_THREADS='many' is not a number"),
        ("CXX", "no-such-compiler", "C++ compiler", Verdict.WARNING, "without torch.compile"),
        ("NANOCHAT_STORE", "ftp://x", "store", Verdict.FAILED, "ftp:// is no store that is known"),
        ("NANOCHAT_STORE", "/dev/null/store", "store", Verdict.FAILED, "Check that the folder is writable"),
    ],
)
def test_what_is_wrong_is_found(
    variable: str, value: str, what: str, verdict: Verdict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    found = finding(what)
    assert (found.verdict, message in found.found) == (verdict, True), found


def test_a_store_that_ignores_conditions_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with plain_s3.serve() as server:
        for name, value in {**server.environment, "NANOCHAT_STORE": f"s3://{plain_s3.BUCKET}/x"}.items():
            monkeypatch.setenv(name, value)
        found = finding("store's conditional puts")
    assert found.verdict is Verdict.WARNING
    assert "ignores If-None-Match" in found.found


@pytest.mark.skipif(s3.program() is None, reason="versitygw, the S3 server of tests, is not installed")
def test_a_bucket_is_tried_and_its_clock_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3.serve(tmp_path / "s3") as server:
        for name, value in {**server.environment, "NANOCHAT_STORE": f"s3://{s3.BUCKET}/probe"}.items():
            monkeypatch.setenv(name, value)
        assert finding("store's conditional puts").verdict is Verdict.OK
        assert finding("clock").verdict is Verdict.OK
        assert list(S3Store(s3.BUCKET).list("")) == []
        monkeypatch.setattr(S3Store, "clock_difference_s", lambda self: -300.0)
        assert finding("clock").found == "300 s behind the store's: set it (NTP)"


def test_the_images_of_rented_machines_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(state_dir=tmp_path / "runpod", images={}) as emulator:
        registry = urlsplit(emulator.registry_url).netloc
        emulator.registry.publish("worker", "latest")
        for name, value in {
            "NANOCHAT_LAUNCHER": "runpod",
            "RUNPOD_API_URL": emulator.url,
            "RUNPOD_API_KEY": emulator.api_key,
            "NANOCHAT_RUNPOD_IMAGE_NAME": "registry.example/training@sha256:" + "ab" * 32,
            "NANOCHAT_SERVERLESS_IMAGE": f"{registry}/worker:latest",
        }.items():
            monkeypatch.setenv(name, value)
        secrets, training, there, *_ = (
            found for found in examine() if "RunPod" in found.what or "image" in found.what
        )
        monkeypatch.setenv("NANOCHAT_SERVERLESS_IMAGE", f"{registry}/worker:other")
        missing = finding("serverless image")
        monkeypatch.setenv("NANOCHAT_SERVERLESS_IMAGE", registry + "/{model}:latest")
        each = finding("serverless image")
        monkeypatch.delenv("NANOCHAT_SERVERLESS_IMAGE")
        none = finding("serverless image")
    assert (secrets.verdict, training.found[-64:]) == (Verdict.FAILED, "ab" * 32)
    assert "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY missing: create them" in secrets.found
    assert (there.what, there.verdict) == ("serverless image", Verdict.OK)
    assert there.found.startswith(f"{registry}/worker@sha256:")
    assert (missing.verdict, "worker:other" in missing.found) == (Verdict.FAILED, True), missing
    assert (each.verdict, "each model's own" in each.found) == (Verdict.OK, True)
    assert (none.verdict, "so no endpoint is deployed" in none.found) == (Verdict.WARNING, True)
