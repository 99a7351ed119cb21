"""A question to the model, answered where the model is."""

import time
from typing import Any

import dagster as dg
from pydantic import Field

from dagster_nanochat.defs.serving.endpoint import failures_by_name, serverless_endpoint
from dagster_nanochat.defs.sft.assets import sft_checkpoint
from dagster_nanochat.holding import pause_unless_cancelled
from dagster_nanochat.partitions import model_partitions
from dagster_nanochat.resources import LauncherResource, StoreResource
from dagster_nanochat.selection import required_recipe
from nanochat.recipes import Recipe
from nanochat.store import ObjectStore


class ChatConfig(dg.Config):
    """What to ask, and how the answer is drawn."""

    question: str = Field(default="What is your name?", description="What the user says")
    messages: list[dict[str, str]] = Field(
        default_factory=list,
        description="A conversation in place of the question: objects of role (system, user, assistant) and "
        "content, the user's last",
    )
    max_tokens: int = Field(default=128, gt=0, description="Most tokens of the answer")
    temperature: float = Field(default=0.0, ge=0, description="0 takes the likeliest token every time")
    top_k: int = Field(default=50, gt=0, description="Draw among so many likeliest tokens (temperature > 0)")
    seed: int | None = Field(default=None, description="Makes a drawn answer repeatable")
    within_s: float = Field(
        default=600.0, gt=0, description="How long an endpoint may take, a worker's start included"
    )

    def asked(self) -> list[dict[str, str]]:
        """The conversation. Raises dg.Failure for one that is none."""
        messages = self.messages or [{"role": "user", "content": self.question}]
        for number, message in enumerate(messages):
            if set(message) != {"role", "content"} or message["role"] not in ("system", "user", "assistant"):
                raise dg.Failure(
                    f"messages[{number}] must have a role (system, user or assistant) and a content, and "
                    "nothing else",
                    allow_retries=False,
                )
        if messages[-1]["role"] != "user":
            raise dg.Failure("messages: the last one must be the user's", allow_retries=False)
        return messages


@dg.asset(
    partitions_def=model_partitions,
    group_name="serving",
    deps=[sft_checkpoint, serverless_endpoint],
    kinds={"pytorch"},
    tags={"stage": "serving"},
)
def chat_inference(
    context: dg.AssetExecutionContext, config: ChatConfig, store: StoreResource, launcher: LauncherResource
) -> dg.MaterializeResult:
    """Ask the chat model a question, at its endpoint or on this machine; the answer is in the metadata."""
    recipe = required_recipe(context)
    if recipe.midtrain is None:  # fine-tuning needs it too
        context.log.info(
            f"{recipe.name} has no stage to chat with: midtraining and fine-tuning are switched off "
            f"(`nanochat chat --model {recipe.name} --source base` goes on with a text)"
        )
        return dg.MaterializeResult(metadata={"switched_off": True})
    opened = store.open()
    answered = _ask_endpoint(context, config, opened, recipe) if launcher.deploys else None
    if answered is None:
        answered = _ask_here(config, opened, recipe)
    question = config.asked()[-1]["content"]
    context.log.info(f"{question} → {answered['answer']}")
    shown: dict[str, Any] = {"question": question, **answered}
    if len(config.messages) > 1:
        shown["messages"] = dg.MetadataValue.json(config.messages)
    return dg.MaterializeResult(metadata=shown)


def _ask_endpoint(
    context: dg.AssetExecutionContext, config: ChatConfig, store: ObjectStore, recipe: Recipe
) -> dict[str, Any] | None:
    """What the answer is shown with; None where the model was never deployed. Raises dg.Failure."""
    from dagster_nanochat.launch.runpod.asking import ask
    from dagster_nanochat.launch.runpod.client import RunPodClient
    from dagster_nanochat.launch.runpod.deployment import read_endpoint

    record = read_endpoint(store, recipe.name)
    if record is None:
        context.log.info(f"{recipe.name} has no endpoint: it answers on this machine")
        return None
    question = {
        "messages": config.asked(),
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_k": config.top_k,
        **({} if config.seed is None else {"seed": config.seed}),
    }
    with failures_by_name(f"chat with {recipe.name}"), RunPodClient.from_environment() as client:
        endpoint = client.get_endpoint(record.id)
        if endpoint is None:
            raise dg.Failure(
                f"chat with {recipe.name}: RunPod has no endpoint {record.id} ({record.name}) any more. "
                f"Deploy it with `dg launch --job deploy_model --partition {recipe.name}`, or forget it with "
                f"`nanochat endpoints rm {recipe.name}`",
                allow_retries=False,
            )
        answer = ask(
            client,
            endpoint,
            question,
            within_s=config.within_s,
            pause=lambda seconds: pause_unless_cancelled(context, seconds),
            say=context.log.info,
        )
    idle_usd = (record.usd_per_h or 0.0) * record.idle_timeout_s / 3600
    return {
        **answer.metadata(),
        "answered_by": f"endpoint {record.name} ({record.id})",
        "release": record.release if record.release is not None else "not told",
        **({"idle_dollars_at_most": idle_usd} if record.usd_per_h else {}),
    }


def _ask_here(config: ChatConfig, store: ObjectStore, recipe: Recipe) -> dict[str, Any]:
    """The same of this machine's own engine."""
    from nanochat.data.conversations import Message
    from nanochat.inference.chat import ChatSession, load_engine
    from nanochat.inference.sampling import Sampling

    sampling = Sampling(
        max_tokens=config.max_tokens, temperature=config.temperature, top_k=config.top_k, seed=config.seed
    )
    *earlier, last = config.asked()
    try:
        chat = ChatSession(load_engine(store, recipe.name, "sft" if recipe.sft else "mid"), sampling)
        chat.history = [Message(message["role"], message["content"]) for message in earlier]  # type: ignore[arg-type]
        start = time.monotonic()
        generation = chat.ask(last["content"])
    except ValueError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    seconds = time.monotonic() - start
    if not generation.text.strip():
        raise dg.Failure(f"{recipe.name} answered nothing to {last['content']!r}", allow_retries=False)
    return {
        "answer": generation.text,
        "tokens": len(generation.ids),
        "seconds": seconds,
        "tokens_per_second": len(generation.ids) / seconds,
        "finish_reason": str(generation.finish_reason),
        "cold_start": False,
        "dollars": 0.0,
        "answered_by": "this machine",
    }
