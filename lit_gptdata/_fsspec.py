"""Reach any URL that fsspec knows: its file system, retries, and messages without secrets.

fs, path = filesystem("s3://bucket/book.txt")  # imports fsspec
info = retry("s3://bucket/book.txt", lambda: fs.info(path))
"""

import contextlib
import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

ATTEMPTS = 5  # in a row without progress; each one contains the file system's own retries
BACKOFF_S = 0.5  # before the second attempt, then doubled: at most 7.5 s in total
RETRY_AFTER_CAP_S = 60.0  # a server may ask for an hour, and no user waits that long

PACKAGES = {
    "s3": "s3fs: pip install 'lit-gptdata[s3]'",
    "gs": "gcsfs: pip install 'lit-gptdata[gcs]'",
    **dict.fromkeys(("http", "https"), "aiohttp: pip install 'lit-gptdata[http]'"),
    "hf": "huggingface_hub: pip install huggingface_hub",
}
# Scheme → where credentials are looked for. Its file system reads user:password@ as part of a name.
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE and ~/.aws, or the machine's role; "
    "FSSPEC_S3_ANON=true reads a public bucket without credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, the login of `gcloud auth application-default login`, or the "
    "machine's role; FSSPEC_GS_TOKEN=anon reads a public bucket without credentials",
    "hf": "HF_TOKEN, and the login of `hf auth login`",
}

