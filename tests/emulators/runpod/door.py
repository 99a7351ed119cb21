"""What every request passes on its way in and out: keys, quotas, faults, validation."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
import traceback
from typing import Any
from urllib.parse import unquote

from emulators.runpod.faults import ROUTE_KINDS, Fault
from emulators.runpod.hang_up import hang_up
from emulators.runpod.limits import RateLimits
from emulators.runpod.platform import Platform
from emulators.runpod.problems import Problem
from emulators.runpod.routes import ROUTES as OWN_ROUTES
from emulators.runpod.routes import Answer, Call, Route
from emulators.runpod.serverless.routes import ROUTES as SERVERLESS_ROUTES
from emulators.runpod.validation import Contract
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

_MOST_BYTES = 102_400
_RETIRED = re.compile(r"/(v1|graphql)(/|$)")
ROUTES = (*OWN_ROUTES, *SERVERLESS_ROUTES)
_JSON, _PROBLEM = "application/json", "application/problem+json"


class Violation(Exception):
    """The emulator was about to answer what the real API cannot."""


class Door:
    """The API as an ASGI application."""

    def __init__(self, platform: Platform, contract: Contract | None) -> None:
        self.requests: list[dict[str, Any]] = []
        self._platform = platform
        self._contract = contract
        self._limits = RateLimits(platform.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        note = {
            "method": request.method,
            "path": request.url.path,
            "query": request.url.query,
            "time": time.time(),
            "status": None,
        }
        self.requests.append(note)
        answer = await self._answer(request)
        if answer is None:
            await hang_up(receive, send)
            return
        note["status"] = answer.status_code
        answer.headers["x-request-id"] = secrets.token_hex(8)
        await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Response | None:
        """None: the connection is closed without an answer."""
        agent = request.headers.get("user-agent", "")
        if not agent or agent.startswith("Python-urllib"):
            return PlainTextResponse("error code: 1010", status_code=403)
        if _RETIRED.match(request.url.path):
            return _problem(Problem(410, "this API has been retired; use https://api.runpod.io/v2"))
        limits: dict[str, str] = {}
        route: Route | None = None
        try:
            owner = self._authenticated(request)
            limits = self._limits.count()
            facts = {
                "match": f"{request.method} {request.url.path}",
                "key": "account" if owner == "account" else "pod",
            }
            fault = self._platform.faults.take(*ROUTE_KINDS, **facts)
            if fault is not None and fault.kind == "hang":
                await asyncio.sleep(fault.seconds)
                return None
            if fault is not None and fault.kind == "status":
                raise _problem_of(fault)
            if fault is not None and fault.kind == "slow":
                await asyncio.sleep(fault.seconds)
            route, call = await self._call(request, owner)
            answer = route.handle(call)
            if fault is not None and fault.kind == "hang_after":
                await asyncio.sleep(fault.seconds)
                return None
            if fault is not None and fault.kind == "status_after":
                raise _problem_of(fault)
            if fault is not None and fault.kind == "extra_fields":
                answer = _with_fields(answer, fault)
            response = self._checked(route, answer)
        except Problem as problem:
            response = _problem(problem)
            if route is not None:
                self._check(route, problem.status, _PROBLEM, problem.body())
        except ClientDisconnect:
            return None
        except Violation as violation:
            response = PlainTextResponse(str(violation), status_code=500)
        except Exception:
            self._platform.mistakes.append(traceback.format_exc())
            response = PlainTextResponse(self._platform.mistakes[-1], status_code=500)
        response.headers.update(limits)
        return response

    def _authenticated(self, request: Request) -> str:
        """`account` or a pod's id."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Problem(401, "missing bearer token")
        owner = self._platform.owner(key)
        if owner is None:
            raise Problem(401, "invalid bearer token")
        return owner

    async def _call(self, request: Request, owner: str) -> tuple[Route, Call]:
        """Find the route, and refuse what is not allowed or not well-formed."""
        path = request.scope.get("raw_path", request.url.path.encode()).decode()
        matching = [(route, found) for route in ROUTES if (found := route.match(path)) is not None]
        if not matching:
            raise Problem(404, "resource not found")
        allowed = [(route, found) for route, found in matching if route.method == request.method]
        if not allowed:
            methods = ", ".join(route.method for route, _ in matching)
            raise Problem(405, "method not allowed", headers={"Allow": methods})
        route, found = allowed[0]
        values = {name: unquote(value) for name, value in found.items()}
        if owner != "account" and not (route.by_pod and self._platform.is_own(owner, values.get("id"))):
            raise Problem(403, "access denied")
        query = dict(request.query_params)
        body = await self._body(request)
        if self._contract is not None:
            errors = self._contract.query_errors(route.method, route.template, query)
            errors += self._contract.request_errors(route.method, route.template, body)
            if errors:
                raise Problem(422, "Request validation failed.", errors=errors)
        call = Call(
            platform=self._platform,
            path=values,
            query=query,
            headers=request.headers,
            body=body,
        )
        return route, call

    async def _body(self, request: Request) -> Any:
        data = b""
        async for chunk in request.stream():
            data += chunk
            if len(data) > _MOST_BYTES:
                raise Problem(413, f"request body exceeds {_MOST_BYTES} bytes")
        if not data:
            return None
        try:
            return json.loads(data)
        except ValueError as error:
            raise Problem(422, "Request validation failed.", errors=[f"$: no JSON: {error}"]) from error

    def _checked(self, route: Route, answer: Answer) -> Response:
        """The answer on its way out. Raises Violation."""
        if answer.events is not None:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(answer.events, media_type="text/event-stream", headers=headers)
        content_type = None if answer.body is None else _JSON
        self._check(route, answer.status, content_type, answer.body)
        if answer.body is None:
            return Response(status_code=answer.status)
        return JSONResponse(answer.body, status_code=answer.status)

    def _check(self, route: Route, status: int, content_type: str | None, body: Any) -> None:
        if self._contract is None:
            return
        errors = self._contract.response_errors(route.method, route.template, status, content_type, body)
        if errors:
            text = (
                f"{route.method} {route.template} answers {status} against its contract: {'; '.join(errors)}"
            )
            self._platform.mistakes.append(text)
            raise Violation(text)


def _problem_of(fault: Fault) -> Problem:
    headers = {"Retry-After": "1", **fault.headers} if fault.status == 429 else fault.headers
    return Problem(fault.status, fault.detail, headers=headers)


def _problem(problem: Problem) -> Response:
    return JSONResponse(
        problem.body(), status_code=problem.status, headers=problem.headers, media_type=_PROBLEM
    )


def _with_fields(answer: Answer, fault: Fault) -> Answer:
    body = answer.body
    if not isinstance(body, dict):
        return answer
    spoiled = {
        name: [{**entry, **fault.fields} if isinstance(entry, dict) else entry for entry in value]
        if isinstance(value, list)
        else value
        for name, value in body.items()
    }
    return Answer(status=answer.status, body={**spoiled, **fault.fields})
