"""A `tokenizers.Tokenizer` of Hugging Face, such as a tokenizer.json, as a Reference."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lit_gptdata.text.formats import needs
from lit_gptdata.tokens.chunks import GPT2_PATTERN
from lit_gptdata.tokens.libraries.reference import Reference, digest_of

_KEEP_ALL = ("Split", "ByteLevel", "Digits", "Sequence")  # pre-tokenizers that leave nothing out


class HuggingFaceReference(Reference):
    """A tokenizer.json; special tokens that its post-processor would add are left out.

    Raises ValueError for another text, ImportError.
    """

    library = "tokenizers"

    def __init__(self, text: str) -> None:
        tokenizers = needs("tokenizers", "tokenizers", "a tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises no other class
            raise ValueError(f"it is not a tokenizer.json: {error}") from None
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # a build would never give the same ids again
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._json: dict[str, Any] = json.loads(self._tokenizer.to_str())
        added = self.added_tokens = self._json["added_tokens"]
        self.special_ids = {each["content"]: each["id"] for each in added if each["special"]}
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # some of these tokens take the spaces after them, or look at them
        self.whole_strings = [
            each["content"] + " a" * (each["rstrip"] or each["single_word"]) for each in added
        ]
        self.rule = _split_pattern(self._json)
        self._splits = steps(self._json["pre_tokenizer"])
        self._is_byte_level = any(step["type"] == "ByteLevel" for step in self._splits)
        self.is_lossless = self._keeps_all()
        self.added = self._tokenizer.encode("", add_special_tokens=True).tokens

    @functools.cached_property
    def digest(self) -> str:
        parts = ("normalizer", "pre_tokenizer", "model", "added_tokens")
        return digest_of([{part: self._json[part] for part in parts}, [*self.ends], [*self.begins]])

    def name_specials(self, config: Mapping[str, Any]) -> None:
        super().name_specials(config)
        for name in (*self.ends, *self.begins):  # whose "special" may be false
            if (id := self._tokenizer.token_to_id(name)) is not None:
                self.special_ids[name] = id

    def _keeps_all(self) -> bool:
        splits = self._splits
        return (
            self._is_byte_level
            and self._json["model"]["type"] == "BPE"
            and not any(self._affixes)
            and not steps(self._json["normalizer"])
            and all(step["type"] in _KEEP_ALL and step.get("behavior") != "Removed" for step in splits)
            and not any(step.get("add_prefix_space") for step in splits)
            and not any(each["lstrip"] or each["rstrip"] for each in self.added_tokens)
            and BYTES.keys() <= self._tokenizer.get_vocab().keys()
        )

    @property
    def _affixes(self) -> tuple[str, str]:
        """What a vocabulary writes before a token inside a word, and after the last token of a word."""
        model = self._json["model"]
        prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        return prefix or "", suffix or ""

    def encode(self, text: str, allowed: frozenset[str]) -> np.ndarray:
        # the attribute costs nothing to set; a second tokenizer would take as much memory again
        self._tokenizer.encode_special_tokens = not allowed
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the package raises no other class
            raise ValueError(f"the tokenizer cannot encode the text: {error}") from None
        return np.array(ids, np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        prefix, suffix = self._affixes
        bytes_of = _byte_level_bytes if self._is_byte_level else piece_bytes
        for token, id in self._tokenizer.get_vocab(with_added_tokens=False).items():
            table[id] = bytes_of(token.removeprefix(prefix).removesuffix(suffix))
        for each in self.added_tokens:
            table[each["id"]] = each["content"].encode()
        for id in self.special_ids.values():
            table[id] = b""
        return table

    def content(self) -> bytes:
        return str(self._tokenizer.to_str()).encode()

    def to_files(self) -> dict[str, bytes]:
        config = {"eos_token": [*self.ends], "bos_token": [*self.begins]}
        files = {"tokenizer_config.json": json.dumps(config).encode()}
        return files | {"tokenizer.json": self.content()}


def _split_pattern(values: Mapping[str, Any]) -> str:
    """The split pattern of a tokenizer.json; "" for another way to split."""
    *splits, last = steps(values["pre_tokenizer"]) or [{}]
    is_known = (
        all(step == {"type": "NFC"} for step in steps(values["normalizer"]))
        and last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space", True)
        and last.get("use_regex", True) == (not splits)
        and all(
            step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
            and {*step["pattern"]} == {"Regex"}
            for step in splits
        )
    )  # fmt: skip
    patterns = [step["pattern"]["Regex"] for step in splits] if is_known else []
    return "\0".join(patterns) or (GPT2_PATTERN if is_known else "")


def steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of sequences."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    parts = part.get("normalizers", []) + part.get("pretokenizers", [])
    return [step for each in parts for step in steps(each)]


_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _VISIBLE]
BYTES = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
"""The characters by which byte-level vocabularies write bytes, as in OpenAI's GPT-2 release."""


_LATIN1 = {ord(character): byte for character, byte in BYTES.items()}


def _byte_level_bytes(token: str) -> bytes:
    return token.translate(_LATIN1).encode("latin-1", errors="ignore")  # special tokens: others, too


def piece_bytes(piece: str) -> bytes:
    """The bytes of a piece of sentencepiece: `▁` is a space, and `<0x0A>` one byte."""
    if piece.startswith("<0x") and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
