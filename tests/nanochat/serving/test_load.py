"""The short form of `make load`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "serving_load.py"


@pytest.mark.timeout(300)
def test_many_clients_at_once_get_what_is_promised_until_the_server_has_ended() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--seconds", "6", "--clients", "16"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert done.returncode == 0
    assert report["statuses"].keys() <= {"200", "429", "503"}
    assert report["statuses"]["200"] > 0
    assert report["statuses"]["503"] > 0  # those of the end, at least
    assert report["accepted"] >= report["statuses"]["200"] + report["left_in_a_stream"]
