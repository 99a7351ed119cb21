"""The weights of a worker: baked into its image, or pulled from the store by what its receipt says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from nanochat.inference.chat import STAGE_OF, Source, built_receipt, open_engine, receipt_engine
from nanochat.store.digests import digest_file
from nanochat.store.documents import Document
from nanochat.store.layout import stage_prefix
from nanochat.store.objects import ObjectStore
from nanochat.store.receipts import Receipt, read_receipt

if TYPE_CHECKING:
    from nanochat.inference.engine import Engine

CHECKPOINT = "checkpoint.json"


class WeightsError(ValueError):
    """There are no such weights, or they are not what they should be: why, and the next step."""


class BakedFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BakedCheckpoint(Document):
    """`checkpoint.json` of a folder `checkpoint/<model>/`: what its files are, and of which receipt."""

    schema_name: ClassVar[str] = "nanochat.checkpoint"
    model: str
    stage: str
    fingerprint: str
    receipt_sha256: str
    files: dict[str, BakedFile]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """An engine, and what it was loaded from. chat: trained to answer, not only to continue a text."""

    engine: Engine
    model: str
    stage: str
    fingerprint: str
    receipt_sha256: str

    @property
    def chat(self) -> bool:
        return self.stage != STAGE_OF["base"]

    def document(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "receipt_sha256": self.receipt_sha256,
        }


def baked_weights(folder: Path, *, receipt_sha256: str | None = None) -> Weights:
    """Of a folder as `checkpoint/<model>/` is, of the receipt with that digest where one is given. Raises
    WeightsError naming the file that is missing or not what `checkpoint.json` says, DocumentError where that
    cannot be read."""
    listed = folder / CHECKPOINT
    if not listed.is_file():
        raise WeightsError(
            f"no weights are baked into this image ({listed} is missing): build it with a model's "
            "checkpoint/ folder, or set NANOCHAT_MODEL and NANOCHAT_STORE"
        )
    baked = BakedCheckpoint.from_bytes(listed.read_bytes(), str(listed))
    if receipt_sha256 not in (None, baked.receipt_sha256):
        raise WeightsError(
            f"this image has the weights of {baked.model}'s receipt {baked.receipt_sha256[:12]}, those of "
            f"{str(receipt_sha256)[:12]} are asked for: build it again"
        )
    for name, file in baked.files.items():
        path = folder / name
        if not path.is_file() or digest_file(path) != file.sha256:
            raise WeightsError(f"{path} is not the file that {listed} names: build the image again")
    return Weights(
        engine=open_engine(folder),
        model=baked.model,
        stage=baked.stage,
        fingerprint=baked.fingerprint,
        receipt_sha256=baked.receipt_sha256,
    )


def stored_weights(
    store: ObjectStore, model: str, source: Source, *, fingerprint: str | None, receipt_sha256: str | None
) -> Weights:
    """Of a model's stage: of `fingerprint` and, where that was built more than once, of the receipt with
    that digest; the current one where neither is given. Raises ChatError, WeightsError, StoreError."""
    stage = STAGE_OF[source]
    if fingerprint is None:
        receipt = built_receipt(store, model, source)
    else:
        receipt = _receipt(store, stage, fingerprint, receipt_sha256)
    if receipt_sha256 not in (None, receipt.digest()):
        raise WeightsError(
            f"the receipt of {stage} {receipt.fingerprint[:12]} in {store.url} is {receipt.digest()[:12]}, "
            f"not {str(receipt_sha256)[:12]}: the endpoint was made for another one; materialize it again"
        )
    return Weights(
        engine=receipt_engine(store, receipt),
        model=model,
        stage=stage,
        fingerprint=receipt.fingerprint,
        receipt_sha256=receipt.digest(),
    )


def _receipt(store: ObjectStore, stage: str, fingerprint: str, sha256: str | None) -> Receipt:
    """The current one of the fingerprint, or an earlier one that has the digest."""
    current = read_receipt(store, stage, fingerprint)
    if current is None:
        raise WeightsError(f"{store.url} has no receipt of {stage} {fingerprint[:12]}")
    if sha256 in (None, current.digest()):
        return current
    kept = store.list(f"{stage_prefix(stage, fingerprint)}/receipts/")
    earlier = (Receipt.read(store, info.key) for info in kept)
    return next((receipt for receipt in earlier if receipt.digest() == sha256), current)
