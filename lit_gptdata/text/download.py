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
from lit_gptdata.text.content import compression_of, rows_format
from lit_gptdata.text.formats import ALL_SUFFIXES, format_of, suffixes

TIMEOUT_S = (5.0, 30.0)  # to connect; between two reads
CHUNK_BYTES = 1 << 16  # per write: a broken connection loses at most this many
HEAD_BYTES = 1 << 16  # of the file, which tell its format

OFFLINE = (
    "Check the network, the proxy and the address, run the same command again later, or use data=sample "
    '(corpus="sample")'
)


class DownloadError(OSError):
    """A failed download; the message names the next step."""


class _TransientError(Exception):
    """A failed attempt: its problem and the header Retry-After. Another attempt may succeed."""


def find_download(path: Path) -> Path | None:
    """What `fetch` stored for `path`: that file, or one with the suffix of another format added."""
    names = (path.with_name(path.name + suffix) for suffix in ALL_SUFFIXES)
    return next((name for name in names if name.is_file()), None)


def fetch(url: str, path: str | os.PathLike[str]) -> Path:
    """Download an http(s) URL to `path` unless that file exists, and return the path of the file.

    The path gets a suffix if the server or the first bytes tell another format: book.txt.jsonl. A file
    that exists may be the user's own, so it is never overwritten. An interrupted download resumes if the
    server has the same version. Raises DownloadError (an OSError).
    """
    file = _Download(url, Path(path))
    try:
        if found := find_download(file.target):
            return found
        file.target.parent.mkdir(parents=True, exist_ok=True)
        # The lock file stays: a waiting process has it open, and after a removal the next process
        # would lock another file of the same name.
        with FileLock(f"{file.target}.lock"):
            # another process may have downloaded it
            return find_download(file.target) or file.download()
    except DownloadError:
        raise
    except OSError as error:
        problem = f"{error.strerror or error} ({error.filename or file.part})"
        advice = "Free some space or set data_dir to a writable folder"
        raise DownloadError(f"cannot read or write {file.target}: {problem}. {advice}") from error


