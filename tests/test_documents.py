"""What the documents say works: their commands, files, links, picture and arithmetic.

Every block of commands is run from top to bottom, as a reader would, in a folder of its own with a
store of its own. The reader's model is `quick`; here the guide's own example recipe stands in for it,
which goes through the same graph in a minute. What cannot be run here says so in an HTML comment.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from standins.checkout import make_checkout, stop_server

from nanochat.recipes import named_recipes, parameters

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "GUIDE.md", "CONTRIBUTING.md")
STAND_IN = "mine"

# Comments that may stand before a block. The two that need something are not run at all.
NOT_RUN = {
    "needs: network",
    "needs: account",
    "needs: emulator",
    "run by CI: make quickstart",
    "run by CI: make test",
    "run by tests/nanochat/serving",
}
WITH_VALUE = ("file: ", "server: ")
LANGUAGES = {"bash", "python", "json", "text"}

_BLOCK = re.compile(r"(?:^<!-- (?P<marker>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A code block of a document, and the comment before it."""

    where: str
    language: str
    marker: str | None
    code: str

    def value(self, kind: str) -> str | None:
        """Of a marker such as ``file: my_recipes.py``: the part behind the kind."""
        if self.marker and self.marker.startswith(f"{kind}: "):
            return self.marker.removeprefix(f"{kind}: ")
        return None


def blocks_of(text: str, name: str) -> list[Block]:
    return [
        Block(
            where=f"{name}:{text.count(chr(10), 0, match.start()) + 1}",
            language=match["language"],
            marker=match["marker"],
            code=match["code"],
        )
        for match in _BLOCK.finditer(text)
    ]


def document(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_a_block_is_found_with_its_language_its_marker_and_its_line() -> None:
    text = "One\n\n<!-- needs: network -->\n```bash\nmake lock\n```\n\n```python\nx = 1\n```\n"
    first, second = blocks_of(text, "a.md")
    assert (first.where, first.language, first.marker, first.code) == (
        "a.md:3",
        "bash",
        "needs: network",
        "make lock\n",
    )
    assert (second.where, second.marker) == ("a.md:8", None)
    assert blocks_of("<!-- file: a.py -->\n```python\n```\n", "a.md")[0].value("file") == "a.py"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_says_what_it_is_and_what_keeps_it_from_being_run(name: str) -> None:
    text = document(name)
    blocks = blocks_of(text, name)
    assert text.count("\n```") == 2 * len(blocks), f"{name} has a code block that is not understood"
    for block in blocks:
        assert block.language in LANGUAGES, f"{block.where}: {block.language!r}"
        if block.language == "bash":
            known = block.marker is None or block.marker in NOT_RUN or block.value("server")
        elif block.language == "python":
            known = block.marker is None or block.marker in NOT_RUN or block.value("file")
        elif block.language == "json":
            known = block.value("file")
        else:
            known = block.marker is None and not re.search(r"^\$ ", block.code, re.M)
        assert known, f"{block.where}: marker {block.marker!r}"
    comments = re.findall(r"<!-- (.+?) -->", text)
    assert len(comments) == sum(block.marker is not None for block in blocks), "a marker without its block"


def test_what_is_marked_as_run_by_ci_is_run_by_ci() -> None:
    script = document(".ci/run")
    claims = {block.marker for name in DOCUMENTS for block in blocks_of(document(name), name)}
    commands = {
        claim.removeprefix("run by CI: ") for claim in claims if claim and claim.startswith("run by CI")
    }
    assert commands == {"make quickstart", "make test"}
    for command in commands:
        assert re.search(rf"^timed {command}$", script, re.M), f".ci/run does not run {command}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_inside_the_repository_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document(name)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name}: {target}"


def test_every_test_that_the_guide_names_for_a_promise_is_there() -> None:
    named = re.findall(r"`(tests/[^`]+)`", document("GUIDE.md"))
    assert len(named) > 5
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_recipes_in_the_guide_have_the_numbers_that_it_says() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \|.*\|$", document("GUIDE.md"), re.M
    )
    said = {name: tuple(int(number.replace(",", "")) for number in numbers) for name, *numbers in rows}
    assert said == {
        name: (
            recipe.model.depth,
            recipe.model.width,
            recipe.model.heads,
            recipe.tokenizer.vocab_size,
            parameters(recipe.model, recipe.tokenizer.vocab_size),
        )
        for name, recipe in named_recipes().items()
    }


