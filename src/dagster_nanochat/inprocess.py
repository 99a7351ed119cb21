"""Stages that the orchestrator builds itself: the tokenizer and the conversation data.

They are light, so they need no machine and no supervisor; identity, lease and receipt are the same
as for every other stage.
"""

from __future__ import annotations

import dataclasses
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_nanochat import holding
from dagster_nanochat.guards import StageConfig
from dagster_nanochat.holding import wait_for_lease
from dagster_nanochat.lifecycle import (
    BuiltStage,
    fresh_stage,
    record_identity,
    require_upstream,
    warn_of_store,
)
from nanochat.failures import AttemptFailed
from nanochat.recipes import Recipe
from nanochat.sources_digest import code_revision, sources_digest
from nanochat.stages import StageState, resolve
from nanochat.store import ObjectStore, project_root
from nanochat.store.digests import digest_file
from nanochat.store.leases import LeaseKeeper, LeaseLost, new_token, utc_now
from nanochat.store.receipts import (
    AttemptCost,
    FileRef,
    InputRef,
    Receipt,
    missing_outputs,
    point,
    read_receipt,
    write_receipt,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What a build function left in its work folder, and what it measured."""

    files: tuple[Path, ...]
    metrics: Mapping[str, float]
    tables: Mapping[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def build_stage(
    context: dg.AssetExecutionContext,
    stage: str,
    recipe: Recipe,
    store: ObjectStore,
    config: StageConfig,
    build: Callable[[Path], Made],
) -> BuiltStage:
    """Bring the stage to a good receipt: `build(work folder)` makes its files. Raises dg.Failure."""
    states = resolve(recipe, store)
    state = states[stage]
    require_upstream(state, states, recipe.name)
    found = fresh_stage(
        context, recipe, store, state, forced=config.forced(context, stage), seen=state.receipt
    )
    if found:
        return found
    assert state.fingerprint is not None
    warn_of_store(context, store)
    record_identity(store, state)
    token = new_token()
    keeper = LeaseKeeper(
        store,
        f"{state.prefix}/lease.json",
        token=token,
        owner=f"run {context.run.run_id[:8]}",
        ttl_s=holding.HELD_TTL_S,
    )
    try:
        with wait_for_lease(
            context, [keeper], lambda lease: f"{stage} of {recipe.name} waits: {lease.describe()} builds it"
        ):
            receipt = _built_meanwhile(store, state)
            built = receipt is None
            if receipt is None:
                receipt = _build(states, state, store, token, keeper, build)
    except AttemptFailed as error:
        raise dg.Failure(f"{stage} of {recipe.name}: {error}", allow_retries=False) from error
    except LeaseLost as error:
        raise dg.Failure(
            f"{stage} of {recipe.name}: somebody else builds it by now, so what was made here is not kept "
            f"({error}); run it again",
            allow_retries=False,
        ) from error
    point(store, recipe.name, stage, state.fingerprint)
    return BuiltStage(stage=stage, fingerprint=state.fingerprint, receipt=receipt, built=built)


def _built_meanwhile(store: ObjectStore, state: StageState) -> Receipt | None:
    """The stage's receipt if it is another than before the lease was waited for, and holds."""
    assert state.fingerprint is not None
    receipt = read_receipt(store, state.spec.name, state.fingerprint)
    if receipt is None or receipt == state.receipt or missing_outputs(store, receipt):
        return None
    return receipt


def _build(
    states: Mapping[str, StageState],
    state: StageState,
    store: ObjectStore,
    token: str,
    lease: LeaseKeeper,
    build: Callable[[Path], Made],
) -> Receipt:
    """Make the stage's files, keep them, write the receipt. Raises LeaseLost instead of the last."""
    assert state.fingerprint is not None
    assert state.identity is not None
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"nanochat-{state.spec.name}-") as folder:
        made = build(Path(folder))
        outputs = tuple(_keep(store, f"{state.prefix}/output/{token}", path) for path in made.files)
    seconds = time.monotonic() - start
    receipt = Receipt(
        stage=state.spec.name,
        stage_version=state.spec.version,
        fingerprint=state.fingerprint,
        token=token,
        created_at=utc_now(),
        seconds=seconds,
        inputs=tuple(
            InputRef(stage=name, fingerprint=upstream.fingerprint, receipt_sha256=upstream.digest())
            for name in state.spec.upstream
            if (upstream := states[name].receipt) is not None
        ),
        data=state.identity.data,
        outputs=outputs,
        metrics=dict(made.metrics),
        tables=dict(made.tables),
        warnings=made.warnings,
        attempts=(AttemptCost(token=token, seconds=seconds),),
        code_revision=code_revision(project_root()),
        sources_sha256=sources_digest(state.spec.sources),
        hardware={"host": platform.node(), "machine": platform.machine()},
    )
    lease.renew()
    write_receipt(store, receipt)
    return receipt


def _keep(store: ObjectStore, prefix: str, path: Path) -> FileRef:
    reference = FileRef(key=f"{prefix}/{path.name}", size_bytes=path.stat().st_size, sha256=digest_file(path))
    store.put_file(reference.key, path, move=True)
    return reference
