"""What any URL of fsspec asks for: its file system, second attempts, and no secret in a message.

    fs, path = filesystem("s3://bucket/book.txt")
    info = retry("s3://bucket/book.txt", lambda failures: fs.info(path))

fsspec is imported here only, and only once there is a URL.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

ATTEMPTS = 5  # in a row that bring nothing; each has the file system's own retries inside
BACKOFF_S = 0.5  # before the second attempt, then doubled: 7.5 s in all, less the jitter
UNREACHABLE_S = 8.0  # no further attempt at a first contact: no network is soon told

NO_SECRET_TAKEN = ("s3", "s3a", "gs", "gcs", "hf")
"""Schemes whose file systems would take user:password@ for a part of the name."""

PACKAGES = {
    "s3": "s3fs: pip install 'lit-gptdata[s3]'",
    "s3a": "s3fs: pip install 'lit-gptdata[s3]'",
    "gs": "gcsfs: pip install 'lit-gptdata[gcs]'",
    "gcs": "gcsfs: pip install 'lit-gptdata[gcs]'",
    "hf": "huggingface_hub: pip install huggingface_hub",
    "http": "aiohttp: pip install 'lit-gptdata[http]'",
    "https": "aiohttp: pip install 'lit-gptdata[http]'",
}

AWS = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE and ~/.aws, or the machine's role; "
    "FSSPEC_S3_ANON=true reads a public bucket without any"
)
GOOGLE = (
    "GOOGLE_APPLICATION_CREDENTIALS, what `gcloud auth application-default login` left, or the "
    "machine's role; FSSPEC_GS_TOKEN=anon reads a public bucket without any"
)
CREDENTIALS = {
    "s3": AWS,
    "s3a": AWS,
    "gs": GOOGLE,
    "gcs": GOOGLE,
    "hf": "HF_TOKEN, and what `hf auth login` left",
}

_ABOUT_CREDENTIALS = re.compile("Credential|Token|Auth|Profile")  # in the name of an error's type
_LASTING = (ImportError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError)
_LASTING_ERRNO = (
    errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG,
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG,
)  # fmt: skip
_PASSING_STATUS = (408, 409, 425, 429)

_log = logging.getLogger(__name__)

T = TypeVar("T")


class RemoteError(OSError):
    """What lies at a URL cannot be read or written; the message says what to do next."""


class RemoteNotFoundError(RemoteError, FileNotFoundError):
    """Nothing lies at a URL, or no more."""


class RemotePermissionError(RemoteError, PermissionError):
    """The credentials that were found do not open a URL, or none were."""


def redact(text: str) -> str:
    """`text` without a URL's user:password and without its query string.

    A `?` of a glob is kept where the scheme is not http(s): "s3://bucket/part-?.txt".
    """
    text = re.sub(r"(?<=://)[^/?#\s]*@", "***@", text)
    url = r"(\b(?!https?:)[a-z][\w+.-]*://[^\s?'\")]*)?"
    return re.sub(url + r"(\?[^\s'\")]+)", _without_query, text)


def redacted(corpus: object) -> str:
    """What a user calls a corpus, without the secrets of its URLs; the `?` of a local glob is kept."""
    return redact(str(corpus)) if "://" in str(corpus) else str(corpus)


def _without_query(found: re.Match[str]) -> str:
    if found[1] and "=" not in found[2]:
        return found[0]
    return f"{found[1] or ''}?…"


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it; credentials come from its own places.

    Raises ValueError for a scheme that fsspec does not know, ImportError with the pip line of a
    package that is missing.
    """
    import fsspec

    scheme = url.partition("://")[0]
    if "::" in url:
        raise ValueError(f"{redact(url)}: a chain of file systems (::) is not read; give a plain URL")
    if scheme in NO_SECRET_TAKEN and "@" in url.split("/")[2]:
        raise ValueError(
            f"{redact(url)}: a {scheme}:// URL holds no credentials; they are looked for in "
            f"{CREDENTIALS[scheme]}"
        )
    # else a web server may pack what it sends, and its ranges count packed bytes
    plain = {"client_kwargs": {"headers": {"Accept-Encoding": "identity"}}}
    try:
        fs, path = fsspec.core.url_to_fs(url, **(plain if scheme in ("http", "https") else {}))
    except ImportError as error:
        needed = f" needs {PACKAGES[scheme]}" if scheme in PACKAGES else f": {error}"
        raise ImportError(redact(url) + needed) from error
    except Exception as error:
        if scheme not in fsspec.available_protocols():
            raise ValueError(
                f"{redact(url)}: unknown scheme {scheme!r}; fsspec knows "
                f"{', '.join(sorted(fsspec.available_protocols()))}"
            ) from None
        raise _lasting(url, error) or RemoteError(f"{redact(url)}: {_said(error)}") from None
    return fs, path


def retry(
    url: str, attempt: Callable[[int], T], *, first_contact: bool = False, done: str = "read"
) -> T:
    """`attempt(failures so far)`, until it succeeds or has failed too often; `done`: what to `url`.

    Raises RemoteError, which names `url`: RemoteNotFoundError and RemotePermissionError at once.
    """
    start = time.monotonic()
    failures = 0
    while True:
        try:
            return attempt(failures)
        except Exception as error:
            # `from None`, here and elsewhere: a chained message would show the URL, secrets and all
            lasting = _lasting(url, error, done)
            if lasting is not None:
                raise lasting from None
            failures += 1
            seen = f"{_said(error)} (attempt {failures} of {ATTEMPTS})"
            out_of_time = first_contact and time.monotonic() - start > UNREACHABLE_S
            if failures >= ATTEMPTS or out_of_time:
                raise RemoteError(
                    f"{redact(url)} cannot be {done}: {seen}. Check the network and the address, and "
                    "run the same command again; what is whole is kept"
                ) from None
        wait_s = BACKOFF_S * 2 ** (failures - 1) * random.uniform(0.5, 1)
        _log.warning("%s: %s, next in %.1f s", redact(url), seen, wait_s)
        time.sleep(wait_s)


def _lasting(url: str, error: Exception, done: str = "read") -> RemoteError | None:
    """What to raise for a failure that no second attempt mends; None for one that may pass."""
    status, scheme = _status(error), url.partition("://")[0]
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return RemoteNotFoundError(f"{redact(url)} does not exist ({_said(error)}): check the address")
    about_credentials = _ABOUT_CREDENTIALS.search(type(error).__name__)
    if isinstance(error, PermissionError) or status in (401, 403) or about_credentials:
        _forget_file_system(url)
        where = CREDENTIALS.get(scheme, "the places that fsspec's file system for it documents")
        return RemotePermissionError(
            f"{redact(url)} may not be {done} ({_said(error)}). Credentials are looked for in {where}"
        )
    client_error = status is not None and 400 <= status < 500 and status not in _PASSING_STATUS
    refused = isinstance(error, OSError) and error.errno in _LASTING_ERRNO
    if isinstance(error, _LASTING) or client_error or refused:
        return RemoteError(f"{redact(url)} cannot be {done}: {_said(error)}")
    return None


def _forget_file_system(url: str) -> None:
    """Let the next attempt, after the user has set other credentials, find them."""
    import fsspec

    fsspec.get_filesystem_class(url.partition("://")[0]).clear_instance_cache()


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error, whatever library raised it."""
    response = getattr(error, "response", None)
    for holder, name in ((error, "status"), (response, "status_code"), (error, "code")):
        status = getattr(holder, name, None)
        if isinstance(status, int):
            return status
    return None


def _said(error: Exception) -> str:
    said = redact(str(error)).strip()
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
