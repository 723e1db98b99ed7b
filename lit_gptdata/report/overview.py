"""What `print(data)` shows: corpus, tokens and windows, in lines for people."""

from itertools import accumulate

from lit_gptdata._fsspec import redacted
from lit_gptdata._io import aligned
from lit_gptdata.windows.dataset import PackedWindows
from lit_gptdata.windows.mixture import MAX_EPOCHS, epochs_of
from lit_gptdata.windows.sources import Sources


def overview(data: Sources, budget: int | None = None) -> list[str]:
    """Corpus, tokens and windows of each source. `budget`: training tokens of a run."""
    owner = data.owner
    if not data.is_open:
        names = [f"  {s.name or 'corpus':<8} {redacted(repr(s.text.name))}" for s in data.all]
        return [*names, f"  tokens   {owner.tokenizer!r}, not prepared yet"]
    lines = _table(data, budget) if data.is_named else _list(data)
    for source in data.all:
        if left_out := source.store.manifest.left_out:
            lines += [f"  left out {left_out}" + f" of {source.name}" * bool(source.name)]
    if owner.windows != "sliding":
        lines += [f"  windows  {owner.windows}: stride={owner.stride} is ignored"]
    return lines


def _list(data: Sources) -> list[str]:
    lines = []
    for source in data.all:
        store = source.store
        lines += [
            f"  {source.name or 'corpus':<8} {redacted(repr(source.text.name))}",
            f"  tokens   {store.n_tokens:,} by {data.owner.tokenizer!r} from {store.n_documents:,} "
            f"documents, {store.n_bytes:,} bytes; store {store.fingerprint[:8]}, {store.dtype.name}",
        ]
        for split in ("train", "val", "test"):
            lines += [f"  {split:<8} {getattr(source, f'{split}_windows')}"]
            if split == "val" and source.split.val_sources:
                lines += [f"           of {source.split.val_sources}"]
    return lines


def _table(data: Sources, budget: int | None) -> list[str]:
    length, kind, fills = data.owner.max_length, data.owner.windows, data.fills
    weights = [{name: w * fills[name] for name, w in s.items() if name in fills} for s in data.shares]
    lengths = data.stage_tokens
    sizes = {name: len(source.train_windows) for name, source in data.trained.items()}
    epochs = epochs_of(budget or data.n_train * length, length, lengths, data.shares, sizes)
    shares = ["share", *(f"share from {start:,}" for start in accumulate(lengths))]
    packed = ["padding", "documents split"] if kind != "sliding" else []
    splits = ["val tokens", "test tokens", "store", "text"]
    rows = [["source", "tokens", *shares, "epochs", *packed, *splits]]
    for source in data.all:
        name, store, split = source.name, source.store, source.split
        rates = [f"{100 * w[name] / sum(w.values()):.4g} %" if name in w else "" for w in weights]
        tokens = (f"{end - begin:,}" for begin, end in (split.val, split.test))
        taken = f"{epochs[name]:.2f}" if name in epochs else ""
        text = redacted(repr(source.text.name)) + " (val_corpus)" * source.only_val
        packed = [""] * len(packed)
        if name in epochs and isinstance(windows := source.train_windows, PackedWindows):
            packed = [f"{100 * windows.padding:.2f} %", f"{windows.index.n_split:,}"]
        counts = [f"{store.n_tokens:,}", *rates, taken, *packed, *tokens]
        rows.append([name, *counts, store.fingerprint[:8], text])
    every = f"every {data.owner.stride} tokens" if kind == "sliding" else "tokens"
    run = f"{budget:,} training tokens" if budget else ""
    run = run or f"one epoch of {data.n_train:,} windows of {length} {every}"
    lines = [*aligned(rows), f"epochs   of each source in {run}"]
    lines += [f"tokens   by {data.owner.tokenizer!r}"]
    many = ", ".join(name for name, n in epochs.items() if n > MAX_EPOCHS)
    if many and budget:
        lines += [f"warning  {many}: over {MAX_EPOCHS} epochs; add text, or lower the weight"]
    return [f"  {line}" for line in lines]
