from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

import rustbpe
from nanochat.evaluation import tokenizer_quality
from nanochat.evaluation.tokenizer_quality import (
    DOMAINS,
    Domain,
    VersusGpt2,
    compression_ratio,
    encode_decode,
    evaluation_texts,
    file_valid,
    versus_gpt2,
)
from nanochat.recipes import gpt4_pattern
from nanochat.tokenizer import Tokenizer

PATTERN = gpt4_pattern(r"\p{N}{1,2}")
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bytes_only() -> Tokenizer:
    return Tokenizer(pattern=PATTERN, ranks=[bytes([byte]) for byte in range(256)])


@pytest.fixture(scope="module")
def made_for_these_texts() -> Tokenizer:
    """Trained on the evaluation texts themselves: better than any honest tokenizer."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator([text.text for text in evaluation_texts().values()], 2100, PATTERN)
    return Tokenizer(pattern=PATTERN, ranks=[token for token, _ in trainer.get_mergeable_ranks()])


def counting_script() -> ModuleType:
    path = REPOSITORY / "benchmarks" / "count_reference_tokens.py"
    spec = importlib.util.spec_from_file_location("count_reference_tokens", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------------
# Against GPT-2


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_tokenizer_three_times_worse_fails_and_a_better_one_passes(domain: Domain) -> None:
    gpt2 = evaluation_texts()[domain].gpt2_tokens
    worse = VersusGpt2(domain=domain, size_bytes=1, ours=3 * gpt2, gpt2=gpt2, gpt4=1)
    better = VersusGpt2(domain=domain, size_bytes=1, ours=gpt2 // 2, gpt2=gpt2, gpt4=1)
    assert worse.relative_difference == 2.0
    assert not worse.passes(0.30)
    assert not worse.passes(1.20)
    assert better.relative_difference < 0
    assert better.passes(0.30)
    assert better.passes(0.0)


def test_the_threshold_itself_passes() -> None:
    assert VersusGpt2(domain="news", size_bytes=1, ours=125, gpt2=100, gpt4=1).passes(0.25)
    assert not VersusGpt2(domain="news", size_bytes=1, ours=126, gpt2=100, gpt4=1).passes(0.25)


def test_a_real_tokenizer_that_is_three_times_worse_fails(bytes_only: Tokenizer) -> None:
    result = versus_gpt2(bytes_only, "news")
    assert result.ours == result.size_bytes
    assert result.ours > 3 * result.gpt2
    assert not result.passes(1.20)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_real_tokenizer_that_is_better_passes(domain: Domain, made_for_these_texts: Tokenizer) -> None:
    result = versus_gpt2(made_for_these_texts, domain)
    assert result.relative_difference < 0
    assert result.passes(0.30)


def test_every_text_is_long_enough_to_say_something_and_has_its_digest() -> None:
    document = json.loads(tokenizer_quality.TEXTS_PATH.read_text(encoding="utf-8"))
    assert document["obtained"]
    for domain, text in evaluation_texts().items():
        assert 1000 <= text.size_bytes <= 2500
        assert document["texts"][domain]["size_bytes"] == text.size_bytes
        assert all(0 < tokens < text.size_bytes for tokens in (text.gpt2_tokens, text.gpt4_tokens))


def test_a_text_that_was_edited_after_counting_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    document = json.loads(tokenizer_quality.TEXTS_PATH.read_text(encoding="utf-8"))
    document["texts"]["korean"]["lines"][0] += "!"
    edited = tmp_path / "tokenizer_texts.json"
    edited.write_text(json.dumps(document), encoding="utf-8")
    monkeypatch.setattr(tokenizer_quality, "TEXTS_PATH", edited)
    with pytest.raises(
        ValueError, match=r"the korean text is not the one .* run benchmarks/count_reference_tokens"
    ):
        evaluation_texts.__wrapped__()


@pytest.mark.needs_data
def test_the_references_tokens_are_what_their_tokenizers_give(shared_data: Path) -> None:
    script = counting_script()
    stored = json.loads(tokenizer_quality.TEXTS_PATH.read_text(encoding="utf-8"))
    assert script.counted(stored, shared_data / "tokenizers") == stored


# --------------------------------------------------------------------------------------------------
# Validity, round trips, compression


def test_a_sound_file_is_valid_and_a_broken_one_says_why(bytes_only: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    bytes_only.save(path)
    valid = file_valid(path)
    assert valid.passes
    assert valid.vocab_size == 265
    document = bytes_only.to_json()
    document["special_tokens"]["<|bos|>"] = 1
    path.write_text(json.dumps(document), encoding="utf-8")
    broken = file_valid(path)
    assert not broken.passes
    assert broken.problem is not None
    assert "<|bos|> has id 1" in broken.problem
    missing = file_valid(tmp_path / "gone.json")
    assert not missing.passes
    assert "gone.json" in (missing.problem or "")


def test_every_round_trip_passes_for_a_sound_tokenizer(
    bytes_only: Tokenizer, made_for_these_texts: Tokenizer
) -> None:
    for tokenizer in (bytes_only, made_for_these_texts):
        result = encode_decode(tokenizer)
        assert result.passes, result.failures
        assert result.tried > 20


def test_a_tokenizer_that_loses_text_fails_the_round_trips() -> None:
    loses_digits = Tokenizer(pattern=r"[^0-9]+", ranks=[bytes([byte]) for byte in range(256)])
    result = encode_decode(loses_digits, ["no digits", "12 digits"])
    assert not result.passes
    assert result.tried == 2
    assert result.failures == ("'12 digits' comes back as ' digits'",)


def test_the_compression_ratio_is_bytes_per_token(
    bytes_only: Tokenizer, made_for_these_texts: Tokenizer
) -> None:
    assert compression_ratio(bytes_only, ["abc", "한"]) == 1.0
    texts = [text.text for text in evaluation_texts().values()]
    assert compression_ratio(made_for_these_texts, texts) > 1.5
    with pytest.raises(ValueError, match="no text"):
        compression_ratio(bytes_only, [""])
