"""What may be set about the emulated platform, at the start or while it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

REPOSITORY = Path(__file__).resolve().parents[3]
SPEC_ENV = "NANOCHAT_RUNPOD_SPEC"
SDK_ENV = "NANOCHAT_SERVERLESS_SITE"


class Image(BaseModel):
    """How containers of an image run on this machine: `entrypoint` as it is, or in the local image
    `buildah` with that image's own entry point (needs buildah)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entrypoint: tuple[str, ...] = (sys.executable, "-m", "nanochat.pod")
    command: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    buildah: str | None = None


class Settings(BaseModel):
    """Times in seconds. mode: `instant` says RUNNING from the first answer on, as was seen on the real
    platform; `phased` goes through PROVISIONING and STARTING, as its documents say.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    mode: Literal["instant", "phased"] = "instant"
    provisioning_s: float = Field(default=0.1, ge=0, description="PROVISIONING lasts this long (phased)")
    pull_s: float = Field(default=0.1, ge=0, description="from the placement to the container's start")
    runtime_null_s: float = Field(default=0.0, ge=0, description="`runtime` stays null after that start")
    restart_delay_s: float = Field(default=0.3, ge=0, description="from a container's exit to its restart")
    stop_grace_s: float = Field(default=0.5, ge=0, description="from SIGTERM to SIGKILL")
    members_end_clusters: bool = Field(
        default=False, description="a member's own key may delete its cluster: nobody has told whether it may"
    )
    worker_quota: int = Field(default=5, ge=0, description="the most that all endpoints' max may be")
    rollout_step_s: float = Field(default=0.2, ge=0, description="between two replaced workers")
    ping_interval_s: float = Field(default=2.0, ge=1, description="how often workers are told to ping")
    worker_silence_s: float = Field(default=20.0, gt=0, description="after that without one a worker is lost")
    take_poll_s: float = Field(
        default=20.0, gt=0, description="how long a worker's question for jobs is held"
    )
    job_retries: int = Field(default=1, ge=0, description="of a job whose worker was lost")
    job_ttl_s: float = Field(default=86_400.0, gt=0, description="after that a job is dropped, done or not")
    result_kept_s: float = Field(default=1_800.0, ge=0, description="of jobs sent to /run")
    sync_result_kept_s: float = Field(default=60.0, ge=0, description="of jobs sent to /runsync")
    clock_speed: float = Field(default=1.0, gt=0, description="seconds that are billed for a second")
    balance_usd: float | None = Field(default=None, description="None: as much as is needed")
    quota_per_minute: int = Field(default=6_000, ge=1)
    quota_per_hour: int = Field(default=300_000, ge=1)
    quota_per_day: int = Field(default=5_000_000, ge=1)


def sdk_folder() -> Path:
    """Where RunPod's SDK is, or would be: it asks for another click than dg, so it has its own folder."""
    return Path(os.environ.get(SDK_ENV) or REPOSITORY / ".venv/serverless")


def sdk_environment() -> dict[str, str]:
    """What makes a Python process find the SDK, and this checkout's packages behind it."""
    packages = [str(sdk_folder()), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, packages))}


def find_spec() -> Path | None:
    """RunPod's OpenAPI file: where NANOCHAT_RUNPOD_SPEC says, else in `shared` beside the checkout."""
    named = os.environ.get(SPEC_ENV)
    path = Path(named) if named else REPOSITORY.parent / "shared/reference/runpod-rest-v2-openapi.json"
    return path if path.is_file() else None
