"""Find where gigatoken and a tokenizer's library disagree, for each split pattern of tokens/chunks.py.

    python benchmarks/agreement.py                    # all, half an hour
    python benchmarks/agreement.py tokenizers/qwen2   # some

It asks both about every code point c, between characters of every class, with a vocabulary of all bytes
and of pairs of bytes: the last byte of a character and the first byte of the next one are one token
exactly if the pattern does not split between them. Then it compares hostile strings. It prints the code
points that are not in the table; if there are some, add their ranges.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # instead of this folder: its tokenize.py would hide the standard library's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import functools
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tiktoken
import tokenizers

from lit_gptdata.tokens import gigatoken as engine
from lit_gptdata.tokens.chunks import GPT2_PATTERN, QWEN2_PATTERN, RULES
from lit_gptdata.tokens.tokenizer import Tokenizer

Encode = Callable[[str], list[int]]

END = "<|endoftext|>"
# C is the code point. Its neighbors are letters in both cases, a digit, a mark, spaces, line ends, a
# letter without case, a combining mark, and the letters of 's and 'll; / and \n may follow a mark.
PROBES = (
    "aCa ACA aCA 1C1 !C! C  C\nC\r\nC \n字C字\u0301C\u0301'C 'CL 'lC a'C C's C'S CC 11C1 !C\n C/ (C's "
    "1C\n\u3000C\u3000 Ca CA1 -C1'r"
)
NFC_PROBES = "aC\u0334aC\u0323 C\u0300C\u0307C\u0308C\u0338 eC a\u0301C\u1100C\u1161C\u11a8"
BLOCK = 256  # code points in one text


def pairs() -> Iterator[bytes]:
    """The pairs of bytes across a border between two characters; a lower rank is merged first."""
    leads, ends, ascii_bytes = range(0xC2, 0xF5), range(0x80, 0xC0), range(0x80)
    for firsts, seconds in (
        (ends, leads), (ascii_bytes, leads), (ends, ascii_bytes), (ascii_bytes, ascii_bytes),
    ):  # fmt: skip
        yield from map(bytes, itertools.product(firsts, seconds))


def as_encoding(pattern: str) -> tiktoken.Encoding:
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs()]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special_tokens = {END: len(ranks)}
    return tiktoken.Encoding(
        "probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def as_tokenizer_json(pattern: str, normalizer: str | None = None) -> tokenizers.Tokenizer:
    name = engine.CHARACTERS
    names = [*name.values(), *(name[a] + name[b] for a, b in pairs())]
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    splits = [split | {"pattern": {"Regex": each}} for each in pattern.split("\0")]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    sequence = {"type": "Sequence", "pretokenizers": [*splits, last | {"use_regex": False}]}
    values = {
        "version": "1.0",
        "added_tokens": [{"id": len(names), "content": END, "special": True} | _FLAGS],
        "normalizer": normalizer and {"type": normalizer},
        # the library has the pattern of gpt2 built in
        "pre_tokenizer": last | {"use_regex": True} if pattern == GPT2_PATTERN else sequence,
        "model": {
            "type": "BPE", "vocab": {each: id for id, each in enumerate(names)},
            "merges": [[each[0], each[1]] for each in names[256:]],
        },
    }  # fmt: skip
    return tokenizers.Tokenizer.from_str(json.dumps(values))


_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
_PATTERNS = {rule.scheme: pattern for pattern, rule in RULES.items()}
CASES: dict[str, Callable[[], Any]] = {
    **{
        f"tiktoken/{name}": functools.partial(as_encoding, _PATTERNS[name])
        for name in ("gpt2", "gpt4", "o200k", "olmo3", "qwen2")
    },
    **{
        f"tokenizers/{name}": functools.partial(as_tokenizer_json, _PATTERNS[name])
        for name in ("gpt2", "o200k", "olmo3", "qwen2", "deepseek_v3")
    },
    "tokenizers/qwen2+NFC": functools.partial(as_tokenizer_json, QWEN2_PATTERN, "NFC"),
}


def disagreements(ours: Encode, theirs: Encode, probes: str) -> list[int]:
    """The code points for which a text of probes has other ids."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    found = []
    for start in range(0, len(characters), BLOCK):
        texts = {c: probes.replace("C", c) for c in characters[start : start + BLOCK]}
        block = END.join(texts.values())
        if ours(block) != theirs(block):
            found += [ord(c) for c, text in texts.items() if ours(text) != theirs(text)]
    return found


def ranges(codes: Iterable[int]) -> str:
    """ranges([1, 2, 3, 7])  ->  "0001-0003 0007", as in tokens/chunks.py"""
    groups = itertools.groupby(enumerate(sorted(codes)), key=lambda item: item[1] - item[0])
    runs = [[code for _, code in group] for _, group in groups]
    return " ".join(f"{run[0]:04X}" + f"-{run[-1]:04X}" * (len(run) > 1) for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--strings", type=int, default=100_000)
    args = parser.parse_args()
    from tests.tokens.test_chunks import random_texts

    print("| library/scheme | versions | code points | not in the table | strings that differ |")
    print("|---|---|---|---|---|")
    for case in args.cases or CASES:
        tokenizer = Tokenizer(CASES[case]())
        gigatoken = engine._Gigatoken(engine._loaders(tokenizer.reference, tokenizer.allowed_special))

        def theirs(text: str, gigatoken: engine._Gigatoken = gigatoken) -> list[int]:
            return gigatoken.encode(text.encode()).tolist()

        differ = RULES[tokenizer.reference.rule].differ
        known = {code for low, high in differ for code in range(low, high + 1)}
        probes = PROBES + NFC_PROBES * case.endswith("NFC")
        codes = {*disagreements(tokenizer.encode, theirs, probes)}
        texts = random_texts(args.strings, seed=15)
        clean = (text for text in texts if not engine._classes_differ(text.encode(), differ))
        wrong = sum(tokenizer.encode(text) != theirs(text) for text in clean)
        names = "gigatoken", tokenizer.reference.library
        versions = " / ".join(map(importlib.metadata.version, names))
        print(
            f"| {case} | {versions} | {len(codes):,} | {ranges(codes - known)} | {wrong} |", flush=True
        )


if __name__ == "__main__":
    main()
