"""A training job: everything a machine needs to know to run one attempt of one stage."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator

from nanochat.recipes import Recipe
from nanochat.store import ObjectStore
from nanochat.store.documents import Document, DocumentError
from nanochat.store.receipts import FileRef, InputRef

TrainingStage = Literal["base", "midtrain", "sft"]


class JobHardware(BaseModel):
    """How to run; none of it changes what is trained. `auto` is decided on the machine and reported.
    nodes: machines; processes, threads: on each of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    nodes: int = Field(default=1, ge=1)
    processes: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    device_batch_rows: int = Field(default=16, ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"


class Rented(BaseModel):
    """What is paid for, and what was promised for it.

    usd_per_h: of all machines. gpus: of each. rented_at: when it was asked for, by the orchestrator's clock.
    max_usd: the attempt ends, with a checkpoint, before it has cost more. min_cuda: the CUDA version,
    such as ``12.8``, that the machine's driver supports at least.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    provider: str
    offer: str
    usd_per_h: float = Field(ge=0)
    rented_at: datetime.datetime
    max_usd: float | None = Field(default=None, gt=0)
    gpus: int = Field(ge=0)
    min_gpu_memory_gib: float = Field(ge=0)
    min_cuda: str | None = None

    def dollars(self, now: datetime.datetime) -> float:
        """What the machine has cost until `now`."""
        return max(0.0, (now - self.rented_at).total_seconds()) * self.usd_per_h / 3600


class TrainingJob(Document):
    """Stored as `attempts/<token>/job.json`; read by the supervisor and by every rank."""

    schema_name: ClassVar[str] = "nanochat.job"

    stage: TrainingStage
    stage_version: int
    fingerprint: str
    token: str
    model: str
    recipe: Recipe
    store_url: str
    prefix: str
    inputs: tuple[InputRef, ...] = ()
    data: dict[str, str] = Field(default_factory=dict)
    shards: tuple[FileRef, ...] = ()
    validation: FileRef | None = None
    tokenizer: FileRef
    init_checkpoint: tuple[FileRef, ...] = ()
    conversations: dict[str, FileRef] = Field(default_factory=dict)
    # The hub's addresses, by key, of shards whose bytes the store does not hold.
    urls: dict[str, str] = Field(default_factory=dict)
    hardware: JobHardware = JobHardware()
    deadline_s: float = Field(default=86_400.0, gt=0)
    # None: started detached, it goes on alone until its deadline.
    watch_grace_s: float | None = Field(default=None, gt=0)
    code_revision: str | None = None
    sources_sha256: str | None = None
    # None: it runs on one's own machine.
    rented: Rented | None = None
    image: str | None = None
    # Dollars of earlier attempts at the stage by their tokens, with a receipt or without.
    paid: dict[str, float] = Field(default_factory=dict)

    @field_validator("recipe", mode="before")
    @classmethod
    def _parse_recipe(cls, value: Any) -> Any:
        return Recipe.from_json(value) if isinstance(value, dict) else value

    @field_serializer("recipe")
    def _dump_recipe(self, recipe: Recipe) -> dict[str, Any]:
        return recipe.to_json()

    @property
    def attempt_prefix(self) -> str:
        return f"{self.prefix}/attempts/{self.token}"

    @classmethod
    def read(cls, store: ObjectStore, key: str) -> Self:
        """Raises DocumentError for a job that lies where another attempt's should."""
        job = super().read(store, key)
        if key != f"{job.attempt_prefix}/job.json":
            raise DocumentError(f"{key} is the job of another attempt: {job.attempt_prefix}")
        return job

    @classmethod
    def load(cls, path: str | Path) -> TrainingJob:
        """Raises DocumentError naming the file."""
        return cls.from_bytes(Path(path).read_bytes(), str(path))
