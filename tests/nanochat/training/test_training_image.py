"""The training image for real: built, pushed, pinned by its digest, and trained in to a receipt.

Writes some 20 GB and takes minutes, so it runs by `make test-image` alone.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from standins import containers
from standins.registry import running_registry

from nanochat.events import EventStream
from nanochat.store.digests import digest_file
from nanochat.store.receipts import missing_outputs, read_receipt

if TYPE_CHECKING:
    from conftest import Workshop

REASON = containers.missing()
if os.environ.get("TEST_IMAGE") != "1":
    REASON = "builds an image of 6 GB: `make test-image` runs it"
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
FIRST_SIGN_WITHIN_S = 30


def test_the_image_is_built_pushed_pinned_and_trains_to_a_receipt(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_nanochat.launch.registry import resolve_image

    with containers.workbench() as bench, running_registry(bench.folder / "registry") as registry:
        monkeypatch.setenv("DOCKER_CONFIG", str(bench.folder))
        name = f"{registry.address}/team/nanochat"
        started = time.monotonic()
        made = subprocess.run(
            [
                *("make", "images", "BUILDER=buildah", f"IMAGE={name}:test", "PUSH=1"),
                f"BASE_IMAGE={containers.BASE}",
                f"BUILD_FLAGS=--jobs 2 --build-arg RUST_IMAGE={containers.BASE}",
                "PUSH_FLAGS=--disable-compression --tls-verify=false",
            ],
            cwd=ROOT,
            env=bench.environment,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
        print(f"built and pushed in {time.monotonic() - started:.0f} s")

        image = resolve_image(f"{name}:test")
        assert made.stdout.splitlines()[-1] == image.reference
        assert image.size_bytes > 1e9
        config = bench.inspect(f"{name}:test")
        assert config["Entrypoint"] == ["python", "-m", "nanochat.pod"]
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        assert config["Labels"]["org.opencontainers.image.revision"].rstrip("+") == revision.stdout.strip()

        recipe = dataclasses.replace(
            workshop.recipe,
            base=dataclasses.replace(workshop.recipe.base, steps=2, eval_every=2, checkpoint_every=2),
        )
        job = workshop.job("base", recipe=recipe, compile="on").model_copy(
            update={"store_url": "file:///store"}
        )
        key = f"{job.attempt_prefix}/job.json"
        workshop.store.put(key, job.to_bytes())
        settings = {"NANOCHAT_STORE": job.store_url, "NANOCHAT_JOB": key, "NANOCHAT_TOKEN": job.token}
        command = config["Entrypoint"]
        if importlib.util.find_spec("nanochat.pod") is None:
            command = ["python", "-m", "nanochat.supervisor", "--store", job.store_url, "--job", key]
        mounts = {workshop.folder / "store": "/store"}
        began = time.time()
        ran = bench.run(f"{name}:test", command, mounts=mounts, environment=settings)
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        print(f"trained in {time.time() - began:.0f} s")

    events = EventStream(workshop.store, f"{job.attempt_prefix}/events.jsonl").all()
    assert events[0]["type"] == "attempt_started"
    print(f"first sign of life after {events[0]['time'] - began:.1f} s")
    assert events[0]["time"] - began < FIRST_SIGN_WITHIN_S
    assert [event["step"] for event in events if event["type"] == "step"] == [1, 2]
    receipt = read_receipt(workshop.store, "base", job.fingerprint)
    assert receipt is not None
    assert missing_outputs(workshop.store, receipt) == []
    for file in receipt.outputs:
        assert digest_file(workshop.store.local_path(file.key)) == file.sha256
    assert receipt.warnings == (), "torch.compile found no compiler, or another fault"
