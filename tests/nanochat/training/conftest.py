"""A store with everything that the three training stages read, small enough to train on in a second."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.conversations import Conversation, Part, exchange, write_conversations
from nanochat.data.questions import Question, write_questions
from nanochat.events import EventStream
from nanochat.recipes import (
    Base,
    Data,
    Ingredient,
    Midtrain,
    Model,
    Optimizer,
    Recipe,
    Schedule,
    Sft,
)
from nanochat.recipes import Tokenizer as TokenizerRecipe
from nanochat.store import FileStore
from nanochat.store.digests import digest_file
from nanochat.store.receipts import FileRef, InputRef
from nanochat.tokenizer import Tokenizer
from nanochat.training.job import JobHardware, TrainingJob, TrainingStage

REPOSITORY = Path(__file__).parents[3]
SCRIPTS = {
    "base": "train_base_remote.py",
    "midtrain": "train_midtraining_remote.py",
    "sft": "train_sft_remote.py",
}
READS = {
    "base": (),
    "midtrain": ("train", "validation"),
    "sft": ("train", "validation", "mmlu", "arc_easy"),
}

FP32 = Optimizer(muon_newton_schulz_dtype="float32", muon_momentum_steps=10)
WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "row",
    "of",
    "text",
    "and",
    "says",
    "what",
    "comes",
    "next",
    "because",
    "it",
    "has",
    "seen",
    "many",
    "rows",
    "before",
]


def tiny_recipe(vocab_size: int) -> Recipe:
    """Two layers; 12 steps a stage, checkpoints every 5, evaluations every 4."""
    mixture = (Ingredient(task="identity"),)
    often = {"steps": 12, "checkpoint_every": 5, "eval_every": 4, "optimizer": FP32}
    return Recipe(
        name="tiny",
        description="for tests",
        data=Data(source="offline", shards=2),
        tokenizer=TokenizerRecipe(vocab_size=vocab_size, shards=1),
        model=Model(depth=2, width=32, heads=2, kv_heads=1, context=32),
        base=Base(batch_tokens=8 * 32, eval_tokens=512, sample_prompts=("the model",), **often),
        midtrain=Midtrain(mixture=mixture, batch_tokens=8 * 32, schedule=Schedule(warmdown=0.5), **often),
        sft=Sft(mixture=mixture, batch_rows=6, eval_questions=6, **often),
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a job left behind."""

    job: TrainingJob
    result: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def losses(self) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.events if event["type"] == "step"}

    def logs(self, level: str) -> list[str]:
        return [e["message"] for e in self.events if e["type"] == "log" and e["level"] == level]


@dataclasses.dataclass
class Workshop:
    """A store, the inputs in it, and ways to run jobs on them."""

    folder: Path
    tokenizer: Tokenizer
    recipe: Recipe
    store: FileStore
    files: dict[str, FileRef]
    runs: int = 0

    def put(self, key: str, path: Path) -> FileRef:
        file = FileRef(key=key, size_bytes=path.stat().st_size, sha256=digest_file(path))
        self.store.put_file(key, path)
        return file

    def put_shard(self, name: str, documents: list[str | None]) -> None:
        """Another shard in the place of `name`."""
        path = write_shard(self.folder / f"{name}.parquet", documents)
        self.files[name] = self.put(f"inputs/new/{name}.parquet", path)

    def job(
        self,
        stage: TrainingStage,
        *,
        init: tuple[FileRef, ...] = (),
        recipe: Recipe | None = None,
        prefix: str | None = None,
        token: str = "attempt-1",
        **hardware: Any,
    ) -> TrainingJob:
        """A job of `stage`; each `prefix` is a training of its own."""
        files, chat = self.files, stage != "base"
        settings = {"threads": 1, "device_batch_rows": 3, "device": "cpu", "precision": "float32", **hardware}
        return TrainingJob(
            stage=stage,
            stage_version=1,
            fingerprint="f" * 64,
            token=token,
            model="tiny",
            recipe=recipe or self.recipe,
            store_url=self.store.url,
            prefix=prefix or f"stages/{stage}/{'f' * 12}",
            inputs=(InputRef(stage="tokenizer", fingerprint="a" * 64, receipt_sha256="b" * 64),),
            shards=() if chat else (files["shard_0"], files["shard_1"]),
            validation=None if chat else files["validation_shard"],
            tokenizer=files["tokenizer"],
            init_checkpoint=init,
            conversations={name: files[name] for name in READS[stage]},
            hardware=JobHardware(**settings),
        )

    def work(self) -> Path:
        self.runs += 1
        return self.folder / f"work-{self.runs}"

    def run(self, job: TrainingJob) -> Outcome:
        """In this process."""
        work = self.work()
        self.train(job, work)
        return self.outcome(job, work)

    def train(self, job: TrainingJob, work: Path) -> None:
        """In this process, raising what the job raises."""
        from nanochat.training.main import run_job

        run_job(job, work / "events.jsonl", work)

    def start(self, job: TrainingJob, work: Path, processes: int = 1) -> subprocess.Popen[str]:
        """The real thing: torchrun and the stage's script."""
        work.mkdir(parents=True)
        (work / "job.json").write_bytes(job.to_bytes())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", str(REPOSITORY / "scripts" / SCRIPTS[job.stage])]
        command += [
            "--job",
            str(work / "job.json"),
            "--events",
            str(work / "events.jsonl"),
            "--work",
            str(work),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run_processes(self, job: TrainingJob, processes: int) -> Outcome:
        work = self.work()
        process = self.start(job, work, processes)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-3000:]
        return self.outcome(job, work)

    def outcome(self, job: TrainingJob, work: Path) -> Outcome:
        result = work / "result.json"
        return Outcome(
            job=job,
            result=json.loads(result.read_text()) if result.exists() else {},
            events=EventStream(FileStore(work), "events.jsonl").all(),
        )

    def files_of(self, outcome: Outcome) -> tuple[FileRef, ...]:
        return tuple(FileRef.model_validate(file) for file in outcome.result["checkpoint"]["files"])


