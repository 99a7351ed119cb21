"""From an image's name to the digest that pins it, at any registry of the OCI distribution spec.

Own code because the one library for it (oras 0.2.43) gives a manifest without its digest, knows no
index, reads neither REGISTRY_AUTH_FILE nor what `docker login` writes for Docker Hub.
Protocol: OCI distribution spec 1.1; tokens: Docker's registry token authentication.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Self

import httpx

from dagster_nanochat.launch.registry_credentials import (
    DOCKER_HUB,
    PASSWORD_ENV,
    USERNAME_ENV,
    Credentials,
    find_credentials,
)

PLATFORM = ("linux", "amd64")
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_NAME = re.compile(
    r"(?P<repository>[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\])(?::\d+)?")
_TIMEOUT_S = 30.0


class ImageError(ValueError):
    """An image that cannot be pinned; the message names it and the next step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageName:
    """registry/repository:tag, or with @digest."""

    registry: str
    repository: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """As docker reads it: without a registry it is Docker Hub's, without a tag `latest`. Raises
        ImageError."""
        first, slash, rest = text.partition("/")
        named = bool(slash) and (first == "localhost" or "." in first or ":" in first)
        registry, name = (first, rest) if named else (DOCKER_HUB, text)
        match = _NAME.fullmatch(name)
        if match is None:
            raise ImageError(
                f"image {text!r} is not a name such as registry.example/team/nanochat:1 "
                "(lower case, then :tag or @sha256:…)"
            )
        repository, tag, digest = match["repository"], match["tag"], match["digest"]
        if registry == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        return cls(
            registry=registry,
            repository=repository,
            tag=tag or (None if digest else "latest"),
            digest=digest,
        )

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.registry}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")

    @property
    def api(self) -> str:
        """Where the registry answers. Without TLS only on loopback."""
        host = "registry-1.docker.io" if self.registry == DOCKER_HUB else self.registry
        return f"{'http' if _LOOPBACK.fullmatch(host) else 'https'}://{host}/v2/{self.repository}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PinnedImage:
    """An image as it was found. `digest` is the index's where there is one; `size_bytes` is what a
    linux/amd64 machine pulls, compressed; `created` is the builder's own statement (RFC 3339)."""

    name: ImageName
    digest: str
    size_bytes: int
    created: str | None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def reference(self) -> str:
        return f"{self.name.registry}/{self.name.repository}@{self.digest}"


def resolve_image(text: str) -> PinnedImage:
    """Ask the registry what the name means now. Raises ImageError."""
    name = ImageName.parse(text)
    try:
        credentials = find_credentials(name.registry, name.repository)
    except ValueError as error:
        raise ImageError(f"image {name}: {error}") from error
    with httpx.Client(timeout=_TIMEOUT_S, follow_redirects=True) as client:
        return _Registry(client, name, credentials).pin()


