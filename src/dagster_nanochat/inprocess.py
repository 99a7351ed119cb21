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

from dagster_nanochat.guards import StageConfig
from dagster_nanochat.lifecycle import BuiltStage, record_identity, require_upstream
from nanochat.recipes import Recipe
from nanochat.sources_digest import code_revision, sources_digest
from nanochat.stages import Status, resolve
from nanochat.store import ObjectStore, project_root
from nanochat.store.digests import digest_file
from nanochat.store.leases import LeaseHeld, LeaseKeeper, new_token, utc_now
from nanochat.store.receipts import AttemptCost, FileRef, InputRef, Receipt, point, write_receipt

_LEASE_TTL_S = 600.0


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
    assert state.fingerprint is not None
    assert state.identity is not None
    record_identity(store, state)
    if state.status is Status.FRESH and not config.forced(context, stage):
        assert state.receipt is not None
        point(store, recipe.name, stage, state.fingerprint)
        return BuiltStage(stage=stage, fingerprint=state.fingerprint, receipt=state.receipt, built=False)
    token = new_token()
    lease = LeaseKeeper(
        store,
        f"{state.prefix}/lease.json",
        token=token,
        owner=f"run {context.run.run_id[:8]}",
        ttl_s=_LEASE_TTL_S,
    )
    try:
        lease.take()
    except LeaseHeld as held:
        raise dg.Failure(
            f"{stage} of {recipe.name} is being built by {held.lease.describe()}; wait for it, or until its "
            f"lease ends at {held.lease.expires_at:%H:%M:%S} UTC",
            allow_retries=False,
        ) from held
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix=f"nanochat-{stage}-") as folder:
            made = build(Path(folder))
            outputs = tuple(_keep(store, f"{state.prefix}/output/{token}", path) for path in made.files)
        seconds = time.monotonic() - start
        receipt = Receipt(
            stage=stage,
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
        write_receipt(store, receipt)
    finally:
        lease.release()
    point(store, recipe.name, stage, state.fingerprint)
    return BuiltStage(stage=stage, fingerprint=state.fingerprint, receipt=receipt, built=True)


def _keep(store: ObjectStore, prefix: str, path: Path) -> FileRef:
    reference = FileRef(key=f"{prefix}/{path.name}", size_bytes=path.stat().st_size, sha256=digest_file(path))
    store.put_file(reference.key, path, move=True)
    return reference
