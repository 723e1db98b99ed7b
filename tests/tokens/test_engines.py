"""Every engine gives the ids of tiktoken."""

from __future__ import annotations

import importlib.metadata
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gptdata.text.document import utf8
from lit_gptdata.tokens import gigatoken as module
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.chunks import CLASSES_DIFFER, GPT2_PATTERN, R50K_PATTERN, safe_chunks
from lit_gptdata.tokens.engines import Engine, load_engine
from lit_gptdata.tokens.tokenizer import END_OF_TEXT, SpecialTokens, Tokenizer
from tests.tokens.test_chunks import PATTERNS, random_text, random_texts, split, with_gpt2_ranks

POLICIES: list[SpecialTokens] = ["allow", "text", "error"]
UNICODE_17_LETTER = "\U0003261a"


def load(name: str, policy: SpecialTokens = "allow") -> Engine:
    pytest.importorskip(name)
    return load_engine(Tokenizer("gpt2", policy), name)


@pytest.fixture(scope="module", params=["tiktoken", "gigatoken"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return load(request.param)


@pytest.fixture(scope="module")
def gigatoken() -> Engine:
    return load("gigatoken")


def expected(text: str, policy: SpecialTokens = "allow") -> list[int]:
    encoding = Tokenizer("gpt2").reference.encoding
    if policy == "text":
        return encoding.encode_ordinary(text)
    return encoding.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=())


MANY = pytest.param("gigatoken", 200_000, marks=pytest.mark.heavy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("name", "count"), [("tiktoken", 10_000), ("gigatoken", 10_000), MANY])
def test_ids_are_tiktokens(name, policy, count):
    engine = load(name, policy)
    for text in random_texts(count, seed=count):
        if policy == "error" and END_OF_TEXT in text:
            with pytest.raises(ValueError, match="special_tokens='error' refuses"):
                engine.encode(text.encode())
        else:
            assert engine.encode(text.encode()).tolist() == expected(text, policy), repr(text)


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_ids_are_tiktokens_in_strings_of_hypothesis(engine, text):
    assert engine.encode(text.encode()).tolist() == expected(text)


@pytest.mark.parametrize("size", [1, 64, 1000, 1 << 16, 1 << 26])
def test_ids_do_not_depend_on_the_chunks(engine, size):
    rng = random.Random(12)
    text = " ".join(random_text(rng) for _ in range(10_000))
    rule = Tokenizer("gpt2").cut_rule
    parts = [engine.encode(chunk) for chunk in safe_chunks([text.encode()], rule, size)]
    assert np.concatenate(parts).tolist() == expected(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n", "\ufeffbom", "a\0b", "\r\n\r", "a\x1c b", END_OF_TEXT, f"a \n{END_OF_TEXT} \nb"],
)
def test_ids_of_edge_cases(engine, text):
    assert engine.encode(text.encode()).tolist() == expected(text)


def test_lone_surrogates_give_tiktokens_ids(engine):
    text = "a \ud800 b\udfff"
    assert engine.encode(utf8(text)).tolist() == expected(text)


def test_ids_are_in_the_tokenizers_dtype(engine):
    assert engine.encode(b"hello world").dtype == "<u2"


def test_ids_above_65535_are_kept():
    tokenizer = with_gpt2_ranks(R50K_PATTERN, {END_OF_TEXT: 70_000})
    for name in ("tiktoken", "auto"):
        ids = load_engine(tokenizer, name).encode(f"a{END_OF_TEXT}".encode())
        assert ids.dtype == "<u4"
        assert ids.tolist() == [64, 70_000]


HEAVY_RUNS = [
    pytest.param(space, text, marks=pytest.mark.heavy)
    for space in (" ", "\n", "\u3000")
    for text in ("so{}", "so{}!", "so{}\x1c", "!{}1", "!\n{}", "{}\n x", "\n{}\n  x")
]
RUNS = [(" ", "so{}much"), (" ", f"{{}}{END_OF_TEXT}"), *HEAVY_RUNS]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("space", "text"), RUNS)
def test_a_million_whitespace_characters(pattern, space, text):
    """Another regex engine makes the matches, because tiktoken alone raises or panics."""
    text = text.format(space * 1_000_100)
    tokenizer = with_gpt2_ranks(PATTERNS[pattern])
    encode_match = tokenizer.reference.encoding._encode_single_piece
    want: list[int] = []
    for match in split(pattern, text):
        want += [50256] if match == END_OF_TEXT else encode_match(match)
    assert np.array_equal(load_engine(tokenizer, "tiktoken").encode(text.encode()), want)
    if pattern == "r50k":
        assert np.array_equal(load("gigatoken").encode(text.encode()), want)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_regex_engine_for_long_runs_gives_the_same_ids(pattern):
    tokenizer = with_gpt2_ranks(PATTERNS[pattern])
    for text in random_texts(5_000, seed=13):
        if module._classes_differ(text.encode()):
            continue  # regex may know newer characters
        ids = tokenizer.reference._encode_matches(text, frozenset([END_OF_TEXT]))
        assert ids.tolist() == tokenizer.encode(text), repr(text)


