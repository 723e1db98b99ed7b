"""Find where gigatoken and a tokenizer's library disagree, for each split pattern of agreement.py.

    python benchmarks/agreement.py                    # all, about half an hour
    python benchmarks/agreement.py tokenizers/qwen2   # some

It asks both about every code point c, between characters of every class, with a vocabulary of all bytes
and of pairs of bytes. The last byte of a character and the first byte of the next one are a token exactly
if no split is between them. Then it fuzzes with hostile strings. It prints the code points that are not
in `CLASSES_DIFFER`; if there are some, add their ranges.
"""

from __future__ import annotations

import os
import sys

# instead of this folder, because its tokenize.py would hide the standard library's
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import functools
import importlib.metadata
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator

import tiktoken
import tokenizers

from lit_gptdata.tokens import gigatoken as engine
from lit_gptdata.tokens.agreement import CLASSES_DIFFER, SCHEMES
from lit_gptdata.tokens.chunks import GPT2_PATTERN
from lit_gptdata.tokens.libraries.hugging_face import HuggingFaceReference
from lit_gptdata.tokens.libraries.reference import Reference
from lit_gptdata.tokens.libraries.tiktoken_encoding import TiktokenReference

Encode = Callable[[str], list[int]]

END = "<|endoftext|>"
# Before and after c: lower and upper case, a digit, a mark, spaces and line ends, a letter without case, a
# combining mark, the letters of 's and 'll. A slash and a line end may follow a mark.
PROBES = (
    "aCa ACA aCA 1C1 !C! C  C\nC\r\nC \n字C字\u0301C\u0301'C 'CL 'lC a'C C's C'S CC 11C1 !C\n C/ (C's 1C\n"
    "\u3000C\u3000 Ca CA1 -C1'r"
)
NFC_PROBES = "aC\u0334aC\u0323 C\u0300C\u0307C\u0308C\u0338 eC a\u0301C\u1100C\u1161C\u11a8"
BLOCK = 256  # code points in one text


def pairs() -> Iterator[bytes]:
    """The pairs of bytes across a border between two characters, those of c first."""
    leads, ends, ascii = range(0xC2, 0xF5), range(0x80, 0xC0), range(0x80)
    for firsts, seconds in ((ends, leads), (ascii, leads), (ends, ascii), (ascii, ascii)):
        yield from (bytes(pair) for pair in itertools.product(firsts, seconds))


def as_tiktoken(pattern: str) -> Reference:
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs()]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return TiktokenReference(
        tiktoken.Encoding(
            "probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
        )
    )


def as_tokenizer_json(pattern: str, normalizer: str | None = None) -> Reference:
    name = {byte: character for character, byte in engine.BYTES.items()}
    names = [*name.values(), *(name[a] + name[b] for a, b in pairs())]
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    splits = [split | {"pattern": {"Regex": each}} for each in pattern.split("\0")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    sequence = {"type": "Sequence", "pretokenizers": [*splits, byte_level | {"use_regex": False}]}
    # the first one is the library's own way to write it
    pre_tokenizer = byte_level | {"use_regex": True} if pattern == GPT2_PATTERN else sequence
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values = {
        "version": "1.0",
        "added_tokens": [{"id": len(names), "content": END, "special": True} | flags],
        "normalizer": normalizer and {"type": normalizer},
        "pre_tokenizer": pre_tokenizer,
        "model": {
            "type": "BPE", "vocab": {each: id for id, each in enumerate(names)},
            "merges": [[each[0], each[1]] for each in names[256:]],
        },
    }  # fmt: skip
    return HuggingFaceReference(tokenizers.Tokenizer.from_str(json.dumps(values)).to_str())


CASES: dict[str, tuple[Callable[[], Reference], str]] = {}
for _pattern, _scheme in SCHEMES.items():
    if _scheme.name in ("sentencepiece", "deepseek_v3"):
        continue
    CASES.setdefault(f"tiktoken/{_scheme.name}", (functools.partial(as_tiktoken, _pattern), PROBES))
for _pattern, _scheme in SCHEMES.items():
    if _scheme.name == "sentencepiece":
        continue
    CASES[f"tokenizers/{_scheme.name}"] = (functools.partial(as_tokenizer_json, _pattern), PROBES)
CASES["tokenizers/qwen2+NFC"] = (
    functools.partial(
        as_tokenizer_json, SCHEMES and next(p for p, s in SCHEMES.items() if s.name == "qwen2"), "NFC"
    ),
    PROBES + NFC_PROBES,
)


def disagreements(ours: Encode, theirs: Encode, probes: str) -> list[int]:
    """The code points for which a text of probes has other ids."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    found = []
    for start in range(0, len(characters), BLOCK):
        block = [probes.replace("C", c) for c in characters[start : start + BLOCK]]
        if ours(END.join(block)) != theirs(END.join(block)):
            found += [
                ord(characters[start + i]) for i, text in enumerate(block) if ours(text) != theirs(text)
            ]
    return found


def ranges(codes: Iterable[int]) -> list[tuple[str, str]]:
    """[1, 2, 3, 7]  ->  [("0x0001", "0x0003"), ("0x0007", "0x0007")]"""
    groups = itertools.groupby(enumerate(sorted(codes)), key=lambda item: item[1] - item[0])
    runs = [[code for _, code in group] for _, group in groups]
    return [(f"0x{run[0]:04X}", f"0x{run[-1]:04X}") for run in runs]


def fuzz(ours: Encode, theirs: Encode, count: int) -> int:
    """How many hostile strings, without a character of `CLASSES_DIFFER`, have other ids."""
    from tests.tokens.test_chunks import random_texts

    texts = (text for text in random_texts(count, seed=15) if not engine._classes_differ(text.encode()))
    return sum(ours(text) != theirs(text) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none is named")
    parser.add_argument("--strings", type=int, default=100_000)
    args = parser.parse_args()
    known = {code for low, high in CLASSES_DIFFER for code in range(low, high + 1)}
    print(
        "| library/scheme | versions | code points that differ | not in the table | strings that differ |"
    )
    print("|---|---|---|---|---|")
    for case in args.cases or CASES:
        make, probes = CASES[case]
        reference = make()
        gigatoken = engine._Gigatoken(engine._loaders(reference, {END: reference.special_ids[END]}))
        ours = lambda text: reference.encode(text, frozenset({END})).tolist()  # noqa: E731, B023
        theirs = lambda text: gigatoken.encode(text.encode()).tolist()  # noqa: E731, B023
        codes = {*disagreements(ours, theirs, probes)}
        versions = [importlib.metadata.version(each) for each in ("gigatoken", reference.library)]
        new = ", ".join(f"({low}, {high})" for low, high in ranges(codes - known))
        wrong = fuzz(ours, theirs, args.strings)
        print(f"| {case} | {' / '.join(versions)} | {len(codes):,} | {new} | {wrong} |", flush=True)


if __name__ == "__main__":
    main()
