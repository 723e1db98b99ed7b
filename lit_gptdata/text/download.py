"""Download one file over HTTP. The target, such as book.txt, is complete or absent. Next to it are

book.txt.jsonl      instead of book.txt, if the server's name or the first bytes tell another format
book.txt.lock       held by the process that downloads; others wait, then use its file
book.txt.part       the bytes received so far
book.txt.part.json  the version of these bytes; without it they are not resumed
"""

import contextlib
import hashlib
import json
import os
import re
from email.message import Message
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from filelock import FileLock

from lit_gptdata._fsspec import Retries, is_transient, redact
from lit_gptdata._io import progress_bar
from lit_gptdata.text.content import HTML_HEAD, compression_of, rows_format
from lit_gptdata.text.formats import ALL_SUFFIXES, format_of, suffixes

TIMEOUT_S = (5.0, 30.0)  # to connect; between two reads
CHUNK_BYTES = 1 << 16  # per write: a broken connection loses at most this many
HEAD_BYTES = 1 << 16  # of the file, searched for the first tag of an HTML page and for its format

OFFLINE = (
    "Check the network, the proxy and the address, run the same command again later, or use data=sample "
    '(corpus="sample")'
)


class DownloadError(OSError):
    """A failed download; the message names the next step."""


class _TransientError(Exception):
    """A failed attempt: its problem and the header Retry-After. Another attempt may succeed."""


class _Download:
    def __init__(self, url: str, target: Path) -> None:
        self.url, self.target = url, target
        self.part = target.with_name(f"{target.name}.part")
        self.note = target.with_name(f"{target.name}.part.json")
        self.url_sha256 = hashlib.sha256(url.encode()).hexdigest()  # noted: a URL may hold secrets

    def discard(self) -> None:
        self.note.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def error(self, problem: str, next_step: str) -> DownloadError:
        problem = f"{redact(self.url)}: {redact(problem)}"
        suffix = "" if any(suffixes(self.target.name)) else " (plus .jsonl, .gz, … if it is such a file)"
        return DownloadError(f"{problem}. {next_step}, or put the file at {self.target}{suffix} by hand")


def find_download(path: Path) -> Path | None:
    """What `fetch` stored for `path`: that file, or one with the suffix of another format added."""
    names = (path.with_name(path.name + suffix) for suffix in ALL_SUFFIXES)
    return next((name for name in names if name.is_file()), None)


def fetch(url: str, path: str | os.PathLike[str]) -> Path:
    """Download an http(s) URL to `path` unless that file exists, and return the path of the file.

    The path gets a suffix if the server or the first bytes tell another format: book.txt.jsonl. A file
    that exists may be the user's own, so it is never overwritten. An interrupted download resumes if the
    server has the same version. Raises ValueError for an invalid URL, DownloadError (an OSError).
    """
    _check_url(url)
    file = _Download(url, Path(path))
    try:
        if (found := find_download(file.target)) is None:
            file.target.parent.mkdir(parents=True, exist_ok=True)
            # The lock file stays: a waiting process has it open, and after a removal the next process
            # would lock another file of the same name.
            with FileLock(f"{file.target}.lock"):
                found = find_download(file.target)  # another process may have downloaded it
                found = found or _download(file)
    except DownloadError:
        raise
    except OSError as error:
        problem = f"{error.strerror or error} ({error.filename or file.part})"
        advice = "Free some space or set data_dir to a writable folder"
        raise DownloadError(f"cannot read or write {file.target}: {problem}. {advice}") from error
    return found


def _check_url(url: str) -> None:
    with contextlib.suppress(ValueError):  # a port that is not a number, a broken IPv6 address
        parts = urllib3.util.parse_url(url)
        if parts.scheme in ("http", "https") and parts.host and parts.port != 0:
            return
    advice = "a URL starts with http:// or https:// and names a host. Correct it, or give a file's path"
    raise ValueError(f"cannot download {redact(url)!r}: {advice}")


