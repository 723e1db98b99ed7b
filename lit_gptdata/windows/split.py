"""Train, val and test as ranges of tokens, cut before there are windows, so that none crosses a cut."""

from __future__ import annotations

from dataclasses import dataclass

from lit_gptdata.tokens.store import TokenStore


@dataclass(frozen=True, kw_only=True)
class Split:
    """Token ranges [begin, end) of a store, in the order train, val, test."""

    train: tuple[int, int]
    val: tuple[int, int]
    test: tuple[int, int]


def split_tokens(store: TokenStore, val_fraction: float, test_fraction: float) -> Split:
    """Cut a store by UTF-8 bytes of its text, so that every tokenizer gets the same text.

    A cut falls on the nearest document boundary if one lies within 1 % of the corpus, else before a
    word inside the document. Raises ValueError for a fraction that leaves a split without a target.
    """
    check_fractions(val_fraction, test_fraction)
    n = store.n_tokens
    val_end = _cut(store, 1 - test_fraction) if test_fraction else n
    train_end = min(_cut(store, 1 - test_fraction - val_fraction), val_end) if val_fraction else val_end
    split = Split(train=(0, train_end), val=(train_end, val_end), test=(val_end, n))
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        begin, end = getattr(split, name)
        if fraction and end - begin < 2:
            raise ValueError(
                f"{name}_fraction={fraction} leaves {end - begin} of {n:,} tokens for the {name} split, "
                f"too few for a window (2). Raise {name}_fraction, set it to 0, or give more text"
            )
    return split


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise ValueError unless both lie in [0, 1) and leave something to train on."""
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(
                f"{name}={value!r} is no share of the corpus: give a number in [0, 1), such as 0.1"
            )
    if val_fraction + test_fraction >= 1:
        raise ValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction} sum to "
            f"{val_fraction + test_fraction:g}: they must sum to less than 1, the rest is for training"
        )


def _cut(store: TokenStore, share: float) -> int:
    byte = round(share * store.n_bytes)
    document = store.document_near(byte, within=store.n_bytes // 100)
    return store.token_at(byte) if document is None else document
