"""Ids are tiktoken's, whatever engine made them."""

from __future__ import annotations

import importlib.metadata
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gptdata.text.document import utf8
from lit_gptdata.tokens import engines as engine_module
from lit_gptdata.tokens.chunks import (
    _SPACES,
    CL100K_PATTERN,
    GPT2_PATTERN,
    O200K_PATTERN,
    R50K_PATTERN,
    CutRule,
    _run,
    cut_rule,
    pieces,
)
from lit_gptdata.tokens.engines import (
    CLASSES_DIFFER,
    Engine,
    GigatokenEngine,
    TiktokenEngine,
    load_engine,
)
from lit_gptdata.tokens.tokenizer import END_OF_TEXT, SpecialTokens, Tokenizer

from .test_chunks import PATTERNS, SPACES, random_text, random_texts, split

POLICIES: list[SpecialTokens] = ["allow", "text", "error"]
UNICODE_17_LETTER = "\U0003261a"


def load(name: str, policy: SpecialTokens = "allow") -> Engine:
    if name == "gigatoken":
        pytest.importorskip("gigatoken")
        return load_engine(Tokenizer("gpt2", policy), "gigatoken")
    return load_engine(Tokenizer("gpt2", policy), "tiktoken")


@pytest.fixture(scope="module", params=["tiktoken", "gigatoken"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return load(request.param)


def expected(text: str, policy: SpecialTokens = "allow") -> list[int]:
    encoding = Tokenizer("gpt2").encoding
    if policy == "text":
        return encoding.encode_ordinary(text)
    return encoding.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=())


def gpt2_ranks(pattern: str, specials: dict[str, int]) -> Tokenizer:
    """A tokenizer with gpt2's ranks, and a split pattern and special tokens of its own."""
    ranks = Tokenizer("gpt2").encoding._mergeable_ranks
    return Tokenizer(
        tiktoken.Encoding("mine", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    )


def check_texts(engine: Engine, policy: SpecialTokens, count: int, seed: int) -> None:
    for text in random_texts(count, seed):
        if policy == "error" and END_OF_TEXT in text:
            with pytest.raises(ValueError, match="special_tokens='error' refuses"):
                engine.encode(text.encode())
        else:
            assert engine.encode(text.encode()).tolist() == expected(text, policy), repr(text)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["tiktoken", "gigatoken"])
def test_ids_are_tiktokens(name: str, policy: SpecialTokens) -> None:
    check_texts(load(name, policy), policy, count=10_000, seed=10)


@pytest.mark.heavy
@pytest.mark.parametrize("policy", POLICIES)
def test_ids_are_tiktokens_in_many_strings(policy: SpecialTokens) -> None:
    check_texts(load("gigatoken", policy), policy, count=200_000, seed=11)


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_ids_are_tiktokens_in_strings_of_hypothesis(engine: Engine, text: str) -> None:
    assert engine.encode(text.encode()).tolist() == expected(text)


@pytest.mark.parametrize("size", [1, 64, 1000, 1 << 16, 1 << 26])
def test_ids_do_not_depend_on_the_pieces(engine: Engine, size: int) -> None:
    rng = random.Random(12)
    text = " ".join(random_text(rng) for _ in range(10_000))
    rule = cut_rule(R50K_PATTERN, {END_OF_TEXT})
    parts = [engine.encode(piece) for piece in pieces([text.encode()], rule, size)]
    assert np.concatenate(parts).tolist() == expected(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n", "\ufeffbom", "a\0b", "\r\n\r", "a\x1c b", END_OF_TEXT, f"a \n{END_OF_TEXT} \nb"],
)
def test_ids_of_edge_cases(engine: Engine, text: str) -> None:
    assert engine.encode(text.encode()).tolist() == expected(text)


def test_lone_surrogates_give_tiktokens_ids(engine: Engine) -> None:
    text = "a \ud800 b\udfff"
    assert engine.encode(utf8(text)).tolist() == expected(text)


def test_ids_are_in_the_tokenizers_dtype(engine: Engine) -> None:
    assert engine.encode(b"hello world").dtype == "<u2"


def test_ids_above_65535_are_kept() -> None:
    tokenizer = gpt2_ranks(R50K_PATTERN, {END_OF_TEXT: 70_000})
    for name in ("tiktoken", "auto"):
        ids = load_engine(tokenizer, name).encode(f"a{END_OF_TEXT}".encode())
        assert ids.dtype == "<u4"
        assert ids.tolist() == [64, 70_000]


# --- whitespace runs ---------------------------------------------------------------------------


def check_million(pattern: str, text: str) -> None:
    """tiktoken alone raises or panics here; so another regex engine makes the matches."""
    tokenizer = gpt2_ranks(PATTERNS[pattern], {END_OF_TEXT: 50256})
    want: list[int] = []
    for match in split(pattern, text):
        want += [50256] if match == END_OF_TEXT else tokenizer.encoding._encode_single_piece(match)
    assert np.array_equal(load_engine(tokenizer, "tiktoken").encode(text.encode()), want)
    if pattern == "r50k":
        assert np.array_equal(load("gigatoken").encode(text.encode()), want)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("text", ["so{}much", f"{{}}{END_OF_TEXT}"])
def test_a_million_spaces(pattern: str, text: str) -> None:
    check_million(pattern, text.format(" " * 1_000_100))


@pytest.mark.heavy
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
@pytest.mark.parametrize("text", ["so{}", "so{}!", "so{}\x1c", "!{}1", "!\n{}", "{}\n x", "\n{}\n  x"])
def test_a_million_of_other_whitespace(pattern: str, space: str, text: str) -> None:
    check_million(pattern, text.format(space * 1_000_100))


@pytest.mark.parametrize(
    ("pattern", "chars", "at_the_end"),
    [
        (R50K_PATTERN, "\r\n" + _SPACES, True),
        (GPT2_PATTERN, "\r\n" + _SPACES, True),
        (CL100K_PATTERN, _SPACES, False),
        (O200K_PATTERN, _SPACES, True),
    ],
)
def test_long_runs_split_as_the_pattern_does(pattern: str, chars: str, at_the_end: bool) -> None:
    """The way around the pattern, taken for runs of two characters, changes no token."""
    tokenizer = gpt2_ranks(pattern, {END_OF_TEXT: 50256})
    rule = cut_rule(pattern)
    assert rule is not None
    assert rule.whole_run.pattern == _run(chars, at_the_end).pattern
    engine = TiktokenEngine(tokenizer)
    engine._rule = CutRule(rule.cut, _run(chars, at_the_end, length=2))
    rng = random.Random(13)
    for _ in range(10_000):
        spaces = "".join(rng.choices(SPACES, k=rng.randrange(2, 9)))
        text = random_text(rng) + spaces + random_text(rng)
        assert engine._encode_long_runs(text).tolist() == tokenizer.encode(text), repr(text)


@pytest.mark.parametrize("run", ["a", "7", "-", "é", "\0", "😀"])
def test_one_word_of_a_hundred_thousand_characters(engine: Engine, run: str) -> None:
    assert engine.encode((run * 100_000).encode()).tolist() == expected(run * 100_000)


# --- gigatoken and what it is not trusted with -------------------------------------------------


@pytest.mark.parametrize("code", [code for ends in CLASSES_DIFFER for code in ends])
def test_characters_of_other_classes_get_tiktokens_ids(code: int) -> None:
    engine = load("gigatoken")
    for text in (f"a{chr(code)}a", f"1{chr(code)}\u905d", f" {chr(code)}!", f"{chr(code)}'s"):
        assert engine.encode(text.encode()).tolist() == expected(text)


def test_there_are_as_many_of_them_as_were_found() -> None:
    assert sum(b - a + 1 for a, b in CLASSES_DIFFER) == 4_657


def test_gigatoken_alone_would_give_other_ids() -> None:
    """Were it to fail, gigatoken would know what tiktoken knows, and `CLASSES_DIFFER` be too large."""
    engine = load("gigatoken")
    assert isinstance(engine, GigatokenEngine)
    text = UNICODE_17_LETTER + "\u905d"
    assert engine._gigatoken.encode(text.encode()).tolist() != expected(text)


def test_only_what_begins_like_those_characters_goes_to_tiktoken() -> None:
    prefixes = {chr(c).encode()[:3] for a, b in CLASSES_DIFFER for c in range(a, b + 1)}
    one_of_each_prefix = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 64)]
    for code in one_of_each_prefix:
        character = chr(code).encode()
        assert engine_module._classes_differ(character) == (character[:3] in prefixes)


