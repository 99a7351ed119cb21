"""The merges of rustbpe 0.1.0, in order, on five corpora: a short form of benchmarks/bpe_equality.py.

What 0.1.0 learned is recorded by its digest. To record it anew, install rustbpe 0.1.0 into a folder and run
``PYTHONPATH=FOLDER:src python tests/rustbpe/test_equality.py``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import itertools
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

import rustbpe
from nanochat.evaluation.tokenizer_quality import evaluation_texts
from nanochat.recipes import gpt4_pattern

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/bpe_merges.json"
PATTERN = gpt4_pattern(r"\p{N}{1,2}")
BYTES_MADE = 2_000_000


def _script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("bpe_equality")
    finally:
        sys.path.pop(0)


def _documents(kind: str) -> tuple[list[str], int]:
    """The texts, and the vocabulary to ask for. The short texts have fewer pairs."""
    texts = {domain: text.text for domain, text in evaluation_texts().items()}
    if kind == "english":
        return texts["news"].splitlines() + texts["science"].splitlines(), 2_000
    if kind == "multilingual":
        return list(texts.values()), 4_000
    if kind == "code":
        return texts["code"].splitlines(keepends=True), 2_000
    return list(_script().MADE[kind](BYTES_MADE)), 20_000


KINDS = ["english", "multilingual", "code", "random-bytes", "repetitive"]


def _described(tokenizer: rustbpe.Tokenizer) -> dict[str, object]:
    ranks = tokenizer.get_mergeable_ranks()
    assert [number for _, number in ranks] == list(range(len(ranks)))
    tokens = "\n".join(bytes(token).hex() for token, _ in ranks[256:])
    return {"merges": len(ranks) - 256, "sha256": hashlib.sha256(tokens.encode()).hexdigest()}


def _learned(documents: Iterable[str], vocab_size: int) -> dict[str, object]:
    tokenizer = rustbpe.Tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer pairs than asked for
        tokenizer.train_from_iterator(iter(documents), vocab_size, pattern=PATTERN)
    return _described(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*pairs to merge:UserWarning")
def test_every_way_of_training_gives_the_merges_of_rustbpe_0_1_0(kind: str, tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())[kind]
    documents, vocab_size = _documents(kind)
    assert _learned(documents, vocab_size) == expected

    script = _script()
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    counts = [tmp_path / f"{number}.counts" for number in range(3)]
    for number in range(3):
        script.write_parquet([text.encode() for text in documents[number::3]], files[number])
        rustbpe.count_words(files[number], counts[number], PATTERN)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_parquet_files(files, vocab_size, PATTERN)
    assert _described(tokenizer) == expected
    orders = itertools.permutations(counts) if kind in ("english", "code") else (counts, counts[::-1])
    for order in orders:
        tokenizer.train_from_counts(list(order), vocab_size)
        assert _described(tokenizer) == expected


@pytest.mark.needs_data
def test_real_text_gives_the_65_280_merges_of_rustbpe_0_1_0(shared_data: Path) -> None:
    expected = json.loads(GOLDEN.read_text())["real"]
    tokenizer = rustbpe.Tokenizer()
    shard = shared_data / "pretrain_text/shard_00000.parquet"
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == expected.pop("of")
    tokenizer.train_from_parquet_files([shard], 65_536, PATTERN)
    assert _described(tokenizer) == expected


# A slow rustbpe 0.1.0, as far as the script uses it, whose last two merges change places.
STAND_IN = """
from reference_trainer import learn

class Tokenizer:
    def train_from_iterator(self, texts, vocab_size, pattern):
        self.tokens = learn(texts, vocab_size - 256, pattern)
        self.tokens[-2:] = self.tokens[:-3:-1]

    def get_mergeable_ranks(self):
        return [(token, number) for number, token in enumerate(self.tokens)]
"""


def test_the_script_tells_where_two_lists_of_merges_part(tmp_path: Path) -> None:
    script = _script()
    library = tmp_path / "others/rustbpe-0.1.0"
    library.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("reference_trainer.py"), library)
    (library / "rustbpe.py").write_text(STAND_IN)
    corpus = tmp_path / "corpora/english"
    corpus.mkdir(parents=True)
    for number in range(3):
        documents = [f"the cat {number + row} sat at the hat".encode() for row in range(50)]
        script.write_parquet(documents, corpus / f"shard_{number:05}.parquet")

    command = [sys.executable, str(ROOT / "benchmarks/bpe_equality.py"), "--kinds", "english"]
    folders = ["--corpora", str(tmp_path / "corpora"), "--others", str(tmp_path / "others")]
    options = ["--vocab-size", "270", "--threads", "1"]
    run = subprocess.run([*command, *folders, *options], capture_output=True, text=True)
    verdict = json.loads(run.stdout.splitlines()[-1])
    assert (verdict["merges"], verdict["all_merges"], verdict["documents"]) == (14, True, 150)
    assert (run.returncode, verdict["equal"], len(verdict["ways"])) == (1, False, 6)
    assert {way: difference[0] for way, difference in verdict["different"].items()} == dict.fromkeys(
        verdict["ways"], 12
    )


def _record() -> None:
    version = importlib.metadata.version("rustbpe")
    if version != "0.1.0":
        sys.exit(f"this is rustbpe {version}: see the head of this file")
    golden: dict[str, object] = {kind: _learned(*_documents(kind)) for kind in KINDS}
    shard = ROOT.parent / "shared/data/pretrain_text/shard_00000.parquet"
    texts = pq.read_table(shard, columns=["text"]).column("text").to_pylist()
    of = hashlib.sha256(shard.read_bytes()).hexdigest()
    golden["real"] = {"of": of, **_learned(texts, 65_536)}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    _record()
