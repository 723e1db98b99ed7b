"""Downloads over loopback: whatever happens, the file is whole, right, or not there."""

from __future__ import annotations

import email.utils
import errno
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import requests
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gptdata.text import download
from lit_gptdata.text.download import DownloadError
from tests.http_server import PATIENCE_S, FileServer

ROOT = Path(__file__).parents[2]
OLD_DATE = "Mon, 02 Jan 2006 15:04:05 GMT"


def text(n: int, seed: int = 0) -> bytes:
    """n bytes that tell their position and their version, so that any mix shows."""
    line = b"version %d line %06d\n"
    return b"".join(line % (seed, i) for i in range(n // 20 + 1))[:n]


BODY = text(300_000)


def fetch(url: str, path: Path | str, sha256: str | None = None, **kwargs: Any) -> Path:
    return download.fetch(url, path, sha256, **{"backoff_s": 0.001, **kwargs})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "downloads" / "book.txt"


@pytest.fixture
def refused_url() -> Iterator[str]:
    """An address where nothing listens: bound, so that nobody else takes it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/book.txt"


def left(path: Path) -> list[str]:
    """What lies in the folder besides the lock file."""
    return sorted(p.name for p in path.parent.iterdir() if p.suffix != ".lock")


def ranges(server: FileServer) -> list[str | None]:
    return [seen.headers["Range"] for seen in server.requests]


def from_now(seconds: float) -> str:
    """An HTTP date; made in a test, since what stands in its parameters is of its collection."""
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


def interrupt(path: Path, server: FileServer, size: int) -> None:
    """Leave `size` bytes in the .part, as a connection does that breaks once and for all."""
    server.cuts = iter([size])
    with pytest.raises(DownloadError):
        fetch(server.url, path, attempts=1)
    server.requests.clear()


def run(code: str, *args: object, **kwargs: Any) -> subprocess.Popen[str]:
    """A Python process with `fetch` imported and `args` in sys.argv[1:]."""
    code = f"import sys\nfrom lit_gptdata.text.download import fetch, DownloadError\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- the good case


def test_downloads_once_and_leaves_nothing_else(path: Path) -> None:
    with FileServer(BODY) as server:
        assert fetch(server.url, path) == path
        assert path.read_bytes() == BODY
        assert left(path) == ["book.txt"]
        assert fetch(server.url, str(path)) == path
        assert len(server.requests) == 1
        assert server.requests[0].headers["Accept-Encoding"] == "identity"


def test_a_file_that_is_there_needs_no_network(path: Path, refused_url: str) -> None:
    path.parent.mkdir()
    path.write_bytes(b"mine")
    assert fetch(refused_url, path) == path
    assert fetch(refused_url, path, hashlib.sha256(b"mine").hexdigest().upper()) == path
    assert path.read_bytes() == b"mine"
    assert left(path) == ["book.txt"]


@pytest.mark.parametrize("options", [{"compress": True}, {"length": False}, {"etag": None}])
def test_whole_bytes_however_they_are_sent(path: Path, options: dict[str, Any]) -> None:
    with FileServer(BODY, **options) as server:
        fetch(server.url, path)
    assert path.read_bytes() == BODY


def test_progress_on_a_terminal_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(StringIO):
        terminal = False

        def isatty(self) -> bool:
            return self.terminal

    monkeypatch.setattr(sys, "stderr", stderr := Terminal())
    with FileServer(BODY) as server:
        fetch(server.url, path)
        assert stderr.getvalue() == ""
        path.unlink()
        stderr.terminal = True
        fetch(server.url, path)
    assert "book.txt: 100%" in stderr.getvalue()
    assert "300k/300k" in stderr.getvalue()


def test_imports_neither_torch_nor_lightning() -> None:
    assert finish(run("print({'torch', 'lightning'} & set(sys.modules))")) == "set()\n"


# --- retries


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_busy_server_is_asked_again(path: Path, status: int, caplog: pytest.LogCaptureFixture) -> None:
    with FileServer(BODY, statuses=[status, status]) as server:
        fetch(server.url, path)
        assert len(server.requests) == 3
    assert path.read_bytes() == BODY
    assert f"HTTP {status}" in caplog.text
    assert "attempt 2 of 5 without progress" in caplog.text


@pytest.mark.parametrize("status", [204, 304, 400, 401, 403, 404, 410])
def test_other_statuses_fail_at_once(path: Path, status: int) -> None:
    with FileServer(BODY, statuses=itertools.repeat(status)) as server:
        with pytest.raises(DownloadError) as info:
            fetch(server.url, path)
        message = str(info.value)
        assert message.startswith(f"{server.url}: the server answered HTTP {status}")
        assert message.endswith(
            f"expected 200. Check the address in a browser, or put the file at {path} by hand"
        )
        assert len(server.requests) == 1
    assert left(path) == []


def test_500_for_ever(path: Path) -> None:
    with FileServer(BODY, statuses=itertools.repeat(500)) as server:
        with pytest.raises(DownloadError) as info:
            fetch(server.url, path)
        assert str(info.value) == (
            f"{server.url}: the server answered HTTP 500 Internal Server Error, expected 200 "
            "(attempt 5 of 5 without progress). Run the same command again later, or put the file "
            f"at {path} by hand"
        )
        assert len(server.requests) == 5
    assert left(path) == []


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7),
        ("86400", download.RETRY_AFTER_CAP_S, download.RETRY_AFTER_CAP_S),
        (3600, 60, 60),  # as a date
        (-3600, 0, 0.001),
        ("soon", 0, 0.001),
    ],
)
def test_retry_after(
    path: Path, value: str | int, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(value, int):
        value = from_now(value)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with FileServer(BODY, statuses=[429], headers={"Retry-After": value}) as server:
        fetch(server.url, path)
    assert len(waits) == 1
    assert low <= waits[0] <= high
    assert path.read_bytes() == BODY


def test_backoff_doubles_with_jitter_and_stays_below_ten_seconds(
    path: Path, refused_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(DownloadError):
        download.fetch(refused_url, path)
    assert len(waits) == download.ATTEMPTS - 1
    for i, wait in enumerate(waits):
        assert download.BACKOFF_S * 2**i / 2 <= wait <= download.BACKOFF_S * 2**i
    assert sum(download.BACKOFF_S * 2**i for i in range(len(waits))) < 10


def test_a_server_that_never_answers(path: Path) -> None:
    with FileServer(BODY, before=lambda files: files.release.wait(PATIENCE_S)) as server:
        with pytest.raises(DownloadError, match=r"no answer, expected one within 0\.05 s") as info:
            fetch(server.url, path, attempts=2, timeout_s=(5, 0.05))
        assert len(server.requests) == 2
    assert "Run the same command again later" in str(info.value)
    assert left(path) == []


def test_a_server_that_falls_silent_is_asked_for_the_rest(path: Path) -> None:
    with FileServer(BODY, hold_after=200_000) as server:

        def only_once(files: FileServer) -> None:
            files.hold_after = 200_000 if len(files.requests) == 1 else None

        server.before = only_once
        fetch(server.url, path, timeout_s=(5, 0.5))
        assert ranges(server) == [None, f"bytes={3 * download.CHUNK_BYTES - 1}-"]
    assert path.read_bytes() == BODY


# --- no network


def test_no_network(path: Path, refused_url: str) -> None:
    with pytest.raises(DownloadError) as info:
        fetch(refused_url, path, attempts=2)
    message = str(info.value)
    assert message.startswith(f"{refused_url}: cannot be reached: ")
    assert "Connection refused" in message
    assert message.endswith(
        "(attempt 2 of 2 without progress). Check the network, the proxy and the address and run "
        'the same command again, or use data=sample (corpus="sample"), which needs no network, '
        f"or put the file at {path} by hand"
    )
    assert left(path) == []


def test_no_name_server(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(DownloadError, match="Temporary failure in name resolution") as info:
        fetch("http://books.example/book.txt", path, attempts=2)
    assert "data=sample" in str(info.value)


def test_an_unreachable_host_is_given_up_after_a_while(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where packets are dropped, each attempt costs the whole connect timeout."""
    asked = []

    def drop(*args: object, **kwargs: object) -> None:
        asked.append(1)
        time.sleep(0.02)
        raise requests.ConnectTimeout("timed out")

    monkeypatch.setattr(requests.Session, "get", drop)
    monkeypatch.setattr(download, "UNREACHABLE_S", 0.03)
    with pytest.raises(DownloadError, match=r"timed out .* data=sample"):
        fetch("http://127.0.0.1/book.txt", path, attempts=10, backoff_s=0)
    assert len(asked) <= 2


def test_a_host_that_answered_once_is_not_given_up_so_soon(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, calls = requests.Session.get, itertools.count()

    def gone_at_the_second_call(*args: Any, **kwargs: Any) -> requests.Response:
        if next(calls) == 1:
            raise requests.ConnectionError("gone")
        return get(*args, **kwargs)

    monkeypatch.setattr(requests.Session, "get", gone_at_the_second_call)
    monkeypatch.setattr(download, "UNREACHABLE_S", 0)
    with FileServer(BODY, statuses=[500]) as server:
        fetch(server.url, path)
        assert len(server.requests) == 2
    assert path.read_bytes() == BODY


# --- resume


@pytest.mark.parametrize(
    ("options", "validator"),
    [
        ({}, '"v1"'),
        ({"etag": None, "last_modified": OLD_DATE}, OLD_DATE),
        ({"last_modified": OLD_DATE}, '"v1"'),
    ],
)
def test_resumes_what_an_earlier_run_left(path: Path, options: dict[str, Any], validator: str) -> None:
    with FileServer(BODY, **options) as server:
        interrupt(path, server, 200_000)
        assert left(path) == ["book.txt.part", "book.txt.part.json"]
        assert path.with_name("book.txt.part").read_bytes() == BODY[:200_000]
        fetch(server.url, path, hashlib.sha256(BODY).hexdigest())
        assert ranges(server) == ["bytes=199999-"]
        assert server.requests[0].headers["If-Range"] == validator
    assert path.read_bytes() == BODY
    assert left(path) == ["book.txt"]


@pytest.mark.parametrize(
    "options",
    [
        {"etag": 'W/"v1"'},
        {"etag": 'W/"v1"', "last_modified": OLD_DATE},
        {"etag": None},
        {"etag": None, "last_modified": 60},  # seconds from now
        {"etag": None, "last_modified": "yesterday"},
        {"compress": True},
    ],
)
def test_without_a_strong_validator_nothing_is_kept(path: Path, options: dict[str, Any]) -> None:
    if isinstance(options.get("last_modified"), int):
        options = options | {"last_modified": from_now(options["last_modified"])}
    with FileServer(BODY, **options) as server:
        interrupt(path, server, 500)
        assert left(path) == []
        fetch(server.url, path)
        assert ranges(server) == [None]
    assert path.read_bytes() == BODY


@pytest.mark.parametrize(
    ("change", "requests_made"),
    [
        ({"ranges": False}, 1),  # 200 to a Range
        ({"body": text(300_000, seed=2), "etag": '"v2"'}, 1),  # 200: If-Range does not hold
        ({"body": text(1000, seed=2), "etag": '"v2"', "if_range": False}, 2),  # 416
        ({"body": text(300_000, seed=2), "etag": '"v2"', "if_range": False}, 2),  # 206 of another
        ({"body": text(300_000, seed=2), "etag": 'W/"v2"', "if_range": False}, 2),
        ({"body": text(300_000, seed=2), "etag": None, "if_range": False}, 2),
        ({"content_range": "bytes 0-299999/300000"}, 2),
        ({"content_range": "bytes 199998-299999/300000"}, 2),
        ({"content_range": "bytes 199999-299999/*"}, 2),
        ({"content_range": "bytes 199999-250000/300000"}, 2),
        ({"content_range": "199999"}, 2),
        ({"compress": True, "if_range": False}, 2),
    ],
)
def test_a_clean_restart_where_the_server_does_not_go_on(
    path: Path, change: dict[str, Any], requests_made: int
) -> None:
    with FileServer(BODY) as server:
        interrupt(path, server, 200_000)
        for name, value in change.items():
            setattr(server, name, value)
        fetch(server.url, path)
        assert ranges(server) == ["bytes=199999-", None][:requests_made]
        assert path.read_bytes() == server.body
    assert left(path) == ["book.txt"]


def test_another_address_does_not_go_on(path: Path) -> None:
    with FileServer(BODY) as server:
        interrupt(path, server, 200_000)
        server.body = text(300_000, seed=2)  # under the same ETag
        fetch(server.address("/other.txt"), path)
        assert ranges(server) == [None]
        assert path.read_bytes() == server.body


def test_a_note_does_not_outlive_its_version(path: Path) -> None:
    """Version 1, then a version 2 without validator, then version 1 again: nothing of 2 is kept."""
    with FileServer(BODY) as server:
        interrupt(path, server, 1000)
        server.body, server.etag = text(300_000, seed=2), None
        interrupt(path, server, 200_000)
        assert left(path) == []
        server.body, server.etag = BODY, '"v1"'
        fetch(server.url, path)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("size", [1, 299_999, 300_000])
def test_a_part_that_is_whole_or_nearly(path: Path, size: int) -> None:
    """A kill between the last byte and the rename: 100 GB are not downloaded again."""
    with FileServer(BODY) as server:
        interrupt(path, server, 1)
        path.with_name("book.txt.part").write_bytes(BODY[:size])
        fetch(server.url, path)
        assert ranges(server) == [f"bytes={size - 1}-" if size > 1 else None]
    assert path.read_bytes() == BODY


def test_a_part_longer_than_the_file(path: Path) -> None:
    with FileServer(BODY) as server:
        interrupt(path, server, 1)
        path.with_name("book.txt.part").write_bytes(BODY + b"more")
        fetch(server.url, path)
        assert ranges(server) == ["bytes=300003-", None]
    assert path.read_bytes() == BODY


def test_a_torn_or_foreign_note_is_worth_nothing(path: Path) -> None:
    with FileServer(BODY) as server:
        interrupt(path, server, 1000)
        part, note = path.with_name("book.txt.part"), path.with_name("book.txt.part.json")
        whole = note.read_bytes()
        foreign = [b"[]", b"null", b"1", b"\xff", b'{"validator": "x"}', b'{"url_sha256": "x"}']
        for junk in [*(whole[:n] for n in range(0, len(whole), 9)), whole[:-1], *foreign]:
            part.write_bytes(b"junk" * 250)
            note.write_bytes(junk)
            fetch(server.url, path)
            assert path.read_bytes() == BODY
            assert left(path) == ["book.txt"]
            path.unlink()
        assert set(ranges(server)) == {None}


def test_a_part_without_a_note_and_a_note_without_a_part(path: Path) -> None:
    with FileServer(BODY) as server:
        interrupt(path, server, 1000)
        path.with_name("book.txt.part").unlink()
        fetch(server.url, path)
        path.unlink()
        path.with_name("book.txt.part").write_bytes(b"junk" * 250)
        fetch(server.url, path)
        assert ranges(server) == [None, None]
    assert path.read_bytes() == BODY
    assert left(path) == ["book.txt"]


# --- bodies cut short


def test_progress_counts_afresh(path: Path) -> None:
    """More breaks than attempts: each brought new bytes, so none was the last."""
    with FileServer(BODY, cuts=[30_000] * 9) as server:
        fetch(server.url, path, attempts=2)
        assert len(server.requests) == 10
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("length", [True, False])
def test_cut_short_for_ever(path: Path, length: bool) -> None:
    cuts = itertools.repeat(1000)
    with FileServer(BODY, ranges=False, etag=None, cuts=cuts, length=length) as server:
        with pytest.raises(DownloadError) as info:
            fetch(server.url, path, attempts=3)
        assert len(server.requests) == 3
    message = str(info.value)
    assert message.startswith(f"{server.url}: the body was cut short: 1000 bytes")
    assert ("expected 300000" in message) == length
    assert "Run the same command again later" in message
    assert f"put the file at {path} by hand" in message
    assert left(path) == []


def test_cut_short_below_a_library_that_does_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """urllib3 1.26 lets a short body pass; the length on the wire is compared here too."""
    send = requests.adapters.HTTPAdapter.send

    def lax(*args: Any, **kwargs: Any) -> requests.Response:
        response = send(*args, **kwargs)
        response.raw.enforce_content_length = False
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", lax)
    for compress in (False, True):
        with (
            FileServer(BODY, cuts=itertools.repeat(100), ranges=False, compress=compress) as server,
            pytest.raises(DownloadError, match="the body was cut short: 100 bytes, expected"),
        ):
            fetch(server.url, path, attempts=2)
        assert "book.txt" not in left(path)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 2000), min_size=2, max_size=2),
    turns=st.lists(st.booleans(), max_size=8),
    cuts=st.lists(st.one_of(st.none(), st.integers(0, 2000)), max_size=8),
    statuses=st.lists(st.sampled_from([200, 200, 200, 503]), max_size=8),
    validators=st.sampled_from(["etag", "last_modified", "both", "first", "none"]),
    options=st.fixed_dictionaries(
        {name: st.booleans() for name in ("ranges", "if_range", "length", "compress")}
    ),
    junk=st.binary(max_size=50),
)
def test_never_a_wrong_file(
    sizes: list[int],
    turns: list[bool],
    cuts: list[int | None],
    statuses: list[int],
    validators: str,
    options: dict[str, bool],
    junk: bytes,
) -> None:
    """Two versions that alternate at any request, cut anywhere: one of the two, or an error."""
    versions = [text(sizes[0], seed=1), text(sizes[1], seed=2)]
    sequence = itertools.chain(turns, itertools.repeat(False))

    def choose(files: FileServer) -> None:
        version = next(sequence)
        files.body = versions[version]
        named = validators in ("etag", "both") or (validators == "first" and not version)
        files.etag = f'"v{int(version)}"' if named else None
        dates = [OLD_DATE, OLD_DATE.replace("05 GMT", "06 GMT")]
        files.last_modified = dates[version] if validators in ("last_modified", "both") else None

    server = FileServer(cuts=cuts, statuses=statuses, before=choose, **options)  # type: ignore[arg-type]
    with TemporaryDirectory() as folder, server:
        path = Path(folder, "book.txt")
        path.with_name("book.txt.part").write_bytes(junk)
        try:
            fetch(server.url, path, attempts=3, backoff_s=0)
        except DownloadError:
            assert not path.exists()
        else:
            assert path.read_bytes() in versions
            assert left(path) == ["book.txt"]


