"""Ingestion: verified shards, their word counts, and the validation shard."""

import dataclasses
import enum
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
from pydantic import Field

from dagster_nanochat.defs.ingestion.sources import source_key
from dagster_nanochat.partitions import model_partitions, recipe_book, shard_partitions, shard_sources
from dagster_nanochat.resources import LauncherResource, StoreResource
from dagster_nanochat.selection import required_recipe, required_shards
from dagster_nanochat.shard_checks import shard_evaluation
from dagster_nanochat.views import data_folder, show_file
from nanochat.data.counts import ensure_counts
from nanochat.data.hub import HubError
from nanochat.data.shards import IngestReport, Mode, ShardError, ShardRecord, ingest_shards
from nanochat.data.sources import Source, SourceError, enabled_sources, get_source
from nanochat.recipes import Tokenizer
from nanochat.store import ObjectStore, StoreError
from nanochat.store.digests import digest_json
from nanochat.store.documents import DocumentError
from nanochat.tokenizer_training import counting_digest

TRAINING_FILES, WORD_COUNTS = dg.AssetKey("training_files"), dg.AssetKey("shard_word_counts")


# What keeps a whole source from being ingested; what keeps a single shard is in the report.
_SOURCE_FAILS = (SourceError, ShardError, DocumentError, HubError, StoreError)


class IngestMode(enum.Enum):
    """See `nanochat.data.shards`. auto: reference where training runs on machines that are rented."""

    auto = "auto"
    copy = "copy"
    reference = "reference"


class IngestConfig(dg.Config):
    """How shards are brought in."""

    threads: int = Field(default=4, gt=0, le=64, description="Shards fetched at the same time")
    force: bool = Field(default=False, description="Fetch verified shards again")
    refresh: bool = Field(
        default=False, description="First take the source's newest revision (it is pinned otherwise)"
    )
    mode: IngestMode = Field(
        default=IngestMode.auto,
        description="copy: bytes into the store. reference: record only what the hub says of them, and each "
        "machine pulls those that it reads. auto: copy under the local launcher, else reference",
    )

    def ingest(
        self,
        store: ObjectStore,
        launcher: LauncherResource,
        source: Source,
        shards: list[str],
        on_landed: Callable[[ShardRecord], None],
    ) -> IngestReport:
        """Raises `_SOURCE_FAILS`."""
        chosen: Mode = "reference" if launcher.is_remote else "copy"
        if self.mode is not IngestMode.auto:
            chosen = "copy" if self.mode is IngestMode.copy else "reference"
        return ingest_shards(
            store,
            source,
            shards,
            threads=self.threads,
            mode=chosen,
            on_landed=on_landed,
            force=self.force,
            refresh=self.refresh,
        )


@dg.multi_asset(
    specs=[
        dg.AssetSpec(
            TRAINING_FILES,
            group_name="ingestion",
            deps=[source_key(source.name) for source in enabled_sources()],
            kinds={"parquet"},
            skippable=True,
            description="A verified parquet shard of a source. A range of partitions is one run; what is "
            "verified already is skipped.",
        ),
        dg.AssetSpec(
            WORD_COUNTS,
            group_name="ingestion",
            deps=[TRAINING_FILES],
            kinds={"rust"},
            skippable=True,
            description="Pre-token counts of a shard: the map step of the tokenizer. Shards that no recipe's "
            "tokenizer names are not counted.",
        ),
    ],
    partitions_def=shard_partitions,
    backfill_policy=dg.BackfillPolicy.single_run(),
    can_subset=True,
)
def ingested_shards(
    context: dg.AssetExecutionContext, config: IngestConfig, store: StoreResource, launcher: LauncherResource
) -> Iterator[dg.MaterializeResult]:
    """One event a shard as it lands, and at the end a failure that names the shards that failed.

    Events are logged, not yielded: yielded ones would appear only after the whole range.
    """
    shards = required_shards(context)
    opened = store.open()
    failed: dict[str, str] = {}
    if TRAINING_FILES in context.selected_asset_keys:
        failed |= _ingest(context, config, opened, launcher, shards)
    if WORD_COUNTS in context.selected_asset_keys:
        failed |= _count(context, opened, [shard for shard in shards if shard not in failed])
    if failed:
        raise dg.Failure(
            f"{len(failed)} of {len(shards)} shards failed: "
            + "; ".join(f"{shard}: {reason.rstrip('.')}" for shard, reason in list(failed.items())[:10])
            + (f"; and {len(failed) - 10} more" if len(failed) > 10 else "")
            + ". Run the same range again: only what failed is done.",
            allow_retries=False,
        )
    yield from ()


def _ingest(
    context: dg.AssetExecutionContext,
    config: IngestConfig,
    store: ObjectStore,
    launcher: LauncherResource,
    shards: list[str],
) -> dict[str, str]:
    failed: dict[str, str] = {}
    for source in dict.fromkeys(shard_sources()[shard] for shard in shards):
        mine = [shard for shard in shards if shard_sources()[shard].name == source.name]
        context.log.info(f"{source.name}: {len(mine)} shards asked for")
        try:
            report = config.ingest(
                store, launcher, source, mine, lambda record: _landed(context, store, record, new=True)
            )
        except _SOURCE_FAILS as error:
            failed |= dict.fromkeys(mine, str(error))
            continue
        for record in report.skipped:
            _landed(context, store, record, new=False)
        failed |= report.failed
        context.log.info(
            f"{source.name}: {len(report.landed)} shards landed, {len(report.skipped)} were there, "
            f"{len(report.failed)} failed"
        )
    return failed


