"""moto's S3 server on loopback, which can be made to misbehave as a real one does.

with S3Server() as s3:
    s3.use(monkeypatch)
    s3.faults["00003-000.bin"] = [500, "cut", None]   # the first GETs of that object; then as it should
    assert s3.gets["00003-000.bin"] == 3
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

BUCKET = "bucket"


class S3Server:
    """Serves one bucket; counts what is asked for by an object's last name.

    A fault is None, a status, "cut" (half of the body, then the end of the connection), "flip" (a wrong
    byte), or an Event that the answer waits for. `on_get` runs as each GET of an object comes in.
    """

    def __init__(self) -> None:
        self.gets: Counter[str] = Counter()
        self.puts: Counter[str] = Counter()
        self.others = 0  # HEADs, listings
        self.faults: dict[str, list[Any]] = {}
        self.on_get: Callable[[str], object] = lambda name: None
        self._lock = threading.Lock()

    def __enter__(self) -> S3Server:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log_request(self, *args: object) -> None:
                pass

        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, True, request_handler=Quiet)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.005,))
        self._thread.start()
        self.forget()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.forget()

    @property
    def environment(self) -> dict[str, str]:
        """What lets any S3 client find the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # ours are tested, not botocore's
        }

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Point this process and its children here, with nothing counted yet."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        fs = self.file_system()
        if not fs.exists(BUCKET):
            fs.mkdir(BUCKET)
        for counted in (self.gets, self.puts, self.faults):
            counted.clear()
        self.others, self.on_get = 0, lambda name: None

    def file_system(self) -> Any:
        """An s3fs for the environment of when the first one was made, or since `forget`."""
        import s3fs

        return s3fs.S3FileSystem()

    def forget(self) -> None:
        """Let the next s3fs look at the environment anew."""
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, name = environ["REQUEST_METHOD"], environ["PATH_INFO"].rpartition("/")[2]
        is_object = environ["PATH_INFO"].count("/") > 2
        fault = None
        with self._lock:
            if method == "GET" and is_object:
                self.gets[name] += 1
                faults = self.faults.get(name, [])
                fault = faults.pop(0) if faults else None
            elif method == "PUT" and is_object:
                self.puts[name] += 1
            else:
                self.others += 1
        if method == "GET" and is_object:
            self.on_get(name)
        if isinstance(fault, int):
            start_response(f"{fault} Fault", [("Content-Type", "text/plain"), ("Content-Length", "2")])
            return [b"no"]
        if isinstance(fault, threading.Event):
            assert fault.wait(60)
        body = self._moto(environ, start_response)
        if fault == "flip":
            whole = b"".join(body)
            return [bytes([whole[0] ^ 1]) + whole[1:]]
        return _half(b"".join(body)) if fault == "cut" else body


def _half(body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    raise ConnectionAbortedError  # the server hangs up, and says nothing
