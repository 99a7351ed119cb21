"""An image registry that knows manifests only: from a tag to its digest, as the OCI distribution
specification has it."""

from __future__ import annotations

import hashlib
import json

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class ImageRegistry:
    """`publish` makes a tag point to an image; the same tag may point to another one later."""

    def __init__(self) -> None:
        self._manifests: dict[str, bytes] = {}
        self._tags: dict[tuple[str, str], str] = {}

    def publish(self, name: str, tag: str, content: str = "") -> str:
        """Returns the digest, which follows from `content`."""
        config = hashlib.sha256(content.encode()).hexdigest()
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": {
                    "mediaType": "application/vnd.oci.image.config.v1+json",
                    "digest": f"sha256:{config}",
                    "size": len(content.encode()),
                },
                "layers": [],
            }
        ).encode()
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        self._manifests[digest] = manifest
        self._tags[name, tag] = self._tags[name, digest] = digest
        return digest

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v2/", self.version, methods=["GET", "HEAD"]),
                Route("/v2/{name:path}/manifests/{reference}", self.manifest, methods=["GET", "HEAD"]),
            ]
        )

    async def version(self, request: Request) -> Response:
        return JSONResponse({}, headers={"Docker-Distribution-API-Version": "registry/2.0"})

    async def manifest(self, request: Request) -> Response:
        digest = self._tags.get((request.path_params["name"], request.path_params["reference"]))
        if digest is None:
            return JSONResponse(
                {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}, status_code=404
            )
        return Response(
            self._manifests[digest], media_type=_MANIFEST, headers={"Docker-Content-Digest": digest}
        )
