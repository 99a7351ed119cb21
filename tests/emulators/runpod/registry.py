"""An image registry that knows manifests and their configurations, and no layers: from a tag to its
digest, as the OCI distribution specification has it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"


class ImageRegistry:
    """`publish` makes a tag point to an image; the same tag may point to another one later."""

    def __init__(self) -> None:
        self._blobs: dict[tuple[str, str], bytes] = {}
        self._tags: dict[tuple[str, str], str] = {}

    def publish(
        self,
        name: str,
        tag: str,
        content: str = "",
        *,
        architecture: str = "amd64",
        labels: Mapping[str, str] | None = None,
    ) -> str:
        """Returns the digest, which follows from what is given."""
        config = {
            "os": "linux",
            "architecture": architecture,
            "created": "2026-11-01T00:00:00Z",
            "config": {"Labels": {"content": content, **(labels or {})}},
            "rootfs": {"type": "layers", "diff_ids": []},
        }
        digest, size = self._keep(name, config)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": {"mediaType": _CONFIG, "digest": digest, "size": size},
            "layers": [],
        }
        digest, _ = self._keep(name, manifest)
        self._tags[name, tag] = digest
        return digest

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v2/", self.version, methods=["GET", "HEAD"]),
                Route("/v2/{name:path}/manifests/{reference}", self.manifest, methods=["GET", "HEAD"]),
                Route("/v2/{name:path}/blobs/{reference}", self.blob, methods=["GET", "HEAD"]),
            ]
        )

    async def version(self, request: Request) -> Response:
        return JSONResponse({}, headers={"Docker-Distribution-API-Version": "registry/2.0"})

    async def manifest(self, request: Request) -> Response:
        name, reference = request.path_params["name"], request.path_params["reference"]
        return self._answer(name, self._tags.get((name, reference), reference), "MANIFEST_UNKNOWN", _MANIFEST)

    async def blob(self, request: Request) -> Response:
        name, reference = request.path_params["name"], request.path_params["reference"]
        return self._answer(name, reference, "BLOB_UNKNOWN", "application/octet-stream")

    def _keep(self, name: str, document: dict[str, Any]) -> tuple[str, int]:
        """Digest and size in bytes."""
        data = json.dumps(document).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._blobs[name, digest] = data
        return digest, len(data)

    def _answer(self, name: str, digest: str, code: str, media_type: str) -> Response:
        data = self._blobs.get((name, digest))
        if data is None:
            return JSONResponse({"errors": [{"code": code, "message": "unknown"}]}, status_code=404)
        return Response(data, media_type=media_type, headers={"Docker-Content-Digest": digest})
