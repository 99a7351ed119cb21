"""A job's input files on this machine, each verified before anything is trained on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat.data.staging import Stop
from nanochat.store import ObjectStore
from nanochat.store.objects import ObjectNotFound
from nanochat.store.receipts import FileRef
from nanochat.training.arrivals import Arrival, Arrivals
from nanochat.training.checkpoint import MODEL_FILES, CheckpointError, verify_file
from nanochat.training.job import TrainingJob

_AT_ONCE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Where things are. `init_checkpoint`: the folder of the model to start from, None in base.
    `arrivals`: the shards that may not be there yet."""

    tokenizer: Path
    shards: tuple[Path, ...]
    validation: Path | None
    init_checkpoint: Path | None
    conversations: Mapping[str, Path]
    arrivals: Arrivals


def gather_inputs(job: TrainingJob, store: ObjectStore, work: Path, *, fetch: bool) -> Inputs:
    """Bring every input here and verify its digest (`fetch`), or only say where it will be.

    Files of a store in a folder are read in place. Training shards of a hub are on their way when this
    returns. One process of a machine fetches, the others wait until it is back. Raises CheckpointError
    naming the file and both digests, HubError for a validation shard that the hub does not give.
    """
    folder = work / "inputs"
    weights = [file for file in job.init_checkpoint if file.name in MODEL_FILES]
    if job.init_checkpoint and len(weights) != len(MODEL_FILES):
        raise CheckpointError(f"the checkpoint to start from lacks {' or '.join(MODEL_FILES)}")
    validation = [job.validation] if job.validation else []
    places = {file.key: _place(store, file, folder) for file in (job.tokenizer, *job.shards, *validation)}
    places |= {file.key: _place(store, file, folder) for file in job.conversations.values()}
    places |= {file.key: folder / "init" / file.name for file in weights}
    places |= {key: folder / key for key in job.urls}

    def arrivals(files: Iterable[FileRef]) -> list[Arrival]:
        return [
            Arrival(file=file, url=job.urls[file.key], place=places[file.key])
            for file in files
            if file.key in job.urls
        ]

    coming = Arrivals(arrivals(job.shards))
    if fetch:
        files = [job.tokenizer, *job.shards, *validation, *job.conversations.values(), *weights]
        stored = [file for file in files if file.key not in job.urls]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda file: _bring(store, file, places[file.key]), stored))
            list(pool.map(lambda arrival: arrival.bring(Stop()), arrivals(validation)))
        coming.fetch()
    return Inputs(
        tokenizer=places[job.tokenizer.key],
        shards=tuple(places[file.key] for file in job.shards),
        validation=places[job.validation.key] if job.validation else None,
        init_checkpoint=folder / "init" if weights else None,
        conversations={name: places[file.key] for name, file in job.conversations.items()},
        arrivals=coming,
    )


def _place(store: ObjectStore, file: FileRef, folder: Path) -> Path:
    return store.local_path(file.key) or folder / file.key


def _bring(store: ObjectStore, file: FileRef, place: Path) -> None:
    if store.local_path(file.key) != place:
        try:
            store.fetch(file.key, place)
        except ObjectNotFound as error:
            raise CheckpointError(f"input {file.key} is missing from the store {store.url}") from error
    try:
        verify_file(place, file, store.url)
    except CheckpointError as error:
        raise CheckpointError(
            f"input {error}. Materialize what it comes from again (a shard: `training_files`, with force)"
        ) from error
