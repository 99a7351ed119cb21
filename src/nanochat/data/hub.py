"""Dataset repositories of a data hub, through `huggingface_hub`: revisions, files, downloads.

``HF_ENDPOINT`` (a mirror), ``HF_TOKEN`` and the client's other settings are respected. What the
client leaves to its callers is done here: transient faults are waited out, errors say what to do,
and a file reaches its final name only whole. Whether it is the right file is the caller's to check
against the sha256 of `RemoteFile`.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from nanochat.data.staging import Stop
from nanochat.store.digests import digest_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

# What `HubRepo.url` gives.
_ADDRESS = re.compile(
    r"(?P<endpoint>https?://.+?)/datasets/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)

T = TypeVar("T")


class HubError(Exception):
    """The hub did not give what was asked: which repository or file, why, and the next step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository at one revision. sha256 is None for small files that are kept in git
    itself, of which the hub tells no SHA-256."""

    path: str
    size_bytes: int
    sha256: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How often a call that fails for the moment is made, and the first pause between two calls;
    every further pause is twice as long."""

    attempts: int = 5
    first_pause_s: float = 1.0

    def pause_s(self, failures: int) -> float:
        return self.first_pause_s * 2 ** (failures - 1) * random.uniform(0.75, 1.25)


def fetch_verified(
    fetch: Callable[[Path], None], destination: Path, *, size_bytes: int, sha256: str | None, what: str
) -> str:
    """Let `fetch` bring a file to `destination`, once more where it arrives damaged; its sha256.

    sha256: what it must be; None where nobody tells it, then only the size is compared. Raises
    HubError naming the file, as `what`, and both digests where it arrives damaged twice.
    """
    for _ in range(2):
        fetch(destination)
        size, found = destination.stat().st_size, digest_file(destination)
        if size == size_bytes and sha256 in (found, None):
            return found
        destination.unlink()
    raise HubError(
        f"{what} arrived damaged twice: expected sha256 {sha256} ({size_bytes} bytes), got {found} ({size} "
        "bytes). Check the mirror (HF_ENDPOINT) or proxy in between, then run it again."
    )


def download_address(
    url: str, destination: Path, stop: Stop | None = None, *, patience: Patience | None = None
) -> None:
    """Bring the file at an address that `HubRepo.url` gave, as `HubRepo.download` does.

    Where ``HF_ENDPOINT`` is set, that mirror is asked in place of the address's own hub. Raises
    HubError, also for what is no such address, and Stopped.
    """
    address = _ADDRESS.fullmatch(url)
    if address is None:
        raise HubError(f"{url} is no address of a dataset's file at a hub")
    endpoint = os.environ.get("HF_ENDPOINT") or address["endpoint"]
    repo = HubRepo(address["repo"], endpoint=endpoint, patience=patience)
    repo.download(unquote(address["path"]), unquote(address["revision"]), destination, stop)


