"""What makes a stage stale, and what does not."""

from __future__ import annotations

import dataclasses
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import stages
from nanochat.data.shards import ingest_shards
from nanochat.data.sources import get_source
from nanochat.recipes import Base, Data, Ingredient, Midtrain, Model, Recipe, Sft, Tokenizer
from nanochat.stages import Status, resolve
from nanochat.store import FileStore
from nanochat.store.leases import LeaseKeeper, utc_now
from nanochat.store.receipts import FileRef, InputRef, Receipt, point, write_receipt

SENTENCE = "A small sentence that is long enough to be a document of its own, number {}."


@pytest.fixture
def recipe(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    folder = tmp_path / "text"
    folder.mkdir()
    for shard in range(3):
        table = pa.table({"text": [SENTENCE.format(f"{shard}.{row}") for row in range(20)]})
        pq.write_table(table, folder / f"{shard}.parquet")
    monkeypatch.setenv("NANOCHAT_SOURCES", f"folder:words={folder}")
    mixture = (Ingredient(task="identity"), Ingredient(task="arithmetic", rows=10))
    return Recipe(
        name="one",
        description="for tests",
        data=Data(source="words", shards=2),
        tokenizer=Tokenizer(vocab_size=300, shards=1),
        model=Model(depth=1, width=16, heads=1, kv_heads=1, context=32),
        base=Base(steps=10, batch_tokens=64),
        midtrain=Midtrain(mixture=mixture, batch_tokens=64, steps=5),
        sft=Sft(mixture=mixture, mmlu_task="arithmetic", arc_easy_task="arithmetic"),
    )


@pytest.fixture
def store(tmp_path, recipe: Recipe) -> FileStore:
    store = FileStore(tmp_path / "store")
    ingest(store)
    return store


def ingest(store: FileStore) -> None:
    source = get_source("words")
    report = ingest_shards(store, source, [*source.training_shards(), source.validation_shard()])
    assert not report.failed


def build(recipe: Recipe, store: FileStore, only: tuple[str, ...] | None = None) -> None:
    """Write a receipt for every stage, as if each had been built, in order."""
    for name in stages.STAGES:
        state = resolve(recipe, store)[name]
        if only and name not in only:
            continue
        assert state.fingerprint is not None, state.needs
        assert state.identity is not None
        store.put(state.identity.key(), state.identity.to_bytes())
        output = f"{state.prefix}/output/{name}"
        store.put(output, name.encode())
        receipts = {up: resolve(recipe, store)[up].receipt for up in state.spec.upstream}
        write_receipt(
            store,
            Receipt(
                stage=name,
                stage_version=state.spec.version,
                fingerprint=state.fingerprint,
                token=f"{name}-{utc_now():%H%M%S%f}",
                created_at=utc_now(),
                seconds=1,
                inputs=tuple(
                    InputRef(stage=up, fingerprint=receipt.fingerprint, receipt_sha256=receipt.digest())
                    for up, receipt in receipts.items()
                    if receipt
                ),
                outputs=(FileRef(key=output, size_bytes=len(name), sha256="0" * 64),),
            ),
        )
        point(store, recipe.name, name, state.fingerprint)


def stale(recipe: Recipe, store: FileStore) -> set[str]:
    return {name for name, state in resolve(recipe, store).items() if state.status is not Status.FRESH}


def test_what_was_built_is_fresh(recipe: Recipe, store: FileStore) -> None:
    assert {state.status for state in resolve(recipe, store).values()} == {Status.MISSING}
    build(recipe, store)
    assert stale(recipe, store) == set()


@pytest.mark.parametrize(
    ("section", "change", "expected", "reason"),
    [
        ("base", {"steps": 11}, {"base", "midtrain", "sft"}, "base.steps: 10 → 11"),
        ("midtrain", {"steps": 6}, {"midtrain", "sft"}, "midtrain.steps: 5 → 6"),
        ("midtrain", {"seed": 7}, {"midtrain_data", "midtrain", "sft"}, "midtrain.seed: 42 → 7"),
        ("sft", {"batch_rows": 8}, {"sft"}, "sft.batch_rows: 32 → 8"),
        ("sft", {"eval_questions": 5}, {"sft_data", "sft"}, "sft.eval_questions: 1024 → 5"),
        (
            "tokenizer",
            {"vocab_size": 301},
            {"tokenizer", "base", "midtrain", "sft"},
            "tokenizer.vocab_size: 300 → 301",
        ),
        # Arithmetic and the identity file read no training text, so their mixtures stay.
        ("data", {"shards": 1}, {"base", "midtrain", "sft"}, None),
        ("hardware", {"gpus": 8, "device_batch_rows": 3}, set(), None),
        ("evaluation", {"min_mmlu_accuracy": 0.9}, set(), None),
        ("base", {"checkpoint_every": 3, "eval_every": 7, "sample_prompts": ("Hello",)}, set(), None),
    ],
)
def test_a_changed_setting_makes_its_stage_and_what_follows_stale(
    recipe: Recipe, store: FileStore, section: str, change: dict, expected: set[str], reason: str | None
) -> None:
    build(recipe, store)
    changed = recipe.replace(**{section: dataclasses.replace(getattr(recipe, section), **change)})
    assert stale(changed, store) == expected
    if reason:
        first = next(name for name in stages.STAGES if name in expected)
        assert reason in resolve(changed, store)[first].reasons


def test_raising_a_stages_version_makes_it_stale(
    recipe: Recipe, store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(recipe, store)
    raised = dataclasses.replace(stages.STAGES["midtrain"], version=2)
    monkeypatch.setitem(stages.STAGES, "midtrain", raised)
    assert stale(recipe, store) == {"midtrain", "sft"}
    assert "version of stage midtrain: 1 → 2" in resolve(recipe, store)["midtrain"].reasons


def test_moving_the_store_changes_nothing(recipe: Recipe, store: FileStore, tmp_path) -> None:
    build(recipe, store)
    shutil.move(store.root, tmp_path / "elsewhere")
    assert stale(recipe, FileStore(tmp_path / "elsewhere")) == set()


def test_another_name_is_the_same_model(recipe: Recipe, store: FileStore) -> None:
    build(recipe, store)
    assert stale(recipe.replace(name="two", description="other words"), store) == set()


def test_a_rebuilt_input_makes_what_was_built_on_it_stale(recipe: Recipe, store: FileStore) -> None:
    build(recipe, store)
    build(recipe, store, only=("base",))
    states = resolve(recipe, store)
    assert stale(recipe, store) == {"midtrain", "sft"}
    assert "its input base was rebuilt" in states["midtrain"].reasons[0]
    assert states["sft"].reasons[0].startswith("its input midtrain is stale")


def test_a_lost_output_makes_its_stage_stale(recipe: Recipe, store: FileStore) -> None:
    build(recipe, store)
    state = resolve(recipe, store)["sft"]
    store.delete(f"{state.prefix}/output/sft")
    assert stale(recipe, store) == {"sft"}
    assert "is gone" in resolve(recipe, store)["sft"].reasons[0]


def test_other_text_makes_the_stages_that_read_it_stale(recipe: Recipe, store: FileStore, tmp_path) -> None:
    build(recipe, store)
    table = pa.table({"text": [SENTENCE.format("changed")] * 20})
    pq.write_table(table, tmp_path / "text" / "1.parquet")
    ingest(store)
    assert stale(recipe, store) == {"base", "midtrain", "sft"}
    assert resolve(recipe, store)["base"].reasons == ("data words_1 changed",)


def test_a_stage_without_its_shards_says_which_and_how_to_get_them(recipe: Recipe, tmp_path) -> None:
    states = resolve(recipe, FileStore(tmp_path / "empty"))
    assert states["base"].fingerprint is None
    assert any(
        "words_0…words_1" in need and "dg launch --job ingest_shards" in need for need in states["base"].needs
    )
    assert states["midtrain_data"].fingerprint is not None


def test_a_live_lease_shows_as_running_with_its_owner(recipe: Recipe, store: FileStore) -> None:
    build(recipe, store)
    prefix = resolve(recipe, store)["base"].prefix
    keeper = LeaseKeeper(store, f"{prefix}/lease.json", token="t", owner="supervisor", ttl_s=60)
    keeper.take()
    state = resolve(recipe, store)["base"]
    assert state.status is Status.RUNNING
    assert state.reasons[0].startswith("supervisor on ")
    keeper.release()
    assert stale(recipe, store) == set()


def test_a_users_conversation_file_counts_by_content_not_by_path(
    recipe: Recipe, store: FileStore, tmp_path
) -> None:
    line = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}\n'
    first, second = tmp_path / "a.jsonl", tmp_path / "deep" / "b.jsonl"
    second.parent.mkdir()
    first.write_text(line)
    second.write_text(line)

    def with_file(path) -> Recipe:
        assert recipe.sft is not None
        mixture = (*recipe.sft.mixture, Ingredient(task=f"jsonl:{path}"))
        return recipe.replace(sft=dataclasses.replace(recipe.sft, mixture=mixture))

    prints = [resolve(with_file(path), store)["sft_data"].fingerprint for path in (first, second)]
    assert prints[0] == prints[1]
    second.write_text(line * 2)
    assert resolve(with_file(second), store)["sft_data"].fingerprint != prints[0]
