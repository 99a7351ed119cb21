"""The images that rented machines run, as the store has them pinned."""

from __future__ import annotations

import datetime
import subprocess
from typing import TYPE_CHECKING, ClassVar

from nanochat.store import ObjectStore, project_root
from nanochat.store.documents import Document
from nanochat.store.layout import image_key
from nanochat.store.leases import utc_now

if TYPE_CHECKING:
    from dagster_nanochat.launch.registry import PinnedImage

# The name of the image of training machines, with a tag or a digest.
TRAINING_IMAGE_ENV = "NANOCHAT_TRAINING_IMAGE"
# And of the image of an endpoint's workers; {model} in it is replaced.
SERVERLESS_IMAGE_ENV = "NANOCHAT_SERVERLESS_IMAGE"
TRAINING = "training"
# What an image's label says of the weights that are baked into it: their receipt's digest.
RECEIPT_LABEL = "nanochat.receipt_sha256"
_BUILD_SCRIPT = "build_and_push_serverless.sh"
_LAST_LINES = 20


class ImageRecord(Document):
    """Stored as `images/<kind>.json`. image: the name that was asked for; reference: registry/name@digest,
    which is what a machine is told to pull; size_bytes: what it pulls, compressed. receipt: of the weights
    that are baked into it; None where there are none."""

    schema_name: ClassVar[str] = "nanochat.image"

    image: str
    reference: str
    digest: str
    registry: str
    size_bytes: int
    created: str | None
    resolved_at: datetime.datetime
    receipt: str | None = None


def serverless_kind(model: str) -> str:
    """What the image of a model's endpoint is kept under."""
    return f"serverless/{model}"


def record_image(store: ObjectStore, kind: str, image: PinnedImage) -> ImageRecord:
    """Make `image` the one that machines of this kind run: `TRAINING` ones, or a model's endpoint's."""
    record = ImageRecord(
        image=str(image.name),
        reference=image.reference,
        digest=image.digest,
        registry=image.name.registry,
        size_bytes=image.size_bytes,
        created=image.created,
        resolved_at=utc_now(),
        receipt=image.labels.get(RECEIPT_LABEL),
    )
    store.put(image_key(kind), record.to_bytes())
    return record


def recorded_image(store: ObjectStore, kind: str) -> ImageRecord | None:
    """The image that machines of this kind run; None where none was pinned yet."""
    found = ImageRecord.read_with_etag(store, image_key(kind))
    return found[0] if found else None


class BuildFailed(RuntimeError):
    """An image was not built, or not pushed: with the last lines of what was said."""


def build_serverless_image(model: str, image: str) -> None:
    """Build the image of an endpoint's workers, with the weights of `checkpoint/<model>/` in it, and push it.
    Raises BuildFailed."""
    script = project_root() / _BUILD_SCRIPT
    done = subprocess.run(
        [str(script), image, model],
        cwd=script.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-_LAST_LINES:])
        raise BuildFailed(f"{_BUILD_SCRIPT} {image} {model} ended with {done.returncode}:\n{last}")
