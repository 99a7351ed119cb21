"""What renting costs beside training: seconds around an attempt on a pod, and a checkpoint's way to S3.

    python benchmarks/launch.py attempt --rounds 3
    python benchmarks/launch.py checkpoint --rounds 1
    python benchmarks/launch.py transfer --megabytes 512 --rounds 3

Everything is on this machine: the emulator of RunPod, which runs pods as processes, and a real S3 server
(versitygw). `attempt` materializes the base stage of a tiny model through Dagster, each time in a new store,
and tells from the clocks of Dagster, the emulator, the pod's events and the receipt:

- ask: from the start of Dagster's step to the pod's creation;
- beat: from the container's start to the supervisor's first heartbeat;
- receipt: from the last training step to the receipt;
- gone: from the receipt until the pod is gone.

`checkpoint` trains a model of the quick recipe's size with a checkpoint every 40 steps, each committed to the
bucket while training goes on, and tells what a checkpoint costs: the seconds that 40 steps with one take
beyond 40 median steps, and how much that slows a training with one a minute.

`transfer` writes random bytes as a checkpoint's file to the bucket and fetches them again, by the store and
by `aws s3 cp`, in turns; judge the ratios. Each measurement is a JSON line; medians come last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from emulators.runpod import Emulator, PodTruth, serve  # noqa: E402
from emulators.runpod.checkout_images import training_image  # noqa: E402
from standins import s3  # noqa: E402

Row = dict[str, Any]

ASSETS = ["validation_files", "tokenizer_training", "base_model_checkpoint"]

RECIPES = """
import dataclasses

from nanochat.recipes import Base, Data, Hardware, Model, Recipe, Tokenizer, quick

