"""Engines turn text into token ids: the tokenizer's library, or gigatoken, which is faster.

    load_engine(Tokenizer("gpt2")).encode(b"hello world")  ->  array([31373, 995], dtype=uint16)

The library is the reference. The ids never depend on the engine.
"""

from typing import Literal

import numpy as np

from lit_gptdata.text.document import utf8
from lit_gptdata.tokens.chunks import Ids, encode_chunk, safe_chunks
from lit_gptdata.tokens.gigatoken import GigatokenEngine, load_gigatoken
from lit_gptdata.tokens.tokenizer import Tokenizer

EngineName = Literal["auto", "reference", "tiktoken", "gigatoken"]
"""What a user chooses; "tiktoken" is another name of "reference"."""


class ReferenceEngine:
    """The library behind a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = tokenizer.reference.library
        self._tokenizer = tokenizer
        self._rule = tokenizer.cut_rule
        self._allowed = frozenset(tokenizer.allowed_special)

    def encode(self, chunk: bytes, continues: bool = False) -> Ids:
        """The ids of a whole text or of one of its `safe_chunks`, in the tokenizer's dtype.

        `chunk` must be valid UTF-8; gigatoken does not detect invalid bytes. `continues`: the chunk is
        not the first one of its text. Raises ValueError for a special string if the tokenizer's policy
        is "error".
        """
        return encode_chunk(self._encode_text, chunk, continues, self._rule)

    def _encode_text(self, text_bytes: bytes) -> Ids:
        text = text_bytes.decode()
        self._tokenizer.check_special(text)
        ids = self._tokenizer.reference.encode(text, self._allowed)
        return ids.astype(self._tokenizer.dtype)


Engine = ReferenceEngine | GigatokenEngine
"""`name`: "gigatoken", or the library. `encode(chunk, continues)`: see `ReferenceEngine`."""


def load_engine(tokenizer: Tokenizer, engine: EngineName = "auto") -> Engine:
    """The engine of a tokenizer; "auto": gigatoken if possible. Raises what `load_gigatoken` raises."""
    reference = ReferenceEngine(tokenizer)
    if engine in ("reference", "tiktoken"):
        return reference
    return load_gigatoken(tokenizer, reference.encode, required=engine == "gigatoken") or reference


def encode_text(text: str, tokenizer: Tokenizer) -> Ids:
    """Encode a text in memory with the library; returns ids in the tokenizer's dtype."""
    engine = ReferenceEngine(tokenizer)
    chunks = enumerate(safe_chunks([utf8(text)], tokenizer.cut_rule))
    ids = [engine.encode(chunk, continues=i > 0) for i, chunk in chunks]
    return np.concatenate(ids) if ids else np.empty(0, tokenizer.dtype)
