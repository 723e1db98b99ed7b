"""A web server on loopback with the faults of real ones.

    with FileServer(b"some text") as server:
        fetch(server.url, path)
        assert [request.headers["Range"] for request in server.requests] == [None]

Its attributes may change while it runs. Each request takes one item of `cuts` and of `statuses`:
`cuts=[100]` cuts the first body after 100 bytes, `statuses=itertools.repeat(500)` always fails.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TIMEOUT_S = 120.0  # before a test that waits fails, on a busy machine


@dataclass(frozen=True)
class Request:
    """One request: its path with the query, and its headers; a missing header is None."""

    path: str
    headers: Message


@dataclass(eq=False)
class FileServer:
    """Serves `body` at every path, or `body[path]` if it is a mapping; a context manager."""

    body: bytes | Mapping[str, bytes] = b""
    _: KW_ONLY
    content_type: str | None = "text/plain; charset=utf-8"
    etag: str | None = '"v1"'
    last_modified: str | None = None
    ranges: bool = True  # False: every answer is a 200 with the whole body
    if_range: bool = True  # False: a Range is answered without a look at If-Range
    content_range: str | None = None  # sent with a 206 instead of the correct one
    compress: bool = False  # gzip, although no client asked for it
    length: bool = True  # False: chunked, without Content-Length
    cuts: Iterable[int | None] = ()  # bytes after which a body ends; None: the whole body
    statuses: Iterable[int] = ()  # of the answers; the body comes with 200 only
    headers: Mapping[str, str] = field(default_factory=dict)  # added to every answer
    before: Callable[[FileServer], object] | None = None  # called for each request
    hold_after: int | None = None  # body bytes after which to wait for `release`
    release: threading.Event = field(default_factory=threading.Event, init=False)
    requests: list[Request] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.cuts, self.statuses = iter(self.cuts), iter(self.statuses)

    def __enter__(self) -> FileServer:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.files = self
        # a short poll interval: shutdown() waits for a poll, and a test run starts hundreds of servers
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.005,))
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The address of /book.txt."""
        return self.address("/book.txt")

    def address(self, path: str) -> str:
        """The URL of a path, which starts with a slash and may have a query string."""
        return f"http://127.0.0.1:{self._server.server_port}{path}"


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close() joins them, so no thread outlives its test
    files: FileServer

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connections: set[socket.socket] = set()

    def hang_up(self) -> None:
        """Close the connections that clients keep alive: server_close() would wait for them."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: tests kill clients."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT_S
    disable_nagle_algorithm = True  # otherwise a kept-alive connection waits 40 ms per answer
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        files = self.server.files
        files.requests.append(Request(self.path, self.headers))
        if files.before:
            files.before(files)
        status = next(files.statuses, 200)
        body = files.body
        if isinstance(body, Mapping):
            found = body.get(self.path.partition("?")[0])
            body, status = (b"", 404) if found is None else (found, status)
        if status == 200:
            self._answer(files, body)
        else:
            self._send(status, {**files.headers, "Content-Type": "text/plain"}, b"no text for you")

    def _answer(self, files: FileServer, whole: bytes) -> None:
        values = {
            **files.headers,
            "Content-Type": files.content_type,
            "ETag": files.etag,
            "Last-Modified": files.last_modified,
        }
        headers = {name: value for name, value in values.items() if value is not None}
        status, body = 200, whole
        first = self._first_byte(files)
        if first is not None and first >= len(whole):
            return self._send(416, {"Content-Range": f"bytes */{len(whole)}"}, b"")
        if first is not None:
            span = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
            headers["Content-Range"] = files.content_range or span
            status, body = 206, whole[first:]
        if files.compress:
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body)
        self._send(status, headers, body, next(files.cuts, None))

    def _first_byte(self, files: FileServer) -> int | None:
        """The first byte of a Range that is answered; None: the whole body is sent."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        wanted = self.headers.get("If-Range")
        fresh = wanted is None or wanted in (files.etag, files.last_modified)
        if match is None or not files.ranges or (files.if_range and not fresh):
            return None
        return int(match[1])

    def _send(
        self, status: int, headers: Mapping[str, str], body: bytes, cut: int | None = None
    ) -> None:
        files = self.server.files
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if files.length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = body if cut is None else body[:cut]
        if files.hold_after is not None:
            self._write(sent[: files.hold_after])
            assert files.release.wait(TIMEOUT_S)
            sent = sent[files.hold_after :]
        self._write(sent)
        if cut is not None:
            self.close_connection = True  # the client sees the end of the stream
        elif not files.length:
            self.wfile.write(b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        if data and not self.server.files.length:
            data = b"%x\r\n%s\r\n" % (len(data), data)
        self.wfile.write(data)
