"""A stage on pods with everything small and quick: the programs of a history's orchestrators and pods.

The stage function, the launcher, the sweeper, the pod's first program and the supervisor are the real
ones. Stand-ins are the training script (a loop that counts, keeps checkpoints and ends with a result; on
the other nodes of a cluster one that waits for it), torchrun (nothing starts it), Dagster's context, and
the store, a folder that calls itself a bucket.
All waiting times are a fraction of the real ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import json
import os
import random
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import dagster as dg
import httpx

from dagster_nanochat import guards, holding, lifecycle, stage_attempt
from dagster_nanochat.launch.base import Patience
from dagster_nanochat.launch.runpod import ending, sweeper
from dagster_nanochat.launch.runpod import launcher as launcher_module
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.config import RunPodSettings
from dagster_nanochat.launch.runpod.launcher import RunPodLauncher
from nanochat import follower, nodes, pod, supervisor
from nanochat.data.shards import ShardRecord
from nanochat.data.sources import get_source
from nanochat.machine import Gpu, Machine
from nanochat.recipes import Base, Data, Hardware, Model, Recipe, Tokenizer
from nanochat.stages import resolve
from nanochat.store import FileStore, ObjectStore, S3Store, StoreError, files, open_store, s3
from nanochat.store.digests import digest_bytes
from nanochat.store.layout import shard_key, shard_record_key
from nanochat.store.objects import ObjectInfo
from nanochat.store.receipts import FileRef, Receipt, point, write_receipt
from nanochat.training import process
from nanochat.training.checkpoint_folders import MANIFEST, checkpoint_prefix, list_checkpoints
from nanochat.training.job import TrainingJob

HISTORY_ENV = "NANOCHAT_TEST_HISTORY"
IMAGE = "registry.example/nanochat-training@sha256:" + "ab" * 32
STEPS, CHECKPOINT_EVERY, STEP_S = 8, 2, 0.05
RECIPE = Recipe(
    name="model",
    description="for histories",
    data=Data(source="fineweb-edu", shards=1),
    tokenizer=Tokenizer(vocab_size=300, shards=1),
    model=Model(depth=1, width=16, heads=1, kv_heads=1, context=32),
    base=Base(steps=STEPS, batch_tokens=64),
    hardware=Hardware(min_gpu_memory_gib=1),
)
# A sweep over models: what they have upstream is the same.
SWEEP = [
    dataclasses.replace(RECIPE, name=f"model-{seed}", base=dataclasses.replace(RECIPE.base, seed=seed))
    for seed in range(16)
]
RECIPES = {recipe.name: recipe for recipe in (RECIPE, *SWEEP)}
# How much quicker than in earnest everybody waits.
HURRY = 20
READ_TIMEOUT_S = CREATE_TIMEOUT_S = 0.6
PATIENCE = Patience(ready_s=2.5, silent_s=2.0, capacity_s=1.5)
# When whoever may still have a pod has given it up, after the last of it was heard.
SETTLED_S = 6.0
_TIMES: dict[ModuleType, dict[str, Any]] = {
    supervisor: {"LEASE_TTL_S": 1.5, "_RENEW_EVERY_S": 0.25, "_POLL_S": 0.05, "_SHIP_TO_BUCKETS_EVERY_S": 0.1,
                 "_CHECKPOINT_GRACE_S": 1, "STOP_GRACE_S": 1.5, "SILENT_S": 2.0},
    nodes: {"SILENT_S": 2.0, "GATHER_S": 3.0},
    follower: {"_LOOK_EVERY_S": 0.1},
    process: {"_ALONE_AT_MOST_S": 0.8},
    pod: {"_STORE_PATIENCE_S": 2.0, "_RETRY_EVERY_S": 0.1, "_END_TIMEOUT_S": 1.0,
          "_END_EVERY_S": (0.1, 0.2, 0.4), "GATHER_S": 3.0, "_GATHER_EVERY_S": 0.1},
    holding: {"HELD_TTL_S": 1.5},
    stage_attempt: {"LEASE_TTL_S": 1.5, "WATCH_GRACE_S": 2.5, "_POLL_S": 0.05, "_STATUS_EVERY_S": 0.1,
                    "_TROUBLE_EVERY_S": 0.4, "_CAPACITY_PAUSES_S": (0.25, 1.0)},
    launcher_module: {"_LOOK_EVERY_S": 0.3, "_LIST_EVERY_S": 0.1, "_SAVED_WITHIN_S": 1.5,
                      "_SAVED_EVERY_S": 0.1},
    ending: {"_GONE_WITHIN_S": 2.0},
    sweeper: {"_SILENT_FOR": datetime.timedelta(seconds=2), "_ASKING_FOR": datetime.timedelta(seconds=3)},
}  # fmt: skip


class _HurriedTime:
    """In place of the module `time`: sleeps are short, the clock is the real one."""

    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(seconds / HURRY)


def hurry(set: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let this process wait less."""
    for module, times in _TIMES.items():
        for name, value in times.items():
            assert hasattr(module, name), (module, name)
            set(module, name, value)
    for module in (holding, ending, launcher_module):
        set(module, "time", _HurriedTime)
    set(files, "_flush", lambda path: None)  # no machine loses its power here
    set(s3, "_client", _hurried_s3_client)
    # Reading the certificates takes longer than a request, and there is no TLS here.
    set(
        httpx._transports.default, "create_ssl_context", lambda **how: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    )


