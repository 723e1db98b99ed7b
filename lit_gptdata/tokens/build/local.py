"""Corpus × tokenizer → TokenStore: found if it is there, else built under a lock and published.

<root>/<fingerprint>/     published stores
<root>/.requests/<key>    which store answers (paths, tokenizer), with the sizes and times seen
<root>/.building/<key>-<plan>/  a build under way, or one that was killed and will be taken up again
<root>/.locks/<key>       held by the one builder; the system frees it when the process dies
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from lit_gptdata._io import sync_folder, write_json, write_whole
from lit_gptdata.text.document import Corpus, SourceEntry
from lit_gptdata.tokens.build.encode import Job
from lit_gptdata.tokens.build.output import InFolder
from lit_gptdata.tokens.build.parts import Runner, write_parts
from lit_gptdata.tokens.build.plan import DEFAULT_OPTIONS, BuildOptions, Request
from lit_gptdata.tokens.build.processes import Processes
from lit_gptdata.tokens.shards import writing
from lit_gptdata.tokens.store import TokenStore, vocab_table
from lit_gptdata.tokens.tokenizer import Tokenizer

ABANDONED_DAYS = 7
"""A killed build that nobody took up again for so long is removed by the next build."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _LocalRequest(Request):
    """A request whose store is kept below a folder of this machine."""

    root: Path

    @property
    def answer(self) -> Path:
        """The file that names the store and the stamps it was made from."""
        return self.root / ".requests" / f"{self.key}.json"

    def builds(self) -> list[Path]:
        """The folders of its builds: one under way or killed, and what is left of other plans."""
        return list((self.root / ".building").glob(f"{self.key}-*"))


def find_store(corpus: Corpus, tokenizer: Tokenizer, root: Path) -> TokenStore | None:
    """The published store of a corpus, known by its files' sizes and times; none of them is read."""
    return _find(_LocalRequest(corpus=corpus, tokenizer=tokenizer, root=root))


def _find(request: _LocalRequest) -> TokenStore | None:
    try:
        answer = json.loads(request.answer.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    # stamps last: those of a remote corpus are a listing
    if not (request.root / answer["fingerprint"]).is_dir() or answer["stamps"] != request.file_stats():
        return None
    return TokenStore(request.root / answer["fingerprint"])


def prepare_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
    root: Path,
    options: BuildOptions = DEFAULT_OPTIONS,
) -> TokenStore:
    """The store of a corpus, built if need be; of many processes one builds and the others wait.

    Raises ValueError for text that cannot be read, OSError for a folder that cannot be written,
    ConnectionError for a Ray cluster that is not there; then nothing is published.
    """
    request = _LocalRequest(corpus=corpus, tokenizer=tokenizer, root=root)
    store = _find(request)
    if store is not None:
        for folder in request.builds():  # a kill came between publishing and cleaning up
            _remove(root, folder)
        return store
    runner = runner_for(options)
    with writing(root):
        for name in (".requests", ".building", ".locks"):
            (root / name).mkdir(parents=True, exist_ok=True)
    with _held(_lock(root, request.key), f"the tokens of {corpus!r}"):
        store = _find(request)  # another process may have built it meanwhile
        if store is None:
            _sweep(request)
            job = Job(
                tokenizer=tokenizer,
                destination=InFolder(root / ".building"),
                engine=options.engine,
                max_document_bytes=options.max_document_bytes,
            )
            store = _make(request, job, runner)
    return store


def runner_for(options: BuildOptions) -> Runner:
    """What runs the build; raises ImportError without the package ray."""
    if options.build == "processes":
        return Processes(options.workers)
    from lit_gptdata.tokens.build.ray_tasks import RayTasks

    return RayTasks(options.workers, options.ray_address)


