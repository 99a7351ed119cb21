"""The images of rented machines, pinned by digest."""

import os
from typing import Any

import dagster as dg
from pydantic import Field

from dagster_nanochat.defs.sft.assets import sft_checkpoint
from dagster_nanochat.launch.images import (
    SERVERLESS_IMAGE_ENV,
    TRAINING,
    TRAINING_IMAGE_ENV,
    BuildFailed,
    ImageRecord,
    build_serverless_image,
    record_image,
    serverless_kind,
)
from dagster_nanochat.partitions import model_partitions
from dagster_nanochat.resources import LauncherResource, StoreResource
from dagster_nanochat.selection import required_recipe


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
        record = record_image(opened, TRAINING, resolve_image(image))
    except ImageError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    context.log.info(f"{record.image} is {record.reference}")
    return dg.MaterializeResult(metadata=_metadata(record), data_version=dg.DataVersion(record.digest))


class ServerlessImageConfig(dg.Config):
    """Which image, and whether it is built first."""

    image: str | None = Field(
        default=None,
        description="registry/name:tag, or with @sha256:…; {model} in it is the model's name; default: "
        f"{SERVERLESS_IMAGE_ENV}",
    )
    build: bool = Field(
        default=False,
        description="Build it with the model's weights in it and push it, by build_and_push_serverless.sh",
    )


@dg.asset(
    partitions_def=model_partitions,
    group_name="images",
    deps=[sft_checkpoint],
    kinds={"docker"},
    tags={"stage": "images"},
)
def nanochat_serverless_image(
    context: dg.AssetExecutionContext,
    config: ServerlessImageConfig,
    store: StoreResource,
    launcher: LauncherResource,
) -> dg.MaterializeResult:
    """What an endpoint's workers run: the image's name resolved to its digest, and what weights it has."""
    from dagster_nanochat.launch.registry import ImageError, resolve_image
    from nanochat.store.receipts import current_receipt

    recipe = required_recipe(context)
    named = config.image or os.environ.get(SERVERLESS_IMAGE_ENV)
    if not named or recipe.midtrain is None:
        if recipe.midtrain is None:
            why = f"{recipe.name} has no stage to chat with"
        elif launcher.deploys:
            why = f"{SERVERLESS_IMAGE_ENV} is not set, so nothing is deployed"
        else:
            why = f"the {launcher.name} launcher needs none ({SERVERLESS_IMAGE_ENV} is not set)"
        context.log.info(f"no serverless image: {why}")
        return dg.MaterializeResult(metadata={"needed": False, "reason": why})
    opened = store.open()
    image = named.replace("{model}", recipe.name)
    try:
        if config.build:
            build_serverless_image(recipe.name, image)
        record = record_image(opened, serverless_kind(recipe.name), resolve_image(image))
    except (ImageError, BuildFailed) as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    receipt = current_receipt(opened, recipe.name, "sft" if recipe.sft else "midtrain")
    if record.receipt and (receipt is None or record.receipt != receipt.digest()):
        raise dg.Failure(
            f"{record.image} has the weights of receipt {record.receipt[:12]} in it, and {recipe.name} is at "
            f"{receipt.digest()[:12] if receipt else 'none'}: build it anew (config `build: true`)",
            allow_retries=False,
        )
    weights = f"receipt {record.receipt[:12]}" if record.receipt else "pulled from the store at the start"
    context.log.info(f"{record.image} is {record.reference}; its weights: {weights}")
    return dg.MaterializeResult(
        metadata={**_metadata(record), "weights": weights}, data_version=dg.DataVersion(record.digest)
    )


def _metadata(record: ImageRecord) -> dict[str, Any]:
    return {
        "reference": record.reference,
        "image": record.image,
        "digest": record.digest,
        "registry": record.registry,
        "size_bytes": record.size_bytes,
        "created": record.created or "not told",
        "needed": True,
    }
