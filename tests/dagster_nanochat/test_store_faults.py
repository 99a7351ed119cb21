"""Stages on a bucket that cannot be used, and on one without conditional puts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from standins import plain_s3
from standins.runs import Run, ready_project

from nanochat.stages import Status, resolve


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[plain_s3.PlainS3]:
    monkeypatch.setattr("dagster_nanochat.views.project_root", lambda: tmp_path)
    with plain_s3.serve() as service:
        settings = {
            "NANOCHAT_STORE": f"s3://{plain_s3.BUCKET}/models",
            "NANOCHAT_CACHE": str(tmp_path / "cache"),
        }
        for name, value in {**service.environment, **settings}.items():
            monkeypatch.setenv(name, value)
        yield service


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "access denied. The key needs s3:GetObject"),
        (404, "NoSuchBucket", "no such bucket. Create it"),
        (403, "RequestTimeTooSkewed", "this machine's clock is off"),
        (400, "ExpiredToken", "the session token has expired"),
    ],
)
def test_a_bucket_that_cannot_be_used_ends_a_stage_by_name_before_anything_is_asked_for(
    bucket: plain_s3.PlainS3, status: int, code: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_LAUNCHER", "runpod")
    monkeypatch.setenv("RUNPOD_API_KEY", "nobody's")
    monkeypatch.setenv("RUNPOD_API_URL", "http://127.0.0.1:9")  # asking there would fail by another name
    bucket.error = (status, code)
    with dg.instance_for_test() as instance:
        asset, tags = "base_model_checkpoint", {"dagster/partition": "tiny"}
        run = Run(instance, asset=asset, tags=tags, config={}).end(within_s=120)
        assert not run.succeeded
        assert run.reason.startswith("base of tiny: store s3://plain/models: cannot ")
        assert message in run.reason


def test_a_stage_on_a_bucket_without_conditional_puts_is_built_with_a_warning(
    bucket: plain_s3.PlainS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_nanochat.partitions import recipe_book

    (tmp_path / "dagster").mkdir()
    with ready_project(f"s3://{plain_s3.BUCKET}/models", tmp_path / "dagster", monkeypatch) as project:
        assert resolve(recipe_book()["tiny"], project.store)["tokenizer"].status is Status.FRESH
        (run, *_) = project.instance.get_runs()
        told = [record.user_message for record in project.instance.all_logs(run.run_id)]
        assert [words for words in told if "ignores If-None-Match: objects are read and compared" in words]
    assert not [key for key in bucket.objects if "/probe/" in key]
