"""The stages of a model: what each is made of, and whether it is fresh.

A stage is fresh if its receipt is there, its outputs are there, and its inputs' receipts are still
the current ones. Nothing else counts: not a key that exists, not a process that ended, not a badge.
Everything here is derived from the recipe and the store; no orchestrator is asked.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from nanochat.data.identity import DataNeeded, conversation_digests, shard_digests
from nanochat.recipes import Recipe
from nanochat.store import ObjectStore
from nanochat.store.documents import Document, DocumentError
from nanochat.store.fingerprint import encode, fingerprint
from nanochat.store.layout import stage_prefix
from nanochat.store.leases import Lease, read_lease, utc_now
from nanochat.store.objects import ObjectNotFound
from nanochat.store.receipts import Receipt, missing_outputs, read_pointer, read_receipt

# Fields that say how a stage reports, not what it makes: they enter no fingerprint.
_REPORTING = frozenset({"eval_every", "checkpoint_every", "sample_prompts", "ngram_baselines"})


class Status(enum.StrEnum):
    FRESH = "fresh"
    STALE = "stale"
    MISSING = "missing"
    RUNNING = "running"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage. `version` is raised by hand when the meaning of its code changes.

    sections: the recipe sections that decide the result. data: digests of what it reads beside its
    upstream stages (raises DataNeeded naming what is not there). sources: modules of this package,
    and the crate's, whose digest the receipt records.
    """

    name: str
    version: int
    upstream: tuple[str, ...]
    sections: Callable[[Recipe], Mapping[str, Any]]
    data: Callable[[Recipe, ObjectStore], Mapping[str, str]]
    enabled: Callable[[Recipe], bool]
    sources: tuple[str, ...]


def _identity_fields(section: Any, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    return {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(section)
        if field.name not in _REPORTING | without
    }


def _mixture(section: Any, *fields: str) -> dict[str, Any]:
    """Of a user's file only that there is one: its digest is among the data, its path is nobody's."""
    mixture = [
        dataclasses.replace(part, task="jsonl") if part.task.startswith("jsonl:") else part
        for part in section.mixture
    ]
    return {"mixture": mixture, **{name: getattr(section, name) for name in ("seed", *fields)}}


_TRAINING_SOURCES = (
    *("model", "optim", "training", "tokenizer.py", "rendering.py"),
    *("data/parquet.py", "data/conversations.py", "evaluation/bpb.py"),
)
_DATA_SOURCES = (
    *("data/tasks", "data/mixture.py", "data/conversations.py", "data/questions.py"),
    "data/stage_data.py",
)
_MIXTURE_ONLY = frozenset({"mixture"})
_SFT_DATA_FIELDS = frozenset({"mixture", "mmlu_task", "arc_easy_task", "eval_questions", "skills"})

STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec(
            name="tokenizer",
            version=1,
            upstream=(),
            # How many shards is in the data digests: naming one more shard changes those.
            sections=lambda r: {"tokenizer": _identity_fields(r.tokenizer, without=frozenset({"shards"}))},
            data=lambda r, store: shard_digests(store, r, count=r.tokenizer.shards),
            enabled=lambda r: True,
            sources=("tokenizer.py", "tokenizer_training.py", "../../rustbpe/src"),
        ),
        StageSpec(
            name="base",
            version=1,
            upstream=("tokenizer",),
            sections=lambda r: {"model": r.model, "base": _identity_fields(r.base)},
            data=lambda r, store: shard_digests(store, r, count=r.data.shards, validation=True),
            enabled=lambda r: True,
            sources=(*_TRAINING_SOURCES, "evaluation/ngram.py"),
        ),
        StageSpec(
            name="midtrain_data",
            version=1,
            upstream=(),
            sections=lambda r: {"midtrain": _mixture(r.midtrain)},
            data=lambda r, store: conversation_digests(store, r, "midtrain"),
            enabled=lambda r: r.midtrain is not None,
            sources=_DATA_SOURCES,
        ),
        StageSpec(
            name="midtrain",
            version=1,
            upstream=("tokenizer", "base", "midtrain_data"),
            sections=lambda r: {"midtrain": _identity_fields(r.midtrain, without=_MIXTURE_ONLY)},
            data=lambda r, store: {},
            enabled=lambda r: r.midtrain is not None,
            sources=_TRAINING_SOURCES,
        ),
        StageSpec(
            name="sft_data",
            version=1,
            upstream=(),
            sections=lambda r: {
                "sft": _mixture(r.sft, "mmlu_task", "arc_easy_task", "eval_questions", "skills")
            },
            data=lambda r, store: conversation_digests(store, r, "sft"),
            enabled=lambda r: r.sft is not None,
            sources=(*_DATA_SOURCES, "data/heldout.py"),
        ),
        StageSpec(
            name="sft",
            version=1,
            upstream=("tokenizer", "midtrain", "sft_data"),
            sections=lambda r: {"sft": _identity_fields(r.sft, without=_SFT_DATA_FIELDS)},
            data=lambda r, store: {},
            enabled=lambda r: r.sft is not None,
            sources=(*_TRAINING_SOURCES, "evaluation", "inference"),
        ),
    )
}

TRAINING_STAGES = ("base", "midtrain", "sft")