def _download(file: _Download) -> Path:
    retries, largest = Retries(file.url), 0
    try:
        with requests.Session() as session:
            session.headers["Accept-Encoding"] = "identity"  # ranges count the bytes that we store
            while True:
                try:
                    stored = _attempt(file, session)
                    os.replace(file.part, stored)
                    file.note.unlink(missing_ok=True)
                    return stored
                except _TransientError as error:
                    size = file.part.stat().st_size if file.part.exists() else 0
                    if size > largest:
                        largest, retries.failures = size, 0
                    if problem := retries.give_up(*error.args):
                        raise file.error(problem, OFFLINE) from None
    finally:
        if not file.note.exists():  # bytes of an unknown version cannot be resumed
            file.part.unlink(missing_ok=True)


def _attempt(file: _Download, session: requests.Session) -> Path:
    """Send one request, and write the response to the .part file; returns the path to give it."""
    kept, validator = _resumable(file)
    headers = {"Range": f"bytes={kept}-", "If-Range": validator} if kept else {}
    # `from None`, here and elsewhere: a chained message would show the query string with its secrets
    try:
        response = session.get(file.url, headers=headers, stream=True, timeout=TIMEOUT_S)
    except requests.ConnectionError as error:  # also an unknown host, a connect timeout, TLS, a proxy
        cause = _cause(error)
        if isinstance(error, requests.exceptions.SSLError) and "certificate" in cause.lower():
            advice = "Check the address, or set REQUESTS_CA_BUNDLE to your network's root certificate"
            raise file.error(f"its certificate is not trusted: {cause}", advice) from None
        raise _TransientError(f"cannot be reached: {cause}") from None
    except requests.ReadTimeout:
        raise _TransientError(f"no answer, expected one within {TIMEOUT_S[1]:g} s") from None
    except OSError as error:  # too many redirects, a redirect to ftp://, or an absent bundle
        wrong = "the address" if isinstance(error, requests.RequestException) else "REQUESTS_CA_BUNDLE"
        raise file.error(f"cannot be requested: {error}", f"Correct {wrong}") from None
    with response:
        size = _resumed_size(response, kept, validator)
        if kept and response.status_code in (206, 416) and size is None:
            file.discard()
            return _attempt(file, session)  # only once, because nothing is left to resume
        _check_response(file, response, resumed=size is not None)
        return _receive(file, response, kept if response.status_code == 206 else 0, size)