def classes(
    encode: Callable[[str], object], block: list[str], probes: bytes, first_pair: int, end_of_text: int
) -> np.ndarray:
    """Whether each character and each probe after it are one match: (len(block), len(probes))."""
    ids = np.array(encode(END_OF_TEXT.join(c + chr(probe) for c in block for probe in probes)))
    last = np.append(np.flatnonzero(ids == end_of_text) - 1, len(ids) - 1)
    return (ids[last] >= first_pair).reshape(len(block), len(probes))


@pytest.mark.heavy
def test_classes_differ_for_these_code_points_and_no_others(tmp_path: Path) -> None:
    """The derivation of `CLASSES_DIFFER`; see there."""
    gigatoken = pytest.importorskip("gigatoken")
    probes = b"A1!\n"  # a letter, a digit, a mark, whitespace
    tokens = [bytes([i]) for i in range(256)]
    tokens += [bytes([i, probe]) for i in range(256) for probe in probes]
    end_of_text = len(tokens)
    encoding = tiktoken.Encoding(
        "probe",
        pat_str=R50K_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: end_of_text},
    )
    file = tmp_path / "probe.tiktoken"
    file.write_bytes(engine_module._rank_file(Tokenizer(encoding)))
    other = gigatoken.Tokenizer.from_tiktoken(file, "gpt2", {END_OF_TEXT: end_of_text})

    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    found = set()
    for start in range(0, len(characters), 4096):
        block = characters[start : start + 4096]
        ours, theirs = (
            classes(encode, block, probes, 256, end_of_text)
            for encode in (
                lambda text: encoding.encode(text, allowed_special={END_OF_TEXT}),
                lambda text: other.encode(text.encode()),
            )
        )
        found |= {block[i] for i in np.flatnonzero((ours != theirs).any(axis=1))}
    assert found == {chr(c) for a, b in CLASSES_DIFFER for c in range(a, b + 1)}


