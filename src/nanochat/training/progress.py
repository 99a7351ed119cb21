"""How far a stage's training has come: what a checkpoint keeps of the loop itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Progress(BaseModel):
    """Changed by the trainer as it goes.

    step: steps done. loader: where the data goes on. tokens: read so far, over all ranks. seconds:
    of training alone, over all attempts. curve, evaluations: rows that begin with a step, for the
    stage's result. recent: losses of the newest steps.
    """

    model_config = ConfigDict(extra="forbid")
    step: int = Field(default=0, ge=0)
    loader: dict[str, Any] = {}
    tokens: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    skipped_batches: int = Field(default=0, ge=0)
    curve: list[dict[str, float]] = []
    evaluations: list[dict[str, float]] = []
    recent: list[float] = []
