"""What to rent at RunPod: the settings, and the layers they come from.

A field is taken from the last layer that says anything about it:

1. the recipe's `hardware` section (GPUs, memory of each);
2. the environment, one variable a field: ``NANOCHAT_RUNPOD_GPU_TYPE_ID``, ``NANOCHAT_RUNPOD_MAX_USD``, …;
3. what the recipe says of RunPod;
4. the run's config.

Only `env_variables` is put together, name by name, from all of them.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dagster_nanochat.launch.runpod.models import MAX_ENVIRONMENT, Cloud, CudaVersion
from nanochat.recipes import Hardware

ENV_PREFIX = "NANOCHAT_RUNPOD_"
GB = 1_000_000_000
# fp32 weights and at most two fp32 optimizer buffers a parameter (`nanochat.costs.checkpoint_bytes`).
CHECKPOINT_BYTES_PER_PARAMETER = 12
# Checkpoints that training keeps on the machine (`nanochat.training.checkpoint`).
CHECKPOINTS_KEPT = 2
# Not measured: the unpacked image with CUDA and torch, and what else a container writes (caches of
# compiled kernels, logs, the mixture of conversations).
IMAGE_BYTES = 12 * GB
MARGIN = 1.2
# What torch of requirements-training.lock is built for runs with any driver of the same major version
# (NVIDIA, "CUDA Compatibility", minor version compatibility).
IMAGE_CUDA = "13.0"


def _listed(value: Any) -> Any:
    """``a, b`` as ("a", "b"): one name is a list of one."""
    return (
        tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
    )


def _mapped(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError('must be a JSON object of strings, such as {"NCCL_DEBUG": "INFO"}') from None


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)]
Environment = Annotated[dict[str, str], BeforeValidator(_mapped), Field(max_length=MAX_ENVIRONMENT)]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RunPodSettings(BaseModel):
    """Every field has a meaning for "nothing said", so that a layer may leave out what it likes."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    gpu_type_ids: Names = Field(
        default=(),
        description="GPU types of RunPod's catalog that will do, such as 'NVIDIA H100 80GB HBM3'; none: all",
    )
    gpu_count: int | None = Field(default=None, ge=1, description="GPUs in each machine: 1 or more")
    nodes: int = Field(default=1, ge=1, description="Machines: 1, or more for a cluster")
    cloud_type: Literal["SECURE", "COMMUNITY", "ALL"] = Field(
        default="SECURE",
        description="SECURE (RunPod's data centers), COMMUNITY (other people's machines) or ALL (both)",
    )
    data_center_ids: Names = Field(
        default=(), description="Data centers that will do, such as US-KS-2; none: all"
    )
    min_memory_gib: float | None = Field(default=None, gt=0, description="Memory of each GPU: above 0 GiB")
    min_ram_gib: float | None = Field(
        default=None, gt=0, description="Main memory of each machine: above 0 GiB; asked for by the GPU"
    )
    min_cuda_version: CudaVersion = Field(
        default=IMAGE_CUDA, description="The least CUDA version of the host's driver, as in 12.8"
    )
    image_name: str | None = Field(
        default=None, min_length=1, description="An image in place of the project's own"
    )
    container_disk_gb: int | None = Field(
        default=None, ge=1, description="Disk of the container: 1 GB or more; not said: what the plan needs"
    )
    volume_disk_gb: int | None = Field(
        default=None, ge=10, description="A disk that outlives the container, not the pod: 10 GB or more"
    )
    env_variables: Environment = Field(
        default_factory=dict,
        repr=False,
        description="Variables for the container, at most 50, names to strings. A value may be "
        "{{ RUNPOD_SECRET_name }}. RUNPOD_… are the platform's own",
    )
    max_price_usd_per_h: PositiveFinite | None = Field(
        default=None, description="The most an hour of all that is rented may cost: above 0 USD"
    )
    max_usd: PositiveFinite | None = Field(
        default=None, description="The most an attempt may cost: above 0 USD"
    )
    deadline_h: PositiveFinite | None = Field(
        default=None, description="The longest an attempt may run: above 0 hours"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_gpu_type(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("gpu_type_id") is None:
            return values
        if values.get("gpu_type_ids"):
            raise ValueError("gpu_type_id and gpu_type_ids are two ways to say one thing: give one")
        rest = {name: value for name, value in values.items() if name != "gpu_type_id"}
        return {**rest, "gpu_type_ids": values["gpu_type_id"]}

    @model_validator(mode="after")
    def _rules(self) -> RunPodSettings:
        if self.nodes > 1 and self.cloud_type == "COMMUNITY":
            raise ValueError("nodes: a cluster (2 or more) is had on cloud_type SECURE only")
        taken = sorted(name for name in self.env_variables if name.startswith("RUNPOD_"))
        if taken:
            raise ValueError(f"env_variables: {', '.join(taken)}: RunPod sets RUNPOD_… itself, last")
        return self

    @property
    def clouds(self) -> tuple[Cloud, ...]:
        """Where to ask. A cluster is always on the secure cloud."""
        if self.nodes > 1:
            return ("SECURE",)
        return ("SECURE", "COMMUNITY") if self.cloud_type == "ALL" else (self.cloud_type,)


# What a layer may name.
FIELDS = (*RunPodSettings.model_fields, "gpu_type_id")


class SettingsError(ValueError):
    """Settings that cannot be used: which layer said what, and what is allowed."""


def resolve_settings(
    *,
    hardware: Hardware | None = None,
    environment: Mapping[str, str] = os.environ,
    run: Mapping[str, Any] | None = None,
) -> RunPodSettings:
    """The settings of all layers. None for a field means that the layer says nothing of it.

    Raises SettingsError that names the field, the layer and what is allowed.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = [
        ("the environment", _from_environment(environment)),
        ("the recipe", hardware.runpod if hardware else {}),
        ("the run's config", run or {}),
    ]
    merged: dict[str, Any] = {}
    if hardware:
        merged = {"gpu_count": hardware.gpus, "min_memory_gib": hardware.min_gpu_memory_gib}
    variables: dict[str, str] = {}
    for layer, said in layers:
        settings = _read_layer(layer, {name: value for name, value in said.items() if value is not None})
        merged |= {name: getattr(settings, name) for name in settings.model_fields_set}
        variables |= settings.env_variables
    return _read_layer("all layers together", {**merged, "env_variables": variables})


def variable(field: str) -> str:
    """The environment variable of a field."""
    return f"{ENV_PREFIX}{field.upper()}"


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    # An empty variable says nothing, as in a .env file that lists them all. One that resembles no
    # setting is something else's; one that does is a slip of the pen, and refused.
    named = {
        name.removeprefix(ENV_PREFIX).lower(): text.strip()
        for name, text in environment.items()
        if name.startswith(ENV_PREFIX) and text.strip()
    }
    return {name: text for name, text in named.items() if name in FIELDS or _near(name)}


def _near(name: str) -> list[str]:
    return difflib.get_close_matches(name, FIELDS, n=1)


def _read_layer(layer: str, values: Mapping[str, Any]) -> RunPodSettings:
    def told(name: str) -> str:
        return variable(name) if layer == "the environment" else name

    for name in values:
        if name not in FIELDS:
            near = _near(name)
            there = f"did you mean {told(near[0])}?" if near else f"there are {', '.join(FIELDS)}"
            raise SettingsError(f"RunPod settings: {layer}: {told(name)} is no setting; {there}")
    try:
        return RunPodSettings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"RunPod settings: {layer}: {_explain(error, values, told)}") from error


def _explain(error: ValidationError, values: Mapping[str, Any], told: Callable[[str], str]) -> str:
    parts = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        message = item["msg"].removeprefix("Value error, ")
        if not item["loc"]:  # of several fields, and says itself of which
            parts.append(message)
            continue
        name = str(item["loc"][0])
        # A variable's value may be a secret.
        got = "" if name == "env_variables" else f" (got {values.get(name, values.get('gpu_type_id'))!r})"
        parts.append(f"{told(name)}: {message}{got}. {RunPodSettings.model_fields[name].description}")
    return "; ".join(parts)


def disk_gb(
    shard_bytes: int,
    parameters: int,
    *,
    checkpoints_kept: int = CHECKPOINTS_KEPT,
    image_bytes: int = IMAGE_BYTES,
) -> int:
    """GB of disk for a training: the image, the shards, the checkpoints that are kept and the one that
    is being written, and a fifth to spare."""
    checkpoints = (checkpoints_kept + 1) * CHECKPOINT_BYTES_PER_PARAMETER * parameters
    return math.ceil(MARGIN * (image_bytes + shard_bytes + checkpoints) / GB)
