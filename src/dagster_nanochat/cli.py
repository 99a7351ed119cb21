"""Commands that need the graph or a launcher, registered into `nanochat` through an entry point."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this package's commands to the `nanochat` program."""
    app.command()(quickstart)
    app.command()(plan)
    app.command()(status)


def quickstart(
    model: Annotated[str, typer.Option(help="Which model to build.")] = "quick",
    force: Annotated[bool, typer.Option("--force", help="Rebuild stages though they are fresh.")] = False,
    stages: Annotated[
        str, typer.Option(help="Which stages --force rebuilds: 'all', or names such as 'sft' or 'base,sft'.")
    ] = "all",
    question: Annotated[str, typer.Option(help="What to ask at the end.")] = "What is your name?",
) -> None:
    """Build the whole graph for one model through Dagster, and ask the model a question."""
    from dagster_nanochat.quickstart import run_quickstart

    raise typer.Exit(run_quickstart(model, force=stages if force else "", question=question))


def plan(
    model: Annotated[str, typer.Option(help="Which model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what every stage of a model will take, and whether it is fresh."""
    from dagster_nanochat.reporting import print_plan

    raise typer.Exit(print_plan(model, as_json=as_json))


def status(
    model: Annotated[str, typer.Option(help="Which model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show each stage of a model: fresh, stale, missing or running."""
    from dagster_nanochat.reporting import print_status

    raise typer.Exit(print_status(model, as_json=as_json))
