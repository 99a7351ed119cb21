"""A proxy in front of an S3 server that loses, delays and spoils what passes, on demand.

Requests are passed on as they came, the `Host` that was signed with them included, so signatures stay
good. Clients can be given ports of their own, and one client's network can be cut.

    with s3.serve(folder) as server, s3_faults.proxy(server.endpoint) as proxy:
        proxy.add("status", match="PUT .*/receipt.json", status=503, times=2)
        boto3.client("s3", endpoint_url=proxy.url, …)
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import urlsplit

import h11
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

_CODES = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}
_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER without waiting: closing sends a reset


class Fault(BaseModel):
    """match: a regular expression searched in ``METHOD /bucket/key?query``. times: how many requests it
    meets, None until it is cleared. probability: of each, drawn with `seed`. client: only that client's.

    status: the answer is `status`; the server never hears of it. reset: the connection is reset instead.
    lost_answer: the server does it, then the connection is reset. truncate: half of the answer's body
    comes. slow: the answer comes `seconds` later.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["status", "reset", "lost_answer", "truncate", "slow"]
    match: str = ""
    times: int | None = Field(default=1, ge=0)
    probability: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0
    client: str | None = None
    status: int = 503
    seconds: float = 1.0
    _hits: int = PrivateAttr(default=0)
    _random: random.Random = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        self._random = random.Random(self.seed)

    @property
    def hits(self) -> int:
        """How often it has struck."""
        return self._hits

    def meets(self, line: str, client: str | None) -> bool:
        """Whether it strikes this request; it has one time less then."""
        if self.times == 0 or self.client not in (None, client) or not re.search(self.match, line):
            return False
        if self.probability < 1.0 and self._random.random() >= self.probability:
            return False
        self._hits += 1
        if self.times is not None:
            self.times -= 1
        return True


