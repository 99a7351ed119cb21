from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data.conversations import ConversationError
from nanochat.data.identity import DataNeeded, conversation_digests, shard_digests, shard_files
from nanochat.data.shards import ShardError, ingest_shards, read_record
from nanochat.data.sources import get_source
from nanochat.data.stage_data import task_context, write_stage_data
from nanochat.data.tasks import TaskError
from nanochat.recipes import Base, Data, Ingredient, Midtrain, Model, Recipe, Sft, Tokenizer
from nanochat.store import FileStore

ROW = {"source": "python", "module": "m", "name": "", "kind": "docstring", "part": 0}


def recipe(*mixture: Ingredient, **sft: object) -> Recipe:
    return Recipe(
        name="one",
        description="for tests",
        data=Data(source="texts", shards=2),
        tokenizer=Tokenizer(vocab_size=300, shards=1),
        model=Model(depth=1, width=16, heads=1, kv_heads=1, context=32),
        base=Base(steps=10, batch_tokens=64),
        midtrain=Midtrain(mixture=mixture, batch_tokens=64, steps=5),
        sft=Sft(mixture=mixture, **{"mmlu_task": None, "arc_easy_task": None, **sft}),  # type: ignore[arg-type]
    )


@pytest.fixture
def make_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """make_source(**columns): a source `texts` of two shards and a validation shard, with null rows."""

    def make(**columns: object) -> Path:
        folder = tmp_path / "texts"
        folder.mkdir()
        rows = [{"text": text, **columns} for text in ("the cat saw the dog", None, "the cat and the dog")]
        for name in "abc":
            pq.write_table(pa.Table.from_pylist(rows * 30), folder / f"{name}.parquet", compression="none")
        monkeypatch.setenv("NANOCHAT_SOURCES", f"folder:texts={folder}")
        return folder

    return make


def ingest(store: FileStore) -> None:
    source = get_source("texts")
    keys = (*source.training_shards(), source.validation_shard())
    assert ingest_shards(store, source, keys).failed == {}


def write(recipe: Recipe, store: FileStore, folder: Path, stage: str = "midtrain") -> list[str]:
    folder.mkdir()
    context = task_context(store, recipe, corpus_digest="x")
    data = write_stage_data(recipe, getattr(recipe, stage), context, folder, lambda line: None)
    return [path.name for path in data.files]


def test_words_are_taken_from_a_source_whose_shards_have_null_rows(
    make_source: Callable[..., Path], tmp_store: FileStore, tmp_path: Path
) -> None:
    make_source()
    ingest(tmp_store)
    spelling = recipe(Ingredient(task="simple_spelling", rows=3))
    assert task_context(tmp_store, spelling, corpus_digest="x").words() == ("the", "cat", "dog", "and", "saw")


def test_a_source_of_texts_alone_cannot_give_documents_and_a_plan_says_so(
    make_source: Callable[..., Path], tmp_store: FileStore, tmp_path: Path
) -> None:
    make_source()
    ingest(tmp_store)
    wrong = recipe(Ingredient(task="docstring_chat", rows=3), mmlu_task="offline_mmlu")
    with pytest.raises(DataNeeded) as raised:
        conversation_digests(tmp_store, wrong, "sft")
    chat, mmlu = raised.value.needs
    assert "'docstring_chat' is made from documentation, and source 'texts'" in chat
    assert "'offline_mmlu' is made from documentation, and source 'texts'" in mmlu
    for stage in ("midtrain", "sft"):
        with pytest.raises(TaskError, match="'docstring_chat' is made from documentation"):
            write(wrong, tmp_store, tmp_path / stage, stage)
    asking = recipe(Ingredient(task="arithmetic", rows=3), arc_easy_task="offline_arc_easy")
    with pytest.raises(TaskError, match="'offline_arc_easy' is made from documentation"):
        write(asking, tmp_store, tmp_path / "asking", "sft")


