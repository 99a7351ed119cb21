"""The RunPod launcher's promises in any history of faults.

Whatever RunPod and its machines do, and wherever the orchestrator is killed: once the stage has ended,
the faults have stopped and one sweep has succeeded, no pod of ours is alive, at most one attempt at a
time ever worked, every dollar that was charged is in the ledger, and there is a verified receipt, or an
error of the failure vocabulary that names the next step, after which another run gets the receipt.

`standins.hurried_stage` says what is real in it: all but the training, torchrun, Dagster and S3. The
last tests have those too.

CI tells a few; ``make histories HISTORIES=5000`` tells more, and those with a bucket and with real training.
``HISTORIES_SEED`` tells those of a seed, ``HISTORY='{…}'`` one that was printed.
"""

from __future__ import annotations

import collections
import json
import math
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from standins import forks, hurried_stage, s3, s3_faults
from standins.pod_histories import (
    Broken,
    History,
    Kill,
    Stage,
    Strike,
    check_end,
    most_at_once,
    pod_image,
    stage,
)
from standins.waiting import wait_for

from dagster_nanochat.launch.runpod.launcher import DEFAULT_MAX_PODS
from dagster_nanochat.launch.runpod.sweeper import sweep
from nanochat.store.ledger import entries

HISTORIES = int(os.environ.get("HISTORIES") or "300")
SEED = int(os.environ.get("HISTORIES_SEED", random.randrange(2**32)))
# Most of a history is waiting.
AT_ONCE = int(os.environ.get("HISTORIES_AT_ONCE", "8"))
_BROKEN_AT_MOST = 5

# -- what may happen -------------------------------------------------------------------------------

CREATE = "POST /v2/(pods|clusters)$"
# A stage where nothing goes wrong takes a second or two.
MOMENTS = st.one_of(st.just(0.0), st.floats(0.0, 2.0).map(lambda seconds: round(seconds, 2)))
DELAYS = st.floats(0.0, 1.0).map(lambda seconds: round(seconds, 2))
TIMES = st.sampled_from([1, 1, 1, 2, 3, 5, 12, None])
REQUESTS = st.sampled_from(
    [
        *("", CREATE, "GET /v2/pods$", "GET /v2/pods/[^/]+$", "DELETE", "/action", "/catalog/", "/secrets"),
        *("/logs", "/billing", "/clusters"),
    ]
)
STATUSES = st.sampled_from([401, 402, 403, 404, 409, 422, 429, 500, 502, 503])
LOST_ANSWERS_S = st.sampled_from([0.3, 0.8, 1.2])


def strikes(
    kind: str | st.SearchStrategy[str], **fields: st.SearchStrategy[Any]
) -> st.SearchStrategy[Strike]:
    kinds = st.just(kind) if isinstance(kind, str) else kind
    return st.builds(Strike, at_s=MOMENTS, kind=kinds, fields=st.fixed_dictionaries(fields))


STRIKES = st.one_of(
    strikes("no_capacity", gpu=st.sampled_from(["", "4090"]), times=TIMES),
    strikes("status_after", match=st.just(CREATE), status=st.sampled_from([500, 502]), times=TIMES),
    strikes(
        st.sampled_from(["hang_after", "hang", "slow"]),
        match=st.just(CREATE),
        seconds=LOST_ANSWERS_S,
        times=TIMES,
    ),
    strikes(
        "status", match=REQUESTS, status=STATUSES, times=TIMES, key=st.sampled_from([None, "account", "pod"])
    ),
    strikes(st.sampled_from(["pull_stuck", "pull_fails", "start_fails"]), times=TIMES),
    strikes("runtime_null", seconds=DELAYS),
    strikes("dies", after_s=DELAYS, state=st.sampled_from(["EXITED", "ERROR"]), times=TIMES),
    strikes(st.sampled_from(["vanishes", "freezes", "network"]), after_s=DELAYS, times=TIMES),
    strikes("logs_hang", lines=st.sampled_from([0, 1]), times=TIMES),
    strikes("lingers", seconds=LOST_ANSWERS_S, times=TIMES),
    strikes(
        st.sampled_from(["status", "status_after"]),
        match=st.just("DELETE|/action"),
        status=st.sampled_from([409, 429, 500]),
        times=TIMES,
    ),
    strikes(
        st.sampled_from(["hang", "hang_after", "slow"]),
        match=st.sampled_from(["DELETE", "/action", "GET /v2/pods"]),
        seconds=LOST_ANSWERS_S,
        times=st.sampled_from([1, 2, 3]),
    ),
    strikes("extra_fields", match=REQUESTS, times=TIMES),
)
KILLS = st.one_of(
    st.builds(Kill, after_s=MOMENTS),
    st.builds(
        Kill,
        after_s=st.floats(0.0, 0.2).map(lambda seconds: round(seconds, 3)),
        request=st.sampled_from([CREATE, CREATE, "DELETE", "GET /v2/pods/", "/secrets"]),
    ),
)