@pytest.mark.parametrize("run", ["a", "7", "-", "é", "\0", "😀"])
def test_one_word_of_a_hundred_thousand_characters(engine, run):
    assert engine.encode((run * 100_000).encode()).tolist() == expected(run * 100_000)


@pytest.mark.parametrize("code", [code for ends in CLASSES_DIFFER for code in ends])
def test_characters_of_other_classes_get_tiktokens_ids(code, gigatoken):
    for text in (f"a{chr(code)}a", f"1{chr(code)}\u905d", f" {chr(code)}!", f"{chr(code)}'s"):
        assert gigatoken.encode(text.encode()).tolist() == expected(text)


def test_gigatoken_alone_would_give_other_ids():
    """Otherwise gigatoken would agree with tiktoken, and `CLASSES_DIFFER` would not be needed."""
    engine = load("gigatoken")
    text = UNICODE_17_LETTER + "\u905d"
    assert engine._gigatoken.encode(text.encode()).tolist() != expected(text)


def test_only_texts_with_those_characters_go_to_the_library():
    listed = {c for a, b in CLASSES_DIFFER for c in range(a, b + 1)}
    for code in [*range(0xD800), *range(0xE000, 0x33480)]:
        assert module._classes_differ(chr(code).encode()) == (code in listed)
    for code in listed:
        assert module._classes_differ(f"é字🙂{chr(code)}é字🙂".encode())


def renewals(texts: int) -> list[int]:
    """Encode texts of ten bytes; returns after which of them the instance was replaced."""
    engine = load("gigatoken")
    instances = [engine._gigatoken._instance]
    for _ in range(texts):
        assert engine._gigatoken.encode(b"ten bytes.").tolist() == expected("ten bytes.")
        instances.append(engine._gigatoken._instance)
    return [i for i in range(1, texts + 1) if instances[i] is not instances[i - 1]]


def test_an_instance_is_renewed_when_memory_has_grown(monkeypatch):
    limit = module.CACHE_LIMIT
    memory = iter([0, 100, limit, limit + 1, 3 * limit, 4 * limit, 4 * limit + 1, 9 * limit])
    monkeypatch.setattr(module, "_anonymous_memory", lambda _: next(memory))
    monkeypatch.setattr(module, "CHECK_EVERY", 50)
    # checked after every 5th text: below the limit, at the limit, above it; then again from 3 limits on
    assert renewals(27) == [15, 25]


def test_without_proc_an_instance_is_renewed_after_some_text(monkeypatch):
    monkeypatch.setattr(module, "Path", lambda _: Path("/no/proc"))
    monkeypatch.setattr(module, "CHECK_EVERY", 20)
    monkeypatch.setattr(module, "CACHE_LIMIT", 149)
    assert renewals(25) == [10, 20]


def test_loading_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load("gigatoken").encode(b"hello")
    assert list(tmp_path.iterdir()) == []


def test_the_start_of_a_build_is_compared(monkeypatch):
    engine = load("gigatoken")
    right = engine._gigatoken.encode

    def wrong(chunk: bytes) -> object:
        return right(chunk.replace(b"no", b"yes"))

    monkeypatch.setattr(engine._gigatoken, "encode", wrong)
    text = "é" * 40_000  # more than the engine compares
    assert engine.encode(text.encode()).tolist() == expected(text)
    assert engine.encode(b"no").tolist() == right(b"yes").tolist()

    engine = load("gigatoken")
    monkeypatch.setattr(engine._gigatoken, "encode", wrong)
    assert engine.encode(b"is it").tolist() == expected("is it")
    message = r"falling back to tiktoken, because gigatoken gives other ids to a text .* 'is no'"
    with pytest.warns(UserWarning, match=message):
        assert engine.encode(b"is no").tolist() == expected("is no")
    assert engine.name == "tiktoken"
    assert engine.encode(b"no").tolist() == expected("no")


@pytest.mark.parametrize("text", ["a" * 70_000, "字" * 30_000, UNICODE_17_LETTER + "a" * 70_000])
def test_the_comparison_never_divides_a_character(text):
    engine = load("gigatoken")
    assert engine.encode(text.encode()).tolist() == expected(text)
    assert engine.name == "gigatoken"