# --- kills


def test_kill_9_in_the_middle_then_resume(path: Path) -> None:
    part = path.with_name("book.txt.part")
    kept = 3 * download.CHUNK_BYTES
    with FileServer(BODY, hold_after=kept + 1000) as server:
        process = run("fetch(*sys.argv[1:])", server.url, path)
        until(lambda: part.exists() and part.stat().st_size >= kept)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert left(path) == ["book.txt.part", "book.txt.part.json"]
        server.hold_after = None
        fetch(server.url, path)
        assert ranges(server) == [None, f"bytes={kept - 1}-"]
    assert path.read_bytes() == BODY
    assert left(path) == ["book.txt"]


def test_ctrl_c_leaves_what_can_be_resumed(path: Path) -> None:
    part = path.with_name("book.txt.part")
    kept = 3 * download.CHUNK_BYTES
    with FileServer(BODY, hold_after=kept + 1000) as server:
        process = run("fetch(*sys.argv[1:])", server.url, path)
        until(lambda: part.exists() and part.stat().st_size >= kept)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert "KeyboardInterrupt" in output
        server.hold_after = None
        fetch(server.url, path)
        assert ranges(server)[1:] == [f"bytes={kept - 1}-"]
    assert path.read_bytes() == BODY


# Downloads in a forked child that dies at the n-th line of download.py it executes, for every n-th;
# then downloads what it left, and compares with the versions that the server sends in turn.
DIE_AT_EVERY_LINE = """
import os
from pathlib import Path
from lit_gptdata.text import download

address, folder, step, *versions = sys.argv[1:]
versions = [Path(version).read_bytes() for version in versions]
download.CHUNK_BYTES = 1000
count = 0

def line_or_death(frame, event, arg):
    global count
    if frame.f_code.co_filename != download.__file__:
        return None
    if event == "line":
        count += 1
        if count == last:
            os._exit(9)
    return line_or_death

deaths = 0
for last in range(1, 10**6, int(step)):
    url, path = f"{address}{last}", Path(folder, f"{last}.txt")
    pid = os.fork()
    if pid == 0:
        sys.settrace(line_or_death)
        fetch(url, path, backoff_s=0)
        os._exit(0)
    alive = os.waitpid(pid, 0)[1] == 0
    assert not path.exists() or path.read_bytes() in versions, last
    fetch(url, path, backoff_s=0)
    assert path.read_bytes() in versions, last
    if alive:
        break
    deaths += 1
print(deaths)
"""


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("n_versions", [1, 2])
def test_killed_at_every_line(tmp_path: Path, step: int, n_versions: int) -> None:
    bodies = [text(4000, seed) for seed in range(n_versions)]
    for i, body in enumerate(bodies):
        (tmp_path / f"version{i}").write_bytes(body)

    def misbehave(files: FileServer) -> None:
        n = sum(seen.path == files.requests[-1].path for seen in files.requests)
        files.body, files.etag = bodies[n % n_versions], f'"v{n % n_versions}"'
        files.cuts = iter([2500] if n == 1 else [])

    versions = [tmp_path / f"version{i}" for i in range(n_versions)]
    with FileServer(before=misbehave) as server:
        (tmp_path / "out").mkdir()
        out = finish(run(DIE_AT_EVERY_LINE, server.address("/"), tmp_path / "out", step, *versions))
    assert int(out.splitlines()[-1]) >= 150 // step