def _resumable(file: _Download) -> tuple[int, str]:
    """(bytes of the .part to keep, the validator of their version), or (0, "") to start again."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # absent or cut short
        note = json.loads(file.note.read_bytes())
        if note["url_sha256"] == file.url_sha256:
            # one byte less: after a complete .part, a range from its end would be answered by a 416
            return max(0, file.part.stat().st_size - 1), str(note["validator"])
    return 0, ""


def _resumed_size(response: requests.Response, kept: int, validator: str) -> int | None:
    """The full size, if a response holds the rest of the file after `kept` bytes, else None."""
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    # some servers support Range but ignore If-Range, so the response itself must name the version
    same_version = validator == response.headers.get("ETag")
    if not kept or span is None or not same_version or _coding(response):
        return None
    size = int(span[3])
    return size if int(span[1]) == kept and int(span[2]) + 1 == size else None


def _name(file: _Download, response: requests.Response) -> str:
    """The name that tells the format: of Content-Disposition, after redirects, or of the target."""
    header = Message()
    header["Content-Disposition"] = response.headers.get("Content-Disposition", "")
    is_table = response.headers.get("Content-Type", "").startswith("text/csv")
    names = (header.get_filename() or "", urlsplit(response.url).path, is_table * "table.csv")
    return next((name for name in names if any(suffixes(name))), file.target.name)


def _coding(response: requests.Response) -> str:
    """The Content-Encoding, or ""."""
    return response.headers.get("Content-Encoding", "").strip().lower().removeprefix("identity")


def _check_response(file: _Download, response: requests.Response, *, resumed: bool) -> None:
    """Raise an error unless the response holds text."""
    status, coding = response.status_code, _coding(response)
    problem = f"the server answered HTTP {status} {response.reason or ''}".rstrip() + ", expected 200"
    if is_transient(status):
        raise _TransientError(problem, response.headers.get("Retry-After", "0"))
    if status != 200 and not (status == 206 and resumed):
        advice = "Check the address in a browser"
        if status in (401, 403, 406):
            advice += ", because the server may block programs or need a login"
        raise file.error(problem, advice)
    media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type in ("text/html", "application/xhtml+xml"):
        _reject_html(file, f"Content-Type {media_type}")
    # a compressed body is stored as it is sent, because servers label a .gz file gzip, too
    if coding not in ("", "gzip", "x-gzip", "zstd"):
        problem = f"Content-Encoding {coding}, expected identity or gzip"
        raise file.error(problem, "Give the address of another copy")


def _reject_html(file: _Download, reason: str) -> None:
    """Raise DownloadError for an HTML page, unless the URL asks for one."""
    if not urlsplit(file.url).path.lower().endswith((".html", ".htm", ".xhtml")):
        problem = f"the server sent an HTML page ({reason}), expected text"
        raise file.error(problem, "Open the address in a browser and take the link to the text itself")


def _receive(file: _Download, response: requests.Response, kept: int, size: int | None) -> Path:
    """Write the body after the first `kept` bytes of the .part file, check it, and return its path."""
    if size is None:
        size = response.raw.length_remaining  # None: the server does not tell
    try:
        if not kept:
            # in this order, so that after a kill no note is next to bytes of another version
            file.note.unlink(missing_ok=True)
            file.part.write_bytes(b"")
            etag = response.headers.get("ETag", "")
            if etag.startswith('"') and not _coding(response):  # a weak ETag does not identify bytes
                file.note.write_text(json.dumps({"url_sha256": file.url_sha256, "validator": etag}))
        with (
            file.part.open("r+b") as out,
            progress_bar(desc=file.target.name, total=size, unit="B") as bar,
        ):
            bar.update(out.seek(kept))
            out.truncate()
            cause = ""
            try:
                for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                    bar.update(out.write(chunk))
            except urllib3.exceptions.HTTPError as error:
                cause = f" ({_cause(error)})"
            if cause or size not in (None, out.tell()):  # urllib3 1.26 does not report a short body
                expected = "" if size is None else f", expected {size}"
                raise _TransientError(f"the body was cut short: {out.tell()} bytes{expected}{cause}")
            out.flush()
            os.fsync(out.fileno())
            out.seek(0)
            head = out.read(HEAD_BYTES)
            if not head:
                problem = "the server sent an empty body (0 bytes), expected text"
                raise file.error(problem, "Check the address in a browser")
            if HTML_HEAD.match(head):
                _reject_html(file, f"it starts with {head.lstrip()[:40]!r}")
            if len(head) < HEAD_BYTES and _is_error(head):
                body = re.sub(rb"<\?.*?>", b"", head).strip()
                problem = f"the server sent an error: {body[:200]!r}"
                raise file.error(problem, "Check the address in a browser")
        return _stored_path(file, _name(file, response), head)
    except OSError:  # also a DownloadError; on a full disk this frees space
        file.discard()
        raise


def _is_error(body: bytes) -> bool:
    """Whether a whole body, sent with HTTP 200, is an error of an object store or an API."""
    if re.match(rb"\s*(<\?xml[^>]*\?>\s*)?<Error\b", body):
        return True
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(body)
        return isinstance(answer, dict) and "text" not in answer and "error" in answer
    return False


def _stored_path(file: _Download, name: str, head: bytes) -> Path:
    """The target, with a suffix added if its name tells another format than `name` and the content."""
    suffix = suffixes(name)[0]
    if suffix in ("", ".txt"):
        suffix = rows_format(head) or suffix
    added = (suffix or ".txt") + compression_of(head)
    if format_of(file.target).name == format_of(Path(added)).name:
        return file.target
    return file.target.with_name(file.target.name + added)


def _cause(error: Exception) -> str:
    """The innermost reason, without the layers that repeat the address."""
    inner = error.args[0] if error.args else error
    return str(getattr(inner, "reason", inner))
