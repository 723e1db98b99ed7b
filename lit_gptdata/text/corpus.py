"""Turn what a user calls a corpus into a Corpus. This is the only place that guesses.

open_corpus("sample") | open_corpus("https://…/book.txt") | open_corpus("s3://…/*.jsonl.gz") | …
"""

import hashlib
import os
import re
import reprlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from lit_gptdata._checks import hydra_quotes
from lit_gptdata._fsspec import is_url, redact
from lit_gptdata.text.document import Corpus
from lit_gptdata.text.download import fetch, find_download
from lit_gptdata.text.files import FilesCorpus, PathLike, check_names, flatten
from lit_gptdata.text.formats import Reading
from lit_gptdata.text.sample import SampleCorpus

NAMED_URLS = {
    "frankenstein": "https://www.gutenberg.org/cache/epub/84/pg84.txt",
    "tinyshakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
}

# Without Path, LightningCLI would take a path for its own path of a YAML file. With os.PathLike, which
# works, too, it would take any object for a path, such as a source with a misspelled option.
CorpusLike = str | Sequence[str | Path] | Path | Corpus


def open_corpus(
    corpus: CorpusLike,
    *,
    downloads: Path = Path("data/downloads"),
    download: bool = True,
    stream: bool = False,
    reading: Reading | None = None,
    folder: Path | None = None,
    not_searched: frozenset[str] = frozenset(),
    keep_empty: bool = False,
) -> Corpus:
    """Open `"sample"`, another name, a URL, a path, a folder, a glob or a list of these as a Corpus.

    Files at http(s) URLs are downloaded to the folder `downloads`; with `download=False` they must be
    there. With `stream` they are read from the URL, as files at s3://, gs://, hf://, … always are.
    Relative paths start in `folder`, by default the current folder. Folders in `not_searched`, real
    paths, are left out of a search.
    Raises TypeError for other objects, ValueError for an invalid URL or unknown scheme,
    FileNotFoundError, DownloadError, RemoteError (an OSError), ImportError for a missing extra.
    """
    if isinstance(corpus, Corpus):
        return corpus
    entries = corpus_names(corpus)
    if entries == ["sample"]:
        return SampleCorpus()
    names: list[PathLike] = []
    for entry in entries:
        name = NAMED_URLS.get(entry, entry) if isinstance(entry, str) else os.fspath(entry)
        if entry == "stdlib":  # a path of that name is not equal
            names += _stdlib()
        elif is_url(name) and name.lower().startswith(("http://", "https://")) and not stream:
            names.append(_downloaded(name, downloads, download))
        else:
            names.append(name)
    return FilesCorpus(names, reading, folder, not_searched, keep_empty)


def corpus_names(corpus: CorpusLike) -> list[PathLike]:
    """The names in `corpus`, not checked on disk; raises TypeError or ValueError for other objects."""
    entries = list(flatten(corpus))
    check_names(entries)
    if entries == ["sample"]:
        return entries
    for entry in entries:
        if entry == "sample":
            raise ValueError("corpus='sample' cannot be part of a list. A file of that name is ./sample")
        if not isinstance(entry, (str, os.PathLike)):
            problem = f"expected the name of a text, got {type(entry).__name__}"
            advice = (
                f"Give 'sample', 'stdlib', one of {sorted(NAMED_URLS)}, a URL, a path, a glob or a list"
            )
            quotes = hydra_quotes("corpus", entry)
            raise TypeError(f"corpus={reprlib.repr(corpus)}: {problem}. {advice}{quotes}")
    return entries


def _stdlib() -> list[Path]:
    """The modules at the top of Python's standard library: over 4 MB of code, without a download."""
    folder = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in folder.glob("*.py") if path.is_file() and path.stat().st_size)


def _downloaded(url: str, downloads: Path, download: bool) -> Path:
    """The file in `downloads` of an http(s) URL, which is downloaded now or must be there."""
    path = download_path(url, downloads)
    if download:
        return fetch(url, path)
    if (found := find_download(path)) is None:
        raise FileNotFoundError(f"{redact(url)} is not downloaded yet: no {path}. Call prepare_data()")
    return found


def download_path(url: str, downloads: Path) -> Path:
    """The file name of a URL and a hash of all of it: `…/84/pg84.txt` -> downloads/pg84-1f2e3d4c.txt."""
    name = Path(urlsplit(url).path).name or "index.txt"
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-80:]
    stem, dot, suffixes = name.partition(".")
    key = hashlib.sha256(url.encode()).hexdigest()[:8]
    return downloads / f"{stem}-{key}{dot}{suffixes}"
