"""What the assets are given: the store and the launcher, chosen by the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import dagster as dg
from pydantic import Field

from dagster_nanochat.launch.base import Launcher
from dagster_nanochat.launch.local import LocalLauncher
from nanochat.failures import AttemptFailed
from nanochat.recipes import Hardware
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
        default=None,
        description="local: processes on this machine; runpod: rented pods; default: NANOCHAT_LAUNCHER, "
        "else local",
    )

    @property
    def name(self) -> str:
        return self.kind or os.environ.get(LAUNCHER_ENV) or "local"

    @property
    def deploys(self) -> bool:
        """Whether models are served by endpoints that it rents."""
        return self.name == "runpod"

    @property
    def is_remote(self) -> bool:
        """Whether stages train on other machines than this one."""
        return self.name != "local"

    def create(
        self,
        store: ObjectStore,
        *,
        hardware: Hardware | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Launcher:
        """hardware: the recipe's. settings: the run's own, of a launcher that rents. Raises dg.Failure."""
        kind = self.name
        if kind == "local":
            return LocalLauncher(store)
        if kind == "runpod":
            from dagster_nanochat.launch.runpod.launcher import configured_launcher

            try:
                return configured_launcher(store, hardware=hardware, settings=settings)
            except (ValueError, AttemptFailed) as error:
                raise dg.Failure(str(error), allow_retries=False) from error
        raise dg.Failure(
            f"unknown launcher {kind!r} ({LAUNCHER_ENV}): there are 'local' and 'runpod'", allow_retries=False
        )
