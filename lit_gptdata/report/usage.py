"""Which ids a store holds how often, and a picture of it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lit_gptdata.tokens.store import TokenStore

CHUNK = 1 << 20
"""Ids counted at a time; numpy widens them to 8 bytes each."""

LONGEST = 16
"""UTF-8 bytes; tokens from here on share the last bar."""


def count_ids(store: TokenStore) -> np.ndarray:
    """How often each id is in the store, int64 (vocab_size,); reads it all, in bounded memory."""
    counts = np.zeros(store.vocab_size, dtype=np.int64)
    for begin in range(0, store.n_tokens, CHUNK):
        counts += np.bincount(store.tokens[begin : begin + CHUNK], minlength=store.vocab_size)
    return counts


def draw_usage(store: TokenStore, picture: str | os.PathLike[str]) -> None:
    """Draw a PNG: tokens over their length in UTF-8 bytes, and frequency over rank, log-log."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import EngFormatter

    counts = count_ids(store)
    lengths = np.minimum(store.vocab["n_bytes"], LONGEST)
    of_length = np.bincount(lengths, weights=counts, minlength=LONGEST + 1)
    frequencies = np.sort(counts[counts > 0])[::-1]

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(np.arange(LONGEST + 1), of_length)
    ticks = np.arange(0, LONGEST + 1, 2)
    left.set_xticks(ticks, [*map(str, ticks[:-1]), f"{LONGEST}+"])
    left.yaxis.set_major_formatter(EngFormatter(sep=""))
    left.set(xlabel="UTF-8 bytes of a token (0: special)", ylabel="tokens in the text")
    left.grid(axis="y", alpha=0.3)
    left.set_title(f"{store.n_tokens:,} tokens, {store.n_bytes / store.n_tokens:.2f} bytes each")

    marker = "." if len(frequencies) < 100 else None
    right.plot(np.arange(1, len(frequencies) + 1), frequencies, marker=marker)
    right.set(xscale="log", yscale="log", xlabel="rank of an id", ylabel="times in the text")
    right.grid(alpha=0.3)
    right.set_title(f"{len(frequencies):,} of {store.vocab_size:,} ids are used")
    figure.savefig(Path(picture), format="png", dpi=120)