def _hurried_s3_client() -> Any:
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "max_attempts": 2}
    config = Config(retries=retries, connect_timeout=1, read_timeout=4, max_pool_connections=32)
    return boto3.session.Session().client("s3", config=config)


class Bucket(FileStore):
    """A folder that calls itself a bucket. cut: while there is such a file, nothing reaches it."""

    def __init__(self, root: Path, cut: Path | None = None) -> None:
        super().__init__(root)
        self._cut = cut

    @property
    def url(self) -> str:
        return f"s3://histories{self.root}"

    def local_path(self, key: str) -> Path | None:
        return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._reach()
        return super().list(prefix)

    def _path(self, key: str) -> Path:
        self._reach()
        return super()._path(key)

    def _reach(self) -> None:
        if self._cut and self._cut.exists():
            raise StoreError(f"store {self.url}: the network is cut")


def store_of(history: Path, url: str = "", client: str = "orchestrator") -> ObjectStore:
    """A history's store: the bucket at `url`, or its folder as `client` reaches it."""
    return open_store(url) if url else Bucket(history / "store", cut_of(history, client))


def cut_of(history: Path, client: str) -> Path:
    return history / f"cut-{client}"


def fill(store: ObjectStore) -> None:
    """What lies upstream of the stage: shards, and a tokenizer that is fresh."""
    for shard in ("shard_00000", get_source("fineweb-edu").validation_shard()):
        record = ShardRecord(
            source="fineweb-edu",
            shard=shard,
            mode="copy",
            revision="r1",
            url="https://hub.example/shard",
            size_bytes=1,
            sha256=digest_bytes(b"x"),
            rows=1,
            empty=0,
            characters=1,
            seconds=0.0,
        )
        store.put(shard_record_key("fineweb-edu", shard), record.to_bytes())
        store.put(shard_key("fineweb-edu", shard), b"x")
    state = resolve(RECIPE, store)["tokenizer"]
    assert state.identity is not None
    store.put(state.identity.key(), state.identity.to_bytes())
    key = f"{state.prefix}/tokenizer.json"
    store.put(key, b"{}")
    receipt = Receipt(
        stage="tokenizer",
        stage_version=1,
        fingerprint=state.identity.fingerprint,
        token="t0",
        created_at=datetime.datetime.now(datetime.UTC),
        seconds=0.0,
        outputs=(FileRef(key=key, size_bytes=2, sha256=digest_bytes(b"{}")),),
    )
    write_receipt(store, receipt)
    for model in RECIPES:
        point(store, model, "tokenizer", receipt.fingerprint)


# -- the pod ---------------------------------------------------------------------------------------


def run_pod() -> None:
    """What a container runs: `nanochat.pod`, whose supervisor starts `train`."""
    hurry()
    history, name = Path(os.environ[HISTORY_ENV]), os.environ["RUNPOD_POD_ID"]
    gpu = Gpu(name="NVIDIA", memory_bytes=80 * 2**30)
    machine = Machine(host=name, cores=1, memory_bytes=2**30, gpus=(gpu,), cpu_flops_per_s=1e9)
    pod.this_machine = lambda: machine  # type: ignore[attr-defined]
    pod.open_store = lambda url: _store_of_pod(history, url, name)  # type: ignore[attr-defined]
    supervisor.gpu_usage = lambda: None  # type: ignore[attr-defined]
    supervisor.Supervisor._start_training = _start_training  # type: ignore[method-assign]
    pod.main()


def _store_of_pod(history: Path, url: str, name: str) -> ObjectStore:
    return store_of(history, "" if url.startswith("s3://histories/") else url, name)