def _make(request: _LocalRequest, job: Job, runner: Runner) -> TokenStore:
    stamps = request.file_stats()
    # a folder for each plan: what comes late from a build of other text, as from a node of a cluster
    # that was cut off, finds its own folder gone
    folder = request.root / ".building" / request.plan(stamps, job)
    job = replace(job, destination=InFolder(folder))
    # a store that is here already may be of this text: touched, moved or copied
    any_store = any(not entry.name.startswith(".") for entry in request.root.iterdir())
    sources = request.sources() if any_store else None
    fingerprint = request.fingerprint(sources) if sources else None
    if fingerprint is None or not (request.root / fingerprint).is_dir():
        with writing(folder):
            _take_up(request, folder)
        fingerprint = _build(request, job, runner, folder, sources)
    if request.file_stats() != stamps:
        shutil.rmtree(folder, ignore_errors=True)
        raise request.changed()
    published = request.root / fingerprint
    # first the answer, then the store: killed between the two, the next run finds all parts whole
    with writing(request.root):
        write_json(request.answer, {"stamps": stamps, "fingerprint": fingerprint})
        if not published.is_dir():
            _publish(folder / "store", published)
    for folder in request.builds():
        shutil.rmtree(folder, ignore_errors=True)
    return TokenStore(published)


def _publish(store: Path, published: Path) -> None:
    try:
        os.rename(store, published)
    except OSError:
        if not published.is_dir():  # else a copy of the same text was built at the same time
            raise
    sync_folder(published.parent)


def _build(
    request: _LocalRequest, job: Job, runner: Runner, folder: Path, known: list[SourceEntry] | None
) -> str:
    """Write shards and manifest under `folder`; returns the fingerprint.

    `known`: the sources, if they were hashed already.
    """
    with _beside(lambda check: known or request.sources(check)) as hashing:
        shards = write_parts(request.corpus, job, runner)
        sources = hashing()
    vocab = vocab_table(job.tokenizer).tobytes()
    try:
        manifest = request.manifest(sources, shards, vocab)
    except ValueError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    store = folder / "store"
    with writing(store):
        write_whole(store / "vocab.bin", vocab)
        write_whole(store / "manifest.json", manifest.to_json())
    return manifest.fingerprint


@contextlib.contextmanager
def _beside(
    sources: Callable[[Callable[[int], None]], list[SourceEntry]],
) -> Iterator[Callable[[], list[SourceEntry]]]:
    """Hash the sources in a thread; it ends at once where the build fails."""
    stop = threading.Event()

    def check(n_bytes: int) -> None:
        if stop.is_set():
            raise InterruptedError("the build failed meanwhile")

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(sources, check).result
        finally:
            stop.set()


def _take_up(request: _LocalRequest, folder: Path) -> None:
    """Keep what a killed build of the same plan left whole, and nothing of any other."""
    for other in request.builds():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    for name in ("store", "parts"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def _sweep(request: _LocalRequest) -> None:
    """Remove what was killed: an answer half-written, builds of long ago, none whose builder lives."""
    for path in request.answer.parent.glob(f".{request.answer.name}.*"):
        path.unlink(missing_ok=True)
    for folder in (request.root / ".building").iterdir():
        with contextlib.suppress(FileNotFoundError):  # its builder may be publishing it
            age = time.time() - folder.stat().st_mtime
            if _key_of(folder) != request.key and age > ABANDONED_DAYS * 86_400:
                _remove(request.root, folder)


def _remove(root: Path, folder: Path) -> None:
    """Remove the folder of a build, unless its builder lives."""
    with contextlib.suppress(Timeout, OSError), _lock(root, _key_of(folder)).acquire(timeout=0):
        shutil.rmtree(folder, ignore_errors=True)


def _key_of(folder: Path) -> str:
    """The key of the request that a folder under .building/ belongs to."""
    return folder.name.partition("-")[0]


def _lock(root: Path, key: str) -> FileLock:
    return FileLock(root / ".locks" / key)


@contextlib.contextmanager
def _held(lock: FileLock, what: str) -> Iterator[None]:
    with writing(Path(lock.lock_file)):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("waiting for another process that makes %s (lock %s)", what, lock.lock_file)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
