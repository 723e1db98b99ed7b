"""Tokens → the files of a store below a URL, the manifest last; sent from here, or made there.

    publish(store, "s3://bucket/tokens")                    ->  "s3://bucket/tokens/<fingerprint>"
    publish_text(corpus, tokenizer, "s3://bucket/tokens")   ->  the same, with no store on this machine

Without its manifest nothing opens a store, so that a publication that was killed is none; the next one
sends only what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lit_gptdata._fsspec import is_url
from lit_gptdata._io import sha256_file
from lit_gptdata.text.document import Corpus
from lit_gptdata.tokens.build.encode import Job
from lit_gptdata.tokens.build.local import runner_for
from lit_gptdata.tokens.build.output import AtUrl
from lit_gptdata.tokens.build.parts import progress_of, write_parts
from lit_gptdata.tokens.build.plan import DEFAULT_OPTIONS, BuildOptions, Request
from lit_gptdata.tokens.manifest import FileEntry, Manifest
from lit_gptdata.tokens.remote.objects import Objects
from lit_gptdata.tokens.remote.store import RemoteStore
from lit_gptdata.tokens.store import TokenStore, vocab_table
from lit_gptdata.tokens.tokenizer import Tokenizer

UPLOADS = 8
"""Files that are sent at a time."""


def publish(store: TokenStore, url: str | os.PathLike[str]) -> str:
    """Send a store to `url`/<fingerprint> and return that URL; what is there whole is not sent again.

    Every file's SHA-256 is compared before it is sent, and every size at the URL after. Raises
    ValueError for a damaged store, or if something else is published there; RemoteError.
    """
    if isinstance(store, RemoteStore):
        raise ValueError(f"{store.location} is published already: give a store of this machine")
    target = _target(url, store.fingerprint)
    there = target.sizes()
    if "manifest.json" in there:
        _check_same(store, target)
    missing = [file for file in store.files if there.get(file.name) != file.size]
    with (
        progress_of("publishing", sum(file.size for file in missing)) as progress,
        ThreadPoolExecutor(UPLOADS) as pool,
    ):
        for n_bytes in pool.map(lambda file: _send(store.path, file, target), missing):
            progress.add(n_bytes)
    _check_there(store.files, target)
    if "manifest.json" not in there:
        target.write("manifest.json", (store.path / "manifest.json").read_bytes())
    return target.url


def publish_text(
    corpus: Corpus,
    tokenizer: Tokenizer,
    url: str | os.PathLike[str],
    options: BuildOptions = DEFAULT_OPTIONS,
) -> str:
    """Make a store at `url`/<fingerprint>, unless it is there, and return that URL.

    Whoever tokenises sends the shards: none of them is
    on a disk, or goes through this process. Two at once do the work twice, with one result. Raises
    what `prepare_store` raises, and RemoteError; then nothing is published.
    """
    request = Request(corpus=corpus, tokenizer=tokenizer)
    runner = runner_for(options)
    Objects(url).open()  # what is wrong with it is said before hours of work
    stamps = request.file_stats()
    with runner.session():
        # first, since it names the place where the tokens go: object stores cannot rename
        with progress_of("hashing", request.n_file_bytes) as progress:
            sources = request.sources(progress.add, runner.hash)
        target = _target(url, request.fingerprint(sources))
        job = Job(
            tokenizer=tokenizer,
            destination=AtUrl(target, target),
            engine=options.engine,
            max_document_bytes=options.max_document_bytes,
        )
        notes = Objects(f"{target.url}/.parts-{request.plan(stamps, job)}")
        if "manifest.json" not in target.sizes():
            job = replace(job, destination=AtUrl(target, notes))
            shards = write_parts(corpus, job, runner)
            vocab = vocab_table(tokenizer).tobytes()
            try:
                manifest = request.manifest(sources, shards, vocab)
                if request.file_stats() != stamps:
                    raise request.changed()
            except Exception:
                notes.remove_all()  # of no use to another run
                raise
            target.write("vocab.bin", vocab)
            _check_there(manifest.files, target)
            target.write("manifest.json", manifest.to_json())
        notes.remove_all()
    return target.url


def _target(url: str | os.PathLike[str], fingerprint: str) -> Objects:
    url = os.fspath(url)
    if not is_url(url):  # which means the same in every process
        url = str(Path(url).expanduser().absolute())
    return Objects(f"{url.rstrip('/')}/{fingerprint}")


def _check_same(store: TokenStore, target: Objects) -> None:
    """Raise ValueError unless what is published there are these files; text may have moved since."""
    ours, theirs = store.manifest, Manifest.from_json(target.read("manifest.json"))
    same = (ours.shards, ours.vocab, ours.tokenizer) == (theirs.shards, theirs.vocab, theirs.tokenizer)
    if not same:
        raise ValueError(
            f"{target!r} holds another store of the same name, with other shards: publish to another URL"
        )


def _check_there(files: Iterable[FileEntry], target: Objects) -> None:
    """Raise ValueError unless all files are there, by their sizes."""
    there = target.sizes()
    for file in files:
        if there.get(file.name) != file.size:
            raise ValueError(
                f"{target!r}/{file.name} has {there.get(file.name, 'no')} bytes after it was "
                f"sent, not {file.size:,}: something else writes there. Publish to another URL"
            )


def _send(folder: Path, file: FileEntry, target: Objects) -> int:
    path = folder / file.name
    if (seen := sha256_file(path)) != file.sha256:
        raise ValueError(
            f"{path} has sha256 {seen}, its manifest says {file.sha256}: the store is damaged and "
            f"not published. Delete the folder {folder} and run again to build it anew"
        )
    target.write(file.name, path)
    return file.size
