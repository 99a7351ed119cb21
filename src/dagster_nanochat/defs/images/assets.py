"""The images of rented machines, pinned by digest."""

import os

import dagster as dg
from pydantic import Field

from dagster_nanochat.launch.images import TRAINING_IMAGE_ENV, record_image
from dagster_nanochat.resources import LauncherResource, StoreResource


class ImageConfig(dg.Config):
    """Which image."""

    image: str | None = Field(
        default=None, description=f"registry/name:tag, or with @sha256:…; default: {TRAINING_IMAGE_ENV}"
    )


@dg.asset(group_name="images", kinds={"docker"}, tags={"stage": "images"})
def nanochat_training_image(
    context: dg.AssetExecutionContext, config: ImageConfig, store: StoreResource, launcher: LauncherResource
) -> dg.MaterializeResult:
    """What rented machines train with: the image's name resolved to its digest, for the launcher to read."""
    from dagster_nanochat.launch.registry import ImageError, resolve_image

    opened = store.open()
    image = config.image or os.environ.get(TRAINING_IMAGE_ENV)
    if not image:
        if launcher.create(opened).name == "local":
            context.log.info(f"the local launcher needs no image ({TRAINING_IMAGE_ENV} is not set)")
            return dg.MaterializeResult(metadata={"needed": False})
        raise dg.Failure(
            f"no training image is configured: build one with `make images IMAGE=registry/name:tag PUSH=1` "
            f"and set {TRAINING_IMAGE_ENV} to its name",
            allow_retries=False,
        )
    try:
        record = record_image(opened, "training", resolve_image(image))
    except ImageError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    context.log.info(f"{record.image} is {record.reference}")
    return dg.MaterializeResult(
        metadata={
            "reference": record.reference,
            "image": record.image,
            "digest": record.digest,
            "registry": record.registry,
            "size_bytes": record.size_bytes,
            "created": record.created or "not told",
            "needed": True,
        },
        data_version=dg.DataVersion(record.digest),
    )
