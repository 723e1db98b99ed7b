"""An S3 server on loopback (moto's) that can fail in every way a real one does.

    with S3Server() as server:
        url = server.put("books/a.txt", b"some text")
        server.fault = lambda seen: Fault(status=503) if "a.txt" in seen else None
        open_corpus(url)

`server.environ` is what leads botocore, and so s3fs, to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import requests
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

CODES = {403: "InvalidAccessKeyId", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How an answer fails."""

    status: int | None = None
    """What is answered instead: 403, 404, 500 or 503."""

    cut: int | None = None
    """Bytes of the body after which the connection ends."""


class S3Server:
    """A fresh bucket on a server of its own; a context manager."""

    def __init__(self) -> None:
        self.bucket = f"bucket-{uuid4().hex[:8]}"
        self.requests: list[str] = []
        self.heal()

    def heal(self) -> None:
        """From now on nothing fails; forget what was asked."""
        self.fault: Callable[[str], Fault | None] = lambda seen: None
        """How the answer to "GET /bucket/books/a.txt bytes=0-99" fails, None: not at all."""

        self.requests.clear()

    def __enter__(self) -> S3Server:
        app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, _Faulty(self, app), threaded=True, request_handler=_Quiet
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.005,))
        self._thread.start()
        self._send("PUT", "")
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """The server's own address, http://…"""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        """The bucket's address, s3://…"""
        return f"s3://{self.bucket}"

    @property
    def environ(self) -> dict[str, str]:
        """Variables that lead botocore here, and away from its own, slow, second attempts."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def put(self, key: str, body: bytes) -> str:
        """Store an object, whatever fails at the moment; returns its URL."""
        self._send("PUT", key, body)
        return f"{self.url}/{key}"

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._send("DELETE", key)

    def _send(self, method: str, key: str, body: bytes = b"") -> None:
        signed = (
            "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"  # enough for moto
        )
        headers = {"Authorization": signed, "x-amz-acl": "public-read"}
        address = f"{self.endpoint}/{self.bucket}/{key}"
        requests.request(method, address, data=body, headers=headers, timeout=60).raise_for_status()

    def asked(self, what: str) -> list[str]:
        """The requests that hold `what`."""
        return [request for request in self.requests if what in request]


class _Faulty:
    """WSGI around moto's own: it fails where it was told to."""

    def __init__(self, server: S3Server, app: Any) -> None:
        self.server, self.app = server, app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        server, method = self.server, environ["REQUEST_METHOD"]
        if method not in ("GET", "HEAD"):
            return self.app(environ, start_response)
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        seen = f"{method} {environ['PATH_INFO']}{query} {environ.get('HTTP_RANGE', '')}".strip()
        server.requests.append(seen)
        fault = server.fault(seen) or Fault()
        if fault.status is not None:
            error = (
                f"<Error><Code>{CODES[fault.status]}</Code><Message>no text for you</Message></Error>"
            )
            body = [error.encode()] if method == "GET" else []
            length = str(sum(map(len, body)))
            headers = [("Content-Type", "text/xml"), ("Content-Length", length)]
            start_response(f"{fault.status} So", headers)
            return body
        answer = self.app(environ, start_response)
        return answer if fault.cut is None else _cut(answer, fault.cut)


def _cut(answer: Iterable[bytes], cut: int) -> Iterator[bytes]:
    yield b"".join(answer)[:cut]
    raise ConnectionAbortedError("the client sees the end of the stream")


class _Quiet(WSGIRequestHandler):
    """One connection a request, and no log."""

    def log(self, type: str, message: str, *args: object) -> None:
        pass
