"""The commands, as a user gives them, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from standins.checkout import make_checkout

from nanochat.store import FileStore
from nanochat.store.receipts import current_receipt

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def project(tmp_path_factory, module_environment) -> SimpleNamespace:
    """A store, a history, and `run(command…, setting…)` in the repository with both in the environment."""
    root = tmp_path_factory.mktemp("project").resolve()
    environment = {
        **os.environ,
        **make_checkout(root),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }

    def start(*command: str, **how: Any) -> subprocess.Popen[str]:
        program = [str(BIN / command[0]), *command[1:]]
        return subprocess.Popen(program, cwd=root, env=environment, text=True, **how)

    def run(*command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            cwd=root,
            env={**environment, **settings},
            capture_output=True,
            text=True,
            timeout=280,
        )

    return SimpleNamespace(root=root, run=run, start=start, home=root / ".dagster")


@pytest.fixture(scope="module")
def first(project: SimpleNamespace) -> subprocess.CompletedProcess[str]:
    return project.run("nanochat", "quickstart", "--model", "tiny", "--question", "Who are you?")


def test_quickstart_ends_with_the_stages_and_the_answer(
    first: subprocess.CompletedProcess[str],
) -> None:
    assert first.returncode == 0, first.stdout + first.stderr
    lines = first.stdout.strip().splitlines()
    assert lines[-1].startswith("answer: ")
    assert [line.split(":")[0] for line in lines[-5:-1]] == ["tokenizer", "base", "midtrain", "sft"]
    for line in lines[-5:-1]:
        assert " built in " in line
        assert line.endswith(" s")
    assert any(line.startswith("report: ") for line in lines)
    assert "base step 12/12  loss " in first.stdout
    assert "tok/s  ETA" in first.stdout
    assert "val_bpb" in first.stdout
    assert first.stderr == ""


def test_a_second_quickstart_says_stage_by_stage_that_it_is_fresh(
    project: SimpleNamespace, first: subprocess.CompletedProcess[str]
) -> None:
    second = project.run("nanochat", "quickstart", "--model", "tiny")
    assert second.returncode == 0, second.stdout + second.stderr
    lines = second.stdout.strip().splitlines()
    for line, stage in zip(lines[-5:-1], ("tokenizer", "base", "midtrain", "sft"), strict=True):
        assert line.startswith(f"{stage}: fresh (receipt ")
    assert "launched" not in second.stdout


def test_a_quickstart_that_a_script_has_in_the_background_can_be_interrupted(
    project: SimpleNamespace, first: subprocess.CompletedProcess[str]
) -> None:
    process = project.start(
        *("nanochat", "quickstart", "--model", "slow"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # As a shell without job control starts what is behind `&`.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert any("base step " in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=45)
    assert process.returncode == 1
    assert said.splitlines()[-1] == (
        "interrupted at base_model_checkpoint; the same command goes on from the last checkpoint"
    )


def test_quickstart_of_a_model_without_a_chat_stage_ends_well(
    project: SimpleNamespace, first: subprocess.CompletedProcess[str]
) -> None:
    result = project.run("nanochat", "quickstart", "--model", "twin")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.strip().splitlines()
    assert lines[-3:] == [
        "midtrain: switched off",
        "sft: switched off",
        "answer: (none: the model has no stage to chat with)",
    ]


def test_status_shows_each_stage_with_its_receipt(
    project: SimpleNamespace, first: subprocess.CompletedProcess[str]
) -> None:
    status = json.loads(project.run("nanochat", "status", "--model", "tiny", "--json").stdout)
    assert [row["stage"] for row in status["stages"]] == [
        "tokenizer",
        "base",
        "midtrain_data",
        "midtrain",
        "sft_data",
        "sft",
    ]
    for row in status["stages"]:
        assert (row["status"], row["dollars"]) == ("fresh", 0.0)
        assert len(row["fingerprint"]) == len(row["receipt"]) == 64
    table = project.run("nanochat", "status", "--model", "tiny").stdout
    assert table.count("fresh") == 6


def test_plan_says_what_a_larger_model_takes_and_needs(project: SimpleNamespace) -> None:
    plan = json.loads(project.run("nanochat", "plan", "--model", "d20", "--json").stdout)
    assert plan["parameters"] == 560_988_160
    assert plan["shards_needed"] == 241
    assert "shard_00000…shard_00239" in plan["shards_missing"]
    base = next(stage for stage in plan["stages"] if stage["stage"] == "base")
    assert (base["status"], base["fingerprint"], base["steps"]) == ("missing", None, 21_400)
    assert base["tokens"] == 21_400 * 524_288
    assert base["flops"] == base["tokens"] * plan["flops_per_token"]
    assert base["hours"] > 1000
    for field in ("memory_bytes", "disk_bytes"):
        assert base[field] > 0
    shown = project.run("nanochat", "plan", "--model", "d20").stdout
    assert "560,988,160 parameters" in shown


def test_an_unknown_model_is_refused_by_name(project: SimpleNamespace) -> None:
    for command in (("plan",), ("status",), ("quickstart",), ("chat", "Hi")):
        result = project.run("nanochat", command[0], "--model", "d99", *command[1:])
        assert result.returncode == 1
        assert "unknown model 'd99'" in result.stderr
        assert result.stdout == ""


def test_chat_prints_one_answer_and_nothing_else(
    project: SimpleNamespace, first: subprocess.CompletedProcess[str]
) -> None:
    answers = [project.run("nanochat", "chat", "--model", "tiny", "Who are you?") for _ in range(2)]
    for result in answers:
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.strip()
    assert answers[0].stdout == answers[1].stdout, "greedy answers are the same every time"
    result = project.run(
        "nanochat", "chat", "--model", "tiny", "--source", "base", "--max-tokens", "4", "The"
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_a_forced_stage_gets_a_new_receipt_and_the_others_keep_theirs(
    project: SimpleNamespace, first: subprocess.CompletedProcess[str]
) -> None:
    store = FileStore(project.root / "data" / "store")
    stages = ("tokenizer", "base", "midtrain", "sft")
    before = {stage: current_receipt(store, "tiny", stage) for stage in stages}
    forced = project.run("nanochat", "quickstart", "--model", "tiny", "--force", "--stages", " sft, ")
    assert forced.returncode == 0, forced.stdout + forced.stderr
    after = {stage: current_receipt(store, "tiny", stage) for stage in stages}
    assert [stage for stage in stages if before[stage] != after[stage]] == ["sft"]
    assert after["sft"].fingerprint == before["sft"].fingerprint


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ("--force", "--stages", "base,stf"),
            "--stages: no stage is called 'stf'; there are tokenizer, base",
        ),
        (("--force", "--stages", ","), "--stages names no stage"),
        (("--stages", "sft"), "--stages sft says what --force rebuilds: give --force too"),
        (("--model", "twin", "--force", "--stages", "sft"), "sft is switched off in the recipe of twin"),
    ],
)
def test_stages_that_force_nothing_are_refused(
    project: SimpleNamespace, options: tuple[str, ...], reason: str
) -> None:
    result = project.run("nanochat", "quickstart", "--model", "tiny", *options)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert reason in result.stderr


@pytest.mark.parametrize("command", ["plan", "status", "quickstart"])
def test_a_store_that_is_no_use_is_told_in_one_line(
    project: SimpleNamespace, command: str, tmp_path: Path
) -> None:
    result = project.run("nanochat", command, "--model", "tiny", NANOCHAT_STORE="gs://bucket/x")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: NANOCHAT_STORE='gs://bucket/x': ")
    damaged = FileStore(tmp_path / "store")
    damaged.put("models/tiny/base.json", b"{")
    result = project.run("nanochat", command, "--model", "tiny", NANOCHAT_STORE=str(damaged.root))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: models/tiny/base.json is not JSON")
    assert len(result.stderr.splitlines()) == 1


def test_a_store_that_cannot_be_written_is_told_by_quickstart(project: SimpleNamespace) -> None:
    result = project.run("nanochat", "quickstart", "--model", "tiny", NANOCHAT_STORE="/proc/store")
    assert result.returncode == 1
    assert "/proc/store" in result.stderr
    assert "point NANOCHAT_STORE at another place" in result.stderr
    assert "Traceback" not in result.stderr


def test_dg_launch_and_dagster_materialize_share_one_history(
    project: SimpleNamespace, first: subprocess.CompletedProcess[str]
) -> None:
    launched = project.run("dg", "launch", "--assets", "validation_files", "--partition", "tiny")
    assert launched.returncode == 0, launched.stderr
    materialized = project.run(
        "dagster",
        "asset",
        "materialize",
        "-m",
        "dagster_nanochat.definitions",
        "--select",
        "validation_files",
        "--partition",
        "tiny",
    )
    assert materialized.returncode == 0, materialized.stderr
    spared = project.run(
        *("dagster", "asset", "materialize", "--select", "model_report", "--partition", "tiny"),
        DAGSTER_MODULE_NAME="dagster_nanochat.definitions",
    )
    assert spared.returncode == 0, spared.stderr
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        runs = instance.get_runs()
        assert len(runs) >= 5
        events = instance.fetch_materializations(dg.AssetKey("validation_files"), limit=10).records
        assert len(events) >= 3


def test_the_guard_refuses_a_large_model_with_hours_and_remedy(project: SimpleNamespace) -> None:
    result = project.run("dg", "launch", "--assets", "base_model_checkpoint", "--partition", "d32")
    assert result.returncode != 0
    assert "hours on this machine" in result.stderr
    assert "above the cap of 1 h" in result.stderr
    assert "nanochat/max_hours" in result.stderr


def test_a_missing_partition_is_refused_by_name(project: SimpleNamespace) -> None:
    result = project.run("dg", "launch", "--job", "model_training")
    assert result.returncode != 0
    assert "launch it with a partition, e.g. `--partition quick`" in result.stderr


def test_missing_shards_are_named_with_the_command_that_gets_them(project: SimpleNamespace) -> None:
    result = project.run("dg", "launch", "--assets", "tokenizer_training", "--partition", "d4")
    assert result.returncode != 0
    assert "shard_00000…shard_00007" in result.stderr
    assert "dg launch --job ingest_shards --partition-range shard_00000...shard_00007" in result.stderr