# --- two at once


def test_two_processes_at_once_ask_once(path: Path) -> None:
    with FileServer(BODY, before=lambda files: files.release.wait(PATIENCE_S)) as server:
        code = "print('ready', flush=True); fetch(*sys.argv[1:])"
        processes = [run(code, server.url, path) for _ in range(2)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        until(lambda: len(server.requests) == 1)
        time.sleep(0.1)  # the other one is at the lock by now; if it is not, it finds the file
        server.release.set()
        for process in processes:
            finish(process)
        assert len(server.requests) == 1
    assert path.read_bytes() == BODY
    assert left(path) == ["book.txt"]


def test_the_file_of_whoever_held_the_lock_is_used(path: Path, refused_url: str) -> None:
    path.parent.mkdir()
    with FileLock(f"{path}.lock"):
        process = run("print('ready', flush=True); fetch(*sys.argv[1:])", refused_url, path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        path.write_bytes(b"the winner's")
    finish(process)


# --- not the text that was meant


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/html", b"plain"),
        ("Text/HTML; charset=utf-8", BODY),
        ("application/xhtml+xml", BODY),
        ("text/plain", b"<!DOCTYPE html><p>Sign in"),
        (None, b"\xef\xbb\xbf \r\n\t<!doctype  HTML>"),
        ("application/octet-stream", b"\n" * 1000 + b"<HTML lang=en>"),
    ],
)
def test_an_html_page(path: Path, content_type: str | None, body: bytes) -> None:
    with FileServer(body, content_type=content_type) as server:
        with pytest.raises(DownloadError) as info:
            fetch(server.url, path)
        assert len(server.requests) == 1
    message = str(info.value)
    assert message.startswith(f"{server.url}: the server sent an HTML page (")
    assert re.search(
        r"\((Content-Type (text/html|application/xhtml\+xml)|it begins with b'.+')\)", message
    )
    assert "expected text. Open the address in a browser and take the link to the text" in message
    assert message.endswith(f"or put the file at {path} by hand")
    assert left(path) == []


