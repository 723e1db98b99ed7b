"""An S3 server on loopback (moto) with the faults of real ones.

    with s3_server() as server:
        url = server.put("books/a.txt", b"some text")
        server.fault = lambda seen: Fault(status=503) if "a.txt" in seen else None
        open_corpus(url)
        assert server.gets["a.txt"] == 1

`server.heal()` ends the faults and resets the counters.
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

from lit_gptdata import _fsspec

CODES = {403: "InvalidAccessKeyId", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}
TIMEOUT_S = 60.0  # before a waiting answer fails


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The fault of one answer."""

    status: int | None = None  # of the answer: 403, 404, 500 or 503
    cut: int | None = None  # bytes of the body before the connection breaks
    flip: bool = False  # whether the first byte of the body is changed
    wait: threading.Event | None = None  # the answer waits for this event


def in_turn(faults: Mapping[str, Iterable[Fault | None]]) -> Callable[[str], Fault | None]:
    """Faults of the first GETs of objects, by the last part of their names; later GETs succeed."""
    remaining = {name: iter(of_object) for name, of_object in faults.items()}

    def fault(seen: str) -> Fault | None:
        name = object_name(seen) if seen.startswith("GET") else ""
        return next(remaining.get(name, iter(())), None)

    return fault


def object_name(seen: str) -> str:
    """The last part of an object's name, or "" for a request about a bucket."""
    key = seen.split()[1].partition("?")[0].lstrip("/").partition("/")[2]
    return key.rpartition("/")[2]


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server that s3fs uses, also in child processes; retries wait for 10 ms only."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in {**server.environ, "NO_PROXY": "127.0.0.1"}.items():
            patch.setenv(name, value)
        patch.setattr(_fsspec, "BACKOFF_S", 0.01)
        patch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
        forget_clients()
        yield server
        forget_clients()


def forget_clients() -> None:
    """Make the next s3fs read the environment again."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


class S3Server:
    """A new server with one new bucket; a context manager."""

    def __init__(self) -> None:
        self.bucket = f"bucket-{uuid4().hex[:8]}"
        self.requests: list[str] = []  # every GET and HEAD: "GET /bucket/books/a.txt bytes=0-99"
        self.gets: Counter[str] = Counter()  # GETs of objects, by the last part of their names
        self.puts: Counter[str] = Counter()  # PUTs of objects or of parts of an object, in the same way
        self._lock = threading.Lock()
        self.heal()

    def heal(self) -> None:
        """End all faults and reset the counters."""
        # the fault of the answer to one of `requests`, and to a PUT, where only the status is used
        self.fault: Callable[[str], Fault | None] = lambda seen: None
        self.put_fault: Callable[[str], Fault | None] = lambda seen: None
        self.forget()

    def forget(self) -> None:
        """Reset the counters."""
        for counter in (self.requests, self.gets, self.puts):
            counter.clear()

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
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables that make botocore use this server, without its own slow retries."""
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
        self._send("DELETE", key)

    def _send(self, method: str, key: str, body: bytes = b"") -> None:
        signed = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"  # enough for moto
        headers = {"Authorization": signed, "x-amz-acl": "public-read"}
        address = f"{self.endpoint}/{self.bucket}/{key}"
        requests.request(method, address, data=body, headers=headers, timeout=60).raise_for_status()

    def note(self, seen: str) -> None:
        method, name = seen.split()[0], object_name(seen)
        with self._lock:
            if method in ("GET", "HEAD"):
                self.requests.append(seen)
            if name and method == "GET":
                self.gets[name] += 1
            if name and method == "PUT":
                self.puts[name] += 1

    def asked(self, text: str) -> list[str]:
        """The requests that contain `text`."""
        return [request for request in self.requests if text in request]


class _Faulty:
    """A WSGI application around moto's that adds the faults."""

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
            assert fault.wait.wait(TIMEOUT_S)
        if fault.status is not None:
            code, message = CODES[fault.status], HTTPStatus(fault.status).phrase
            error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            body = [error.encode()] if method != "HEAD" else []
            if method == "PUT":  # otherwise the client sees a broken connection
                environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            headers = [("Content-Type", "text/xml"), ("Content-Length", str(len(b"".join(body))))]
            start_response(f"{fault.status} So", headers)
            return body
        answer = self.app(environ, start_response)
        if fault.flip:
            body = b"".join(answer)
            answer = [bytes([body[0] ^ 1]) + body[1:]]
        return answer if fault.cut is None else _cut(answer, fault.cut)


def _cut(answer: Iterable[bytes], cut: int) -> Iterator[bytes]:
    yield b"".join(answer)[:cut]
    raise ConnectionAbortedError("the client sees the end of the stream")


class _Quiet(WSGIRequestHandler):
    """One connection per request, without a log."""

    def log(self, type: str, message: str, *args: object) -> None:
        pass
