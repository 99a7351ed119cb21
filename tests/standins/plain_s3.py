"""An S3 service of the simplest kind: one bucket in memory, no signatures checked, no conditional puts.

It stands for services that ignore ``If-Match`` and ``If-None-Match``, or refuse them; and it answers
with whatever error a test orders.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "plain"


class PlainS3:
    """objects: what it holds. refuses: whether a conditional put is answered with 501. error: (status,
    code) of the answer to every request, where one is ordered. requests: ``METHOD /bucket/key`` of each."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.refuses = False
        self.error: tuple[int, str] | None = None
        self.requests: list[str] = []
        self.endpoint = ""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def _handler(service: PlainS3) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self._is_refused():
                return
            if service.refuses and (self.headers.get("If-Match") or self.headers.get("If-None-Match")):
                self._fail(501, "NotImplemented")
                return
            service.objects[self._key()] = body
            self._answer(200, b"", {"ETag": _etag(body)})

        def do_GET(self) -> None:
            if self._is_refused():
                return
            if not self._key():
                self._list()
                return
            body = service.objects.get(self._key())
            if body is None:
                self._fail(404, "NoSuchKey")
                return
            self._answer(200, body, {"ETag": _etag(body)})

        do_HEAD = do_GET

        def do_DELETE(self) -> None:
            if not self._is_refused():
                service.objects.pop(self._key(), None)
                self._answer(204, b"")

        def _list(self) -> None:
            prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
            rows = "".join(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(body)}</Size>"
                f"<ETag>{escape(_etag(body))}</ETag></Contents>"
                for key, body in sorted(service.objects.items())
                if key.startswith(prefix)
            )
            text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
            self._answer(200, text.encode(), {"Content-Type": "application/xml"})

        def _key(self) -> str:
            return unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}").lstrip("/")

        def _is_refused(self) -> bool:
            service.requests.append(f"{self.command} {self.path}")
            if service.error:
                self._fail(*service.error)
            return service.error is not None

        def _fail(self, status: int, code: str) -> None:
            body = f"<Error><Code>{code}</Code><Message>as ordered</Message></Error>"
            self._answer(status, body.encode(), {"Content-Type": "application/xml"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                if status != 204 or name != "Content-Length":
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


@contextlib.contextmanager
def serve() -> Iterator[PlainS3]:
    """Serve until the block ends."""
    service = PlainS3()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(service))
    server.daemon_threads = True
    service.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, name="plain-s3", daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
