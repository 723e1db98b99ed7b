"""Downloads from a server on loopback: the file is complete and correct, or absent."""

from __future__ import annotations

import email.utils
import errno
import gzip
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gptdata import _fsspec
from lit_gptdata.text import download
from lit_gptdata.text.corpus import download_path, open_corpus
from lit_gptdata.text.download import DownloadError, fetch
from tests.http_server import TIMEOUT_S, FileServer

ROOT = Path(__file__).parents[2]
OLD_DATE = "Mon, 02 Jan 2006 15:04:05 GMT"
BACKOFF_S = _fsspec.BACKOFF_S


def text(n, seed=0):
    """n bytes that name their position and version, so that a mix of two versions is visible."""
    line = b"version %d line %06d\n"
    return b"".join(line % (seed, i) for i in range(n // 20 + 1))[:n]


BODY = text(300_000)
OTHER = {"body": text(300_000, seed=2), "etag": '"v2"'}


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch):
    monkeypatch.setattr(_fsspec, "BACKOFF_S", 0.001)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "downloads" / "book.txt"


@pytest.fixture
def refused_url():
    """An address where no server listens; the socket is bound, so that no other program takes it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/book.txt"


def files_next_to(path):
    """The names of the files in the folder, except lock files."""
    return sorted(p.name for p in path.parent.iterdir() if p.suffix != ".lock")


def ranges(server):
    return [request.headers["Range"] for request in server.requests]


def date_from_now(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


def fetch_all(server, path):
    """Download what the server has now, and check that the file is complete and the only one."""
    fetch(server.url, path)
    assert path.read_bytes() == server.body
    assert files_next_to(path) == ["book.txt"]


def interrupt(path, server, size):
    """Leave `size` bytes in the .part file, like a connection that breaks once."""
    server.cuts = iter([size])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fsspec, "ATTEMPTS", 1)
        with pytest.raises(DownloadError):
            fetch(server.url, path)
    server.requests.clear()


def run(code, *args):
    """Start a Python process with `fetch` imported and `args` in sys.argv[1:]."""
    code = f"import sys\nfrom lit_gptdata.text.download import fetch, DownloadError\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def output_of(process):
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def wait_until(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Without faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"length": False}, {"etag": None}])
def test_a_file_is_downloaded_once_however_it_is_sent(path, options, refused_url):
    with FileServer(BODY, **options) as server:
        fetch_all(server, path)
        assert fetch(server.url, str(path)) == path
        assert len(server.requests) == 1
        assert server.requests[0].headers["Accept-Encoding"] == "identity"
    path.write_bytes(b"mine")
    assert fetch(refused_url, path) == path
    assert path.read_bytes() == b"mine"


def test_progress_is_printed_to_a_terminal_only(path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr := StringIO())
    with FileServer(BODY) as server:
        fetch(server.url, path)
        assert stderr.getvalue() == ""
        path.unlink()
        monkeypatch.setattr(stderr, "isatty", lambda: True)
        fetch(server.url, path)
    assert "book.txt: 100%" in stderr.getvalue()
    assert "300k/300k" in stderr.getvalue()


# Retries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(path, status, caplog):
    with FileServer(BODY, statuses=[status, status]) as server:
        fetch_all(server, path)
        assert len(server.requests) == 3
    assert f"HTTP {status}" in caplog.text
    assert "(attempt 2 of 5), next in" in caplog.text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"statuses": itertools.repeat(500)},
         "the server answered HTTP 500 Internal Server Error, expected 200"),
        ({"before": lambda server: server.release.wait(TIMEOUT_S)},
         "cannot be reached: HTTPConnectionPool(host='127.0.0.1'"),
        ({"cuts": itertools.repeat(1000), "ranges": False, "etag": None},
         "the body was cut short after 1000 bytes: Connection broken: IncompleteRead(1000 bytes read"),
        ({"cuts": itertools.repeat(1000), "ranges": False, "etag": None, "length": False},
         "the body was cut short after 1000 bytes: "),
    ],
)  # fmt: skip
def test_a_server_that_always_fails_is_given_up(path, options, problem, monkeypatch):
    monkeypatch.setattr(_fsspec, "ATTEMPTS", 3)
    monkeypatch.setattr(download, "TIMEOUT_S", (5, 0.05 if "before" in options else 30))
    with FileServer(BODY, **options) as server:
        with pytest.raises(DownloadError) as info:
            fetch(server.url, path)
        assert len(server.requests) == 3
    message = str(info.value)
    assert message.startswith(f"{server.url}: {problem}")
    assert message.endswith(f"(attempt 3 of 3). {download.OFFLINE}, or put the file at {path} by hand")
    assert files_next_to(path) == []


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7),
        ("86400", _fsspec.RETRY_AFTER_CAP_S, _fsspec.RETRY_AFTER_CAP_S),
        (3600, 60, 60),  # as a date
        (-3600, 0, 0.001),
        ("soon", 0, 0.001),
        ("9" * 5000, 0, 0.001),  # Python refuses to convert so many digits
    ],
    ids=str,
)
def test_the_next_attempt_waits_as_long_as_retry_after_asks(path, value, low, high, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    header = date_from_now(value) if isinstance(value, int) else value
    with FileServer(BODY, statuses=[429], headers={"Retry-After": header}) as server:
        fetch_all(server, path)
    assert len(waits) == 1
    assert low <= waits[0] <= high


def test_an_unreachable_server_is_asked_with_a_backoff_that_doubles(path, refused_url, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(_fsspec, "BACKOFF_S", BACKOFF_S)
    with pytest.raises(DownloadError) as info:
        fetch(refused_url, path)
    message = str(info.value)
    assert message.startswith(f"{refused_url}: cannot be reached: ")
    assert "Connection refused" in message
    assert message.endswith(
        "(attempt 5 of 5). Check the network, the proxy and the address, run the same command again "
        f'later, or use data=sample (corpus="sample"), or put the file at {path} by hand'
    )
    assert files_next_to(path) == []
    assert len(waits) == 4
    longest = [BACKOFF_S * 2**i for i in range(4)]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True))
    assert sum(longest) < 10


def test_a_server_that_stalls_is_asked_for_the_rest(path, monkeypatch):
    def stall_once(server):
        server.hold_after = 200_000 if len(server.requests) == 1 else None

    monkeypatch.setattr(download, "TIMEOUT_S", (5, 0.5))
    with FileServer(BODY, before=stall_once) as server:
        fetch_all(server, path)
        assert ranges(server) == [None, f"bytes={3 * download.CHUNK_BYTES - 1}-"]


def test_attempts_are_counted_again_after_progress(path, monkeypatch):
    monkeypatch.setattr(_fsspec, "ATTEMPTS", 2)
    with FileServer(BODY, cuts=[30_000] * 9) as server:
        fetch_all(server, path)
        assert len(server.requests) == 10


def test_a_short_body_is_found_with_a_library_that_does_not_count(path, monkeypatch):
    """urllib3 1.26 does not compare the body with Content-Length."""
    send = requests.adapters.HTTPAdapter.send

    def send_unchecked(*args, **kwargs):
        response = send(*args, **kwargs)
        response.raw.enforce_content_length = False
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send_unchecked)
    for compress in (False, True):
        with (
            FileServer(BODY, cuts=itertools.repeat(100), ranges=False, compress=compress) as server,
            pytest.raises(DownloadError, match="the body was cut short after 100 bytes: "),
        ):
            fetch(server.url, path)
        assert not path.exists()


# Resume --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "validator"),
    [
        ({}, '"v1"'),
        ({"etag": None, "last_modified": OLD_DATE}, None),
        ({"last_modified": OLD_DATE}, '"v1"'),
        ({"etag": 'W/"v1"', "last_modified": OLD_DATE}, None),
        ({"etag": None}, None),
    ],
)
def test_an_interrupted_download_resumes_with_a_strong_etag_only(path, options, validator):
    with FileServer(BODY, **options) as server:
        interrupt(path, server, 10_000)
        if validator:
            assert files_next_to(path) == ["book.txt.part", "book.txt.part.json"]
            assert path.with_name("book.txt.part").read_bytes() == BODY[:10_000]
        else:
            assert files_next_to(path) == []
        fetch_all(server, path)
        assert ranges(server) == ["bytes=9999-" if validator else None]
        assert server.requests[0].headers["If-Range"] == validator


@pytest.mark.parametrize(
    ("change", "n_requests"),
    [
        ({"ranges": False}, 1),  # answers 200 to a Range
        (OTHER, 1),  # answers 200 because of If-Range
        (OTHER | {"body": text(1000, seed=2), "if_range": False}, 2),  # 416
        (OTHER | {"if_range": False}, 2),  # a 206 of another version
        (OTHER | {"etag": 'W/"v2"', "if_range": False}, 2),
        (OTHER | {"etag": None, "if_range": False}, 2),
        ({"content_range": "bytes 0-299999/300000"}, 2),
        ({"content_range": "bytes 199998-299999/300000"}, 2),
        ({"content_range": "bytes 199999-299999/*"}, 2),
        ({"content_range": "bytes 199999-250000/300000"}, 2),
        ({"content_range": "199999"}, 2),
    ],
)
def test_a_download_restarts_if_the_server_does_not_send_the_rest(path, change, n_requests):
    with FileServer(BODY) as server:
        interrupt(path, server, 200_000)
        for name, value in change.items():
            setattr(server, name, value)
        fetch_all(server, path)
        assert ranges(server) == ["bytes=199999-", None][:n_requests]


def test_bytes_of_another_address_are_not_resumed(path):
    with FileServer(BODY) as server:
        interrupt(path, server, 200_000)
        server.body = OTHER["body"]  # with the same ETag
        fetch(server.address("/other.txt"), path)
        assert ranges(server) == [None]
        assert path.read_bytes() == server.body


def test_a_note_is_removed_with_its_version(path):
    """Version 1, then version 2 without a validator, then version 1 again: nothing of 2 is kept."""
    with FileServer(BODY) as server:
        interrupt(path, server, 1000)
        server.body, server.etag = OTHER["body"], None
        interrupt(path, server, 200_000)
        assert files_next_to(path) == []
        server.body, server.etag = BODY, '"v1"'
        fetch_all(server, path)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (BODY[:1], [None]),
        (BODY[:-1], ["bytes=299998-"]),
        (BODY, ["bytes=299999-"]),  # killed between the last byte and the rename
        (BODY + b"more", ["bytes=300003-", None]),
    ],
    ids=["one byte", "all but one byte", "complete", "too long"],
)
def test_a_part_of_any_length_becomes_the_file(path, part, expected):
    with FileServer(BODY) as server:
        interrupt(path, server, 1)
        path.with_name("book.txt.part").write_bytes(part)
        fetch_all(server, path)
        assert ranges(server) == expected


def test_a_part_without_a_valid_note_is_not_resumed(path):
    with FileServer(BODY) as server:
        interrupt(path, server, 1000)
        part, note = path.with_name("book.txt.part"), path.with_name("book.txt.part.json")
        valid = note.read_bytes()
        cut = [valid[:n] for n in (*range(0, len(valid), 9), -1)]
        for junk in [*cut, b"[]", b"1", b"\xff", b'{"validator": "x"}', b'{"url_sha256": "x"}', None]:
            part.write_bytes(b"junk" * 250)
            note.write_bytes(junk or b"")
            if junk is None:
                note.unlink()
            fetch_all(server, path)
            path.unlink()
        note.write_bytes(valid)  # without a .part
        fetch_all(server, path)
        assert set(ranges(server)) == {None}


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
def test_a_file_is_never_wrong(sizes, turns, cuts, statuses, validators, options, junk):
    """Two versions alternate at any request and are cut anywhere: one of the two, or an error."""
    versions = [text(sizes[0], seed=1), text(sizes[1], seed=2)]
    sequence = itertools.chain(turns, itertools.repeat(False))

    def choose(server):
        version = next(sequence)
        server.body = versions[version]
        has_etag = validators in ("etag", "both") or (validators == "first" and not version)
        server.etag = f'"v{int(version)}"' if has_etag else None
        dates = [OLD_DATE, OLD_DATE.replace("05 GMT", "06 GMT")]
        server.last_modified = dates[version] if validators in ("last_modified", "both") else None

    server = FileServer(cuts=cuts, statuses=statuses, before=choose, **options)
    with TemporaryDirectory() as folder, server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fsspec, "BACKOFF_S", 0)
        path = Path(folder, "book.txt")
        path.with_name("book.txt.part").write_bytes(junk)
        try:
            stored = fetch(server.url, path)
        except DownloadError:
            assert not path.exists()
        else:
            content = stored.read_bytes()
            assert (gzip.decompress(content) if stored.suffix == ".gz" else content) in versions
            assert files_next_to(path) == [stored.name]


# Kills and other processes -------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_resumes(path, kill):
    part, kept = path.with_name("book.txt.part"), 3 * download.CHUNK_BYTES
    with FileServer(BODY, hold_after=kept + 1000) as server:
        process = run("fetch(*sys.argv[1:])", server.url, path)
        wait_until(lambda: part.exists() and part.stat().st_size >= kept)
        process.send_signal(kill)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == -kill
        assert ("KeyboardInterrupt" in output) == (kill == signal.SIGINT)
        assert files_next_to(path) == ["book.txt.part", "book.txt.part.json"]
        server.hold_after = None
        fetch_all(server, path)
        assert ranges(server) == [None, f"bytes={kept - 1}-"]


# For every n: downloads in a forked child that dies at the n-th line of download.py that it runs, then
# downloads again and compares with the versions that the server sends in turn.
DIE_AT_EVERY_LINE = """
import os
from pathlib import Path
from lit_gptdata import _fsspec
from lit_gptdata.text import download

address, folder, step, *versions = sys.argv[1:]
versions = [Path(version).read_bytes() for version in versions]
download.CHUNK_BYTES, _fsspec.BACKOFF_S = 1000, 0
count = 0

def die_at_last_line(frame, event, arg):
    global count
    if frame.f_code.co_filename != download.__file__:
        return None
    if event == "line":
        count += 1
        if count == last:
            os._exit(9)
    return die_at_last_line

deaths = 0
for last in range(1, 10**6, int(step)):
    url, path = f"{address}{last}", Path(folder, f"{last}.txt")
    pid = os.fork()
    if pid == 0:
        sys.settrace(die_at_last_line)
        fetch(url, path)
        os._exit(0)
    alive = os.waitpid(pid, 0)[1] == 0
    assert not path.exists() or path.read_bytes() in versions, last
    fetch(url, path)
    assert path.read_bytes() in versions, last
    if alive:
        break
    deaths += 1
print(deaths)
"""


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("n_versions", [1, 2])
def test_a_download_killed_at_any_line_succeeds_later(tmp_path, step, n_versions):
    bodies = [text(4000, seed) for seed in range(n_versions)]
    versions = [tmp_path / f"version{i}" for i in range(n_versions)]
    for version, body in zip(versions, bodies, strict=True):
        version.write_bytes(body)

    def alternate(server):
        n = sum(request.path == server.requests[-1].path for request in server.requests)
        server.body, server.etag = bodies[n % n_versions], f'"v{n % n_versions}"'
        server.cuts = iter([2500] if n == 1 else [])

    with FileServer(before=alternate) as server:
        (tmp_path / "out").mkdir()
        process = run(DIE_AT_EVERY_LINE, server.address("/"), tmp_path / "out", step, *versions)
        assert int(output_of(process).splitlines()[-1]) >= 120 // step


def test_two_processes_send_one_request(path):
    with FileServer(BODY, before=lambda server: server.release.wait(TIMEOUT_S)) as server:
        code = "print('ready', flush=True); fetch(*sys.argv[1:])"
        processes = [run(code, server.url, path) for _ in range(2)]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        wait_until(lambda: len(server.requests) == 1)
        time.sleep(0.1)  # now the other process waits for the lock, or else it will find the file
        server.release.set()
        for process in processes:
            output_of(process)
        assert len(server.requests) == 1
    assert path.read_bytes() == BODY
    assert files_next_to(path) == ["book.txt"]


# Not the text that was meant -----------------------------------------------------------------------

NO_TEXT = "the server sent an empty body (0 bytes), expected text. Check the address in a browser"
HTML = "the server sent an HTML page (Content-Type {}), expected text. Open the address in a browser"
XHTML = "application/xhtml+xml"
FTP = "ftp://host/x?token=1"


def moved(location):
    return {"statuses": itertools.repeat(302), "headers": {"Location": location}}


@pytest.mark.parametrize(
    ("body", "options", "problem"),
    [
        (BODY, {"statuses": [204]}, "the server answered HTTP 204 No Content, expected 200. Check the"),
        (BODY, {"statuses": [304]}, "the server answered HTTP 304 Not Modified, expected 200. Check"),
        (BODY, {"statuses": [403]}, "the server answered HTTP 403 Forbidden, expected 200. Check the"),
        (BODY, {"statuses": [404]}, "the server answered HTTP 404 Not Found, expected 200. Check the"),
        (b"", {}, NO_TEXT),
        (b"", {"length": False}, NO_TEXT),
        (b'{"error": "quota"}', {}, """the server sent an error: b'{"error": "quota"}'. Check the"""),
        (BODY, {"headers": {"Content-Encoding": "br"}}, "Content-Encoding br, expected identity"),
        (BODY, moved("/book.txt"), "cannot be requested: Exceeded 30 redirects.. Correct what it names"),
        (BODY, moved(FTP), "cannot be requested: No connection adapters were found for 'ftp://host/"),
        (b"plain", {"content_type": "Text/HTML; charset=utf-8"}, HTML.format("text/html")),
        (BODY, {"content_type": XHTML}, HTML.format(XHTML)),
    ],
)  # fmt: skip
def test_a_response_without_text_is_refused_at_once(path, body, options, problem):
    with FileServer(body, **options) as server:
        with pytest.raises(DownloadError) as info:
            fetch(server.url, path)
        assert len(server.requests) == (31 if "Exceeded" in problem else 1)
    assert str(info.value).startswith(f"{server.url}: {problem}")
    assert str(info.value).endswith(f", or put the file at {path} by hand")
    assert files_next_to(path) == []


def test_html_is_taken_from_an_html_address(path):
    with FileServer(b"<html>yes</html>", content_type="text/html") as server:
        fetch(server.address("/page.HTML?x=1"), path)
    assert path.read_bytes() == b"<html>yes</html>"


def test_a_sign_in_page_does_not_remove_the_part(path):
    with FileServer(BODY) as server:
        interrupt(path, server, 200_000)
        server.body, server.etag, server.content_type = b"<html>", None, "text/html"
        with pytest.raises(DownloadError, match="HTML page"):
            fetch(server.url, path)
        server.body, server.etag, server.content_type = BODY, '"v1"', "text/plain"
        fetch_all(server, path)
        assert ranges(server) == ["bytes=199999-"] * 2


@pytest.mark.parametrize(
    "url", ["ftp://u:hunter2@host/a?key=1", "book.txt", "http://", "http://h:x/", "http://["]
)
def test_an_invalid_address_is_refused(path, url):
    with pytest.raises(DownloadError, match=r"cannot be requested: .*Correct what it names") as info:
        fetch(url, path)
    assert "hunter2" not in str(info.value)


def test_errors_logs_and_notes_contain_no_secrets(path, refused_url, caplog, monkeypatch):
    def add_secrets(url):
        return url.replace("//", "//user:hunter2@") + "?token=hunter2&x=hunter2"

    monkeypatch.setattr(_fsspec, "ATTEMPTS", 2)
    with FileServer(BODY, cuts=[1000, 0, 0]) as server:
        for url, problem in ((refused_url, "cannot be reached"), (server.url, "cut short")):
            with pytest.raises(DownloadError, match=problem) as info:
                fetch(add_secrets(url), path)
            assert re.search(r"http://\*\*\*@127\.0\.0\.1:\d+/book\.txt\?…: ", str(info.value))
            assert "hunter2" not in str(info.value) + caplog.text
            assert info.value.__suppress_context__  # messages of requests contain the whole address
        note = json.loads(path.with_name("book.txt.part.json").read_text())
        assert sorted(note) == ["url_sha256", "validator"]
        assert "hunter2" not in str(note)
        assert server.requests[0].headers["Authorization"].startswith("Basic ")


# The disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file/book.txt", "folder"])
def test_a_target_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").touch()  # not a folder without permissions: root may write everywhere
    (tmp_path / "folder").mkdir()
    with FileServer(BODY) as server, pytest.raises(DownloadError) as info:
        fetch(server.url, tmp_path / name)
    message = str(info.value)
    assert message.startswith(f"cannot read or write {tmp_path / name}: ")
    assert re.search("Not a directory|File exists|Is a directory", message)
    assert message.endswith("Free some space or set data_dir to a writable folder")


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    fetch(*sys.argv[1:])
except DownloadError as error:
    print(error)
"""


def test_a_full_disk_gets_its_space_back(path):
    """The limit on a file's size makes a write fail; no disk is filled."""
    with FileServer(BODY) as server:
        output = output_of(run(FULL_DISK, server.url, path))
        assert len(server.requests) == 1
        assert output.startswith(f"cannot read or write {path}: {os.strerror(errno.EFBIG)} (")
        assert files_next_to(path) == []
        fetch_all(server, path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_disk_that_fails_late_leaves_no_file(path, function, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with FileServer(BODY) as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(DownloadError) as info:
                fetch(server.url, path)
        message = f"cannot read or write {path}: No space left on device ({path}.part)"
        assert str(info.value).startswith(message)
        assert isinstance(info.value.__cause__, OSError)
        assert not path.exists()
        if function == "fsync":
            assert files_next_to(path) == []
        fetch_all(server, path)


# The format of what came ---------------------------------------------------------------------------

ROWS = b'{"text": "one"}\n{"text": "two"}\n'
PACKED = gzip.compress(b"some text\n" * 99, mtime=0)


def opened(url: str, folder: Path, **options) -> tuple[Path, list[str]]:
    """The path of a downloaded file, and its texts."""
    corpus = open_corpus(url, downloads=folder, **options)
    return corpus.files[0], [b"".join(document.chunks).decode() for document in corpus]


@pytest.mark.parametrize(
    ("address", "options", "added"),
    [
        ("/17", {"body": {"/17": b"", "/store/a.jsonl": ROWS}, **moved("/store/a.jsonl")}, ".jsonl"),
        ("/17", {"headers": {"Content-Disposition": 'attachment; filename="a.json"'}}, ".json"),
        ("/17", {"headers": {"Content-Disposition": "inline; filename*=UTF-8''%C3%A9.jsonl"}}, ".jsonl"),
        ("/17", {}, ".jsonl"),  # only the content tells
        ("/a.txt", {}, ".jsonl"),
        ("/a.jsonl", {"headers": {"Content-Disposition": "attachment; filename=export"}}, ""),
        ("/a.json", {}, ""),
        ("/17", {"body": gzip.compress(ROWS), "headers": {"Content-Disposition": "x;filename=a.json"}},
         ".json.gz"),
        ("/a.jsonl.gz", {}, ".jsonl"),  # the server has unpacked it
    ],
)  # fmt: skip
def test_a_download_gets_the_suffix_of_the_format_that_came(tmp_path, address, options, added):
    options = {"body": ROWS, **options}
    if "statuses" in options:
        options["statuses"] = [302]
    with FileServer(**options) as server:
        url = server.address(address)
        path, texts = opened(url, tmp_path)
        assert texts == ["one", "two"]
        assert path.name == download_path(url, tmp_path).name + added
        n_requests = len(server.requests)
        assert opened(url, tmp_path) == (path, texts)
        assert opened(url, tmp_path, download=False) == (path, texts)
        assert len(server.requests) == n_requests
        assert files_next_to(path) == [path.name]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.tab.gz"])
def test_a_table_is_refused_by_the_name_that_the_server_gives(tmp_path, name):
    body = b"id,text\n1,one\n"
    header = {"Content-Disposition": f"attachment; filename={name}"}
    body = gzip.compress(body) if name.endswith(".gz") else body
    sent: list[dict[str, Any]] = [{"headers": header}, moved(f"/{name}") | {"statuses": [302]}]
    if name == "a.csv":
        sent.append({"content_type": "text/csv; charset=utf-8", "etag": None, "ranges": False})
    for options in sent:
        with FileServer(body, **options) as server:
            url, folder = server.address("/17"), tmp_path / f"{len(options)}"
            for _ in range(2):  # also the stored file
                with pytest.raises(ValueError, match=rf"/17-.*{name[1:]} (is|holds) a table, not one"):
                    opened(url, folder)
            assert len(server.requests) < 3


def test_every_member_of_a_compressed_body_is_kept(tmp_path):
    body = gzip.compress(b"some text\n" * 50) + gzip.compress(b"some text\n" * 49) + bytes(9)
    with FileServer(body, headers={"Content-Encoding": "gzip"}) as server:
        path, texts = opened(server.address("/b.txt"), tmp_path)
    assert texts == ["some text\n" * 99]
    assert path.read_bytes() == body  # as it was sent


def test_a_download_of_an_earlier_version_stays_valid(tmp_path):
    url = "http://127.0.0.1:9/files/17"
    path = download_path(url, tmp_path)
    path.write_bytes(b"plain text")
    assert opened(url, tmp_path) == (path, ["plain text"])


@pytest.mark.parametrize("labels", [{"Content-Encoding": "gzip"}, {"Content-Encoding": "x-gzip"}])
@pytest.mark.parametrize("cut", [None, 20])
def test_a_gz_file_that_is_labeled_gzip_is_kept_and_not_resumed(tmp_path, labels, cut):
    with FileServer(PACKED, headers=labels, cuts=[cut]) as server:
        path, texts = opened(server.address("/a.txt.gz"), tmp_path)
        assert path.read_bytes() == PACKED
        assert texts == ["some text\n" * 99]
        assert ranges(server) == ([None, None] if cut else [None])


@pytest.mark.parametrize(
    ("address", "body", "error", "problem"),
    [
        ("/a.txt", b"%PDF-1.7 ", ValueError, "is a PDF document: run pdftotext"),
        ("/a.txt", b"\n<!doctype  HTML>", ValueError, "is an HTML page"),
        ("/a.jsonl", b"<html><p>Sign in", ValueError, "is an HTML page"),
        ("/a.txt", b"caf\xe9", UnicodeError, "is not valid UTF-8"),
        ("/a.txt.gz", PACKED[:-5], OSError, "is broken or cut short"),
        ("/a.jsonl", b"words", ValueError, "is not JSON"),
        ("/17", gzip.compress(ROWS, mtime=0), ValueError, "holds JSON Lines, not one text"),
    ],
)
def test_a_download_that_cannot_be_read_names_the_file_to_delete(
    tmp_path, address, body, error, problem
):
    with FileServer(body) as server, pytest.raises(error, match=problem) as caught:
        opened(server.address(address), tmp_path)
    (path,) = (path for path in tmp_path.iterdir() if path.suffix != ".lock")
    assert str(caught.value).endswith(f". It was downloaded: delete {path} to download it again")
    assert str(caught.value).count("It was downloaded") == 1


def test_a_certificate_that_is_not_trusted_is_refused_at_once(path, monkeypatch):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise requests.exceptions.SSLError(
            "HTTPSConnectionPool: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self"
        )

    monkeypatch.setattr(requests.Session, "get", fail)
    message = r"its certificate is not trusted: .* set REQUESTS_CA_BUNDLE to .*, or put the file at "
    with pytest.raises(DownloadError, match=message):
        fetch("https://127.0.0.1:9/book.txt", path)
    assert len(calls) == 1


def test_a_wrong_bundle_of_certificates_is_named(path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/absent/ca.pem")
    with pytest.raises(DownloadError, match=r"/absent/ca.pem\. Correct what it names"):
        fetch("https://127.0.0.1:9/book.txt", path)


def test_a_server_that_blocks_programs_is_named(path):
    with FileServer(BODY, statuses=[403]) as server:
        message = "because the server may block programs or need a login, or put the file at .* by hand"
        with pytest.raises(DownloadError, match=message):
            fetch(server.url, path)