class Identity(Document):
    """What a fingerprint was made of, kept beside the stage so that a later difference has a name."""

    schema_name: ClassVar[str] = "nanochat.identity"
    stage: str
    stage_version: int
    sections: dict[str, Any]
    upstream: dict[str, str]
    data: dict[str, str]

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            stage=self.stage,
            version=self.stage_version,
            sections=self.sections,
            upstream=self.upstream,
            data=self.data,
        )

    def key(self) -> str:
        return f"{stage_prefix(self.stage, self.fingerprint)}/identity.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageState:
    """A stage of a model as the store shows it now.

    good: its receipt is there, its outputs are, and its inputs are the current ones; while somebody
    builds it anew it is `running`, and may be good all the same.
    """

    spec: StageSpec
    identity: Identity | None
    fingerprint: str | None
    status: Status
    good: bool
    reasons: tuple[str, ...]
    needs: tuple[str, ...]
    receipt: Receipt | None
    lease: Lease | None

    @property
    def prefix(self) -> str:
        assert self.fingerprint is not None
        return stage_prefix(self.spec.name, self.fingerprint)


def resolve(recipe: Recipe, store: ObjectStore) -> dict[str, StageState]:
    """Every enabled stage of the recipe, upstream first."""
    states: dict[str, StageState] = {}
    for spec in STAGES.values():
        if spec.enabled(recipe):
            states[spec.name] = _resolve_stage(spec, recipe, store, states)
    return states


def _resolve_stage(
    spec: StageSpec, recipe: Recipe, store: ObjectStore, states: Mapping[str, StageState]
) -> StageState:
    waits_for = [name for name in spec.upstream if not states[name].fingerprint]
    needs = [f"{', '.join(waits_for)} first"] if waits_for else []
    data: Mapping[str, str] = {}
    try:
        data = spec.data(recipe, store)
    except DataNeeded as error:
        needs = [*error.needs, *needs]
    previous = _pointed_identity(store, recipe.name, spec.name)
    if needs:
        return StageState(
            spec=spec,
            identity=None,
            fingerprint=None,
            status=Status.STALE if previous else Status.MISSING,
            good=False,
            reasons=tuple(needs),
            needs=tuple(needs),
            receipt=None,
            lease=None,
        )
    identity = Identity(
        stage=spec.name,
        stage_version=spec.version,
        sections=encode(spec.sections(recipe), spec.name),
        upstream={name: states[name].fingerprint or "" for name in spec.upstream},
        data=dict(data),
    )
    digest = identity.fingerprint
    receipt = read_receipt(store, spec.name, digest)
    lease = read_lease(store, f"{stage_prefix(spec.name, digest)}/lease.json")
    live = lease if lease and lease.live(utc_now()) else None
    reasons: list[str] = []
    if receipt:
        reasons += missing_outputs(store, receipt)
        reasons += _changed_inputs(receipt, states)
    elif previous:
        reasons += difference(previous, identity)
    good = receipt is not None and not reasons
    if live:
        status = Status.RUNNING
        reasons.insert(0, f"{live.describe()} is building it")
    elif good:
        status = Status.FRESH
    elif receipt or previous:
        status = Status.STALE
    else:
        status = Status.MISSING
    return StageState(
        spec=spec,
        identity=identity,
        fingerprint=digest,
        status=status,
        good=good,
        reasons=tuple(reasons),
        needs=(),
        receipt=receipt,
        lease=live,
    )


def _changed_inputs(receipt: Receipt, states: Mapping[str, StageState]) -> list[str]:
    changed = []
    for used in receipt.inputs:
        state = states.get(used.stage)
        current = state.receipt if state else None
        if state is None or not state.good:
            changed.append(f"its input {used.stage} is {state.status if state else 'switched off'}")
        elif current is None or current.digest() != used.receipt_sha256:
            changed.append(
                f"its input {used.stage} was rebuilt (receipt {used.receipt_sha256[:6]} → "
                f"{current.digest()[:6] if current else 'none'})"
            )
    return changed


def _pointed_identity(store: ObjectStore, model: str, stage: str) -> Identity | None:
    pointer = read_pointer(store, model, stage)
    if pointer is None:
        return None
    key = f"{stage_prefix(stage, pointer.fingerprint)}/identity.json"
    try:
        identity = Identity.read(store, key)
    except ObjectNotFound:
        return None
    if identity.fingerprint != pointer.fingerprint:
        raise DocumentError(f"{key} is the identity of {identity.stage} {identity.fingerprint[:12]}")
    return identity


def difference(old: Identity, new: Identity) -> list[str]:
    """What changed between two identities of a stage, one line a field: ``base.steps: 1600 → 1700``."""
    changes = []
    if old.stage_version != new.stage_version:
        changes.append(f"version of stage {new.stage}: {old.stage_version} → {new.stage_version}")
    before, after = _flatten(old.sections), _flatten(new.sections)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            changes.append(f"{name}: {before.get(name, '(absent)')} → {after.get(name, '(absent)')}")
    changes += [
        f"upstream {name} changed" for name in new.upstream if old.upstream.get(name) != new.upstream[name]
    ]
    changed_data = [
        name for name in sorted(old.data.keys() | new.data.keys()) if old.data.get(name) != new.data.get(name)
    ]
    if len(changed_data) > 4:
        changes.append(f"data changed: {', '.join(changed_data[:3])} and {len(changed_data) - 3} more")
    else:
        changes += [f"data {name} changed" for name in changed_data]
    return changes


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and set(value) == {"float"}:
        return {prefix: value["float"]}
    if isinstance(value, dict):
        items = [(f"{prefix}.{key}" if prefix else key, item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(f"{prefix}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {prefix: str(value)}
    flat: dict[str, str] = {}
    for name, item in items:
        flat.update(_flatten(item, name))
    return flat
