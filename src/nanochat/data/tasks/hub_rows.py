"""Rows of a dataset of the hub, turned into Python values a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.data.tasks.context import TaskContext, TaskError
from nanochat.data.tasks.splits import Split
from nanochat.data.tasks.task import choose_rows

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """What a task reads of which dataset. splits: the dataset's split for each of ours."""

    task: str
    repo: str
    config: str
    splits: dict[Split, str]
    columns: Sequence[str]

    def rows(
        self, context: TaskContext, split: Split, rows: int | None, seed: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, row) of all rows of a split, or of a fixed sample of `rows` of them, in the dataset's
        order; the name is for people: ``openai/gsm8k/train/17``.

        Raises TaskError naming a column that is missing.
        """
        import pyarrow.parquet as pq

        name = f"{self.repo}/{self.splits[split]}"
        files = context.require_hub(self.task).files(self.repo, self.config, self.splits[split])
        total = sum(pq.read_metadata(path).num_rows for path in files)
        wanted = iter(choose_rows(self.task, split, seed, total, rows))
        next_wanted = next(wanted, None)
        start = 0
        for batch in self._batches(name, files):
            if next_wanted is None:
                return
            if next_wanted < start + batch.num_rows:
                values = batch.to_pylist()
                while next_wanted is not None and next_wanted < start + batch.num_rows:
                    yield f"{name}/{next_wanted}", values[next_wanted - start]
                    next_wanted = next(wanted, None)
            start += batch.num_rows

    def _batches(self, name: str, files: Sequence[Path]) -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        for path in files:
            with pq.ParquetFile(path) as file:
                present = file.schema_arrow.names
                missing = [column for column in self.columns if column not in present]
                if missing:
                    raise TaskError(
                        f"task {self.task!r}: {name} ({self.config}, {path.name}) has no column {missing}; "
                        f"it has {present}"
                    )
                yield from file.iter_batches(columns=list(self.columns), batch_size=1024)

    def inputs(self, context: TaskContext) -> dict[str, str]:
        """The digest of every split that the task may read."""
        hub = context.require_hub(self.task)
        splits = sorted(set(self.splits.values()))
        return {split: hub.digest(self.repo, self.config, split) for split in splits}
