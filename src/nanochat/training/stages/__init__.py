"""The stages of training: what is base, midtraining and fine-tuning about a run, and nothing else."""

from __future__ import annotations

from nanochat.training.stages.base import BaseStage
from nanochat.training.stages.midtrain import MidtrainStage
from nanochat.training.stages.sft import SftStage
from nanochat.training.stages.stage import Stage, StageContext

STAGES: dict[str, type[Stage]] = {"base": BaseStage, "midtrain": MidtrainStage, "sft": SftStage}

__all__ = ["STAGES", "Stage", "StageContext"]
