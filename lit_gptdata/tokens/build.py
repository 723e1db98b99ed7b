"""Corpus × tokenizer → TokenStore: found if it is there, else built under a lock and published.

<root>/<fingerprint>/     published stores
<root>/.requests/<key>    which store answers (paths, tokenizer), with the sizes and times seen
<root>/.building/<key>/   a build under way, or one that was killed and will be taken up again
<root>/.locks/<key>       held by the one builder; the system frees it when the process dies
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from lit_gptdata._io import sha256_file, sync_folder, write_json, write_whole
from lit_gptdata.text.document import Corpus, Document
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.shard import ShardWriter, described
from lit_gptdata.tokens.store import FORMAT, TokenStore, vocab_table
from lit_gptdata.tokens.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def find_store(corpus: Corpus, tokenizer: Tokenizer, root: Path) -> TokenStore | None:
    """The published store of a corpus, known by its files' sizes and times; none of them is read."""
    request = _request_path(corpus, tokenizer, root)
    try:
        answer = json.loads(request.read_bytes())
    except FileNotFoundError:
        return None
    if answer["stamps"] != _stamps(corpus) or not (root / answer["fingerprint"]).is_dir():
        return None
    return TokenStore(root / answer["fingerprint"])


def prepare_store(corpus: Corpus, tokenizer: Tokenizer, root: Path) -> TokenStore:
    """The store of a corpus, built if need be; of many processes one builds and the others wait."""
    store = find_store(corpus, tokenizer, root)
    if store is not None:
        return store
    key = _key(corpus, tokenizer)
    for folder in (".requests", ".building", ".locks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with _held(FileLock(root / ".locks" / key), f"the tokens of {corpus!r}"):
        store = find_store(corpus, tokenizer, root)  # another process may have built it meanwhile
        if store is not None:
            return store
        stamps = _stamps(corpus)
        sources = _sources(corpus)
        fingerprint = _fingerprint(tokenizer, sources, _reading(corpus))
        building = root / ".building" / key
        if not (root / fingerprint).is_dir():
            shutil.rmtree(building, ignore_errors=True)
            (building / "store").mkdir(parents=True)
            _build(corpus, tokenizer, building / "store", fingerprint, sources)
        if _stamps(corpus) != stamps:
            raise RuntimeError(f"{corpus!r} changed while it was read: run again")
        write_json(
            _request_path(corpus, tokenizer, root), {"stamps": stamps, "fingerprint": fingerprint}
        )
        if not (root / fingerprint).is_dir():
            os.rename(building / "store", root / fingerprint)
            sync_folder(root)
        shutil.rmtree(building, ignore_errors=True)
        return TokenStore(root / fingerprint)


@contextlib.contextmanager
def _held(lock: FileLock, what: str) -> Iterator[None]:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for another process that makes %s (lock %s)", what, lock.lock_file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    fingerprint: str,
    sources: list[dict[str, Any]],
) -> None:
    """Write shards and manifest into `folder`."""
    shards = _write_shards(corpus, tokenizer, folder)
    vocab = vocab_table(tokenizer).tobytes()
    write_whole(folder / "vocab.bin", vocab)
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "tokenizer": {
            "name": tokenizer.name,
            "special_tokens": tokenizer.special_tokens,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "dtype": tokenizer.dtype.str,
        },
        **{count: sum(s[count] for s in shards) for count in ("n_tokens", "n_bytes", "n_documents")},
        "sources": sources,
        "vocab": described("vocab.bin", vocab),
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)


def _write_shards(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> list[dict[str, Any]]:
    writer = ShardWriter(folder, "00000-000", tokenizer.dtype)
    separator = np.array([tokenizer.end_of_text], dtype=tokenizer.dtype)
    try:
        for number, document in enumerate(corpus):
            if number:
                writer.append(separator, 0)
            text = "".join(document.chunks)
            writer.begin_piece(source=0, document=True)
            writer.append(np.array(_encode(tokenizer, document, text)), len(text.encode()))
        return [writer.finish()]
    except BaseException:
        writer.abandon()
        raise


def _encode(tokenizer: Tokenizer, document: Document, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"{document.source}: {error}") from None


def _stamps(corpus: Corpus) -> list[list[str | int]]:
    return corpus.stamps() if isinstance(corpus, FilesCorpus) else [[repr(corpus), corpus.fingerprint]]


def _reading(corpus: Corpus) -> dict[str, Any]:
    """How the same bytes become text."""
    if isinstance(corpus, FilesCorpus):
        return {"errors": corpus.encoding_errors, "strip_gutenberg": corpus.strip_gutenberg}
    return {}


def _sources(corpus: Corpus) -> list[dict[str, Any]]:
    """What the tokens come from, for the manifest: path, size in bytes, sha256."""
    if isinstance(corpus, FilesCorpus):
        return [
            {"path": str(p), "size": p.stat().st_size, "sha256": sha256_file(p)} for p in corpus.files
        ]
    return [{"path": repr(corpus), "size": None, "sha256": corpus.fingerprint}]


def _fingerprint(tokenizer: Tokenizer, sources: list[dict[str, Any]], reading: dict[str, Any]) -> str:
    """What the store is named by: contents and tokenizer, not paths and times."""
    return _hash([FORMAT, tokenizer.fingerprint, reading, [source["sha256"] for source in sources]])


def _key(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """What a request is named by, before any content is read: paths and tokenizer."""
    names = [stamp[0] for stamp in _stamps(corpus)]
    return _hash([FORMAT, tokenizer.fingerprint, _reading(corpus), names])


def _request_path(corpus: Corpus, tokenizer: Tokenizer, root: Path) -> Path:
    return root / ".requests" / f"{_key(corpus, tokenizer)}.json"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
