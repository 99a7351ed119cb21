"""The image of serverless workers for real: built by the script, pushed, pinned, and asked by a job.

Writes some 20 GB and takes minutes, so it runs by `make test-serverless-image` alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from emulators.runpod import Image, find_spec, serve
from emulators.runpod.client import Api, Jobs
from standins import containers
from standins.registry import running_registry
from standins.trained_model import bake

from nanochat.store import ObjectStore
from nanochat.store.receipts import current_receipt

REASON = containers.missing()
if os.environ.get("TEST_IMAGE") != "1":
    REASON = "builds an image of 6 GB: `make test-serverless-image` runs it"
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]
MODEL = "of-the-image-test"


@pytest.fixture
def checkpoint(module_chat_store: ObjectStore) -> Path:
    """`checkpoint/<MODEL>/` of this checkout, while the test lasts."""
    folder = ROOT / "checkpoint" / MODEL
    shutil.rmtree(folder, ignore_errors=True)
    bake(module_chat_store, folder)
    yield folder
    shutil.rmtree(folder)


def test_the_image_is_built_pushed_pinned_and_answers_a_job(
    module_chat_store: ObjectStore, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_nanochat.launch.registry import resolve_image

    assert find_spec() is not None, "no OpenAPI file of RunPod (set NANOCHAT_RUNPOD_SPEC)"
    receipt = current_receipt(module_chat_store, "quick", "sft")
    assert receipt is not None
    with containers.workbench() as bench, running_registry(bench.folder / "registry") as registry:
        monkeypatch.setenv("DOCKER_CONFIG", str(bench.folder))
        name = f"{registry.address}/team/serverless:test"
        started = time.monotonic()
        made = subprocess.run(
            [str(ROOT / "build_and_push_serverless.sh"), name, MODEL],
            env={
                **bench.environment,
                "BUILDER": "buildah",
                "BASE_IMAGE": containers.BASE,
                "BUILD_FLAGS": f"--jobs 2 --build-arg RUST_IMAGE={containers.BASE}",
                "PUSH_FLAGS": "--disable-compression --tls-verify=false",
            },
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
        print(f"built and pushed in {time.monotonic() - started:.0f} s")

        image = resolve_image(name)
        assert made.stdout.splitlines()[-1] == image.reference
        labels = bench.inspect(name)["Labels"]
        assert labels["nanochat.receipt_sha256"] == receipt.digest()
        assert labels["nanochat.fingerprint"] == receipt.fingerprint
        assert (labels["nanochat.model"], labels["nanochat.stage"]) == ("quick", "sft")

        for variable in ("BUILDAH_ISOLATION", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF", "TMPDIR"):
            monkeypatch.setenv(variable, bench.environment[variable])
        with serve(state_dir=tmp_path / "runpod", images={"*": Image(buildah=name)}) as emulator:
            endpoint = Api(emulator).create_endpoint(
                image=image.reference, env={"NANOCHAT_RECEIPT_SHA256": receipt.digest()}
            )
            began = time.monotonic()
            answer = Jobs(Api(emulator), endpoint).run_sync(
                {"question": "What is your name?", "temperature": 0}
            )
            logs = "\n".join(line for worker in emulator.workers() for line in emulator.logs(worker.id))
            assert answer["status"] == "COMPLETED", f"{answer}\n{logs}"
            (said,) = answer["output"]
            assert (said["text"], said["receipt_sha256"]) == ("I am NanoChat 😀.", receipt.digest())
            print(f"answered from no worker in {time.monotonic() - began:.1f} s")
        assert emulator.violations == []
