"""`nanochat doctor`: does this machine have what the configured launcher and store need?

Every check says what was found and, where something is wrong, what to do about it. Nothing is
changed but for a small object that is put into the store and taken out again.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from dagster_nanochat.launch.base import Request
from dagster_nanochat.launch.images import SERVERLESS_IMAGE_ENV
from dagster_nanochat.launch.registry import ImageError, resolve_image
from dagster_nanochat.launch.runpod.errors import RunPodError
from dagster_nanochat.launch.runpod.launcher import configured_launcher
from dagster_nanochat.resources import LAUNCHER_ENV, LauncherResource
from nanochat.data.sources import load_sources
from nanochat.failures import AttemptFailed
from nanochat.machine import cpp_compiler, this_machine
from nanochat.recipes import quick
from nanochat.store import FileStore, ObjectStore, S3Store, StoreError, open_store
from nanochat.store.leases import new_token

# A checkpoint is written beside the one before it; d4 with its shards takes about 1.2 GB.
_WANTED_BYTES, _LEAST_BYTES = 5_000_000_000, 500_000_000
_CLOCK_OFF_S = 60


class Verdict(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "FAILED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    verdict: Verdict
    what: str
    found: str


def print_doctor() -> int:
    """Exit code 0, or 1 where something failed."""
    failed = 0
    for finding in examine():
        failed += finding.verdict is Verdict.FAILED
        print(f"{finding.verdict:<8} {finding.what}: {finding.found}", flush=True)
    if failed:
        print(f"{failed} failed: nothing can be relied on before that is mended", file=sys.stderr)
    return 1 if failed else 0


def examine() -> Iterator[Finding]:
    """Every finding, as it is made."""
    yield _history()
    yield from _recipes()
    if os.environ.get(LAUNCHER_ENV) == "runpod":
        yield from _runpod()
    else:
        yield _launcher()
    yield _compiler()
    yield _free_space("scratch folder", Path(tempfile.gettempdir()))
    try:
        store = open_store()
    except ValueError as error:
        yield Finding(verdict=Verdict.FAILED, what="store", found=str(error))
        return
    yield from _store(store)


def _history() -> Finding:
    what = "Dagster's history"
    home = os.environ.get("DAGSTER_HOME")
    if not home:
        found = "DAGSTER_HOME is not set, so runs are forgotten. `make setup` writes it into .env"
        return Finding(verdict=Verdict.WARNING, what=what, found=found)
    if not Path(home).is_absolute():
        found = f"DAGSTER_HOME={home} is not absolute, and Dagster refuses it. `make setup` puts .env right"
        return Finding(verdict=Verdict.FAILED, what=what, found=found)
    if not (Path(home) / "dagster.yaml").is_file():
        found = f"{home} has no dagster.yaml: Dagster's defaults hold. `make setup` puts the project's there"
        return Finding(verdict=Verdict.WARNING, what=what, found=found)
    return Finding(verdict=Verdict.OK, what=what, found=home)


def _recipes() -> Iterator[Finding]:
    from dagster_nanochat.partitions import recipe_book

    book = recipe_book()
    errors = [*load_sources().errors, *book.errors]
    for error in errors:
        yield Finding(verdict=Verdict.FAILED, what="recipes", found=error)
    if not errors:
        yield Finding(verdict=Verdict.OK, what="recipes", found=", ".join(book.recipes))


def _launcher() -> Finding:
    hardware = quick().hardware
    try:
        launcher = LauncherResource().create(FileStore(Path(tempfile.gettempdir())))
        offer = launcher.offers(Request.of(hardware))[0]
        chosen = launcher.hardware(hardware, offer)
    except (dg.Failure, AttemptFailed) as error:
        reason = error.description if isinstance(error, dg.Failure) else None
        return Finding(verdict=Verdict.FAILED, what="launcher", found=reason or str(error))
    memory_gib = this_machine().training_memory_bytes() / 2**30
    found = (
        f"{launcher.name} on {offer.name}, {memory_gib:.1f} GiB, about "
        f"{offer.flops_per_s / 1e12:.2f} TFLOP/s; {chosen.processes} x {chosen.threads} threads"
    )
    return Finding(verdict=Verdict.OK, what="launcher", found=found)


def _runpod() -> Iterator[Finding]:
    """Key, secrets, images, and what could be rented for the quick model now."""
    what = "launcher"
    hardware = quick().hardware
    try:
        launcher = configured_launcher(open_store(), hardware=hardware)
        missing = launcher.missing_secrets()
        yield Finding(
            verdict=Verdict.FAILED if missing else Verdict.OK,
            what="RunPod's secrets",
            found=f"{', '.join(missing)} missing: create them in RunPod's console (Settings, Secrets)"
            if missing
            else "there (or RunPod does not list them)",
        )
        yield Finding(verdict=Verdict.OK, what="training image", found=launcher.next_image())
        yield _serverless_image()
        best = launcher.offers(Request.of(hardware))[0]
    except (ValueError, RunPodError, AttemptFailed, StoreError) as error:
        yield Finding(verdict=Verdict.FAILED, what=what, found=str(error))
        return
    found = f"runpod; cheapest for the quick model: {best.name} at ${best.price_usd_per_h:.2f}/h"
    yield Finding(verdict=Verdict.OK, what=what, found=found)


def _serverless_image() -> Finding:
    what = "serverless image"
    named = os.environ.get(SERVERLESS_IMAGE_ENV)
    if not named:
        found = f"{SERVERLESS_IMAGE_ENV} is not set, so no endpoint is deployed"
        return Finding(verdict=Verdict.WARNING, what=what, found=found)
    if "{model}" in named:
        found = f"{named}: each model's own, which its deployment looks for"
        return Finding(verdict=Verdict.OK, what=what, found=found)
    try:
        return Finding(verdict=Verdict.OK, what=what, found=resolve_image(named).reference)
    except ImageError as error:
        return Finding(verdict=Verdict.FAILED, what=what, found=str(error))


def _compiler() -> Finding:
    path = cpp_compiler()
    if path:
        return Finding(verdict=Verdict.OK, what="C++ compiler", found=path)
    found = "none, so a CPU trains without torch.compile, which is slower (Debian: apt-get install g++)"
    return Finding(verdict=Verdict.WARNING, what="C++ compiler", found=found)


def _store(store: ObjectStore) -> Iterator[Finding]:
    try:
        yield Finding(verdict=Verdict.OK, what="store", found=_writes(store))
        yield _conditions(store)
    except StoreError as error:
        yield Finding(verdict=Verdict.FAILED, what="store", found=str(error))
        return
    if isinstance(store, S3Store):
        yield _clock(store)
    if isinstance(store, FileStore):
        yield _free_space("store's disk", store.root)


def _writes(store: ObjectStore) -> str:
    key = f"doctor/{new_token()}"
    try:
        store.put(key, b"written by nanochat doctor")
        if store.get(key) != b"written by nanochat doctor":
            raise StoreError(f"store {store.url} gives back other bytes than were put")
    finally:
        store.delete(key)
    return f"{store.url} can be written and read"


def _conditions(store: ObjectStore) -> Finding:
    caveat = store.caveat() if isinstance(store, S3Store) else None
    return Finding(
        verdict=Verdict.WARNING if caveat else Verdict.OK,
        what="store's conditional puts",
        found=caveat or "kept, so no stage has two builders",
    )


def _clock(store: S3Store) -> Finding:
    off_s = store.clock_difference_s()
    found = f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the store's"
    if abs(off_s) > _CLOCK_OFF_S:
        return Finding(verdict=Verdict.WARNING, what="clock", found=f"{found}: set it (NTP)")
    return Finding(verdict=Verdict.OK, what="clock", found=found)


def _free_space(what: str, folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free at {folder}"
    if free < _LEAST_BYTES:
        return Finding(verdict=Verdict.FAILED, what=what, found=f"{found}: make room")
    if free < _WANTED_BYTES:
        return Finding(verdict=Verdict.WARNING, what=what, found=f"{found}: enough for quick alone")
    return Finding(verdict=Verdict.OK, what=what, found=found)
