"""A published store: a folder named by its fingerprint, with shards and a manifest; never changed.

<fingerprint>/manifest.json     what is here: tokenizer, sources, counts, sizes, checksums
              00000-000.bin     ids, flat, little-endian uint16 or uint32
              00000-000.idx     where each document and piece begins, as ROW
              vocab.bin         what each id stands for, as VOCAB
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_gptdata._io import sha256_file
from lit_gptdata.tokens.manifest import FileEntry, Manifest, ShardEntry, total
from lit_gptdata.tokens.shards import ROW, Tokens
from lit_gptdata.tokens.tokenizer import END_OF_TEXT, Tokenizer

VOCAB = np.dtype([("n_bytes", "<u2"), ("starts_space", "?"), ("ends_visible", "?")])
"""One row of vocab.bin, a row an id: its length in UTF-8 bytes (0: special or unused); whether it
begins with a space; whether its last byte is visible ASCII."""


class Place(NamedTuple):
    """Where a token comes from: `str(place)  ->  "books/a.txt, document 1, byte 512"`."""

    source: str
    """The path or name in the manifest: that of the build, if the text was moved since."""

    document: int
    """Counted from 1 over the whole store."""

    byte: int
    """Of the document's UTF-8 text with newlines as `\\n`, counted from 0."""

    def __str__(self) -> str:
        return f"{self.source}, document {self.document:,}, byte {self.byte:,}"


