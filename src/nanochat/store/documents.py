"""JSON documents in the store: each says what it is and in which version.

A document of a newer version than this code knows is refused by name; an older one is read (a
field that came later has a default). Unknown fields of a known version are refused: they mean that
the document was not written by this project. A document ends with the digest of the rest of it, so
a flipped bit is found out; one without (written by hand, or before there was one) is read.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from nanochat.recipes import explain
from nanochat.store.digests import digest_json
from nanochat.store.objects import ObjectStore

_DIGEST = "document_sha256"


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


class DocumentError(ValueError):
    """A document that cannot be used; the message names it and says why."""


class Document(BaseModel):
    """Base of every stored document. Subclasses set `schema_name` and `schema_version`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_name: ClassVar[str]
    schema_version: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        """Everything but the digest at the end."""
        return {"schema": self.schema_name, "version": self.schema_version, **self.model_dump(mode="json")}

    def to_bytes(self) -> bytes:
        body = self.to_json()
        body[_DIGEST] = digest_json(body)
        return (json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Self:
        """Parse; `name` is what the error calls the document. Raises DocumentError."""
        try:
            body: Any = json.loads(data, parse_constant=_no_number)
            told = body.pop(_DIGEST, None) if isinstance(body, dict) else None
            found_digest = None if told is None else digest_json(body)
        except (ValueError, RecursionError) as error:
            raise DocumentError(f"{name} is not JSON ({error}); it is damaged or not ours") from error
        if not isinstance(body, dict) or body.get("schema") != cls.schema_name:
            found = body.get("schema") if isinstance(body, dict) else type(body).__name__
            raise DocumentError(f"{name} is not a {cls.schema_name} document (its schema is {found!r})")
        version = body.get("version")
        if not isinstance(version, int) or version < 1:
            raise DocumentError(f"{name} has no usable schema version (found {version!r})")
        if version > cls.schema_version:
            raise DocumentError(
                f"{name} has schema version {version} of {cls.schema_name}; this code knows up to "
                f"{cls.schema_version}. Update dagster-nanochat to read it."
            )
        if told != found_digest:
            raise DocumentError(
                f"{name} is damaged: its content is not that of the digest at its end. Restore it, or, if "
                f"somebody changed it on purpose, take its {_DIGEST} out"
            )
        fields = {key: value for key, value in body.items() if key not in ("schema", "version")}
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise DocumentError(f"{name} is not a valid {cls.schema_name}: {explain(error)}") from error

    @classmethod
    def read(cls, store: ObjectStore, key: str) -> Self:
        """Raises ObjectNotFound and DocumentError."""
        return cls.from_bytes(store.get(key), key)

    @classmethod
    def read_with_etag(cls, store: ObjectStore, key: str) -> tuple[Self, str] | None:
        """The document and the etag to pass to a conditional put, or None where there is none."""
        info = store.head(key)
        if info is None:
            return None
        return cls.read(store, key), info.etag
