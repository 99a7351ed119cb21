"""Histories of faults: what happens in one, and how it is told to an emulator and real processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from emulators.runpod import Emulator, Image, PodTruth, Settings, serve
from pydantic import BaseModel, ConfigDict
from standins import hurried_stage, s3
from standins.forks import Fork, Nursery
from standins.s3_faults import S3FaultProxy

from dagster_nanochat.launch.runpod.errors import RunPodError
from dagster_nanochat.launch.runpod.sweeper import Swept, sweep
from nanochat.store import ObjectStore, StoreError
from nanochat.store.ledger import entries, read_entry

# A stage that has not ended by then has hung.
ENDS_WITHIN_S = 180.0
_POLL_S = 0.01


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Strike(_Part):
    """A fault of the emulator's that is ordered `at_s` after the beginning."""

    at_s: float
    kind: str
    fields: dict[str, Any] = {}


class Kill(_Part):
    """The orchestrator is killed: after_s after it began, or after it first made a request like `request`."""

    after_s: float
    request: str | None = None


class History(_Part):
    """kills: of the first orchestrator, of the second …; the last one is not killed. sweeps, terminated:
    seconds after the beginning. nodes: of the machine; members_end: they are allowed to end their cluster."""

    mode: Literal["instant", "phased"] = "instant"
    nodes: int = 1
    members_end: bool = False
    strikes: tuple[Strike, ...] = ()
    kills: tuple[Kill, ...] = ()
    sweeps: tuple[float, ...] = ()
    terminated: float | None = None

    @property
    def quiet(self) -> bool:
        """Nothing goes wrong."""
        return not (self.strikes or self.kills or self.terminated is not None)


class Told(_Part):
    """What came of a history. ended: what the last orchestrator said. again: what one said that was started
    when all was over, where the first had no receipt."""

    ended: dict[str, Any]
    again: dict[str, Any] | None
    story: str


class Broken(AssertionError):
    """A promise that did not hold."""


class _Cut:
    """The pods' way to the store: a file says that it is cut."""

    url = "http://store.invalid"

    def __init__(self) -> None:
        self.history = Path()

    def port_for(self, name: str) -> int:
        return 9

    def block(self, name: str) -> None:
        hurried_stage.cut_of(self.history, name).touch()

    def add(self, kind: str, **fields: Any) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError


class Stage:
    """An account at an emulated RunPod on which one history after the other is told."""

    def __init__(self, nursery: Nursery, emulator: Emulator, network: _Cut | S3FaultProxy) -> None:
        self.nursery = nursery
        self.emulator = emulator
        self._network = network

    def tell(self, history: History, folder: Path) -> Told:
        """Raises Broken."""
        folder.mkdir(parents=True)
        url = f"s3://{s3.BUCKET}/{folder.name}"
        if isinstance(self._network, _Cut):
            self._network.history = folder
            url = ""
        return _Telling(self, history, folder, url).tell()


def pod_image(folder: Path) -> Image:
    """What a history's pods run."""
    return Image(
        entrypoint=("standins.hurried_stage:run_pod",), environment={hurried_stage.HISTORY_ENV: str(folder)}
    )


@contextlib.contextmanager
def stage(nursery: Nursery, folder: Path, network: S3FaultProxy | None = None) -> Iterator[Stage]:
    """network: the way to a real S3 server, whose credentials are in the environment; without it each
    history's store is a folder."""
    way = network or _Cut()
    settings = Settings(pull_s=0.02, provisioning_s=0.05, restart_delay_s=0.1, stop_grace_s=0.1)
    with serve(state_dir=folder, images={}, settings=settings, network=way) as emulator:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            emulator.set_secret(name, os.environ.get(name, "secret"))
        yield Stage(nursery, emulator, way)


