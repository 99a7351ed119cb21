"""One attempt of one training stage in one process: what `scripts/train_*_remote.py` run under torchrun.

Everything that can be wrong with a job is found before the first step: inputs are verified against
their digests, the checkpoint to start from against the architecture and the tokenizer. A checkpoint
of the same training is resumed, and what was passed over is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat.data.conversations import ConversationError
from nanochat.data.hub import HubError
from nanochat.data.parquet import TextFileError
from nanochat.data.questions import QuestionError
from nanochat.events import EventWriter
from nanochat.export.curves import CURVE, EVALUATIONS
from nanochat.failures import Failure
from nanochat.model.gpt import GPT
from nanochat.optim.groups import Optimizers
from nanochat.store import ObjectStore, open_store
from nanochat.store.documents import DocumentError
from nanochat.tokenizer import Tokenizer
from nanochat.training import checkpoint as ckpt
from nanochat.training.bad_input import BadInput
from nanochat.training.checkpoint_folders import recorded_checkpoints
from nanochat.training.distributed import World, join_world
from nanochat.training.inputs import Inputs, gather_inputs
from nanochat.training.job import TrainingJob
from nanochat.training.process import end_with_supervisor
from nanochat.training.progress import Progress
from nanochat.training.runtime import Runtime, choose_device, choose_runtime
from nanochat.training.stages import STAGES, Stage, StageContext
from nanochat.training.stages.stage import Findings, evaluating
from nanochat.training.trainer import EventSink, Trainer, TrainingStopped

# What a person can mend by other input; everything else is our code's fault.
_BAD_REQUESTS = (
    BadInput,
    ckpt.CheckpointError,
    ConversationError,
    HubError,
    QuestionError,
    TextFileError,
    DocumentError,
)
RESULT = "result.json"
ERROR = "error.json"


class NoEvents:
    """The sink of ranks whose events nobody reads."""

    def emit(self, type: str, **fields: Any) -> None:
        """Forget it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line of a training script and run its job."""
    parser = argparse.ArgumentParser(description="One rank of a training job (run by torchrun).")
    parser.add_argument("--job", type=Path, required=True, help="job.json")
    parser.add_argument("--events", type=Path, required=True, help="file that events are appended to")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; result.json goes here")
    parser.add_argument(
        "--supervised", action="store_true", help="end when standard input does: its supervisor is gone then"
    )
    options = parser.parse_args(arguments)
    if options.supervised:
        end_with_supervisor()
    run_job(TrainingJob.load(options.job), options.events, options.work)


def run_job(job: TrainingJob, events_path: Path, work: Path) -> None:
    """Train the job's stage to its end and write `result.json` into `work`.

    What fails is described in `error.json` by the first rank that failed, and raised.
    """
    work.mkdir(parents=True, exist_ok=True)
    try:
        device = choose_device(job.hardware)
        with join_world(device) as world:
            events: EventSink = EventWriter(events_path) if world.is_main else NoEvents()
            _Run(job, events, work, world, device).run()
    except BaseException as error:
        _describe_failure(work, error)
        raise


class _Run:
    """The parts of a run, put together in order."""

    def __init__(
        self, job: TrainingJob, events: EventSink, work: Path, world: World, device: torch.device
    ) -> None:
        self.job, self.events, self.work, self.world, self.device = job, events, work, world, device
        self.store: ObjectStore = open_store(job.store_url)
        self.warnings: list[str] = []
        self._started = time.monotonic()

    def run(self) -> None:
        self.events.emit("phase", name="prepare")
        inputs = self._inputs()
        try:
            self._run(inputs)
        finally:
            inputs.arrivals.close()

    def _run(self, inputs: Inputs) -> None:
        if len(inputs.arrivals):
            self._log(f"{len(inputs.arrivals)} shards come from the hub; training begins on the first ones")
        tokenizer = Tokenizer.load(inputs.tokenizer)
        stage = STAGES[self.job.stage](
            StageContext(job=self.job, inputs=inputs, tokenizer=tokenizer, world=self.world)
        )
        stage.prepare()
        card = ckpt.ModelCard(
            model=self.job.recipe.model,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=self.job.tokenizer.sha256,
        )
        model = self._initial_model(card, inputs, stage.section.seed)
        flops = stage.steps * stage.batch_tokens * model.flops_per_token() / self.world.size
        runtime = choose_runtime(self.job.hardware, self.device, flops, stage.fixed_shapes)
        for note in runtime.notes:
            self._log(note)
        runtime.prepare(model)
        optimizers = Optimizers(
            model, stage.section.optimizer, stage.section.schedule, stage.steps, runtime.newton_schulz_dtype
        )
        resumed = self._resume(card, stage, model, optimizers, runtime)
        steps_left = stage.steps - (resumed[1].progress.step if resumed else 0)
        if runtime.compile and steps_left:
            runtime = self._compile(stage, model, optimizers, runtime)
        self._train(stage, card, model, optimizers, runtime, resumed)

    # ----------------------------------------------------------------------------------------------
    # Before training

    def _inputs(self) -> Inputs:
        inputs = gather_inputs(self.job, self.store, self.work, fetch=self.world.is_local_main)
        self.world.barrier()
        return inputs

    def _initial_model(self, card: ckpt.ModelCard, inputs: Inputs, seed: int) -> GPT:
        torch.manual_seed(seed)
        if inputs.init_checkpoint is not None:
            return ckpt.load_model(inputs.init_checkpoint, expected=card)
        model = GPT(card.model, card.vocab_size)
        model.init_weights(seed)
        return model

    def _resume(
        self,
        card: ckpt.ModelCard,
        stage: Stage,
        model: GPT,
        optimizers: Optimizers,
        runtime: Runtime,
    ) -> tuple[ckpt.Checkpoint, ckpt.TrainingState] | None:
        prefix: str | None = None
        if self.world.is_main:
            recorded = recorded_checkpoints(self.store, self.job.prefix)
            finished = {checkpoint.rpartition("/")[0] for checkpoint in recorded}
            found, passed_over = ckpt.find_newest(
                self.store,
                self.job.prefix,
                self.work,
                lambda prefix, state: self._unusable(prefix, state, stage, finished),
            )
            for sentence in passed_over:
                self._log(f"passed over: {sentence}", "warning")
            prefix = found.prefix if found else None
        prefix = self.world.agree(prefix)
        if prefix is None:
            return None
        if self.world.is_local_main and not self.world.is_main:
            ckpt.fetch_checkpoint(self.store, prefix, self.work)
        self.world.barrier()
        checkpoint = ckpt.fetched_checkpoint(self.work, prefix)
        folder = ckpt.local_folder(self.work, prefix)
        ckpt.check_card(ckpt.load_card(folder), card, str(folder))
        ckpt.load_weights(model, ckpt.load_tensors(folder / ckpt.MODEL_WEIGHTS), str(folder))
        try:
            optimizers.load_state_tensors(ckpt.load_tensors(folder / ckpt.OPTIMIZER))
        except ValueError as error:
            raise ckpt.CheckpointError(f"{folder / ckpt.OPTIMIZER}: {error}") from error
        ckpt.set_random_state(ckpt.load_tensors(folder / ckpt.RANDOM))
        state = ckpt.load_state(folder)
        self._log(f"resuming from step {checkpoint.step} of {stage.steps}")
        self._say_what_differs(state, runtime)
        return checkpoint, state

    def _unusable(
        self, prefix: str, state: ckpt.TrainingState, stage: Stage, finished: set[str]
    ) -> str | None:
        """finished: folders of the trainings that have a receipt."""
        if (state.stage, state.fingerprint) != (self.job.stage, self.job.fingerprint):
            return f"is of {state.stage} {state.fingerprint[:12]}"
        if state.steps != stage.steps:
            return f"is of a training of {state.steps} steps, not {stage.steps}"
        if state.inputs != self._input_digests():
            return "was trained on inputs that have been rebuilt since"
        if prefix.rpartition("/")[0] in finished:
            return "belongs to a finished training, which is being rebuilt"
        return None

    def _input_digests(self) -> dict[str, str]:
        return {used.stage: used.receipt_sha256 for used in self.job.inputs}

    def _say_what_differs(self, state: ckpt.TrainingState, runtime: Runtime) -> None:
        now = self._how(runtime)
        differs = [
            f"{name} was {getattr(state, name)}, is {value}"
            for name, value in now.items()
            if getattr(state, name) != value
        ]
        if differs:
            self._log(
                f"resumed under other conditions ({'; '.join(differs)}): same data order, rounding differs",
                "warning",
            )

    def _how(self, runtime: Runtime) -> dict[str, Any]:
        """What rounding depends on, as a checkpoint keeps it."""
        return {
            "world_size": self.world.size,
            "threads": self.job.hardware.threads,
            "device": self.device.type,
            "dtype": str(runtime.dtype).removeprefix("torch."),
            "compiled": runtime.compile,
        }

    def _compile(self, stage: Stage, model: GPT, optimizers: Optimizers, runtime: Runtime) -> Runtime:
        self.events.emit("phase", name="compile")
        context = self.job.recipe.model.context
        rows = len(range(self.world.rank, stage.batch_tokens // context, self.world.size))
        problem: str | None = None
        # One process of each machine compiles, the others find its work in the cache.
        for mine in (self.world.is_local_main, not self.world.is_local_main):
            if mine and rows:
                problem = runtime.compile_blocks(
                    model, min(rows, self.job.hardware.device_batch_rows), context
                )
            self.world.barrier()
        optimizers.zero_grad()
        if problem is None:
            return runtime
        self._warn(f"torch.compile failed, training without it: {problem}")
        return dataclasses.replace(runtime, compile=False)

    # ----------------------------------------------------------------------------------------------
    # Training and after

    def _train(
        self,
        stage: Stage,
        card: ckpt.ModelCard,
        model: GPT,
        optimizers: Optimizers,
        runtime: Runtime,
        resumed: tuple[ckpt.Checkpoint, ckpt.TrainingState] | None,
    ) -> None:
        progress = resumed[1].progress if resumed else Progress()
        earlier = resumed[1].attempts if resumed else ()
        tokens_before = progress.tokens
        writer = ckpt.CheckpointWriter(
            self.store,
            self.job.prefix,
            earlier[0].token if earlier else self.job.token,
            self.work / "checkpoints",
            resumed=resumed[0] if resumed else None,
        )

        def attempts() -> tuple[ckpt.AttemptWork, ...]:
            work = ckpt.AttemptWork(
                token=self.job.token,
                tokens=progress.tokens - tokens_before,
                seconds=round(time.monotonic() - self._started, 2),
            )
            return (*earlier, work)

        def save(progress: Progress) -> None:
            if self.world.is_main:
                state = ckpt.TrainingState(
                    stage=self.job.stage,
                    fingerprint=self.job.fingerprint,
                    inputs=self._input_digests(),
                    attempts=attempts(),
                    steps=stage.steps,
                    progress=progress.model_copy(deep=True),
                    **self._how(runtime),
                )
                snapshot = ckpt.Snapshot(
                    card=card,
                    state=state,
                    weights=ckpt.copy_to_cpu(dict(model.named_parameters())),
                    optimizer=ckpt.copy_to_cpu(optimizers.state_tensors()),
                    random=ckpt.random_state(),
                )
                writer.save(snapshot, self._committed)

        def evaluate(step: int) -> dict[str, float]:
            with evaluating(model):
                return stage.evaluate(model)

        loader = stage.make_loader(progress.loader or None)
        trainer = Trainer(
            model=model,
            optimizers=optimizers,
            loader=loader,
            steps=stage.steps,
            runtime=runtime,
            world=self.world,
            events=self.events,
            save=save,
            evaluate=evaluate,
            checkpoint_every=stage.section.checkpoint_every,
            eval_every=stage.section.eval_every,
            progress=progress,
            give_up_waiting=stage.inputs.arrivals.close,
        )
        self.events.emit("phase", name="train")
        try:
            trainer.run()
        except BaseException:
            stage.inputs.arrivals.close()  # the loader may be waiting for one
            raise
        finally:
            loader.close()
            writer.wait()
        if progress.skipped_batches:
            self._warn(f"{progress.skipped_batches} batches had no target token in the loss and were skipped")
        findings = self._evaluate(stage, model, progress)
        if self.world.is_main:
            checkpoint = writer.wait()
            assert checkpoint is not None, "nothing was committed"
            epochs = loader.epochs(progress.loader)
            self._finish(stage, model, runtime, progress, findings, epochs)
            self._write_result(runtime, progress, findings, checkpoint, attempts())
        self.world.barrier()

    def _evaluate(self, stage: Stage, model: GPT, progress: Progress) -> Findings:
        self.events.emit("phase", name="evaluate")
        with evaluating(model):
            metrics = stage.evaluate(model)
        self.events.emit("eval", step=progress.step, metrics=metrics)
        progress.evaluations.append({"step": progress.step, **metrics})
        return Findings(metrics=dict(metrics))

    def _finish(
        self,
        stage: Stage,
        model: GPT,
        runtime: Runtime,
        progress: Progress,
        findings: Findings,
        epochs: float,
    ) -> None:
        with evaluating(model):
            stage.finish(model, findings)
        for sample in findings.samples:
            self.events.emit("sample", **sample)
        findings.metrics |= {
            "train_loss": sum(progress.recent) / len(progress.recent),
            "steps": float(progress.step),
            "tokens": float(progress.tokens),
            "training_seconds": round(progress.seconds, 2),
            "tokens_per_s": round(progress.tokens / progress.seconds, 1),
            "parameters": float(model.num_parameters()),
            "flops": float(progress.tokens) * model.flops_per_token(),
            "epochs": round(epochs, 3),
            "skipped_batches": float(progress.skipped_batches),
        }
        findings.tables |= {CURVE: list(progress.curve), EVALUATIONS: list(progress.evaluations)}

    def _write_result(
        self,
        runtime: Runtime,
        progress: Progress,
        findings: Findings,
        checkpoint: ckpt.Checkpoint,
        attempts: Sequence[ckpt.AttemptWork],
    ) -> None:
        gpu = {"gpu": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else {}
        result = {
            "checkpoint": {
                "step": checkpoint.step,
                "files": [file.model_dump(mode="json") for file in checkpoint.files],
            },
            "metrics": findings.metrics,
            "tables": findings.tables,
            "samples": findings.samples,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 2),
            "attempts": [work.model_dump(mode="json") for work in attempts if work.seconds is not None],
            "warnings": self.warnings,
            "hardware": {
                "device": self.device.type,
                "dtype": str(runtime.dtype).removeprefix("torch."),
                "compiled": int(runtime.compile),
                "processes": self.world.size,
                "threads": self.job.hardware.threads,
                "torch": torch.__version__,
                "cpu": processor_name(),
                **gpu,
            },
        }
        write_atomically(self.work / RESULT, result)

    def _committed(self, checkpoint: ckpt.Checkpoint) -> None:
        self.events.emit("checkpoint", step=checkpoint.step, key=checkpoint.prefix)

    def _log(self, message: str, level: str = "info") -> None:
        self.events.emit("log", level=level, message=message)

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self._log(message, "warning")


def processor_name() -> str:
    """``Intel(R) Xeon(R) …`` where the system tells, else the kind of machine."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def write_atomically(path: Path, document: dict[str, Any]) -> None:
    """JSON, all or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _describe_failure(work: Path, error: BaseException) -> None:
    """`error.json` by the first rank that fails; what the others raise follows from it."""
    if isinstance(error, TrainingStopped):
        failure = Failure.CANCELLED
    elif isinstance(error, _BAD_REQUESTS):
        failure = Failure.BAD_REQUEST
    else:
        failure = Failure.FAILED
    document = {
        "failure": failure.value,
        "message": f"{type(error).__name__}: {error}" if failure is Failure.FAILED else str(error),
        "time": time.time(),
        "traceback": "" if failure is Failure.CANCELLED else "".join(traceback.format_exception(error)),
    }
    try:
        with (work / ERROR).open("x", encoding="utf-8") as file:
            json.dump(document, file, ensure_ascii=False)
    except OSError:  # another rank was first, or nothing can be written; the traceback goes to stderr too
        return