_CREDENTIAL_ERROR = re.compile("Credential|Token|Auth|Profile")  # in the name of an error's type
_PERMANENT = (ImportError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PERMANENT_ERRNO = (
    errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.EROFS, errno.ENOTDIR,
    *_FULL_DISK,
)  # fmt: skip

_log = logging.getLogger(__name__)

T = TypeVar("T")


class RemoteError(OSError):
    """A URL cannot be read or written; the message names the next step."""


class RemoteNotFoundError(RemoteError, FileNotFoundError):
    """A URL does not exist, or no longer exists."""


class RemotePermissionError(RemoteError, PermissionError):
    """Access to a URL was denied: credentials are missing or do not grant it."""


def is_url(name: object) -> bool:
    """Whether a user's name for a file is a URL, not a path: "s3://bucket/a.txt" -> True."""
    return bool(re.match(r"[a-zA-Z][\w+.:-]*://[^\n]*$", str(name)))


def canonical(url: str) -> str:
    """One spelling of a URL: s3a://b/x and s3:///b/x -> s3://b/x."""
    scheme, _, rest = url.partition("://")
    return f"{({'s3a': 's3', 'gcs': 'gs'}).get(scheme, scheme)}://{rest.lstrip('/')}"


def local_path(name: str | os.PathLike[str]) -> str | None:
    """The path that a path or file:// URL names, with `~` expanded; None for other URLs."""
    name = os.fspath(name)
    if not name.lower().startswith("file://"):
        return None if is_url(name) else os.path.expanduser(name)
    path = os.fsdecode(unquote_to_bytes(name[len("file://") :])).removeprefix("localhost")
    if not path.startswith("/"):
        raise ValueError(f"{name} is not a path on this machine: give file:///… or a path")
    return path


def redact(text: str) -> str:
    """`text` without user:password and query of its URLs; the `?` of a glob stays: s3://a/b-?.txt."""
    text = re.sub(r"(?<=://)[^/?#\s]*@", "***@", text)
    pattern = r"(\b(?!https?:)[a-z][\w+.-]*://[^\s?'\")]*)?(\?[^\s'\")]+)"
    return re.sub(pattern, lambda m: m[0] if m[1] and "=" not in m[2] else f"{m[1] or ''}?…", text)


def redacted(corpus: object) -> str:
    """A user's name for a corpus without the secrets of its URLs; a path keeps its `?`."""
    return redact(str(corpus)) if "://" in str(corpus) else str(corpus)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it; raises ValueError or ImportError."""
    import fsspec

    scheme = canonical(url).partition("://")[0]
    if "::" in url:
        raise ValueError(f"{redact(url)}: chained file systems (::) are not supported; give a plain URL")
    if scheme in CREDENTIALS and "@" in url.split("/")[2]:
        raise ValueError(f"{redact(url)}: give no credentials in a URL, but in {CREDENTIALS[scheme]}")
    if is_url(url) and scheme not in fsspec.available_protocols():
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise ValueError(f"{redact(url)}: unknown scheme {scheme!r}; fsspec knows {known}")
    # otherwise a web server may compress the response, and its ranges count compressed bytes
    plain = {"client_kwargs": {"headers": {"Accept-Encoding": "identity"}}}
    try:
        fs, path = fsspec.core.url_to_fs(url, **(plain if scheme in ("http", "https") else {}))
        return fs, path
    except ImportError as error:
        needed = f" needs {PACKAGES[scheme]}" if scheme in PACKAGES else f": {error}"
        raise ImportError(redact(url) + needed) from error
    except Exception as error:
        raise _permanent_error(url, error) or RemoteError(f"{redact(url)}: {_describe(error)}") from None


class Retries:
    """The retry policy of one transfer: it counts failed attempts, waits, and gives up."""

    def __init__(self, url: str) -> None:
        self.failures = 0  # in a row; set it to 0 after progress
        self._url = url

    def give_up(self, problem: str, retry_after: str = "0") -> str:
        """Count a failed attempt and wait; returns "", or the problem if it was the last attempt."""
        import urllib3

        self.failures += 1
        problem = redact(f"{problem} (attempt {self.failures} of {ATTEMPTS})")
        if self.failures >= ATTEMPTS:
            return problem
        wait_s = BACKOFF_S * 2 ** (self.failures - 1) * random.uniform(0.5, 1)
        with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
            asked_s = urllib3.Retry().parse_retry_after(retry_after)  # of a number or a date
            wait_s = max(wait_s, min(asked_s, RETRY_AFTER_CAP_S))
        _log.warning("%s: %s, next in %.1f s", redact(self._url), problem, wait_s)
        time.sleep(wait_s)
        return ""


def is_transient(status: int) -> bool:
    """Whether a request that failed with this HTTP status may succeed later."""
    return status in (408, 409, 425, 429) or status >= 500


def retry(url: str, attempt: Callable[[], T], done: str = "read") -> T:
    """The result of `attempt()`, which is called until it succeeds.

    `done` completes "URL cannot be …". Raises RemoteError, at once if no other attempt can succeed.
    """
    retries = Retries(url)
    while True:
        try:
            return attempt()
        except Exception as error:
            # `from None`, here and elsewhere: a chained message would show the URL with its secrets
            if permanent := _permanent_error(url, error, done):
                raise permanent from None
            problem = _describe(error)
        # not inside `except`: after Ctrl-C while it waits, Python would print the error with its URL
        if problem := retries.give_up(problem):
            advice = "Check the network and the address, and run again; finished files are kept"
            raise RemoteError(f"{redact(url)} cannot be {done}: {problem}. {advice}")


def _permanent_error(url: str, error: Exception, done: str = "read") -> RemoteError | None:
    """The error to raise if another attempt cannot help; None for an error that may pass."""
    status, cause = _status(error), _describe(error)
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return RemoteNotFoundError(f"{redact(url)} does not exist ({cause}): check the address")
    credentials = _CREDENTIAL_ERROR.search(type(error).__name__)
    if isinstance(error, PermissionError) and local_path(url) is not None:
        advice = "give another folder, or change its permissions"
        return RemotePermissionError(f"{redact(url)} may not be {done} ({cause}): {advice}")
    if isinstance(error, PermissionError) or status in (401, 403) or credentials:
        import fsspec

        scheme = canonical(url).partition("://")[0]
        # otherwise new credentials that the user sets would not be used
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
        where = CREDENTIALS.get(scheme, "the places that fsspec's file system for it documents")
        problem = f"{redact(url)} may not be {done} ({cause})"
        return RemotePermissionError(f"{problem}. Credentials are looked for in {where}")
    client_error = status is not None and status >= 400 and not is_transient(status)
    refused = isinstance(error, OSError) and error.errno in _PERMANENT_ERRNO
    if isinstance(error, _PERMANENT) or client_error or refused:
        is_full = getattr(error, "errno", None) in _FULL_DISK
        advice = ". Free some space there, and run again" if is_full else ""
        return RemoteError(f"{redact(url)} cannot be {done}: {cause}{advice}")
    return None


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error, whichever library raised it."""
    response = getattr(error, "response", None)
    names = ((error, "status"), (response, "status_code"), (error, "code"))
    found = (getattr(holder, name, None) for holder, name in names)
    return next((status for status in found if isinstance(status, int)), None)


def _describe(error: Exception) -> str:
    message = redact(str(error)).strip()
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
