"""A `tiktoken.Encoding` as a Reference. Only this file uses private attributes of tiktoken."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import operator
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lit_gptdata.tokens.libraries.reference import END_OF_TEXT, MAX_VOCAB, Reference

if TYPE_CHECKING:
    import tiktoken

ENCODING_FILE = "encoding.json"  # an encoding of the user, as `to_files` writes it
LONG_RUN = 400_000  # tiktoken's regex engine fails on 1,000,000 whitespace characters before a solid one
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{LONG_RUN}}}")  # the lookbehind keeps the search linear
PROBE = "It's 1818:\n\n\tno — é 語 🙂 \r\n  "


class TiktokenReference(Reference):
    """A `tiktoken.Encoding`."""

    library = "tiktoken"
    is_lossless = True

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.special_ids = encoding._special_tokens
        self.whole_strings = [*self.special_ids]
        self.rule = encoding._pat_str
        self.ends = [END_OF_TEXT] if END_OF_TEXT in self.special_ids else ()

    @functools.cached_property
    def digest(self) -> str:
        digest = hashlib.sha256(self.rule.encode())
        for token, rank in self._by_rank():
            digest.update(b"%d:%d:%s\n" % (rank, len(token), token))
        for name, rank in sorted(self.special_ids.items()):
            digest.update(f"{rank}:{name}\n".encode())
        return digest.hexdigest()

    def encode(self, text: str, allowed: frozenset[str]) -> np.ndarray:
        if len(text) >= LONG_RUN and _LONG_RUN.search(text):
            return self._encode_matches(text, allowed)
        # faster than encode() and a tenth of its memory, because it creates no int per token
        return self.encoding.encode_to_numpy(text, allowed_special=set(allowed), disallowed_special=())

    def _encode_matches(self, text: str, allowed: frozenset[str]) -> np.ndarray:
        """`encode` with another regex engine, whose stack has no limit."""
        import regex  # type: ignore[import-untyped]  # tiktoken depends on it

        special = "|".join(map(re.escape, allowed))
        ids: list[int] = []
        for segment in re.split(f"({special})", text) if special else [text]:
            if segment in allowed:
                ids.append(self.special_ids[segment])
            else:
                for match in regex.finditer(self.rule, segment):
                    ids += self.encoding._encode_single_piece(match[0])
        return np.array(ids, np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([int(i) for i in ids])

    def token_bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, id in self.encoding._mergeable_ranks.items():
            table[id] = token
        return table

    def content(self) -> bytes:
        if (file := getattr(self.encoding, "rank_file", None)) is not None:
            return bytes(file)  # `encoding_from_ranks` keeps it
        encode = functools.partial(binascii.b2a_base64, newline=False)  # twice as fast as base64
        return b"".join([b"%s %d\n" % (encode(token), rank) for token, rank in self._by_rank()])

    def _by_rank(self) -> list[tuple[bytes, int]]:
        return sorted(self.encoding._mergeable_ranks.items(), key=operator.itemgetter(1))

    def to_files(self) -> dict[str, bytes]:
        values = {
            "name": self.encoding.name,
            "pat_str": self.rule,
            "special_tokens": self.special_ids,
            "mergeable_ranks": self.content().decode(),
        }
        return {ENCODING_FILE: json.dumps(values).encode()}


def encoding_from_file(values: dict[str, object]) -> tiktoken.Encoding:
    """The inverse of `TiktokenReference.to_files`, from its parsed JSON."""
    import tiktoken

    ranks = read_ranks(str(values.pop("mergeable_ranks")).encode())
    return tiktoken.Encoding(mergeable_ranks=ranks, **values)  # type: ignore[arg-type]


def read_ranks(content: bytes) -> dict[bytes, int]:
    """The ranks of a .tiktoken file: token in base64 and rank in each line. Raises ValueError."""
    try:
        lines = [line.split() for line in content.splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        problem = "it is neither a tokenizer.json, nor a sentencepiece model, nor a file of ranks"
        raise ValueError(problem) from None


def checked(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """The encoding; raises ValueError for one that would give wrong data."""
    ranks, ordinary = encoding._mergeable_ranks, set(encoding._mergeable_ranks.values())
    special_ids, largest, problem = encoding._special_tokens.items(), encoding.max_token_value, ""
    taken = [name for name, id in special_ids if id in ordinary and ranks.get(name.encode()) != id]
    if largest >= MAX_VOCAB:
        problem = f"has the id {largest:,}, and a model has an embedding per id: use ids < {MAX_VOCAB:,}"
    elif taken:
        id = encoding._special_tokens[taken[0]]
        problem = f"gives {taken[0]!r} the id {id} of another token: give it an unused id"
    elif any(bytes([byte]) not in ranks for byte in range(256)):
        return encoding  # tiktoken panics at a missing byte
    elif (decoded := encoding.decode(encoding.encode_ordinary(PROBE))) != PROBE:
        problem = f"turns {PROBE!r} into {decoded!r}: its pat_str must match all characters"
    if problem:
        raise ValueError(f"encoding {encoding.name!r} {problem}")
    return encoding