def test_html_where_html_was_asked_for(path: Path) -> None:
    with FileServer(b"<html>yes</html>", content_type="text/html") as server:
        fetch(server.address("/page.HTML?x=1"), path)
        with pytest.raises(DownloadError):
            fetch(server.address("/book.txt?x=.html"), path.with_name("other.txt"))
    assert path.read_bytes() == b"<html>yes</html>"


@pytest.mark.parametrize("body", [b"<htmlx>", b"about <html>", b"<!doctype xml>"])
def test_text_that_only_looks_like_html(path: Path, body: bytes) -> None:
    with FileServer(body) as server:
        fetch(server.url, path)
    assert path.read_bytes() == body


def test_a_sign_in_page_does_not_cost_the_part(path: Path) -> None:
    with FileServer(BODY) as server:
        interrupt(path, server, 200_000)
        server.body, server.etag, server.content_type = b"<html>", None, "text/html"
        with pytest.raises(DownloadError, match="HTML page"):
            fetch(server.url, path)
        server.body, server.etag, server.content_type = BODY, '"v1"', "text/plain"
        fetch(server.url, path)
        assert ranges(server) == ["bytes=199999-"] * 2
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("length", [True, False])
def test_an_empty_body(path: Path, length: bool) -> None:
    with FileServer(b"", length=length) as server, pytest.raises(DownloadError) as info:
        fetch(server.url, path)
    assert str(info.value) == (
        f"{server.url}: the server sent an empty body (0 bytes), expected text. "
        f"Check the address in a browser, or put the file at {path} by hand"
    )
    assert left(path) == []


