"""The engine gigatoken, much faster than the tokenizer's library, used where its ids are the same.

chunks.py lists the split patterns. gigatoken differs in a few thousand new Unicode characters, and text
with one of them goes to the library. Both engines encode the start of each build, and their ids are
compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import itertools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_gptdata.text.formats import needs
from lit_gptdata.tokens.chunks import CLASSES_DIFFER, RULES, VERSIONS, Ids, Ranges, encode_chunk
from lit_gptdata.tokens.libraries.hugging_face import BYTES, HuggingFaceReference, steps
from lit_gptdata.tokens.libraries.reference import Reference
from lit_gptdata.tokens.libraries.sentencepiece_model import SentencePieceReference
from lit_gptdata.tokens.libraries.tiktoken_encoding import read_ranks
from lit_gptdata.tokens.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Encode = Callable[[bytes, bool], Ids]
CHARACTERS = {byte: character for character, byte in BYTES.items()}

COMPARED_BYTES = 1 << 16  # at the start of a build, encoded by both engines; takes 3 ms
CHECK_EVERY = 4 << 20  # bytes of text between two looks at the memory

CACHE_LIMIT = 96 << 20
"""Bytes of memory by which an instance may grow before a new one replaces it, which costs 0.1 s.

gigatoken 0.10.0 starts with 30 MB and caches every word: 0.6 bytes per byte of mixed text, up to 8 if
words hardly repeat. With this limit the peak was 200 MB (1.5 GB of random words or random Chinese). With
128 MiB it was 300 MB, because the word table doubled one more time."""


def load_gigatoken(tokenizer: Tokenizer, reference: Encode, *, required: bool) -> GigatokenEngine | None:
    """The gigatoken engine, or None if it cannot be used; `reference` encodes with the library.

    With `required` it raises ImportError, or ValueError for an untested tokenizer or version.
    """
    try:
        needs("gigatoken", "fast", "engine='gigatoken'")
    except ImportError:
        if required:
            raise
        return None
    library, name = tokenizer.reference.library, tokenizer.name
    if tokenizer.reference.rule not in RULES:
        problem = f"gigatoken is not tested with the way in which {name!r} splits a text"
    elif wrong := _untested_versions(library):
        problem = f"gigatoken is not tested with {wrong}: pip install 'lit-gptdata[fast]'"
        if not required:
            warnings.warn(f"falling back to {library}, which is slower: {problem}", stacklevel=3)
            return None
    else:
        try:
            return GigatokenEngine(tokenizer, reference)
        except ValueError as error:
            problem = f"gigatoken cannot read {name!r} ({error})"
    if required:
        raise ValueError(f"engine='gigatoken' is refused: {problem}. Use 'auto' or 'reference'")
    log.info("%s; %s is used, which is slower", problem, library)
    return None


def _untested_versions(library: str) -> str:
    """The packages whose version is not in the table, with their versions; "" if there is none."""
    versions = {package: importlib.metadata.version(package) for package in ("gigatoken", library)}
    return " and ".join(
        f"{package} {version}"
        for package, version in versions.items()
        if not f"{version}.".startswith(tuple(f"{known}." for known in VERSIONS[package]))
    )


class GigatokenEngine:
    """gigatoken where it gives the ids of the library, otherwise `reference`, which is the library.

    Raises ValueError for a tokenizer that gigatoken cannot read.
    """

    def __init__(self, tokenizer: Tokenizer, reference: Encode) -> None:
        self.name = "gigatoken"
        self._library, self._reference = tokenizer.reference.library, reference
        self._rule, self._dtype = tokenizer.cut_rule, tokenizer.dtype
        self._differ = RULES[tokenizer.reference.rule].differ
        self._gigatoken = _Gigatoken(_loaders(tokenizer.reference, tokenizer.allowed_special))
        is_refused = tokenizer.special_tokens == "error"  # the library raises the error
        # texts with one of these go to the library
        self._left_to_library = [special.encode() for special in tokenizer.special_ids if is_refused]
        self._left_to_library += _overlapping(tokenizer.reference, tokenizer.allowed_special)
        self._bytes_to_compare = COMPARED_BYTES

    def encode(self, chunk: bytes, continues: bool = False) -> Ids:
        if self._bytes_to_compare > 0:
            self._compare(chunk)
        is_left = any(text in chunk for text in self._left_to_library)
        if self.name != "gigatoken" or is_left or _classes_differ(chunk, self._differ):
            return self._reference(chunk, continues)
        return encode_chunk(self._gigatoken.encode, chunk, continues, self._rule).astype(self._dtype)

    def _compare(self, chunk: bytes) -> None:
        """Encode the start of a build with both engines; switch to the library if the ids differ."""
        head = chunk[: self._bytes_to_compare].decode(errors="ignore").encode()  # complete characters
        self._bytes_to_compare -= len(chunk)
        if _classes_differ(head, self._differ):
            return
        if np.array_equal(self._reference(head, False), self._gigatoken.encode(head)):
            return
        self.name = self._library
        self._bytes_to_compare = 0
        start = head[:40].decode(errors="replace")
        problem = f"because gigatoken gives other ids to a text that starts with {start!r}"
        advice = "Please report this; engine='reference' avoids gigatoken"
        warnings.warn(f"falling back to {self.name}, {problem}. {advice}", stacklevel=3)


class _Gigatoken:
    """A gigatoken instance that is replaced when its cache of words takes too much memory."""

    def __init__(self, loaders: list[Callable[[], Any]]) -> None:
        """`loaders` make an instance; the next one is tried if gigatoken refuses the first."""
        self._loaders = loaders
        self._load()

    def encode(self, chunk: bytes) -> np.ndarray:
        ids: np.ndarray = self._instance.encode(chunk)
        self._encoded_bytes += len(chunk)
        if self._encoded_bytes >= self._next_check:
            self._next_check += CHECK_EVERY
            if _anonymous_memory(self._encoded_bytes) - self._memory_at_start > CACHE_LIMIT:
                self._load()
        return ids

    def _load(self) -> None:
        self._instance: Any = None  # free it before the next one is loaded
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # makes glibc return freed memory to the system, about 50 MB
        while self._instance is None:
            try:
                with output_hidden(2):  # where Rust prints panics
                    self._instance = self._loaders[0]()
            except (KeyboardInterrupt, SystemExit, MemoryError, OSError):
                raise
            except BaseException as error:  # a panic of gigatoken is not an Exception
                if len(self._loaders) == 1:
                    raise ValueError(str(error).partition("\n")[0]) from None
                del self._loaders[0]
        self._instance.encode(b"a")  # loads numpy's C API; Ctrl-C in the middle of that is a panic
        self._memory_at_start = _anonymous_memory(0)
        self._encoded_bytes = 0
        self._next_check = CHECK_EVERY


def _anonymous_memory(encoded_bytes: int) -> float:
    """Bytes of this process's memory that no file backs; an estimate without /proc, as on macOS."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_bytes().split())
    except OSError:
        return 1.5 * encoded_bytes
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def output_hidden(descriptor: int) -> Iterator[None]:
    """Discard what the process writes to 1, standard output, or to 2, standard error."""
    saved = os.dup(descriptor)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), descriptor)
        yield
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)


