"""An image's name becomes a digest: at a real registry, with every way to log in, and every refusal."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from standins.registry import (
    MISSING,
    OCI,
    PASSWORD,
    USERNAME,
    Registry,
    digest_of,
    free_port,
    password_auth,
    running_registry,
    running_server,
    running_token_server,
)

from dagster_nanochat.launch.registry import ImageError, ImageName, resolve_image

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody is logged in anywhere."""
    for name in ("NANOCHAT_REGISTRY_USERNAME", "NANOCHAT_REGISTRY_PASSWORD", "REGISTRY_AUTH_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """With `team/nanochat:1`."""
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        registry.put_image("team/nanochat", "1")
        yield registry


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a registry, not running, with `team/private:1`."""
    folder = tmp_path_factory.mktemp("seeded")
    with running_registry(folder) as registry:
        registry.put_image("team/private", "1")
    return folder


@pytest.fixture(scope="module")
def private(seeded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """The same, running, and asking for a password."""
    with running_registry(seeded, auth=password_auth(tmp_path_factory.mktemp("password"))) as registry:
        yield registry


def log_in(path: Path, address: str, password: str = PASSWORD) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    login = base64.b64encode(f"{USERNAME}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {address: {"auth": login}}}), encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "registry", "repository", "rest"),
    [
        ("debian", "docker.io", "library/debian", "latest"),
        ("me/nanochat:1.2", "docker.io", "me/nanochat", "1.2"),
        ("localhost/base", "localhost", "base", "latest"),
        ("localhost:5000/a/b/c:x", "localhost:5000", "a/b/c", "x"),
        ("ghcr.io/me/nanochat@sha256:" + "0" * 64, "ghcr.io", "me/nanochat", "sha256:" + "0" * 64),
    ],
)
def test_a_name_is_read_as_docker_reads_it(text: str, registry: str, repository: str, rest: str) -> None:
    name = ImageName.parse(text)
    assert (name.registry, name.repository, name.digest or name.tag) == (registry, repository, rest)


@pytest.mark.parametrize(
    "text", ["", "Me/nanochat", "a b", "ghcr.io/", "x@sha256:12", "https://ghcr.io/me/x"]
)
def test_what_is_no_name_is_refused_by_name(text: str) -> None:
    with pytest.raises(ImageError, match="is not a name such as") as caught:
        ImageName.parse(text)
    assert repr(text) in str(caught.value)


def test_only_loopback_is_asked_without_tls() -> None:
    for plain in ("localhost/x", "localhost:5000/x", "127.0.0.1:5000/x", "[::1]:5000/x"):
        assert ImageName.parse(plain).api.startswith("http://"), plain
    for secured in ("debian", "ghcr.io/me/x", "127.evil.example/x", "localhost.example/x", "10.0.0.1:5000/x"):
        assert ImageName.parse(secured).api.startswith("https://"), secured


def test_a_tag_becomes_the_digest_that_the_registry_has_for_it(registry: Registry) -> None:
    digest = registry.put_image("team/nanochat", "2", layer=b"twelve bytes")
    image = resolve_image(f"{registry.address}/team/nanochat:2")
    assert image.reference == f"{registry.address}/team/nanochat@{digest}"
    assert image.created == "2026-01-02T03:04:05Z"
    assert 12 < image.size_bytes < 1000


def test_a_digest_stays_what_it_is_though_the_tag_moves_on(registry: Registry) -> None:
    first = registry.put_image("team/moving", "1", layer=b"first")
    second = registry.put_image("team/moving", "1", layer=b"second")
    assert resolve_image(f"{registry.address}/team/moving@{first}").digest == first
    assert resolve_image(f"{registry.address}/team/moving:1").digest == second
    assert resolve_image(f"{registry.address}/team/moving:1@{first}").digest == first


def test_an_index_is_pinned_as_a_whole_and_measured_as_amd64_pulls_it(registry: Registry) -> None:
    images = {
        "arm64": registry.put_image("team/many", None, architecture="arm64", layer=b"a" * 5000),
        "amd64": registry.put_image("team/many", None, layer=b"b" * 2000),
    }
    digest = registry.put_index("team/many", "1", images)
    image = resolve_image(f"{registry.address}/team/many:1")
    assert image.digest == digest
    assert 2000 < image.size_bytes < 3000


def test_an_image_for_other_machines_is_refused(registry: Registry) -> None:
    arm = registry.put_image("team/arm", "1", architecture="arm64")
    registry.put_index("team/arm", "many", {"arm64": arm})
    for tag in ("1", "many"):
        with pytest.raises(ImageError, match=rf"team/arm:{tag} is not built for linux/amd64.*make images"):
            resolve_image(f"{registry.address}/team/arm:{tag}")


def test_an_artifact_that_is_no_image_is_refused(registry: Registry) -> None:
    blob = registry.put_blob("team/artifact", b"{}")
    body = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}manifest.v1+json",
        "config": {"mediaType": "application/vnd.example.config", **blob},
        "layers": [],
    }
    registry.put_manifest("team/artifact", "1", body)
    with pytest.raises(ImageError, match="not built for linux/amd64"):
        resolve_image(f"{registry.address}/team/artifact:1")


@pytest.mark.parametrize("name", ["team/nanochat:nothere", "team/nothere:1"])
def test_a_missing_image_is_told_with_how_to_push_it(registry: Registry, name: str) -> None:
    with pytest.raises(ImageError, match=r"is not at its registry.*make images IMAGE=.*PUSH=1"):
        resolve_image(f"{registry.address}/{name}")


