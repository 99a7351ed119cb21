from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.evaluation.tokenizer_quality import evaluation_texts
from nanochat.recipes import Tokenizer as Section
from nanochat.recipes import gpt4_pattern
from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer_training import characters_per_shard, count_shard, counting_digest, train_tokenizer

SECTION = Section(vocab_size=600, shards=2)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    texts = [text.text for text in evaluation_texts().values()]
    paths = []
    for i in range(2):
        path = tmp_path / f"shard_{i}.parquet"
        pq.write_table(pa.table({"text": texts[2 * i : 2 * i + 2] * 3}), path)
        paths.append(path)
    return paths


@pytest.fixture
def counts(shards: list[Path], tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "counts" / f"{shard.stem}.counts" for shard in shards]
    for shard, path in zip(shards, paths, strict=True):
        count_shard(shard, path, SECTION)
    return paths


def test_the_vocabulary_has_exactly_the_size_asked_for_special_tokens_included(counts: list[Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = train_tokenizer(SECTION, counts, {"source": "offline"})
    assert tokenizer.vocab_size == 600
    assert tokenizer.bos == 591
    assert tokenizer.pattern == SECTION.pattern


def test_the_order_of_the_counts_makes_no_difference(counts: list[Path]) -> None:
    forward = train_tokenizer(SECTION, counts, {})
    assert train_tokenizer(SECTION, counts[::-1], {}).to_json() == forward.to_json()


def test_the_provenance_says_what_was_counted_and_what_was_given(counts: list[Path]) -> None:
    tokenizer = train_tokenizer(SECTION, counts, {"source": "offline", "shards": ["a", "b"]})
    texts = [text.text for text in evaluation_texts().values()]
    assert tokenizer.provenance["source"] == "offline"
    assert tokenizer.provenance["shards"] == ["a", "b"]
    assert tokenizer.provenance["merges"] == tokenizer.provenance["merges_asked"] == 600 - 256 - 9
    trained_on = tokenizer.provenance["trained_on"]
    assert trained_on["shards"] == 2
    assert trained_on["rows"] == 12
    assert trained_on["characters"] == 3 * sum(len(text) for text in texts)
    assert trained_on["bytes"] == 3 * sum(len(text.encode()) for text in texts)
    assert Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json()))).provenance == tokenizer.provenance


def test_a_text_that_runs_out_of_pairs_gives_fewer_ids_and_says_so(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["abc abc"]}), tmp_path / "tiny.parquet")
    count_shard(tmp_path / "tiny.parquet", tmp_path / "tiny.counts", SECTION)
    with pytest.warns(UserWarning, match=r"only 3 pairs to merge: the vocabulary is 268 ids instead of 600"):
        tokenizer = train_tokenizer(SECTION, [tmp_path / "tiny.counts"], {})
    assert tokenizer.vocab_size == 256 + 3 + 9
    assert tokenizer.provenance["merges"] == 3
    assert tokenizer.provenance["merges_asked"] == 335


def test_counting_returns_the_totals_of_what_was_looked_at(shards: list[Path], tmp_path: Path) -> None:
    section = Section(vocab_size=600, shards=2, document_cap=100, max_chars=900)
    totals = count_shard(shards[0], tmp_path / "deep" / "folder" / "a.counts", section)
    # a budget of 450 characters: four documents of 100 and half of a fifth
    assert totals.pop("words") > totals.pop("unique_words") > 10
    assert totals.pop("bytes") > 450
    assert totals == {"rows": 5, "characters": 450}


def test_no_more_than_max_chars_are_counted_over_all_shards(shards: list[Path], tmp_path: Path) -> None:
    for max_chars in (1, 2, 999, 1000):
        section = Section(vocab_size=600, shards=2, max_chars=max_chars)
        counted = [
            count_shard(shard, tmp_path / f"{shard.stem}.counts", section)["characters"] for shard in shards
        ]
        assert counted == [characters_per_shard(section)] * 2
        assert sum(counted) <= max(2, max_chars)


def test_the_counting_digest_changes_with_what_decides_the_counts_and_nothing_else() -> None:
    def digest(**changes: object) -> str:
        return counting_digest(dataclasses.replace(SECTION, **changes))

    assert digest(vocab_size=5000) == digest()
    assert digest(shards=4, max_chars=2 * SECTION.max_chars) == digest()
    assert (
        len({digest(), digest(document_cap=9), digest(max_chars=9), digest(pattern=r"\w+"), digest(shards=4)})
        == 5
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"pattern": gpt4_pattern(r"\p{N}")}, "counted with pattern"),
        ({"document_cap": 99}, "counted with doc_cap 10000, the recipe's tokenizer section has 99"),
        ({"max_chars": 1000}, "counted with max_chars 1000000000, the recipe's tokenizer section has 500"),
    ],
)
def test_counts_of_another_section_are_refused_by_file(
    changes: dict[str, object], complaint: str, counts: list[Path]
) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        train_tokenizer(dataclasses.replace(SECTION, **changes), counts, {})
    assert "shard_0.counts" in str(error.value)
