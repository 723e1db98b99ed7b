"""Engines turn text into token ids: tiktoken, or gigatoken where it gives the same ids faster.

    load_engine(Tokenizer("gpt2")).encode(b"hello world")  ->  array([31373, 995], dtype=uint16)

tiktoken is the reference. The ids never depend on the engine.
"""

from typing import Any, Literal, get_args

import numpy as np

from lit_gptdata.text.document import utf8
from lit_gptdata.tokens.chunks import LONG_RUN, cut_rule, safe_chunks
from lit_gptdata.tokens.gigatoken import GigatokenEngine, load_gigatoken
from lit_gptdata.tokens.libraries.vocabularies import END_OF_TEXT
from lit_gptdata.tokens.tokenizer import Ids, Tokenizer

EngineName = Literal["auto", "tiktoken", "gigatoken"]


class TiktokenEngine:
    """tiktoken, with support for whitespace runs of any length."""

    name = "tiktoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rule = cut_rule(tokenizer.reference.rule)
        self._allowed = frozenset(tokenizer.allowed_special)
        self._one_match: Any = getattr(tokenizer.reference, "encode_match", None)

    def encode(self, chunk: bytes) -> Ids:
        """The ids of a whole text or of one of its `safe_chunks`, in the tokenizer's dtype.

        `chunk` must be valid UTF-8; gigatoken does not detect invalid bytes. Raises ValueError for a
        special string if the tokenizer's policy is "error".
        """
        text = chunk.decode()
        self._tokenizer.check_special(text)
        if self._rule and _has_long_run(text):
            return self._encode_long_runs(text)
        return self._encode(text)

    def _encode(self, text: str) -> Ids:
        ids = self._tokenizer.reference.encode(text, self._allowed)
        return ids.astype(self._tokenizer.dtype)

    def _encode_long_runs(self, text: str) -> Ids:
        """The ids of a text with whitespace runs that overflow tiktoken's stack; each is one match."""
        assert self._rule
        ids: list[Ids] = []
        segments = text.split(END_OF_TEXT) if self._allowed else [text]
        for i, segment in enumerate(segments):
            if i:
                ids.append(self._encode(END_OF_TEXT))
            end = 0
            for run in self._rule.whole_run.finditer(segment):
                ids.append(self._encode(segment[end : run.start()]))
                ids.append(self._one_match(run.group()).astype(self._tokenizer.dtype))
                end = run.end()
            ids.append(self._encode(segment[end:]))
        return np.concatenate(ids)


Engine = TiktokenEngine | GigatokenEngine
"""`name`: "tiktoken" or "gigatoken". `encode(chunk)`: see `TiktokenEngine`."""


def load_engine(tokenizer: Tokenizer, engine: EngineName = "auto") -> Engine:
    """The engine of a tokenizer; "auto": gigatoken if possible. Raises what `load_gigatoken` raises."""
    check_engine(engine)
    reference = TiktokenEngine(tokenizer)
    if engine == "tiktoken":
        return reference
    return load_gigatoken(tokenizer, reference.encode, required=engine == "gigatoken") or reference


def check_engine(engine: str) -> None:
    if engine not in get_args(EngineName):
        raise ValueError(f"unknown engine {engine!r}: choose 'auto', 'tiktoken' or 'gigatoken'")


def encode_text(text: str, tokenizer: Tokenizer) -> Ids:
    """Encode a text in memory with tiktoken; returns ids in the tokenizer's dtype."""
    engine = TiktokenEngine(tokenizer)
    ids = [engine.encode(chunk) for chunk in safe_chunks([utf8(text)], tokenizer.cut_rule)]
    return np.concatenate(ids) if ids else np.empty(0, tokenizer.dtype)


def _has_long_run(text: str) -> bool:
    """True for a run of `LONG_RUN` whitespace characters, False if no run has half of that length."""
    block = LONG_RUN // 2  # a long run covers a whole block
    starts = range(0, len(text) - block + 1, block)
    return any(text[i].isspace() and text[i : i + block].isspace() for i in starts)