def test_a_wrong_sha256(path: Path) -> None:
    wrong, right = "0" * 64, hashlib.sha256(BODY).hexdigest()
    with FileServer(BODY) as server:
        with pytest.raises(DownloadError) as info:
            fetch(server.url, path, wrong)
        assert str(info.value) == (
            f"{server.url}: sha256 is {right}, expected {wrong}; what was downloaded is removed. "
            f"Correct sha256 or run the same command again, or put the file at {path} by hand"
        )
        assert left(path) == []
        assert fetch(server.url, path, right).read_bytes() == BODY


def test_a_file_of_another_sha256_is_kept_and_refused(path: Path, refused_url: str) -> None:
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(DownloadError) as info:
        fetch(refused_url, path, "0" * 64)
    assert str(info.value) == (
        f"{path} has sha256 {hashlib.sha256(b'mine').hexdigest()}, expected {'0' * 64}: another "
        f"file, or another version. Delete it (rm '{path}') to download it again, or correct sha256"
    )
    assert path.read_bytes() == b"mine"


def test_a_compression_that_cannot_be_undone(path: Path) -> None:
    with FileServer(BODY, headers={"Content-Encoding": "aes128gcm"}) as server:
        with pytest.raises(DownloadError) as info:
            fetch(server.url, path)
        assert (
            f"{server.url}: Content-Encoding aes128gcm, expected identity, gzip or deflate. "
            "Unpack it yourself, or put the file at"
        ) in str(info.value)
    assert left(path) == []


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/x?token=hunter2", "/book.txt"])
def test_redirects_that_lead_nowhere(path: Path, location: str) -> None:
    server = FileServer(statuses=itertools.repeat(302), headers={"Location": location})
    with server, pytest.raises(DownloadError) as info:
        fetch(server.url, path)
    assert f"{server.url}: cannot be asked for: " in str(info.value)
    assert "Correct the address, or put the file at" in str(info.value)
    assert "hunter2" not in str(info.value)


