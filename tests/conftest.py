"""What every test may use."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.store import FileStore

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent

# `emulators` (stand-ins for services, each a program too) is imported from here.
sys.path.insert(0, str(TESTS))

# Settings of the person who runs the tests must not decide their outcome.
_SETTINGS = (
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "NANOCHAT_API_KEY",
    "NANOCHAT_CUDA_GRAPHS",
    "NANOCHAT_LAUNCHER",
    "NANOCHAT_MAX_PODS",
    "NANOCHAT_MAX_USD_PER_MODEL",
    "NANOCHAT_MAX_USD_PER_MONTH",
    "NANOCHAT_RECIPES",
    "NANOCHAT_SOURCES",
    "NANOCHAT_STORE",
    "NANOCHAT_TRAINING_IMAGE",
    "RUNPOD_API_KEY",
    "RUNPOD_API_URL",
)
_RUNPOD = [name for name in os.environ if name.startswith("NANOCHAT_RUNPOD_") and not name.endswith("_SPEC")]
for _name in (*_SETTINGS, *_RUNPOD):
    os.environ.pop(_name, None)


# A shell without job control starts what is behind `&` with SIGINT ignored. Dagster gives SIGTERM the same
# handling, and then what it starts itself (`tail`, for the logs) cannot be ended: 60 s a run.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_data: needs the shared test data (NANOCHAT_TEST_DATA)")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data for tests. Skips, saying why, on a machine without it."""
    folder = Path(os.environ.get("NANOCHAT_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / "MANIFEST.tsv").is_file():
        pytest.skip(f"no test data at {folder} (set NANOCHAT_TEST_DATA)")
    return folder.resolve()


@pytest.fixture
def tmp_store(tmp_path: Path) -> FileStore:
    """An empty store."""
    return FileStore(tmp_path / "store")


@pytest.fixture(scope="session")
def _shared_hub(shared_data: Path) -> Iterator[object]:
    from emulators.hub.client import running_hub

    with running_hub(data=shared_data) as hub:
        yield hub


@pytest.fixture
def shared_hub(_shared_hub: object, monkeypatch: pytest.MonkeyPatch) -> object:
    """A running hub emulator with the shared data, and HF_ENDPOINT pointing at it (needs_data).

    Every test finds it without faults and with an empty log. See `emulators.hub.client.HubEmulator`.
    """
    from emulators.hub.client import HubEmulator

    assert isinstance(_shared_hub, HubEmulator)
    _shared_hub.forget()
    monkeypatch.setenv("HF_ENDPOINT", _shared_hub.url)
    return _shared_hub
