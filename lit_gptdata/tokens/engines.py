"""What turns pieces of text into ids: tiktoken, or gigatoken where it is proved to give the same ids.

    engine = load_engine(Tokenizer("gpt2"))
    engine.encode(b"hello world")  ->  array([31373, 995], dtype=uint16)

tiktoken is the reference. gigatoken is several times as fast, and whatever it would encode otherwise
goes to tiktoken: ids never depend on the engine.
"""

from __future__ import annotations

import binascii
import ctypes
import functools
import hashlib
import importlib.metadata
import itertools
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from lit_gptdata.text.document import utf8
from lit_gptdata.tokens.chunks import GPT2_PATTERN, LONG_RUN, R50K_PATTERN, cut_rule, pieces
from lit_gptdata.tokens.tokenizer import END_OF_TEXT, Tokenizer

EngineName = Literal["auto", "tiktoken", "gigatoken"]
Ids = npt.NDArray[np.unsignedinteger[Any]]

# The versions that the claims about gigatoken below are tested with. Others may know other characters.
GIGATOKEN_VERSION = "0.10.0"
TIKTOKEN_VERSIONS = ("0.11", "0.12", "0.13", "0.14")

# SHA-256 of r50k_base.tiktoken, gpt2's ranks as OpenAI publishes them (tiktoken_ext/openai_public.py).
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# First and last code points of the ranges that the two split otherwise: letters and digits new in
# Unicode 17, which gigatoken 0.10.0 knows and tiktoken 0.9 to 0.14 (Unicode 16) takes for marks; 4,657.
# Derived by asking both for every code point c with a vocabulary of all bytes and all pairs of a byte
# with A, 1, ! and newline: there c + "A" ends in a pair if and only if c is of A's class, and so on.
# tests/tokens/test_engines.py derives them again.
CLASSES_DIFFER = (
    (0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2),
    (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB),
    (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6),
    (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE),
    (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED), (0x1E6F0, 0x1E6F4),
    (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
)  # fmt: skip

# Bytes of the start of a build that both engines encode, to compare; 3 ms.
COMPARED_BYTES = 1 << 16

# Bytes. gigatoken 0.10.0 keeps every word it meets: 0.6 bytes a byte of mixed text, up to 8 where hardly
# a word returns. A new instance costs 0.1 s and all words known, so memory decides when: each
# `CHECK_EVERY` bytes of text it is looked at, and a growth by `CACHE_LIMIT` is too much. An instance
# begins with 30 MB, and 200 MB was the most seen (random words, random Chinese, up to 1.5 GB); with
# 128 MiB it was 300 MB, since the table of words got to double once more.
CACHE_LIMIT = 96 << 20
CHECK_EVERY = 4 << 20

# Bytes of text after which a new instance comes where memory cannot be looked at (not Linux).
RENEW_EVERY = 64 << 20


class Engine(Protocol):
    """Encodes pieces one by one."""

    @property
    def name(self) -> str:
        """Which package does the work: tiktoken or gigatoken."""

    def encode(self, piece: bytes) -> Ids:
        """Ids of a text, or of a piece from `pieces`, in the tokenizer's dtype.

        The bytes must be valid UTF-8; gigatoken does not notice if they are not. Raises ValueError
        for a special string if the tokenizer's policy is "error".
        """


def load_engine(tokenizer: Tokenizer, engine: EngineName = "auto") -> Engine:
    """The engine for a tokenizer; "auto" is gigatoken where it is installed and proved, else tiktoken.

    Raises ImportError if gigatoken is asked for and missing, ValueError if its ids are not proved for
    this encoding or these versions, and for an unknown engine.
    """
    check_engine(engine)
    reference = TiktokenEngine(tokenizer)
    if engine == "tiktoken":
        return reference
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        if engine == "auto":
            return reference
        raise ImportError(
            "engine='gigatoken' needs the package gigatoken: pip install 'lit-gptdata[fast]', "
            "or use engine='auto', which does without"
        ) from error
    ranks = _gpt2_ranks(tokenizer)
    if ranks is None:
        if engine == "auto":
            return reference
        raise ValueError(
            f"engine='gigatoken' is proved to give tiktoken's ids for gpt2 and r50k_base only, not for "
            f"{tokenizer.name!r}: use engine='auto' or 'tiktoken'"
        )
    found = _unproved_versions()
    if found:
        message = (
            f"gigatoken is proved to give tiktoken's ids in version {GIGATOKEN_VERSION}, with tiktoken "
            f"{TIKTOKEN_VERSIONS[0]} to {TIKTOKEN_VERSIONS[-1]}; installed are {found}: "
            "pip install 'lit-gptdata[fast]', or use engine='tiktoken'"
        )
        if engine == "gigatoken":
            raise ValueError(message)
        warnings.warn(f"going on with tiktoken, which is slower: {message}", stacklevel=2)
        return reference
    return GigatokenEngine(tokenizer, ranks, reference)


def check_engine(engine: str) -> None:
    """Raise ValueError for an unknown engine."""
    if engine not in get_args(EngineName):
        raise ValueError(f"unknown engine {engine!r}: choose 'auto', 'tiktoken' or 'gigatoken'")


def _gpt2_ranks(tokenizer: Tokenizer) -> bytes | None:
    """The rank file of an encoding that splits and ranks as gpt2 does, None for another."""
    if tokenizer.encoding._pat_str not in (R50K_PATTERN, GPT2_PATTERN):
        return None
    ranks = _rank_file(tokenizer)
    return ranks if hashlib.sha256(ranks).hexdigest() == GPT2_RANKS_SHA256 else None


def _unproved_versions() -> str | None:
    gigatoken, tiktoken = map(importlib.metadata.version, ("gigatoken", "tiktoken"))
    if gigatoken == GIGATOKEN_VERSION and tiktoken.rpartition(".")[0] in TIKTOKEN_VERSIONS:
        return None
    return f"gigatoken {gigatoken} and tiktoken {tiktoken}"


def _rank_file(tokenizer: Tokenizer) -> bytes:
    """The encoding's ranks as a .tiktoken file: a line for each token, in base64, with its rank."""
    ranks = sorted(tokenizer.encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = [b"%s %d" % (binascii.b2a_base64(token, newline=False), rank) for token, rank in ranks]
    return b"\n".join([*lines, b""])


def encode_text(text: str, tokenizer: Tokenizer) -> Ids:
    """A text in memory to ids, in the tokenizer's dtype, by tiktoken."""
    encoding = tokenizer.encoding
    rule = cut_rule(encoding._pat_str, encoding.special_tokens_set)
    engine = TiktokenEngine(tokenizer)
    ids = [engine.encode(piece) for piece in pieces([utf8(text)], rule)]
    return np.concatenate(ids) if ids else np.empty(0, tokenizer.dtype)


class TiktokenEngine:
    """tiktoken, also for whitespace runs of any length."""

    name = "tiktoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encoding = tokenizer.encoding
        self._rule = cut_rule(self._encoding._pat_str)
        allow = tokenizer.special_tokens == "allow" and END_OF_TEXT in self._encoding._special_tokens
        self._allowed = {END_OF_TEXT} if allow else set()

    def encode(self, piece: bytes) -> Ids:
        text = piece.decode()
        if self._tokenizer.special_tokens == "error":
            self._tokenizer.refuse_special(text)
        if self._rule and _has_long_run(text):
            return self._encode_long_runs(text)
        return self._encode(text)

    def _encode(self, text: str) -> Ids:
        # faster than encode() and a tenth of its memory: it makes no int of a token
        ids = self._encoding.encode_to_numpy(text, allowed_special=self._allowed, disallowed_special=())
        return ids.astype(self._tokenizer.dtype)

    def _encode_long_runs(self, text: str) -> Ids:
        """Ids of a text with whitespace runs that overflow the stack of tiktoken's regex engine.

        Such a run is one match of the split pattern (`CutRule.whole_run`), so it goes past the pattern.
        """
        assert self._rule
        parts: list[Ids] = []
        segments = text.split(END_OF_TEXT) if self._allowed else [text]
        for i, segment in enumerate(segments):
            if i:
                parts.append(self._encode(END_OF_TEXT))
            done = 0
            for run in self._rule.whole_run.finditer(segment):
                parts.append(self._encode(segment[done : run.start()]))
                ids = self._encoding._encode_single_piece(run.group())
                parts.append(np.array(ids, dtype=self._tokenizer.dtype))
                done = run.end()
            parts.append(self._encode(segment[done:]))
        return np.concatenate(parts)


def _has_long_run(text: str) -> bool:
    """True if the text holds a whitespace run of `LONG_RUN` characters; False if none of half that.

    Such a run covers a block of half its length that begins at a multiple of it, wherever the run
    begins. So it is enough to look at the first character of each block, and on only where that is
    whitespace.
    """
    block = LONG_RUN // 2
    starts = range(0, len(text) - block + 1, block)
    return any(text[i].isspace() and text[i : i + block].isspace() for i in starts)


class GigatokenEngine:
    """gigatoken where it gives tiktoken's ids, else tiktoken."""

    def __init__(self, tokenizer: Tokenizer, ranks: bytes, reference: TiktokenEngine) -> None:
        self.name = "gigatoken"
        self._tokenizer = tokenizer
        self._reference = reference
        specials = tokenizer.encoding._special_tokens
        # gigatoken recognises every special token that it knows, so it is told none but where allowed
        allow = tokenizer.special_tokens == "allow" and END_OF_TEXT in specials
        self._gigatoken = _Gigatoken(ranks, {END_OF_TEXT: specials[END_OF_TEXT]} if allow else {})
        refuse = tokenizer.special_tokens == "error"
        self._refused = [special.encode() for special in specials] if refuse else []
        self._uncompared = COMPARED_BYTES

    def encode(self, piece: bytes) -> Ids:
        if self._uncompared > 0:
            self._compare(piece)
        if self.name == "tiktoken" or _classes_differ(piece):
            return self._reference.encode(piece)
        if any(special in piece for special in self._refused):
            self._tokenizer.refuse_special(piece.decode())
        return self._gigatoken.encode(piece).astype(self._tokenizer.dtype)

    def _compare(self, piece: bytes) -> None:
        """Encode the start of a build with both; if the ids differ, say so and stay with tiktoken."""
        head = piece[: self._uncompared].decode(errors="ignore").encode()  # no half character
        self._uncompared -= len(piece)
        if _classes_differ(head):
            return
        expected, got = self._reference.encode(head), self._gigatoken.encode(head)
        if np.array_equal(expected, got):
            return
        self.name = "tiktoken"
        self._uncompared = 0
        pairs = enumerate(itertools.zip_longest(expected.tolist(), got.tolist()))
        at, (want, has) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
        warnings.warn(
            f"going on with tiktoken, because gigatoken gives other ids: id {at} of a text that begins "
            f"{head[:40].decode(errors='replace')!r} is {has} instead of {want}. Please report this; "
            "engine='tiktoken' does without gigatoken",
            stacklevel=3,
        )


class _Gigatoken:
    """A gigatoken instance, replaced by a new one when the words it has met take too much memory."""

    def __init__(self, ranks: bytes, specials: dict[str, int]) -> None:
        self._ranks = ranks
        self._specials = specials
        self._instance: Any = None
        self._load()

    def encode(self, piece: bytes) -> npt.NDArray[np.uint32]:
        ids: npt.NDArray[np.uint32] = self._instance.encode(piece)
        self._encoded += len(piece)
        if self._encoded >= self._next_check:
            self._next_check += CHECK_EVERY
            if self._is_large():
                self._instance = None  # it goes before the new one comes
                _return_freed_memory()
                self._load()
        return ids

    def _load(self) -> None:
        import gigatoken

        # a file without a name: a kill leaves none behind
        with tempfile.TemporaryFile() as file:
            file.write(self._ranks)
            file.seek(0)
            path = f"/dev/fd/{file.fileno()}"
            self._instance = gigatoken.Tokenizer.from_tiktoken(path, "gpt2", self._specials)
        self._memory_at_first = _anonymous_memory()
        self._encoded = 0  # bytes of text
        self._next_check = CHECK_EVERY  # bytes of text

    def _is_large(self) -> bool:
        memory = _anonymous_memory()
        if memory is None or self._memory_at_first is None:
            return self._encoded >= RENEW_EVERY
        return memory - self._memory_at_first > CACHE_LIMIT


def _return_freed_memory() -> None:
    """Ask glibc for what it keeps of freed small blocks, here 50 MB; elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _anonymous_memory() -> int | None:
    """Bytes of this process in memory that no file backs; None where /proc does not tell."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_bytes().split())
    except OSError:
        return None
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _classes_differ(piece: bytes) -> bool:
    """Whether valid UTF-8 holds a character of `CLASSES_DIFFER`, or one that begins like it.

    Looks for the first three bytes of such characters, byte by byte: 0.03 ms for 1 MiB without their
    first bytes, 0.2 ms with some emoji, 1.5 ms for Thai.
    """
    if piece.isascii():
        return False
    for lead, (second, third) in _prefix_tables().items():
        if lead in piece:
            codes = np.frombuffer(piece, dtype=np.uint8)
            at = np.flatnonzero(codes == lead)
            at = at[second[codes[at + 1]]]
            if at.size and third[codes[at + 1], codes[at + 2]].any():
                return True
    return False


@functools.cache
def _prefix_tables() -> dict[int, tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """First byte -> whether a second byte may follow (256,), and a second and third (256, 256)."""
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