def test_a_folder_written_like_the_offline_shards_gives_documents(
    make_source: Callable[..., Path], tmp_store: FileStore
) -> None:
    make_source(**ROW)
    ingest(tmp_store)
    chat = recipe(Ingredient(task="docstring_chat", rows=3))
    assert len(task_context(tmp_store, chat, corpus_digest="x").documents()) == 2 * 2 * 30
    assert len(conversation_digests(tmp_store, chat, "midtrain")) == 1


def test_a_damaged_shard_is_found_before_its_words_are_used(
    make_source: Callable[..., Path], tmp_store: FileStore, tmp_path: Path
) -> None:
    make_source()
    ingest(tmp_store)
    record = read_record(tmp_store, "texts", "texts_b")
    assert record is not None
    tmp_store.put(record.key, tmp_store.get(record.key).replace(b"the cat saw", b"the cat was", 1))
    with pytest.raises(ShardError, match="shard texts_b of texts is damaged in the store"):
        write(recipe(Ingredient(task="simple_spelling", rows=3)), tmp_store, tmp_path / "data")


def test_a_wrong_line_of_a_users_file_stops_the_mixture_and_no_plan(
    make_source: Callable[..., Path], tmp_store: FileStore, tmp_path: Path
) -> None:
    make_source()
    ingest(tmp_store)
    own = tmp_path / "own.jsonl"
    own.write_text("not json\n")
    wrong = recipe(Ingredient(task=f"jsonl:{own}"))
    assert len(conversation_digests(tmp_store, wrong, "midtrain")) == 1
    with pytest.raises(ConversationError, match=r"own\.jsonl: 1 problem(.|\n)*line 1: not JSON"):
        write(wrong, tmp_store, tmp_path / "data")
    own.unlink()
    with pytest.raises(DataNeeded, match=r"own\.jsonl is no file\. Correct the path"):
        conversation_digests(tmp_store, wrong, "midtrain")


def test_everything_that_is_missing_is_named_once_and_at_once(
    make_source: Callable[..., Path], tmp_store: FileStore
) -> None:
    make_source()
    plain = recipe(Ingredient(task="arithmetic", rows=3))
    with pytest.raises(DataNeeded) as raised:
        shard_digests(tmp_store, plain, count=2, validation=True)
    (need,) = raised.value.needs
    assert "3 of 3 shards of texts are missing: texts_a…texts_b, texts_c (not in the store)" in need
    assert "--partition-range texts_a...texts_b` and `dg launch --assets validation_files" in need
    words = recipe(*(Ingredient(task=task, rows=3) for task in ("simple_spelling", "spelling_bee")))
    with pytest.raises(DataNeeded) as raised:
        conversation_digests(tmp_store, words, "midtrain")
    assert str(raised.value).count("are missing") == len(raised.value.needs) == 1


def test_a_shard_that_is_only_recorded_identifies_a_stage_and_is_read_from_its_address(
    make_source: Callable[..., Path], tmp_store: FileStore
) -> None:
    make_source()
    ingest(tmp_store)
    plain = recipe(Ingredient(task="arithmetic", rows=3))
    files = shard_files(tmp_store, plain)
    assert [file.name for file in (*files.train, files.validation)] == [
        f"texts_{name}.parquet" for name in "abc"
    ]
    assert files.urls == {}
    digests = shard_digests(tmp_store, plain, count=2, validation=True)
    assert list(digests) == ["texts_a", "texts_b", "validation texts_c"]
    record = read_record(tmp_store, "texts", "texts_b")
    assert record is not None
    tmp_store.put("shards/texts/texts_b.json", record.model_copy(update={"mode": "reference"}).to_bytes())
    assert shard_digests(tmp_store, plain, count=2, validation=True) == digests
    referenced = shard_files(tmp_store, plain)
    assert (referenced.train, referenced.validation) == (files.train, files.validation)
    assert referenced.urls == {record.key: record.url}
