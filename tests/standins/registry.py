"""A real OCI registry on loopback (Debian's docker-registry), and small images put into it by hand."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

PROGRAM = "docker-registry"
OCI = "application/vnd.oci.image."
MISSING = None if shutil.which(PROGRAM) else f"{PROGRAM} is not installed (Debian: apt-get install {PROGRAM})"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Registry:
    """A running registry that lets everybody push; `address` is host:port."""

    address: str

    def _client(self, repository: str) -> httpx.Client:
        return httpx.Client(base_url=f"http://{self.address}/v2/{repository}/")

    def put_blob(self, repository: str, data: bytes) -> dict[str, Any]:
        """Its descriptor, but for the media type."""
        with self._client(repository) as client:
            place = client.post("blobs/uploads/").raise_for_status().headers["Location"]
            params = {"digest": digest_of(data)}
            where = httpx.URL(place).copy_merge_params(params)
            client.put(where, content=data).raise_for_status()
        return {"digest": digest_of(data), "size": len(data)}

    def put_manifest(self, repository: str, reference: str | None, body: dict[str, Any]) -> str:
        """Its digest, which is its reference too where none is given."""
        data = json.dumps(body).encode()
        with self._client(repository) as client:
            client.put(
                f"manifests/{reference or digest_of(data)}",
                content=data,
                headers={"Content-Type": body["mediaType"]},
            ).raise_for_status()
        return digest_of(data)

    def put_image(
        self, repository: str, tag: str | None, *, architecture: str = "amd64", layer: bytes = b"layer"
    ) -> str:
        """An image of one layer; its digest."""
        config = {
            "os": "linux",
            "architecture": architecture,
            "created": "2026-01-02T03:04:05Z",
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]},
        }
        blobs = [self.put_blob(repository, data) for data in (json.dumps(config).encode(), layer)]
        return self.put_manifest(
            repository,
            tag,
            {
                "schemaVersion": 2,
                "mediaType": f"{OCI}manifest.v1+json",
                "config": {"mediaType": f"{OCI}config.v1+json", **blobs[0]},
                "layers": [{"mediaType": f"{OCI}layer.v1.tar", **blobs[1]}],
            },
        )

    def put_index(self, repository: str, tag: str, images: dict[str, str]) -> str:
        """An index of images by architecture; its digest."""
        with self._client(repository) as client:
            entries = [
                {
                    "mediaType": f"{OCI}manifest.v1+json",
                    "digest": digest,
                    "size": len(
                        client.get(
                            f"manifests/{digest}", headers={"Accept": f"{OCI}manifest.v1+json"}
                        ).content
                    ),
                    "platform": {"os": "linux", "architecture": architecture},
                }
                for architecture, digest in images.items()
            ]
        body = {"schemaVersion": 2, "mediaType": f"{OCI}index.v1+json", "manifests": entries}
        return self.put_manifest(repository, tag, body)


@contextlib.contextmanager
def running_registry(folder: Path, *, auth: dict[str, Any] | None = None) -> Iterator[Registry]:
    """Serve `folder` until the block ends; `auth` is that section of its configuration."""
    address = f"127.0.0.1:{free_port()}"
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"accesslog": {"disabled": True}, "level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": address},
        **({"auth": auth} if auth else {}),
    }
    (folder / "config.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, "serve", str(folder / "config.yml")], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 20
        while not _answers(address):
            assert process.poll() is None, (folder / "registry.log").read_text()
            assert time.monotonic() < deadline, "the registry does not answer"
            time.sleep(0.05)
        yield Registry(address=address)
    finally:
        process.terminate()
        process.wait(timeout=10)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _answers(address: str) -> bool:
    try:
        httpx.get(f"http://{address}/v2/")
    except httpx.TransportError:
        return False
    return True


USERNAME, PASSWORD = "ali", "opensesame"
_PASSWORD_BCRYPT = "$2b$05$abcdefghijklmnopqrstuuQbLfdQZSxZ9gjhA5V9o8Tyc6aQRO0Qi"


def password_auth(folder: Path) -> dict[str, Any]:
    """For a registry that asks for USERNAME and PASSWORD itself."""
    path = folder / "htpasswd"
    path.write_text(f"{USERNAME}:{_PASSWORD_BCRYPT}\n", encoding="utf-8")
    return {"htpasswd": {"realm": "test", "path": str(path)}}


@contextlib.contextmanager
def running_token_server(folder: Path, *, anonymous: bool = False) -> Iterator[dict[str, Any]]:
    """For a registry that sends its clients to a token server (which runs until the block ends)."""
    key, certificate = folder / "token.key", folder / "token.pem"
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tokens", "-days", "2",
            "-keyout", str(key), "-out", str(certificate))  # fmt: skip
    der = base64.b64encode(openssl("x509", "-in", str(certificate), "-outform", "der")).decode()

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    class Tokens(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = dict(urllib.parse.parse_qsl(urllib.parse.urlparse(self.path).query))
            known = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
            if not anonymous and self.headers.get("Authorization") != f"Basic {known}":
                self.send_error(401)
                return
            kind, name, actions = asked["scope"].split(":")
            claims = {
                "iss": "tests",
                "sub": "",
                "aud": asked["service"],
                "exp": int(time.time()) + 60,
                "nbf": int(time.time()) - 5,
                "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
            }
            header = {"typ": "JWT", "alg": "RS256", "x5c": [der]}
            signed = ".".join(part(json.dumps(section).encode()) for section in (header, claims))
            token = f"{signed}.{part(openssl('dgst', '-sha256', '-sign', str(key), given=signed.encode()))}"
            body = json.dumps({"token": token}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with _serving(Tokens) as address:
        yield {
            "token": {
                "realm": f"http://{address}/token",
                "service": "test registry",
                "issuer": "tests",
                "rootcertbundle": str(certificate),
            }
        }


@contextlib.contextmanager
def running_server(status: int, body: bytes) -> Iterator[str]:
    """A server with one answer for everybody; its address."""

    class Same(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with _serving(Same) as address:
        yield address


@contextlib.contextmanager
def _serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def openssl(*arguments: str, given: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *arguments], input=given, capture_output=True, check=True).stdout
