"""The one place that guesses: what a user calls a corpus → a Corpus.

open_corpus("sample") | open_corpus("https://…/book.txt") | open_corpus("s3://…/*.jsonl.gz") | …
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lit_gptdata._fsspec import redact
from lit_gptdata.text.document import Corpus
from lit_gptdata.text.download import fetch
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import Reading
from lit_gptdata.text.sample import SampleCorpus

NAMED_URLS = {
    "frankenstein": "https://www.gutenberg.org/cache/epub/84/pg84.txt",
    "tinyshakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
}

PathLike = str | os.PathLike[str]
# LightningCLI takes the first that fits: last a PathLike, which to it is whatever has a str(). Without
# Path it would take a path for its own, of a YAML file with the value.
CorpusLike = str | Sequence[PathLike] | Corpus | Path | os.PathLike[str]


def open_corpus(
    corpus: CorpusLike,
    *,
    downloads: Path = Path("data/downloads"),
    download: bool = True,
    stream: bool = False,
    reading: Reading | None = None,
) -> Corpus:
    """Turn `"sample"`, a name, a URL, a path, a folder, a glob or a list of these into a Corpus.

    `downloads`: where texts of http(s) are kept; `download=False` only looks there; `stream`: they are
    read where they are, as those of other URLs (s3://, gs://, hf://, …) always. `reading`: how files
    become documents.
    Raises TypeError for anything else, ValueError for a scheme that fsspec does not know,
    FileNotFoundError, DownloadError, RemoteError (an OSError), ImportError for an extra that is missing.
    """
    if isinstance(corpus, Corpus) and not isinstance(corpus, (str, bytes, list, tuple)):
        return corpus
    if isinstance(corpus, str) and corpus == "sample":
        return SampleCorpus()
    entries: list[Any] = list(corpus) if isinstance(corpus, (list, tuple)) else [corpus]
    for entry in entries:
        if not isinstance(entry, (str, os.PathLike)):
            raise TypeError(
                f"corpus={corpus!r}: a {type(entry).__name__} names no text. Give 'sample', one of "
                f"{sorted(NAMED_URLS)}, a URL, a path, a folder, a glob, a list of these, or an object "
                "with __iter__ and fingerprint (lit_gptdata.text.document.Corpus)"
            )
    keep = () if stream else ("http://", "https://")
    paths = [_kept(entry, downloads, download, keep) for entry in entries]
    return FilesCorpus(paths, reading)


def _kept(entry: PathLike, downloads: Path, download: bool, keep: tuple[str, ...]) -> PathLike:
    """The path of an entry whose URL begins with one of `keep`, after it was downloaded; or itself."""
    url = NAMED_URLS.get(str(entry), str(entry))
    if not url.lower().startswith(keep):
        return url if "://" in url else entry
    path = download_path(url, downloads)
    if download:
        return fetch(url, path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{redact(url)} is not downloaded yet: {path} does not exist. Call prepare_data() first"
        )
    return path


def download_path(url: str, downloads: Path) -> Path:
    """Where a URL is kept: its own file name, made unique by a hash of the whole URL.

    `…/84/pg84.txt`  ->  downloads/pg84-1f2e3d4c.txt
    """
    name = Path(urlsplit(url).path).name or "index.txt"
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-80:]
    stem, dot, suffixes = name.partition(".")
    key = hashlib.sha256(url.encode()).hexdigest()[:8]
    return downloads / f"{stem}-{key}{dot}{suffixes or ''}"
