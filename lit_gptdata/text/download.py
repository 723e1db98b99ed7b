"""One file over HTTP, whole or absent.

    fetch("https://example.org/book.txt", "data/book.txt")  ->  Path("data/book.txt")

Beside `book.txt`, while it is on its way:

    book.txt.lock       held by the process that downloads; the others wait and use its file
    book.txt.part       the bytes so far
    book.txt.part.json  which version these bytes are of; without it a .part is never resumed
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from filelock import FileLock
from tqdm import tqdm

from lit_gptdata._fsspec import redact
from lit_gptdata._io import sha256_file

ATTEMPTS = 5  # in a row that bring no new byte
BACKOFF_S = 0.5  # before the second attempt, then doubled: 7.5 s in all, less the jitter
RETRY_AFTER_CAP_S = 60.0  # a server may ask for an hour; nobody watches a command for that long
TIMEOUT_S = (5.0, 30.0)  # to connect; between two reads
UNREACHABLE_S = 8.0  # no further attempt if nothing ever answered: no network is soon told
CHUNK_BYTES = 1 << 16  # written at a time; the most that a broken connection loses
SNIFF_BYTES = 1 << 12  # of the file's head, searched for an HTML page's first tag

HTML_TYPES = ("text/html", "application/xhtml+xml")
HTML_HEAD = re.compile(rb"[\s\xef\xbb\xbf]*<(!doctype\s+html|html)\b", re.IGNORECASE)

LATER = "Run the same command again later"
OFFLINE = (
    "Check the network, the proxy and the address and run the same command again, or use "
    'data=sample (corpus="sample"), which needs no network'
)

_log = logging.getLogger(__name__)


class DownloadError(OSError):
    """A download that failed; the message says what to do next."""


class _TransientError(Exception):
    """An attempt that failed where another may not."""

    def __init__(self, problem: str, *, answered: bool = True, retry_after_s: float = 0.0) -> None:
        super().__init__(problem)
        self.answered = answered
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class _Job:
    url: str
    target: Path
    sha256: str | None  # 64 lower-case hex digits
    attempts: int  # in a row that bring no new byte
    backoff_s: float
    timeout_s: tuple[float, float]

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def note(self) -> Path:
        return self.target.with_name(self.target.name + ".part.json")

    def discard(self) -> None:
        self.note.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def error(self, problem: str, step: str) -> DownloadError:
        by_hand = f"or put the file at {self.target} by hand"
        return DownloadError(f"{redact(self.url)}: {redact(problem)}. {step}, {by_hand}")


def fetch(
    url: str,
    path: str | os.PathLike[str],
    sha256: str | None = None,
    *,
    attempts: int = ATTEMPTS,
    backoff_s: float = BACKOFF_S,
    timeout_s: tuple[float, float] = TIMEOUT_S,
) -> Path:
    """Download `url` to `path` unless it is there, and return `path`.

    A file that is there is used without asking the network, and never overwritten: it may be yours.
    A download that was interrupted goes on where it stopped if the server still has that version.

    Raises ValueError for a url that is not http(s) or a sha256 that is none, and DownloadError (an
    OSError) for anything else, also for a file at `path` whose hash is not `sha256`.
    """
    _check_arguments(url, sha256)
    job = _Job(
        url=url,
        target=Path(path),
        sha256=sha256.lower() if sha256 else None,
        attempts=attempts,
        backoff_s=backoff_s,
        timeout_s=timeout_s,
    )
    try:
        if not _is_there(job):
            job.target.parent.mkdir(parents=True, exist_ok=True)
            # The lock file stays: whoever waits for it holds it open, and once it were removed the
            # next process would lock another file of the same name.
            with FileLock(f"{job.target}.lock"):
                if not _is_there(job):  # another process may have fetched it while this one waited
                    _download(job)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(
            f"cannot read or write {job.target}: {error.strerror or error} "
            f"({error.filename or job.part}). Free some space or give a folder that can be "
            "written, as in data_dir=/tmp/data, and run the same command again"
        ) from error
    return job.target


def _check_arguments(url: str, sha256: str | None) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a broken IPv6 address
        valid = False
    if not valid:
        raise ValueError(
            f"cannot download {redact(url)!r}: a url begins with http:// or https:// and names a "
            "host. Correct it; for a file on this machine give its path instead"
        )
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(
            f"sha256={sha256!r} is no SHA-256: expected 64 hex digits, as `sha256sum FILE` prints "
            "them, or None for no check"
        )


def _is_there(job: _Job) -> bool:
    if not job.target.exists():
        return False
    if job.target.is_dir():
        raise DownloadError(
            f"{job.target} is a folder, and {redact(job.url)} needs the name of a file: give one, "
            f"such as {job.target / 'corpus.txt'}"
        )
    if job.sha256 and (found := sha256_file(job.target)) != job.sha256:
        raise DownloadError(
            f"{job.target} has sha256 {found}, expected {job.sha256}: another file, or another "
            f"version. Delete it (rm '{job.target}') to download it again, or correct sha256"
        )
    return True


def _download(job: _Job) -> None:
    try:
        with requests.Session() as session:
            session.headers["Accept-Encoding"] = "identity"  # Range counts the bytes that we store
            _attempt_until_done(job, session)
        _publish(job)
    finally:
        if not job.note.exists():  # bytes of an unknown version: nothing could go on from them
            job.part.unlink(missing_ok=True)


def _attempt_until_done(job: _Job, session: requests.Session) -> None:
    start, answered, failures, most = time.monotonic(), False, 0, 0
    while True:
        try:
            return _attempt(job, session)
        except _TransientError as error:
            size = job.part.stat().st_size if job.part.exists() else 0
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            answered = answered or error.answered
            problem = f"{error} (attempt {failures} of {job.attempts} without progress)"
            out_of_time = not answered and time.monotonic() - start > UNREACHABLE_S
            if failures >= job.attempts or out_of_time:
                raise job.error(problem, LATER if answered else OFFLINE) from None
            backoff = job.backoff_s * 2 ** (failures - 1) * random.uniform(0.5, 1)
            wait_s = max(backoff, error.retry_after_s)
            _log.warning("%s: %s, next in %.1f s", *map(redact, (job.url, problem)), wait_s)
            time.sleep(wait_s)


def _attempt(job: _Job, session: requests.Session) -> None:
    """Ask once, and write all of the answer to the .part."""
    keep, validator = _resumable(job)
    headers = {"Range": f"bytes={keep}-", "If-Range": validator} if keep else {}
    # `from None`, here and elsewhere: a chained message would show the query string, tokens and all
    try:
        response = session.get(job.url, headers=headers, stream=True, timeout=job.timeout_s)
    except requests.ReadTimeout:
        raise _TransientError(f"no answer, expected one within {job.timeout_s[1]:g} s") from None
    except requests.ConnectionError as error:  # also: name not found, connect timeout, TLS, proxy
        raise _TransientError(f"cannot be reached: {_cause(error)}", answered=False) from None
    except requests.RequestException as error:  # too many redirects, a redirect to ftp://
        raise job.error(f"cannot be asked for: {error}", "Correct the address") from None
    with response:
        if keep and response.status_code in (206, 416) and not _fits(response, keep, validator):
            job.discard()
            return _attempt(job, session)  # once: now there is nothing left to resume
        _check_answer(job, response, resuming=keep > 0)
        _receive(job, response, keep if response.status_code == 206 else 0)


def _resumable(job: _Job) -> tuple[int, str]:
    """(bytes of the .part to keep, the validator of their version); (0, "") to begin anew."""
    try:
        note = json.loads(job.note.read_bytes())
        if note["url_sha256"] == _text_sha256(job.url):
            # One byte back: if the .part is whole, a Range that begins at its end would be a 416.
            return max(0, job.part.stat().st_size - 1), str(note["validator"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # absent, or cut short by a kill
        pass
    return 0, ""


def _fits(response: requests.Response, keep: int, validator: str) -> bool:
    """Whether the answer goes on at byte `keep`, up to the end, in the version that we have."""
    span = _content_range(response)
    # Some servers honour Range but ignore If-Range: the answer itself has to name the version.
    same_version = validator in (response.headers.get("ETag"), response.headers.get("Last-Modified"))
    return span is not None and span[0] == keep and same_version and not _coding(response)


def _content_range(response: requests.Response) -> tuple[int, int] | None:
    """(first byte, size of the whole) of a range that ends where the whole does, else None."""
    pattern = r"bytes (\d+)-(\d+)/(\d+)"
    match = re.fullmatch(pattern, response.headers.get("Content-Range", ""))
    if match is None or int(match[2]) + 1 != int(match[3]):
        return None
    return int(match[1]), int(match[3])


def _coding(response: requests.Response) -> str:
    coding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if coding == "identity" else coding


def _check_answer(job: _Job, response: requests.Response, *, resuming: bool) -> None:
    status = response.status_code
    seen = f"the server answered HTTP {status} {response.reason or ''}".rstrip()
    if status in (408, 429) or status >= 500:
        retry_after_s = _retry_after_s(response.headers)
        raise _TransientError(f"{seen}, expected 200", retry_after_s=retry_after_s)
    if status != 200 and not (status == 206 and resuming):
        raise job.error(f"{seen}, expected 200", "Check the address in a browser")
    media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type in HTML_TYPES and not _html_is_meant(job.url):
        raise _html_error(job, f"Content-Type {media_type}")
    if _coding(response) not in ("", "gzip", "x-gzip", "deflate"):
        problem = f"Content-Encoding {_coding(response)}, expected identity, gzip or deflate"
        raise job.error(problem, "Unpack it yourself")


def _html_is_meant(url: str) -> bool:
    return urlsplit(url).path.lower().endswith((".html", ".htm", ".xhtml"))


def _html_error(job: _Job, seen: str) -> DownloadError:
    problem = f"the server sent an HTML page ({seen}), expected text"
    return job.error(problem, "Open the address in a browser and take the link to the text itself")


def _retry_after_s(headers: Mapping[str, str]) -> float:
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        seconds = float(value)
    elif (date := _http_date(value)) is not None:
        seconds = (date - datetime.now(timezone.utc)).total_seconds()
    else:
        seconds = 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_CAP_S)


def _http_date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=timezone.utc)


def _start_part(job: _Job, response: requests.Response) -> None:
    """An empty .part, and the note of its version if the server names one.

    In this order: whenever a kill comes, no note stands beside bytes of another version.
    """
    job.note.unlink(missing_ok=True)
    job.part.write_bytes(b"")
    validator = _validator(response.headers)
    if validator and not _coding(response):
        note = {"url_sha256": _text_sha256(job.url), "validator": validator}  # a url holds secrets
        job.note.write_text(json.dumps(note))


def _validator(headers: Mapping[str, str]) -> str | None:
    """What If-Range may carry: a strong ETag or, where there is no ETag, a strong Last-Modified."""
    if "ETag" in headers:
        return headers["ETag"] if headers["ETag"].startswith('"') else None
    changed, now = _http_date(headers.get("Last-Modified", "")), _http_date(headers.get("Date", ""))
    if changed is None or now is None or now - changed < timedelta(seconds=1):
        return None  # it may change again within that second: RFC 9110, 8.8.2.2
    return headers["Last-Modified"]


def _receive(job: _Job, response: requests.Response, keep: int) -> None:
    """Put the body after the first `keep` bytes of the .part, and make sure it is all there."""
    raw, coded = response.raw, bool(_coding(response))
    wire_bytes: int | None = raw.length_remaining  # None: the server does not say
    size = None if coded else wire_bytes
    if keep and (span := _content_range(response)):
        size = span[1]
    name = job.target.name
    try:
        if keep == 0:
            _start_part(job, response)
        with (
            job.part.open("r+b") as out,
            tqdm(desc=name, total=size, unit="B", unit_scale=True, disable=None) as bar,
        ):
            bar.update(out.seek(keep))
            out.truncate()
            for chunk in raw.stream(CHUNK_BYTES, decode_content=coded):
                bar.update(out.write(chunk))
            got, expected = (raw.tell(), wire_bytes) if coded else (out.tell(), size)
            if expected is not None and got != expected:
                raise _TransientError(f"the body was cut short: {got} bytes, expected {expected}")
            out.flush()
            os.fsync(out.fileno())
    except urllib3.exceptions.HTTPError as error:
        got, of = job.part.stat().st_size, "" if size is None else f", expected {size}"
        problem = f"the body was cut short: {got} bytes{of} ({_cause(error)})"
        raise _TransientError(problem) from None
    except OSError:
        job.discard()  # a full disk gets its room back
        raise


def _publish(job: _Job) -> None:
    """Check what the .part holds, and give it its name."""
    with job.part.open("rb") as file:
        head = file.read(SNIFF_BYTES)
    error: DownloadError | None = None
    if not head:
        problem = "the server sent an empty body (0 bytes), expected text"
        error = job.error(problem, "Check the address in a browser")
    elif HTML_HEAD.match(head) and not _html_is_meant(job.url):
        error = _html_error(job, f"it begins with {head.lstrip()[:40]!r}")
    elif job.sha256 and (found := sha256_file(job.part)) != job.sha256:
        problem = f"sha256 is {found}, expected {job.sha256}; what was downloaded is removed"
        error = job.error(problem, "Correct sha256 or run the same command again")
    if error:
        job.discard()
        raise error
    os.replace(job.part, job.target)
    job.note.unlink(missing_ok=True)


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _cause(error: Exception) -> str:
    """The reason at the bottom, without the layers that repeat the address."""
    inner = error.args[0] if error.args else error
    return str(getattr(inner, "reason", inner))