def renewals(texts: int) -> list[int]:
    """After which of that many texts of ten bytes a new gigatoken instance is there."""
    engine = load("gigatoken")
    assert isinstance(engine, GigatokenEngine)
    instances = [engine._gigatoken._instance]
    for _ in range(texts):
        assert engine._gigatoken.encode(b"ten bytes.").tolist() == expected("ten bytes.")
        instances.append(engine._gigatoken._instance)
    return [i for i in range(1, texts + 1) if instances[i] is not instances[i - 1]]


def test_an_instance_is_renewed_when_memory_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = engine_module.CACHE_LIMIT
    memory = iter([0, 100, limit, limit + 1, 3 * limit, 4 * limit, 4 * limit + 1, 9 * limit])
    monkeypatch.setattr(engine_module, "_anonymous_memory", lambda: next(memory))
    monkeypatch.setattr(engine_module, "CHECK_EVERY", 50)
    # it is looked at with each 5th text: little, the limit, and more than that; so from 3 limits on anew
    assert renewals(27) == [15, 25]


def test_an_instance_is_renewed_after_some_text_where_memory_is_not_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "_anonymous_memory", lambda: None)
    monkeypatch.setattr(engine_module, "CHECK_EVERY", 20)
    monkeypatch.setattr(engine_module, "RENEW_EVERY", 100)
    assert renewals(25) == [10, 20]


