"""Bytes and tokens: where each token comes from, and which token is at a byte, against a slow oracle."""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import encode, local, plan
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.engines import load_engine
from lit_gptdata.tokens.store import vocab_table
from lit_gptdata.tokens.tokenizer import END_OF_TEXT, Tokenizer
from lit_gptdata.windows.split import split_tokens
from tests.conftest import ListCorpus

TOKENIZERS = {policy: Tokenizer("gpt2", policy) for policy in ("allow", "text")}
PARTS = [END_OF_TEXT, "<|endof", "text|>", " word", "word", " a", " ", "\n", "ü", "🙂", " 語", "1"]
TEXTS = st.lists(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), min_size=1, max_size=5)
load_once = functools.cache(load_engine)


@pytest.fixture(autouse=True, scope="module")
def _one_vocab_table():
    """Compute the vocabulary's table once, because both policies have the same one."""
    table = vocab_table(TOKENIZERS["allow"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "vocab_table", lambda _: table)
        yield


class Token(NamedTuple):
    """What the oracle knows of a token."""

    document: int
    """Counted from 1."""
    in_document: int
    """Bytes of the document before the token."""
    in_store: int
    """Bytes of all documents before the token."""
    text: bytes
    """Empty for a separator."""


def oracle(texts: list[str], tokenizer: Tokenizer) -> list[Token]:
    """Every token of the documents, from the texts alone."""
    tokens: list[Token] = []
    before = 0
    for number, text in enumerate(texts, 1):
        byte = 0
        for id in tokenizer.encode(text):
            content = tokenizer.reference.encoding.decode_single_token_bytes(id)
            tokens.append(Token(number, byte, before + byte, content))
            byte += len(content)
        assert byte == len(text.encode())
        before += byte
        if number < len(texts):
            tokens.append(Token(number, byte, before, b""))
    return tokens


def cut_of(tokens: list[Token], special: bool, byte: int) -> int:
    """Where `token_at` has to cut, from the tokens alone."""
    n = len(tokens)
    cut = next((i for i in range(n) if tokens[i].in_store >= byte), n)
    while cut < n and not tokens[cut].text and tokens[cut].in_store == byte:
        cut += 1  # the document starts behind its separator

    def ordinary(token: Token) -> bytes:
        return b"" if special and token.text == END_OF_TEXT.encode() else token.text

    for i in range(max(1, cut), min(n, cut + 1000)):
        left, right = ordinary(tokens[i - 1]), ordinary(tokens[i])
        if right[:1] == b" " and left and 0x21 <= left[-1] <= 0x7E:
            return i
    return cut


@settings(deadline=None, max_examples=15)
@given(
    texts=TEXTS,
    policy=st.sampled_from(["allow", "text"]),
    engine=st.sampled_from(["auto", "tiktoken"]),
    sizes=st.sampled_from([(1 << 16, 1 << 26), (1, 1 << 26), (5, 20), (16, 1)]),
    as_files=st.booleans(),
)
@example([END_OF_TEXT], "allow", "auto", (1, 1), False)
@example(["", END_OF_TEXT * 2, "", f" a{END_OF_TEXT} a", ""], "allow", "auto", (1, 1), True)
@example([f"{END_OF_TEXT} a word" * 9, f"word{END_OF_TEXT}"], "allow", "tiktoken", (16, 20), True)
def test_every_byte_has_its_token_and_every_token_its_byte(
    tmp_path_factory, texts, policy, engine, sizes, as_files
):
    tokenizer, folder = TOKENIZERS[policy], tmp_path_factory.mktemp("s")
    assume("".join(texts))  # a store without text is refused
    tokens = oracle(texts, tokenizer)
    corpus = ListCorpus(texts)
    if as_files:
        for i, text in enumerate(texts):
            (folder / f"{i}.jsonl").write_text(json.dumps({"text": text}))
        corpus = FilesCorpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        chunks = functools.partial(encode.safe_chunks, size=sizes[0])
        patch.setattr(encode, "safe_chunks", chunks)
        patch.setattr(plan, "SHARD_BYTES", sizes[1])
        patch.setattr(encode, "load_engine", load_once)
        store = prepare_store(corpus, tokenizer, folder / "tokens", BuildOptions(engine=engine))
    assert store.n_tokens == len(tokens)
    assert store.n_bytes == sum(len(text.encode()) for text in texts)
    for number, token in enumerate(tokens):
        assert store.byte_at(number) == token.in_store
        assert store.place(number)[1:] == (token.document, token.in_document)
    assert store.byte_at(len(tokens)) == store.n_bytes
    for byte in range(store.n_bytes + 1):
        assert store.token_at(byte) == cut_of(tokens, policy == "allow", byte)


STORY = "A cat and a dog went to the park and they had a very good day there, said the old man. "


@pytest.mark.parametrize("policy", ["allow", "text"])
@pytest.mark.parametrize("n_documents", [1, 3])
@pytest.mark.parametrize("story", [STORY, ""], ids=["stories", "literals"])
def test_a_split_of_text_with_literals_has_its_fraction_of_the_bytes(
    tmp_path, policy, n_documents, story
):
    text = (story + END_OF_TEXT) * 400
    store = prepare_store(ListCorpus([text] * n_documents), TOKENIZERS[policy], tmp_path)
    split = split_tokens(store, 0.1, 0.2)
    for name, fraction in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        begin, end = (store.byte_at(token) for token in getattr(split, name))
        assert (end - begin) / store.n_bytes == pytest.approx(fraction, abs=0.01)


def test_a_token_outside_the_store_has_no_byte(tmp_path):
    store = prepare_store(ListCorpus(["one"]), TOKENIZERS["allow"], tmp_path)
    assert (store.byte_at(0), store.byte_at(1)) == (0, 3)
    for token in (-1, 2):
        with pytest.raises(IndexError, match=rf"token {token} of 1: give one in \[0, 1\]"):
            store.byte_at(token)