class _Download:
    """The download of a URL to `target`, in one or several attempts."""

    def __init__(self, url: str, target: Path) -> None:
        self.url, self.target = url, target
        self.part = target.with_name(f"{target.name}.part")
        self.note = target.with_name(f"{target.name}.part.json")
        self.url_sha256 = hashlib.sha256(url.encode()).hexdigest()  # noted: a URL may hold secrets

    def download(self) -> Path:
        """Send requests until the file is complete; returns its path."""
        retries, largest = Retries(self.url), 0
        try:
            with requests.Session() as session:
                session.headers["Accept-Encoding"] = "identity"  # ranges count the bytes that we store
                while True:
                    try:
                        stored = self.attempt(session)
                        os.replace(self.part, stored)
                        self.note.unlink(missing_ok=True)
                        return stored
                    except _TransientError as error:
                        size = self.part.stat().st_size if self.part.exists() else 0
                        if size > largest:
                            largest, retries.failures = size, 0
                        if problem := retries.give_up(*error.args):
                            raise self.error(problem, OFFLINE) from None
        finally:
            if not self.note.exists():  # bytes of an unknown version cannot be resumed
                self.part.unlink(missing_ok=True)

    def attempt(self, session: requests.Session) -> Path:
        """Send one request, and write the response to the .part file; returns the path to give it."""
        kept, validator = self.resumable()
        headers = {"Range": f"bytes={kept}-", "If-Range": validator} if kept else {}
        # `from None`, here and elsewhere: a chained message would show the query string with its secrets
        try:
            response = session.get(self.url, headers=headers, stream=True, timeout=TIMEOUT_S)
        except (requests.ConnectionError, requests.Timeout) as error:  # also TLS, a proxy, a wrong host
            cause = _cause(error)
            if isinstance(error, requests.exceptions.SSLError) and "certificate" in cause.lower():
                advice = (
                    "Check the address, or set REQUESTS_CA_BUNDLE to your network's root certificate"
                )
                raise self.error(f"its certificate is not trusted: {cause}", advice) from None
            raise _TransientError(f"cannot be reached: {cause}") from None
        except OSError as error:  # an invalid URL, too many redirects, or an absent REQUESTS_CA_BUNDLE
            raise self.error(f"cannot be requested: {error}", "Correct what it names") from None
        with response:
            if kept and response.status_code in (206, 416) and not _is_rest(response, kept, validator):
                self.discard()
                raise _TransientError("the server has another version of the file than before")
            self.check(response, is_resumed=kept > 0)
            return self.receive(response, kept if response.status_code == 206 else 0)

    def resumable(self) -> tuple[int, str]:
        """(bytes of the .part to keep, the validator of their version), or (0, "") to start again."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # absent or cut
            note = json.loads(self.note.read_bytes())
            if note["url_sha256"] == self.url_sha256:
                # one byte less: after a complete .part, a range from its end would be answered by a 416
                return max(0, self.part.stat().st_size - 1), str(note["validator"])
        return 0, ""

    def check(self, response: requests.Response, is_resumed: bool) -> None:
        """Raise an error unless the response holds text."""
        status, coding = response.status_code, _coding(response)
        problem = (
            f"the server answered HTTP {status} {response.reason or ''}".rstrip() + ", expected 200"
        )
        if is_transient(status):
            raise _TransientError(problem, response.headers.get("Retry-After", "0"))
        if status != 200 and not (status == 206 and is_resumed):
            advice = "Check the address in a browser"
            if status in (401, 403, 406):
                advice += ", because the server may block programs or need a login"
            raise self.error(problem, advice)
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        is_html = media_type in ("text/html", "application/xhtml+xml")
        if is_html and not urlsplit(self.url).path.lower().endswith((".html", ".htm", ".xhtml")):
            problem = f"the server sent an HTML page (Content-Type {media_type}), expected text"
            advice = "Open the address in a browser and take the link to the text itself"
            raise self.error(problem, advice)
        # a compressed body is stored as it is sent, because servers label a .gz file gzip, too
        if coding not in ("", "gzip", "x-gzip", "zstd"):
            problem = f"Content-Encoding {coding}, expected identity or gzip"
            raise self.error(problem, "Give the address of another copy")

    def receive(self, response: requests.Response, kept: int) -> Path:
        """Write the body after the first `kept` bytes of the .part; returns the path to give it."""
        response.raw.enforce_content_length = True  # urllib3 1.26 does not check it by default
        size = response.raw.length_remaining  # None: the server does not tell
        try:
            if not kept:
                # in this order, so that after a kill no note is next to bytes of another version
                self.note.unlink(missing_ok=True)
                self.part.write_bytes(b"")
                etag = response.headers.get("ETag", "")
                if etag.startswith('"') and not _coding(response):  # a weak ETag does not identify bytes
                    note = {"url_sha256": self.url_sha256, "validator": etag}
                    self.note.write_text(json.dumps(note))
            with (
                self.part.open("r+b") as out,
                progress_bar(desc=self.target.name, total=size and kept + size, unit="B") as bar,
            ):
                bar.update(out.seek(kept))
                out.truncate()
                try:
                    for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                        bar.update(out.write(chunk))
                except urllib3.exceptions.HTTPError as error:
                    problem = f"the body was cut short after {out.tell()} bytes: {_cause(error)}"
                    raise _TransientError(problem) from None
                out.flush()
                os.fsync(out.fileno())
                out.seek(0)
                head = out.read(HEAD_BYTES)
            if not head:
                problem = "the server sent an empty body (0 bytes), expected text"
                raise self.error(problem, "Check the address in a browser")
            if re.match(rb'\s*\{\s*"error"\s*:', head) and b'"text"' not in head:
                problem = f"the server sent an error: {head[:200]!r}"
                raise self.error(problem, "Check the address in a browser")
            return self.stored_path(response, head)
        except OSError:  # also a DownloadError; on a full disk this frees space
            self.discard()
            raise

    def stored_path(self, response: requests.Response, head: bytes) -> Path:
        """The target, with a suffix added if the server's name or the content tell another format."""
        header = Message()
        header["Content-Disposition"] = response.headers.get("Content-Disposition", "")
        after_redirects = urlsplit(response.url).path
        is_table = response.headers.get("Content-Type", "").startswith("text/csv")
        names = (header.get_filename() or "", after_redirects, ".csv" * is_table, self.target.name)
        suffix = next((suffixes(name)[0] for name in names if any(suffixes(name))), "")
        if suffix in ("", ".txt"):
            suffix = rows_format(head) or ".txt"
        added = suffix + compression_of(head)
        if format_of(self.target).name == format_of(Path(added)).name:
            return self.target
        return self.target.with_name(self.target.name + added)

    def discard(self) -> None:
        self.note.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def error(self, problem: str, next_step: str) -> DownloadError:
        problem = f"{redact(self.url)}: {redact(problem)}"
        return DownloadError(f"{problem}. {next_step}, or put the file at {self.target} by hand")


def _is_rest(response: requests.Response, kept: int, validator: str) -> bool:
    """Whether a response holds the rest of a file after `kept` bytes, in the version `validator`."""
    span = re.fullmatch(rf"bytes {kept}-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    # some servers support Range but ignore If-Range, so the response itself must name the version
    same_version = validator == response.headers.get("ETag") and not _coding(response)
    return span is not None and int(span[1]) + 1 == int(span[2]) and same_version


def _coding(response: requests.Response) -> str:
    """The Content-Encoding, or ""."""
    return response.headers.get("Content-Encoding", "").strip().lower().removeprefix("identity")


def _cause(error: Exception) -> str:
    """The innermost reason, without the layers that repeat the address."""
    inner = error.args[0] if error.args else error
    return str(getattr(inner, "reason", inner))
