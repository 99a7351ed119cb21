"""`nanochat logs` and `nanochat cancel`: a stage's attempts, through the store alone."""

from __future__ import annotations

import datetime
import getpass
import sys
import time

from dagster_nanochat.reporting import find_recipe
from nanochat.attempts import attempts, describe, live_attempt, read_events, request_cancel
from nanochat.stages import TRAINING_STAGES, resolve
from nanochat.store import ObjectStore, open_store
from nanochat.store.leases import machine_name
from nanochat.supervisor import LEASE_TTL_S, STOP_GRACE_S


def print_logs(model: str, stage: str, *, follow: bool) -> int:
    """Exit code 0, or 1 where there is no such attempt; Ctrl-C ends the following, not the attempt."""
    store = open_store()
    prefix = _prefix(store, model, stage)
    if prefix is None:
        return 1
    tokens = attempts(store, prefix)
    if not tokens:
        print(f"error: {stage} of {model} has not been tried in {store.url}", file=sys.stderr)
        return 1
    live = live_attempt(store, prefix)
    token = live.token if live is not None and live.token in tokens else tokens[-1]
    try:
        for event in read_events(store, prefix, token, follow=follow):
            line = describe(event, stage)
            if line is not None:
                moment = datetime.datetime.fromtimestamp(event.get("time", 0)).astimezone()
                print(f"{moment:%H:%M:%S}  {line}", flush=True)
    except KeyboardInterrupt:
        print(f"({token} goes on; `nanochat cancel` would end it)", file=sys.stderr)
    return 0


def cancel_attempt(model: str, stage: str) -> int:
    """Exit code 0 once the attempt has ended; 1 where none is live, or where it does not end."""
    store = open_store()
    prefix = _prefix(store, model, stage)
    if prefix is None:
        return 1
    lease = live_attempt(store, prefix)
    if lease is None:
        print(f"error: nothing works on {stage} of {model} now", file=sys.stderr)
        return 1
    request_cancel(store, prefix, lease.token, f"{getpass.getuser()} on {machine_name()}")
    print(
        f"asked {lease.describe()} to stop attempt {lease.token} of {stage} after a checkpoint …", flush=True
    )
    deadline = time.monotonic() + STOP_GRACE_S + LEASE_TTL_S
    while (live := live_attempt(store, prefix)) is not None and live.token == lease.token:
        if time.monotonic() > deadline:
            print(
                f"error: attempt {lease.token} has not stopped within {STOP_GRACE_S + LEASE_TTL_S:.0f} s; "
                f"see `nanochat logs --model {model} --stage {stage}`",
                file=sys.stderr,
            )
            return 1
        time.sleep(0.5)
    print(f"{stage} of {model} has stopped; the next run goes on from its last checkpoint")
    return 0


def _prefix(store: ObjectStore, model: str, stage: str) -> str | None:
    """Where the stage lies in the store; None after saying why there is no such stage."""
    recipe = find_recipe(model)
    if recipe is None:
        return None
    states = resolve(recipe, store)
    if stage not in TRAINING_STAGES or stage not in states:
        known = ", ".join(name for name in TRAINING_STAGES if name in states)
        print(f"error: {model} has no training stage {stage!r}; it has: {known}", file=sys.stderr)
        return None
    if states[stage].fingerprint is None:
        print(f"error: {stage} of {model} needs: {'; '.join(states[stage].needs)}", file=sys.stderr)
        return None
    return states[stage].prefix
