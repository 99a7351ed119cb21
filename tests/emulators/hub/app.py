"""The hub's HTTP interface as `huggingface_hub` 1.x uses it: reading datasets, writing models.

Large files are redirected to another host name, as the hub redirects to its storage: the client
must not send its token there. There is no chunk protocol (xet), so the client takes plain HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from urllib.parse import quote

from emulators.hub.faults import Faults
from emulators.hub.repos import Repo, ServedFile
from emulators.hub.uploads import Uploads
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

PAGE = 1000
CHUNK = 1 << 16


class Hub:
    """Repositories, faults and the log of requests."""

    def __init__(
        self, repos: Iterable[Repo], *, uploads: Path, token: str | None = None, page: int = PAGE
    ) -> None:
        self.repos = {repo.name: repo for repo in repos}
        self.models: dict[str, Repo] = {}
        self.uploads = Uploads(self, uploads)
        self.token = token
        self.page = page
        self.faults = Faults()
        self.log: list[dict[str, object]] = []
        self.by_sha256: dict[str, Path] = {}

    def app(self) -> Starlette:
        repo = "/{owner}/{name}"
        return Starlette(
            routes=[
                *self.uploads.routes(),
                *(
                    route
                    for kind, prefix in (("datasets", "/datasets"), ("models", ""))
                    for route in (
                        Route(f"/api/{kind}{repo}", self.info),
                        Route(f"/api/{kind}{repo}/revision/{{revision:path}}", self.info),
                        Route(f"/api/{kind}{repo}/tree/{{revision}}", self.tree),
                        Route(
                            f"/api/{kind}{repo}/paths-info/{{revision}}", self.paths_info, methods=["POST"]
                        ),
                        Route(
                            f"{prefix}{repo}/resolve/{{revision}}/{{path:path}}",
                            self.resolve,
                            methods=["GET", "HEAD"],
                        ),
                    )
                ),
                Route("/storage/{sha256}", self.storage, methods=["GET", "HEAD"]),
                Route("/_emulator/faults", self.set_faults, methods=["POST", "DELETE"]),
                Route("/_emulator/requests", self.requests, methods=["GET", "DELETE"]),
                Route("/_emulator/commits", self.commit, methods=["POST"]),
            ]
        )

    async def info(self, request: Request) -> Response:
        repo, sha, refusal = self._open(request)
        if repo is None or sha is None:
            return refusal
        return JSONResponse(
            {
                "_id": "0" * 24,
                "id": repo.name,
                "author": repo.name.split("/")[0],
                "sha": sha,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(repo.commits[sha])],
            }
        )

    async def tree(self, request: Request) -> Response:
        repo, sha, refusal = self._open(request)
        if repo is None or sha is None:
            return refusal
        entries = [file for _, file in sorted(repo.commits[sha].items())]
        if request.query_params.get("recursive", "").lower() != "true":
            entries = [file for file in entries if "/" not in file.path]
        start = int(request.query_params.get("cursor", "0"))
        page = entries[start : start + self.page]
        headers = {}
        if start + self.page < len(entries):
            following = request.url.include_query_params(cursor=start + self.page)
            headers["Link"] = f'<{following}>; rel="next"'
        return JSONResponse([_entry(file) for file in page], headers=headers)

    async def paths_info(self, request: Request) -> Response:
        repo, sha, refusal = self._open(request)
        if repo is None or sha is None:
            return refusal
        form = await request.form()
        files = repo.commits[sha]
        return JSONResponse([_entry(files[str(path)]) for path in form.getlist("paths") if path in files])

    async def resolve(self, request: Request) -> Response:
        repo, sha, refusal = self._open(request)
        if repo is None or sha is None:
            return refusal
        path = request.path_params["path"]
        file = repo.commits[sha].get(path)
        if file is None:
            return _refuse(404, "EntryNotFound", f"{path} does not exist on {sha}", {"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not file.is_large:
            return Response(file.local.read_bytes(), headers={**headers, "ETag": f'"{file.git_oid}"'})
        sha256 = file.sha256
        self.by_sha256[sha256] = file.local
        headers |= {
            "X-Linked-ETag": f'"{sha256}"',
            "X-Linked-Size": str(file.size),
            "ETag": f'"{file.git_oid}"',
        }
        # The same server under its other name: for the client, another host.
        host = "localhost" if request.url.hostname == "127.0.0.1" else "127.0.0.1"
        return RedirectResponse(
            f"http://{host}:{request.url.port}/storage/{quote(sha256)}", status_code=302, headers=headers
        )

    async def storage(self, request: Request) -> Response:
        self.note(request)
        fault = self.faults.take(_line(request), ("status",))
        if fault:
            return Response(status_code=fault.status, headers=fault.headers)
        local = self.by_sha256.get(request.path_params["sha256"])
        if local is None:
            return Response(status_code=404)
        data = local.read_bytes()
        start = 0
        wanted = request.headers.get("range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(data):
                return Response(status_code=416, headers={"Content-Range": f"bytes */{len(data)}"})
        headers = {
            "ETag": f'"{request.path_params["sha256"]}"',
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(data) - start),
        }
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        fault = self.faults.take(_line(request), ("cut", "slow", "wrong_bytes"))
        end = len(data)
        if fault and fault.kind == "wrong_bytes":
            at = max(start, fault.after)
            data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        elif fault and fault.kind == "cut":
            end = min(end, start + fault.after)
        body = _body(data, start, end, fault.pause_s if fault else 0.0)
        return StreamingResponse(body, status_code=206 if wanted else 200, headers=headers)

    async def set_faults(self, request: Request) -> Response:
        if request.method == "DELETE":
            self.faults.clear()
        else:
            self.faults.add(await request.json())
        return JSONResponse({})

    async def requests(self, request: Request) -> Response:
        log = list(self.log)
        if request.method == "DELETE":
            self.log.clear()
        return JSONResponse(log)

    async def commit(self, request: Request) -> Response:
        body = await request.json()
        sha = self.repos[body["repo"]].change(body["path"], Path(body["local"]))
        return JSONResponse({"sha": sha})

    def _open(self, request: Request) -> tuple[Repo | None, str | None, Response]:
        """The repository and commit that a request names, or the refusal to answer with."""
        refusal = self.refusal(request)
        if refusal:
            return None, None, refusal
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        dataset = request.url.path.startswith(("/api/datasets/", "/datasets/"))
        repo = (self.repos if dataset else self.models).get(name)
        if repo is None or (repo.private and "authorization" not in request.headers):
            return None, None, _refuse(404, "RepoNotFound", "Repository not found")
        sha = repo.resolve(request.path_params.get("revision", "main"))
        if sha is None:
            return None, None, _refuse(404, "RevisionNotFound", "Invalid rev id")
        return repo, sha, Response()

    def refusal(self, request: Request, *, writes: bool = False) -> Response | None:
        """What a request gets before anything is looked at: a fault, or what nobody without a token may."""
        self.note(request)
        fault = self.faults.take(_line(request), ("status",))
        if fault:
            return Response("fault on demand", status_code=fault.status, headers=fault.headers)
        given = request.headers.get("authorization")
        if (self.token and given != f"Bearer {self.token}") or (writes and not given):
            # What the hub answers for a private repository: it does not say that there is one.
            return _refuse(401, "RepoNotFound", "Invalid username or password.")
        return None

    def note(self, request: Request) -> None:
        self.log.append(
            {
                "method": request.method,
                "host": request.url.hostname,
                "path": request.url.path,
                "range": request.headers.get("range"),
                "authorization": request.headers.get("authorization"),
                "time": time.time(),
            }
        )


def _entry(file: ServedFile) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "oid": file.git_oid, "size": file.size, "path": file.path}
    if file.is_large:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


async def _body(data: bytes, start: int, end: int, pause_s: float) -> AsyncIterator[bytes]:
    """Less than the announced length where the body is cut: the server then drops the connection."""
    for offset in range(start, end, CHUNK):
        await asyncio.sleep(pause_s)
        yield data[offset : min(offset + CHUNK, end)]


def _line(request: Request) -> str:
    return f"{request.method} {request.url.path}"


def _refuse(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(
        {"error": message},
        status_code=status,
        headers={"X-Error-Code": code, "X-Error-Message": message, **(headers or {})},
    )
