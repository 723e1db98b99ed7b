"""gigatoken gives the ids of every library for each split pattern, and chunks change none."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from lit_gptdata.tokens.chunks import safe_chunks
from lit_gptdata.tokens.engines import load_engine
from lit_gptdata.tokens.gigatoken import _classes_differ
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.tokens.test_chunks import random_texts

pytest.importorskip("gigatoken")
pytest.importorskip("tokenizers")

from benchmarks.agreement import CASES, PROBES, as_tokenizer_json, disagreements
from benchmarks.tokenize import make_text, vocabularies


def trained(folder: Path) -> Path:
    """A byte-level tokenizer.json, trained here."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=5_000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    library.train_from_iterator(list(random_texts(3_000, seed=1)), trainer)
    library.save(str(folder / "trained.json"))
    return folder / "trained.json"


def check(tokenizer: Tokenizer, text: str, with_chunks: bool = True) -> None:
    """gigatoken gives the library's ids, and so do chunks of any size with both engines."""
    expected = tokenizer.encode(text)
    gigatoken, reference = engines_of(tokenizer)
    assert gigatoken.encode(text.encode()).tolist() == expected, text
    if with_chunks:
        size = random.Random(text).choice((1, 7, 40, 1 << 16))
        chunks = list(safe_chunks([text.encode()], tokenizer.cut_rule, size))
        for engine in (gigatoken, reference):
            ids = [engine.encode(chunk, i > 0) for i, chunk in enumerate(chunks)]
            assert np.concatenate([[], *ids]).tolist() == expected, (engine.name, chunks)


_engines: dict[int, list] = {}


def engines_of(tokenizer: Tokenizer) -> list:
    if id(tokenizer) not in _engines:
        _engines.clear()
        _engines[id(tokenizer)] = [load_engine(tokenizer, name) for name in ("gigatoken", "reference")]
    return _engines[id(tokenizer)]


@pytest.mark.parametrize("case", CASES)
def test_ids_of_each_split_pattern(case):
    tokenizer = Tokenizer(CASES[case]())
    assert tokenizer.cut_rule
    for text in random_texts(400, seed=16):
        check(tokenizer, text)


def test_ids_of_a_tokenizer_trained_here(tmp_path):
    tokenizer = Tokenizer(trained(tmp_path))
    for text in random_texts(500, seed=17):
        check(tokenizer, text)


def test_a_special_string_in_a_text_follows_the_policy():
    for policy in ("allow", "text"):
        tokenizer = Tokenizer(CASES["tokenizers/qwen2"](), policy)
        check(tokenizer, "one<|endoftext|> two <|endoftext|>")
        assert (tokenizer.special_ids["<|endoftext|>"] in tokenizer.encode("<|endoftext|>")) == (
            policy == "allow"
        )


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_token_that_takes_the_spaces_around_it_goes_to_the_library(flag):
    from tokenizers import AddedToken

    library = as_tokenizer_json("\\p{N}")
    library.add_special_tokens([AddedToken("<mask>", **{flag: True})])
    with pytest.raises(ValueError, match="engine='gigatoken' is refused"):
        load_engine(Tokenizer(library), "gigatoken")


def real(name: str, folder: Path) -> Tokenizer:
    path = {"gpt2": "gpt2", "trained": str(trained(folder))}.get(name) or vocabularies()[name]
    if os.sep in path and not Path(path).exists():
        pytest.skip(f"no {path}: set LIT_GPTDATA_VOCABULARIES, as .ci/run does")
    if name in ("cl100k", "o200k"):
        pytest.importorskip("bpe_openai")
    if name == "mistral":
        pytest.importorskip("sentencepiece")
    return Tokenizer(path)


REAL = ["gpt2", *vocabularies(), "trained"]


@pytest.mark.heavy
@pytest.mark.parametrize("name", REAL)
def test_ids_of_hostile_strings(name, tmp_path):
    tokenizer = real(name, tmp_path)
    for number, text in enumerate(random_texts(100_000, seed=18)):
        check(tokenizer, text, with_chunks=number % 5 == 0)


@pytest.mark.heavy
@pytest.mark.parametrize("name", REAL)
def test_ids_of_ten_megabytes_of_text(name, tmp_path):
    tokenizer = real(name, tmp_path)
    (path,) = make_text(tmp_path, megabytes=10, files=1)
    text = path.read_text(encoding="utf-8")
    reference = load_engine(tokenizer, "reference")
    documents = [text[i : i + 200_000].encode() for i in range(0, len(text), 200_000)]
    for size in (1_000, 1 << 16):
        engine = load_engine(tokenizer, "gigatoken")
        for document in documents:
            chunks = safe_chunks([document], tokenizer.cut_rule, size)
            ids = [engine.encode(chunk, i > 0) for i, chunk in enumerate(chunks)]
            assert np.array_equal(np.concatenate(ids), reference.encode(document))


@pytest.mark.heavy
@pytest.mark.parametrize("case", ["tiktoken/o200k", "tokenizers/gpt2"])
def test_code_points_that_differ_are_in_the_table(case):
    """The procedure of benchmarks/agreement.py."""
    tokenizer = Tokenizer(CASES[case]())
    gigatoken = load_engine(tokenizer, "gigatoken")._gigatoken
    codes = disagreements(
        tokenizer.encode, lambda text: gigatoken.encode(text.encode()).tolist(), PROBES
    )
    assert codes
    assert all(_classes_differ(chr(code).encode()) for code in codes)
