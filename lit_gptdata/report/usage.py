"""Count the tokens of a store and draw them: the picture of `lit-gptdata info --plot`."""

import os

import numpy as np

from lit_gptdata.tokens.store import TokenStore

CHUNK = 1 << 20  # token ids counted at a time; numpy widens them to 8 bytes each
MAX_BYTES = 16  # tokens of this many UTF-8 bytes or more share the last bar


def count_ids(store: TokenStore) -> np.ndarray:
    """Count each token id of a store in bounded memory: int64 (vocab_size,)."""
    counts = np.zeros(store.vocab_size, dtype=np.int64)
    for start in range(0, store.n_tokens, CHUNK):
        counts += np.bincount(store.tokens[start : start + CHUNK], minlength=store.vocab_size)
    return counts


def draw_usage(store: TokenStore, path: str | os.PathLike[str]) -> None:
    """Write a PNG: tokens by their length in UTF-8 bytes, and frequency by rank on log-log axes."""
    from matplotlib.figure import Figure  # not pyplot, which has global state and needs a display
    from matplotlib.ticker import EngFormatter

    counts = count_ids(store)
    lengths = np.minimum(store.vocab["n_bytes"], MAX_BYTES)
    tokens_of_length = np.bincount(lengths, weights=counts, minlength=MAX_BYTES + 1)
    frequencies = np.sort(counts[counts > 0])[::-1]

    figure = Figure(figsize=(10, 4), layout="constrained")
    length_axes, rank_axes = figure.subplots(1, 2)
    length_axes.bar(np.arange(MAX_BYTES + 1), tokens_of_length)
    ticks = np.arange(0, MAX_BYTES + 1, 2)
    length_axes.set_xticks(ticks, [*map(str, ticks[:-1]), f"{MAX_BYTES}+"])
    length_axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    length_axes.set(xlabel="UTF-8 bytes of a token (0: special token)", ylabel="tokens in the text")
    length_axes.grid(axis="y", alpha=0.3)
    length_axes.set_title(f"{store.n_tokens:,} tokens, {store.n_bytes / store.n_tokens:.2f} bytes each")

    marker = "." if len(frequencies) < 100 else None
    rank_axes.plot(np.arange(1, len(frequencies) + 1), frequencies, marker=marker)
    rank_axes.set(xscale="log", yscale="log", xlabel="rank of a token id", ylabel="times in the text")
    rank_axes.grid(alpha=0.3)
    rank_axes.set_title(f"{len(frequencies):,} of {store.vocab_size:,} token ids occur")
    figure.savefig(path, format="png", dpi=120)