def test_the_sums_in_the_guide_are_right() -> None:
    text = " ".join(document("GUIDE.md").split())
    sums = re.findall(r"((?:[\d,²]+ [·+] )+[\d,²]+) = ([\d,]*\d)", text)
    assert len(sums) >= 3
    for formula, result in sums:
        expression = formula.replace(",", "").replace("·", "*").replace("²", "**2")
        assert eval(expression) == int(result.replace(",", "")), formula


def test_the_picture_of_the_graph_is_the_graph(tmp_path: Path, reader: Reader) -> None:
    drawn = tmp_path / "graph.svg"
    reader.run(f"python {ROOT}/docs/draw_graph.py {drawn}")
    assert drawn.read_text(encoding="utf-8") == document("docs/graph.svg"), "run `make graph`"


class Reader:
    """Somebody who does what a document says, in a folder that looks like a fresh checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._exports = folder / ".exports"
        self._served: set[str] = set()
        settings = make_checkout(folder) | {
            "HF_HUB_OFFLINE": "1",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "NANOCHAT_RECIPES": f"{folder}/my_recipes.py",
        }
        kept = ("CXX", "SSL_CERT_FILE", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")
        self._environment = settings | {name: os.environ[name] for name in kept if name in os.environ}

    def write_files(self, blocks: list[Block]) -> None:
        """The files that a document asks its reader to make."""
        for block in blocks:
            if name := block.value("file"):
                (self.folder / name).write_text(block.code, encoding="utf-8")

    def run(self, code: str, where: str = "") -> str:
        """Run commands; what they export stays for the next. Returns what they print."""
        script = f"set -eo pipefail\n[ -f {self._exports} ] && source {self._exports}\n{code}\n"
        script += f"export -p > {self._exports}\n"
        result = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
        )
        if result.returncode:
            pytest.fail(
                f"{where} exit {result.returncode} of\n{code}\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
            )
        return result.stdout

    def forget_exports(self) -> None:
        """As in a new shell."""
        self._exports.unlink(missing_ok=True)

    def serve(self, command: str) -> None:
        """Start a server, see that it answers, stop it, see that it is gone. Once is enough."""
        if command in self._served:
            return
        self._served.add(command)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = (
            f"[ -f {self._exports} ] && source {self._exports}\nexec {command} --host 127.0.0.1 --port {port}"
        )
        log = self.folder / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", script],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            answer = _wait_for_answer(f"http://127.0.0.1:{port}/server_info", process, deadline_s=120)
            assert answer is not None, log.read_text(errors="replace")[-3000:]
            assert "dagster_version" in answer.json()
        finally:
            stop_server(process)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/server_info", timeout=2)


def _wait_for_answer(url: str, process: subprocess.Popen[bytes], deadline_s: float) -> httpx.Response | None:
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            answer = httpx.get(url, timeout=5)
        except httpx.TransportError:
            answer = None
        if answer is not None and answer.status_code == 200:
            return answer
        time.sleep(0.3)
    return None


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A reader who has the guide's files and has built the stand-in, as `make quickstart` builds `quick`."""
    someone = Reader(tmp_path_factory.mktemp("reader").resolve())
    someone.write_files(blocks_of(document("GUIDE.md"), "GUIDE.md"))
    return someone


@pytest.fixture(scope="module")
def built(reader: Reader) -> Reader:
    output = reader.run(f"nanochat quickstart --model {STAND_IN}", "the stand-in for make quickstart:")
    assert output.splitlines()[-1].startswith("answer: ")
    return reader


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_commands_of_a_document_work_from_top_to_bottom(name: str, built: Reader) -> None:
    built.forget_exports()
    ran = 0
    for block in blocks_of(document(name), name):
        code = re.sub(r"\bquick\b", STAND_IN, block.code)
        if block.marker in NOT_RUN or block.value("file") or block.language in ("text", "json"):
            continue
        if block.language == "python":
            (built.folder / "block.py").write_text(code, encoding="utf-8")
            built.run("python block.py", block.where)
        elif block.value("server"):
            built.serve(code.strip())
        else:
            built.run(code, block.where)
        ran += 1
    assert ran
