"""A token store: a folder with shards and a manifest, named by its fingerprint and never changed.

<fingerprint>/manifest.json     tokenizer, sources, counts, sizes and checksums
              00000-000.bin     flat token ids, little-endian uint16 or uint32
              00000-000.idx     where each document and each chunk starts, rows of ROW
              vocab.bin         properties of each id, rows of VOCAB
"""

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_gptdata.text.remote_file import sha256_of
from lit_gptdata.tokens.libraries.reference import END_OF_TEXT
from lit_gptdata.tokens.manifest import FileEntry, Manifest, ShardEntry, total
from lit_gptdata.tokens.shards import ROW, Tokens
from lit_gptdata.tokens.tokenizer import Tokenizer

VOCAB = np.dtype([("n_bytes", "<u2"), ("starts_space", "?"), ("ends_visible", "?")])
"""One row of vocab.bin, for one id: its length in UTF-8 bytes (0 if special or unused); whether it
starts with a space; whether its last byte is visible ASCII."""


class Place(NamedTuple):
    """The origin of a token: `str(place)  ->  "books/a.txt, document 1, byte 512"`."""

    source: str
    """The path or name of the source when the store was built."""
    document: int
    """Counted from 1 over all documents of the store."""
    byte: int
    """Counted from 0 in the document's UTF-8 text with `\\n` newlines."""

    def __str__(self) -> str:
        return f"{self.source}, document {self.document:,}, byte {self.byte:,}"


