"""Where text comes from. Enabled by default: `offline` and `fineweb-edu`.

``NANOCHAT_SOURCES`` adds others, separated by commas: ``climbmix``, and folders of parquet files
with a ``text`` column as ``folder:<name>=<path>``::

    NANOCHAT_SOURCES="climbmix,folder:stories=/data/stories"
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from nanochat.data.sources.base import PinnedSource, ShardLocation, Source, SourceError
from nanochat.data.sources.folder import FolderSource
from nanochat.data.sources.hub import CLIMBMIX, FINEWEB_EDU
from nanochat.data.sources.offline import OfflineSource

SOURCES_ENV = "NANOCHAT_SOURCES"

__all__ = [
    "SOURCES_ENV",
    "PinnedSource",
    "ShardLocation",
    "Source",
    "SourceBook",
    "SourceError",
    "enabled_sources",
    "get_source",
    "load_sources",
]

_OPTIONAL: dict[str, Source] = {CLIMBMIX.name: CLIMBMIX}
# "shard" is what fineweb-edu's shards are called; a folder of that name would be mistaken for it.
_RESERVED = frozenset({"offline", "fineweb-edu", "shard", *_OPTIONAL})
_FOLDER = re.compile(r"folder:(?P<name>[a-z0-9][a-z0-9.-]{0,39})=(?P<path>.+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceBook:
    """The usable sources by name, in partition order, and the errors of entries that were left out."""

    sources: Mapping[str, Source]
    errors: tuple[str, ...]

    def __getitem__(self, name: str) -> Source:
        if name not in self.sources:
            hint = f" Set {SOURCES_ENV}={name} to enable it." if name in _OPTIONAL else ""
            broken = f" Left out with errors: {' | '.join(self.errors)}" if self.errors else ""
            raise SourceError(
                f"unknown source {name!r}. Enabled sources: {', '.join(self.sources)}.{hint}{broken}"
            )
        return self.sources[name]


def load_sources() -> SourceBook:
    """The sources that are on. A wrong entry is left out and reported; the others load."""
    sources: dict[str, Source] = {"offline": OfflineSource(), FINEWEB_EDU.name: FINEWEB_EDU}
    errors: list[str] = []
    for entry in filter(None, (part.strip() for part in os.environ.get(SOURCES_ENV, "").split(","))):
        try:
            source = sources.get(entry) or _OPTIONAL.get(entry) or _folder_source(entry)
        except SourceError as error:
            errors.append(str(error))
            continue
        if isinstance(source, FolderSource) and source.name in sources:
            errors.append(f"{SOURCES_ENV}: two folders are called {source.name!r}; rename one")
            continue
        sources[source.name] = source
    return SourceBook(sources=sources, errors=tuple(errors))


def enabled_sources() -> tuple[Source, ...]:
    """The usable sources, in partition order."""
    return tuple(load_sources().sources.values())


def get_source(name: str) -> Source:
    """The enabled source called `name`. Raises SourceError naming those there are."""
    return load_sources()[name]


def _folder_source(entry: str) -> FolderSource:
    match = _FOLDER.fullmatch(entry)
    if match is None:
        raise SourceError(
            f"{SOURCES_ENV}: {entry!r} is not a source. Write climbmix, or folder:<name>=<path> with a "
            "name of lower-case letters, digits, '-' and '.'"
        )
    if match["name"] in _RESERVED:
        raise SourceError(f"{SOURCES_ENV}: {entry!r}: the name {match['name']!r} is taken; choose another")
    source = FolderSource(match["name"], Path(match["path"]).expanduser())
    source.training_shards()  # a folder that is not there is told now, not in the middle of a run
    return source
