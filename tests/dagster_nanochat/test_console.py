"""What a run tells at a terminal, and what it tells where there is none. The terminal is a real one."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

# A job as `nanochat quickstart` runs one: half done, told something else, done.
JOB = """
import time
import dagster as dg
from dagster_nanochat.console import progress_logger, progress_told

@dg.op
def train(context):
    with progress_told(context, "tokenizer", "merges") as tell:
        tell(0, 65_280)
        tell(32_640, 65_280)
        time.sleep(0.5)
        context.log.info("[b]another[/b] line")
        tell(65_280, 65_280)

@dg.job(logger_defs={"progress": progress_logger, "console": dg.colored_console_logger})
def job():
    train()

if __name__ == "__main__":
    import sys
    job.execute_in_process(run_config={"loggers": {sys.argv[1]: {}}})
"""

LINES = ["[b]another[/b] line", "tokenizer: 65,280 of 65,280 merges"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    return [sys.executable, str(script)]


def at_a_terminal(command: list[str]) -> str:
    """All that the command wrote to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                chunk = os.read(ours, 65_536)
            except OSError:  # how Linux says that the other end is closed
                chunk = b""
            if not chunk:
                break
            written += chunk
    os.close(ours)
    assert process.returncode == 0
    return written.decode()


def texts(lines: list[str]) -> list[str]:
    """Lines of the progress logger without their times."""
    return [line.split("] ", 1)[1] for line in lines if re.match(r"\[ *\d+:\d\d\] ", line)]


def test_a_terminal_gets_a_bar_and_whole_lines_above_it(command: list[str]) -> None:
    written = at_a_terminal([*command, "progress"])
    assert "\u2501" in written
    assert "32640/65280" in written
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n")
    assert texts(drawn.split("\n")) == LINES


def test_a_pipe_gets_lines(command: list[str]) -> None:
    run = subprocess.run([*command, "progress"], capture_output=True, text=True, check=True)
    assert "\x1b" not in run.stdout
    assert texts(run.stdout.splitlines()) == LINES


def test_a_run_that_logs_elsewhere_draws_nothing_on_the_terminal(command: list[str]) -> None:
    assert "\u2501" not in at_a_terminal([*command, "console"])
