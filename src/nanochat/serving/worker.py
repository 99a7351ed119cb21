"""A worker of a serverless endpoint: settings from the environment, weights, warm-up, jobs, its end.

Knows no provider: `serverless/handler.py` connects it to RunPod's SDK.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from nanochat.data.conversations import Conversation, Message
from nanochat.inference.chat import Source
from nanochat.inference.generation import Request
from nanochat.inference.sampling import Sampling
from nanochat.inference.scheduler import ClosedError, End, Event, QueueFullError, Scheduler
from nanochat.recipes import explain
from nanochat.serving.app import ServedModel, Serving, create_app
from nanochat.serving.gate import configured_keys
from nanochat.serving.jobs import Jobs
from nanochat.serving.protocol import Defaults
from nanochat.serving.server import LoadedModel, serve
from nanochat.serving.weights import Weights, baked_weights, stored_weights
from nanochat.store import open_store

_WARM_UP_TOKENS = 4
# What a model that works has long answered a few tokens in.
_PROBE_S = 60.0
# So long the results of jobs that have just ended may take to be told, before the process ends.
_LAST_WORDS_S = 2.0

Text = Annotated[str, AfterValidator(str.strip)]


class SettingsError(ValueError):
    """A variable of the environment that cannot be used."""


class WorkerSettings(BaseModel):
    """See `FIELDS` for the variables' names. model: None takes the weights that are baked into the image;
    else they come from the store that NANOCHAT_STORE names. max_rows: answers that are worked on together,
    and jobs that are taken together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Path = Path("/opt/nanochat/checkpoint")
    model: Text | None = None
    source: Source = "sft"
    fingerprint: Text | None = None
    receipt_sha256: Text | None = None
    max_rows: int = Field(default=8, ge=1, le=256)
    max_tokens: int = Field(default=1024, ge=1)
    temperature: float = Field(default=0.6, ge=0)
    request_s: float = Field(default=300.0, gt=0)
    post_every_s: float = Field(default=0.25, ge=0)
    mode: Literal["queue", "http"] = "queue"
    host: Text = "0.0.0.0"
    port: int = Field(default=80, ge=0, le=65535)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Raises SettingsError naming the variable."""
        given = {field: environment[name] for field, name in FIELDS.items() if environment.get(name)}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = str(error.errors()[0]["loc"][0])
            raise SettingsError(f"{FIELDS[first]}: {explain(error)}") from error


FIELDS = {
    "checkpoint": "NANOCHAT_CHECKPOINT",
    "model": "NANOCHAT_MODEL",
    "source": "NANOCHAT_SOURCE",
    "fingerprint": "NANOCHAT_FINGERPRINT",
    "receipt_sha256": "NANOCHAT_RECEIPT_SHA256",
    "max_rows": "NANOCHAT_MAX_ROWS",
    "max_tokens": "NANOCHAT_MAX_TOKENS",
    "temperature": "NANOCHAT_TEMPERATURE",
    "request_s": "NANOCHAT_REQUEST_S",
    "post_every_s": "NANOCHAT_POST_EVERY_S",
    "mode": "NANOCHAT_WORKER",
    "host": "NANOCHAT_HOST",
    "port": "PORT",
}


class ModelFailed(RuntimeError):
    """The model does not answer."""


class Worker:
    """end: called with an exit status when the model has failed and fails again, so that the platform
    starts another container; by default it ends the process, whatever its threads do."""

    def __init__(self, settings: WorkerSettings, end: Callable[[int], None] = os._exit) -> None:
        self.settings = settings
        self._end = end
        self._scheduler: Scheduler | None = None
        self._jobs: Jobs | None = None
        self._probing = threading.Lock()

    def start(self) -> None:
        """Load the weights and ask the model once. Raises what makes it unfit: ChatError, WeightsError,
        CheckpointError, StoreError, ModelFailed."""
        weights = self._load()
        self._scheduler = Scheduler(
            weights.engine.model,
            weights.engine.tokenizer,
            max_rows=self.settings.max_rows,
            max_waiting=self.settings.max_rows,
        )
        self._warm_up(self._scheduler)
        self._jobs = Jobs(
            create_app([ServedModel(weights.model, self._scheduler, weights.chat)], self._serving()),
            model=weights.model,
            weights=weights.document(),
            post_every_s=self.settings.post_every_s,
            on_failure=self._failed,
        )

    def answer(self, given: Any) -> AsyncGenerator[Any, None]:
        """What a handler yields for a job's input (see `nanochat.serving.jobs`)."""
        assert self._jobs is not None, "a worker answers once it has started"
        return self._jobs.answer(given)

    def serve(self) -> None:
        """As a load-balancer endpoint's worker: HTTP on `port`, until SIGTERM."""
        weights = self._load()
        serve(
            [LoadedModel(weights.model, weights.engine, weights.chat)],
            self._serving(configured_keys()),
            host=self.settings.host,
            port=self.settings.port,
            page="/",
            max_rows=self.settings.max_rows,
            max_waiting=4 * self.settings.max_rows,
        )

    def close(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close(timeout_s=0.0)

    # ----------------------------------------------------------------------------------------------

    def _load(self) -> Weights:
        settings = self.settings
        if settings.model is None:
            return baked_weights(settings.checkpoint, receipt_sha256=settings.receipt_sha256)
        return stored_weights(
            open_store(),
            settings.model,
            settings.source,
            fingerprint=settings.fingerprint,
            receipt_sha256=settings.receipt_sha256,
        )

    def _serving(self, api_keys: tuple[str, ...] = ()) -> Serving:
        return Serving(
            defaults=Defaults(max_tokens=self.settings.max_tokens, temperature=self.settings.temperature),
            api_keys=api_keys,
            request_s=self.settings.request_s,
        )

    def _warm_up(self, scheduler: Scheduler) -> None:
        """Raises ModelFailed."""
        prompt = scheduler.tokenizer.render_prompt(Conversation((Message("user", "Hello"),)))
        ended = threading.Event()
        told: list[End] = []

        def hear(event: Event) -> None:
            if isinstance(event, End):
                told.append(event)
                ended.set()

        try:
            scheduler.submit(
                Request(prompt=prompt, sampling=Sampling(max_tokens=_WARM_UP_TOKENS, temperature=0)), hear
            )
        except ClosedError as error:
            raise ModelFailed("the scheduler has ended") from error
        if not ended.wait(_PROBE_S):
            raise ModelFailed(f"the model has not said {_WARM_UP_TOKENS} tokens in {_PROBE_S:.0f} s")
        if told[0].error is not None:
            raise ModelFailed(f"the model fails: {told[0].error}") from told[0].error

    def _failed(self) -> None:
        """It may have been that one request; where the model fails again, the worker is at its end."""
        if self._probing.acquire(blocking=False):
            threading.Thread(target=self._probe, name="probe", daemon=True).start()

    def _probe(self) -> None:
        assert self._scheduler is not None, "it has started"
        try:
            self._warm_up(self._scheduler)
        except QueueFullError:
            # It has more to do than may wait: no sign of a failure.
            self._probing.release()
        except Exception as error:
            print(f"error: {error}; the worker ends", file=sys.stderr, flush=True)
            threading.Event().wait(_LAST_WORDS_S)
            self._end(1)
        else:
            self._probing.release()
