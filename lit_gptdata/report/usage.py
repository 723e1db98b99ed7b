"""The pictures of `lit-gptdata info --plot`: the tokens of a store, or the shares of a mixture."""

import os
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # not pyplot, which has global state and needs a display
from matplotlib.ticker import EngFormatter, PercentFormatter

from lit_gptdata.tokens.manifest import total
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.windows.mixture import Mixture

CHUNK = 1 << 20  # token ids counted at a time; numpy widens them to 8 bytes each
INTERVALS = 60  # of a run; the picture has a share for each
MAX_SHARDS = 16  # of a store, whose documents are measured; the index of each is a file
MAX_BYTES = 16  # tokens of this many UTF-8 bytes or more share the last bar


def count_ids(store: TokenStore) -> np.ndarray:
    """Count each token id of a store in bounded memory: int64 (vocab_size,)."""
    counts = np.zeros(store.vocab_size, dtype=np.int64)
    for start in range(0, store.n_tokens, CHUNK):
        counts += np.bincount(store.tokens[start : start + CHUNK], minlength=store.vocab_size)
    return counts


def draw_usage(store: TokenStore, max_length: int, path: str | os.PathLike[str]) -> None:
    """Write a PNG: tokens by their length in UTF-8 bytes, frequency by rank, documents by length."""
    counts = count_ids(store)
    lengths = np.minimum(store.vocab["n_bytes"], MAX_BYTES)
    tokens_of_length = np.bincount(lengths, weights=counts, minlength=MAX_BYTES + 1)
    frequencies = np.sort(counts[counts > 0])[::-1]

    figure = Figure(figsize=(15, 4), layout="constrained")
    length_axes, rank_axes, document_axes = figure.subplots(1, 3)
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
    _plot_lengths(document_axes, {"": store}, max_length)
    figure.savefig(path, format="png", dpi=120)


def draw_shares(
    mixture: Mixture, tokens: int, stores: Mapping[str, TokenStore], path: str | os.PathLike[str]
) -> None:
    """Write a PNG: each source's share of the targets in a run of `tokens` tokens, and what the weights
    say (wide); and the documents of its stores by length."""
    length, names = mixture.spans.max_length, [*mixture.sizes]
    fills = np.array([1.0 - windows.padding for windows in mixture.parts])
    colors = matplotlib.color_sequences["tab20"]
    ends = np.unique(np.linspace(0, max(1, tokens // length), INTERVALS + 1).astype(int))
    counts = np.array([list(mixture.count(end).values()) for end in ends.tolist()])  # (E, S)
    shares = np.diff(counts, axis=0) * fills
    shares /= shares.sum(axis=1, keepdims=True)
    stages = [stage for stage in mixture.stages if stage.begin < ends[-1]]
    targets = np.array([stage.weights * fills / np.dot(stage.weights, fills) for stage in stages])
    edges = np.repeat([*(stage.begin for stage in stages), ends[-1]], 2)[1:-1]

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    axes, document_axes = figure.subplots(1, 2)
    ranked = np.argsort(-counts[-1], kind="stable").tolist()
    for rank, i in enumerate(ranked):
        color = colors[rank % len(colors)]
        axes.plot(edges * length, np.repeat(targets[:, i], 2), color=color, alpha=0.3, linewidth=6)
        axes.stairs(shares[:, i], ends * length, baseline=None, color=color, label=names[i])
    axes.set(xlabel="tokens trained on", ylabel="share of the training tokens", ylim=(0, None))
    axes.set_title("share of each source (wide: target, thin: run)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    _plot_lengths(document_axes, {names[i]: stores[names[i]] for i in ranked}, length)
    figure.savefig(path, format="png", dpi=120)


def draw_lengths(stores: Mapping[str, TokenStore], path: str | os.PathLike[str]) -> None:
    """Write a PNG: the number of documents by length, in tokens with the separator, per source."""
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    _plot_lengths(axes, stores)
    if any(stores):
        figure.legend(loc="outside right upper")
    figure.savefig(path, format="png", dpi=120)


def _plot_lengths(axes: Any, stores: Mapping[str, TokenStore], max_length: int | None = None) -> None:
    """Plot the documents by length, and `max_length` as a line."""
    lengths = []
    for store in stores.values():
        shards = store.shards[:MAX_SHARDS]
        starts = store.document_rows(range(len(shards)))["token"]
        lengths.append(np.diff(starts, append=total(shards, "n_tokens")))
    every, n_all = np.concatenate(lengths), sum(store.n_documents for store in stores.values())
    bins = np.geomspace(max(1, every.min()), every.max() + 1, 41)
    axes.hist(lengths, bins.tolist(), stacked=True, label=[*stores])
    title = f"{len(every):,} of {n_all:,} documents"
    if max_length is not None:
        axes.axvline(max_length, color="black", linestyle="--")
        longer = f"{(every > max_length).mean():.0%} of {len(every):,} documents"
        title = f"{longer} exceed max_length={max_length:,}"
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title=title)
    axes.grid(alpha=0.3)