def test_where_no_registry_answers_the_message_names_it() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ImageError, match=f"no registry answers at {address}.*ConnectError"):
        resolve_image(f"{address}/team/nanochat:1")


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>welcome</html>", "no registry answers at .* no JSON"),
        (200, b"[]", "no registry answers at .* no JSON object"),
        (200, b"{}", "is no container image: its manifest lacks 'config'"),
        (200, b'{"manifests": [1]}', "is no container image"),
        (401, b"who?", "to an anonymous client"),
        (429, b"slow down", "answered 429 'slow down'; try again later"),
        (503, b"", "answered 503 ''; try again later"),
    ],
)
def test_what_is_no_registry_or_no_image_is_told_apart(status: int, body: bytes, said: str) -> None:
    with running_server(status, body) as address, pytest.raises(ImageError, match=said) as caught:
        resolve_image(f"{address}/team/x:1")
    assert f"{address}/team/x:1" in str(caught.value)


# -- permission --


def test_a_private_image_is_not_shown_to_nobody(private: Registry) -> None:
    with pytest.raises(
        ImageError, match=r"does not show .*team/private:1 to an anonymous client.*docker login"
    ):
        resolve_image(f"{private.address}/team/private:1")


def test_the_environment_s_login_comes_first(
    private: Registry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(home / "docker" / "config.json", private.address, "wrong")
    with pytest.raises(ImageError, match=r"to ali \(from .*config.json\)"):
        resolve_image(f"{private.address}/team/private:1")
    monkeypatch.setenv("NANOCHAT_REGISTRY_USERNAME", USERNAME)
    with pytest.raises(ImageError, match="NANOCHAT_REGISTRY_PASSWORD is not set"):
        resolve_image(f"{private.address}/team/private:1")
    monkeypatch.setenv("NANOCHAT_REGISTRY_PASSWORD", PASSWORD)
    assert resolve_image(f"{private.address}/team/private:1").digest


@pytest.mark.parametrize("place", ["docker/config.json", "runtime/containers/auth.json", "named.json"])
@pytest.mark.parametrize("entry", ["{}", "{}/team", "{}/team/private", "https://{}"])
def test_a_login_is_found_where_docker_podman_and_buildah_leave_it(
    private: Registry, home: Path, monkeypatch: pytest.MonkeyPatch, place: str, entry: str
) -> None:
    log_in(home / place, entry.format(private.address))
    if place == "named.json":
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / place))
        log_in(home / "docker" / "config.json", private.address, "wrong")
    assert resolve_image(f"{private.address}/team/private:1").digest


def test_a_credential_helper_is_asked(private: Registry, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = home / "docker-credential-test"
    answer = json.dumps({"Username": USERNAME, "Secret": PASSWORD})
    helper.write_text(f'#!/bin/sh\nread -r server; [ "$server" = "$KNOWN" ] && echo \'{answer}\'\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    (home / "docker").mkdir()
    for config in ({"credsStore": "test"}, {"credHelpers": {private.address: "test"}}):
        (home / "docker" / "config.json").write_text(json.dumps(config))
        monkeypatch.setenv("KNOWN", private.address)
        assert resolve_image(f"{private.address}/team/private:1").digest
        monkeypatch.setenv("KNOWN", "another")
        with pytest.raises(ImageError, match="to an anonymous client"):
            resolve_image(f"{private.address}/team/private:1")
    (home / "docker" / "config.json").write_text('{"credsStore": "nothere"}')
    with pytest.raises(ImageError, match="docker-credential-nothere does not answer"):
        resolve_image(f"{private.address}/team/private:1")


@pytest.mark.parametrize("text", ["not json", "[]", '{"auths": {"REGISTRY": {"auth": "?"}}}'])
def test_a_login_that_cannot_be_read_is_told_with_its_file(registry: Registry, home: Path, text: str) -> None:
    (home / "docker").mkdir()
    (home / "docker" / "config.json").write_text(text.replace("REGISTRY", registry.address))
    with pytest.raises(ImageError, match=r"docker/config.json cannot be read.*log in again"):
        resolve_image(f"{registry.address}/team/nanochat:1")


def test_a_registry_with_a_token_server_is_answered_with_a_token(seeded: Path, home: Path) -> None:
    with running_token_server(home) as auth, running_registry(seeded, auth=auth) as registry:
        image = f"{registry.address}/team/private:1"
        with pytest.raises(ImageError, match="to an anonymous client"):
            resolve_image(image)
        log_in(home / "docker" / "config.json", registry.address)
        assert resolve_image(image).digest
    with running_token_server(home, anonymous=True) as auth, running_registry(seeded, auth=auth) as registry:
        assert resolve_image(f"{registry.address}/team/private:1").digest


def test_what_was_damaged_at_the_registry_is_found_out(tmp_path: Path) -> None:
    with running_registry(tmp_path / "r") as registry:
        digest = registry.put_image("team/nanochat", "1", layer=b"sound")
        hexed = digest.removeprefix("sha256:")
        (blob,) = (tmp_path / "r").rglob(f"{hexed}/data")
        blob.write_bytes(blob.read_bytes().replace(b'"size": 5', b'"size": 6'))
        assert digest_of(blob.read_bytes()) != digest
        with pytest.raises(ImageError, match=rf"{registry.address}/team/nanochat"):
            resolve_image(f"{registry.address}/team/nanochat@{digest}")