def write_shard(path: Path, documents: list[str | None]) -> Path:
    pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), path, row_group_size=4)
    return path


def made_up_documents(seed: int, count: int) -> list[str | None]:
    numbers = random.Random(seed)
    return [
        " ".join(numbers.choice(WORDS) for _ in range(numbers.randrange(3, 25)))
        if numbers.random() > 0.05
        else None
        for _ in range(count)
    ]


def made_up_conversations(seed: int, count: int) -> list[Conversation]:
    numbers = random.Random(seed)
    conversations = []
    for _ in range(count):
        a, b = numbers.randrange(10), numbers.randrange(10)
        kind = numbers.randrange(3)
        if kind == 0:
            parts = (Part("python", f"{a}+{b}"), Part("python_output", str(a + b)))
            conversations.append(exchange(f"{a}+{b}?", parts))
        elif kind == 1:
            conversations.append(exchange("Who?", "I am " + numbers.choice(WORDS)))
        else:  # too long for a row: its answer is cut off entirely
            conversations.append(exchange("say " * 12, "no"))
    return conversations


def make_workshop(folder: Path, tokenizer: Tokenizer) -> Workshop:
    """Every input of every stage in a store under `folder`."""
    store = FileStore(folder / "store")
    shop = Workshop(folder, tokenizer, tiny_recipe(tokenizer.vocab_size), store, {})
    source = folder / "source"
    source.mkdir(parents=True)
    tokenizer.save(source / "tokenizer.json")
    write_shard(source / "shard_0.parquet", made_up_documents(0, 40))
    write_shard(source / "shard_1.parquet", made_up_documents(1, 30))
    write_shard(source / "validation_shard.parquet", made_up_documents(2, 15))
    write_conversations(source / "train.jsonl", made_up_conversations(3, 60))
    write_conversations(source / "validation.jsonl", made_up_conversations(4, 9))
    letters = ("A", "B", "C")
    questions = [
        Question(id=str(n), question=f"{n}?", choices=("x", "y", "z"), letters=letters, answer=letters[n % 3])
        for n in range(7)
    ]
    for name in ("mmlu", "arc_easy"):
        write_questions(source / f"{name}.jsonl", questions)
    for path in sorted(source.iterdir()):
        shop.files[path.stem] = shop.put(f"inputs/{path.name}", path)
    shutil.rmtree(source)
    return shop


@pytest.fixture
def workshop(tmp_path: Path, byte_tokenizer: Tokenizer) -> Workshop:
    """A fresh store with all inputs."""
    return make_workshop(tmp_path, byte_tokenizer)


@pytest.fixture(scope="session")
def trained_base(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer
) -> Callable[[Workshop], Any]:
    """put(workshop) -> files of a finished base checkpoint, copied into that workshop's store."""
    shop = make_workshop(tmp_path_factory.mktemp("base"), byte_tokenizer)
    outcome = shop.run(shop.job("base"))

    def put(workshop: Workshop) -> tuple[FileRef, ...]:
        files = shop.files_of(outcome)
        for file in files:
            workshop.store.put_file(file.key, shop.store.local_path(file.key))
        return files

    return put
