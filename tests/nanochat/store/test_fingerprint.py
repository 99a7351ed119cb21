"""Fingerprints: stable for what a stage is, and never a guess."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from nanochat.recipes import quick
from nanochat.store.fingerprint import UnstableValue, encode, fingerprint


def of(**changes: object) -> str:
    parts = {"stage": "base", "version": 1, "sections": {"base": quick().base}, "upstream": {}, "data": {}}
    return fingerprint(**{**parts, **changes})  # type: ignore[arg-type]


def test_equal_parts_have_equal_fingerprints() -> None:
    assert of() == of()


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "sft"},
        {"version": 2},
        {"sections": {"base": dataclasses.replace(quick().base, steps=1601)}},
        {"upstream": {"tokenizer": "ab"}},
        {"data": {"shard": "cd"}},
    ],
)
def test_every_part_counts(change: dict[str, object]) -> None:
    assert of(**change) != of()


def test_another_process_computes_the_same() -> None:
    code = (
        "from nanochat.recipes import quick; from nanochat.store.fingerprint import fingerprint; "
        "print(fingerprint(stage='base', version=1, sections={'base': quick().base}, upstream={}, data={}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == of()


def test_key_order_does_not_count_and_numbers_of_two_kinds_do() -> None:
    assert of(data={"a": "1", "b": "2"}) == of(data={"b": "2", "a": "1"})
    assert encode(1) != encode(1.0)
    assert encode(True) is True


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"bytes", float("nan"), float("inf"), {1: "x"}, pathlib.Path("x")]
)
def test_what_has_no_stable_encoding_is_refused_by_its_path(value: object) -> None:
    with pytest.raises(UnstableValue, match=r"section\.field"):
        encode({"field": value}, "section")


def test_an_encoded_value_encodes_to_itself() -> None:
    once = encode({"base": quick().base})
    assert encode(once) == once
