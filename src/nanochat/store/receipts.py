"""Receipts: the only thing that makes a stage complete.

A receipt lists every output with size and digest, the digests of its inputs' receipts, metrics,
and what the work ran on. It is written last. `receipt.json` is the current one, swapped by a
conditional put; every receipt ever written stays under `receipts/<token>.json`. A model's pointer
says which fingerprint of a stage is that model's, so two models whose stage is the same share it.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from nanochat.store.digests import digest_bytes, digest_file
from nanochat.store.documents import Document, DocumentError
from nanochat.store.layout import pointer_key, stage_prefix
from nanochat.store.objects import ObjectNotFound, ObjectStore, PreconditionFailed


class FileRef(BaseModel):
    """A stored file: where, how large, and its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def name(self) -> str:
        return self.key.rsplit("/", 1)[-1]


class FileEntry(BaseModel):
    """A file of a folder. Names are plain: a list of them cannot point out of the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """The file as it is now."""
        return cls(name=path.name, size_bytes=path.stat().st_size, sha256=digest_file(path))


class InputRef(BaseModel):
    """An upstream stage as it was when this stage was built."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    fingerprint: str
    receipt_sha256: str


class AttemptCost(BaseModel):
    """What one attempt took. `dollars` is 0 on one's own machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    token: str
    seconds: float
    dollars: float = 0.0
    outcome: str = "succeeded"


class Receipt(Document):
    """See the module's text."""

    schema_name: ClassVar[str] = "nanochat.receipt"

    stage: str
    stage_version: int
    fingerprint: str
    token: str
    created_at: datetime.datetime
    seconds: float
    inputs: tuple[InputRef, ...] = ()
    data: dict[str, str] = Field(default_factory=dict)
    outputs: tuple[FileRef, ...]
    metrics: dict[str, float] = Field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)
    samples: tuple[dict[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    attempts: tuple[AttemptCost, ...] = ()
    code_revision: str | None = None
    sources_sha256: str | None = None
    image_digest: str | None = None
    hardware: dict[str, str | int | float] = Field(default_factory=dict)
    events_key: str | None = None
    _sha256: str = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        self._sha256 = digest_bytes(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Self:
        receipt = super().from_bytes(data, name)
        receipt._sha256 = digest_bytes(data)
        return receipt

    @property
    def dollars(self) -> float:
        return sum(attempt.dollars for attempt in self.attempts)

    def output(self, name: str) -> FileRef:
        """The output file called `name`. Raises KeyError naming what there is."""
        for file in self.outputs:
            if file.name == name:
                return file
        raise KeyError(f"stage {self.stage} has no output {name!r}; it has {[f.name for f in self.outputs]}")

    def digest(self) -> str:
        """SHA-256 of the stored bytes, of those that will be stored where it was just made.

        What was stored by an older version is not written again to be digested: a field that came
        later would change it, and with it every stage that was built on this receipt.
        """
        return self._sha256


class Pointer(Document):
    """Which fingerprint of a stage belongs to a model."""

    schema_name: ClassVar[str] = "nanochat.pointer"
    model: str
    stage: str
    fingerprint: str


def read_receipt(store: ObjectStore, stage: str, fingerprint: str) -> Receipt | None:
    """The current receipt of a stage's fingerprint, or None.

    Raises DocumentError on a damaged one, and on one of another stage or fingerprint under this key.
    """
    key = f"{stage_prefix(stage, fingerprint)}/receipt.json"
    try:
        receipt = Receipt.read(store, key)
    except ObjectNotFound:
        return None
    if (receipt.stage, receipt.fingerprint) != (stage, fingerprint):
        raise DocumentError(
            f"{key} is the receipt of {receipt.stage} {receipt.fingerprint}, where that of {stage} "
            f"{fingerprint} is due: it was copied or moved here. Move it away and build the stage again."
        )
    return receipt


def write_receipt(store: ObjectStore, receipt: Receipt) -> None:
    """Keep the receipt under its token, then make it the current one."""
    prefix = stage_prefix(receipt.stage, receipt.fingerprint)
    data = receipt.to_bytes()
    store.put(f"{prefix}/receipts/{receipt.token}.json", data)
    key = f"{prefix}/receipt.json"
    while True:
        current = store.head(key)
        try:
            if current is None:
                store.put(key, data, if_absent=True)
            else:
                store.put(key, data, if_match=current.etag)
        except PreconditionFailed:
            continue
        return


def point(store: ObjectStore, model: str, stage: str, fingerprint: str) -> None:
    """Make `fingerprint` the model's current one of `stage`."""
    pointer = Pointer(model=model, stage=stage, fingerprint=fingerprint)
    key = pointer_key(model, stage)
    data = pointer.to_bytes()
    info = store.head(key)
    if info is None or store.get(key) != data:
        store.put(key, data)


def read_pointer(store: ObjectStore, model: str, stage: str) -> Pointer | None:
    """Which fingerprint is the model's current one of `stage`, or None. Raises DocumentError for a
    damaged pointer and for that of another model or stage."""
    key = pointer_key(model, stage)
    try:
        pointer = Pointer.read(store, key)
    except ObjectNotFound:
        return None
    if (pointer.model, pointer.stage) != (model, stage):
        raise DocumentError(f"{key} is the pointer of {pointer.model}'s {pointer.stage}")
    return pointer


def current_receipt(store: ObjectStore, model: str, stage: str) -> Receipt | None:
    """The receipt that the model's pointer leads to, or None."""
    pointer = read_pointer(store, model, stage)
    return None if pointer is None else read_receipt(store, stage, pointer.fingerprint)


def missing_outputs(store: ObjectStore, receipt: Receipt) -> list[str]:
    """Outputs that are absent or of another size: a cheap verification, without reading content."""
    problems = []
    for file in receipt.outputs:
        info = store.head(file.key)
        if info is None:
            problems.append(f"{file.key} is gone")
        elif info.size != file.size_bytes:
            problems.append(f"{file.key} has {info.size} bytes, the receipt says {file.size_bytes}")
    return problems