def _start_training(self: supervisor.Supervisor) -> subprocess.Popen[str]:
    """As the real one, of a fork that is no new program."""
    train_here = functools.partial(_train_and_leave, self._store, self._job, self._work, self._spool)
    return subprocess.Popen(
        ["train"],
        preexec_fn=train_here,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _train_and_leave(store: ObjectStore, job: TrainingJob, work: Path, spool: Path) -> None:
    from standins.forks import leave_with

    os.closerange(3, 256)  # Popen waits until the last of these is closed
    if isinstance(store, S3Store):
        store = open_store(store.url)  # with connections of its own
    leave_with(lambda: train(store, job, work, spool))


def train(store: ObjectStore, job: TrainingJob, work: Path, spool: Path) -> None:
    """Count to STEPS from the newest checkpoint on, and keep one now and then."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.end_with_supervisor()
    peers = Peers(job) if job.hardware.nodes > 1 else None
    if peers:
        peers.meet(stopped)
        if peers.rank:
            sys.exit(peers.follow(stopped))
    training, step, worked = _newest_checkpoint(store, job) or (job.token, 0, {})
    with spool.open("a", encoding="utf-8") as events:
        started = time.monotonic()
        while step < STEPS and not stopped:
            if peers:
                peers.agree(work, stopped)
            step += 1
            _note_work(job.token, step)
            time.sleep(STEP_S)
            _note_work(job.token, step)
            told = {"type": "step", "time": time.time(), "step": step, "steps": STEPS, "loss": 1.0}
            print(json.dumps(told), file=events, flush=True)
            if step % CHECKPOINT_EVERY == 0 or stopped:
                worked[job.token] = time.monotonic() - started
                _keep(store, job, training, step, worked)
                told = {"type": "checkpoint", "time": time.time(), "step": step}
                print(json.dumps(told), file=events, flush=True)
    if stopped:
        sys.exit(1)
    result = {
        "checkpoint": {"files": _files(store, checkpoint_prefix(job.prefix, training, step))},
        "metrics": {"val_bpb": 1.5},
        "attempts": [{"token": token, "seconds": seconds} for token, seconds in worked.items()],
    }
    (work / "result.json").write_text(json.dumps(result))
    if peers:
        peers.place(0, "done").touch()


class Peers:
    """The training processes of a cluster's nodes: each holds a lock, which the system takes from the dead,
    and of which the others learn as they would of a connection that is closed."""

    def __init__(self, job: TrainingJob) -> None:
        self.rank = int(os.environ["NODE_RANK"])
        self._others = [rank for rank in range(job.hardware.nodes) if rank != self.rank]
        self._name = f"peer-{job.token}-{os.environ['NANOCHAT_GROUP']}"
        self._lock = self.place(self.rank, "new").open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.place(self.rank, "new").rename(self.place(self.rank, "lock"))

    def place(self, rank: int, what: str) -> Path:
        return Path(os.environ[HISTORY_ENV]) / f"{self._name}-{rank}.{what}"

    def meet(self, stopped: list[int]) -> None:
        while not all(self.place(rank, "lock").exists() for rank in self._others):
            if stopped:
                sys.exit(1)
            time.sleep(0.01)

    def _gone(self, rank: int) -> bool:
        with self.place(rank, "lock").open("rb") as theirs:
            try:
                fcntl.flock(theirs, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def agree(self, work: Path, stopped: list[int]) -> None:
        """The first's part of a step: whether all are there, and none was asked to stop."""
        if any(self._gone(rank) for rank in self._others):
            error = {"failure": "FAILED", "message": "connection closed by peer", "time": time.time()}
            (work / "error.json").write_text(json.dumps(error))
            sys.exit(1)
        if any(self.place(rank, "stop").exists() for rank in self._others):
            stopped.append(signal.SIGTERM)

    def follow(self, stopped: list[int]) -> int:
        """The others' part, to the end of the first's; their exit code."""
        while not self._gone(0):
            if stopped:
                self.place(self.rank, "stop").touch()
            time.sleep(0.01)
        return 0 if self.place(0, "done").exists() else 1


def _newest_checkpoint(store: ObjectStore, job: TrainingJob) -> tuple[str, int, dict[str, float]] | None:
    for prefix in reversed(list_checkpoints(store, f"{job.prefix}/checkpoints")):
        if store.head(f"{prefix}/{MANIFEST}"):
            kept = json.loads(store.get(f"{prefix}/{MANIFEST}"))
            return prefix.split("/")[-2], kept["step"], kept["worked"]
    return None


def _keep(store: ObjectStore, job: TrainingJob, training: str, step: int, worked: dict[str, float]) -> None:
    prefix = checkpoint_prefix(job.prefix, training, step)
    store.put(f"{prefix}/model.bin", b"weights" * step)
    store.put(f"{prefix}/{MANIFEST}", json.dumps({"step": step, "worked": worked}).encode())


def _files(store: ObjectStore, prefix: str) -> list[dict[str, Any]]:
    kept = [(info.key, store.get(info.key)) for info in store.list(f"{prefix}/")]
    refs = [FileRef(key=key, size_bytes=len(data), sha256=digest_bytes(data)) for key, data in kept]
    return [ref.model_dump(mode="json") for ref in refs]


def _note_work(token: str, step: int) -> None:
    line = f"{time.monotonic()} {token} {os.environ['RUNPOD_POD_ID']} {step}\n"
    with work_log(Path(os.environ[HISTORY_ENV])).open("ab", buffering=0) as log:
        log.write(line.encode())


def work_log(history: Path) -> Path:
    """A line for every moment at which somebody trained: when (monotonic clock), attempt, pod, step."""
    return history / "work.log"


# -- the orchestrator ------------------------------------------------------------------------------


class HurriedClient(RunPodClient):
    """Waits less: between attempts and for logs."""

    def __init__(self, api_key: str, base_url: str) -> None:
        super().__init__(
            api_key,
            base_url=base_url,
            read_timeout_s=READ_TIMEOUT_S,
            create_timeout_s=CREATE_TIMEOUT_S,
            sleep=_HurriedTime.sleep,
        )

    def pod_logs(self, pod_id: str, **how: Any) -> list[str]:
        how["max_seconds"] = how["max_seconds"] / HURRY
        return super().pod_logs(pod_id, **how)


class _Log:
    def info(self, message: object) -> None:
        print(f"{time.monotonic():.2f} {message}", flush=True)

    warning = error = info


class _Instance:
    """Knows one thing of a run: whether somebody has terminated it."""

    def __init__(self, history: Path) -> None:
        self._history = history

    def get_run_by_id(self, run_id: str) -> Any:
        asked_to_end = (self._history / f"terminate-{run_id}").exists()
        status = dg.DagsterRunStatus.CANCELING if asked_to_end else dg.DagsterRunStatus.STARTED
        return SimpleNamespace(run_id=run_id, status=status, is_finished=False)

    def report_run_failed(self, run: Any, message: str) -> None:
        print(f"run {run.run_id} is closed: {message}")


def _context(history: Path, run_id: str) -> Any:
    return SimpleNamespace(
        log=_Log(),
        run=SimpleNamespace(run_id=run_id, tags={}),
        instance=_Instance(history),
        asset_key=dg.AssetKey("base_model_checkpoint"),
        log_event=lambda event: print(f"observed: {event.description}"),
    )


@contextlib.contextmanager
def _pipes_session(context: Any, injector: Any, reader: Any) -> Iterator[None]:
    with reader.read_messages(SimpleNamespace(handle_message=lambda message: None)):
        yield


def orchestrate(
    history: str,
    run_id: str,
    api_url: str,
    api_key: str,
    store_url: str,
    nodes: int = 1,
    model: str = RECIPE.name,
) -> None:
    """One run of the stage of a model; what came of it is written to ``ended-<run id>``."""
    hurry()
    random.seed()
    dg.open_pipes_session = _pipes_session  # type: ignore[assignment]
    stage_attempt.code_revision = lambda root: "0" * 40  # type: ignore[attr-defined]
    stage_attempt.sources_digest = lambda sources: "0" * 64  # type: ignore[attr-defined]
    folder = Path(history)
    store = store_of(folder, store_url)
    launcher = RunPodLauncher(
        store,
        HurriedClient(api_key, api_url),
        RunPodSettings(nodes=nodes),
        image=IMAGE,
        patience=PATIENCE,
        environment=os.environ,
    )
    try:
        built = lifecycle.train_stage(
            _context(folder, run_id), "base", RECIPES[model], store, launcher, guards.StageConfig()
        )
        told = {"type": "receipt", "token": built.receipt.token}
    except BaseException as error:
        metadata = getattr(error, "metadata", {})
        failure = metadata["failure"].value if "failure" in metadata else None
        described = getattr(error, "description", None) or str(error)
        told = {"type": type(error).__name__, "failure": failure, "message": described}
        import traceback

        traceback.print_exc()
    ended = folder / f"ended-{run_id}"
    ended.with_suffix(".tmp").write_text(json.dumps(told))
    ended.with_suffix(".tmp").rename(ended)
