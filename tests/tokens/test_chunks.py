"""Cuts change no token: every rule against its split pattern, on strings that are made to break it."""

from __future__ import annotations

import functools
import itertools
import random
import re
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import regex  # a dependency of tiktoken; here it runs the split patterns
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from lit_gptdata.text.document import utf8
from lit_gptdata.tokens import chunks
from lit_gptdata.tokens.chunks import (
    CL100K_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    O200K_PATTERN,
    QWEN2_PATTERN,
    R50K_PATTERN,
    CutRule,
    cut_rule,
    safe_chunks,
)
from lit_gptdata.tokens.tokenizer import END_OF_TEXT, Tokenizer

GPT2 = Tokenizer("gpt2")
PATTERNS = {
    "r50k": R50K_PATTERN, "gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN, "o200k": O200K_PATTERN,
    "llama3": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN,
}  # fmt: skip

# Whitespace of Unicode, characters that only Python treats as whitespace, and similar characters.
SPACES = [
    *" \t\n\v\f\r\x85\xa0\u1680\u2000\u2007\u200a\u2028\u2029\u202f\u205f\u3000",
    *"\x1c\x1d\x1e\x1f\u180e\u200b\u200d\ufeff\0\x7f",
    *[" "] * 12,
    *["\n"] * 6,
    *["\r\n", "\r\n", "\n\n", "  "],
]
LETTERS = [
    *"abstdmlvreABSTDMLVREéßЖя字学あむアー한اกิि\u0301ſKǅʰª\u2c00",
    *["ll", "Word", "word", "слово"],
]
DIGITS = [*"0123456789", "1234", *"٣௧²½Ⅷ"]
MARKS = [
    *".,;:!?…—、。，！？：；'’\"-_/\\<>|()[]{}$+^`~#@%&*=€",
    *["'", "/", "<|", "|>", "://", "--", "...", "\n/", "/\n"],
    *["'s", "'S", "'t", "'re", "'ve", "'m", "'ll", "'LL", "'d", "’s", "'ſ", "'r", "'l"],
]
SPECIALS = [END_OF_TEXT, END_OF_TEXT, "<|endof", "oftext|>", "<|endoftext|", "<|fim_prefix|>", "<|end|>"]
ASTRAL = ["😀", "👩\u200d💻", "🇩🇪", "𠀀", "𝟙", "\U0003261a", "\U000e0001", "\U0010ffff"]
KINDS = [SPACES, SPACES, SPACES, LETTERS, LETTERS, DIGITS, MARKS, MARKS, SPECIALS, ASTRAL]


def any_character(rng: random.Random) -> str:
    code = rng.choice((rng.randrange(0x300), rng.randrange(0x10000), rng.randrange(0x110000)))
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)


def random_text(rng: random.Random) -> str:
    """A short string in which the characters that decide a split are next to each other."""
    parts = []
    for _ in range(rng.randrange(1, 24)):
        part = rng.choice(rng.choice(KINDS)) if rng.random() < 0.93 else any_character(rng)
        parts.append(part * (rng.randrange(2, 9) if rng.random() < 0.12 else 1))
    return "".join(parts)


def random_texts(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    return (random_text(rng) for _ in range(count))


@functools.cache
def rule_of(pattern: str) -> CutRule:
    rule = with_gpt2_ranks(PATTERNS[pattern]).cut_rule
    assert rule is not None
    return rule


@pytest.fixture(scope="module")
def encodings() -> dict[str, tiktoken.Encoding]:
    """One encoding per pattern, all with the ranks of gpt2: the other ranks need a network."""
    return {
        name: with_gpt2_ranks(pattern, name=name).reference.encoding
        for name, pattern in PATTERNS.items()
    }


def with_gpt2_ranks(pattern: str, special_ids=None, name: str = "mine") -> Tokenizer:
    """A tokenizer with the ranks of gpt2 and its own split pattern and special tokens."""
    ranks, special_ids = (
        GPT2.reference.encoding._mergeable_ranks,
        GPT2.special_ids if special_ids is None else special_ids,
    )
    encoding = tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_ids
    )
    return Tokenizer(encoding)


def split(pattern: str, text: str) -> list[str]:
    """The matches of a split pattern between the special tokens."""
    found: list[str] = []
    for i, segment in enumerate(text.split(END_OF_TEXT)):
        if i:
            found.append(END_OF_TEXT)
        found += regex.findall(PATTERNS[pattern], segment)
    return found


def all_cuts(rule: CutRule, data: bytes) -> list[int]:
    cuts = [rule.first_cut(data, 0)]
    while cuts[-1] >= 0:
        cuts.append(rule.first_cut(data, cuts[-1] + 1))
    return cuts[:-1]


def ids_of(encoding: tiktoken.Encoding, text: str) -> list[int]:
    return encoding.encode(text, allowed_special={END_OF_TEXT})


