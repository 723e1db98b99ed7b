"""Publish a token store at a URL: upload a store of this machine, or build one there.

    publish(store, "s3://bucket/tokens")                    ->  "s3://bucket/tokens/<fingerprint>"
    publish_text(corpus, tokenizer, "s3://bucket/tokens")   ->  the same, without a store on this machine

The manifest is written last. A killed run publishes nothing, and the next one sends the remaining files.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lit_gptdata._fsspec import is_url
from lit_gptdata._io import working_folder
from lit_gptdata.text.document import Corpus
from lit_gptdata.text.files import PathLike
from lit_gptdata.text.remote_file import size_of
from lit_gptdata.tokens.build.encode import encode_corpus, progress_of
from lit_gptdata.tokens.build.local import make_runner
from lit_gptdata.tokens.build.output import ShardOutput
from lit_gptdata.tokens.build.plan import DEFAULT_OPTIONS, BuildOptions, BuildPlan, as_plan_corpus
from lit_gptdata.tokens.manifest import FileEntry
from lit_gptdata.tokens.remote.objects import Objects
from lit_gptdata.tokens.remote.store import RemoteStore, read_manifest
from lit_gptdata.tokens.store import TokenStore, vocab_table
from lit_gptdata.tokens.tokenizer import Tokenizer

UPLOADS = 4  # at the same time; each holds a shard in memory


def publish(store: TokenStore, url: PathLike) -> str:
    """Upload a store to `url`/<fingerprint> and return that URL; files already there are not sent again.

    Raises ValueError for a damaged store or if another store is published there, RemoteError.
    """
    if isinstance(store, RemoteStore):
        raise ValueError(f"{store.location} is published already: give a store of this machine")
    target = _target(url, store.fingerprint)
    sizes = target.sizes()
    if "manifest.json" in sizes:
        # the paths of the sources may differ
        ours, theirs = store.manifest, read_manifest(target.read("manifest.json"), target)
        if (ours.shards, ours.vocab, ours.tokenizer) != (theirs.shards, theirs.vocab, theirs.tokenizer):
            problem = "holds another store of the same name, with other shards: publish to another URL"
            raise ValueError(f"{target!r} {problem}")
    missing = [file for file in store.files if sizes.get(file.name) != file.size]
    n_bytes = sum(file.size for file in missing)
    with progress_of("publishing", n_bytes) as progress, ThreadPoolExecutor(UPLOADS) as pool:
        for sent in pool.map(lambda file: _send(store.path, file, target), missing):
            progress.add(sent)
    if "manifest.json" not in sizes:
        target.write("manifest.json", (store.path / "manifest.json").read_bytes())
    return target.url


def publish_text(
    corpus: Corpus, tokenizer: Tokenizer, url: PathLike, options: BuildOptions = DEFAULT_OPTIONS
) -> str:
    """Build a store at `url`/<fingerprint>, unless it exists, and return that URL.

    Workers tokenize and upload directly, without using local disk. Two runs at the same time do the work
    twice and publish one store. Raises what `prepare_store` raises, and RemoteError.
    """
    plan_corpus = as_plan_corpus(corpus)
    runner = make_runner(options)
    Objects(url).open()  # reports a wrong URL before hours of work
    plan = BuildPlan(plan_corpus, tokenizer, options)
    # hash first, because the fingerprint is in the URL and object stores cannot rename
    with progress_of("hashing", sum(map(size_of, plan_corpus.files)) or None) as progress:
        sources = plan_corpus.sources(progress.add)
    target = _target(url, plan.fingerprint(sources))
    records = Objects(f"{target.url}/.parts-{plan.name}")
    if "manifest.json" not in target.sizes():
        shards, left_out = encode_corpus(plan, ShardOutput(target, records), runner)
        vocab = vocab_table(tokenizer).tobytes()
        try:
            manifest = plan.manifest(sources, shards, vocab, left_out)
        except Exception:
            records.remove_all()  # a later run cannot use the shards
            raise
        target.write("vocab.bin", vocab)
        sizes = target.sizes()
        if absent := [file.name for file in manifest.files if sizes.get(file.name) != file.size]:
            problem = f"{target!r} lacks {', '.join(absent)}, which workers wrote"
            raise ValueError(f"{problem}: give an object store, or a folder that all nodes share")
        target.write("manifest.json", manifest.to_json())
    records.remove_all()
    return target.url


def _target(url: PathLike, fingerprint: str) -> Objects:
    url = os.fspath(url)
    if not is_url(url):  # an absolute path means the same in every process
        url = str(working_folder() / os.path.expanduser(url))
    return Objects(f"{url.rstrip('/')}/{fingerprint}")


def _send(folder: Path, file: FileEntry, target: Objects) -> int:
    path = folder / file.name
    content = path.read_bytes()
    if (sha256 := hashlib.sha256(content).hexdigest()) != file.sha256:
        advice = f"is damaged and not published. Delete the folder {folder} and run again to rebuild it"
        raise ValueError(f"{path} has sha256 {sha256}, not {file.sha256}: the store {advice}")
    target.write(file.name, content)
    return file.size
