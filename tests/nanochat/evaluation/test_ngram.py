from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from nanochat.evaluation.ngram import (
    KneserNey,
    Targets,
    Unigram,
    bits_per_byte,
    compressor_baselines,
    ngram_baselines,
    targets_of,
)

BOS = 11
VOCAB = 12
TOKEN_BYTES = np.array([1] * 5 + [2] * 6 + [0])


def text(seed: int, documents: int) -> np.ndarray:
    """Documents of a small order-2 source, each beginning with BOS, in one array."""
    rng = np.random.default_rng(seed)
    table = np.random.default_rng(0).dirichlet(np.full(VOCAB - 1, 0.2), size=(VOCAB, VOCAB))
    tokens: list[int] = []
    for _ in range(documents):
        before, previous = BOS, BOS
        tokens.append(BOS)
        for _ in range(int(rng.integers(1, 30))):
            token = int(rng.choice(VOCAB - 1, p=table[before, previous]))
            tokens.append(token)
            before, previous = previous, token
    return np.array(tokens)


class DictionaryKneserNey:
    """The formula of the module's text, word for word, on dictionaries."""

    def __init__(self, tokens: list[int], order: int) -> None:
        grams: Counter[tuple[int, ...]] = Counter()
        history = [BOS, BOS]
        for token in tokens:
            if token == BOS:
                history = [BOS, BOS]
                continue
            grams[(*history[len(history) - order + 1 :], token)] += 1
            history.append(token)
        self.counts: dict[int, Counter[tuple[int, ...]]] = {order: grams}
        for lower in range(order - 1, 0, -1):
            befores: dict[tuple[int, ...], set[int]] = defaultdict(set)
            for gram in self.counts[lower + 1]:
                befores[gram[1:]].add(gram[0])
            self.counts[lower] = Counter({gram: len(seen) for gram, seen in befores.items()})
        self.order = order

    def probability(self, history: tuple[int, ...], token: int) -> float:
        order = len(history) + 1
        lower = 1 / VOCAB if order == 1 else self.probability(history[1:], token)
        counts = self.counts[order]
        once = sum(1 for count in counts.values() if count == 1)
        twice = sum(1 for count in counts.values() if count == 2)
        discount = once / (once + 2 * twice) if once else 0.5
        after = {gram: count for gram, count in counts.items() if gram[:-1] == history}
        total = sum(after.values())
        if not total:
            return lower
        above = max(after.get((*history, token), 0) - discount, 0) / total
        return above + discount * len(after) / total * lower


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kneser_ney_equals_the_formula_on_dictionaries(order: int) -> None:
    training, judged = text(1, 20), targets_of([text(2, 10)], BOS, TOKEN_BYTES)
    model = KneserNey(targets_of([training], BOS, TOKEN_BYTES), VOCAB, order)
    slow = DictionaryKneserNey(training.tolist(), order)
    expected = []
    for index in range(len(judged)):
        history = (int(judged.before_previous[index]), int(judged.previous[index]))
        expected.append(slow.probability(history[3 - order :], int(judged.token[index])))
    assert len(expected) > 100
    np.testing.assert_allclose(model.probabilities(judged), expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one_after_every_history_seen_or_not(order: int) -> None:
    model = KneserNey(targets_of([text(1, 8)], BOS, TOKEN_BYTES), VOCAB, order)
    grid = np.array(list(itertools.product(range(VOCAB), repeat=3)))
    everything = Targets(grid[:, 2], grid[:, 1], grid[:, 0])
    probabilities = model.probabilities(everything).reshape(VOCAB * VOCAB, VOCAB)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    assert (probabilities > 0).all()


def test_the_unigram_sums_to_one_and_gives_the_unseen_a_chance() -> None:
    model = Unigram(targets_of([np.array([BOS, 1, 1, 2])], BOS, TOKEN_BYTES), VOCAB)
    ids = np.arange(VOCAB)
    probabilities = model.probabilities(Targets(ids, ids, ids))
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[1] == pytest.approx(3 / (3 + VOCAB))
    assert probabilities[5] == pytest.approx(1 / (3 + VOCAB))


def test_histories_stop_at_a_documents_beginning_and_bos_is_no_target() -> None:
    targets = targets_of([np.array([BOS, 1, 2, BOS, 3, 4]), np.array([7, 8])], BOS, TOKEN_BYTES)
    triples = np.stack([targets.before_previous, targets.previous, targets.token], axis=1)
    assert triples.tolist() == [
        [BOS, BOS, 1],
        [BOS, 1, 2],
        [BOS, BOS, 3],
        [BOS, 3, 4],
        [BOS, 7, 8],
    ]


def test_a_longer_memory_helps_on_text_that_has_one() -> None:
    bits = ngram_baselines([text(1, 3000)], [text(2, 100)], bos=BOS, token_bytes=TOKEN_BYTES)
    assert list(bits) == ["uniform", "unigram", "bigram_kn", "trigram_kn"]
    assert bits["uniform"] > bits["unigram"] > bits["bigram_kn"] > bits["trigram_kn"] > 0


def test_bits_per_byte_counts_bytes_and_not_tokens() -> None:
    targets = targets_of([np.array([BOS, 0, 5])], BOS, TOKEN_BYTES)
    assert bits_per_byte(np.array([0.5, 0.25]), targets, TOKEN_BYTES) == pytest.approx(3 / 3)
    uniform = ngram_baselines([text(1, 5)], [np.array([BOS, 0, 5])], bos=BOS, token_bytes=TOKEN_BYTES)[
        "uniform"
    ]
    assert uniform == pytest.approx(2 * math.log2(VOCAB) / 3)


def test_nothing_to_count_or_to_judge_is_an_error_that_says_so() -> None:
    empty = targets_of([np.array([BOS]), np.array([BOS, BOS])], BOS, TOKEN_BYTES)
    assert len(empty) == 0
    with pytest.raises(ValueError, match="no training tokens"):
        KneserNey(empty, VOCAB, 2)
    with pytest.raises(ValueError, match="no validation targets"):
        bits_per_byte(np.empty(0), empty, TOKEN_BYTES)
    with pytest.raises(ValueError, match="no validation text"):
        compressor_baselines([])
    with pytest.raises(ValueError, match="order 4"):
        KneserNey(targets_of([text(1, 1)], BOS, TOKEN_BYTES), VOCAB, 4)


def test_compressors_are_measured_in_bits_of_their_output_per_byte_of_text() -> None:
    bits = compressor_baselines(["all work and no play makes a dull model"] * 500)
    assert set(bits) == {"zlib_9", "zstd_19", "lzma_9e"}
    assert all(0 < value < 0.2 for value in bits.values())
    random = np.random.default_rng(0).integers(0, 2, 4000)
    (noise,) = {
        round(b, 1) for n, b in compressor_baselines(["".join(map(str, random))]).items() if n == "zstd_19"
    }
    assert noise >= 1.0