def some(what: st.SearchStrategy[Any], *counts: int) -> st.SearchStrategy[tuple[Any, ...]]:
    """As many as one of the counts says, each as likely."""
    return st.sampled_from(counts).flatmap(lambda n: st.lists(what, min_size=n, max_size=n)).map(tuple)


HISTORY = st.builds(
    History,
    mode=st.sampled_from(["instant", "phased"]),
    nodes=st.sampled_from([1, 1, 2]),
    members_end=st.booleans(),
    strikes=some(STRIKES, 0, 1, 2, 3, 4, 5),
    kills=some(KILLS, 0, 0, 1, 1, 2),
    sweeps=some(MOMENTS, 0, 0, 1, 2),
    terminated=st.sampled_from([False] * 9 + [True]).flatmap(lambda yes: MOMENTS if yes else st.none()),
)


# -- telling them ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nursery() -> Iterator[forks.Nursery]:
    with forks.nursery("standins.hurried_stage", "httpx", "boto3") as running:
        yield running


@pytest.fixture
def hurried(nursery: forks.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods are forks, and the sweeper in this process waits as little as the rest."""
    monkeypatch.setattr("emulators.runpod.pods.Container", forks.containers_of(nursery))
    hurried_stage.hurry(monkeypatch.setattr)


@pytest.mark.timeout(7200)
def test_any_history_of_faults_ends_without_a_pod_a_twin_or_an_unknown_dollar(
    hurried: None, nursery: forks.Nursery, tmp_path: Path
) -> None:
    _tell(_Teller(nursery, tmp_path), HISTORIES)


@pytest.mark.skipif("HISTORIES" not in os.environ, reason="told by `make histories`")
@pytest.mark.skipif(s3.program() is None, reason="versitygw, the S3 server of tests, is not installed")
@pytest.mark.timeout(7200)
def test_the_same_holds_with_a_store_in_a_bucket(
    hurried: None, nursery: forks.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3.serve(tmp_path / "s3") as server, s3_faults.proxy(server.endpoint) as proxy:
        for name, value in {**server.environment, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        _tell(_Teller(nursery, tmp_path, proxy), math.ceil(HISTORIES / 15))


def _tell(teller: _Teller, count: int) -> None:
    print(f"HISTORIES_SEED={SEED}")
    asked = os.environ.get("HISTORY")
    if asked:
        teller.tell_one(History.model_validate_json(asked))
    else:
        teller.tell_all(count)
    print(teller.summary())
    for number, broken in enumerate(teller.broken):
        (teller.folder / f"broken-{number}.txt").write_text(broken)
    if teller.broken:
        pytest.fail(
            f"{len(teller.broken)} histories; in {teller.folder}, and the first:\n{teller.broken[0]}", False
        )
    if count >= 100 and not asked:
        # Else the faults are so hard that nothing else is tried.
        assert teller.endings["receipt"] > count / 4, teller.summary()


class _Teller:
    """Tells histories, some at once; stops when a few are broken."""

    def __init__(
        self, nursery: forks.Nursery, folder: Path, network: s3_faults.S3FaultProxy | None = None
    ) -> None:
        self.folder = folder
        self.broken: list[str] = []
        self.endings: collections.Counter[str] = collections.Counter()
        self._nursery = nursery
        self._network = network
        self._numbers = iter(range(1_000_000))
        self._began = time.monotonic()

    def tell_all(self, count: int) -> None:
        # Some take a hundred times as long as others: whoever is done with one takes the next.
        to_tell = iter(range(count))
        threads = [
            threading.Thread(target=self._tell, args=(number, count, to_tell)) for number in range(AT_ONCE)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def tell_one(self, history: History) -> None:
        with stage(self._nursery, self.folder / "emulator", self._network) as one:
            self._tell_on(one, history)

    def _tell(self, number: int, count: int, to_tell: Iterator[int]) -> None:
        with stage(self._nursery, self.folder / f"emulator-{number}", self._network) as one:

            @seed(SEED + number)
            @settings(
                # Twice its share: of what may be, Hypothesis begins with a tenth of small ones.
                max_examples=2 * math.ceil(count / AT_ONCE),
                deadline=None,
                database=None,
                # What is broken is told as it was: processes do nothing twice in the same way.
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(HISTORY)
            def tell(history: History) -> None:
                if len(self.broken) < _BROKEN_AT_MOST and next(to_tell, None) is not None:
                    self._tell_on(one, history)

            tell()

    def _tell_on(self, one: Stage, history: History) -> None:
        try:
            told = one.tell(history, self.folder / f"history-{next(self._numbers)}")
        except Broken as error:
            self.broken.append(str(error))
        except Exception as error:
            self.broken.append(f"{type(error).__name__}: {error}\n\n{history.model_dump_json()}")
        else:
            self.endings[told.ended.get("failure") or told.ended["type"]] += 1

    def summary(self) -> str:
        ended = ", ".join(f"{count} {ending}" for ending, count in self.endings.most_common())
        return (
            f"{sum(self.endings.values())} histories in {time.monotonic() - self._began:.0f} s: {ended} "
            f"(HISTORIES_SEED={SEED})"
        )


# -- a sweep over models ---------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_sixteen_models_share_the_machines_also_when_orchestrators_are_killed(
    hurried: None, nursery: forks.Nursery, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    store = hurried_stage.store_of(folder)
    hurried_stage.fill(store)
    with stage(nursery, tmp_path / "emulator") as account:
        emulator = account.emulator
        emulator.images["*"] = pod_image(folder)

        def orchestrate(model: str) -> forks.Fork:
            arguments = {"history": str(folder), "run_id": model, "store_url": "", "model": model}
            arguments |= {"api_url": emulator.url, "api_key": emulator.api_key}
            process = nursery.fork("standins.hurried_stage:orchestrate", arguments, folder=folder)
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return process

        def said(model: str) -> dict[str, Any] | None:
            ended = folder / f"ended-{model}"
            return json.loads(ended.read_text()) if ended.exists() else None

        models = [recipe.name for recipe in hurried_stage.SWEEP]
        running = {model: orchestrate(model) for model in models}
        wait_for(lambda: len(emulator.pods()) >= DEFAULT_MAX_PODS, within_s=60)
        killed = [model for model in models if not said(model)][:10:3]
        for model in killed:
            running[model].kill()
        for model in killed:
            running[model].wait()
            running[model] = orchestrate(model)
        for process in running.values():
            process.wait(timeout=240)
        assert {model: said(model)["type"] for model in models} == dict.fromkeys(models, "receipt")
        assert most_at_once(emulator.pods()) == DEFAULT_MAX_PODS
        assert emulator.violations == []
        # Where an orchestrator was killed at the very end, the ledger has not heard of it yet.
        with hurried_stage.HurriedClient(emulator.api_key, emulator.url) as client:
            wait_for(lambda: [*sweep(client, store)] == [] and not any(e.open for e in entries(store)))
        check_end(folder, store, emulator.pods())
