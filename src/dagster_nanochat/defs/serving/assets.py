"""A question to the model, answered where the model is."""

import time

import dagster as dg
from pydantic import Field

from dagster_nanochat.defs.sft.assets import sft_checkpoint
from dagster_nanochat.partitions import model_partitions
from dagster_nanochat.resources import StoreResource
from dagster_nanochat.selection import required_recipe


class ChatConfig(dg.Config):
    """What to ask, and how the answer is drawn."""

    question: str = Field(default="What is your name?", description="What the user says")
    max_tokens: int = Field(default=128, gt=0, description="Most tokens of the answer")
    temperature: float = Field(default=0.0, ge=0, description="0 takes the likeliest token every time")
    top_k: int = Field(default=50, gt=0, description="Draw among so many likeliest tokens (temperature > 0)")
    seed: int | None = Field(default=None, description="Makes a drawn answer repeatable")


@dg.asset(
    partitions_def=model_partitions,
    group_name="serving",
    deps=[sft_checkpoint],
    kinds={"pytorch"},
    tags={"stage": "serving"},
)
def chat_inference(
    context: dg.AssetExecutionContext, config: ChatConfig, store: StoreResource
) -> dg.MaterializeResult:
    """Ask the chat model a question; the answer is in the metadata."""
    from nanochat.inference.chat import ChatSession, load_engine
    from nanochat.inference.sampling import Sampling

    recipe = required_recipe(context)
    if recipe.midtrain is None:  # fine-tuning needs it too
        context.log.info(
            f"{recipe.name} has no stage to chat with: midtraining and fine-tuning are switched off "
            f"(`nanochat chat --model {recipe.name} --source base` goes on with a text)"
        )
        return dg.MaterializeResult(metadata={"switched_off": True})
    sampling = Sampling(
        max_tokens=config.max_tokens, temperature=config.temperature, top_k=config.top_k, seed=config.seed
    )
    try:
        engine = load_engine(store.open(), recipe.name, "sft" if recipe.sft else "mid")
        start = time.monotonic()
        generation = ChatSession(engine, sampling).ask(config.question)
    except ValueError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    seconds = time.monotonic() - start
    if not generation.text.strip():
        raise dg.Failure(f"{recipe.name} answered nothing to {config.question!r}", allow_retries=False)
    context.log.info(f"{config.question} → {generation.text}")
    return dg.MaterializeResult(
        metadata={
            "question": config.question,
            "answer": generation.text,
            "tokens": len(generation.ids),
            "seconds": seconds,
            "tokens_per_second": len(generation.ids) / seconds,
            "finish_reason": str(generation.finish_reason),
        }
    )
