"""The hub's side of an upload: a repository is made, files are announced, large ones stored, all committed.

The storage of large files is another host for the client, which sends no token there. It keeps only
what has the announced sha256, and a commit of a large file that is not stored is refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from emulators.hub.repos import Repo, ServedFile, is_large
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

if TYPE_CHECKING:
    from emulators.hub.app import Hub


class Uploads:
    """Writes to the models of `hub`; contents are files of `folder`, named by their sha256."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub = hub
        self.folder = folder

    def routes(self) -> list[Route]:
        repo = "/{owner}/{name}"
        return [
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route(f"/api/models{repo}/preupload/{{revision}}", self.preupload, methods=["POST"]),
            Route(f"{repo}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
            Route("/storage/{sha256}", self.store, methods=["PUT"]),
            Route(f"/api/models{repo}/commit/{{revision}}", self.commit, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        refusal = self.hub.refusal(request, writes=True)
        if refusal:
            return refusal
        wanted = await request.json()
        name = f"{wanted['organization']}/{wanted['name']}"
        there = name in self.hub.models
        if not there:
            self.hub.models[name] = Repo(name, [], private=wanted.get("visibility") == "private")
        url = f"{request.url.scheme}://{request.url.netloc}/{name}"
        return JSONResponse({"url": url, "name": name}, status_code=409 if there else 200)

    async def validate_yaml(self, request: Request) -> Response:
        content = (await request.json())["content"]
        _, block, _ = content.split("---\n", 2)
        try:
            parsed = yaml.safe_load(block)
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, status_code=400)
        problems = [] if isinstance(parsed, dict) else [{"message": "the metadata is no mapping"}]
        return JSONResponse({"errors": problems, "warnings": []}, status_code=400 if problems else 200)

    async def preupload(self, request: Request) -> Response:
        refusal = self.hub.refusal(request, writes=True)
        if refusal:
            return refusal
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
            }
            for file in (await request.json())["files"]
        ]
        return JSONResponse({"files": files})

    async def batch(self, request: Request) -> Response:
        refusal = self.hub.refusal(request, writes=True)
        if refusal:
            return refusal
        host = "localhost" if request.url.hostname == "127.0.0.1" else "127.0.0.1"
        objects: list[dict[str, Any]] = []
        for wanted in (await request.json())["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.folder / wanted["oid"]).exists():
                href = f"http://{host}:{request.url.port}/storage/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def store(self, request: Request) -> Response:
        # The address is the permission.
        self.hub.note(request)
        fault = self.hub.faults.take(f"PUT {request.url.path}", ("status",))
        if fault:
            return Response(status_code=fault.status, headers=fault.headers)
        body = await request.body()
        if hashlib.sha256(body).hexdigest() != request.path_params["sha256"]:
            return Response(status_code=400)
        self._keep(body)
        return Response()

    async def commit(self, request: Request) -> Response:
        refusal = self.hub.refusal(request, writes=True)
        if refusal:
            return refusal
        repo = self.hub.models.get(f"{request.path_params['owner']}/{request.path_params['name']}")
        if repo is None:
            return JSONResponse({"error": "Repository not found"}, status_code=404)
        files = dict(repo.commits[repo.main])
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                content = self._keep(base64.b64decode(value["content"]))
                files[value["path"]] = ServedFile(value["path"], content)
            elif entry["key"] == "lfsFile":
                content = self.folder / value["oid"]
                if not content.exists():
                    return JSONResponse({"error": f"{value['path']} was not uploaded"}, status_code=400)
                files[value["path"]] = ServedFile(value["path"], content)
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        url = f"{request.url.scheme}://{request.url.netloc}/{repo.name}/commit/{sha}"
        return JSONResponse({"success": True, "commitUrl": url, "commitOid": sha})

    def _keep(self, content: bytes) -> Path:
        path = self.folder / hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        return path
