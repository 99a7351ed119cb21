"""`nanochat chat` as a program, at a terminal that Ctrl-C and Ctrl-D are typed at."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from standins.signals import listen_to_ctrl_c
from standins.trained_model import endless, fill_store

from nanochat.data.conversations import Part, exchange, read_conversations
from nanochat.model.gpt import GPT
from nanochat.store import ObjectStore
from nanochat.tokenizer import Tokenizer

PROGRAM = [sys.executable, "-c", "from nanochat.cli import main; main()", "chat"]
CTRL_C, CTRL_D = "\x03", "\x04"

pytestmark = pytest.mark.timeout(240)


class Screen:
    """A program at a terminal of 80 columns: what is typed, and what has been shown."""

    def __init__(self, store: ObjectStore, *options: str) -> None:
        ours, theirs = pty.openpty()
        self._terminal = ours
        self.shown = ""
        self.process = subprocess.Popen(
            [*PROGRAM, "--temperature", "0", *options],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "NANOCHAT_STORE": store.url, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
            preexec_fn=_own_terminal,
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def interrupt_prompt(self) -> None:
        """Ctrl-C while the program waits for a line: one that comes between the prompt and the waiting may be
        seen with the next key only."""
        asleep, deadline = 0, time.monotonic() + 60
        while asleep < 20:
            assert time.monotonic() < deadline, "the program does not wait"
            sleeps = psutil.Process(self.process.pid).status() == psutil.STATUS_SLEEPING
            asleep = asleep + 1 if sleeps else 0
            time.sleep(0.01)
        self.type(CTRL_C)

    def wait_for(self, text: str, within_s: float = 120.0) -> str:
        """What was shown up to the text, which is not looked at again."""
        deadline = time.monotonic() + within_s
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.shown!r}"
            self._read()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def ended(self, within_s: float = 20.0) -> int:
        """The exit code of a program that ends, with what it still shows."""
        deadline = time.monotonic() + within_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it goes on: {self.shown!r}"
            self._read()
        self._read()
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    def _read(self) -> None:
        if select.select([self._terminal], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # the other side is closed
                self.shown += os.read(self._terminal, 65536).decode(errors="replace").replace("\r\n", "\n")


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    listen_to_ctrl_c()


@pytest.fixture
def screen() -> Iterator[Callable[..., Screen]]:
    with contextlib.ExitStack() as stack:

        def start(store: ObjectStore, *options: str) -> Screen:
            started = Screen(store, *options)
            stack.callback(started.close)
            return started

        yield start


def test_a_conversation_at_a_terminal(
    screen: Callable[..., Screen], chat_store: ObjectStore, tmp_path: Path
) -> None:
    one = screen(chat_store)
    assert "quick: a chat. /help shows the commands" in one.wait_for("> ")
    one.type("/retry\n")
    one.wait_for("There is no question to ask again.\n")
    one.type("/save nothing.md\n")
    one.wait_for("There is nothing to save: no question has been answered.\n\n> ")
    one.type("What is 17+25?\n")
    assert one.wait_for("\n\n> ").endswith("What is 17+25?\n[17+25 = 42] The answer is 42.\n\n> ")
    one.type("/retry\n")
    assert one.wait_for("\n\n> ").endswith("[17+25 = 42] The answer is 42.\n\n> ")
    one.type("/help\n")
    for name in ("/help", "/reset", "/retry", "/save FILE", "/exit"):
        one.wait_for(name)

    lines, text = tmp_path / "chat.jsonl", tmp_path / "chat.md"
    one.type(f"/save {lines}\n/save {text}\n")
    one.wait_for(f"saved to {lines}\n")
    one.wait_for(f"saved to {text}\n")
    (saved,) = read_conversations(lines)
    assert saved == exchange(
        "What is 17+25?",
        [Part("python", "17+25"), Part("python_output", "42"), Part("text", "The answer is 42.")],
    )
    assert text.read_text() == ("**You:** What is 17+25?\n\n**quick:** [17+25 = 42] The answer is 42.\n")
    one.type(f"/save {text}\n/save {tmp_path / 'no' / 'such'}\n/save {tmp_path}\n/save\n")
    one.wait_for(f"not saved: {text} is there already")
    one.wait_for("No such file or directory")
    one.wait_for(f"not saved: {tmp_path} is there already")
    one.wait_for("/save needs a file's name")
    one.type("/reset\nWhat is your name?\n")
    one.wait_for("The conversation is forgotten.\n")
    one.wait_for("\nI am NanoChat 😀.\n\n> ")
    one.type(CTRL_D)
    assert one.ended() == 0
    assert "Traceback" not in one.shown


def test_ctrl_c_stops_the_answer_and_not_the_program(
    screen: Callable[..., Screen], tmp_path: Path, trained_model: GPT, byte_tokenizer: Tokenizer
) -> None:
    store = fill_store(tmp_path, endless(trained_model, byte_tokenizer), byte_tokenizer)
    one = screen(store, "--max-tokens", "29000")
    one.wait_for("> ")
    saved = tmp_path / "chat.md"
    for line in ("What is your name?", f"/save {saved}", "/retry"):
        one.type(f"{line}\n")
        if not line.startswith("/save"):
            one.wait_for("I am NanoCha")
            pressed_s = time.monotonic()
            one.type(CTRL_C)
            one.wait_for(" …\n")
            assert time.monotonic() - pressed_s < 30  # the whole answer would take minutes
        one.wait_for("\n> ")
    assert saved.read_text().startswith("**You:** What is your name?\n\n**quick:** I am NanoCha")
    one.interrupt_prompt()
    one.wait_for("(Ctrl-C again ends; so does Ctrl-D)\n")
    one.type("/help\n")
    one.wait_for("/help")
    one.wait_for("\n\n> ")
    one.interrupt_prompt()  # the first again, since something was typed in between
    one.wait_for("(Ctrl-C again ends; so does Ctrl-D)\n\n> ")
    one.interrupt_prompt()
    assert one.ended() == 0
    assert "Traceback" not in one.shown


def test_ctrl_c_forgets_a_line_that_is_half_typed(
    screen: Callable[..., Screen], chat_store: ObjectStore
) -> None:
    one = screen(chat_store, "--source", "base")
    assert "quick (base): a base model, it continues your text." in one.wait_for("> ")
    one.type("Once upon a midnight")
    one.wait_for("midnight")
    one.interrupt_prompt()
    one.wait_for("\n\n> ")
    one.type("Once upon\n")
    one.wait_for("\n a time there was a model.\n")
    one.type("/exit\n")
    assert one.ended() == 0


def test_without_a_terminal_only_answers_are_on_standard_output(
    tmp_path: Path, trained_model: GPT, byte_tokenizer: Tokenizer
) -> None:
    store = fill_store(tmp_path, endless(trained_model, byte_tokenizer), byte_tokenizer)
    process = subprocess.Popen(
        [*PROGRAM, "--temperature", "0", "--max-tokens", "29000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "NANOCHAT_STORE": store.url, "OMP_NUM_THREADS": "1"},
        preexec_fn=listen_to_ctrl_c,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"What is your name?\n")
        process.stdin.flush()
        assert process.stdout.read(12) == b"I am NanoCha"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/help\n/\xff\xfe\n/exit\n", timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out.decode().endswith(" …\n")
    assert "/reset      forgets" in err.decode()
    assert "unknown command /" in err.decode()