def _loaders(reference: Reference, special_ids: Mapping[str, int]) -> list[Callable[[], Any]]:
    """Functions that make a gigatoken instance with the ids of `reference`, the fastest one first.

    gigatoken recognizes each special string that it is given. Raises ValueError for a tokenizer with a
    detail that gigatoken ignores.
    """
    import gigatoken

    content, from_json = reference.content(), gigatoken.Tokenizer.from_json
    if reference.library == "tokenizers":
        return [functools.partial(from_json, _checked_json(content, special_ids))]
    if isinstance(reference, SentencePieceReference):
        return [functools.partial(from_json, _sentencepiece_as_json(reference))]
    rule = RULES[reference.rule]
    as_json = functools.cache(lambda: ranks_as_json(content, rule.regex, special_ids))
    from_ranks = functools.partial(_from_ranks, content, rule.scheme, special_ids)
    return [from_ranks, lambda: from_json(as_json())]


def _from_ranks(ranks: bytes, scheme: str, special_ids: Mapping[str, int]) -> Any:
    """Fails for ranks that leave out a number, or have tokens that no merge makes, such as Llama 3's."""
    import gigatoken

    with tempfile.TemporaryFile() as file:  # without a name, so a kill leaves nothing behind
        file.write(ranks)
        file.seek(0)
        path = f"/dev/fd/{file.fileno()}"
        return gigatoken.Tokenizer.from_tiktoken(path, scheme, dict(special_ids))


def ranks_as_json(ranks: bytes, regex: str, special_ids: Mapping[str, int]) -> str:
    """A tokenizer.json that merges as tiktoken does: whole matches first, then the lowest rank."""
    tokens = read_ranks(ranks).items()
    names = {token.decode("latin-1").translate(CHARACTERS): rank for token, rank in tokens}
    merges = [
        f"{name[:i]} {name[i:]}" for name in names for i in range(1, len(name))
        if name[:i] in names and name[i:] in names
    ]  # fmt: skip
    added = [{"id": id, "content": text, "special": True} for text, id in special_ids.items()]
    model = {"type": "BPE", "vocab": names, "merges": merges, "ignore_merges": True}
    split = {"type": "Split", "pattern": {"Regex": regex}}
    return json.dumps({"added_tokens": added, "pre_tokenizer": split, "model": model})