# --- arguments


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/book.txt",
        "file:///etc/passwd",
        "book.txt",
        "",
        "http://",
        "http://h:x/",
        "http://[",
    ],
)
def test_only_http_addresses(path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="cannot download") as info:
        fetch(url, path)
    assert str(info.value) == (
        f"cannot download {url!r}: a url begins with http:// or https:// and names a host. "
        "Correct it; for a file on this machine give its path instead"
    )
    assert not path.parent.exists()


@pytest.mark.parametrize("sha256", ["", "abc", "g" * 64, "0" * 65])
def test_a_sha256_that_is_none(path: Path, sha256: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits") as info:
        fetch("http://127.0.0.1/", path, sha256)
    assert repr(sha256) in str(info.value)
    assert "sha256sum FILE" in str(info.value)


def test_a_folder_as_target(tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as info:
        fetch("http://127.0.0.1/book.txt", tmp_path)
    assert str(info.value) == (
        f"{tmp_path} is a folder, and http://127.0.0.1/book.txt needs the name of a file: "
        f"give one, such as {tmp_path / 'corpus.txt'}"
    )


def test_secrets_are_not_told(path: Path, refused_url: str, caplog: pytest.LogCaptureFixture) -> None:
    def secret(url: str) -> str:
        return url.replace("//", "//user:hunter2@") + "?token=hunter2&x=hunter2"

    with FileServer(BODY) as server:
        server.cuts = iter([1000, 0, 0])
        cases = [
            (secret(refused_url), "cannot be reached"),
            (secret(server.address("/book.txt")), "cut short"),
        ]
        for url, problem in cases:
            with pytest.raises(DownloadError, match=problem) as info:
                fetch(url, path, attempts=2)
            assert re.search(r"http://\*\*\*@127\.0\.0\.1:\d+/book\.txt\?…: ", str(info.value))
            assert "hunter2" not in str(info.value) + caplog.text
            assert info.value.__suppress_context__  # requests' own messages show the whole address
        note = json.loads(path.with_name("book.txt.part.json").read_text())
        assert sorted(note) == ["url_sha256", "validator"]
        assert "hunter2" not in str(note)
        assert server.requests[0].headers["Authorization"].startswith("Basic ")
    with pytest.raises(ValueError, match=r"'ftp://\*\*\*@host/\?…'"):
        fetch("ftp://user:hunter2@host/?token=hunter2", path)


# --- the disk


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "book.txt"  # root, who runs the tests in CI, may write in any folder
    with FileServer(BODY) as server:
        with pytest.raises(DownloadError) as info:
            fetch(server.url, path)
        assert server.requests == []
    message = str(info.value)
    assert message.startswith(f"cannot read or write {path}: ")
    assert "Not a directory" in message or "File exists" in message
    assert "Free some space or give a folder that can be written, as in data_dir=" in message
    assert "run the same command again" in message


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    fetch(*sys.argv[1:])
except DownloadError as error:
    print(error)
"""


def test_a_full_disk_gets_its_room_back(path: Path) -> None:
    """A real failing write, by the limit on a file's size; no disk is filled."""
    with FileServer(BODY) as server:
        output = finish(run(FULL_DISK, server.url, path))
        assert len(server.requests) == 1
        assert output.startswith(f"cannot read or write {path}: {os.strerror(errno.EFBIG)} (")
        assert "Free some space" in output
        assert left(path) == []
        fetch(server.url, path)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_fails_late(path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with FileServer(BODY) as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, where, fail)
            with pytest.raises(DownloadError) as info:
                fetch(server.url, path)
        assert str(info.value).startswith(
            f"cannot read or write {path}: No space left on device ({path}.part)"
        )
        assert isinstance(info.value.__cause__, OSError)
        assert not path.exists()
        if where == "fsync":
            assert left(path) == []
        fetch(server.url, path)
    assert path.read_bytes() == BODY
