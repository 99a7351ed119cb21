"""Who to be at a registry: from the environment, else from where docker, podman and buildah log in.

Formats: docker's config.json and containers-auth.json(5), with credential helpers; a login that left an
identity token instead of a password is passed over.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

USERNAME_ENV = "NANOCHAT_REGISTRY_USERNAME"
PASSWORD_ENV = "NANOCHAT_REGISTRY_PASSWORD"
DOCKER_HUB = "docker.io"
_DOCKER_HUB_LOGIN = "https://index.docker.io/v1/"  # what `docker login` calls it
_HELPER_TIMEOUT_S = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credentials:
    """A login. `source` is where it came from, for messages."""

    username: str
    password: str = dataclasses.field(repr=False)
    source: str

    @property
    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return f"Basic {base64.b64encode(f'{self.username}:{self.password}'.encode()).decode()}"


def find_credentials(registry: str, repository: str) -> Credentials | None:
    """The login for a repository; None: anonymous. Raises ValueError for one that cannot be read."""
    username, password = os.environ.get(USERNAME_ENV), os.environ.get(PASSWORD_ENV)
    if bool(username) != bool(password):
        missing = PASSWORD_ENV if username else USERNAME_ENV
        raise ValueError(f"{missing} is not set: a registry wants user name and password")
    if username and password:
        return Credentials(username=username, password=password, source=USERNAME_ENV)
    for path in _files():
        if path.is_file() and (found := _from_file(path, registry, repository)):
            return found
    return None


def _files() -> Iterator[Path]:
    named = os.environ.get("REGISTRY_AUTH_FILE")
    if named:
        yield Path(named).expanduser()
        return
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    yield Path(f"{runtime}/containers" if runtime else f"/run/containers/{os.getuid()}") / "auth.json"
    yield Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser() / "config.json"


def _from_file(path: Path, registry: str, repository: str) -> Credentials | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        logins, helpers = config.get("auths", {}), config.get("credHelpers", {})
        server = _DOCKER_HUB_LOGIN if registry == DOCKER_HUB else registry
        helper = helpers.get(server) or helpers.get(registry) or config.get("credsStore")
        if helper and (found := _ask(helper, server)):
            return found
        for name in _names(registry, repository):
            if name in logins and (found := _decoded(logins[name], str(path))):
                return found
    except (ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a registry login ({error}): log in again") from error
    return None


def _names(registry: str, repository: str) -> Iterator[str]:
    """What a login for the repository may be filed under, the most exact first."""
    parts = [registry, *repository.split("/")]
    for count in range(len(parts), 0, -1):
        yield "/".join(parts[:count])
    yield _DOCKER_HUB_LOGIN if registry == DOCKER_HUB else f"https://{registry}"


def _decoded(login: dict[str, Any], source: str) -> Credentials | None:
    if not login.get("auth"):
        return None
    try:
        username, _, password = base64.b64decode(login["auth"], validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ValueError(f"a login in it is not base64: {error}") from error
    return Credentials(username=username, password=password, source=source) if password else None


def _ask(helper: str, name: str) -> Credentials | None:
    """A credential helper knows the login, or ends with an error where it has none."""
    program = f"docker-credential-{helper}"
    try:
        answer = subprocess.run(
            [program, "get"], input=name, capture_output=True, text=True, timeout=_HELPER_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"the credential helper {program} does not answer: {error}") from error
    if answer.returncode != 0:
        return None
    login = json.loads(answer.stdout)
    if login["Username"] == "<token>":
        return None
    return Credentials(username=login["Username"], password=login["Secret"], source=program)
