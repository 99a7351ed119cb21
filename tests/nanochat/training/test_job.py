"""Whole jobs, small: the three stages in turn, interrupted, on several processes, with bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nanochat.data.conversations import exchange, write_conversations
from nanochat.data.questions import Question, write_questions
from nanochat.store.receipts import FileRef, Receipt, write_receipt
from nanochat.training import checkpoint as ckpt
from nanochat.training import conversation_loader
from nanochat.training.checkpoint import CheckpointError
from nanochat.training.checkpoint_folders import checkpoint_prefix, drop_leftovers, list_checkpoints
from nanochat.training.trainer import Trainer, TrainingStopped

if TYPE_CHECKING:
    from conftest import Workshop

PutBase = Callable[["Workshop"], tuple[FileRef, ...]]


def test_the_three_stages_train_one_after_the_other(workshop: Workshop) -> None:
    base = workshop.run(workshop.job("base"))
    assert list(base.losses) == list(range(1, 13))
    assert base.losses[1] == pytest.approx(math.log(workshop.tokenizer.vocab_size), rel=1e-3)
    assert base.losses[12] < base.losses[1] - 0.5
    assert base.result["metrics"]["val_bpb"] > 0
    assert base.result["samples"][0]["prompt"] == "the model"
    assert {event["step"] for event in base.events if event["type"] == "eval"} == {4, 8, 12}
    assert {event["step"] for event in base.events if event["type"] == "checkpoint"} == {5, 10, 12}
    step = next(event for event in base.events if event["type"] == "step")
    assert {
        "loss",
        "lr_multiplier",
        "matrix_lr",
        "embedding_lr",
        "unembedding_lr",
        "tokens_per_s",
        "eta_s",
        "grad_norm",
        "memory_bytes",
        "tokens",
        "steps",
    } <= set(step)

    mid = workshop.run(workshop.job("midtrain", init=workshop.files_of(base)))
    assert mid.losses[12] < mid.losses[1]
    assert mid.result["metrics"]["clipped_conversations"] > 0

    sft = workshop.run(workshop.job("sft", init=workshop.files_of(mid)))
    metrics = sft.result["metrics"]
    assert metrics["mmlu_questions"] + metrics["mmlu_skipped"] == 6
    assert sft.result["checkpoint"]["step"] == 12
    assert [row["step"] for row in sft.result["tables"]["evaluations"]] == [4, 8, 12]
    for file in workshop.files_of(sft):
        ckpt.verify_file(workshop.store.local_path(file.key), file, "store")


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process goes away right after that step."""
    original = Trainer._report

    def report(self: Trainer, **fields: Any) -> None:
        original(self, **fields)
        if self.progress.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_report", report)


