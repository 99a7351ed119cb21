"""A conversation at a terminal: what is typed is a question, or a command."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from nanochat.data.conversations import Conversation, Message, Part, dumps
from nanochat.inference.tools import written

if TYPE_CHECKING:
    from nanochat.inference.chat import ChatSession

COMMANDS = {
    "/help": "shows this",
    "/reset": "forgets the conversation",
    "/retry": "asks the last question again",
    "/save FILE": "writes the conversation: FILE.md for people, any other name as a line of JSON",
    "/exit": "ends, as Ctrl-D does, or Ctrl-C twice",
}
HINT = "/help shows the commands, Ctrl-C stops an answer, Ctrl-D ends."


class Terminal:
    """Reads lines from standard input until they end. Answers go to standard output, all else to standard
    error.

    model: its name. continues: a base model, which continues each line and remembers nothing.
    """

    def __init__(self, session: ChatSession, model: str, *, continues: bool) -> None:
        self._session = session
        self._model = model
        self._continues = continues
        self._interactive = sys.stdin.isatty()
        self._last_line: str | None = None

    def run(self) -> None:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # what is no UTF-8 is no reason to end
        if self._interactive:
            import readline  # noqa: F401  (gives input() line editing and a history)

            kind = "a base model, it continues your text" if self._continues else "a chat"
            _tell(f"{self._model}: {kind}. {HINT}")
        interrupted = False
        while True:
            try:
                line = input(self._prompt())
            except EOFError:
                self._leave_line()
                return
            except KeyboardInterrupt:
                self._leave_line()
                if interrupted:
                    return
                interrupted = True
                _tell("(Ctrl-C again ends; so does Ctrl-D)")
                continue
            interrupted = False
            if not self._obey(line):
                return

    def _prompt(self) -> str:
        if not self._interactive:
            return ""
        print()
        return "> "

    def _leave_line(self) -> None:
        if self._interactive:
            print(flush=True)

    def _obey(self, line: str) -> bool:
        """False where the line ends the conversation."""
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                pass
            case "/exit" | "/quit":
                return False
            case "/help":
                for name, meaning in COMMANDS.items():
                    _tell(f"{name:<11} {meaning}")
            case "/reset":
                self._session.reset()
                self._last_line = None
                _tell("The conversation is forgotten.")
            case "/retry":
                self._retry()
            case "/save":
                self._save(rest.strip())
            case _ if command.startswith("/"):
                _tell(f"unknown command {command}. {HINT}")
            case _:
                self._say(line)
        return True

    def _say(self, line: str) -> None:
        self._last_line = line
        try:
            with _ctrl_c_noted() as stopped, contextlib.closing(self._pieces(line)) as pieces:
                for text in written(_until(pieces, stopped)):
                    print(text, end="", flush=True)
                print(" …" if stopped.is_set() else "", flush=True)
        except KeyboardInterrupt:
            print(" …", flush=True)
        except ValueError as error:
            _tell(f"error: {error}")

    def _pieces(self, line: str) -> Generator[Part, None, None]:
        if self._continues:
            tokenizer = self._session.engine.tokenizer
            prompt = [tokenizer.bos, *tokenizer.encode(line)]
            yield from self._session.engine.stream_parts(prompt, self._session.sampling)
        else:
            yield from self._session.stream(line)

    def _retry(self) -> None:
        if self._last_line is None:
            _tell("There is no question to ask again.")
            return
        self._session.take_back(self._last_line)
        self._say(self._last_line)

    def _save(self, name: str) -> None:
        if not name:
            _tell("/save needs a file's name, as in /save chat.md or /save chat.jsonl")
        elif not self._session.history:
            _tell("There is nothing to save: no question has been answered.")
        else:
            path = Path(name).expanduser().absolute()
            messages = tuple(self._session.history)
            text = self._markdown(messages) if path.suffix.lower() == ".md" else _json_line(messages)
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                _tell(f"not saved: {path} is there already; name another file")
            except OSError as error:
                _tell(f"not saved: {path}: {error.strerror}")
            else:
                _tell(f"saved to {path}")

    def _markdown(self, messages: tuple[Message, ...]) -> str:
        blocks = []
        for message in messages:
            who = "You" if message.role == "user" else self._model
            content = message.content
            text = content if isinstance(content, str) else "".join(written(content))
            blocks.append(f"**{who}:** {text}\n")
        return "\n".join(blocks)


def _json_line(messages: tuple[Message, ...]) -> str:
    """As files of conversations have it, so that a recipe may be trained on it."""
    return dumps(Conversation(messages)) + "\n"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _ctrl_c_noted() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C sets the event, so that an answer ends between two tokens; the next one raises
    KeyboardInterrupt wherever that is, since the first token of a long question takes a while."""
    noted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _until(pieces: Iterator[Part], stopped: threading.Event) -> Iterator[Part]:
    for piece in pieces:
        yield piece
        if stopped.is_set():
            return
