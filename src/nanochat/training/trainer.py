"""The one training loop. A stage supplies data, rates and evaluation; none copies the loop.

The loss of a step is the mean over the global batch's target tokens: they are counted over all ranks
and accumulation steps before the first backward pass, every piece's sum is divided by that count,
and gradients are summed over ranks. So masks and padding weigh the same on any number of ranks.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch

from nanochat.data.staging import Stopped
from nanochat.model.gpt import GPT
from nanochat.optim.groups import Optimizers
from nanochat.training.batches import Batch, Loader
from nanochat.training.distributed import World
from nanochat.training.progress import Progress
from nanochat.training.runtime import Runtime

# Losses kept in the checkpoint and the result; the event stream has every one.
CURVE_POINTS = 200
# Newest losses that the result's `train_loss` is the mean of.
RECENT_STEPS = 50
# Weight of the newest step in the running mean of the step's time.
_SMOOTHING = 0.1


class EventSink(Protocol):
    """Where events go (`nanochat.events.EventWriter` in a job; nothing on other ranks)."""

    def emit(self, type: str, **fields: Any) -> None: ...


class TrainingStopped(Exception):
    """Training was asked to end (SIGTERM) and did, after a checkpoint."""


class Trainer:
    """Trains `model` for `steps` steps, counted from `progress.step`.

    save: called with the step just done, commits a checkpoint. evaluate: called with the step just
    done, returns metrics by name. Both run on every rank. give_up_waiting: called when training is
    asked to stop; from then on `loader` raises Stopped where a step's data is still on its way.
    """

    def __init__(
        self,
        *,
        model: GPT,
        optimizers: Optimizers,
        loader: Loader,
        steps: int,
        runtime: Runtime,
        world: World,
        events: EventSink,
        save: Callable[[Progress], None],
        evaluate: Callable[[int], dict[str, float]],
        checkpoint_every: int,
        eval_every: int,
        progress: Progress,
        give_up_waiting: Callable[[], None],
    ) -> None:
        self.model, self.optimizers, self.loader, self.steps = model, optimizers, loader, steps
        self.runtime, self.world, self.events = runtime, world, events
        self.save, self.evaluate = save, evaluate
        self.checkpoint_every, self.eval_every = checkpoint_every, eval_every
        self.progress = progress
        self._give_up_waiting = give_up_waiting
        self._step_seconds: float | None = None
        self._stop_requested = False
        # The step of the newest checkpoint, that of the beginning included.
        self._kept = progress.step

    def run(self) -> None:
        """Train to the end. Raises TrainingStopped after a SIGTERM, when a checkpoint is made."""
        with self._sigterm_asks_to_stop():
            self._make_up_for_an_evaluation()
            while self.progress.step < self.steps:
                started = time.perf_counter()
                batch = self._next_batch()
                targets, tokens, stop, all_here = self._agree_on(batch)
                if batch is None or not all_here:
                    self._stop()
                self.progress.loader = batch.state
                if targets == 0:
                    self.progress.skipped_batches += 1
                else:
                    self._step(batch, targets, tokens, started)
                self._after_step(stepped=targets > 0, stop=stop)

    # ----------------------------------------------------------------------------------------------

    def _next_batch(self) -> Batch | None:
        """None where it is still on its way, and training was asked to stop."""
        try:
            return self.loader.next_batch()
        except Stopped:
            if not self._stop_requested:
                raise
            return None

    def _agree_on(self, batch: Batch | None) -> tuple[float, int, bool, bool]:
        """Targets and tokens of the global batch, whether any rank was asked to stop, and whether every
        rank has its rows."""
        mine = (0.0, 0) if batch is None else (batch.targets(), batch.tokens)
        numbers = [*mine, self._stop_requested, batch is None]
        targets, tokens, stops, missing = self.world.sum_numbers(numbers)
        return targets, int(tokens), stops > 0, missing == 0

    def _step(self, batch: Batch, targets: float, tokens: int, started: float) -> None:
        step = self.progress.step
        self.model.train()
        self.optimizers.zero_grad()
        loss = torch.zeros((), device=self.runtime.device)
        for part in batch.parts:
            piece = part.to(self.runtime.device)
            mean = self.model.loss_sum(piece.ids_BT, piece.targets_BT, piece.weights_BT / targets)
            mean.backward()
            loss += mean.detach()
        self.world.sum_(self.optimizers.gradients)
        self.world.sum_(loss)
        grad_norm = self.optimizers.step(step)
        self.runtime.synchronize()
        seconds = time.perf_counter() - started
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.seconds += seconds
        self._report(loss=round(float(loss), 6), grad_norm=grad_norm, tokens=tokens, seconds=seconds)

    def _report(self, *, loss: float, grad_norm: float, tokens: int, seconds: float) -> None:
        """Tell of the step just done. loss: nats per target token, before the step's update."""
        step = self.progress.step
        previous = seconds if self._step_seconds is None else self._step_seconds
        self._step_seconds = (1 - _SMOOTHING) * previous + _SMOOTHING * seconds
        tokens_per_s = tokens / seconds
        self.progress.recent = [*self.progress.recent, loss][-RECENT_STEPS:]
        if step % max(1, self.steps // CURVE_POINTS) == 0 or step == self.steps:
            self.progress.curve.append({"step": step, "loss": loss})
        rates = {name: float(f"{rate:.6g}") for name, rate in self.optimizers.rates(step - 1).items()}
        fields: dict[str, Any] = {
            "step": step,
            "steps": self.steps,
            "loss": loss,
            **rates,
            "grad_norm": round(grad_norm, 6),
            "tokens_per_s": round(tokens_per_s),
            "eta_s": round((self.steps - step) * self._step_seconds, 1),
            "memory_bytes": self.runtime.memory_bytes(),
            "tokens": self.progress.tokens,
        }
        peak = self.runtime.peak_flops()
        if peak:
            flops_per_s = tokens_per_s * self.model.flops_per_token()
            fields["mfu"] = round(flops_per_s / (peak * self.world.size), 4)
        self.events.emit("step", **fields)

    def _after_step(self, *, stepped: bool, stop: bool) -> None:
        step = self.progress.step
        done = step == self.steps
        # Saved before it is evaluated: an evaluation that fails must not cost the training.
        if stepped and (done or step % self.checkpoint_every == 0):
            self._save()
        if stop and not done:
            self._stop()
        if stepped and not done and step % self.eval_every == 0:
            self._evaluate()

    def _save(self) -> None:
        self.save(self.progress)
        self._kept = self.progress.step

    def _stop(self) -> NoReturn:
        step = self.progress.step
        if step == 0:
            raise TrainingStopped("asked to stop before the first step")
        if step != self._kept:
            self._save()
        raise TrainingStopped(f"asked to stop; a checkpoint of step {step} of {self.steps} is kept")

    def _make_up_for_an_evaluation(self) -> None:
        """The checkpoint of a step is made before its evaluation, so what is resumed lacks that one."""
        step = self.progress.step
        evaluated = any(row["step"] == step for row in self.progress.evaluations)
        if 0 < step < self.steps and step % self.eval_every == 0 and not evaluated:
            self._evaluate()

    def _evaluate(self) -> None:
        step = self.progress.step
        metrics = self.evaluate(step)
        self.progress.evaluations.append({"step": step, **metrics})
        self.events.emit("eval", step=step, metrics=metrics)

    @contextmanager
    def _sigterm_asks_to_stop(self) -> Iterator[None]:
        def ask(number: int, frame: FrameType | None) -> None:
            self._stop_requested = True
            self._give_up_waiting()

        previous = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