class _Telling:
    def __init__(self, stage: Stage, history: History, folder: Path, store_url: str) -> None:
        self._nursery = stage.nursery
        self._emulator = emulator = stage.emulator
        self._history = history
        self._folder = folder
        self._store_url = store_url
        self._store = hurried_stage.store_of(folder, store_url)
        hurried_stage.fill(self._store)
        emulator.settings.mode = history.mode
        emulator.settings.members_end_clusters = history.members_end
        emulator.images["*"] = pod_image(folder)
        self._pods_before = len(emulator.pods())
        self._requests_before = len(emulator.requests)
        self._violations_before = len(emulator.violations)
        self._story: list[str] = []
        self._client = hurried_stage.HurriedClient(emulator.api_key, emulator.url)
        self._begun = time.monotonic()
        self._threads: list[threading.Thread] = []

    def tell(self) -> Told:
        todo = sorted(
            [
                *((strike.at_s, self._strike, (strike,)) for strike in self._history.strikes),
                *((at_s, self._sweep_beside, ()) for at_s in self._history.sweeps),
            ],
            key=lambda due: due[0],
        )
        ended: dict[str, Any] | None = None
        kills = list(self._history.kills)
        try:
            while ended is None:
                kill = kills.pop(0) if kills else None
                ended = self._run(kill, todo, terminated=self._history.terminated)
            self._emulator.faults.clear()
            for thread in self._threads:
                thread.join()
            self._settle()
            self._check_end()
            self._check_ended(ended)
            again = None
            if ended["type"] != "receipt":
                again = self._run()
                self._settle()
                self._check_end()
                if again is None or again["type"] != "receipt":
                    raise Broken(f"with no fault left, the stage ended with {again}")
            if self._history.quiet and len(self._pods()) != self._history.nodes:
                raise Broken(f"{len(self._pods())} pods where nothing went wrong")
        except (AssertionError, RunPodError, StoreError, TimeoutError) as error:
            name = "" if isinstance(error, Broken) else f"{type(error).__name__}: "
            raise Broken(f"{name}{error}\n\n{self.story()}") from error
        finally:
            self._emulator.faults.clear()
            for cluster in self._client.list_clusters():
                self._client.delete_cluster(cluster.id)
            for pod in self._pods():
                if pod.deleted_at is None and pod.cluster is None:
                    self._client.delete_pod(pod.id)
            self._client.close()
        return Told(ended=ended, again=again, story=self.story())

    # -- what happens ------------------------------------------------------------------------------

    def _run(
        self, kill: Kill | None = None, todo: list[Any] | None = None, *, terminated: float | None = None
    ) -> dict[str, Any] | None:
        """One orchestrator to its end: what it says, or None where it was killed."""
        run_id = uuid.uuid4().hex
        asked_before = len(self._emulator.requests)
        began = time.monotonic()
        process = self._nursery.fork(
            "standins.hurried_stage:orchestrate",
            {
                "history": str(self._folder),
                "run_id": run_id,
                "api_url": self._emulator.url,
                "api_key": self._emulator.api_key,
                "store_url": self._store_url,
                "nodes": self._history.nodes,
            },
            folder=self._folder,
        )
        self._say(f"orchestrator {run_id[:4]} begins")
        reader = threading.Thread(target=self._listen, args=(process,), daemon=True)
        reader.start()
        kill_at = began + kill.after_s if kill and kill.request is None else None
        while process.poll() is None:
            now = time.monotonic()
            while todo and now >= self._begun + todo[0][0]:
                _, act, arguments = todo.pop(0)
                act(*arguments)
            if kill and kill.request and kill_at is None:
                asked = self._emulator.requests[asked_before:]
                if any(re.search(kill.request, f"{one['method']} {one['path']}") for one in asked):
                    kill_at = now + kill.after_s
            if kill_at is not None and now >= kill_at:
                process.kill()
                self._say(f"orchestrator {run_id[:4]} is killed")
            if terminated is not None and now >= self._begun + terminated:
                terminated = None
                (self._folder / f"terminate-{run_id}").touch()
                self._say("the run is terminated")
            if now > began + ENDS_WITHIN_S:
                process.kill()
                raise Broken(f"the stage did not end within {ENDS_WITHIN_S:.0f} s")
            time.sleep(_POLL_S)
        reader.join(timeout=5)
        process.stdin.close()
        told = self._folder / f"ended-{run_id}"
        if told.exists():
            ended: dict[str, Any] = json.loads(told.read_text())
            self._say(f"orchestrator {run_id[:4]} ends: {ended}")
            return ended
        if kill_at is None:
            raise Broken("the orchestrator died by itself")
        return None

    def _strike(self, strike: Strike) -> None:
        self._say(f"fault {strike.kind} {strike.fields}")
        self._emulator.faults.add(strike.kind, **strike.fields)

    def _sweep_beside(self) -> None:
        """As the schedule does it, whatever else goes on; it may fail, and comes again."""

        def run() -> None:
            with contextlib.suppress(RunPodError, TimeoutError):
                self._sweep()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _sweep(self) -> list[Swept]:
        swept = list(sweep(self._client, self._store))
        self._say(f"sweep: {[one.describe() for one in swept]}")
        return swept

    def _settle(self) -> None:
        """The faults have stopped: wait until nobody is heard of, where anybody may be, then sweep."""
        self._say("the faults have stopped")
        deadline = time.monotonic() + hurried_stage.SETTLED_S
        while self._unsettled() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._sweep()

    def _unsettled(self) -> bool:
        return any(pod.deleted_at is None for pod in self._pods()) or any(
            entry.open for entry in entries(self._store)
        )

    # -- what must hold ----------------------------------------------------------------------------

    def _check_end(self) -> None:
        """All that a history may not leave behind."""
        check_end(self._folder, self._store, self._pods())
        violations = self._emulator.violations[self._violations_before :]
        if violations:
            raise Broken(f"the emulator: {violations}")

    def _check_ended(self, ended: dict[str, Any]) -> None:
        if ended["type"] == "receipt":
            return
        if ended["type"] == "DagsterExecutionInterruptedError" and self._history.terminated is not None:
            return
        if ended["type"] != "Failure" or ended["failure"] is None:
            raise Broken(f"no error of the failure vocabulary: {ended}")
        if not _NEXT_STEP.search(ended["message"]):
            raise Broken(f"no next step is named: {ended}")

    # -- what is known of it -----------------------------------------------------------------------

    def _pods(self) -> list[PodTruth]:
        return self._emulator.pods()[self._pods_before :]

    def _say(self, text: str) -> None:
        self._story.append(f"{time.monotonic():.2f} {text}")

    def _listen(self, process: Fork) -> None:
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            self._story.append(text if re.match(r"\d+\.\d\d ", text) else f"        {text}")

    def story(self) -> str:
        offset = time.time() - time.monotonic()
        asked = [
            f"{one['time'] - offset:.2f} -> {one['method']} {one['path']} {one['status']}"
            for one in self._emulator.requests[self._requests_before :]
        ]
        pods = []
        for pod in self._pods():
            pods += [f"pod {pod.id} {pod.name} {pod.status} ${pod.charged_usd:.6f} from {pod.created_at}"]
            pods += [f"    {line}" for line in self._emulator.logs(pod.id)]
        ledger = [repr(entry) for entry in entries(self._store)]
        log = hurried_stage.work_log(self._folder)
        work = log.read_text().splitlines() if log.exists() else []
        return "\n".join(
            [
                f"history: {self._history.model_dump_json(exclude_defaults=True)}",
                *self._story,
                "-- requests",
                *asked[-150:],
                "-- pods",
                *pods,
                "-- ledger",
                *ledger,
                "-- work",
                *work,
            ]
        )


