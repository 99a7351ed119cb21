"""Where things lie in the store: every key is made here."""

from __future__ import annotations

FINGERPRINT_LENGTH = 12


def shard_key(source: str, shard: str) -> str:
    return f"shards/{source}/{shard}.parquet"


def shard_record_key(source: str, shard: str) -> str:
    return f"shards/{source}/{shard}.json"


def counts_key(counts_digest: str, shard: str) -> str:
    return f"counts/{counts_digest[:16]}/{shard}.counts"


def stage_prefix(stage: str, fingerprint: str) -> str:
    return f"stages/{stage}/{fingerprint[:FINGERPRINT_LENGTH]}"


def attempt_prefix(stage_prefix: str, token: str) -> str:
    return f"{stage_prefix}/attempts/{token}"


def pointer_key(model: str, stage: str) -> str:
    return f"models/{model}/{stage}.json"


def image_key(name: str) -> str:
    return f"images/{name}.json"


def endpoint_key(model: str) -> str:
    return f"endpoints/{model}.json"