class S3FaultProxy:
    """url: where a client without a port of its own goes. requests: ``METHOD /bucket/key?query`` of each."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname is not None
        assert parts.port is not None
        self._upstream = (parts.hostname, parts.port)
        self._faults: list[Fault] = []
        self._ports: dict[str, int] = {}
        self._blocked: dict[str | None, Literal["reset", "silent"]] = {}
        self._open: set[_Connection] = set()
        self._servers: list[asyncio.Server] = []
        self._lock = threading.RLock()
        # Not held by the event loop's thread, which opens the ports.
        self._opening = threading.Lock()
        self.requests: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="s3-proxy", daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._listen(None)}"

    def port_for(self, name: str) -> int:
        """The port of the client `name`, opened at the first call."""
        with self._opening:
            if name not in self._ports:
                self._ports[name] = self._listen(name)
            return self._ports[name]

    def url_for(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port_for(name)}"

    def add(self, kind: str, **fields: Any) -> Fault:
        """Order a fault. Raises pydantic's ValidationError."""
        fault = Fault.model_validate({"kind": kind, **fields})
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """No more faults. Clients that are cut off stay so."""
        with self._lock:
            self._faults.clear()

    def block(self, name: str | None, how: Literal["reset", "silent"] = "reset") -> None:
        """Cut a client off (None: those without a port of their own): what it has open ends, what it tries
        is reset or never answered."""
        with self._lock:
            self._blocked[name] = how
            mine = [connection for connection in self._open if connection.client == name]
        for connection in mine:
            self._loop.call_soon_threadsafe(connection.cut, how)

    def unblock(self, name: str | None) -> None:
        with self._lock:
            self._blocked.pop(name, None)

    def close(self) -> None:
        with self._lock:
            self._blocked.clear()
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    # -- used by the connections -------------------------------------------------------------------

    def fault_for(self, line: str, client: str | None) -> Fault | None:
        with self._lock:
            self.requests.append(line)
            return next((fault for fault in self._faults if fault.meets(line, client)), None)

    def blocked(self, client: str | None) -> Literal["reset", "silent"] | None:
        with self._lock:
            return self._blocked.get(client)

    # -- the event loop's thread -------------------------------------------------------------------

    def _listen(self, name: str | None) -> int:
        async def listen() -> int:
            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                connection = _Connection(self, name, reader, writer)
                self._open.add(connection)
                try:
                    await connection.run(*self._upstream)
                finally:
                    self._open.discard(connection)

            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            self._servers.append(server)
            return int(server.sockets[0].getsockname()[1])

        return asyncio.run_coroutine_threadsafe(listen(), self._loop).result(timeout=10)

    async def _cancel_all(self) -> None:
        for server in self._servers:
            server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    """One client's connection, and the one to the server that belongs to it."""

    def __init__(
        self,
        proxy: S3FaultProxy,
        client: str | None,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.client = client
        self._proxy = proxy
        self._reader, self._writer = reader, writer
        self._task = asyncio.current_task()

    def cut(self, how: Literal["reset", "silent"]) -> None:
        if how == "reset":
            self._reset()
        assert self._task is not None
        self._task.cancel()

    async def run(self, host: str, port: int) -> None:
        try:
            if self._proxy.blocked(self.client) is None:
                await self._serve(host, port)
        except (OSError, h11.ProtocolError, asyncio.IncompleteReadError):
            self._reset()
        except asyncio.CancelledError:
            # Cut off, or the proxy closes.
            pass
        if self._proxy.blocked(self.client) == "silent":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        if self._proxy.blocked(self.client) is not None:
            self._reset()
        self._writer.close()

    async def _serve(self, host: str, port: int) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(host, port)
        try:
            down, up = h11.Connection(h11.SERVER), h11.Connection(h11.CLIENT)
            while await self._exchange(down, up, upstream_reader, upstream_writer):
                down.start_next_cycle()
                up.start_next_cycle()
        finally:
            upstream_writer.close()

    async def _exchange(
        self,
        down: h11.Connection,
        up: h11.Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; whether another may follow."""
        request = await _next(down, self._reader)
        if not isinstance(request, h11.Request):
            return False
        line = f"{request.method.decode()} {request.target.decode()}"
        fault = self._proxy.fault_for(line, self.client)
        if fault is not None and fault.kind == "reset":
            self._reset()
            return False
        if fault is not None and fault.kind == "status":
            await self._refuse(down, fault.status)
            return False
        if down.they_are_waiting_for_100_continue:
            await self._send(down, h11.InformationalResponse(status_code=100, headers=[]))
        headers = [(name, value) for name, value in request.headers.raw_items() if name.lower() != b"expect"]
        writer.write(
            up.send(h11.Request(method=request.method, target=request.target, headers=headers)) or b""
        )
        while True:
            event = await _next(down, self._reader)
            writer.write(up.send(event) or b"")
            await writer.drain()
            if isinstance(event, h11.EndOfMessage):
                break
        return await self._answer(down, up, reader, fault)

    async def _answer(
        self, down: h11.Connection, up: h11.Connection, reader: asyncio.StreamReader, fault: Fault | None
    ) -> bool:
        response = await _next(up, reader)
        while isinstance(response, h11.InformationalResponse):
            response = await _next(up, reader)
        if not isinstance(response, h11.Response):
            raise ConnectionResetError("the S3 server closed the connection")
        if fault is not None and fault.kind == "lost_answer":
            self._reset()
            return False
        if fault is not None and fault.kind == "slow":
            await asyncio.sleep(fault.seconds)
        left = None
        if fault is not None and fault.kind == "truncate":
            length = dict(response.headers).get(b"content-length", b"0")
            left = int(length) // 2
        passed = h11.Response(
            status_code=response.status_code,
            headers=response.headers.raw_items(),
            reason=response.reason,
        )
        await self._send(down, passed)
        while True:
            event = await _next(up, reader)
            if isinstance(event, h11.Data) and left is not None:
                event = h11.Data(data=bytes(event.data[:left]))
                left -= len(event.data)
                if left == 0:
                    await self._send(down, event)
                    return False
            await self._send(down, event)
            if isinstance(event, h11.EndOfMessage):
                return down.our_state is h11.DONE and up.our_state is up.their_state is h11.DONE

    async def _refuse(self, down: h11.Connection, status: int) -> None:
        phrase = HTTPStatus(status).phrase
        code = _CODES.get(status, phrase.replace(" ", ""))
        body = f"<Error><Code>{code}</Code><Message>{phrase}</Message></Error>"
        headers = [
            ("Content-Type", "application/xml"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        await self._send(down, h11.Response(status_code=status, headers=headers, reason=phrase.encode()))
        await self._send(down, h11.Data(data=body.encode()))
        await self._send(down, h11.EndOfMessage())

    async def _send(self, down: h11.Connection, event: h11.Event) -> None:
        data = down.send(event)
        if data:
            self._writer.write(data)
            await self._writer.drain()

    def _reset(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._writer.transport.abort()


async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Event:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(_CHUNK))
    if isinstance(event, type):  # PAUSED: the other side is to speak first
        raise h11.RemoteProtocolError("the client speaks out of turn")
    return event


@contextlib.contextmanager
def proxy(upstream: str) -> Iterator[S3FaultProxy]:
    """Run a proxy to the S3 server at `upstream` until the block ends."""
    running = S3FaultProxy(upstream)
    try:
        yield running
    finally:
        running.close()