def check_end(folder: Path, store: ObjectStore, pods: Sequence[PodTruth]) -> None:
    """No pod is alive, no stage was worked at by two at a time, and every dollar that was charged is in the
    ledger, attempt by attempt. Raises Broken."""
    alive = [pod.id for pod in pods if pod.deleted_at is None]
    if alive:
        raise Broken(f"pods {', '.join(alive)} live on")
    _check_work(folder, {entry.token: entry.model for entry in entries(store)})
    charged: dict[str, float] = {}
    for pod in pods:
        token = _token(pod)
        charged[token] = charged.get(token, 0.0) + pod.charged_usd
    for token, usd in charged.items():
        entry = read_entry(store, token)
        if entry is None or entry.dollars() < usd - 1e-9:
            raise Broken(
                f"${usd:.6f} were charged for {token}, the ledger says "
                f"{f'${entry.dollars():.6f}: {entry}' if entry else 'nothing'}"
            )
    still_open = [entry.token for entry in entries(store) if entry.open]
    if still_open:
        raise Broken(f"entries {', '.join(still_open)} are open, and there is no pod")


def _check_work(folder: Path, model_of: dict[str, str]) -> None:
    log = hurried_stage.work_log(folder)
    spans: dict[tuple[str, str], tuple[float, float]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        at, token, pod, _ = line.split()
        first, _ = spans.get((token, pod), (float(at), 0.0))
        spans[token, pod] = (first, float(at))
    in_order = sorted(spans.items(), key=lambda span: (model_of[span[0][0]], span[1]))
    for (one, (_, end)), (other, (start, _)) in itertools.pairwise(in_order):
        if model_of[one[0]] == model_of[other[0]] and start < end:
            raise Broken(f"{one} and {other} worked at the same time, for {end - start:.2f} s at least")


def most_at_once(pods: Sequence[PodTruth]) -> int:
    """How many pods lived together at most."""
    begun = [(pod.created_at, 1) for pod in pods]
    ended = [(pod.deleted_at, -1) for pod in pods if pod.deleted_at]
    # Where one ends as another begins, they did not live together.
    return max(itertools.accumulate(change for _, change in sorted([*begun, *ended])))


# The words by which our errors say what to do.
_NEXT_STEP = re.compile(
    r"[Rr]un it again|[Rr]aise |[Aa]dd credit|must hold a key|mend |allow more|try again|in RunPod's console"
)


def _token(pod: PodTruth) -> str:
    found = re.search(r"\d{8}T\d{6}-[0-9a-f]{8}(?=$|-g)", pod.name)
    assert found, pod.name
    return found[0]
