"""Count GPT-2's and GPT-4's tokens for the tokenizer evaluation texts and store them with the texts' digests.

    python benchmarks/count_reference_tokens.py FOLDER [--check]

FOLDER holds GPT-2's published `encoder.json` and `vocab.bpe` in `gpt2/`, and GPT-4's
`cl100k_base.tiktoken`. With --check nothing is written; the exit status says whether the stored counts
and digests are right. Run it after any change of a text in src/nanochat/evaluation/tokenizer_texts.json.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import tiktoken

import rustbpe

TEXTS = Path(__file__).resolve().parents[1] / "src/nanochat/evaluation/tokenizer_texts.json"

# GPT-2's own split pattern, as published with its encoder (Radford et al. 2019).
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def gpt2_encoding(folder: Path) -> tiktoken.Encoding:
    """GPT-2's tokenizer from its two published files."""
    spelled = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    merges = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    to_byte = byte_of_character()

    def decoded(text: str) -> bytes:
        return bytes(to_byte[character] for character in text)

    # Ranks are the bytes in the order of their stand-ins, then the merges in order, which are the ids.
    spellings = [*to_byte, *("".join(line.split(" ")) for line in merges if line)]
    ranks = {decoded(text): rank for rank, text in enumerate(spellings)}
    published = {decoded(text): token for text, token in spelled.items() if text != "<|endoftext|>"}
    if ranks != published:
        raise ValueError(f"{folder}: encoder.json and vocab.bpe do not belong together")
    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": spelled["<|endoftext|>"]},
    )


def gpt4_encoding(path: Path) -> tiktoken.Encoding:
    """GPT-4's tokenizer from its published ranks: a line holds a token in base64 and its rank."""
    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the ranks of {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
    return tiktoken.Encoding(
        "cl100k_base", pat_str=rustbpe.GPT4_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )


def byte_of_character() -> dict[str, int]:
    """GPT-2's visible stand-in for each byte: printable ones are themselves, the rest U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(byte): byte for byte in printable}
    stand_ins.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return stand_ins


def counted(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`document` with the size, digest and reference tokens of every text."""
    gpt2, gpt4 = gpt2_encoding(folder / "gpt2"), gpt4_encoding(folder / "cl100k_base.tiktoken")
    texts = {}
    for domain, entry in document["texts"].items():
        text = "\n".join(entry["lines"])
        texts[domain] = {
            "size_bytes": len(text.encode()),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "gpt2_tokens": len(gpt2.encode_ordinary(text)),
            "gpt4_tokens": len(gpt4.encode_ordinary(text)),
            "lines": entry["lines"],
        }
    return {**document, "texts": texts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder with gpt2/ and cl100k_base.tiktoken")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where the file is stale")
    arguments = parser.parse_args()
    document = json.loads(TEXTS.read_text(encoding="utf-8"))
    result = counted(document, arguments.folder)
    for domain, entry in result["texts"].items():
        print(
            f"{domain}: {entry['size_bytes']} bytes, {entry['gpt2_tokens']} tokens of GPT-2, "
            f"{entry['gpt4_tokens']} of GPT-4"
        )
    if arguments.check:
        return int(result != document)
    TEXTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