def test_auto_is_gigatoken_if_it_is_installed():
    pytest.importorskip("gigatoken")
    assert load_engine(Tokenizer("gpt2")).name == "gigatoken"
    assert load_engine(with_gpt2_ranks(GPT2_PATTERN, {"<|pad|>": 50257})).name == "gigatoken"


def test_auto_is_tiktoken_if_gigatoken_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert load_engine(Tokenizer("gpt2")).name == "tiktoken"
    with pytest.raises(ImportError, match=r"pip install 'lit-gptdata\[fast\]'"):
        load_engine(Tokenizer("gpt2"), "gigatoken")


def with_ranks(ranks: dict[bytes, int], pattern: str = R50K_PATTERN) -> Tokenizer:
    ranks = {bytes([i]): i for i in range(256)} | ranks
    return Tokenizer(
        tiktoken.Encoding("mine", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    )


def test_another_way_to_split_goes_to_the_reference_with_one_line_of_log(caplog):
    pytest.importorskip("gigatoken")
    tokenizer = with_ranks({}, r"\w+|\s+|[^\w\s]+")
    problem = f"gigatoken is not tested with the way in which {tokenizer.name!r} splits a text"
    with caplog.at_level("INFO"):
        assert load_engine(tokenizer).name == "tiktoken"
    assert caplog.messages == [f"{problem}; tiktoken is used, which is slower"]
    with pytest.raises(ValueError, match=f"engine='gigatoken' is refused: {problem}. Use 'auto'"):
        load_engine(tokenizer, "gigatoken")


@pytest.mark.parametrize("ranks", [{b"abc": 256}, {b"ab": 300}, {b"ab": 259, b"abc": 257, b"bcd": 256}])
def test_ranks_at_which_gigatoken_panics_are_given_to_it_in_another_format(ranks, capfd):
    """It expects that each token is a merge of two earlier ones; Llama 3's tokenizer.model is not so."""
    pytest.importorskip("gigatoken")
    tokenizer = with_ranks(ranks)
    engine = load_engine(tokenizer)
    assert engine.name == "gigatoken"
    for text in ("abc ab abcd bcd xabc", "abcabcd"):
        assert engine.encode(text.encode()).tolist() == tokenizer.encode(text)
    assert capfd.readouterr() == ("", "")


def test_a_panic_goes_to_the_reference_with_one_line_of_log(caplog, capfd, monkeypatch):
    pytest.importorskip("gigatoken")
    tokenizer = with_ranks({b"abc": 256})
    loaders = module._loaders(tokenizer.reference, {})[:1]
    monkeypatch.setattr(module, "_loaders", lambda *_: loaders)
    with caplog.at_level("INFO"):
        assert load_engine(tokenizer).name == "tiktoken"
    (message,) = caplog.messages
    assert message.startswith(f"gigatoken cannot read {tokenizer.name!r} (assertion")
    assert message.endswith("); tiktoken is used, which is slower")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("package", "version"), [("gigatoken", "0.11.0"), ("tiktoken", "0.15.0")])
def test_other_versions_go_to_tiktoken(package, version, monkeypatch):
    pytest.importorskip("gigatoken")
    versions = {name: importlib.metadata.version(name) for name in ("gigatoken", "tiktoken")}
    monkeypatch.setattr(importlib.metadata, "version", (versions | {package: version}).__getitem__)
    with pytest.warns(UserWarning, match=rf"falling back to tiktoken.*{package} {version}.*fast"):
        assert load_engine(Tokenizer("gpt2")).name == "tiktoken"
    with pytest.raises(ValueError, match=f"{package} {version}"):
        load_engine(Tokenizer("gpt2"), "gigatoken")


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match=r"engine must be one of \('auto', 'reference', .*, got 'hf'"):
        BuildOptions(engine="hf")


def test_gigatoken_is_not_imported_before_it_is_used():
    code = "import sys, lit_gptdata.tokens.engines; print(*sys.modules)"
    root = Path(module.__file__).parents[2]
    imported = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).split()
    assert {"gigatoken", "tiktoken", "torch"}.isdisjoint(imported)


def test_ctrl_c_in_the_first_chunk_is_a_keyboard_interrupt():
    pytest.importorskip("gigatoken")
    code = """
import os, signal, threading
from lit_gptdata.tokens.engines import load_engine
from lit_gptdata.tokens.tokenizer import Tokenizer
engine = load_engine(Tokenizer("gpt2"), "gigatoken")
threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        engine.encode(b"a dreary night " * 100_000)
except KeyboardInterrupt:
    print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("stopped\n", "")
