"""A Hugging Face Hub on loopback with one dataset or model, and the part of its API that reads files.

with hub_server({"train/0.txt": b"some text"}) as hub:
    open_corpus("hf://datasets/me/books/train/")
    assert hub.tokens_seen == {None}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DATASET = "me/books"


class Hub(ThreadingHTTPServer):
    """A server of a repository's `files`; without its `token` (None: public) it is not found.

    `kind`: "datasets" | "models".
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes], kind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.kind = dict(files), kind
        self.commit = "a" * 40
        self.asked: list[str] = []
        self.token: str | None = None
        self.tokens_seen: set[str | None] = set()
        self.failures = 0  # the number of next answers that are a 503

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables that make huggingface_hub use this server."""
        address = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": address, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def entries(self, below: str, recursive: bool) -> list[dict[str, Any]]:
        """A listing of the files and folders below a folder."""
        found = {}
        for name in self.files:
            if below and not name.startswith(f"{below}/"):
                continue
            folders = name[len(below) :].strip("/").split("/")[:-1]
            for depth in range(1, len(folders) + 1):
                folder = "/".join([*([below] if below else []), *folders[:depth]])
                if depth == 1 or recursive:
                    found[folder] = self.entry(folder)
            if recursive or not folders:
                found[name] = self.entry(name)
        return list(found.values())

    def entry(self, name: str) -> dict[str, Any]:
        """A file, or a folder if no file has this name."""
        if name not in self.files:
            return {"type": "directory", "path": name, "oid": "1" * 40, "size": 0}
        content = self.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "oid": oid, "size": len(content)}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, asked = self.server, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub.tokens_seen.add(token)
        path = unquote(asked.path)
        hub.asked.append(path)
        if hub.failures:
            hub.failures -= 1
            self.answer(503)
        elif DATASET not in path or token != hub.token:
            self.answer(401, code="RepoNotFound")
        elif re.fullmatch(f"/api/datasets/{DATASET}(/revision/main)?", path):
            self.answer(200, json.dumps({"id": DATASET, "sha": "0" * 40}).encode())
        elif found := re.fullmatch(f"/api/[a-z]+/{DATASET}/tree/[0-9a-z]+/?(.*)", path):
            recursive = parse_qs(asked.query).get("recursive") == ["true"]
            if entries := hub.entries(found[1], recursive):
                self.answer(200, json.dumps(entries).encode())
            else:
                self.answer(404, code="EntryNotFound")
        elif path == f"/api/datasets/{DATASET}/paths-info/main":
            names = parse_qs(body.decode())["paths"]
            self.answer(200, json.dumps([hub.entry(name) for name in names]).encode())
        elif re.fullmatch(f"/api/models/{DATASET}/revision/(main|[0-9a-f]{{40}})", path):
            commit = path.rpartition("/")[2].replace("main", hub.commit)
            siblings = [{"rfilename": name} for name in hub.files]
            info = {"id": DATASET, "sha": commit, "siblings": siblings}
            self.answer(200, json.dumps(info).encode())
        elif found := re.fullmatch(f"/{DATASET}/resolve/(main|[0-9a-f]{{40}})/(.*)", path):
            commit = found[1].replace("main", hub.commit)
            if (content := hub.files.get(found[2])) is None:
                self.answer(404, code="EntryNotFound", commit=commit)
            else:
                self.answer(200, content, commit=commit)
        elif found := re.fullmatch(f"/datasets/{DATASET}/resolve/main/(.*)", path):
            first, last = map(int, re.findall("[0-9]+", self.headers["Range"]))
            self.answer(206, hub.files[found[1]][first : last + 1])
        else:
            self.answer(404)

    do_POST = do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes = b"{}", code: str = "", commit: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status >= 400 and code:
            self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def hub_server(files: Mapping[str, bytes], kind: str = "datasets") -> Iterator[Hub]:
    """A running server; a new process with `hub.environ` uses it."""
    with Hub(files, kind) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.005,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
