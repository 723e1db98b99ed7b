"""Cuts change no token: every rule against the split pattern itself, on strings made to break it."""

from __future__ import annotations

import itertools
import random
import re
import tracemalloc
from collections.abc import Iterator

import pytest
import regex  # tiktoken needs it; here it runs the split patterns
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from lit_gptdata.text.document import utf8
from lit_gptdata.tokens.chunks import (
    CL100K_PATTERN,
    GPT2_PATTERN,
    O200K_PATTERN,
    R50K_PATTERN,
    CutRule,
    cut_rule,
    pieces,
)
from lit_gptdata.tokens.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
PATTERNS = {
    "r50k": R50K_PATTERN,
    "gpt2": GPT2_PATTERN,
    "cl100k": CL100K_PATTERN,
    "o200k": O200K_PATTERN,
}

# Whitespace of Unicode, what Python alone takes for it, and what only looks like it.
SPACES = [
    *" \t\n\v\f\r\x85\xa0\u1680\u2000\u2007\u200a\u2028\u2029\u202f\u205f\u3000",
    *"\x1c\x1d\x1e\x1f\u180e\u200b\u200d\ufeff\0\x7f",
    *[" "] * 12,
    *["\n"] * 6,
    "\r\n",
    "\r\n",
    "\n\n",
    "  ",
]
LETTERS = [
    *"abstdmlvreABSTDMLVRE",
    *"éßЖя字学あむアー한اกิि\u0301ſKǅʰª\u2c00",
    "ll",
    "Word",
    "word",
    "слово",
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
    """A short string in which the characters that decide a split stand next to each other."""
    parts = []
    for _ in range(rng.randrange(1, 24)):
        part = rng.choice(rng.choice(KINDS)) if rng.random() < 0.93 else any_character(rng)
        parts.append(part * (rng.randrange(2, 9) if rng.random() < 0.12 else 1))
    return "".join(parts)


def random_texts(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    return (random_text(rng) for _ in range(count))


def rule_of(pattern: str) -> CutRule:
    rule = cut_rule(PATTERNS[pattern], {END_OF_TEXT})
    assert rule is not None
    return rule


@pytest.fixture(scope="module")
def encodings() -> dict[str, tiktoken.Encoding]:
    """For each pattern an encoding of its own; the ranks are gpt2's, since the others need a network."""
    gpt2 = Tokenizer("gpt2").encoding
    return {
        name: tiktoken.Encoding(
            name=name,
            pat_str=pattern,
            mergeable_ranks=gpt2._mergeable_ranks,
            special_tokens=gpt2._special_tokens,
        )
        for name, pattern in PATTERNS.items()
    }


def split(pattern: str, text: str) -> list[str]:
    """The matches of a split pattern, with special tokens taken out first, as tiktoken does it."""
    found: list[str] = []
    for i, segment in enumerate(text.split(END_OF_TEXT)):
        if i:
            found.append(END_OF_TEXT)
        found += regex.findall(PATTERNS[pattern], segment)
    return found


def all_cuts(rule: CutRule, data: bytes) -> list[int]:
    cuts = []
    cut = rule.first_cut(data, 0)
    while cut >= 0:
        cuts.append(cut)
        cut = rule.first_cut(data, cut + 1)
    return cuts


def ids_of(encoding: tiktoken.Encoding, text: str) -> list[int]:
    return encoding.encode(text, allowed_special={END_OF_TEXT})


def check_cuts(encoding: tiktoken.Encoding, rule: CutRule, text: str, rng: random.Random) -> None:
    """Assert that no cut changes a match or a token: all cuts at once, and one of them alone."""
    name = encoding.name
    data = text.encode()
    cuts = all_cuts(rule, data)
    if not cuts:
        return
    whole, ids = split(name, text), ids_of(encoding, text)
    for some in (cuts, [rng.choice(cuts)]):
        bounds = [0, *some, len(data)]
        parts = [data[a:b].decode() for a, b in itertools.pairwise(bounds)]
        assert [match for part in parts for match in split(name, part)] == whole, (name, parts)
        assert [i for part in parts for i in ids_of(encoding, part)] == ids, (name, parts)


def fuzz_cuts(encoding: tiktoken.Encoding, rule: CutRule, count: int, seed: int) -> None:
    rng = random.Random(seed)
    for text in random_texts(count, seed):
        check_cuts(encoding, rule, text, rng)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_cut_changes_a_token(encodings: dict[str, tiktoken.Encoding], pattern: str) -> None:
    fuzz_cuts(encodings[pattern], rule_of(pattern), count=12_000, seed=0)


@pytest.mark.heavy
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_cut_changes_a_token_in_many_strings(
    encodings: dict[str, tiktoken.Encoding], pattern: str
) -> None:
    fuzz_cuts(encodings[pattern], rule_of(pattern), count=150_000, seed=1)


@pytest.mark.parametrize("pattern", ["r50k", "cl100k", "o200k"])
def test_no_cut_changes_a_token_in_any_short_string(
    encodings: dict[str, tiktoken.Encoding], pattern: str
) -> None:
    """All strings of four, from 15 characters that stand for the classes the patterns tell apart."""
    rng = random.Random(5)
    one_of_each = [*"as1'./ \n\t、\u0301", "字", "\u3000", "é", END_OF_TEXT]
    for characters in itertools.product(one_of_each, repeat=4):
        check_cuts(encodings[pattern], rule_of(pattern), "".join(characters), rng)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_no_cut_changes_a_match_of_hypothesis(text: str) -> None:
    for name in PATTERNS:
        parts = [part.decode() for part in pieces([text.encode()], rule_of(name), size=1)]
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
        ("r50k", rb"(?<=[!-~])[\x1c-\x1f]"),  # before what only Python takes for whitespace
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
def test_a_wrong_rule_is_found(
    encodings: dict[str, tiktoken.Encoding], pattern: str, wrong: bytes
) -> None:
    """What keeps the fuzz honest: it fails on each cut that somebody may believe to be safe."""
    rule = CutRule(re.compile(wrong), rule_of(pattern).whole_run)
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
def test_cuts(pattern: str, text: str, cuts: list[str]) -> None:
    for chunks in ([text.encode()], [bytes([byte]) for byte in text.encode()]):
        assert [part.decode() for part in pieces(chunks, rule_of(pattern), size=1)] == cuts


@pytest.mark.parametrize("pattern", ["r50k", "cl100k", "o200k"])
def test_cuts_of_a_file_do_not_depend_on_what_is_read_of_it(pattern: str) -> None:
    """A buffer that begins or ends inside a character, or at a space, has no cut of its own."""
    rng = random.Random(2)
    rule = rule_of(pattern)
    for text in random_texts(2_000, seed=2):
        data = text.encode()
        start, end = sorted(rng.choices(range(len(data) + 1), k=2))
        assert {start + cut for cut in all_cuts(rule, data[start:end])} <= set(all_cuts(rule, data))


@pytest.mark.parametrize("pattern", ["r50k", "cl100k", "o200k"])
def test_cuts_of_a_raw_file_are_cuts_after_newlines_are_translated(
    encodings: dict[str, tiktoken.Encoding], pattern: str
) -> None:
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
def test_pieces_depend_on_text_and_size_only(
    encodings: dict[str, tiktoken.Encoding], pattern: str
) -> None:
    rng = random.Random(4)
    rule = rule_of(pattern)
    for text in random_texts(1_500, seed=4):
        data = text.encode()
        size = rng.randrange(1, 65)
        parts = list(pieces([data], rule, size))
        ends = [0, *sorted(rng.choices(range(len(data) + 1), k=rng.randrange(12))), len(data)]
        chunks = [data[a:b] for a, b in itertools.pairwise(ends)]
        assert list(pieces(chunks, rule, size)) == parts
        assert b"".join(parts) == data
        assert all(len(part) >= size for part in parts[:-1])
        ids = [i for part in parts for i in ids_of(encodings[pattern], part.decode())]
        assert ids == ids_of(encodings[pattern], text)


def test_a_text_is_one_piece_without_a_rule() -> None:
    assert list(pieces([b"one ", b"", b"two"], None, size=1)) == [b"one two"]


@pytest.mark.parametrize("rule", [None, rule_of("r50k")])
def test_no_text_is_no_piece(rule: CutRule | None) -> None:
    assert list(pieces([], rule)) == list(pieces([b"", b""], rule)) == []


@pytest.mark.parametrize("chunk", [1, 7, 400, 5000])
def test_a_text_that_cannot_be_cut_is_refused(chunk: int) -> None:
    data = b"one " * 100 + b"a" * 301 + b" end"
    chunks = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    assert b"".join(pieces(chunks, rule_of("r50k"), size=100, max_uncut=298)) == data
    # the pieces before it end at 103, 203 and 303; the next would at 403 or later, but there is 701
    with pytest.raises(ValueError, match=r"no place to cut .* 297 bytes .* from byte 403 on; .*'aaaa"):
        list(pieces(chunks, rule_of("r50k"), size=100, max_uncut=297))


def test_memory_does_not_grow_with_the_text() -> None:
    tracemalloc.start()
    for _ in pieces((b"To be, or not to be. " * 500 for _ in range(5_000)), rule_of("r50k")):
        pass  # 52 MB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def openai_encodings(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, set[str]]]:
    """Patterns and special tokens of all of tiktoken's encodings, without their vocabularies."""
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: {})
    for constructor in openai_public.ENCODING_CONSTRUCTORS.values():
        encoding = constructor()
        yield encoding["pat_str"], set(encoding["special_tokens"])


def test_all_of_tiktokens_encodings_have_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [cut_rule(*encoding) for encoding in openai_encodings(monkeypatch)]
    assert len(rules) >= 6
    assert None not in rules


@pytest.mark.parametrize("special", ["<|end of text|>", "<s1>", "[a.b]"])
def test_no_rule_that_could_divide_a_special_token(special: str) -> None:
    assert cut_rule(R50K_PATTERN, {END_OF_TEXT, special}) is None


def test_no_rule_for_an_unknown_pattern() -> None:
    assert cut_rule(r"\w+|\s+", {END_OF_TEXT}) is None


@pytest.mark.parametrize("text", ["", "a\ud800", "\udfff\ud83d\ude00b", "plain", "é😀"])
def test_utf8_replaces_lone_surrogates_as_tiktoken_does(text: str) -> None:
    encoding = Tokenizer("gpt2").encoding
    assert encoding.encode(utf8(text).decode()) == encoding.encode(text)
