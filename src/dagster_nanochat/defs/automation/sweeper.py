"""The sweeper's job and schedule: on where a launcher that rents is configured."""

import os

import dagster as dg

from dagster_nanochat.resources import LAUNCHER_ENV, StoreResource

_SWEEP_EVERY = "*/10 * * * *"


@dg.op
def sweep_rented_machines(context: dg.OpExecutionContext, store: StoreResource) -> None:
    """End every rented machine of this store that nobody needs, and log what it has cost; name the endpoints
    that cost while nobody asks them."""
    from dagster_nanochat.launch.runpod.client import RunPodClient
    from dagster_nanochat.launch.runpod.deployment import always_paid
    from dagster_nanochat.launch.runpod.sweeper import sweep

    opened = store.open()
    with RunPodClient.from_environment() as client:
        for swept in sweep(client, opened):
            context.log.warning(swept.describe())
        for note in always_paid(client, opened):
            context.log.warning(note)


@dg.job(executor_def=dg.in_process_executor)
def sweep_machines() -> None:
    """End every rented machine of this store that nobody needs."""
    sweep_rented_machines()


@dg.definitions
def sweeper() -> dg.Definitions:
    rents = os.environ.get(LAUNCHER_ENV) == "runpod"
    return dg.Definitions(
        jobs=[sweep_machines],
        schedules=[
            dg.ScheduleDefinition(
                name="sweep_machines_every_10_minutes",
                job=sweep_machines,
                cron_schedule=_SWEEP_EVERY,
                default_status=dg.DefaultScheduleStatus.RUNNING
                if rents
                else dg.DefaultScheduleStatus.STOPPED,
            )
        ],
    )
