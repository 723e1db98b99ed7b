"""Find or build the token store of a corpus in a folder on this machine.

<root>/<fingerprint>/           a published store
<root>/.requests/<key>.json     a lookup record: sizes and times of the files, and a fingerprint
<root>/.building/<key>-<hash>/  a build in progress, or a killed one that the next run continues
<root>/.locks/<key>             locked by the process that builds; its death unlocks it

The key identifies the paths and the tokenizer; the fingerprint identifies the contents.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from lit_gptdata._io import locked, sync_folder, write_json, write_whole
from lit_gptdata.text.document import Corpus, SourceEntry
from lit_gptdata.tokens.build.encode import Runner, encode_corpus
from lit_gptdata.tokens.build.output import Folder, ShardOutput
from lit_gptdata.tokens.build.plan import (
    DEFAULT_OPTIONS,
    BuildOptions,
    BuildPlan,
    PlanCorpus,
    as_plan_corpus,
    check_document,
    lookup_key,
)
from lit_gptdata.tokens.build.processes import encode_units
from lit_gptdata.tokens.shards import writing
from lit_gptdata.tokens.store import TokenStore, vocab_table
from lit_gptdata.tokens.tokenizer import Tokenizer

ABANDONED_DAYS = 7  # a build removes killed builds of other corpora that nobody continued for so long


def find_store(
    corpus: Corpus, tokenizer: Tokenizer, root: Path, options: BuildOptions = DEFAULT_OPTIONS
) -> TokenStore | None:
    """The published store of a corpus, or None; compares sizes and times of the files and reads none."""
    plan_corpus = as_plan_corpus(corpus)
    return _look_up(root, lookup_key(plan_corpus, tokenizer, options), plan_corpus)


def prepare_store(
    corpus: Corpus, tokenizer: Tokenizer, root: Path, options: BuildOptions = DEFAULT_OPTIONS
) -> TokenStore:
    """Find or build the store of a corpus. Of several processes, one builds and the others wait.

    Raises ValueError for a text, OSError for a folder, ConnectionError; then nothing is published.
    """
    plan_corpus = as_plan_corpus(corpus)
    key = lookup_key(plan_corpus, tokenizer, options)
    store = _look_up(root, key, plan_corpus, check_contents=True)
    if store is not None:
        for folder in _builds(root, key):  # left by a kill after publishing
            _remove_build(root, folder)
        return _checked(store, options)
    runner = make_runner(options)
    with writing(root):
        for name in (".requests", ".building", ".locks"):
            (root / name).mkdir(parents=True, exist_ok=True)
        with locked(root / ".locks" / key, f"builds the tokens of {corpus!r}"):
            # another process may have built it in the meantime
            store = _look_up(root, key, plan_corpus, check_contents=True)
            if store is None:
                _lookup_record(root, key).unlink(missing_ok=True)  # `find_store` reads no contents
                _remove_leftovers(root, key)
                store = _publish_store(BuildPlan(plan_corpus, tokenizer, options), root, runner)
    return _checked(store, options)


def _checked(store: TokenStore, options: BuildOptions) -> TokenStore:
    """The store, which an earlier run may have built; raises ValueError for a bad document."""
    low, high = options.min_document_bytes, options.max_document_bytes
    if (low or high) and options.on_bad_document == "error":
        rows = store.document_rows()
        lengths = np.diff(rows["byte"], append=store.n_bytes)
        for row in (int(lengths.argmax()), int(lengths.argmin())):
            name = f"{store.source_of(rows[row])}: document {row + 1}"
            check_document(name, int(lengths[row]), low, high)
    return store


def make_runner(options: BuildOptions) -> Runner:
    """The runner that the options name; raises ImportError if the package ray is missing."""
    if options.build == "processes":
        return encode_units
    import lit_gptdata.tokens.build.ray_tasks as ray_tasks

    return ray_tasks.encode_units


def _look_up(
    root: Path, key: str, corpus: PlanCorpus, check_contents: bool = False
) -> TokenStore | None:
    """The recorded store of unchanged files; with `check_contents` they keep their ctime and inode."""
    try:
        record = json.loads(_lookup_record(root, key).read_bytes())
        path, stats = root / (record["fingerprint"] or "missing"), record["stamps"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: `prepare_store` writes it again
    # compare the stats last, because a remote corpus has to list its files for them
    if not path.is_dir() or stats != corpus.file_stats():
        return None
    if check_contents and record.get("contents") != corpus.contents():
        return None
    return TokenStore(path)


def _publish_store(plan: BuildPlan, root: Path, runner: Runner) -> TokenStore:
    """Build the store and give it its name, unless a store of the same contents exists."""
    # each plan has its own folder, so a cluster node that still works on an older plan disturbs nothing
    folder = (root / ".building" / plan.name).absolute()
    # an existing store can hold this text under another key, for example after its files were moved
    any_store = any(not entry.name.startswith(".") for entry in root.iterdir())
    sources = plan.corpus.sources() if any_store else None
    if sources and (root / (fingerprint := plan.fingerprint(sources))).is_dir():
        plan.check_unchanged(sources)
    else:
        for other in _builds(root, plan.key):
            if other != folder:  # otherwise a killed build of this plan, which continues
                shutil.rmtree(other, ignore_errors=True)
        for name in ("store", "parts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        fingerprint = _build(plan, folder, runner, sources)
    published = root / fingerprint
    # The record comes first: after a kill between the two, the next run finds all work units finished.
    record = {"stamps": plan.file_stats, "fingerprint": fingerprint, "contents": plan.contents}
    write_json(_lookup_record(root, plan.key), record)
    if not published.is_dir():
        _rename(folder / "store", published)
    for build in _builds(root, plan.key):
        shutil.rmtree(build, ignore_errors=True)
    return TokenStore(published)


def _rename(store: Path, published: Path) -> None:
    try:
        os.rename(store, published)
    except OSError:
        if not published.is_dir():  # otherwise a build of a copy of the text finished first
            raise
    sync_folder(published.parent)


def _build(plan: BuildPlan, folder: Path, runner: Runner, sources: list[SourceEntry] | None) -> str:
    """Write `folder`/store and return the fingerprint; `sources`: the hashes of the files, if known."""
    with _hash_in_background(plan.corpus, sources) as hashed_sources:
        output = ShardOutput(Folder(folder / "store"), Folder(folder / "parts"))
        corpus: Any = getattr(plan.corpus, "corpus", None)
        is_ids = hasattr(corpus, "complete")  # `IdFiles` in interop/importing.py
        made = (corpus.write(output), []) if is_ids else encode_corpus(plan, output, runner)
        sources = hashed_sources()
    vocab = vocab_table(plan.tokenizer).tobytes()
    try:
        manifest = plan.manifest(sources, made[0], vocab, made[1])
        manifest = corpus.complete(manifest) if is_ids else manifest
    except (ValueError, RuntimeError):
        shutil.rmtree(folder, ignore_errors=True)  # a later run cannot use the shards
        raise
    write_whole(folder / "store" / "vocab.bin", vocab)
    write_whole(folder / "store" / "manifest.json", manifest.to_json())
    return manifest.fingerprint


@contextlib.contextmanager
def _hash_in_background(
    corpus: PlanCorpus, sources: list[SourceEntry] | None
) -> Iterator[Callable[[], list[SourceEntry]]]:
    """Hash the files in a thread, unless `sources` are known; stop it if the build fails."""
    stop = threading.Event()

    def check(n_bytes: int) -> None:
        if stop.is_set():
            raise InterruptedError("the build failed")

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(lambda: sources or corpus.sources(check)).result
        finally:
            stop.set()


def _remove_leftovers(root: Path, key: str) -> None:
    """Remove half-written lookup records of this key, and abandoned builds of other keys."""
    record = _lookup_record(root, key)
    for path in record.parent.glob(f".{record.name}.*"):
        path.unlink(missing_ok=True)
    for folder in (root / ".building").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may publish it now
            age = time.time() - folder.stat().st_mtime
            if _key_of(folder) != key and age > ABANDONED_DAYS * 86_400:
                _remove_build(root, folder)


def _remove_build(root: Path, folder: Path) -> None:
    """Remove the folder of a build, unless a process works on it."""
    with (
        contextlib.suppress(Timeout, OSError),
        FileLock(root / ".locks" / _key_of(folder)).acquire(timeout=0),
    ):
        shutil.rmtree(folder, ignore_errors=True)


def _lookup_record(root: Path, key: str) -> Path:
    return root / ".requests" / f"{key}.json"


def _builds(root: Path, key: str) -> list[Path]:
    """The folders of all builds with this key, in progress or killed, whatever their plan."""
    return [path.absolute() for path in (root / ".building").glob(f"{key}-*")]


def _key_of(folder: Path) -> str:
    return folder.name.partition("-")[0]