class _Registry:
    """One conversation about one image."""

    def __init__(self, client: httpx.Client, name: ImageName, credentials: Credentials | None) -> None:
        self._client = client
        self._name = name
        self._credentials = credentials

    def pin(self) -> PinnedImage:
        digest, manifest = self._document("manifests", self._name.digest or self._name.tag or "")
        try:
            image = self._for_platform(manifest)
            _, config = self._document("blobs", image["config"]["digest"])
            size = sum(part["size"] for part in (image["config"], *image["layers"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ImageError(f"{self._name} is no container image: its manifest lacks {error}") from error
        if (config.get("os"), config.get("architecture")) != PLATFORM:
            raise self._wrong_platform()
        return PinnedImage(
            name=self._name,
            digest=digest,
            size_bytes=size,
            created=config.get("created"),
            labels=(config.get("config") or {}).get("Labels") or {},
        )

    def _for_platform(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """An image's manifest as it is; of an index that of the image that the machines pull."""
        if "manifests" not in manifest:
            return manifest
        for entry in manifest["manifests"]:
            platform = entry.get("platform", {})
            if (platform.get("os"), platform.get("architecture")) == PLATFORM:
                return self._document("manifests", entry["digest"])[1]
        raise self._wrong_platform()

    def _document(self, kind: str, reference: str) -> tuple[str, dict[str, Any]]:
        """A manifest or a config, and its digest; what was asked for by digest is what comes."""
        response = self._get(f"{self._name.api}/{kind}/{reference}")
        digest = f"sha256:{hashlib.sha256(response.content).hexdigest()}"
        told = response.headers.get("Docker-Content-Digest", digest)
        if digest != told or (reference.startswith("sha256:") and digest != reference):
            raise ImageError(f"{self._name}: the registry sent other bytes than it said ({told}); try again")
        try:
            document = json.loads(response.content)
        except ValueError as error:
            raise self._no_registry(f"its answer is no JSON: {error}") from error
        if not isinstance(document, dict):
            raise self._no_registry("its answer is no JSON object")
        return digest, document

    def _get(self, url: str) -> httpx.Response:
        headers = {"Accept": ", ".join((*_MANIFESTS, *_INDEXES))}
        response = self._send(url, headers=headers)
        if response.status_code == 401:
            headers["Authorization"] = self._authorization(response.headers.get("WWW-Authenticate", ""))
            response = self._send(url, headers=headers)
        if response.status_code in (401, 403):
            raise self._refused()
        if response.status_code == 404:
            raise ImageError(
                f"{self._name} is not at its registry: push it (`make images IMAGE={self._name} PUSH=1`) or "
                "mend the name"
            )
        if response.status_code != 200:
            raise ImageError(
                f"{self._name}: the registry answered {response.status_code} {response.text[:200]!r}; "
                f"try again{' later' if response.status_code == 429 or response.status_code >= 500 else ''}"
            )
        return response

    def _send(self, url: str, **how: Any) -> httpx.Response:
        try:
            return self._client.get(url, **how)
        except httpx.HTTPError as error:
            raise self._no_registry(f"{type(error).__name__}: {error}") from error

    def _authorization(self, challenge: str) -> str:
        """The header that answers a registry's challenge."""
        scheme, _, rest = challenge.partition(" ")
        login = {"Authorization": self._credentials.basic} if self._credentials else {}
        if scheme.lower() == "basic" and login:
            return login["Authorization"]
        asked = dict(_CHALLENGE.findall(rest))
        if scheme.lower() != "bearer" or "realm" not in asked:
            raise self._refused()
        realm = asked["realm"]
        if login and not realm.startswith("https://") and self._name.api.startswith("https://"):
            raise ImageError(f"{self._name}: its registry wants a password sent to {realm}, without TLS")
        scope = asked.get("scope", f"repository:{self._name.repository}:pull")
        service = {"service": asked["service"]} if "service" in asked else {}
        response = self._send(realm, params={**service, "scope": scope}, headers=login)
        if response.status_code in (400, 401, 403):
            raise self._refused()
        try:
            answer = response.raise_for_status().json()
            return f"Bearer {answer.get('token') or answer['access_token']}"
        except (httpx.HTTPStatusError, ValueError, KeyError, AttributeError) as error:
            raise self._no_registry(f"{realm} gives no token: {error}") from error

    def _refused(self) -> ImageError:
        login = self._credentials
        who = f"{login.username} (from {login.source})" if login else "an anonymous client"
        return ImageError(
            f"{self._name.registry} does not show {self._name} to {who}: it is private, or not there. "
            f"`docker login {self._name.registry}` (or podman's, or buildah's), or set {USERNAME_ENV} and "
            f"{PASSWORD_ENV}; where the image is missing, `make images IMAGE={self._name} PUSH=1`"
        )

    def _no_registry(self, why: str) -> ImageError:
        return ImageError(
            f"{self._name}: no registry answers at {self._name.registry} ({why}); mend the image's name or "
            "the network"
        )

    def _wrong_platform(self) -> ImageError:
        return ImageError(
            f"{self._name} is not built for {'/'.join(PLATFORM)}, which the rented machines are: build it "
            f"with `make images IMAGE={self._name} PUSH=1`"
        )