class TokenStore:
    """The tokens of a corpus on disk, with the places of its documents.

    Opening looks at sizes only, O(shards); `verify()` reads everything. Raises FileNotFoundError,
    ValueError if something is missing or has another size than the manifest says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            content = (self.path / "manifest.json").read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.path} is no token store: it has no manifest.json. Call prepare_data() to "
                "build the store"
            ) from None
        try:
            self.manifest = Manifest.from_json(content)
        except ValueError as error:
            raise ValueError(
                f"the token store is damaged: {self.path / 'manifest.json'} cannot be read ({error}). "
                f"Delete the folder {self.path} and run again to rebuild it"
            ) from None
        self.fingerprint: str = self.manifest.fingerprint
        self.n_tokens: int = self.manifest.n_tokens
        self.n_bytes: int = self.manifest.n_bytes
        self.n_documents: int = self.manifest.n_documents
        self.vocab_size: int = self.manifest.tokenizer.vocab_size
        self.dtype: np.dtype[np.unsignedinteger] = np.dtype(self.manifest.tokenizer.dtype)
        self.shards: list[ShardEntry] = self.manifest.shards
        self._check_files()

    @property
    def files(self) -> list[FileEntry]:
        """Every file except the manifest."""
        return self.manifest.files

    @property
    def location(self) -> str:
        """Where the store is, as people read it."""
        return str(self.path)

    def _check_files(self) -> None:
        for file in self.files:
            self._check_size(file)

    def _check_size(self, file: FileEntry) -> None:
        path = self.path / file.name
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            seen = "is missing" if size is None else f"has {size:,} bytes"
            raise ValueError(
                f"the token store is damaged: {path} {seen}, its manifest says {file.size:,}. "
                f"Delete the folder {self.path} and run again to build it anew"
            )

    def verify(self) -> None:
        """Read every file and compare its SHA-256; raises ValueError that names the bad ones."""
        bad = [f.name for f in self.files if sha256_file(self.path / f.name) != f.sha256]
        if bad:
            raise ValueError(
                f"the token store {self.path} is damaged: the contents of {', '.join(bad)} do not "
                "match the manifest's SHA-256. Delete the folder and run again to build it anew"
            )

    @functools.cached_property
    def tokens(self) -> Tokens:
        """All ids as one memory-mapped sequence."""
        return Tokens.from_files([self.path / shard.ids.name for shard in self.shards], self.dtype)

    @functools.cached_property
    def vocab(self) -> np.ndarray:
        """What each id stands for, VOCAB (vocab_size,)."""
        return self._read(self.manifest.vocab, VOCAB)

    def _read(self, file: FileEntry, dtype: np.dtype[Any]) -> np.ndarray:
        return np.fromfile(self.path / file.name, dtype=dtype)

    @functools.cached_property
    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and bytes at the end of each shard."""
        tokens = np.cumsum([shard.n_tokens for shard in self.shards], dtype=np.int64)
        return tokens, np.cumsum([shard.n_bytes for shard in self.shards], dtype=np.int64)

    def rows(self, shard: int) -> np.ndarray:
        """The index of a shard, ROW, with tokens and bytes counted from the store's first."""
        rows = self._read(self.shards[shard].index, ROW)
        ends_token, ends_byte = self._ends
        rows["token"] += ends_token[shard] - self.shards[shard].n_tokens
        rows["byte"] += ends_byte[shard] - self.shards[shard].n_bytes
        return rows

    def document_near(self, byte: int, within: int) -> int | None:
        """The separator before the document that begins nearest to `byte`, if `within` bytes of it.

        The corpus's first document has none before it, and is no answer.
        """
        ends = self._ends[1]
        first, last = np.searchsorted(ends, [byte - within, byte + within])
        near = range(int(first), min(int(last) + 1, len(self.shards)))
        begins = ends - [shard.n_bytes for shard in self.shards]
        away = np.maximum(np.maximum(begins - byte, byte - ends), 0)
        best: tuple[int, int] | None = None  # distance in bytes, token
        for shard in sorted(near, key=away.__getitem__):
            if best is not None and away[shard] > best[0]:
                break  # no need to read, or to fetch, what lies further away
            rows = self.rows(shard)
            rows = rows[(rows["document"] == 1) & (rows["token"] > 0)]
            if len(rows):
                i = int(np.argmin(np.abs(rows["byte"] - byte)))
                found = abs(int(rows["byte"][i]) - byte), int(rows["token"][i])
                if found[0] <= within and (best is None or found < best):
                    best = found
        return None if best is None else best[1] - 1

    def place(self, token: int) -> Place:
        """Where token number `token` comes from, O(tokens of a piece).

        A separator counts to the document before it, at that one's end. Raises IndexError for a token
        that does not exist.
        """
        if not 0 <= token < self.n_tokens:
            raise IndexError(f"token {token:,} of {self.n_tokens:,}: give one in [0, {self.n_tokens:,})")
        shard = int(np.searchsorted(self._ends[0], token, side="right"))
        rows = self.rows(shard)
        at = int(np.searchsorted(rows["token"], token, side="right")) - 1
        if at < 0:  # a separator that leads a shard
            shard -= 1
            rows = self.rows(shard)
            at = len(rows) - 1
        piece = rows[at]
        before = self.vocab["n_bytes"][self.tokens[int(piece["token"]) : token]]
        # a special token inside a text stands for its name there
        special = len(END_OF_TEXT) * int(np.count_nonzero(before == 0))
        byte = int(piece["byte"]) + int(before.sum(dtype=np.int64)) + special
        source = self.manifest.sources[int(piece["source"])].path
        rows = rows[: at + 1]
        document = total(self.shards[:shard], "n_documents") + int(rows["document"].sum())
        while not rows["document"].any():  # the document begins in a shard before
            shard -= 1
            rows = self.rows(shard)
        begin = rows["byte"][np.flatnonzero(rows["document"])[-1]]
        return Place(source, document, byte - int(begin))

    def token_at(self, byte: int) -> int:
        """The token to cut at for `byte`: the next one that begins with a space after visible ASCII.

        Every GPT tokenizer cuts the text there, so that all get the same text on both sides; where
        there is no such place within 1,000 tokens, the next token at all.
        """
        shard = min(int(np.searchsorted(self._ends[1], byte, side="right")), len(self.shards) - 1)
        rows = self.rows(shard)
        row = rows[max(0, int(np.searchsorted(rows["byte"], byte, side="right")) - 1)]
        piece_end = rows["token"][rows["token"] > row["token"]]
        stop = int(piece_end[0]) if len(piece_end) else int(self._ends[0][shard])
        begin = int(row["token"])
        lengths = self.vocab["n_bytes"][self.tokens[begin:stop]].astype(np.int64)
        cut = begin + int(np.searchsorted(np.cumsum(lengths) - lengths, byte - int(row["byte"])))
        near = self.vocab[self.tokens[max(0, cut - 1) : min(cut + 1000, self.n_tokens)]]
        words = np.flatnonzero(near["starts_space"][1:] & near["ends_visible"][:-1])
        return max(0, cut - 1) + 1 + int(words[0]) if len(words) else min(cut, self.n_tokens)

    def __repr__(self) -> str:
        return (
            f"TokenStore({self.fingerprint[:8]}: {self.n_tokens:,} tokens, {self.n_documents:,} "
            f"documents, {self.n_bytes:,} bytes, {len(self.shards)} shards of {self.dtype.name})"
        )


def vocab_table(tokenizer: Tokenizer) -> np.ndarray:
    """What each id of a tokenizer stands for, VOCAB (vocab_size,)."""
    ranks = tokenizer.encoding._mergeable_ranks
    ids = list(ranks.values())
    table = np.zeros(tokenizer.vocab_size, dtype=VOCAB)
    table["n_bytes"][ids] = [len(token) for token in ranks]
    table["starts_space"][ids] = [token[0] == 0x20 for token in ranks]
    table["ends_visible"][ids] = [0x21 <= token[-1] <= 0x7E for token in ranks]
    return table
