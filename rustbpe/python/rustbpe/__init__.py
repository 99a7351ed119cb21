"""Byte-pair encoding: splits text, counts words, learns merges, encodes."""

from rustbpe._rustbpe import COUNTS_VERSION, GPT4_PATTERN, Tokenizer, count_words, counts_info

__all__ = ["COUNTS_VERSION", "GPT4_PATTERN", "Tokenizer", "count_words", "counts_info"]
