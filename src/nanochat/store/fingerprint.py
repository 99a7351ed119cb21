"""Fingerprints: what a stage is, apart from where and how it runs.

fingerprint = SHA-256 of the canonical encoding of (stage, stage version, the resolved recipe
sections the stage uses, upstream fingerprints, data digests). Nothing else: hardware, paths, world
size, prices and log settings never enter. The encoder raises on anything it cannot encode the same
way on every machine; it never falls back to `str()`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nanochat.store.digests import digest_json


class UnstableValue(TypeError):
    """A value that has no stable encoding was about to enter a fingerprint."""


def encode(value: Any, path: str = "value") -> Any:
    """`value` as JSON values with one spelling each. Floats become their shortest repr, tagged.

    Raises UnstableValue naming the path of what cannot be encoded.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UnstableValue(f"{path}: {value!r} is not a finite number")
        return {"float": repr(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: encode(getattr(value, field.name), f"{path}.{field.name}")
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UnstableValue(f"{path}: key {key!r} is not a string")
        return {key: encode(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item, f"{path}[{index}]") for index, item in enumerate(value)]
    raise UnstableValue(f"{path}: a {type(value).__name__} has no stable encoding")


def fingerprint(
    *,
    stage: str,
    version: int,
    sections: Mapping[str, Any],
    upstream: Mapping[str, str],
    data: Mapping[str, str],
) -> str:
    """64 hex digits. `sections`: recipe sections by name; `upstream`: fingerprints by stage;
    `data`: digests by name."""
    return digest_json(
        {
            "stage": stage,
            "version": version,
            "sections": encode(sections, "sections"),
            "upstream": encode(upstream, "upstream"),
            "data": encode(data, "data"),
        }
    )
