"""An S3 server on loopback (moto's) that can fail in every way a real one does.

    with s3_server() as server:
        url = server.put("books/a.txt", b"some text")
        server.fault = lambda seen: Fault(status=503) if "a.txt" in seen else None
        open_corpus(url)
        assert server.gets["a.txt"] == 1

What fails, and what was counted, is so until `server.heal()`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import requests
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from lit_gptdata import _fsspec as _remote

CODES = {403: "InvalidAccessKeyId", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}
PATIENCE_S = 60.0  # for what an answer waits for


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How an answer fails."""

    status: int | None = None
    """What is answered instead: 403, 404, 500 or 503."""

    cut: int | None = None
    """Bytes of the body after which the connection ends."""

    flip: bool = False
    """The first byte of the body is another."""

    wait: threading.Event | None = None
    """What the answer waits for."""


def in_turn(faults: Mapping[str, Iterable[Fault | None]]) -> Callable[[str], Fault | None]:
    """How the first GETs of objects fail, by the last part of their names; the rest do not."""
    left = {name: iter(its_own) for name, its_own in faults.items()}

    def fault(seen: str) -> Fault | None:
        name = object_name(seen) if seen.startswith("GET") else ""
        return next(left.get(name, iter(())), None)

    return fault


def object_name(seen: str) -> str:
    """The last part of an object's name, "" where a request is about a bucket."""
    key = seen.split()[1].partition("?")[0].lstrip("/").partition("/")[2]
    return key.rpartition("/")[2]


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server that s3fs is led to, in child processes too; a second attempt costs hardly any time."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in {**server.environ, "NO_PROXY": "127.0.0.1"}.items():
            patch.setenv(name, value)
        patch.setattr(_remote, "BACKOFF_S", 0.01)
        patch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
        forget_clients()
        yield server
        forget_clients()


def forget_clients() -> None:
    """Let the next s3fs look at the environment anew."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


class S3Server:
    """A fresh bucket on a server of its own; a context manager."""

    def __init__(self) -> None:
        self.bucket = f"bucket-{uuid4().hex[:8]}"
        self.requests: list[str] = []
        """Every GET and HEAD, such as "GET /bucket/books/a.txt bytes=0-99"."""

        self.gets: Counter[str] = Counter()
        """GETs of objects, by the last part of their names."""

        self.puts: Counter[str] = Counter()
        """The same for PUTs, or parts of one."""

        self._lock = threading.Lock()
        self.heal()

    def heal(self) -> None:
        """From now on nothing fails; forget what was asked."""
        self.fault: Callable[[str], Fault | None] = lambda seen: None
        """How the answer to one of `requests` fails, None: not at all."""

        self.put_fault: Callable[[str], Fault | None] = lambda seen: None
        """The same for PUTs, by the status alone."""

        self.forget()

    def forget(self) -> None:
        """Forget what was asked."""
        for kept in (self.requests, self.gets, self.puts):
            kept.clear()

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
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def put(self, key: str, body: bytes) -> str:
        """Store an object; returns its URL."""
        self._send("PUT", key, body)
        return f"{self.url}/{key}"

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._send("DELETE", key)

    def _send(self, method: str, key: str, body: bytes = b"") -> None:
        signed = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"  # enough for moto
        headers = {"Authorization": signed, "x-amz-acl": "public-read"}
        address = f"{self.endpoint}/{self.bucket}/{key}"
        requests.request(method, address, data=body, headers=headers, timeout=60).raise_for_status()

    def note(self, seen: str) -> None:
        """Keep what a request is."""
        method, name = seen.split()[0], object_name(seen)
        with self._lock:
            if method in ("GET", "HEAD"):
                self.requests.append(seen)
            if name and method == "GET":
                self.gets[name] += 1
            if name and method == "PUT":
                self.puts[name] += 1

    def asked(self, what: str) -> list[str]:
        """The requests that hold `what`."""
        return [request for request in self.requests if what in request]


class _Faulty:
    """WSGI around moto's own: it fails where it was told to."""

    def __init__(self, server: S3Server, app: Any) -> None:
        self.server, self.app = server, app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        server, method = self.server, environ["REQUEST_METHOD"]
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        seen = f"{method} {environ['PATH_INFO']}{query} {environ.get('HTTP_RANGE', '')}".strip()
        server.note(seen)
        if method not in ("GET", "HEAD", "PUT"):
            return self.app(environ, start_response)
        fault = (server.put_fault if method == "PUT" else server.fault)(seen) or Fault()
        if fault.wait is not None:
            assert fault.wait.wait(PATIENCE_S)
        if fault.status is not None:
            code, says = CODES[fault.status], HTTPStatus(fault.status).phrase
            error = f"<Error><Code>{code}</Code><Message>{says}</Message></Error>"
            body = [error.encode()] if method != "HEAD" else []
            if method == "PUT":  # else the client sees its connection broken
                environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            length = str(sum(map(len, body)))
            headers = [("Content-Type", "text/xml"), ("Content-Length", length)]
            start_response(f"{fault.status} So", headers)
            return body
        answer = self.app(environ, start_response)
        if fault.flip:
            whole = b"".join(answer)
            answer = [bytes([whole[0] ^ 1]) + whole[1:]]
        return answer if fault.cut is None else _cut(answer, fault.cut)


def _cut(answer: Iterable[bytes], cut: int) -> Iterator[bytes]:
    yield b"".join(answer)[:cut]
    raise ConnectionAbortedError("the client sees the end of the stream")


class _Quiet(WSGIRequestHandler):
    """One connection a request, and no log."""

    def log(self, type: str, message: str, *args: object) -> None:
        pass
