"""`make emulator`: what it prints, that it serves, and that nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import httpx
import psutil
import pytest
from standins import s3
from standins.signals import listen_to_ctrl_c
from standins.waiting import wait_for

_TESTS = Path(__file__).parents[1]
_NAMES = [
    "RUNPOD_API_URL",
    "RUNPOD_API_KEY",
    "NANOCHAT_STORE",
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
]


def test_make_emulator_runs_the_module():
    lines = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "emulator"],
        cwd=_TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert lines[-1].split()[-2:] == ["-m", "emulators.runpod"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_prints_what_to_export_serves_and_leaves_nothing_behind(tmp_path: Path, number: signal.Signals):
    if s3.program() is None:
        pytest.skip("versitygw is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_TESTS), *sys.path]),
        "TMPDIR": str(tmp_path),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "emulators.runpod"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=listen_to_ctrl_c,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            printed = [process.stdout.readline().strip() for _ in _NAMES]
            exports = dict(line.removeprefix("export ").split("=", 1) for line in printed)
            assert list(exports) == _NAMES
            told = iter(process.stderr.readline, "")
            control = next(line for line in told if line.startswith("Control")).split()[1]
            for variable in ("NANOCHAT_TRAINING_IMAGE", "NANOCHAT_SERVERLESS_IMAGE"):
                image = next(line for line in told if line.startswith(f"export {variable}="))
                host, _, name = image.strip().partition("=")[2].partition("/")
                assert httpx.get(
                    f"http://{host}/v2/{name.replace(':', '/manifests/')}", trust_env=False
                ).is_success
            bucket = boto3.client(
                "s3",
                endpoint_url=exports["AWS_ENDPOINT_URL"],
                aws_access_key_id=exports["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=exports["AWS_SECRET_ACCESS_KEY"],
                region_name="us-east-1",
            )
            bucket.put_object(Bucket=exports["NANOCHAT_STORE"].removeprefix("s3://"), Key="k", Body=b"1")
            answer = httpx.post(
                f"{exports['RUNPOD_API_URL']}/pods",
                headers={"Authorization": f"Bearer {exports['RUNPOD_API_KEY']}"},
                json={
                    "name": "a",
                    "image": "img",
                    "gpu": {"id": "NVIDIA L40S"},
                    "args": '{"entrypoint": ["sleep", "600"]}',
                },
                trust_env=False,
            )
            assert answer.status_code == 201, answer.text
            wait_for(
                lambda: httpx.get(f"{control}/pods", trust_env=False).json()[0]["living_process_ids"],
                within_s=10,
            )
            family = psutil.Process(process.pid).children(recursive=True)
            assert {"versitygw", "sleep"} <= {member.name() for member in family}
            process.send_signal(number)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()  # else what fails here would wait for it
    assert [member for member in family if member.is_running()] == []
    assert list(tmp_path.iterdir()) == []
