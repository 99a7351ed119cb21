"""The lock files are in step with pyproject.toml, hold hashes, and say nothing of where to download."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
import tomllib
from collections.abc import Mapping, Set
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# Built from the checkout, so there is nothing to pin.
OWN = {"rustbpe", "dagster-nanochat"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pin:
    """One entry of a lock file."""

    name: str
    version: Version
    marker: Marker | None
    hashes: tuple[str, ...]

    def applies(self, environment: Mapping[str, str] | None = None) -> bool:
        return self.marker is None or self.marker.evaluate(dict(environment or {}))


def read_lock(path: Path) -> list[Pin]:
    pins = []
    for entry in re.split(r"\n(?=[A-Za-z0-9])", _without_comments(path)):
        if not entry.strip():
            continue
        requirement = Requirement(entry.split("\\")[0].split("--hash")[0].strip())
        (only,) = requirement.specifier
        assert only.operator == "==", f"{path.name}: {requirement} is not pinned"
        pins.append(
            Pin(
                name=canonicalize_name(requirement.name),
                version=Version(only.version),
                marker=requirement.marker,
                hashes=tuple(re.findall(r"--hash=sha256:([0-9a-f]+)", entry)),
            )
        )
    return pins


def _without_comments(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


GROUPS = {
    "tools.lock": "tools",
    "requirements-training.lock": "training",
    "requirements-serverless.lock": "serverless",
}


@pytest.fixture(scope="module", params=["requirements.lock", *GROUPS])
def lock_path(request: pytest.FixtureRequest) -> Path:
    return ROOT / str(request.param)


def requirements_of(project: Mapping[str, Any], lock: str) -> list[Requirement]:
    group = GROUPS.get(lock)
    if group:
        texts = project["dependency-groups"][group]
    else:
        texts = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    return [requirement for text in texts if (requirement := Requirement(text)).name not in OWN]


# Every Python that pyproject allows, on the systems that are supported.
ENVIRONMENTS = [
    {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system,
        "platform_system": {"linux": "Linux", "darwin": "Darwin"}[system],
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    for python in ("3.11", "3.12", "3.13")
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]


def test_every_requirement_of_pyproject_has_exactly_one_fitting_pin_on_every_supported_system(
    project: dict[str, Any], lock_path: Path
) -> None:
    pins = read_lock(lock_path)
    for requirement in requirements_of(project, lock_path.name):
        for environment in ENVIRONMENTS:
            if requirement.marker and not requirement.marker.evaluate(dict(environment)):
                continue
            name = canonicalize_name(requirement.name)
            fitting = [pin for pin in pins if pin.name == name and pin.applies(environment)]
            assert len(fitting) == 1, f"{requirement} has {len(fitting)} pins: run `make lock`"
            assert requirement.specifier.contains(fitting[0].version, prereleases=True), (
                f"{requirement} is pinned at {fitting[0].version}: run `make lock`"
            )


def test_every_pin_has_hashes(lock_path: Path) -> None:
    for pin in read_lock(lock_path):
        assert pin.hashes, f"{lock_path.name}: {pin.name}"
        assert all(len(digest) == 64 for digest in pin.hashes)


def test_no_lock_file_says_where_to_download(lock_path: Path) -> None:
    text = lock_path.read_text(encoding="utf-8")
    found = re.findall(
        r"https?:|file:|git\+|--\S*index\S*|--find-links|\S+\.(?:org|com|io|net)\b| @ \S+", text
    )
    assert found == []


def test_what_is_installed_is_what_is_pinned() -> None:
    for pin in read_lock(ROOT / "requirements.lock"):
        if not pin.applies():
            continue
        try:
            installed = Version(metadata.version(pin.name))
        except metadata.PackageNotFoundError:
            # PyTorch's CPU-only build brings no GPU libraries.
            assert re.match(r"nvidia-|cuda-|triton$", pin.name), (
                f"{pin.name} is not installed: run `make setup`"
            )
            assert "+cpu" in metadata.version("torch")
            continue
        assert installed.public == pin.version.public, f"{pin.name}: run `make setup`"


def test_what_the_pinned_packages_need_is_pinned_too(project: dict[str, Any]) -> None:
    """The installed packages' own requirements, walked from pyproject's."""
    pinned = {pin.name for pin in read_lock(ROOT / "requirements.lock") if pin.applies()}
    waiting = [(str(r), r) for r in requirements_of(project, "requirements.lock")]
    seen: set[str] = set()
    while waiting:
        origin, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or name in OWN or (requirement.marker and not _wanted(requirement)):
            continue
        seen.add(name)
        assert name in pinned, f"{origin} needs {name}, which is not in requirements.lock: run `make lock`"
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if _wanted(needed, extras=requirement.extras):
                waiting.append((name, needed))


def _wanted(requirement: Requirement, extras: set[str] | frozenset[str] = frozenset()) -> bool:
    if requirement.name.startswith(("nvidia-", "cuda-", "triton")):
        return False
    return requirement.marker is None or any(
        requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
    )


# Distributions that another one brings at its own version.
COMES_WITH = {"dagster-pipes": "dagster", "botocore": "boto3", "pydantic-monty-client": "pydantic-monty"}
# Needed without being imported: commands, or a version held back.
NOT_IMPORTED = {"dagster-dg-cli", "dagster-webserver", "click"}


def test_the_sources_import_what_pyproject_names_and_pyproject_names_nothing_else(
    project: dict[str, Any],
) -> None:
    asked = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["export"]]
    named = {canonicalize_name(Requirement(text).name) for text in asked}
    providers = metadata.packages_distributions()
    used: set[str] = set()
    for module, path in sorted(imported_modules(ROOT / "src").items()):
        names = {canonicalize_name(name) for name in providers.get(module, [])}
        provided_by = {COMES_WITH.get(name, name) for name in names}
        assert provided_by & named, f"{path} imports {module} of {names}: name it in pyproject"
        used |= provided_by
    assert named - used == NOT_IMPORTED, "pyproject names what no source imports"


def test_the_training_image_gets_what_nanochat_imports_at_the_versions_that_are_tested(
    project: dict[str, Any],
) -> None:
    providers = metadata.packages_distributions()
    imported = {
        COMES_WITH.get(canonicalize_name(name), canonicalize_name(name))
        # Nobody exports or serves on a rented machine.
        for module in imported_modules(ROOT / "src" / "nanochat", without={"huggingface", "serving"})
        for name in providers[module]
    }
    assert {canonicalize_name(name) for name in project["dependency-groups"]["training"]} == imported - OWN
    everything = {(pin.name, pin.version) for pin in read_lock(ROOT / "requirements.lock")}
    assert {(pin.name, pin.version) for pin in read_lock(ROOT / "requirements-training.lock")} <= everything


def test_the_serverless_image_has_the_torch_that_is_tested() -> None:
    versions = [
        {pin.version for pin in read_lock(ROOT / lock) if pin.name == "torch"}
        for lock in ("requirements.lock", "requirements-serverless.lock")
    ]
    assert versions[0] == versions[1]


def imported_modules(folder: Path, *, without: Set[str] = frozenset()) -> dict[str, Path]:
    """Top-level names of what the sources import from elsewhere, and a file that does. without: packages
    that are left out."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        if path.relative_to(folder).parts[0] in without:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            found.update({module.split(".")[0]: path for module in modules})
    own = {"nanochat", "dagster_nanochat"}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | own}