def check_cuts(encoding: tiktoken.Encoding, rule: CutRule, text: str, rng: random.Random) -> None:
    """Assert that no cut changes a match or a token: all cuts together, and one of them alone."""
    name = encoding.name
    data = text.encode()
    cuts = all_cuts(rule, data)
    if not cuts:
        return
    matches, ids = split(name, text), ids_of(encoding, text)
    for some in (cuts, [rng.choice(cuts)]):
        bounds = [0, *some, len(data)]
        parts = [data[a:b].decode() for a, b in itertools.pairwise(bounds)]
        assert [match for part in parts for match in split(name, part)] == matches, (name, parts)
        assert [i for part in parts for i in ids_of(encoding, part)] == ids, (name, parts)


def fuzz_cuts(encoding: tiktoken.Encoding, rule: CutRule, count: int, seed: int) -> None:
    rng = random.Random(seed)
    for text in random_texts(count, seed):
        check_cuts(encoding, rule, text, rng)


@pytest.mark.parametrize("count", [12_000, pytest.param(150_000, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_cut_changes_a_token(encodings, pattern, count):
    fuzz_cuts(encodings[pattern], rule_of(pattern), count, seed=count)


@pytest.mark.parametrize("pattern", ["r50k", "cl100k", "o200k"])
def test_no_cut_changes_a_token_in_any_short_string(encodings, pattern):
    """All strings of four characters, with one character of each class that the patterns distinguish."""
    rng = random.Random(5)
    one_of_each = [*"as1'./ \n\t、\u0301", "字", "\u3000", "é", END_OF_TEXT]
    for characters in itertools.product(one_of_each, repeat=4):
        check_cuts(encodings[pattern], rule_of(pattern), "".join(characters), rng)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_no_cut_changes_a_match_of_hypothesis(text):
    for name in PATTERNS:
        parts = [part.decode() for part in safe_chunks([text.encode()], rule_of(name), size=1)]
        assert [match for part in parts for match in split(name, part)] == split(name, text)


@pytest.mark.parametrize(
    ("pattern", "wrong"),
    [
        ("r50k", rb"(?<=\n)[!-~]"),  # after a newline
        ("r50k", rb"(?<=[ \n])\n"),  # before a newline, after any character
        ("r50k", rb"(?<= )[!-~]"),  # after a space
        ("r50k", rb"(?<=[\0-~])[ ]"),  # a space after a space
        ("r50k", rb"(?<=\x80) "),  # ... after a space of three bytes
        ("r50k", rb"(?<=\x80\x80) "),  # ... after the ideographic one
        ("r50k", rb"(?<=\xa0) "),  # ... after the no-break space
        ("r50k", rb"(?<=[!-~])[\x1c-\x1f]"),  # before whitespace of Python only
        ("r50k", rb"(?<=[!-/])[a-z]"),  # a letter after an apostrophe
        ("r50k", rb"(?<=[!-~])[.]"),  # a mark after a mark
        ("r50k", rb"(?<=[0-9])[0-9]"),
        ("r50k", rb"(?<=[a-z])[|>]"),  # inside a special token
        ("r50k", rb"(?<=[!-~])[\x80-\xff]"),
        ("cl100k", rb"(?<=[!-~])[\t-\r ]"),  # a newline after a mark
        ("cl100k", rb"(?<=\.)[a-z]"),
        ("cl100k", rb"(?<=[0-9])[0-9]"),
        ("cl100k", rb"(?<=[a-z])[\x80-\xff]"),
        ("o200k", rb"(?<=[!-~])[\t-\r ]"),
        ("o200k", rb"(?<=[a-z])[!-/]"),  # an apostrophe after a letter
        ("o200k", rb"(?<=[a-z])[\x80-\xff]"),  # a combining mark after a letter
        ("o200k", rb"(?<=[\n])/"),
    ],
)
def test_a_wrong_rule_is_found(encodings, pattern, wrong):
    """The fuzz test finds each cut that somebody may believe to be safe."""
    rule = CutRule(re.compile(wrong))
    with pytest.raises((AssertionError, UnicodeDecodeError)):
        fuzz_cuts(encodings[pattern], rule, count=5_000, seed=0)


@pytest.mark.parametrize(
    ("pattern", "text", "cuts"),
    [
        ("r50k", "one two\nthree.\n\nfour", ["one", " two", "\nthree", ".", "\n\nfour"]),
        ("cl100k", "one two\nthree.\n\nfour", ["one", " two", "\nthree", ".\n\nfour"]),
        ("o200k", "it's (b) a/b", ["it's", " (b)", " a/b"]),
        ("r50k", "f8a0+", ["f", "8", "a", "0+"]),
        ("cl100k", "知彼知己，百戰不殆。", ["知彼知己", "，百戰不殆", "。"]),
        ("r50k", "слово за слово", ["слово", " за", " слово"]),
        ("r50k", "a\u3000 b\xa0 c\u1680 d", ["a\u3000 b\xa0 c\u1680 d"]),
        ("r50k", "nowhere_to_cut", ["nowhere_to_cut"]),
    ],
)
def test_cuts(pattern, text, cuts):
    for blocks in ([text.encode()], [bytes([byte]) for byte in text.encode()]):
        assert [part.decode() for part in safe_chunks(blocks, rule_of(pattern), size=1)] == cuts


@pytest.mark.parametrize("pattern", ["r50k", "cl100k", "o200k"])
def test_every_cut_of_a_buffer_is_a_cut_of_the_file(pattern):
    """Even if the buffer starts or ends inside a character or at a space."""
    rng = random.Random(2)
    rule = rule_of(pattern)
    for text in random_texts(2_000, seed=2):
        data = text.encode()
        start, end = sorted(rng.choices(range(len(data) + 1), k=2))
        assert {start + cut for cut in all_cuts(rule, data[start:end])} <= set(all_cuts(rule, data))


@pytest.mark.parametrize("pattern", ["r50k", "cl100k", "o200k"])
def test_cuts_of_a_raw_file_are_cuts_after_newlines_are_translated(encodings, pattern):
    def translate(data: bytes) -> str:
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").decode()

    rng = random.Random(3)
    for text in random_texts(2_000, seed=3):
        data = text.replace("\n", rng.choice(["\r\n", "\r", "\n"])).encode()
        ids = ids_of(encodings[pattern], translate(data))
        for cut in all_cuts(rule_of(pattern), data):
            left, right = translate(data[:cut]), translate(data[cut:])
            assert left + right == translate(data)
            assert ids_of(encodings[pattern], left) + ids_of(encodings[pattern], right) == ids


@pytest.mark.parametrize("pattern", ["r50k", "cl100k", "o200k"])
def test_chunks_depend_on_text_and_size_only(encodings, pattern):
    rng = random.Random(4)
    rule = rule_of(pattern)
    for text in random_texts(1_500, seed=4):
        data = text.encode()
        size = rng.randrange(1, 65)
        parts = list(safe_chunks([data], rule, size))
        ends = [0, *sorted(rng.choices(range(len(data) + 1), k=rng.randrange(12))), len(data)]
        blocks = [data[a:b] for a, b in itertools.pairwise(ends)]
        assert list(safe_chunks(blocks, rule, size)) == parts
        assert b"".join(parts) == data
        assert all(len(part) >= size for part in parts[:-1])
        ids = [i for part in parts for i in ids_of(encodings[pattern], part.decode())]
        assert ids == ids_of(encodings[pattern], text)


def test_without_a_rule_a_text_is_one_chunk():
    assert list(safe_chunks([b"one ", b"", b"two"], None, size=1)) == [b"one two"]


@pytest.mark.parametrize("rule", [None, rule_of("r50k")])
def test_an_empty_text_has_no_chunks(rule):
    assert list(safe_chunks([], rule)) == list(safe_chunks([b"", b""], rule)) == []


@pytest.mark.parametrize("block", [1, 7, 400, 5000])
def test_a_text_that_cannot_be_cut_is_refused(block, monkeypatch):
    data = b"one " * 100 + b"a" * 301 + b" end"
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    monkeypatch.setattr(chunks, "MAX_UNCUT_BYTES", 298)
    assert b"".join(safe_chunks(blocks, rule_of("r50k"), size=100)) == data
    # three chunks end at 103, 203 and 303; the next one would end at 403 or later, but the cut is at 701
    monkeypatch.setattr(chunks, "MAX_UNCUT_BYTES", 297)
    with pytest.raises(ValueError, match=r"cannot be cut in the 297 bytes after byte 403, .*'aaaa"):
        list(safe_chunks(blocks, rule_of("r50k"), size=100))


def test_memory_does_not_grow_with_the_text():
    tracemalloc.start()
    for _ in safe_chunks((b"To be, or not to be. " * 500 for _ in range(5_000)), rule_of("r50k")):
        pass  # 52 MB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_all_of_tiktokens_encodings_have_a_rule(monkeypatch):
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: {})
    encodings = [constructor() for constructor in openai_public.ENCODING_CONSTRUCTORS.values()]
    assert len(encodings) >= 6
    for each in encodings:
        reference = SimpleNamespace(
            library="tiktoken", rule=each["pat_str"], whole_strings=each["special_tokens"]
        )
        assert cut_rule(reference)


@pytest.mark.parametrize("special", ["<s1>", "[a.b]", "<|end of text|>"])
def test_no_cut_divides_a_special_token(special):
    rule = with_gpt2_ranks(R50K_PATTERN, {END_OF_TEXT: 50256, special: 50257}).cut_rule
    assert (rule is None) == (" " in special)
    if rule:
        assert [*safe_chunks([f"one{special} two.".encode()], rule, 1)] == [
            f"one{special}".encode(),
            b" two.",
        ]


def test_there_is_no_rule_for_an_unknown_pattern():
    assert with_gpt2_ranks(r"\w+|\s+|[^\w\s]+").cut_rule is None


@pytest.mark.parametrize("text", ["", "a\ud800", "\udfff\ud83d\ude00b", "plain", "é😀"])
def test_utf8_replaces_lone_surrogates_as_tiktoken_does(text):
    encoding = Tokenizer("gpt2").reference.encoding
    assert encoding.encode(utf8(text).decode()) == encoding.encode(text)
