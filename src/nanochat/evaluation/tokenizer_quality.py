"""Is a tokenizer file sound, does it lose nothing, and how well does it compress?

The comparison with GPT-2 is on four fixed texts of our own (`tokenizer_texts.json`, beside this file): news,
Korean, code, science. GPT-2's token counts, and GPT-4's beside them, were measured once by
`benchmarks/count_reference_tokens.py` and stored with each text's digest, so that a check downloads nothing.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nanochat.recipes import SPECIAL_TOKENS
from nanochat.store.digests import digest_bytes
from nanochat.store.documents import DocumentError
from nanochat.tokenizer import Tokenizer

Domain = Literal["news", "korean", "code", "science"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)

TEXTS_PATH = Path(__file__).with_name("tokenizer_texts.json")

# What has broken tokenizers before: bytes of several lengths, joined and combined characters, both writing
# directions, white space of every kind, spelled special tokens, nothing at all, and much of one thing.
ROUND_TRIPS: tuple[str, ...] = (
    "",
    " ",
    "\n",
    "a",
    "Hello, world! It's 2024; we've paid $3.50 for 12345 pages.",
    "  leading, trailing and   inner   spaces  ",
    "tabs\tand\r\nWindows lines\r\n\r\nand a last\n",
    "\u00a0\u2003\u2028\u3000\u0085\ufeff",
    "déjà vu, e\u0301 beside é, ſ and ß, naïve façade",
    "Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "日本語と中文，한국어 문장입니다.",
    "👍🏽 👩‍👩‍👧‍👦 🇰🇷 🏴\U000e0067\U000e0062\U000e007f 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "\x00\x01\x1b[31m\x7f",
    *SPECIAL_TOKENS,
    "".join(SPECIAL_TOKENS),
    "<|endoftext|><|im_start|> <| bos |> <|bos|",
    "def f(x):\n    return {'a': [1, 2, 3]}[x]  # ünïcode\n",
    "ab" * 50_000,
    " " * 150_000 + "x",
    "\n" * 50_000,
    "line of text, one of many\n" * 2_000,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileValidity:
    """`problem` says what is wrong with a tokenizer file; None where it is sound."""

    problem: str | None
    vocab_size: int | None

    @property
    def passes(self) -> bool:
        return self.problem is None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrips:
    """Texts that were encoded and decoded, and what went wrong with which."""

    tried: int
    failures: tuple[str, ...]

    @property
    def passes(self) -> bool:
        return not self.failures


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationText:
    """A fixed text and the tokens that GPT-2's and GPT-4's (cl100k_base) tokenizers make of it."""

    domain: Domain
    text: str
    sha256: str
    gpt2_tokens: int
    gpt4_tokens: int

    @property
    def size_bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class VersusGpt2:
    """Token counts for one text. More tokens than GPT-2 means worse: a *positive* difference is worse."""

    domain: Domain
    size_bytes: int
    ours: int
    gpt2: int
    gpt4: int

    @property
    def relative_difference(self) -> float:
        """(ours - gpt2) / gpt2: +0.30 is 30 % more tokens than GPT-2, -0.10 is 10 % fewer."""
        return (self.ours - self.gpt2) / self.gpt2

    def passes(self, max_extra: float) -> bool:
        """Whether we need at most `max_extra` more tokens than GPT-2, e.g. 0.30. Better always passes."""
        return self.relative_difference <= max_extra


def file_valid(path: str | os.PathLike[str]) -> FileValidity:
    """Whether `path` holds a tokenizer that loads. Never raises for what is in the file."""
    try:
        tokenizer = Tokenizer.load(path)
    except (DocumentError, OSError) as error:
        return FileValidity(problem=str(error), vocab_size=None)
    return FileValidity(problem=None, vocab_size=tokenizer.vocab_size)


def encode_decode(tokenizer: Tokenizer, texts: Iterable[str] = ROUND_TRIPS) -> RoundTrips:
    """Encode and decode each text: it must come back as it was, without any special token on the way."""
    specials = set(tokenizer.special_tokens.values())
    tried = 0
    failures: list[str] = []
    for text in texts:
        tried += 1
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            failures.append(f"{text!r:.60} comes back as {tokenizer.decode(ids)!r:.60}")
        if not specials.isdisjoint(ids):
            failures.append(f"{text!r:.60} becomes a special token")
    return RoundTrips(tried=tried, failures=tuple(failures))


def compression_ratio(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes per token over all texts; more is better. Raises ValueError where there is no text."""
    size_bytes = tokens = 0
    for text in texts:
        size_bytes += len(text.encode())
        tokens += len(tokenizer.encode(text))
    if not tokens:
        raise ValueError("no text to measure the compression ratio on")
    return size_bytes / tokens


@functools.cache
def evaluation_texts() -> dict[Domain, EvaluationText]:
    """The four texts with GPT-2's counts. Raises ValueError where a text is not the one that was counted."""
    document = json.loads(TEXTS_PATH.read_text(encoding="utf-8"))
    texts: dict[Domain, EvaluationText] = {}
    for domain in DOMAINS:
        entry = document["texts"][domain]
        text = "\n".join(entry["lines"])
        if digest_bytes(text.encode()) != entry["sha256"]:
            raise ValueError(
                f"{TEXTS_PATH.name}: the {domain} text is not the one whose GPT-2 tokens were counted; run "
                "benchmarks/count_reference_tokens.py after a change"
            )
        texts[domain] = EvaluationText(
            domain=domain,
            text=text,
            sha256=entry["sha256"],
            gpt2_tokens=entry["gpt2_tokens"],
            gpt4_tokens=entry["gpt4_tokens"],
        )
    return texts


def versus_gpt2(tokenizer: Tokenizer, domain: Domain) -> VersusGpt2:
    """Our token count for the domain's text beside GPT-2's."""
    evaluated = evaluation_texts()[domain]
    return VersusGpt2(
        domain=domain,
        size_bytes=evaluated.size_bytes,
        ours=len(tokenizer.encode(evaluated.text)),
        gpt2=evaluated.gpt2_tokens,
        gpt4=evaluated.gpt4_tokens,
    )
