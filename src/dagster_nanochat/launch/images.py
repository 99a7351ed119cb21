"""The images that rented machines run, as the store has them pinned."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, ClassVar, Literal

from nanochat.store import ObjectStore
from nanochat.store.documents import Document
from nanochat.store.layout import image_key
from nanochat.store.leases import utc_now

if TYPE_CHECKING:
    from dagster_nanochat.launch.registry import PinnedImage

ImageKind = Literal["training"]
# The name of the image of training machines, with a tag or a digest.
TRAINING_IMAGE_ENV = "NANOCHAT_TRAINING_IMAGE"


class ImageRecord(Document):
    """Stored as `images/<kind>.json`. image: the name that was asked for; reference: registry/name@digest,
    which is what a machine is told to pull; size_bytes: what it pulls, compressed."""

    schema_name: ClassVar[str] = "nanochat.image"

    image: str
    reference: str
    digest: str
    registry: str
    size_bytes: int
    created: str | None
    resolved_at: datetime.datetime


def record_image(store: ObjectStore, kind: ImageKind, image: PinnedImage) -> ImageRecord:
    """Make `image` the one that machines of this kind run."""
    record = ImageRecord(
        image=str(image.name),
        reference=image.reference,
        digest=image.digest,
        registry=image.name.registry,
        size_bytes=image.size_bytes,
        created=image.created,
        resolved_at=utc_now(),
    )
    store.put(image_key(kind), record.to_bytes())
    return record


def recorded_image(store: ObjectStore, kind: ImageKind) -> ImageRecord | None:
    """The image that machines of this kind run; None where none was pinned yet."""
    found = ImageRecord.read_with_etag(store, image_key(kind))
    return found[0] if found else None
