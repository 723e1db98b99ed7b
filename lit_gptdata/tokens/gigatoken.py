"""The engine gigatoken, several times as fast as tiktoken, used only where its ids are the same.

gigatoken 0.10.0 differs from tiktoken in a few thousand new Unicode characters. Text with one of them
goes to tiktoken. Both engines encode the start of each build, and their ids are compared.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_gptdata.tokens.chunks import GPT2_PATTERN, R50K_PATTERN
from lit_gptdata.tokens.tokenizer import Ids, Tokenizer

GIGATOKEN_VERSION = "0.10.0"
TIKTOKEN_VERSIONS = ("0.11", "0.12", "0.13", "0.14")
"""The versions that this file is tested with. Other versions may know other Unicode characters."""

GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
"""SHA-256 of r50k_base.tiktoken, OpenAI's file of the ranks of gpt2 (tiktoken_ext/openai_public.py)."""

# Ranges of code points, both ends included, that the two packages classify differently: 4,657 letters
# and digits that are new in Unicode 17. gigatoken 0.10.0 knows them. tiktoken 0.9 to 0.14 has Unicode 16
# and treats them as marks. They were found by asking both packages about every code point c, with a
# vocabulary of all bytes and all pairs of a byte with A, 1, ! and newline. Then the last token
# of c + "A" is a pair exactly if c and A are of the same class. tests/tokens/test_engines.py checks it.
CLASSES_DIFFER = (
    (0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2),
    (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB),
    (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6),
    (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE),
    (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED), (0x1E6F0, 0x1E6F4),
    (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
)  # fmt: skip

COMPARED_BYTES = 1 << 16  # at the start of a build, encoded by both engines; takes 3 ms
CHECK_EVERY = 4 << 20  # bytes of text between two looks at the memory
RENEW_EVERY = 64 << 20  # bytes of text after which a new instance is made without /proc, as on macOS

CACHE_LIMIT = 96 << 20
"""Bytes of memory by which an instance may grow before a new one replaces it, which costs 0.1 s.

gigatoken 0.10.0 starts with 30 MB and caches every word: 0.6 bytes per byte of mixed text, up to 8 if
words hardly repeat. With this limit the peak was 200 MB (1.5 GB of random words or random Chinese). With
128 MiB it was 300 MB, because the word table doubled one more time."""


def load_gigatoken(
    tokenizer: Tokenizer, reference: Callable[[bytes], Ids], *, required: bool
) -> GigatokenEngine | None:
    """The gigatoken engine, or None if it cannot be used; `reference` encodes with tiktoken.

    With `required` it raises ImportError, or ValueError for an untested encoding or version.
    """
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        if not required:
            return None
        raise ImportError(
            "engine='gigatoken' needs the package gigatoken: pip install 'lit-gptdata[fast]', or use "
            "engine='auto', which does not need it"
        ) from error
    library = tokenizer.reference
    ranks = library.content() if library.rule in (R50K_PATTERN, GPT2_PATTERN) else b""
    if hashlib.sha256(ranks).hexdigest() != GPT2_RANKS_SHA256:
        if not required:
            return None
        raise ValueError(
            f"engine='gigatoken' is tested for gpt2 and r50k_base only, not for {tokenizer.name!r}: use "
            "engine='auto' or 'tiktoken'"
        )
    ours, theirs = map(importlib.metadata.version, ("gigatoken", "tiktoken"))
    if ours != GIGATOKEN_VERSION or theirs.rpartition(".")[0] not in TIKTOKEN_VERSIONS:
        tested = f"gigatoken {GIGATOKEN_VERSION} and tiktoken {' or '.join(TIKTOKEN_VERSIONS)}"
        message = (
            f"engine='gigatoken' is tested with {tested}, but found are gigatoken {ours} and tiktoken "
            f"{theirs}: pip install 'lit-gptdata[fast]', or use engine='tiktoken'"
        )
        if required:
            raise ValueError(message)
        warnings.warn(f"falling back to tiktoken, which is slower: {message}", stacklevel=3)
        return None
    return GigatokenEngine(tokenizer, ranks, reference)


class GigatokenEngine:
    """gigatoken where it gives tiktoken's ids, otherwise `reference`, which is tiktoken."""

    def __init__(self, tokenizer: Tokenizer, ranks: bytes, reference: Callable[[bytes], Ids]) -> None:
        self.name = "gigatoken"
        self._tokenizer = tokenizer
        self._reference = reference
        # gigatoken recognizes each special token that it is given
        self._gigatoken = _Gigatoken(ranks, tokenizer.allowed_special)
        refuse = tokenizer.special_tokens == "error"
        self._refused = [special.encode() for special in tokenizer.special_ids] if refuse else []
        self._bytes_to_compare = COMPARED_BYTES

    def encode(self, chunk: bytes) -> Ids:
        if self._bytes_to_compare > 0:
            self._compare(chunk)
        if self.name == "tiktoken" or _classes_differ(chunk):
            return self._reference(chunk)
        if any(special in chunk for special in self._refused):
            self._tokenizer.check_special(chunk.decode())
        return self._gigatoken.encode(chunk).astype(self._tokenizer.dtype)

    def _compare(self, chunk: bytes) -> None:
        """Encode the start of a build with both engines; switch to tiktoken if the ids differ."""
        head = chunk[: self._bytes_to_compare].decode(errors="ignore").encode()  # complete characters
        self._bytes_to_compare -= len(chunk)
        if _classes_differ(head):
            return
        expected, actual = self._reference(head), self._gigatoken.encode(head)
        if np.array_equal(expected, actual):
            return
        self.name = "tiktoken"
        self._bytes_to_compare = 0
        pairs = enumerate(itertools.zip_longest(expected.tolist(), actual.tolist()))
        position, (want, got) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        warnings.warn(
            f"falling back to tiktoken, because gigatoken gives other ids: id {position} of a text that "
            f"starts with {head[:40].decode(errors='replace')!r} is {got} instead of {want}. Please "
            "report this; engine='tiktoken' avoids gigatoken",
            stacklevel=3,
        )


class _Gigatoken:
    """A gigatoken instance that is replaced when its cache of words takes too much memory."""

    def __init__(self, ranks: bytes, special_ids: dict[str, int]) -> None:
        self._ranks = ranks
        self._special_ids = special_ids
        self._instance: Any = None
        self._load()

    def encode(self, chunk: bytes) -> npt.NDArray[np.uint32]:
        ids: npt.NDArray[np.uint32] = self._instance.encode(chunk)
        self._encoded_bytes += len(chunk)
        if self._encoded_bytes >= self._next_check:
            self._next_check += CHECK_EVERY
            if self._is_large():
                self._instance = None  # free it before the next one is loaded
                if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                    trim(0)  # makes glibc return freed memory to the system, about 50 MB
                self._load()
        return ids

    def _load(self) -> None:
        import gigatoken

        # a file without a name, so that a kill leaves nothing behind
        try:
            with tempfile.TemporaryFile() as file:
                file.write(self._ranks)
                file.seek(0)
                path = f"/dev/fd/{file.fileno()}"
                self._instance = gigatoken.Tokenizer.from_tiktoken(path, "gpt2", self._special_ids)
        except OSError as error:
            problem = f"{error.strerror}: gigatoken needs 1 MB. Free some space, or set TMPDIR"
            raise OSError(error.errno, problem, tempfile.gettempdir()) from error
        self._instance.encode(b"a")  # loads numpy's C API; Ctrl-C in the middle of that is a panic
        self._memory_at_start = _anonymous_memory()
        self._encoded_bytes = 0
        self._next_check = CHECK_EVERY

    def _is_large(self) -> bool:
        memory = _anonymous_memory()
        if memory is None or self._memory_at_start is None:
            return self._encoded_bytes >= RENEW_EVERY
        return memory - self._memory_at_start > CACHE_LIMIT


def _anonymous_memory() -> int | None:
    """Bytes of this process's memory that no file backs; None on systems without /proc."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_bytes().split())
    except OSError:
        return None
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _classes_differ(chunk: bytes) -> bool:
    """Whether a character of valid UTF-8 has the first 3 bytes of a character in `CLASSES_DIFFER`.

    1 MiB takes 0.03 ms if it has none of their first bytes, 0.2 ms with some emoji, 1.5 ms for Thai.
    """
    if chunk.isascii():
        return False
    for lead, (second, third) in _prefix_tables().items():
        if lead in chunk:
            codes = np.frombuffer(chunk, dtype=np.uint8)
            found = np.flatnonzero(codes == lead)
            found = found[second[codes[found + 1]]]
            if found.size and third[codes[found + 1], codes[found + 2]].any():
                return True
    return False


@functools.cache
def _prefix_tables() -> dict[int, tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """First byte -> whether a second byte may follow (256,), and a second and third byte (256, 256)."""
    prefixes = {chr(c).encode()[:3] for a, b in CLASSES_DIFFER for c in range(a, b + 1)}
    tables = {}
    for lead in {prefix[0] for prefix in prefixes}:
        third: npt.NDArray[np.bool_] = np.zeros((256, 256), dtype=np.bool_)
        for prefix in prefixes:
            if prefix[0] == lead:
                third[prefix[1], prefix[2]] = True
        second: npt.NDArray[np.bool_] = np.any(third, axis=1)
        tables[lead] = second, third
    return tables