def test_loading_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load("gigatoken").encode(b"hello")
    assert list(tmp_path.iterdir()) == []


def test_the_start_of_a_build_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load("gigatoken")
    assert isinstance(engine, GigatokenEngine)
    right = engine._gigatoken.encode
    monkeypatch.setattr(engine._gigatoken, "encode", lambda piece: right(piece.replace(b"no", b"yes")))
    text = "é" * 40_000  # more than is compared
    assert engine.encode(text.encode()).tolist() == expected(text)
    assert engine.encode(b"no").tolist() == right(b"yes").tolist()

    engine = load("gigatoken")
    assert isinstance(engine, GigatokenEngine)
    monkeypatch.setattr(engine._gigatoken, "encode", lambda piece: right(piece.replace(b"no", b"yes")))
    assert engine.encode(b"is it").tolist() == expected("is it")
    with pytest.warns(
        UserWarning, match=r"going on with tiktoken.*id 1 .*'is no' is 3763 instead of 645"
    ):
        assert engine.encode(b"is no").tolist() == expected("is no")
    assert engine.name == "tiktoken"
    assert engine.encode(b"no").tolist() == expected("no")


@pytest.mark.parametrize("text", ["a" * 70_000, "字" * 30_000, UNICODE_17_LETTER + "a" * 70_000])
def test_the_comparison_divides_no_character(text: str) -> None:
    engine = load("gigatoken")
    assert engine.encode(text.encode()).tolist() == expected(text)
    assert engine.name == "gigatoken"


# --- which engine ------------------------------------------------------------------------------


def test_auto_is_gigatoken_where_it_is_installed() -> None:
    pytest.importorskip("gigatoken")
    assert load_engine(Tokenizer("gpt2")).name == "gigatoken"
    assert load_engine(gpt2_ranks(GPT2_PATTERN, {"<|pad|>": 50257})).name == "gigatoken"


def test_auto_is_tiktoken_where_gigatoken_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert load_engine(Tokenizer("gpt2")).name == "tiktoken"
    with pytest.raises(ImportError, match=r"pip install 'lit-gptdata\[fast\]'"):
        load_engine(Tokenizer("gpt2"), "gigatoken")


def other_ranks() -> Tokenizer:
    ranks = {bytes([i]): i for i in range(256)}
    return Tokenizer(
        tiktoken.Encoding("mine", pat_str=R50K_PATTERN, mergeable_ranks=ranks, special_tokens={})
    )


@pytest.mark.parametrize("make", [lambda: gpt2_ranks(CL100K_PATTERN, {}), other_ranks])
def test_other_encodings_go_to_tiktoken(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    assert load_engine(tokenizer).name == "tiktoken"
    pytest.importorskip("gigatoken")
    with pytest.raises(ValueError, match="gpt2 and r50k_base only, not for 'mine'"):
        load_engine(tokenizer, "gigatoken")


@pytest.mark.parametrize(("package", "version"), [("gigatoken", "0.11.0"), ("tiktoken", "0.15.0")])
def test_other_versions_go_to_tiktoken(
    package: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gigatoken")
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == package else real(name)
    )
    with pytest.warns(UserWarning, match=rf"going on with tiktoken.*{package} {version}.*fast"):
        assert load_engine(Tokenizer("gpt2")).name == "tiktoken"
    with pytest.raises(ValueError, match=f"{package} {version}"):
        load_engine(Tokenizer("gpt2"), "gigatoken")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown engine 'hf': choose 'auto', 'tiktoken' or 'gigatoken'"
    ):
        load_engine(Tokenizer("gpt2"), "hf")  # type: ignore[arg-type]


def test_gigatoken_is_not_imported_before_it_is_used() -> None:
    program = "import sys, lit_gptdata.tokens.engines; print(*sys.modules)"
    root = Path(engine_module.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert {"gigatoken", "tiktoken", "torch"}.isdisjoint(done.stdout.split())
