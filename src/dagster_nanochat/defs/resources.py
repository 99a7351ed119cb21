"""Resources and loggers of the code location."""

import dagster as dg

from dagster_nanochat.console import progress_logger
from dagster_nanochat.resources import LauncherResource, StoreResource


@dg.definitions
def resources() -> dg.Definitions:
    return dg.Definitions(
        resources={"store": StoreResource(), "launcher": LauncherResource()},
        loggers={"console": dg.colored_console_logger, "progress": progress_logger},
    )
