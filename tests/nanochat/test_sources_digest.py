"""Digests of source code: blind to comments, and locked so that a change is a decision.

When `test_no_stage_changed_without_a_decision` fails: if the change alters what a stage makes from
the same inputs, raise the stage's version in `nanochat/stages.py`. Then, in either case, run
``python tests/nanochat/test_sources_digest.py`` to record the new digests.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nanochat.sources_digest as digests
from nanochat.stages import STAGES

LOCK = Path(__file__).parents[1] / "golden" / "stage_sources.json"


def current() -> dict[str, dict[str, object]]:
    return {
        name: {"version": spec.version, "sources_sha256": digests.sources_digest(spec.sources)}
        for name, spec in STAGES.items()
    }


def test_no_stage_changed_without_a_decision() -> None:
    changed = [name for name, entry in current().items() if json.loads(LOCK.read_text()).get(name) != entry]
    assert not changed, (
        f"the code of stages {changed} changed. If they now make something else from the same inputs, raise "
        "their version in nanochat/stages.py; then run: python tests/nanochat/test_sources_digest.py"
    )


def digest_of(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "module.py").write_text(code)
    monkeypatch.setattr(digests, "_PACKAGE", tmp_path)
    return digests.sources_digest(("module.py",))


def test_comments_docstrings_and_blank_lines_do_not_count(tmp_path, monkeypatch) -> None:
    plain = digest_of("def f(x):\n    return x + 1\n", tmp_path, monkeypatch)
    commented = '"""Module."""\n\n\ndef f(x):  # why\n    """Doc.\n\n    More.\n    """\n'
    commented += "\n    # because\n    return x + 1\n"
    assert digest_of(commented, tmp_path, monkeypatch) == plain


@pytest.mark.parametrize(
    "code",
    [
        "def f(x):\n    return x + 2\n",
        'def f(x):\n    return "# no comment"\n',
        "def g(x):\n    return x + 1\n",
    ],
)
def test_code_and_strings_count(code: str, tmp_path, monkeypatch) -> None:
    assert digest_of(code, tmp_path, monkeypatch) != digest_of(
        "def f(x):\n    return x + 1\n", tmp_path, monkeypatch
    )


def test_blanks_inside_a_string_count(tmp_path, monkeypatch) -> None:
    found = {
        digest_of(f'TEXT = """a{blanks}b"""\n', tmp_path, monkeypatch) for blanks in ("\n", "\n\n", " \n")
    }
    assert len(found) == 3


def test_rust_counts_but_for_its_comments(tmp_path, monkeypatch) -> None:
    def digest(code: str) -> str:
        (tmp_path / "crate.rs").write_text(code)
        monkeypatch.setattr(digests, "_PACKAGE", tmp_path / "package")
        return digests.sources_digest(("..",))

    (tmp_path / "package").mkdir()
    plain = digest("fn f() -> u32 {\n    1\n}\n")
    assert digest("//! Crate.\n\nfn f() -> u32 {\n    // why\n    1\n}\n") == plain
    assert digest("fn f() -> u32 {\n    2\n}\n") != plain


if __name__ == "__main__":
    LOCK.write_text(json.dumps(current(), indent=1) + "\n")
