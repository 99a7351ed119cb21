"""What the repository holds, and what it must not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_BYTES = 1_000_000

TOP_LEVEL = {
    ".ci",
    ".dockerignore",
    ".github",
    ".env.example",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Dockerfile.serverless",
    "Dockerfile.training",
    "GUIDE.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "benchmarks",
    "build_and_push_serverless.sh",
    "data",
    "docs",
    "pyproject.toml",
    "requirements-serverless.lock",
    "requirements-training.lock",
    "requirements.lock",
    "rustbpe",
    "scripts",
    "serverless",
    "src",
    "tests",
    "tools.lock",
}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file that is committed, or would be."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = _git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    return sorted(path for name in set(names) if (path := ROOT / name).is_file())


def test_the_top_level_holds_what_it_should(files: list[Path]) -> None:
    assert {path.relative_to(ROOT).parts[0] for path in files} == TOP_LEVEL


def test_of_the_data_only_the_identity_conversations_are_kept(files: list[Path]) -> None:
    kept = [path.relative_to(ROOT).as_posix() for path in files if path.is_relative_to(ROOT / "data")]
    assert kept == ["data/identity_conversations.jsonl"]


def test_no_file_is_large(files: list[Path]) -> None:
    assert [path for path in files if path.stat().st_size > MAX_BYTES] == []


# Cargo's own lock names its registry in every entry; there is no form without it.
_REGISTRIES_ALLOWED = {"rustbpe/Cargo.lock"}
_REGISTRY = re.compile(r"(?:pypi|pythonhosted|pytorch)\.org|crates\.io|index-url", re.IGNORECASE)
_MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|work|home/\w+|Users/\w+|mnt/\w+)/")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def test_no_file_names_a_path_of_somebody_s_machine(files: list[Path]) -> None:
    found = {path: _MACHINE_PATH.findall(_text(path)) for path in files if path != Path(__file__)}
    assert {path: hits for path, hits in found.items() if hits} == {}


def test_no_file_names_a_package_registry_s_host(files: list[Path]) -> None:
    found = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if path != Path(__file__) and _REGISTRY.search(_text(path))
    ]
    assert set(found) <= _REGISTRIES_ALLOWED


def test_what_a_checkout_makes_for_itself_is_ignored() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    made = [".env", ".venv/x", ".tools/x", ".dagster/x", "uv.lock", "data/store/x", "checkpoint/quick/x"]
    made += ["rustbpe/target/x", "data/reports/quick/report.md", ".tmp_dagster_home_x/y"]
    ignored = _git("check-ignore", "--no-index", *made).splitlines()
    assert sorted(ignored) == sorted(made)


def test_tests_need_no_packages(files: list[Path]) -> None:
    """pytest imports them by path (importmode=importlib), so equal names in two folders are fine."""
    tests = [path for path in files if path.name.startswith("test_") and path.is_relative_to(ROOT / "tests")]
    assert tests
    assert [path for path in tests if (path.parent / "__init__.py").exists()] == []


def test_shell_scripts_stop_at_the_first_error(files: list[Path]) -> None:
    scripts = [path for path in files if _text(path).startswith("#!") and "bash" in _text(path)[:40]]
    assert scripts
    assert [path for path in scripts if "set -euo pipefail" not in _text(path)] == []
