"""What the rest of the package knows about the library behind a tokenizer."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB = 1 << 24  # the largest vocabularies today have a million ids


class Reference(Protocol):
    """A tokenizer of some library, whose ids are the right ones."""

    library: str
    """"tiktoken" | "tokenizers" | "sentencepiece"."""
    vocab_size: int
    """One more than the largest possible id."""
    special_ids: dict[str, int]
    """Every special string, with its id."""
    rule: str
    """The pattern that splits a text before pairs are merged, the same for each library; several with
    "\\0" between them. "" for another way to split; for sentencepiece its options, as JSON."""
    is_lossless: bool = False
    """Whether the bytes of the ids of a text always sum to the text's UTF-8 bytes."""
    ends: Sequence[str] = ()
    """The special strings that the tokenizer's files name as its end of a text."""
    begins: Sequence[str] = ()
    """Those that they name as its begin of a text."""
    added: Sequence[str] = ()
    """The special strings that the library by itself adds to each text, and this package does not."""
    whole_strings: Sequence[str] = ()
    """The strings that the library finds in a text before it splits the text; no cut may divide them."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides the ids."""

    def encode(self, text: str, allowed: frozenset[str]) -> np.ndarray:
        """The ids of a text, uint32 (T,). Only special strings in `allowed` become special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; bytes that are not a complete character become U+FFFD."""

    def token_bytes(self) -> list[bytes]:
        """The bytes of every id; b"" for special and unused ones."""

    def content(self) -> bytes:
        """The tokenizer in the library's file format."""

    def name_specials(self, config: Mapping[str, Any]) -> None:
        """Take the names from the contents of a tokenizer_config.json, which has several forms."""
        self.ends = _names(config.get("eos_token")) or self.ends
        self.begins = _names(config.get("bos_token")) or self.begins
        if config.get("add_bos_token"):
            self.added = [*dict.fromkeys([*self.begins, *self.added])]

    def to_files(self) -> dict[str, bytes]:
        """Files of a folder, name → content, from which `read_file` makes an equal tokenizer."""


def _names(value: Any) -> list[str]:
    """The special strings of "</s>", {"content": "</s>"}, or a list of these."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [str(each["content"] if isinstance(each, Mapping) else each) for each in values]


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a value as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
