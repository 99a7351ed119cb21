"""The command `nanochat`.

`chat`, `serve`, `compare`, `bpb`, `export` and `push` are here; commands that need the graph or a
launcher are registered by entry points of the group ``nanochat.commands``, each a callable that takes
the typer app. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import enum
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanochat.inference.formats import WeightFormat

if TYPE_CHECKING:
    from nanochat.inference.engine import Engine
    from nanochat.inference.sampling import Sampling
    from nanochat.serving.gate import Limits

COMMANDS_GROUP = "nanochat.commands"

# A single answer is reproducible; a chat that always says the same is dull.
CHAT_TEMPERATURE = 0.6

app = typer.Typer(name="nanochat", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


class SourceChoice(enum.StrEnum):
    """Which stage of a model to talk to."""

    BASE = "base"
    MID = "mid"
    SFT = "sft"


Weights = Annotated[
    WeightFormat,
    typer.Option(
        help="How the matrices are held; all but float are for a CPU (`nanochat bpb` measures them)."
    ),
]


@app.callback()
def nanochat() -> None:
    """Train a chat model from scratch, and talk to it."""


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    model: Annotated[str, typer.Option(help="Which model.")] = "quick",
    source: Annotated[
        SourceChoice, typer.Option(help="Which stage of it; base continues a text.")
    ] = SourceChoice.SFT,
    temperature: Annotated[
        float | None,
        typer.Option(help=f"0 is greedy. Default: 0 for one question, {CHAT_TEMPERATURE} in a conversation."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens only.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Length of an answer in tokens, at most.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")] = None,
    weights: Weights = WeightFormat.FLOAT,
) -> None:
    """Ask a trained model one question, or talk to it."""
    from nanochat.store import StoreError, open_store

    if temperature is None:
        temperature = CHAT_TEMPERATURE if question is None else 0.0
    try:
        from nanochat.inference.chat import load_engine
        from nanochat.inference.sampling import Sampling

        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)
        engine = load_engine(open_store(), model, source.value, weights=weights)
        if question is not None:
            print(_one_answer(engine, question, source, sampling))
            return
    except (ValueError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    _converse(engine, model, source, sampling)


def _one_answer(engine: Engine, question: str, source: SourceChoice, sampling: Sampling) -> str:
    if source is SourceChoice.BASE:
        (generation,) = engine.generate([_text_prompt(engine, question)], sampling)
        return generation.text
    from nanochat.inference.chat import ChatSession

    return ChatSession(engine, sampling).ask(question).text


def _text_prompt(engine: Engine, text: str) -> list[int]:
    return [engine.tokenizer.bos, *engine.tokenizer.encode(text)]


def _converse(engine: Engine, model: str, source: SourceChoice, sampling: Sampling) -> None:
    from nanochat.inference.chat import ChatSession
    from nanochat.inference.terminal import Terminal

    name = model if source is SourceChoice.SFT else f"{model} ({source})"
    Terminal(ChatSession(engine, sampling), name, continues=source is SourceChoice.BASE).run()


Host = Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")]
Port = Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)]
MaxRows = Annotated[int, typer.Option(help="Answers that are worked on together.", min=1)]
MaxWaiting = Annotated[int, typer.Option(help="Requests that may wait besides; the next is told 503.", min=1)]
MaxTokens = Annotated[int, typer.Option(help="Length of an answer, at most.", min=1)]


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Which model.")] = "quick",
    source: Annotated[
        SourceChoice, typer.Option(help="Which stage of it; base continues texts.")
    ] = SourceChoice.SFT,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_rows: MaxRows = 32,
    max_waiting: MaxWaiting = 128,
    max_tokens: MaxTokens = 1024,
    weights: Weights = WeightFormat.FLOAT,
    max_seconds: Annotated[
        float, typer.Option(help="Time of an answer; then it ends as if it were too long.", min=0.1)
    ] = 300.0,
    max_body: Annotated[int, typer.Option(help="Bytes of a request; more is told 413.", min=1)] = 1 << 20,
    client_rate: Annotated[
        int | None,
        typer.Option(help="Requests a minute of one client; more is told 429.", min=1, show_default="any"),
    ] = None,
    client_requests: Annotated[
        int | None,
        typer.Option(help="Requests of one client at once; more is told 429.", min=1, show_default="any"),
    ] = None,
    shutdown_seconds: Annotated[
        float, typer.Option(help="Time, when told to end, for what was accepted.", min=0)
    ] = 60.0,
) -> None:
    """Answer over HTTP as OpenAI's API does, at /v1.

    Where NANOCHAT_API_KEY is set (a key, or several with commas between), clients must send one of them.
    """
    from nanochat.serving.gate import Limits

    limits = Limits(
        body_bytes=max_body,
        # Twice what the model has to do: answers that are read slowly are open, too.
        open_requests=2 * (max_rows + max_waiting),
        client_requests_per_minute=client_rate,
        client_open_requests=client_requests,
    )
    _serve(
        {model: (model, source)},
        "/",
        host,
        port,
        max_rows,
        max_waiting,
        max_tokens,
        limits=limits,
        max_seconds=max_seconds,
        shutdown_seconds=shutdown_seconds,
        weights=weights,
    )


@app.command()
def compare(
    model_a: Annotated[str, typer.Argument(help="A model, or MODEL:STAGE, as in quick:mid.")],
    model_b: Annotated[str, typer.Argument(help="The other.")],
    source: Annotated[
        SourceChoice, typer.Option(help="Which stage of those that name none.")
    ] = SourceChoice.SFT,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_rows: MaxRows = 32,
    max_waiting: MaxWaiting = 128,
    max_tokens: MaxTokens = 1024,
    weights: Weights = WeightFormat.FLOAT,
) -> None:
    """Serve two models, and a page that puts every question to both, side by side."""
    wanted: dict[str, tuple[str, SourceChoice]] = {}
    for name in (model_a, model_b):
        model, _, stage = name.partition(":")
        if stage not in ("", *SourceChoice):
            print(f"error: {name}: a stage is {', '.join(SourceChoice)}, not {stage!r}", file=sys.stderr)
            raise typer.Exit(1)
        wanted[name] = model, SourceChoice(stage or source)
    _serve(wanted, "/?compare", host, port, max_rows, max_waiting, max_tokens, weights=weights)


def _serve(
    wanted: dict[str, tuple[str, SourceChoice]],
    page: str,
    host: str,
    port: int,
    max_rows: int,
    max_waiting: int,
    max_tokens: int,
    *,
    limits: Limits | None = None,
    max_seconds: float = 300.0,
    shutdown_seconds: float = 60.0,
    weights: WeightFormat = WeightFormat.FLOAT,
) -> None:
    """wanted: a model and its stage, by the name it is served under."""
    from nanochat.store import StoreError, open_store

    try:
        from nanochat.inference.chat import load_engine
        from nanochat.serving.app import Serving
        from nanochat.serving.gate import Limits, configured_keys
        from nanochat.serving.protocol import Defaults
        from nanochat.serving.server import LoadedModel
        from nanochat.serving.server import serve as run

        store = open_store()
        models = [
            LoadedModel(
                name,
                load_engine(store, model, source.value, weights=weights),
                source is not SourceChoice.BASE,
            )
            for name, (model, source) in wanted.items()
        ]
        serving = Serving(
            defaults=Defaults(max_tokens=max_tokens, temperature=CHAT_TEMPERATURE),
            api_keys=configured_keys(),
            limits=limits or Limits(),
            request_s=max_seconds,
        )
        run(
            models,
            serving,
            host=host,
            port=port,
            page=page,
            max_rows=max_rows,
            max_waiting=max_waiting,
            shutdown_s=shutdown_seconds,
        )
    except (ValueError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def bpb(
    model: Annotated[str, typer.Option(help="Which model.")] = "quick",
    source: Annotated[
        SourceChoice, typer.Option(help="Which stage of it; those that chat are worse at plain text.")
    ] = SourceChoice.BASE,
    tokens: Annotated[int, typer.Option(help="Of the validation text.", min=1)] = 32_768,
) -> None:
    """Measure what smaller weights cost a model, in bits per byte of its validation text."""
    from nanochat.store import StoreError, open_store

    try:
        from nanochat.serving.formats import format_losses

        trained = None
        for loss in format_losses(open_store(), model, source.value, list(WeightFormat), tokens):
            if trained is None:
                trained = loss.bits_per_byte
                print("weights  matrices (MB)  bits per byte  more than float")
            more = loss.bits_per_byte - trained
            print(
                f"{loss.format:7}  {loss.matrix_bytes / 1e6:13.1f}  {loss.bits_per_byte:13.4f}  {more:+15.4f}"
            )
    except (ValueError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The folder to make; an earlier export there is replaced.")],
    model: Annotated[str, typer.Option(help="Which model.")] = "quick",
    source: Annotated[SourceChoice, typer.Option(help="Which stage of it.")] = SourceChoice.SFT,
) -> None:
    """Write a model as a folder that transformers and vLLM load, compared with the model itself."""
    from nanochat.store import StoreError, open_store

    try:
        from nanochat.huggingface.export import export_model

        record = export_model(open_store(), model, source.value, out)
    except (ValueError, StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{out}: {record.summary()}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="What `nanochat export` made.")],
    repo: Annotated[str, typer.Option(help="The repository on the hub: owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it.")] = False,
) -> None:
    """Upload an export to the Hugging Face hub; private unless --public is given."""
    try:
        from nanochat.huggingface.push import push_export

        pushed = push_export(folder, repo, public=public)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{pushed.url} ({'private' if pushed.private else 'public'}), commit {pushed.commit[:12]}")


def register_commands(app: typer.Typer) -> None:
    """Add the commands of installed packages. One that cannot be loaded is reported and left out."""
    for entry_point in sorted(entry_points(group=COMMANDS_GROUP), key=lambda entry: entry.name):
        try:
            entry_point.load()(app)
        except (ImportError, AttributeError) as error:
            print(f"warning: the commands of {entry_point.value} are missing: {error}", file=sys.stderr)


def main() -> None:
    """The program `nanochat`. The project's `.env` says where history and store are; the shell wins."""
    from dotenv import load_dotenv

    from nanochat.store import project_root

    load_dotenv(project_root() / ".env")
    register_commands(app)
    app()