@pytest.mark.parametrize("stage", ["base", "midtrain", "sft"])
def test_a_job_interrupted_twice_gives_the_same_losses_as_one_that_was_not(
    workshop: Workshop, trained_base: PutBase, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    init = () if stage == "base" else trained_base(workshop)
    whole = workshop.run(workshop.job(stage, init=init, prefix="stages/whole/x"))
    losses: dict[int, float] = {}
    for attempt, stop_at in enumerate((7, 11), start=1):
        job = workshop.job(stage, init=init, token=f"attempt-{attempt}")
        work = workshop.work()
        with monkeypatch.context() as patch:
            interrupt_after(patch, stop_at)
            with pytest.raises(KeyboardInterrupt):
                workshop.train(job, work)
        losses |= workshop.outcome(job, work).losses
    last = workshop.run(workshop.job(stage, init=init, token="attempt-3"))
    assert "resuming from step 10 of 12" in last.logs("info")
    assert list(last.losses) == [11, 12]
    losses |= last.losses
    assert losses == whole.losses
    assert last.result["metrics"]["val_loss"] == whole.result["metrics"]["val_loss"]
    for table in ("curve", "evaluations"):
        assert last.result["tables"][table] == whole.result["tables"][table]
    assert [row["step"] for row in last.result["tables"]["curve"]] == list(range(1, 13))
    assert last.result["metrics"]["train_loss"] == whole.result["metrics"]["train_loss"]
    attempts = last.result["attempts"]
    assert [work["token"] for work in attempts] == ["attempt-1", "attempt-2", "attempt-3"]
    assert sum(work["tokens"] for work in attempts) == last.result["tokens"]
    assert all(work["seconds"] > 0 for work in attempts)
    same = {file.name: file.sha256 for file in workshop.files_of(whole)}
    assert {file.name: file.sha256 for file in workshop.files_of(last)}["model.safetensors"] == same[
        "model.safetensors"
    ]


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_two_processes_learn_what_one_learns_from_the_same_global_batch(
    workshop: Workshop, trained_base: PutBase, stage: str
) -> None:
    """Masked rows included: of sft's conversations a third have no token in the loss, batches of 5
    are split 3 and 2, and each process accumulates over rows of its own."""
    recipe = workshop.recipe
    sft = dataclasses.replace(recipe.sft, batch_rows=5, steps=20)
    recipe = recipe.replace(base=dataclasses.replace(recipe.base, steps=20), sft=sft)
    init = () if stage == "base" else trained_base(workshop)
    one = workshop.run(workshop.job(stage, init=init, recipe=recipe, prefix="stages/one/x"))
    two = workshop.run_processes(
        workshop.job(
            stage, init=init, recipe=recipe, prefix="stages/two/x", processes=2, device_batch_rows=1
        ),
        2,
    )
    assert list(two.losses) == list(range(1, 21))
    for step, loss in one.losses.items():
        assert two.losses[step] == pytest.approx(loss, abs=1e-4), f"step {step}"
    for name in ("val_loss", "tokens", "skipped_batches"):
        assert two.result["metrics"][name] == pytest.approx(one.result["metrics"][name], abs=1e-4)


def test_sigterm_ends_two_processes_after_a_checkpoint_and_one_goes_on_in_the_same_order(
    workshop: Workshop,
) -> None:
    recipe = workshop.recipe.replace(
        base=dataclasses.replace(workshop.recipe.base, steps=4000, checkpoint_every=5000, eval_every=5000)
    )
    work = workshop.work()
    process = workshop.start(workshop.job("base", recipe=recipe, processes=2), work, processes=2)
    deadline = time.monotonic() + 60
    while not (work / "events.jsonl").exists() or b'"step"' not in (work / "events.jsonl").read_bytes():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    error = json.loads((work / "error.json").read_text())
    assert error["failure"] == "CANCELLED"
    interrupted = workshop.outcome(workshop.job("base"), work)
    last = max(interrupted.losses)
    (kept,) = list_checkpoints(workshop.store, "stages/base/ffffffffffff/checkpoints")
    step = int(kept[-8:])
    assert step == last
    assert f"a checkpoint of step {step} of 4000 is kept" in error["message"]

    # The state on two processes is the position in the text that one process reaches as well.
    shorter = recipe.replace(base=dataclasses.replace(recipe.base, steps=step))
    alone = workshop.run(workshop.job("base", recipe=shorter, prefix="stages/alone/x"))
    states = [
        ckpt.TrainingState.read(workshop.store, f"{checkpoint_prefix(prefix, 'attempt-1', step)}/state.json")
        for prefix in ("stages/base/ffffffffffff", "stages/alone/x")
    ]
    assert states[0].progress.loader == states[1].progress.loader
    assert states[0].progress.tokens == states[1].progress.tokens == alone.result["tokens"]


def test_more_processes_than_rows_do_not_hang(workshop: Workshop) -> None:
    """Two processes, one row a batch: the second has nothing to do and still takes part."""
    recipe = workshop.recipe.replace(base=dataclasses.replace(workshop.recipe.base, batch_tokens=32, steps=4))
    one = workshop.run(workshop.job("base", recipe=recipe, prefix="stages/one/x"))
    two = workshop.run_processes(
        workshop.job("base", recipe=recipe, prefix="stages/two/x", processes=2), processes=2
    )
    assert two.losses == pytest.approx(one.losses, abs=1e-4)


def test_accumulation_in_pieces_of_any_size_learns_the_same(workshop: Workshop) -> None:
    whole = workshop.run(workshop.job("base", prefix="stages/whole/x", device_batch_rows=8))
    pieces = workshop.run(workshop.job("base", prefix="stages/pieces/x", device_batch_rows=3))
    assert pieces.losses == pytest.approx(whole.losses, abs=2e-5)


def often(workshop: Workshop, **settings: int) -> Any:
    return workshop.recipe.replace(base=dataclasses.replace(workshop.recipe.base, **settings))


def evaluated(outcome: Any) -> list[int]:
    return [row["step"] for row in outcome.result["tables"]["evaluations"]]


def test_an_evaluation_that_fails_costs_no_training_and_is_made_up_for(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = often(workshop, eval_every=5)

    def fail(*arguments: Any) -> None:
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("nanochat.training.stages.base.BaseStage.evaluate", fail)
        with pytest.raises(MemoryError):
            workshop.train(workshop.job("base", recipe=recipe), workshop.work())
    again = workshop.run(workshop.job("base", recipe=recipe, token="attempt-2"))
    assert list(again.losses) == list(range(6, 13))
    assert evaluated(again) == [5, 10, 12]


def test_what_is_resumed_lacks_no_evaluation_where_checkpoints_and_evaluations_coincide(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = often(workshop, checkpoint_every=4, eval_every=4)
    whole = workshop.run(workshop.job("base", recipe=recipe, prefix="stages/whole/x"))
    for attempt, stop_at in enumerate((6, 9), start=1):
        with monkeypatch.context() as patch:
            interrupt_after(patch, stop_at)
            with pytest.raises(KeyboardInterrupt):
                workshop.train(workshop.job("base", recipe=recipe, token=f"a{attempt}"), workshop.work())
    last = workshop.run(workshop.job("base", recipe=recipe, token="a3"))
    assert evaluated(last) == [4, 8, 12]
    assert last.result["tables"]["evaluations"] == whole.result["tables"]["evaluations"]


def test_the_training_loss_is_the_mean_of_the_newest_steps_and_not_of_the_curves_points(
    workshop: Workshop,
) -> None:
    """450 steps leave a point in every second."""
    outcome = workshop.run(workshop.job("base", recipe=often(workshop, steps=450, checkpoint_every=450)))
    newest = list(outcome.losses.values())[-50:]
    assert outcome.result["metrics"]["train_loss"] == pytest.approx(sum(newest) / 50)
    assert len(outcome.result["tables"]["curve"]) == 225


def test_a_resumed_job_says_which_precision_it_was(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            workshop.train(workshop.job("base"), workshop.work())
    again = workshop.run(workshop.job("base", token="attempt-2", precision="bfloat16"))
    assert any("dtype was float32, is bfloat16" in message for message in again.logs("warning"))


def test_the_result_names_the_processor(workshop: Workshop) -> None:
    assert workshop.run(workshop.job("base")).result["hardware"]["cpu"]


def test_a_pass_over_a_mixture_is_packed_once_for_its_steps_and_once_for_its_rows(
    workshop: Workshop, trained_base: PutBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[int] = []
    original = conversation_loader.pack_best_fit

    def pack(lengths: Any, *arguments: Any) -> Any:
        packed.append(len(lengths))
        return original(lengths, *arguments)

    monkeypatch.setattr(conversation_loader, "pack_best_fit", pack)
    recipe = workshop.recipe
    recipe = recipe.replace(midtrain=dataclasses.replace(recipe.midtrain, steps=None, batch_tokens=16 * 32))
    outcome = workshop.run(workshop.job("midtrain", init=trained_base(workshop), recipe=recipe))
    assert outcome.result["metrics"]["epochs"] >= 1
    # The last batch may begin a second pass.
    assert len(packed) <= 3


def test_batches_without_a_target_are_skipped_and_counted(workshop: Workshop, trained_base: PutBase) -> None:
    path = workshop.folder / "train.jsonl"
    masked, answered = exchange("too long " * 5, "no"), exchange("Hi", "Hello")
    write_conversations(path, [masked] * 9 + [answered])
    workshop.files["train"] = workshop.put("inputs/masked.jsonl", path)
    recipe = workshop.recipe.replace(sft=dataclasses.replace(workshop.recipe.sft, batch_rows=2, steps=5))
    outcome = workshop.run(workshop.job("sft", init=trained_base(workshop), recipe=recipe))
    assert list(outcome.losses) == [1, 2, 3, 4, 5]
    skipped = outcome.result["metrics"]["skipped_batches"]
    assert 16 <= skipped <= 24
    assert outcome.result["warnings"] == [
        f"{skipped:.0f} batches had no target token in the loss and were skipped"
    ]
    assert all(math.isfinite(loss) for loss in outcome.losses.values())


# --------------------------------------------------------------------------------------------------
# What is resumed, and what is not


def finished_checkpoint(workshop: Workshop) -> str:
    outcome = workshop.run(workshop.job("base"))
    return checkpoint_prefix(outcome.job.prefix, "attempt-1", outcome.result["checkpoint"]["step"])


def damage(workshop: Workshop, key: str, how: str) -> None:
    path = workshop.store.local_path(key)
    assert path is not None
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    elif how == "truncated":
        del data[len(data) // 2 :]
    elif how == "pickle":
        data[:] = b"\x80\x04\x95" + bytes(len(data) - 3)
    path.unlink()
    if how != "deleted":
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped", "truncated", "pickle", "deleted"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_torn_checkpoint_is_passed_over_by_name(workshop: Workshop, name: str, how: str) -> None:
    prefix = finished_checkpoint(workshop)
    damage(workshop, f"{prefix}/{name}", how)
    again = workshop.run(workshop.job("base", token="attempt-2"))
    (sentence,) = [message for message in again.logs("warning") if message.startswith("passed over")]
    assert prefix in sentence
    assert list(again.losses) == [11, 12]


def test_a_finished_training_that_lacks_only_its_receipt_is_not_trained_again(workshop: Workshop) -> None:
    first = workshop.run(workshop.job("base"))
    again = workshop.run(workshop.job("base", token="attempt-2"))
    assert again.losses == {}
    assert again.result["metrics"]["val_bpb"] == first.result["metrics"]["val_bpb"]
    assert again.result["metrics"]["train_loss"] == first.result["metrics"]["train_loss"]
    assert again.result["checkpoint"] == first.result["checkpoint"]


@pytest.mark.parametrize("finisher", ["attempt-1", "attempt-2"])
def test_a_rebuild_writes_beside_the_training_that_it_replaces_and_does_not_go_on_from_it(
    workshop: Workshop, finisher: str
) -> None:
    """Also where that training's last attempt found everything trained and only wrote the receipt."""
    first = workshop.run(workshop.job("base"))
    receipt = Receipt(
        stage="base",
        stage_version=1,
        fingerprint="f" * 64,
        token=finisher,
        created_at="2026-01-01T00:00:00Z",
        seconds=1.0,
        outputs=workshop.files_of(first),
    )
    write_receipt(workshop.store, receipt)
    again = workshop.run(workshop.job("base", token="attempt-3"))
    assert again.losses == first.losses
    assert any("belongs to a finished training" in message for message in again.logs("warning"))
    drop_leftovers(workshop.store, again.job.prefix)
    for file in workshop.files_of(first):
        ckpt.verify_file(workshop.store.local_path(file.key), file, "store")


def test_a_checkpoint_on_rebuilt_inputs_is_not_resumed(workshop: Workshop) -> None:
    workshop.run(workshop.job("base"))
    job = workshop.job("base", token="attempt-2")
    rebuilt = tuple(used.model_copy(update={"receipt_sha256": "c" * 64}) for used in job.inputs)
    again = workshop.run(job.model_copy(update={"inputs": rebuilt}))
    assert list(again.losses) == list(range(1, 13))
    assert any("inputs that have been rebuilt" in message for message in again.logs("warning"))


# --------------------------------------------------------------------------------------------------
# Bad input


def failure_of(workshop: Workshop, job: Any) -> dict[str, str]:
    work: Path = workshop.work()
    with pytest.raises(ValueError):
        workshop.train(job, work)
    assert not (work / "result.json").exists()
    document: dict[str, str] = json.loads((work / "error.json").read_text())
    return document


def test_a_shard_that_is_not_what_was_recorded_is_refused_before_training(workshop: Workshop) -> None:
    damage(workshop, "inputs/shard_1.parquet", "flipped")
    error = failure_of(workshop, workshop.job("base"))
    assert error["failure"] == "BAD_REQUEST"
    assert "inputs/shard_1.parquet is damaged: its sha256 is" in error["message"]
    assert workshop.files["shard_1"].sha256 in error["message"]
    assert "training_files" in error["message"]


def test_an_upstream_checkpoint_of_another_architecture_or_tokenizer_is_refused(
    workshop: Workshop, trained_base: PutBase
) -> None:
    init = trained_base(workshop)
    other = workshop.recipe.replace(model=dataclasses.replace(workshop.recipe.model, depth=3))
    error = failure_of(workshop, workshop.job("midtrain", init=init, recipe=other))
    assert "depth is 2, not 3" in error["message"]
    job = workshop.job("midtrain", init=init)
    tokenizer = workshop.folder / "other.json"
    document = workshop.tokenizer.to_json()
    tokenizer.write_text(json.dumps({**document, "provenance": {"made": "elsewhere"}}))
    job = job.model_copy(update={"tokenizer": workshop.put("inputs/other.json", tokenizer)})
    assert "its tokenizer is" in failure_of(workshop, job)["message"]


def test_a_wrong_line_of_conversations_is_named(workshop: Workshop, trained_base: PutBase) -> None:
    path = workshop.folder / "train.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    workshop.files["train"] = workshop.put("inputs/wrong.jsonl", path)
    error = failure_of(workshop, workshop.job("midtrain", init=trained_base(workshop)))
    assert error["failure"] == "BAD_REQUEST"
    assert "wrong.jsonl:1" in error["message"]


def conversations(workshop: Workshop, name: str, rows: list[Any]) -> None:
    path = workshop.folder / f"{name}.jsonl"
    write_conversations(path, rows)
    workshop.files[name] = workshop.put(f"inputs/new/{name}.jsonl", path)


MASKED = [exchange("too long " * 5, "no")] * 3


def test_conversations_without_a_target_are_refused_before_training(
    workshop: Workshop, trained_base: PutBase
) -> None:
    init = trained_base(workshop)
    conversations(workshop, "validation", MASKED)
    error = failure_of(workshop, workshop.job("sft", init=init))
    assert error["failure"] == "BAD_REQUEST"
    assert error["message"].startswith(
        "validation.jsonl: none of the 3 conversations has a token in the loss (3 are clipped at 32 tokens)"
    )
    conversations(workshop, "train", MASKED)
    assert failure_of(workshop, workshop.job("sft", init=init))["message"].startswith("train.jsonl: none")


def test_a_letter_of_several_tokens_is_refused_before_training(
    workshop: Workshop, trained_base: PutBase
) -> None:
    path = workshop.folder / "mmlu.jsonl"
    write_questions(path, [Question("7", "?", ("x", "y"), ("A", "É"), "A")])
    workshop.files["mmlu"] = workshop.put("inputs/mmlu_letters.jsonl", path)
    error = failure_of(workshop, workshop.job("sft", init=trained_base(workshop)))
    assert error["failure"] == "BAD_REQUEST"
    assert "question 7: the letter 'É' is 2 tokens" in error["message"]


def test_validation_text_that_fills_no_row_and_a_missing_device_are_bad_requests(workshop: Workshop) -> None:
    workshop.put_shard("validation_shard", ["a"])
    error = failure_of(workshop, workshop.job("base"))
    assert error["failure"] == "BAD_REQUEST"
    assert "does not fill one row of 32 tokens" in error["message"]
    missing = "mps" if torch.cuda.is_available() else "cuda"
    error = failure_of(workshop, workshop.job("base", device=missing))
    assert error["failure"] == "BAD_REQUEST"
    assert f"device '{missing}' was asked for" in error["message"]


def test_code_that_fails_leaves_its_traceback(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Trainer, *arguments: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Trainer, "_step", broken)
    work = workshop.work()
    with pytest.raises(RuntimeError):
        workshop.train(workshop.job("base"), work)
    error = json.loads((work / "error.json").read_text())
    assert error["failure"] == "FAILED"
    assert error["message"] == "RuntimeError: a fault of ours"
    assert "in broken" in error["traceback"]


def test_a_compiler_that_fails_is_a_warning_and_the_training_is_the_same(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = workshop.run(workshop.job("base", prefix="stages/plain/x"))

    def fail(*arguments: Any) -> None:
        raise RuntimeError("g++: internal compiler error")

    monkeypatch.setattr("torch.compile", lambda *arguments, **settings: fail)
    compiled = workshop.run(workshop.job("base", compile="on"))
    assert compiled.losses == plain.losses
    assert compiled.result["hardware"]["compiled"] == 0
    assert compiled.result["warnings"] == [
        "torch.compile failed, training without it: RuntimeError: g++: internal compiler error"
    ]


def test_a_request_to_stop_in_this_process_keeps_a_checkpoint(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._report

    def report(self: Trainer, **fields: Any) -> None:
        original(self, **fields)
        if self.progress.step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_report", report)
    work = workshop.work()
    job = workshop.job("base")
    with pytest.raises(TrainingStopped, match="checkpoint of step"):
        workshop.train(job, work)
    (kept,) = list_checkpoints(workshop.store, f"{job.prefix}/checkpoints")
    assert int(kept[-8:]) in (3, 4)


def test_load_model_names_what_is_wrong(workshop: Workshop) -> None:
    prefix = finished_checkpoint(workshop)
    folder = workshop.store.local_path(f"{prefix}/model.json").parent
    model = ckpt.load_model(folder)
    assert model.num_parameters() > 0
    assert not model.training
    with pytest.raises(CheckpointError, match="no usable model card"):
        ckpt.load_model(workshop.folder)
    damage(workshop, f"{prefix}/model.safetensors", "pickle")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        ckpt.load_model(folder)
