"""What stands for https://api.runpod.ai: jobs for those who ask, and for the workers that answer them.

Of a job that failed on the way of OpenAI's routes, what the real platform answers is not written down
anywhere: here it is status 500 with the worker's error.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
from emulators.runpod.faults import ROUTE_KINDS
from emulators.runpod.hang_up import hang_up
from emulators.runpod.platform import Platform
from emulators.runpod.problems import Problem
from emulators.runpod.serverless.endpoints import Endpoint
from emulators.runpod.serverless.jobs import Job
from emulators.runpod.serverless.workers import Worker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

_POLL_S = 0.02
_MOST_BYTES = {"run": 10 << 20, "runsync": 20 << 20}
_WAIT_MS = (1000, 90_000, 300_000)  # of runsync: least, unless told, most
# How long a load balancer looks for a worker.
_NO_WORKER_S = 120.0
_BY_WORKERS = ("job-take", "job-take-batch", "job-stop", "job-done", "job-stream", "ping")

Handler = Callable[[Request], Awaitable[Response]]


class JobPlane:
    """The ASGI application."""

    def __init__(self, platform: Platform, requests: list[dict[str, Any]]) -> None:
        self._platform = platform
        self._requests = requests
        client, worker = self._for_clients, self._for_workers
        self._app = Starlette(
            routes=[
                Route("/v2/{id}/run", client(self.run), methods=["POST"]),
                Route("/v2/{id}/runsync", client(self.run_sync), methods=["POST"]),
                Route("/v2/{id}/status/{job}", client(self.status), methods=["GET", "POST"]),
                Route("/v2/{id}/stream/{job}", client(self.stream), methods=["GET", "POST"]),
                Route("/v2/{id}/cancel/{job}", client(self.cancel), methods=["POST"]),
                Route("/v2/{id}/retry/{job}", client(self.retry), methods=["POST"]),
                Route("/v2/{id}/purge-queue", client(self.purge), methods=["POST"]),
                Route("/v2/{id}/health", client(self.health), methods=["GET"]),
                Route("/v2/{id}/openai/{path:path}", client(self.openai), methods=["GET", "POST"]),
                Route("/v2/{id}/job-take/{worker}", worker(self.take), methods=["GET"]),
                Route("/v2/{id}/job-take-batch/{worker}", worker(self.take_batch), methods=["GET"]),
                Route("/v2/{id}/job-stop/{worker}", worker(self.stop), methods=["GET"]),
                Route("/v2/{id}/job-done/{worker}/{job}", worker(self.done), methods=["POST"]),
                Route("/v2/{id}/job-stream/{worker}/{job}", worker(self.streamed), methods=["POST"]),
                Route("/v2/{id}/ping/{worker}", worker(self.ping), methods=["GET"]),
                Route("/balanced/{id}/{path:path}", client(self.balance), methods=["GET", "POST"]),
            ],
            exception_handlers={Problem: _problem},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        by_worker = any(f"/{name}/" in path for name in _BY_WORKERS)
        note = {
            "method": scope["method"],
            "path": path,
            "query": scope["query_string"].decode(),
            "time": time.time(),
            "status": None,
        }
        if not by_worker:
            self._requests.append(note)
        facts = {"match": f"{scope['method']} {path}", "key": "pod" if by_worker else "account"}
        fault = self._platform.faults.take(*ROUTE_KINDS, **facts)
        if fault is not None and fault.kind in ("slow", "hang"):
            await asyncio.sleep(fault.seconds)
        if fault is not None and fault.kind in ("hang_after", "status_after"):
            await self._app(scope, receive, _nowhere)
        if fault is not None and fault.kind == "hang_after":
            await asyncio.sleep(fault.seconds)
        if fault is not None and fault.kind in ("hang", "hang_after"):
            await hang_up(receive, send)
        elif fault is not None and fault.kind in ("status", "status_after"):
            note["status"] = fault.status
            refused = JSONResponse({"error": fault.detail}, fault.status, headers=fault.headers)
            await refused(scope, receive, send)
        else:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    note["status"] = message["status"]
                await send(message)

            await self._app(scope, receive, noted)

    # -- jobs, for those who ask -------------------------------------------------------------------

    async def run(self, request: Request) -> Response:
        endpoint = self._queue(request)
        job = _submit(endpoint, await _body(request, _MOST_BYTES["run"]), sync=False)
        return JSONResponse({"id": job.id, "status": job.status})

    async def run_sync(self, request: Request) -> Response:
        """?wait: milliseconds; a job that takes longer is to be asked for."""
        endpoint = self._queue(request)
        least, usual, most = _WAIT_MS
        wait = request.query_params.get("wait", str(usual))
        if not wait.isdigit() or not least <= int(wait) <= most:
            raise Problem(400, f"wait must be {least} to {most} milliseconds")
        job = _submit(endpoint, await _body(request, _MOST_BYTES["runsync"]), sync=True)
        await _until(lambda: job.is_final, int(wait) / 1000)
        return JSONResponse(job.document())

    async def status(self, request: Request) -> Response:
        return JSONResponse(self._job(request).document())

    async def stream(self, request: Request) -> Response:
        """What came since the last time; waits a moment where that is nothing."""
        endpoint, job = self._queue(request), self._job(request)
        await _until(lambda: bool(job.chunks) or job.is_final, 1.0)
        status = job.status
        chunks = [{"output": chunk} for chunk in endpoint.jobs.drain(job)]
        return JSONResponse({"status": status, "stream": chunks})

    async def cancel(self, request: Request) -> Response:
        job = self._queue(request).jobs.cancel(request.path_params["job"])
        return JSONResponse({"id": job.id, "status": job.status})

    async def retry(self, request: Request) -> Response:
        job = self._queue(request).jobs.retry(request.path_params["job"])
        return JSONResponse({"id": job.id, "status": job.status})

    async def purge(self, request: Request) -> Response:
        return JSONResponse({"removed": self._queue(request).jobs.purge(), "status": "completed"})

    async def health(self, request: Request) -> Response:
        return JSONResponse(self._queue(request).health())

    async def openai(self, request: Request) -> Response:
        """A job whose input is the route and the body; its chunks are the answer."""
        endpoint = self._queue(request)
        asked: dict[str, Any] = {"openai_route": f"/{request.path_params['path']}"}
        if request.method == "POST":
            asked["openai_input"] = await _body(request, _MOST_BYTES["runsync"])
        job = endpoint.jobs.submit({"input": asked}, sync=True, timeout_s=endpoint.timeout_s)
        if asked.get("openai_input", {}).get("stream"):
            await _until(lambda: bool(job.chunks) or job.is_final, endpoint.timeout_s)
            if not (job.is_final and job.error):
                return StreamingResponse(_chunks(endpoint, job), media_type="text/event-stream")
        await _until(lambda: job.is_final, endpoint.timeout_s)
        if job.status != "COMPLETED":
            return JSONResponse({"error": _parsed(job.error or job.status)}, 500)
        chunks = endpoint.jobs.drain(job)
        return JSONResponse(chunks[0] if len(chunks) == 1 else job.output)

    # -- jobs, for workers (what the SDK calls) ----------------------------------------------------

    async def take(self, request: Request) -> Response:
        taken = await self._taken(request, 1)
        return JSONResponse(taken[0]) if taken else Response(status_code=204)

    async def take_batch(self, request: Request) -> Response:
        taken = await self._taken(request, int(request.query_params["batch_size"]))
        return JSONResponse(taken) if taken else Response(status_code=204)

    async def stop(self, request: Request) -> Response:
        endpoint, worker = self._worker(request)
        stopped: list[str] = []

        def any_stopped() -> bool:
            stopped.extend(endpoint.jobs.to_stop(worker.id))
            return bool(stopped) or worker.is_stopping

        await _until(any_stopped, self._platform.settings.take_poll_s)
        return JSONResponse({"jobsToStop": stopped})

    async def done(self, request: Request) -> Response:
        endpoint, worker = self._worker(request)
        document = json.loads(await request.body())
        worker.says()
        endpoint.jobs.done(worker.id, request.path_params["job"], document)
        if document.get("stopPod"):
            worker.stop()
        return Response("ok")

    async def streamed(self, request: Request) -> Response:
        endpoint, worker = self._worker(request)
        worker.says()
        endpoint.jobs.stream(worker.id, request.path_params["job"], json.loads(await request.body()))
        return Response("ok")

    async def ping(self, request: Request) -> Response:
        _, worker = self._worker(request)
        worker.says(unhealthy=request.query_params.get("status") == "unhealthy")
        return Response("ok")

    # -- a load-balancer endpoint ------------------------------------------------------------------

    async def balance(self, request: Request) -> Response:
        """To the worker with the fewest requests, once one is healthy."""
        endpoint = self._endpoint(request)
        if endpoint.is_queue:
            raise Problem(404, "endpoint not found")
        waiting = endpoint.requests
        waiting[""] = waiting.get("", 0) + 1
        client = httpx.AsyncClient(timeout=endpoint.timeout_s, trust_env=False)
        try:
            worker = await self._balanced(endpoint, client)
        finally:
            waiting[""] -= 1
        if worker is None:
            await client.aclose()
            raise Problem(400, "no worker became healthy in time")
        waiting[worker.id] = waiting.get(worker.id, 0) + 1
        passed = ("content-type", "accept", "x-api-key")
        asked = client.build_request(
            request.method,
            f"http://127.0.0.1:{worker.port}/{request.path_params['path']}",
            params=request.query_params,
            content=await request.body(),
            headers={name: value for name, value in request.headers.items() if name in passed},
        )

        async def pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:
                waiting[worker.id] -= 1
                await answer.aclose()
                await client.aclose()

        try:
            answer = await client.send(asked, stream=True)
        except httpx.HTTPError as error:
            waiting[worker.id] -= 1
            await client.aclose()
            raise Problem(502, f"the worker did not answer: {type(error).__name__}") from error
        kept = {name: value for name, value in answer.headers.items() if name == "content-type"}
        return StreamingResponse(pieces(answer), answer.status_code, headers=kept)

    async def _balanced(self, endpoint: Endpoint, client: httpx.AsyncClient) -> Worker | None:
        deadline = time.monotonic() + _NO_WORKER_S
        while time.monotonic() < deadline:
            workers = [worker for worker in endpoint.workers() if endpoint.may_take(worker)]
            for worker in sorted(workers, key=lambda worker: endpoint.requests.get(worker.id, 0)):
                if await _is_healthy(worker, client):
                    worker.asks_for_jobs()
                    return worker
            await asyncio.sleep(_POLL_S)
        return None

    # ----------------------------------------------------------------------------------------------

    def _for_clients(self, handle: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            key = request.headers.get("authorization", "").removeprefix("Bearer ")
            if key != self._platform.api_key:
                raise Problem(401, "unauthorized")
            return await handle(request)

        return checked

    def _for_workers(self, handle: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            _, worker = self._worker(request)
            if request.headers.get("authorization") != worker.key:
                raise Problem(401, "unauthorized")
            return await handle(request)

        return checked

    def _endpoint(self, request: Request) -> Endpoint:
        return self._platform.serverless.endpoint(request.path_params["id"])

    def _queue(self, request: Request) -> Endpoint:
        endpoint = self._endpoint(request)
        if not endpoint.is_queue:
            raise Problem(404, "endpoint not found")
        return endpoint

    def _worker(self, request: Request) -> tuple[Endpoint, Worker]:
        endpoint = self._queue(request)
        return endpoint, endpoint.worker(request.path_params["worker"])

    def _job(self, request: Request) -> Job:
        return self._queue(request).jobs.job(request.path_params["job"])

    async def _taken(self, request: Request, most: int) -> list[dict[str, Any]]:
        """Held until there is something to do, as long as a poll lasts."""
        endpoint, worker = self._worker(request)
        worker.asks_for_jobs()
        taken: list[Job] = []

        def any_taken() -> bool:
            worker.says()
            if endpoint.may_take(worker):
                taken.extend(endpoint.jobs.take(worker.id, most))
            return bool(taken) or worker.is_stopping

        await _until(any_taken, self._platform.settings.take_poll_s, request)
        return [{"id": job.id, "input": job.input} for job in taken]


def _submit(endpoint: Endpoint, body: Any, *, sync: bool) -> Job:
    if not isinstance(body, dict) or "input" not in body:
        raise Problem(400, "input is required")
    for name in ("webhook", "s3Config"):
        if name in body:
            raise Problem(400, f"{name} is not emulated")
    return endpoint.jobs.submit(body, sync=sync, timeout_s=endpoint.timeout_s)


async def _body(request: Request, most_bytes: int) -> Any:
    data = await request.body()
    if len(data) > most_bytes:
        raise Problem(400, f"exceeded max body size of {most_bytes >> 20}MiB")
    try:
        return json.loads(data)
    except ValueError as error:
        raise Problem(400, "the body is no JSON") from error


async def _until(what: Callable[[], bool], within_s: float, request: Request | None = None) -> None:
    """Returns when that is so, when the time is over, or when the caller has hung up."""
    deadline = time.monotonic() + within_s
    while not what() and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S)
        if request is not None and await request.is_disconnected():
            return


async def _chunks(endpoint: Endpoint, job: Job) -> AsyncIterator[str]:
    """Raw, as the worker sent them; the error of a job that fails in the middle comes last."""
    while True:
        final = job.is_final
        for chunk in endpoint.jobs.drain(job):
            yield chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk)}\n\n"
        if final:
            break
        await asyncio.sleep(_POLL_S)
    if job.error:
        yield f"data: {json.dumps({'error': _parsed(job.error)})}\n\n"


async def _is_healthy(worker: Worker, client: httpx.AsyncClient) -> bool:
    path = worker.request.get("env", {}).get("HEALTH_CHECK_PATH", "/ping")
    try:
        answer = await client.get(f"http://127.0.0.1:{worker.port}{path}", timeout=2)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200


def _parsed(error: str) -> Any:
    """A worker's error that is JSON is told as that."""
    try:
        return json.loads(error)
    except ValueError:
        return {"message": error, "type": "server_error", "param": None, "code": None}


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return JSONResponse({"error": error.detail}, error.status)


async def _nowhere(message: Message) -> None:
    pass
