"""Plans: what every stage of a model will take, before anything is spent.

Everything is derived from the recipe and the store. Where data is not there yet the plan has no
fingerprint and says what it needs, and gives everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from nanochat import costs
from nanochat.data.identity import DataNeeded, shard_digests
from nanochat.recipes import Ingredient, Recipe, parameters
from nanochat.stages import StageState, resolve
from nanochat.store import ObjectStore
from nanochat.store.documents import Document

# Rows of a task where the recipe says "all", and tokens of an average conversation, for estimates
# before the mixture is written. Rows are the published sizes of the training splits.
TASK_ROWS: Mapping[str, int] = {
    "smoltalk": 460_341,
    "mmlu_auxiliary_train": 99_842,
    "gsm8k": 7_473,
    "arc_easy": 2_251,
    "arc_challenge": 1_119,
    "identity": 200,
}
TOKENS_PER_CONVERSATION = 400
# Characters of a shard of karpathy/fineweb-edu-100b-shuffle, and its size on disk (nanochat's
# documentation of the data set: ~250M characters, ~100 MB compressed).
SHARD_BYTES = 100_000_000


class StagePlan(Document):
    """One stage. Numbers that cannot be known yet are None; `estimated` names the guessed ones."""

    schema_name: ClassVar[str] = "nanochat.plan"

    model: str
    stage: str
    status: str
    reasons: tuple[str, ...]
    needs: tuple[str, ...]
    fingerprint: str | None
    receipt: str | None
    section: dict[str, Any]
    steps: int | None = None
    tokens: int | None = None
    flops: float | None = None
    hours: float | None = None
    dollars: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    estimated: tuple[str, ...] = ()


class ModelPlan(BaseModel):
    """A model's plan: its size, its shards, its stages."""

    model_config = ConfigDict(frozen=True)
    model: str
    description: str
    recipe: dict[str, Any]
    parameters: int
    matmul_parameters: int
    flops_per_token: int
    kv_bytes_per_token: int
    machine: str
    machine_flops_per_s: float
    shards_needed: int
    shards_missing: str | None
    stages: tuple[StagePlan, ...]


def plan_model(
    recipe: Recipe, store: ObjectStore, *, machine: str, flops_per_s: float, usd_per_h: float = 0.0
) -> ModelPlan:
    """The plan of every enabled stage on a machine that trains at `flops_per_s`."""
    states = resolve(recipe, store)
    try:
        shard_digests(store, recipe, count=recipe.data.shards, validation=True)
        missing = None
    except DataNeeded as error:
        missing = str(error)
    vocab = recipe.tokenizer.vocab_size
    return ModelPlan(
        model=recipe.name,
        description=recipe.description,
        recipe=recipe.to_json(),
        parameters=parameters(recipe.model, vocab),
        matmul_parameters=costs.matmul_parameters(recipe.model, vocab),
        flops_per_token=costs.flops_per_token(recipe.model, vocab),
        kv_bytes_per_token=costs.kv_bytes_per_token(recipe.model),
        machine=machine,
        machine_flops_per_s=flops_per_s,
        shards_needed=recipe.data.shards + 1,
        shards_missing=missing,
        stages=tuple(
            plan_stage(recipe, name, states, store, flops_per_s=flops_per_s, usd_per_h=usd_per_h)
            for name in states
        ),
    )


def plan_stage(
    recipe: Recipe,
    stage: str,
    states: Mapping[str, StageState],
    store: ObjectStore,
    *,
    flops_per_s: float,
    usd_per_h: float = 0.0,
) -> StagePlan:
    """The plan of one stage."""
    state = states[stage]
    steps, tokens, estimated = _work(recipe, stage, states)
    flops = hours = None
    memory = disk = None
    if tokens is not None:
        flops = float(tokens) * costs.flops_per_token(recipe.model, recipe.tokenizer.vocab_size)
        hours = flops / flops_per_s / 3600
        memory = costs.training_memory_bytes(
            recipe.model, recipe.tokenizer.vocab_size, recipe.hardware.device_batch_rows
        )
        disk = 2 * costs.checkpoint_bytes(recipe.model, recipe.tokenizer.vocab_size)
        if stage == "base":
            disk += _shard_bytes(recipe)
    return StagePlan(
        model=recipe.name,
        stage=stage,
        status=state.status.value,
        reasons=state.reasons,
        needs=state.needs,
        fingerprint=state.fingerprint,
        receipt=state.receipt.digest() if state.receipt else None,
        section=_section(recipe, stage),
        steps=steps,
        tokens=tokens,
        flops=flops,
        hours=hours,
        dollars=None if hours is None else hours * usd_per_h,
        memory_bytes=memory,
        disk_bytes=disk,
        estimated=estimated,
    )


def _section(recipe: Recipe, stage: str) -> dict[str, Any]:
    document = recipe.to_json()
    section: Any = document[{"midtrain_data": "midtrain", "sft_data": "sft"}.get(stage, stage)]
    return dict(section)


def _shard_bytes(recipe: Recipe) -> int:
    return (recipe.data.shards + 1) * (SHARD_BYTES if recipe.data.source != "offline" else 4_000_000)


def _work(
    recipe: Recipe, stage: str, states: Mapping[str, StageState]
) -> tuple[int | None, int | None, tuple[str, ...]]:
    """Steps and tokens of a training stage, and which of them are guesses. (None, None) for others."""
    if stage == "base":
        return recipe.base.steps, recipe.base.steps * recipe.base.batch_tokens, ()
    if stage == "midtrain" and recipe.midtrain:
        section = recipe.midtrain
        if section.steps:
            return section.steps, section.steps * section.batch_tokens, ()
        tokens, guessed = _mixture_tokens(section.mixture, states.get("midtrain_data"))
        return max(1, tokens // section.batch_tokens), tokens, ("steps", "tokens") if guessed else ()
    if stage == "sft" and recipe.sft:
        section_sft = recipe.sft
        rows = _rows(section_sft.mixture, states.get("sft_data"))
        steps = section_sft.steps or max(1, rows // section_sft.batch_rows)
        tokens, guessed = _mixture_tokens(section_sft.mixture, states.get("sft_data"))
        seen = int(tokens * steps * section_sft.batch_rows / max(1, rows))
        return steps, seen, ("steps", "tokens") if guessed else ()
    return None, None, ()


def mixture_rows(mixture: tuple[Ingredient, ...]) -> int:
    """Conversations of one pass, where "all" is the published size of the task."""
    return sum((part.rows or TASK_ROWS.get(part.task, 1_000)) * part.repeat for part in mixture)


def _rows(mixture: tuple[Ingredient, ...], data: StageState | None) -> int:
    """Conversations of one pass: counted where the mixture is written, else estimated."""
    if data and data.receipt and "rows" in data.receipt.metrics:
        return int(data.receipt.metrics["rows"])
    return mixture_rows(mixture)


def _mixture_tokens(mixture: tuple[Ingredient, ...], data: StageState | None) -> tuple[int, bool]:
    if data and data.receipt and "characters" in data.receipt.metrics:
        # 3.3 characters a token lies between the quick tokenizer (2.8) and a large one (4.2).
        return math.ceil(data.receipt.metrics["characters"] / 3.3), True
    return mixture_rows(mixture) * TOKENS_PER_CONVERSATION, True
