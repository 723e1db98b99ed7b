"""Train, val and test ranges of a store, cut before windows exist, so no window crosses a cut."""

import math
from dataclasses import dataclass, replace

from lit_gptdata._checks import check_number
from lit_gptdata.tokens.coverage import covered, describe
from lit_gptdata.tokens.libraries.reference import END_OF_TEXT
from lit_gptdata.tokens.store import TokenStore


@dataclass(frozen=True, kw_only=True)
class Split:
    """Token ranges [begin, end) of a store, in the order train, val, test."""

    train: tuple[int, int]
    val: tuple[int, int]
    test: tuple[int, int]
    val_sources: str = ""
    """What val covers, for people, in a corpus of several sources; "" for one source."""


def split_tokens(store: TokenStore, val_fraction: float, test_fraction: float) -> Split:
    """Cut a store at fractions of its UTF-8 bytes, so that a split is the same text for all tokenizers.

    A cut moves to the nearest document boundary within 1 % of the corpus, or else to the start of a
    word. A store with its own split keeps it. Raises ValueError for a fraction that leaves val or test
    without a target.
    """
    n = store.n_tokens
    if cuts := store.manifest.cuts:
        return Split(train=(0, cuts[0]), val=cuts, test=(cuts[1], n))
    val_end = _cut(store, 1 - test_fraction, n) if test_fraction else n
    train_end = _cut(store, 1 - test_fraction - val_fraction, val_end) if val_fraction else val_end
    split = Split(train=(0, train_end), val=(train_end, val_end), test=(val_end, n))
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        begin, end = getattr(split, name)
        if fraction and end - begin < 2:
            raise ValueError(
                f"{name}_fraction={fraction} leaves {end - begin} of {n:,} tokens for the {name} split, "
                f"but a window needs 2. Raise {name}_fraction, set it to 0, or give more text"
            )
    if val_fraction and len(store.manifest.sources) > 1:
        split = replace(split, val_sources=describe(covered(store, *split.val)))
    return split


def check_fractions(val_fraction: float, test_fraction: float) -> tuple[float, float]:
    """Return both as plain floats; raises TypeError or ValueError.

    They must be numbers in [0, 1) and leave some text to train on.
    """
    val_fraction = check_number("val_fraction", val_fraction, 1)
    test_fraction = check_number("test_fraction", test_fraction, 1)
    if (total := val_fraction + test_fraction) >= 1:
        options = f"val_fraction={val_fraction} and test_fraction={test_fraction}"
        raise ValueError(f"{options} sum to {total:g}: they must sum to less than 1")
    return val_fraction, test_fraction


def scored_bytes(
    store: TokenStore, split: tuple[int, int], n_targets: int, ordinary: int, special: int,
    n_all: int | None = None,
) -> int:  # fmt: skip
    """UTF-8 bytes of the first targets of a split, or 0 if they are not known.

    `special` of the `n_targets` targets are separators, and the others have `ordinary` bytes. A literal
    `<|endoftext|>` in a text has the same id as a separator between documents. Only the store knows
    which of them have 13 bytes and which have 0. If the counts are not the counts of these targets,
    because a loader chose others, the result is `ordinary`. If the tokenizer changes the text, only the
    bytes of a whole split are known, from those of its text. `n_all`: the number of targets of windows
    of documents, which score the split in another order, with its first token; None: sliding windows.
    """
    tokenizer = store.manifest.tokenizer
    begin, stop = split if n_all is not None else (split[0] + 1, split[0] + 1 + n_targets)
    if n_all not in (None, n_targets):
        return ordinary if tokenizer.is_lossless else 0
    if not tokenizer.is_lossless:
        known = stop == split[1] and store.is_exact_at(begin) and store.is_exact_at(stop)
        return store.byte_at(stop) - store.byte_at(begin) if known else 0
    if not special or stop > store.n_tokens:
        return ordinary
    n_bytes = store.byte_at(stop) - store.byte_at(begin)
    lengths = [len(name.encode()) for name in tokenizer.separators or [END_OF_TEXT]]
    literal = n_bytes - ordinary
    possible = not literal % math.gcd(*lengths) and 0 <= literal <= special * max(lengths)
    return n_bytes if possible else ordinary


def _cut(store: TokenStore, fraction: float, end: int) -> int:
    """Where the range starts that ends at token `end`."""
    byte = round(fraction * store.n_bytes)
    document = store.document_near(byte, within=store.n_bytes // 100)
    if document is not None and end - document >= 2:  # otherwise both cuts are at the same document
        return document
    return min(store.token_at(byte), end)
