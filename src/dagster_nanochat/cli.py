"""Commands that need the graph or a launcher, registered into `nanochat` through an entry point."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer


def register(app: typer.Typer) -> None:
    """Add this package's commands to the `nanochat` program."""
    app.command()(quickstart)
    app.command()(plan)
    app.command()(status)
    app.command()(logs)
    app.command()(cancel)
    app.command()(doctor)
    pods = typer.Typer(help="Look at what is rented at RunPod, and end it.", no_args_is_help=True)
    pods.command("ls")(pods_ls)
    pods.command("rm")(pods_rm)
    pods.command("sweep")(pods_sweep)
    app.add_typer(pods, name="pods")
    endpoints = typer.Typer(
        help="Look at the models that RunPod's endpoints serve, ask them, and end them.", no_args_is_help=True
    )
    endpoints.command("ls")(endpoints_ls)
    endpoints.command("ask")(endpoints_ask)
    endpoints.command("rm")(endpoints_rm)
    app.add_typer(endpoints, name="endpoints")


def quickstart(
    model: Annotated[str, typer.Option(help="Which model to build.")] = "quick",
    force: Annotated[bool, typer.Option("--force", help="Rebuild stages though they are fresh.")] = False,
    stages: Annotated[
        str | None,
        typer.Option(help="Which stages --force rebuilds: names such as 'sft' or 'base,sft' (default: all)."),
    ] = None,
    question: Annotated[str, typer.Option(help="What to ask at the end.")] = "What is your name?",
) -> None:
    """Build the whole graph for one model through Dagster, and ask the model a question."""
    from dagster_nanochat.quickstart import run_quickstart

    _exit(lambda: run_quickstart(model, force=_forced(force, stages), question=question))


def plan(
    model: Annotated[str, typer.Option(help="Which model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    offers: Annotated[bool, typer.Option("--offers", help="Ask RunPod what it would cost there.")] = False,
) -> None:
    """Show what every stage of a model will take, and whether it is fresh."""
    from dagster_nanochat.reporting import print_plan

    _exit(lambda: print_plan(model, as_json=as_json, offers=offers))


def status(
    model: Annotated[str, typer.Option(help="Which model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show each stage of a model: fresh, stale, missing or running."""
    from dagster_nanochat.reporting import print_status

    _exit(lambda: print_status(model, as_json=as_json))


def logs(
    model: Annotated[str, typer.Option(help="Which model.")],
    stage: Annotated[str, typer.Option(help="Which of its training stages: base, midtrain or sft.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the attempt has ended.")] = False,
) -> None:
    """Show what the current or the last attempt at a stage has said."""
    from dagster_nanochat.attempts import print_logs

    _exit(lambda: print_logs(model, stage, follow=follow))


def cancel(
    model: Annotated[str, typer.Option(help="Which model.")],
    stage: Annotated[str, typer.Option(help="Which of its training stages: base, midtrain or sft.")],
) -> None:
    """End the live attempt at a stage, wherever it runs, after a checkpoint."""
    from dagster_nanochat.attempts import cancel_attempt

    _exit(lambda: cancel_attempt(model, stage))


def pods_ls() -> None:
    """List this store's pods, with what they cost and whether anybody needs them."""
    from dagster_nanochat.pods import list_pods

    _exit(list_pods)


def pods_rm(
    pod: Annotated[str, typer.Argument(help="A pod's id, or an attempt's token, as `pods ls` shows them.")],
) -> None:
    """End a pod now, without a checkpoint (`nanochat cancel` makes one first)."""
    from dagster_nanochat.pods import remove_pod

    _exit(lambda: remove_pod(pod))


def pods_sweep() -> None:
    """End every pod of this store that nobody needs any more, and say what it has cost."""
    from dagster_nanochat.pods import sweep_pods

    _exit(sweep_pods)


def endpoints_ls() -> None:
    """List this store's endpoints, with their workers and what they have cost this month."""
    from dagster_nanochat.endpoints import list_endpoints

    _exit(list_endpoints)


def endpoints_ask(
    model: Annotated[str, typer.Argument(help="Which model.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    within: Annotated[float, typer.Option(help="Seconds it may take, a worker's start included.")] = 600.0,
) -> None:
    """Ask the endpoint of a model, and print the answer as it comes."""
    from dagster_nanochat.endpoints import ask_endpoint

    asked = {"question": question, "max_tokens": max_tokens, "temperature": temperature}
    _exit(lambda: ask_endpoint(model, asked, within_s=within))


def endpoints_rm(
    model: Annotated[str, typer.Argument(help="A model, or an endpoint's id, as `endpoints ls` shows them.")],
) -> None:
    """Remove an endpoint, with its workers and its queue. The model stays."""
    from dagster_nanochat.endpoints import remove

    _exit(lambda: remove(model))


def doctor() -> None:
    """Check what the configured launcher and store need, and say what to do about what is wrong."""
    from dagster_nanochat.doctor import print_doctor

    _exit(print_doctor)


def _forced(force: bool, stages: str | None) -> str:
    """What the tag of a forced run says; nothing where none is. Raises ValueError."""
    from dagster_nanochat.guards import stages_named

    if stages is None:
        return "all" if force else ""
    if not force:
        raise ValueError(f"--stages {stages} says what --force rebuilds: give --force too")
    try:
        named = stages_named(stages)
    except ValueError as error:
        raise ValueError(f"--stages: {error}") from error
    if not named:
        raise ValueError("--stages names no stage")
    return stages


def _exit(command: Callable[[], int]) -> NoReturn:
    """End with the command's exit code; what a person can mend is one line, not a traceback."""
    from nanochat.store import StoreError

    try:
        code = command()
    except (ValueError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    raise typer.Exit(code)
