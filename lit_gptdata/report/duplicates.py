"""Count the documents of a store that have the text of an earlier one, for `info`."""

import contextlib
import json

import numpy as np

from lit_gptdata._io import progress_bar, write_json
from lit_gptdata.tokens.build.filters import HASH, digest, later_copies
from lit_gptdata.tokens.remote.store import RemoteStore
from lit_gptdata.tokens.store import TokenStore

BLOCK_TOKENS = 1 << 20  # read at once


def describe_duplicates(store: TokenStore) -> str:
    """A line for people."""
    if store.manifest.reading.get("drop_duplicates"):
        return "copies   0, because drop_duplicates left them out"
    if isinstance(store, RemoteStore):
        return "copies   not counted, because that would read all tokens of the remote store"
    n, advice = count_duplicates(store), ". Set data.drop_duplicates=true to leave them out"
    counts = f"{n:,} of {store.n_documents:,} documents have the text of an earlier one"
    return f"copies   {counts}{advice if n else ''}"


def count_duplicates(store: TokenStore) -> int:
    """The documents with the same tokens as an earlier one; a file next to the store keeps the number.

    Reads each document with the length of another one.
    """
    record = store.path.parent / ".requests" / f"{store.fingerprint}.copies"
    with contextlib.suppress(OSError, ValueError):
        return int(json.loads(record.read_bytes()))
    starts = store.document_rows()["token"]
    last = store.tokens.gather(starts[1:] - 1, 1)[:, 0]  # separators, if the store has them
    ends = np.append(starts[1:] - (store.vocab["n_bytes"][last] == 0), store.n_tokens)
    lengths, n_of_length = np.unique(ends - starts, return_counts=True)
    chosen = np.flatnonzero(np.isin(ends - starts, lengths[n_of_length > 1]))
    hashes, tokens, first = bytearray(), store.tokens[:0], 0
    with progress_bar(desc="counting duplicates", total=len(chosen), unit=" documents") as bar:
        for begin, end in zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True):
            text = digest()
            for start in range(begin, end, BLOCK_TOKENS):
                stop = min(end, start + BLOCK_TOKENS)
                if stop > first + len(tokens):
                    tokens, first = store.tokens[start : start + BLOCK_TOKENS], start
                text.update(tokens[start - first : stop - first])
            hashes += text.digest()
            bar.update()
    n = int(later_copies(np.frombuffer(hashes, HASH)).sum())
    if record.parent.is_dir():  # not in a folder of published stores
        with contextlib.suppress(OSError):
            write_json(record, n)
    return n
