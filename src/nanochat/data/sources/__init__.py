"""Where text comes from. Enabled by default: `offline` and `fineweb-edu`.

``NANOCHAT_SOURCES`` adds others, separated by commas: ``climbmix``, and folders of parquet files
with a ``text`` column as ``folder:<name>=<path>``::

    NANOCHAT_SOURCES="climbmix,folder:stories=/data/stories"
"""

from __future__ import annotations

import os
import re
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
    "SourceError",
    "enabled_sources",
    "get_source",
]

_OPTIONAL: dict[str, Source] = {CLIMBMIX.name: CLIMBMIX}
# "shard" is what fineweb-edu's shards are called; a folder of that name would be mistaken for it.
_RESERVED = frozenset({"offline", "fineweb-edu", "shard", *_OPTIONAL})
_FOLDER = re.compile(r"folder:(?P<name>[a-z0-9][a-z0-9.-]{0,39})=(?P<path>.+)")


def enabled_sources() -> tuple[Source, ...]:
    """The sources that are on, in partition order. Raises SourceError naming a wrong entry."""
    sources: dict[str, Source] = {"offline": OfflineSource(), FINEWEB_EDU.name: FINEWEB_EDU}
    for entry in filter(None, (part.strip() for part in os.environ.get(SOURCES_ENV, "").split(","))):
        source = sources.get(entry) or _OPTIONAL.get(entry) or _folder_source(entry)
        if isinstance(source, FolderSource) and source.name in sources:
            raise SourceError(f"{SOURCES_ENV}: two folders are called {source.name!r}; rename one")
        sources[source.name] = source
    return tuple(sources.values())


def get_source(name: str) -> Source:
    """The enabled source called `name`. Raises SourceError naming those there are."""
    sources = {source.name: source for source in enabled_sources()}
    if name not in sources:
        hint = f" Set {SOURCES_ENV}={name} to enable it." if name in _OPTIONAL else ""
        raise SourceError(f"unknown source {name!r}. Enabled sources: {', '.join(sources)}.{hint}")
    return sources[name]


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
