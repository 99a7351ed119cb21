"""What the assets are given: the store and the launcher, chosen by the environment."""

from __future__ import annotations

import os

import dagster as dg
from pydantic import Field

from dagster_nanochat.launch.base import Launcher
from dagster_nanochat.launch.local import LocalLauncher
from nanochat.store import ObjectStore, open_store

LAUNCHER_ENV = "NANOCHAT_LAUNCHER"


class StoreResource(dg.ConfigurableResource):
    """Where everything that is built is kept."""

    url: str | None = Field(
        default=None, description="file:///… or a path; default: NANOCHAT_STORE, else data/store"
    )

    def open(self) -> ObjectStore:
        return open_store(self.url)


class LauncherResource(dg.ConfigurableResource):
    """Where training stages run."""

    kind: str | None = Field(
        default=None, description="local: processes on this machine; default: NANOCHAT_LAUNCHER, else local"
    )

    def create(self, store: ObjectStore) -> Launcher:
        kind = self.kind or os.environ.get(LAUNCHER_ENV, "local")
        if kind != "local":
            raise dg.Failure(
                f"unknown launcher {kind!r}: this version has 'local' (unset {LAUNCHER_ENV})",
                allow_retries=False,
            )
        return LocalLauncher(store)
