"""A store of this machine → the same files below a URL, the manifest last.

    publish(store, "s3://bucket/tokens")  ->  "s3://bucket/tokens/<fingerprint>"

Without its manifest nothing opens a store, so that a publication that was killed is none; the next one
sends only what is missing.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from lit_gptdata._io import sha256_file
from lit_gptdata.tokens.cache import File
from lit_gptdata.tokens.objects import Objects
from lit_gptdata.tokens.remote import RemoteStore
from lit_gptdata.tokens.store import TokenStore

UPLOADS = 8
"""Files that are sent at a time."""


def publish(store: TokenStore, url: str) -> str:
    """Send a store to `url`/<fingerprint> and return that URL; what is there whole is not sent again.

    Every file's SHA-256 is compared before it is sent, and every size at the URL after. Raises
    ValueError for a damaged store, or if something else is published there; RemoteError.
    """
    if isinstance(store, RemoteStore):
        raise ValueError(f"{store.location} is published already: give a store of this machine")
    target = Objects(f"{url.rstrip('/')}/{store.fingerprint}")
    there = target.sizes()
    if "manifest.json" in there:
        _check_same(store, target)
    missing = [file for file in store.files if there.get(file["name"]) != file["size"]]
    size = sum(file["size"] for file in missing)
    with (
        tqdm(desc="publish", total=size, unit="B", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(UPLOADS) as pool,
    ):
        for n_bytes in pool.map(lambda file: _send(store.path, file, target), missing):
            bar.update(n_bytes)
    there = target.sizes()
    for file in store.files:
        if there.get(file["name"]) != file["size"]:
            raise ValueError(
                f"{target!r}/{file['name']} has {there.get(file['name'], 'no')} bytes after it was "
                f"sent, not {file['size']:,}: something else writes there. Publish to another URL"
            )
    if "manifest.json" not in there:
        target.write("manifest.json", (store.path / "manifest.json").read_bytes())
    return target.url


def _check_same(store: TokenStore, target: Objects) -> None:
    """Raise ValueError unless what is published there are these files; text may have moved since."""
    published = json.loads(target.read("manifest.json"))
    same = [published.get(key) == store.manifest[key] for key in ("shards", "vocab", "tokenizer")]
    if not all(same):
        raise ValueError(
            f"{target!r} holds another store of the same name, with other shards: publish to another URL"
        )


def _send(folder: Path, file: File, target: Objects) -> int:
    path = folder / file["name"]
    if (seen := sha256_file(path)) != file["sha256"]:
        raise ValueError(
            f"{path} has sha256 {seen}, its manifest says {file['sha256']}: the store is damaged and "
            f"not published. Delete the folder {folder} and run again to build it anew"
        )
    target.write(file["name"], path)
    return int(file["size"])