def _landed(context: dg.AssetExecutionContext, store: ObjectStore, record: ShardRecord, *, new: bool) -> None:
    """Show a shard: its view in data/raw, a materialization, and the check's evaluation."""
    if record.mode == "copy":
        show_file(store, record.file, data_folder(store) / "raw" / f"{record.shard}.parquet")
    if not new and _is_recorded(context, TRAINING_FILES, record.shard, record.sha256):
        return
    context.log_event(
        dg.AssetMaterialization(
            asset_key=TRAINING_FILES,
            partition=record.shard,
            metadata={
                "source": record.source,
                "mode": record.mode,
                "revision": record.revision,
                "url": record.url,
                "bytes": record.size_bytes,
                "sha256": record.sha256,
                "seconds": record.seconds,
                **{
                    name: value
                    for name, value in (
                        ("dagster/row_count", record.rows),
                        ("characters", record.characters),
                        ("empty_rows", record.empty),
                    )
                    if value is not None
                },
            },
            tags={"dagster/data_version": record.sha256},
        )
    )
    context.log_event(shard_evaluation(store, record))


def _is_recorded(
    context: dg.AssetExecutionContext, asset: dg.AssetKey, shard: str, data_version: str
) -> bool:
    """Whether Dagster's history has this very version already: a second run adds no event."""
    event = context.instance.get_latest_data_version_record(asset, partition_key=shard)
    materialization = event.asset_materialization if event else None
    return (
        materialization is not None
        and (materialization.tags or {}).get("dagster/data_version") == data_version
    )


@dataclasses.dataclass(frozen=True)
class _Counting:
    """The distinct ways in which recipes count one shard."""

    shard: str
    sections: tuple[Tokenizer, ...]


def _countings(shards: list[str]) -> list[_Counting]:
    """One section per distinct way of counting (pattern, document cap, budget of characters) among the
    recipes whose tokenizer names the shard."""
    wanted: dict[str, dict[str, Tokenizer]] = {}
    for recipe in recipe_book().recipes.values():
        for shard in get_source(recipe.data.source).training_shards()[: recipe.tokenizer.shards]:
            wanted.setdefault(shard, {})[counting_digest(recipe.tokenizer)] = recipe.tokenizer
    return [_Counting(shard, tuple(wanted[shard].values())) for shard in shards if shard in wanted]


def _count(context: dg.AssetExecutionContext, store: ObjectStore, shards: list[str]) -> dict[str, str]:
    failed: dict[str, str] = {}
    counted = 0
    for counting in _countings(shards):
        source = shard_sources()[counting.shard]
        start = time.monotonic()
        try:
            results = [
                ensure_counts(store, source.name, counting.shard, section) for section in counting.sections
            ]
        except (ValueError, OSError, HubError, StoreError) as error:
            failed[counting.shard] = str(error)
            continue
        new = any(result.new for result in results)
        counted += new
        version = digest_json({result.key: result.shard_sha256 for result in results})
        if not new and _is_recorded(context, WORD_COUNTS, counting.shard, version):
            continue
        context.log_event(
            dg.AssetMaterialization(
                asset_key=WORD_COUNTS,
                partition=counting.shard,
                metadata={
                    "counts_files": len(results),
                    "keys": ", ".join(result.key for result in results),
                    "words": results[0].words,
                    "unique_words": results[0].unique_words,
                    "seconds": round(time.monotonic() - start, 2),
                },
                tags={"dagster/data_version": version},
            )
        )
    context.log.info(f"word counts: {counted} shards counted")
    return failed


@dg.asset(partitions_def=model_partitions, group_name="ingestion", kinds={"parquet"})
def validation_files(
    context: dg.AssetExecutionContext, config: IngestConfig, store: StoreResource, launcher: LauncherResource
) -> dg.MaterializeResult:
    """The validation shard of the model's source."""
    recipe = required_recipe(context)
    opened = store.open()
    source = get_source(recipe.data.source)
    shard = source.validation_shard()
    try:
        report = config.ingest(opened, launcher, source, [shard], lambda record: None)
    except _SOURCE_FAILS as error:
        raise dg.Failure(f"validation shard {shard} of {source.name}: {error}") from error
    if report.failed:
        raise dg.Failure(f"validation shard {shard} of {source.name}: {report.failed[shard]}")
    (record,) = (*report.landed, *report.skipped)
    path: Path | None = None
    if record.mode == "copy":
        path = data_folder(opened) / "validation" / f"{shard}.parquet"
        show_file(opened, record.file, path)
    return dg.MaterializeResult(
        metadata={
            "shard": shard,
            **({} if record.rows is None else {"rows": record.rows, "characters": record.characters}),
            "bytes": record.size_bytes,
            "sha256": record.sha256,
            "revision": record.revision,
            "url": record.url,
            **({"path": dg.MetadataValue.path(str(path))} if path else {}),
        },
        data_version=dg.DataVersion(record.sha256),
    )