class TokenStore:
    """The tokens of a corpus on disk, and where each of them comes from.

    Opening a store checks the sizes of its files, in O(shards); `verify()` reads everything. Raises
    FileNotFoundError for a folder that is not a store, ValueError for a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = self.path / "manifest.json"
        try:
            self.manifest = Manifest.from_json(manifest.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            problem = "is not a token store: it has no manifest.json"
            raise FileNotFoundError(f"{self.path} {problem}. Call prepare_data() to build it") from None
        except ValueError as error:
            problem = f"{manifest} cannot be read ({error})"
            raise ValueError(f"the token store is damaged: {problem}. {self._remedy}") from None
        self.fingerprint: str = self.manifest.fingerprint
        self.n_tokens: int = self.manifest.n_tokens
        self.n_bytes: int = self.manifest.n_bytes
        self.n_documents: int = self.manifest.n_documents
        self.vocab_size: int = self.manifest.tokenizer.vocab_size
        self.dtype: np.dtype[np.unsignedinteger] = np.dtype(self.manifest.tokenizer.dtype)
        self.shards: list[ShardEntry] = self.manifest.shards
        self.files: list[FileEntry] = self.manifest.files
        self._check_files()

    @property
    def location(self) -> str:
        """The folder or URL of the store, for messages."""
        return str(self.path)

    @property
    def _remedy(self) -> str:
        return f"Delete the folder {self.path} and run again to rebuild it, or publish it again"

    def _check_files(self) -> None:
        for file in self.files:
            path = self.path / file.name
            size = path.stat().st_size if path.is_file() else None
            if size != file.size:
                problem = "is missing" if size is None else f"has {size:,} bytes"
                raise ValueError(
                    f"the token store is damaged: {path} {problem}, but its manifest says "
                    f"{file.size:,}. {self._remedy}"
                )

    def verify(self) -> None:
        """Read every file and compare its SHA-256; raises ValueError that names the damaged files."""
        bad = [file.name for file in self.files if self._sha256(file) != file.sha256]
        if bad:
            raise ValueError(
                f"the token store {self.location} is damaged: the contents of {', '.join(bad)} do not "
                f"match the manifest's SHA-256. {self._remedy}"
            )

    def _sha256(self, file: FileEntry) -> str:
        return sha256_of(self.path / file.name)

    @functools.cached_property
    def tokens(self) -> Tokens:
        """All ids as one memory-mapped sequence."""
        return Tokens.from_files([self.path / shard.ids.name for shard in self.shards], self.dtype)

    @functools.cached_property
    def vocab(self) -> np.ndarray:
        """Properties of each id, VOCAB (vocab_size,)."""
        return self._read(self.manifest.vocab, VOCAB)

    def _read(self, file: FileEntry, dtype: np.dtype[Any]) -> np.ndarray:
        return np.fromfile(self.path / file.name, dtype=dtype)

    @functools.cached_property
    def _ends(self) -> dict[str, np.ndarray]:
        """Where each shard ends, as the number of a "token" and of a "byte" of the store."""
        counts = {"token": "n_tokens", "byte": "n_bytes"}
        return {unit: np.cumsum([getattr(s, n) for s in self.shards]) for unit, n in counts.items()}

    def rows(self, shard: int) -> np.ndarray:
        """The index of a shard, dtype ROW; its positions are counted from the start of the store."""
        rows = self._read(self.shards[shard].index, ROW)
        if shard:
            for unit, ends in self._ends.items():
                rows[unit] += ends[shard - 1]
        return rows

    def document_rows(self, shards: Iterable[int] | None = None) -> np.ndarray:
        """The `rows` where documents start, of some shards or of all."""
        shards = range(len(self.shards)) if shards is None else shards
        rows = np.concatenate([self.rows(shard) for shard in shards])
        found: np.ndarray = rows[rows["document"] == 1]
        return found

    def source_number(self, row: np.void) -> int:
        """The index of the source of a row. Your own corpus is one source, even if it numbers texts."""
        return min(int(row["source"]), len(self.manifest.sources) - 1)

    def source_of(self, row: np.void) -> str:
        """The path or name of the source of a row."""
        return self.manifest.sources[self.source_number(row)].path

    def row_at(self, unit: str, position: int) -> tuple[int, np.ndarray, int]:
        """The shard of a "token" or "byte", its `rows`, and the row; -1: a separator before all rows."""
        shard = int(np.searchsorted(self._ends[unit], position, side="right"))
        rows = self.rows(shard := min(shard, len(self.shards) - 1))
        return shard, rows, int(np.searchsorted(rows[unit], position, side="right")) - 1

    def document_near(self, byte: int, within: int) -> int | None:
        """The separator before the document that starts nearest to `byte`, at most `within` bytes away.

        None if no document is that near. The first document has no separator, so it never counts.
        Neither do documents with no text before or after their start.
        """
        ends = self._ends["byte"]
        first, last = np.searchsorted(ends, [byte - within, byte + within]).tolist()
        shards = range(first, min(last + 1, len(self.shards)))
        rows = self.document_rows(shards)
        near = np.abs(rows["byte"] - byte) <= within
        rows = rows[near & (rows["byte"] > 0) & (rows["byte"] < self.n_bytes)]
        if not len(rows):
            return None
        return int(rows["token"][np.argmin(np.abs(rows["byte"] - byte))]) - 1

    def place(self, token: int) -> Place:
        """The origin of token number `token`, in O(tokens of a chunk); raises IndexError beyond the end.

        A separator counts as the last token of the document before it.
        """
        if not 0 <= token < self.n_tokens:
            raise IndexError(f"token {token:,} of {self.n_tokens:,}: give one in [0, {self.n_tokens:,})")
        shard, rows, row = self.row_at("token", token)
        if row < 0:
            shard -= 1
            rows = self.rows(shard)
            row = len(rows) - 1
        chunk, (lengths, _) = rows[row], self._lengths(shard, rows, row)
        byte = int(chunk["byte"]) + int(lengths[: token - int(chunk["token"])].sum())
        rows = rows[: row + 1]
        document = total(self.shards[:shard], "n_documents") + int(rows["document"].sum())
        while not rows["document"].any():  # the document starts in an earlier shard
            shard -= 1
            rows = self.rows(shard)
        start = rows["byte"][np.flatnonzero(rows["document"])[-1]]
        return Place(self.source_of(chunk), document, byte - int(start))

    def documents(self, begins: np.ndarray, ends: np.ndarray) -> list[tuple[int, int]]:
        """The documents with tokens in [begin, end): int64 (N,) each → [(first, last), …], from 1.

        Reads all indexes. A separator counts as the last token of the document before it.
        """
        starts = self.document_rows()["token"]
        first, last = (np.searchsorted(starts, t, side="right") for t in (begins, ends - 1))
        size = len(starts) + 2
        opened, closed = np.bincount(first, minlength=size), np.bincount(last + 1, minlength=size)
        edges = np.flatnonzero(np.diff(np.cumsum(opened - closed) > 0, prepend=False))
        return list(zip(edges[::2].tolist(), (edges[1::2] - 1).tolist(), strict=True))

    def byte_at(self, token: int) -> int:
        """The UTF-8 bytes of all text before a token, or of all text if `token` is the number of tokens.

        A separator has 0 bytes, and a literal `<|endoftext|>` in a text has 13. It is an estimate
        unless `is_exact_at(token)`, which always holds if the tokenizer does not change the text.
        """
        return self._byte_at(token)[0]

    def is_exact_at(self, token: int) -> bool:
        return self._byte_at(token)[1]

    def _byte_at(self, token: int) -> tuple[int, bool]:
        if not 0 <= token <= self.n_tokens:
            raise IndexError(f"token {token:,} of {self.n_tokens:,}: give one in [0, {self.n_tokens:,}]")
        if token == self.n_tokens:
            return self.n_bytes, True
        shard, rows, row = self.row_at("token", token)
        chunk = rows[max(0, row)]
        if row < 0 or chunk["token"] == token:
            return int(chunk["byte"]), True
        lengths, is_exact = self._lengths(shard, rows, row)
        return int(chunk["byte"] + lengths[: token - int(chunk["token"])].sum()), is_exact

    def _lengths(self, shard: int, rows: np.ndarray, row: int) -> tuple[np.ndarray, bool]:
        """The UTF-8 bytes of a chunk's tokens, int64 (T,), and whether they are exact.

        A special token in a text has the bytes of its name. If the tokenizer changes the text, the bytes
        of its tokens may not sum to those of the text. Then they are stretched until they do.
        """
        chunk, tokenizer = rows[row], self.manifest.tokenizer
        stop, byte = (int(ends[shard]) for ends in self._ends.values())
        if row + 1 < len(rows):
            stop, byte = int(rows["token"][row + 1]), int(rows["byte"][row + 1])
        n_bytes = byte - int(chunk["byte"])
        ids = self.tokens[int(chunk["token"]) : stop]
        lengths: np.ndarray = self.vocab["n_bytes"][ids].astype(np.int64)
        may_separate = bool(len(ids)) and lengths[-1] == 0
        lengths[lengths == 0] = len(END_OF_TEXT)
        for name, id in (tokenizer.separators or {}).items():
            lengths[ids == id] = len(name.encode())
        first = int(chunk["document"] and tokenizer.bos)
        lengths[:first] = 0
        if chunk["document"] and tokenizer.adds_space:
            lengths[first : first + 1] -= 1
        if may_separate and lengths.sum() > n_bytes:  # a separator ends the chunk
            lengths[-1] = 0
        total = int(lengths.sum())
        if total == n_bytes or tokenizer.is_lossless:
            return lengths, True
        ends = np.cumsum(lengths) if total else np.arange(1, len(ids) + 1)
        return np.diff(ends * n_bytes // max(1, int(ends[-1])), prepend=0), False

    def token_at(self, byte: int) -> int:
        """Where to cut for `byte`: the next token that starts with a space and follows visible ASCII.

        Every GPT tokenizer splits the text there, so all tokenizers get the same text on both sides. If
        none of the next 1,000 tokens qualifies, the result is the next token.
        """
        shard, rows, row = self.row_at("byte", byte)
        start, first_byte = int(rows["token"][row]), int(rows["byte"][row])
        lengths, _ = self._lengths(shard, rows, row)
        cut = start + int(np.searchsorted(np.cumsum(lengths) - lengths, byte - first_byte))
        first = max(0, cut - 1)
        near = self.vocab[self.tokens[first : min(cut + 1000, self.n_tokens)]]
        words = np.flatnonzero(near["starts_space"][1:] & near["ends_visible"][:-1])
        return first + 1 + int(words[0]) if len(words) else min(cut, self.n_tokens)

    def __repr__(self) -> str:
        return (
            f"TokenStore({self.fingerprint[:8]}: {self.n_tokens:,} tokens, {self.n_documents:,} "
            f"documents, {self.n_bytes:,} bytes, {len(self.shards)} shards of {self.dtype.name})"
        )


def vocab_table(tokenizer: Tokenizer) -> np.ndarray:
    """Properties of each id of a tokenizer, VOCAB (vocab_size,)."""
    table = np.zeros(tokenizer.vocab_size, dtype=VOCAB)
    tokens = tokenizer.token_bytes
    table["n_bytes"] = [len(token) for token in tokens]
    table["starts_space"] = [token.startswith(b" ") for token in tokens]
    table["ends_visible"] = [b"!" <= token[-1:] <= b"~" for token in tokens]
    for name, id in tokenizer.allowed_special.items():
        if name not in tokenizer.separators:  # a separator may stand for its name, or between documents
            table["n_bytes"][id] = len(name.encode())
    return table