class HubRepo:
    """One dataset repository.

    endpoint: None means ``HF_ENDPOINT``, else the public hub.
    """

    def __init__(self, repo: str, *, endpoint: str | None = None, patience: Patience | None = None) -> None:
        self.repo = repo
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._patience = patience or Patience()
        self._listings: dict[str, dict[str, RemoteFile]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"HubRepo({self.repo!r}, endpoint={self.endpoint!r})"

    def newest_revision(self) -> str:
        """The commit that ``main`` is at now. Raises HubError."""
        info = self._call("its newest revision", lambda api: api.dataset_info(self.repo, revision="main"))
        if not info.sha:
            raise HubError(
                f"{self.endpoint} tells no commit of dataset {self.repo}; is it a Hugging Face hub?"
            )
        return str(info.sha)

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """Every file of the repository at `revision`, by path. Listed once. Raises HubError."""
        with self._lock:
            if revision not in self._listings:
                self._listings[revision] = self._call(
                    f"its files at revision {revision}", lambda api: self._list(api, revision)
                )
            return self._listings[revision]

    def file(self, path: str, revision: str) -> RemoteFile:
        """Raises HubError where the repository has no such file at `revision`."""
        files = self.files(revision)
        if path not in files:
            raise HubError(
                f"dataset {self.repo} has no file {path} at revision {revision} (it has {len(files)} files)"
            )
        return files[path]

    def url(self, path: str, revision: str) -> str:
        """The address from which any machine can download the file."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, path, repo_type="dataset", revision=revision, endpoint=self.endpoint)

    def download(self, path: str, revision: str, destination: Path, stop: Stop | None = None) -> None:
        """Bring a file to `destination`, replaced atomically. Raises HubError, and Stopped.

        Bytes arrive in a hidden folder beside `destination`. What a broken download left there is
        continued, by this call or by a later one; a finished one leaves nothing.
        """
        from huggingface_hub import hf_hub_download

        stop = stop or Stop()
        partial = destination.with_name(f".{destination.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)

        def fetch(_api: HfApi) -> Path:
            try:
                return Path(
                    hf_hub_download(
                        self.repo,
                        path,
                        repo_type="dataset",
                        revision=revision,
                        endpoint=self.endpoint,
                        local_dir=partial,
                        tqdm_class=_silent_progress(stop),
                    )
                )
            except OSError as error:
                if "Consistency check failed" in str(error):
                    # More bytes than the file has: they cannot be continued, only fetched anew.
                    shutil.rmtree(partial)
                    partial.mkdir()
                    raise _TryAgain(str(error)) from error
                raise
            except RuntimeError as error:  # how the hub's chunk protocol (xet) reports a failed transfer
                raise _TryAgain(str(error)) from error

        os.replace(self._call(f"{path} at revision {revision}", fetch, stop), destination)
        shutil.rmtree(partial)

    def _list(self, api: HfApi, revision: str) -> dict[str, RemoteFile]:
        from huggingface_hub.hf_api import RepoFile

        tree = api.list_repo_tree(self.repo, repo_type="dataset", revision=revision, recursive=True)
        return {
            entry.path: RemoteFile(
                path=entry.path,
                size_bytes=entry.lfs.size if entry.lfs else entry.size,
                sha256=entry.lfs.sha256 if entry.lfs else None,
            )
            for entry in tree
            if isinstance(entry, RepoFile)
        }

    def _call(self, what: str, call: Callable[[HfApi], T], stop: Stop | None = None) -> T:
        """`call`, again after a pause as long as it fails with something that passes."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint)
        stop = stop or Stop()
        failures = 0
        while True:
            stop.pause(0)
            try:
                return call(api)
            except Exception as error:  # sorted by kind just below; what is not the hub's goes on
                if not _is_transient(error):
                    reason = self._reason(error)
                    if reason is None:
                        raise
                    raise HubError(f"dataset {self.repo}: {what}: {reason}") from error
                failures += 1
                if failures >= self._patience.attempts:
                    raise HubError(
                        f"dataset {self.repo}: {what}: {self.endpoint} failed {failures} times, last with: "
                        f"{_first_line(error)}. Check the network and HF_ENDPOINT and run it again (what has "
                        "arrived is kept and continued), or use the source `offline`."
                    ) from error
                stop.pause(self._patience.pause_s(failures))

    def _reason(self, error: Exception) -> str | None:
        """What to tell the user of an error that does not pass, or None where it is not the hub's."""
        from huggingface_hub import errors

        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            return (
                f"access is restricted. Accept the terms at {self.endpoint}/datasets/{self.repo} "
                "and set HF_TOKEN to a token of that account."
            )
        if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{self.endpoint} has no such public dataset, or refuses "
                f"{'HF_TOKEN' if os.environ.get('HF_TOKEN') else 'a call without HF_TOKEN'}. Check the name; "
                "for a private dataset set HF_TOKEN to a token that may read it."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return (
                "the hub no longer has that revision. Ingest with refresh to record the newest one "
                "(models trained on the old one become stale)."
            )
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return "the dataset has no such file."
        if isinstance(error, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set. Unset it, or use the source `offline`."
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "no space left on the disk. Free some, then run it again."
        if isinstance(error, errors.LocalEntryNotFoundError | errors.HfHubHTTPError):
            return (
                f"{self.endpoint} does not answer as a hub: {_first_line(error.__cause__ or error)}. "
                "Check the network and HF_ENDPOINT, or use the source `offline`."
            )
        return None


class _TryAgain(Exception):
    """A download that must begin anew."""


def _is_transient(error: Exception) -> bool:
    import httpx
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code in _TRANSIENT_STATUS
    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    return isinstance(error, _TryAgain | httpx.TransportError | ConnectionError | TimeoutError)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _silent_progress(stop: Stop) -> Any:
    """A progress bar class that shows nothing (several threads download at once, and the callers
    report whole shards) and ends a transfer that is to stop: the client calls it for every piece."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            stop.pause(0)
            return super().update(n)

    return Silent
