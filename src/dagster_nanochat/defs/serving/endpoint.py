"""The model on a serverless endpoint, and whether what is there is what should be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
from pydantic import Field

from dagster_nanochat.checkpoint_checks import model_checks
from dagster_nanochat.defs.images.assets import nanochat_serverless_image
from dagster_nanochat.defs.sft.assets import sft_checkpoint
from dagster_nanochat.holding import pause_unless_cancelled
from dagster_nanochat.launch.images import SERVERLESS_IMAGE_ENV, ImageRecord, recorded_image, serverless_kind
from dagster_nanochat.partitions import model_partitions
from dagster_nanochat.resources import LauncherResource, StoreResource
from dagster_nanochat.selection import required_recipe
from nanochat.failures import AttemptFailed, Failure
from nanochat.recipes import Recipe
from nanochat.store import ObjectStore, StoreError
from nanochat.store.leases import utc_now
from nanochat.store.receipts import Receipt, current_receipt

_NO_IMAGE = f"no image is pinned for it: set {SERVERLESS_IMAGE_ENV} and materialize nanochat_serverless_image"


class EndpointConfig(dg.Config):
    """How the endpoint is to be. The defaults cost nothing while nobody asks."""

    name: str | None = Field(default=None, description="Its name at RunPod; default: nanochat-<model>")
    min_workers: int = Field(
        default=0, ge=0, description="Workers that are always there, and always paid for"
    )
    max_workers: int = Field(default=2, ge=1, description="The most workers; they count in RunPod's quota")
    idle_timeout_s: int = Field(
        default=60, ge=1, le=3600, description="How long a worker without a question is kept, and paid for"
    )
    queue_delay_s: float = Field(
        default=4.0, ge=0.5, description="A question that has waited so long brings another worker"
    )
    gpu_pools: list[str] = Field(
        default_factory=list,
        description="RunPod's pools that will do, such as ADA_24; none: the cheapest that have the memory",
    )
    gpu_count: int = Field(default=1, ge=1, description="GPUs of each worker")
    release_s: float = Field(
        default=900.0, gt=0, description="How long all workers may take to run a new release"
    )
    smoke_s: float = Field(
        default=900.0, gt=0, description="How long the first answer may take, a worker's start included"
    )
    despite_checks: bool = Field(default=False, description="Deploy a model whose checks did not pass, too")
    runpod: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of the runpod launcher for this run: max_price_usd_per_h, data_center_ids, …",
    )


@contextmanager
def failures_by_name(what: str) -> Iterator[None]:
    """What a person can mend is a failure with its words, and no traceback."""
    from dagster_nanochat.launch.runpod.errors import RunPodError
    from dagster_nanochat.launch.runpod.launcher import explained

    try:
        yield
    except (AttemptFailed, RunPodError) as error:
        told = error if isinstance(error, AttemptFailed) else explained(error, Failure.BAD_REQUEST)
        raise dg.Failure(
            f"{what}: {told}", metadata={"failure": told.failure.value}, allow_retries=False
        ) from error
    except (ValueError, StoreError) as error:
        raise dg.Failure(f"{what}: {error}", allow_retries=False) from error


@dg.asset(
    partitions_def=model_partitions,
    group_name="serving",
    deps=[nanochat_serverless_image, sft_checkpoint],
    kinds={"runpod"},
    tags={"stage": "serving"},
)
def serverless_endpoint(
    context: dg.AssetExecutionContext,
    config: EndpointConfig,
    store: StoreResource,
    launcher: LauncherResource,
) -> dg.MaterializeResult:
    """The model where the world can ask it, for seconds that are paid for one by one."""
    recipe = required_recipe(context)
    opened = store.open()
    image = recorded_image(opened, serverless_kind(recipe.name))
    if not launcher.deploys or recipe.midtrain is None or image is None:
        why = _why_nothing(recipe, launcher)
        context.log.info(f"no endpoint: {why}")
        return dg.MaterializeResult(metadata={"deployed": False, "reason": why})
    with failures_by_name(f"the endpoint of {recipe.name}"):
        receipt = promoted_receipt(context, opened, recipe, despite_checks=config.despite_checks)
        return _deploy(context, config, opened, recipe, receipt, image)


def promoted_receipt(
    context: dg.AssetExecutionContext, store: ObjectStore, recipe: Recipe, *, despite_checks: bool
) -> Receipt:
    """What may be deployed: the last chat stage's receipt. Raises dg.Failure where there is none, or a check
    of the model did not pass. One that had nothing to measure (a context that no question fits) is told, and
    holds nothing back."""
    receipt = current_receipt(store, recipe.name, "sft" if recipe.sft else "midtrain")
    if receipt is None:
        raise dg.Failure(
            f"{recipe.name} has no chat model to deploy: `dg launch --job model_training --partition "
            f"{recipe.name}` builds it",
            allow_retries=False,
        )
    failed: dict[str, dg.AssetCheckResult] = {}
    for name, told in model_checks(store, recipe).items():
        if not told.passed and told.metadata:
            failed[name] = told
        elif not told.passed:
            context.log.warning(f"{name} says nothing of {recipe.name}: {told.description}")
    if failed and not despite_checks:
        raise dg.Failure(
            f"{recipe.name} is not deployed, its checks did not pass: "
            + "; ".join(f"{name} ({told.description})" for name, told in failed.items())
            + ". What is deployed stays. Mend the model, or set despite_checks in this asset's config",
            allow_retries=False,
        )
    return receipt


def _deploy(
    context: dg.AssetExecutionContext,
    config: EndpointConfig,
    store: ObjectStore,
    recipe: Recipe,
    receipt: Receipt,
    image: ImageRecord,
) -> dg.MaterializeResult:
    from dagster_nanochat.launch.runpod import deployment, pools
    from dagster_nanochat.launch.runpod.asking import EXECUTION_S
    from dagster_nanochat.launch.runpod.client import RunPodClient
    from dagster_nanochat.launch.runpod.config import resolve_settings
    from dagster_nanochat.launch.runpod.containers import STORE_SECRETS, require_secrets
    from dagster_nanochat.launch.runpod.launcher import require_reachable

    settings = resolve_settings(hardware=recipe.hardware, run=config.runpod)
    name = config.name or deployment.endpoint_name(recipe.name)
    with RunPodClient.from_environment() as client:
        if not image.receipt:
            require_reachable(store)
            require_secrets(client, STORE_SECRETS)
        proven = deployment.read_endpoint(store, recipe.name)
        present = deployment.find_endpoint(client, name, store)
        catalog = pools.pools_of(
            client.gpu_types("SERVERLESS", count=config.gpu_count, min_cuda_version=settings.min_cuda_version)
        )
        memory_gb = pools.serving_memory_gb(recipe)
        if config.gpu_pools:
            chosen = pools.named_pools(catalog, config.gpu_pools)
        else:
            chosen = pools.choose_pools(
                catalog,
                memory_gb / config.gpu_count,
                max_usd_per_h=settings.max_price_usd_per_h,
                present=present.gpu.pools if present and present.gpu else (),
            )
        wanted = deployment.endpoint_request(
            store,
            receipt,
            name=name,
            model=recipe.name,
            image=image.reference,
            baked=image.receipt is not None,
            pools=chosen,
            gpu_count=config.gpu_count,
            scale=deployment.Scale(
                min_workers=config.min_workers,
                max_workers=config.max_workers,
                idle_timeout_s=config.idle_timeout_s,
                queue_delay_s=config.queue_delay_s,
            ),
            settings=settings,
            execution_s=EXECUTION_S,
            environment=os.environ,
        )
        context.log.info(
            f"endpoint {name}: {config.min_workers} to {config.max_workers} workers with {memory_gb} GB of "
            f"GPU memory: {', '.join(pool.describe() for pool in chosen)}"
        )
        deployed = deployment.Deployment(
            client=client,
            store=store,
            say=context.log.info,
            pause=lambda seconds: pause_unless_cancelled(context, seconds),
            release_s=config.release_s,
            smoke_s=config.smoke_s,
        ).deploy(wanted, proven)
    prices = [pool.usd_per_h for pool in chosen if pool.usd_per_h]
    record = deployment.EndpointRecord(
        model=recipe.name,
        name=name,
        id=deployed.endpoint.id,
        image=image.reference,
        receipt=receipt.digest(),
        release=deployed.release,
        pools=tuple(pool.name for pool in chosen),
        usd_per_h=config.gpu_count * max(prices) if prices else None,
        min_workers=config.min_workers,
        max_workers=config.max_workers,
        idle_timeout_s=config.idle_timeout_s,
        proven_at=utc_now() if deployed.smoke or proven is None else proven.proven_at,
    )
    deployment.write_endpoint(store, record)
    context.log.info(
        f"endpoint {name} ({record.id}) serves {recipe.name}; remove it with `nanochat endpoints rm "
        f"{recipe.name}`"
    )
    smoke = deployed.smoke.metadata() if deployed.smoke else {}
    return dg.MaterializeResult(
        metadata={
            "deployed": True,
            "did": deployed.did,
            "endpoint": name,
            "id": record.id,
            "console": dg.MetadataValue.url(deployment.endpoint_url(record.id)),
            "release": record.release if record.release is not None else "not told",
            "image": record.image,
            "receipt": record.receipt[:12],
            "gpu_pools": ", ".join(record.pools),
            "gpu_memory_gb": memory_gb,
            "workers": f"{record.min_workers} to {record.max_workers}",
            "idle_timeout_s": record.idle_timeout_s,
            **({"usd_per_h_of_a_worker": record.usd_per_h} if record.usd_per_h else {}),
            **{f"smoke_{name}": value for name, value in smoke.items()},
        },
        data_version=dg.DataVersion(f"{image.digest[:19]}-{record.receipt[:12]}"),
    )


def _why_nothing(recipe: Recipe, launcher: LauncherResource) -> str:
    if not launcher.deploys:
        return f"the {launcher.name} launcher deploys nothing"
    return _NO_IMAGE if recipe.midtrain else f"{recipe.name} has no stage to chat with"


def _nothing_deployed(
    context: dg.AssetCheckExecutionContext, store: ObjectStore, launcher: LauncherResource
) -> dg.AssetCheckResult | None:
    """What the checks say where there is no endpoint to look at."""
    recipe = required_recipe(context)
    if launcher.deploys and recipe.midtrain and recorded_image(store, serverless_kind(recipe.name)):
        return None
    return dg.AssetCheckResult(
        # Somebody who rents machines may have forgotten it.
        passed=not (launcher.deploys and recipe.midtrain),
        severity=dg.AssetCheckSeverity.WARN,
        description=_why_nothing(recipe, launcher),
    )


@dg.asset_check(asset=serverless_endpoint, partitions_def=model_partitions, blocking=True)
def serverless_endpoint_exists(
    context: dg.AssetCheckExecutionContext, store: StoreResource, launcher: LauncherResource
) -> dg.AssetCheckResult:
    """Whether RunPod has the endpoint that this store knows, and lets it have workers."""
    from dagster_nanochat.launch.runpod.client import RunPodClient
    from dagster_nanochat.launch.runpod.deployment import read_endpoint

    opened = store.open()
    nothing = _nothing_deployed(context, opened, launcher)
    if nothing:
        return nothing
    recipe = required_recipe(context)
    record = read_endpoint(opened, recipe.name)
    if record is None:
        return dg.AssetCheckResult(passed=False, description=f"{recipe.name} was never deployed, or removed")
    with failures_by_name(f"the endpoint of {recipe.name}"), RunPodClient.from_environment() as client:
        endpoint = client.get_endpoint(record.id)
    if endpoint is None:
        return dg.AssetCheckResult(
            passed=False, description=f"RunPod has no endpoint {record.id} ({record.name}): deploy it anew"
        )
    return dg.AssetCheckResult(
        passed=endpoint.workers.max > 0,
        description=f"{record.name} ({record.id}), {endpoint.workers.min} to {endpoint.workers.max} workers"
        + ("" if endpoint.workers.max else ": none may start (RunPod does that after a week without a job)"),
        metadata={"id": record.id, "max_workers": endpoint.workers.max},
    )


@dg.asset_check(asset=serverless_endpoint, partitions_def=model_partitions)
def endpoint_runs_latest_image(
    context: dg.AssetCheckExecutionContext, store: StoreResource, launcher: LauncherResource
) -> dg.AssetCheckResult:
    """Whether image and weights are the pinned and the current ones, on every worker."""
    from dagster_nanochat.launch.runpod.client import RunPodClient
    from dagster_nanochat.launch.runpod.deployment import RECEIPT_ENV, read_endpoint

    opened = store.open()
    nothing = _nothing_deployed(context, opened, launcher)
    if nothing:
        return nothing
    recipe = required_recipe(context)
    image, record = recorded_image(opened, serverless_kind(recipe.name)), read_endpoint(opened, recipe.name)
    receipt = current_receipt(opened, recipe.name, "sft" if recipe.sft else "midtrain")
    wrong: list[str] = []
    with failures_by_name(f"the endpoint of {recipe.name}"), RunPodClient.from_environment() as client:
        endpoint = client.get_endpoint(record.id) if record else None
        if endpoint is None:
            wrong.append("there is no endpoint")
        else:
            wanted = image.reference if image else None
            if endpoint.image != wanted:
                wrong.append(f"it runs {endpoint.image}, pinned is {wanted}")
            served = (endpoint.env or {}).get(RECEIPT_ENV)
            if receipt is None or served != receipt.digest():
                wrong.append(
                    f"it serves receipt {str(served)[:12]}, current is "
                    f"{receipt.digest()[:12] if receipt else 'none'}"
                )
            stale = [worker.id for worker in client.endpoint_workers(endpoint.id).workers if worker.is_stale]
            if stale:
                wrong.append(f"workers of an older release are there: {', '.join(stale)}")
    return dg.AssetCheckResult(
        passed=not wrong,
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(wrong)
        or f"release {record.release if record else '?'}, {image and image.image}",
    )