def _checked_json(content: bytes, special_ids: Mapping[str, int]) -> str:
    """A tokenizer.json without the special tokens that a text may not contain."""
    values = json.loads(content)
    tokens = values["added_tokens"]
    added = [each for each in tokens if not each["special"] or each["content"] in special_ids]
    ignored = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    wrong = [key for key in ignored if values["model"].get(key)]
    # gigatoken looks for added tokens before it normalizes
    flags = ["lstrip", "rstrip", "single_word"] + ["normalized"] * bool(steps(values["normalizer"]))
    wrong += [flag for flag in flags if any(each[flag] for each in added)]
    if wrong:
        raise ValueError(f"it ignores {' and '.join(wrong)}")
    return content.decode() if added == tokens else json.dumps(values | {"added_tokens": added})


def _overlapping(reference: Reference, special_ids: Mapping[str, int]) -> list[bytes]:
    """The added tokens that may overlap others in a text, where the library's choice is its own.

    tokenizers looks for tokens with `normalized` after those without, and leaves out special ones if the
    policy asks for it. gigatoken looks for all that it has at once.
    """
    if not isinstance(reference, HuggingFaceReference):
        return []
    groups: list[list[str]] = [[], [], []]  # in the order of the search; the last one is left out
    for each in reference.added_tokens:
        is_kept = not each["special"] or each["content"] in special_ids
        groups[each["normalized"] if is_kept else 2].append(each["content"])
    first, second, left_out = groups
    pairs = [*itertools.product(second, first + left_out), *itertools.product(first, left_out)]
    return [*{text.encode() for text, other in pairs if _can_overlap(text, other)}]


def _can_overlap(a: str, b: str) -> bool:
    """Whether one has the other inside, or starts with the end of the other."""
    lengths = range(1, min(len(a), len(b)))
    return a in b or b in a or any(a[:n] == b[-n:] or a[-n:] == b[:n] for n in lengths)


def _sentencepiece_as_json(reference: SentencePieceReference) -> str:
    """A tokenizer.json of a sentencepiece model, without special tokens: they are text in a text."""
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    model = reference.model
    ids = range(model.GetPieceSize())
    special = [model.IsControl(id) or model.IsUnknown(id) or model.IsByte(id) for id in ids]
    scores = [model.GetScore(id) for id in ids if not special[id] and model.IdToPiece(id).strip("▁")]
    values = json.loads(sentencepiece_to_tokenizer_json(reference.content()))
    values["added_tokens"] = [each for each in values["added_tokens"] if not each["special"]]
    if values["added_tokens"] or any(map(model.IsUnused, ids)) or len({*scores}) < len(scores):
        raise ValueError("it ignores pieces of the user, unused pieces and equal scores")
    return json.dumps(values)


def _classes_differ(chunk: bytes, ranges: Ranges = CLASSES_DIFFER) -> bool:
    """Whether valid UTF-8 has a character in `ranges`.

    1 MiB takes 0.03 ms if it has none of their first bytes, 0.2 ms with some emoji, 1.5 ms for Thai.
    """
    if chunk.isascii():
        return False
    characters, tables = _prefix_tables(ranges)
    for lead, (second, third) in tables.items():
        if lead in chunk:
            codes = np.frombuffer(chunk + b"\0", np.uint8)  # the last character may have two bytes
            found = np.flatnonzero(codes == lead)
            found = found[second[codes[found + 1]]]
            found = found[third[codes[found + 1], codes[found + 2]]]
            if any(chunk[i : i + 4].decode(errors="ignore")[:1] in characters for i in found.tolist()):
                return True
    return False


@functools.cache
def _prefix_tables(ranges: Ranges) -> tuple[frozenset[str], dict[int, tuple[np.ndarray, np.ndarray]]]:
    """The characters; first byte -> may a second byte follow (256,), a second and a third (256, 256)."""
    characters = frozenset(chr(c) for a, b in ranges for c in range(a, b + 1))
    tables: dict[int, Any] = {}
    for lead, second, *rest in {c.encode()[:3] for c in characters}:
        table = tables.setdefault(lead, np.zeros((256, 256), np.bool_))
        table[second, rest or slice(None)] = True
    return characters, {lead: (table.any(axis=1), table) for lead, table in tables.items()}