RECIPES = [
    Recipe(
        name="bench",
        description="so small that what is around the training is what takes the time",
        data=Data(source="offline", shards=1),
        tokenizer=Tokenizer(vocab_size=400, shards=1),
        model=Model(depth=2, width=32, heads=2, kv_heads=2, context=64),
        base=Base(steps=40, batch_tokens=256, eval_every=40, eval_tokens=2048, checkpoint_every=20),
        hardware=Hardware(device_batch_rows=4, min_gpu_memory_gib=1),
    ),
    dataclasses.replace(
        quick(),
        name="saver",
        data=Data(source="offline", shards=1),
        tokenizer=Tokenizer(vocab_size=2048, shards=1),
        base=dataclasses.replace(quick().base, steps=280, eval_every=1_000, checkpoint_every=40),
    ),
]
"""
CYCLE_STEPS = 40


@contextmanager
def rented(folder: Path) -> Iterator[tuple[Emulator, dict[str, str]]]:
    """An account at the emulator with a bucket beside it, and the environment that leads there."""
    with (
        s3.serve(folder / "s3") as server,
        serve(state_dir=folder / "runpod", images={"*": training_image(folder / "bin")}) as emulator,
    ):
        (folder / "recipes.py").write_text(RECIPES)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            emulator.set_secret(name, server.environment[name])
        yield (
            emulator,
            {
                **server.environment,
                "NANOCHAT_LAUNCHER": "runpod",
                "NANOCHAT_STORE": f"s3://{s3.BUCKET}",
                "NANOCHAT_RECIPES": str(folder / "recipes.py"),
                "NANOCHAT_CACHE": str(folder / "cache"),
                "NANOCHAT_THREADS": "1",
                "NANOCHAT_RUNPOD_IMAGE_NAME": "registry.example/training@sha256:" + "ab" * 32,
                "RUNPOD_API_URL": emulator.url,
                "RUNPOD_API_KEY": emulator.api_key,
                "DAGSTER_HOME": str(folder / "dagster"),
            },
        )


def measure_attempt(folder: Path, model: str) -> Row:
    """Of the model's base stage, built through Dagster on an emulated pod."""
    with rented(folder) as (emulator, environment):
        os.environ.update(environment)
        (folder / "dagster").mkdir()
        (folder / "dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        # The recipes are read with the definitions.
        import dagster as dg

        from dagster_nanochat.definitions import defs
        from dagster_nanochat.partitions import recipe_book
        from nanochat.attempts import read_events
        from nanochat.stages import resolve
        from nanochat.store import open_store

        with dg.DagsterInstance.get() as instance:
            shards = {f"dagster/asset_partition_range_{end}": "offline_00000" for end in ("start", "end")}
            run = defs().resolve_job_def("ingest_shards").execute_in_process(instance=instance, tags=shards)
            assert run.success
            job = dg.Definitions(
                assets=defs().assets,
                resources=defs().resources,
                jobs=[dg.define_asset_job("base", selection=ASSETS)],
                executor=dg.in_process_executor,
            ).resolve_job_def("base")
            run = job.execute_in_process(instance=instance, tags={"dagster/partition": model})
            assert run.success
            started = next(
                record.timestamp
                for record in instance.all_logs(run.run_id)
                if record.dagster_event
                and record.dagster_event.is_step_start
                and record.step_key == "base_model_checkpoint"
            )
        store = open_store()
        state = resolve(recipe_book()[model], store)["base"]
        assert state.receipt is not None
        events = list(read_events(store, state.prefix, state.receipt.token))
        if model == "saver":
            return checkpoint_cost(events)
        (pod,) = emulator.pods()
        return spans(emulator, pod, events, started, state.receipt.created_at.timestamp())


def spans(emulator: Emulator, pod: PodTruth, events: list[Row], started: float, receipt_at: float) -> Row:
    assert pod.deleted_at is not None
    created = pod.created_at.timestamp()
    container = created + emulator.settings.pull_s
    first = min(event["time"] for event in events)
    last_step = max(event["time"] for event in events if event["type"] == "step")
    return {
        "ask_s": round(created - started, 3),
        "beat_s": round(first - container, 3),
        "receipt_s": round(receipt_at - last_step, 3),
        "gone_s": round(pod.deleted_at.timestamp() - receipt_at, 3),
    }


def checkpoint_cost(events: list[Row]) -> Row:
    """Seconds. The first cycle has no checkpoint behind it and the last ends with one, so neither counts."""
    times = [event["time"] for event in events if event["type"] == "step"]
    seconds = [after - before for before, after in itertools.pairwise(times)]
    step = statistics.median(seconds)
    cycles = [
        sum(seconds[start : start + CYCLE_STEPS])
        for start in range(CYCLE_STEPS - 1, len(seconds) - CYCLE_STEPS + 1, CYCLE_STEPS)
    ]
    cost = statistics.median(cycles) - CYCLE_STEPS * step
    return {
        "step_s": round(step, 4),
        "checkpoints": len(cycles),
        "checkpoint_s": round(cost, 3),
        "slower_with_one_a_minute_percent": round(100 * cost / 60, 2),
    }


def measure_transfers(folder: Path, megabytes: int, aws: str, rounds: int) -> Iterator[Row]:
    from nanochat.store import open_store

    with s3.serve(folder / "s3") as server:
        os.environ.update(server.environment)
        store = open_store(f"s3://{s3.BUCKET}")
        sent, fetched = folder / "model.safetensors", folder / "fetched"
        sent.write_bytes(os.urandom(megabytes * 1_000_000))

        def copy(source: str, destination: str) -> None:
            command = [aws, "s3", "cp", "--quiet", source, destination]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

        url = f"s3://{s3.BUCKET}/aws/model.safetensors"
        ways: dict[str, Callable[[], object]] = {
            "store up": lambda: store.put_file("ours/model.safetensors", sent),
            "aws up": lambda: copy(str(sent), url),
            "store down": lambda: store.fetch("ours/model.safetensors", fetched),
            "aws down": lambda: copy(url, str(fetched)),
        }
        for _ in range(rounds):
            for name, work in ways.items():
                fetched.unlink(missing_ok=True)
                began = time.perf_counter()
                work()
                seconds = time.perf_counter() - began
                yield {"way": name, "seconds": round(seconds, 3), "mb_per_s": round(megabytes / seconds, 1)}
                assert not name.endswith("down") or fetched.stat().st_size == sent.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["attempt", "checkpoint", "transfer"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=512, help="of the file that is transferred")
    parser.add_argument("--aws", default=shutil.which("aws"), help="the AWS CLI")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        with tempfile.TemporaryDirectory() as folder:
            model = "bench" if arguments.what == "attempt" else "saver"
            print(json.dumps(measure_attempt(Path(folder), model)))
        return 0
    if s3.program() is None:
        parser.error("versitygw, the S3 server, is not installed (the README says how)")
    if arguments.what != "transfer":
        attempts = []
        for _ in range(arguments.rounds):
            command = [sys.executable, __file__, arguments.what, "--job"]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            attempts.append(json.loads(told.splitlines()[-1]))
            print(json.dumps(attempts[-1]), flush=True)
        medians = {name: statistics.median(row[name] for row in attempts) for name in attempts[0]}
        print(json.dumps({"median": medians}))
        return 0
    if arguments.aws is None:
        parser.error("the AWS CLI is not installed: name it with --aws")
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row in measure_transfers(Path(folder), arguments.megabytes, arguments.aws, arguments.rounds):
            print(json.dumps(row), flush=True)
            seconds.setdefault(row["way"], []).append(row["seconds"])
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    ratios = {way: round(medians[f"aws {way}"] / medians[f"store {way}"], 2) for way in ("up", "down")}
    print(json.dumps({"median_s": medians, "times as fast as aws s3 cp": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
