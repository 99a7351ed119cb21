from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

from nanochat import cli

if TYPE_CHECKING:
    from nanochat.store import ObjectStore

PROGRAM = [sys.executable, "-c", "from nanochat.cli import main; main()"]


class Outcome:
    """What a call of the program left: exit code, standard output, standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(
    chat_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """run("chat", "--model", …, typed="lines of standard input") in this process."""

    def call(*arguments: str, typed: str | None = None) -> Outcome:
        monkeypatch.setenv("NANOCHAT_STORE", chat_store.url)
        if typed is not None:
            lines = iter(typed.splitlines())

            def read(prompt: str = "") -> str:
                try:
                    return next(lines)
                except StopIteration:
                    raise EOFError from None

            monkeypatch.setattr("builtins.input", read)
        with pytest.raises(SystemExit) as ended:
            cli.app(list(arguments))
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    return call


def test_one_question_gives_one_answer_and_nothing_else_on_stdout(run: Callable[..., Outcome]) -> None:
    outcome = run("chat", "--model", "quick", "What is your name?")
    assert (outcome.code, outcome.out, outcome.err) == (0, "I am NanoChat 😀.\n", "")
    assert run("chat", "What is 17+25?").out == "The answer is 42.\n"


def test_a_base_model_continues_the_text(run: Callable[..., Outcome]) -> None:
    outcome = run("chat", "--source", "base", "Once upon")
    assert (outcome.code, outcome.out) == (0, " a time there was a model.\n")


def test_max_tokens_and_sampling_are_obeyed(run: Callable[..., Outcome]) -> None:
    assert run("chat", "--max-tokens", "3", "What is your name?").out == "I a\n"
    wild = ("chat", "--temperature", "30", "--seed", "5", "What is your name?")
    assert run(*wild).out == run(*wild).out
    assert run(*wild).out != "I am NanoChat 😀.\n"
    assert (
        run("chat", "--temperature", "30", "--top-k", "1", "What is your name?").out == "I am NanoChat 😀.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "d4", "hi"], "'d4' is not built yet"),
        (["--model", "nonsense", "hi"], "unknown model 'nonsense'"),
        (["--model", "../../etc", "hi"], "not a store key"),
        (["--source", "mid", "hi"], "no finished midtrain stage"),
        (["--temperature", "-1", "hi"], "temperature"),
        (["--top-k", "0", "hi"], "top_k"),
        (["--max-tokens", "0", "hi"], "max_tokens"),
        (["x" * 200], "the question is 20"),
        ([" "], "the question is empty"),
        (["--source", "base", "x" * 200], "201 tokens"),
    ],
)
def test_what_cannot_be_answered_is_said_on_stderr_with_exit_code_1(
    run: Callable[..., Outcome], arguments: list[str], says: str
) -> None:
    outcome = run("chat", *arguments)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert says in outcome.err


def test_a_conversation_streams_and_obeys_its_commands(run: Callable[..., Outcome]) -> None:
    typed = (
        "What is 17+25?\n\n/help\n/nonsense\n/reset\nWhat is your name?\n" + "x" * 200 + "\n/exit\nnever read"
    )
    outcome = run("chat", "--temperature", "0", typed=typed)
    assert outcome.code == 0
    assert outcome.out == "[17+25 = 42] The answer is 42.\nI am NanoChat 😀.\n"
    assert "/reset      forgets the conversation" in outcome.err
    assert "unknown command /nonsense" in outcome.err
    assert "error: the question is 20" in outcome.err


def test_the_end_of_input_ends_a_conversation(run: Callable[..., Outcome]) -> None:
    outcome = run("chat", "--source", "base", "--temperature", "0", typed="Once upon\nOnce upon")
    assert (outcome.code, outcome.out) == (0, " a time there was a model.\n" * 2)


def test_an_export_says_what_was_found_equal_and_what_is_none_is_not_pushed(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = tmp_path / "exports" / "quick"
    outcome = run("export", "--model", "quick", "--source", "base", "--out", str(folder))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{folder}: quick, stage base, equal in transformers ")
    for arguments, says in (
        (["export", "--model", "d4", "--out", str(tmp_path / "d4")], "'d4' is not built yet"),
        (["export", "--source", "mid", "--out", str(tmp_path / "mid")], "no finished midtrain stage"),
        (["export", "--out", str(tmp_path)], "is there already and is no earlier export"),
        (["push", str(tmp_path), "--repo", "me/quick"], "is no finished export"),
    ):
        refused = run(*arguments)
        assert (refused.code, refused.out) == (1, "")
        assert refused.err.startswith("error: ")
        assert says in refused.err
    assert not (tmp_path / "d4").exists()


def test_the_program_starts_without_anything_heavy() -> None:
    heavy = "torch transformers pyarrow dagster numpy pydantic"
    code = f"import sys, nanochat.cli; print([name for name in '{heavy}'.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_of_other_packages_are_registered_and_broken_ones_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "extra_commands.py").write_text(
        "def register(app):\n    @app.command()\n    def hello():\n        print('hello')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    group = cli.COMMANDS_GROUP
    found = [
        EntryPoint("a", "not_installed_anywhere:register", group),
        EntryPoint("b", "extra_commands:register", group),
    ]
    monkeypatch.setattr(cli, "entry_points", lambda group: found)
    app = typer.Typer()
    app.callback()(lambda: None)
    cli.register_commands(app)
    assert "not_installed_anywhere:register are missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        app(["hello"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "hello\n"


def test_help_names_the_commands() -> None:
    done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, check=True)
    for command in ("chat", "export", "push"):
        assert command in done.stdout
    asked = subprocess.run([*PROGRAM, "chat", "--help"], capture_output=True, text=True, check=True)
    for option in ("--model", "--source", "--temperature", "--top-k", "--max-tokens", "--seed"):
        assert option in asked.stdout
