"""Train a byte-level BPE tokenizer on texts.

    documents  ──▶  a temporary file  ──▶  merges (gigatoken, or tokenizers)  ──▶  tokenizer.json

gigatoken and tokenizers learn the same merges, so the file does not depend on the library.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lit_gptdata._checks import check_integer
from lit_gptdata._io import write_whole
from lit_gptdata.text.document import Corpus
from lit_gptdata.tokens.chunks import GPT2_PATTERN, cut_rule, safe_chunks
from lit_gptdata.tokens.gigatoken import CLASSES_DIFFER
from lit_gptdata.tokens.libraries.hugging_face import _BYTES
from lit_gptdata.tokens.libraries.reference import MAX_VOCAB
from lit_gptdata.tokens.libraries.vocabularies import END_OF_TEXT

MIN_VOCAB = 257  # the bytes and <|endoftext|>
CHUNK_BYTES = 1 << 12  # of text; the train part ends at the start of a chunk
HELD_OUT_BYTES = 1 << 20  # of each corpus, to measure bytes per token
CUT_SLACK = 0.01  # a split may move to a document boundary within 1 % of the corpus (windows/split.py)

CHARACTERS = {byte: character for character, byte in _BYTES.items()}  # as a tokenizer.json writes bytes

# The libraries disagree whether these characters are letters, so they are cut out, and both agree.
NEW_LETTERS = re.compile("[" + "".join(f"{chr(a)}-{chr(b)}" for a, b in CLASSES_DIFFER) + "]+")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training used and made."""

    n_merges: int
    n_bytes: int
    """UTF-8 bytes of text that trained it."""
    library: str
    seconds: float
    held_out: list[str]
    """The start of the text that did not train it, by document; [] if all of it did."""
    held_out_tokens: int


def train_tokenizer(path: Path, vocab_size: int, texts: Iterable[tuple[Corpus, float]]) -> Training:
    """Train on the first part of each corpus, given as a fraction of its bytes; write a tokenizer.json.

    `vocab_size` counts the 256 bytes and `<|endoftext|>`, which has the last id. Merges never cross the
    documents. The text is copied to a nameless file in the folder of `path`. Raises TypeError or
    ValueError for a wrong size and a text that is too short, ImportError, OSError.
    """
    check_integer("vocab_size", vocab_size, MIN_VOCAB, f"the 256 bytes, {END_OF_TEXT} and the merges")
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"vocab_size must be an integer ≤ {MAX_VOCAB:,}, got {vocab_size:,}")
    tokenizers, start = _tokenizers(), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            copied = [_copy(corpus, part, file) for corpus, part in texts]
            file.flush()
            if not (n_bytes := sum(n for n, _ in copied)):
                raise ValueError("no text is left to train on: give more, or lower val_fraction")
            library, merges = _learn(file, int(vocab_size), tokenizers)
    except OSError as error:
        if error.errno and not error.filename:  # the nameless file, for example on a full disk
            error.filename = str(path)
        raise
    if (size := MIN_VOCAB + len(merges)) < vocab_size:
        problem = f"the text yields {len(merges):,} merges, so the tokenizer has {size:,} tokens"
        warnings.warn(f"{problem}, not vocab_size={vocab_size:,}: give more text", stacklevel=2)
    content = _as_json(merges)
    seconds = time.perf_counter() - start
    held_out = [text for _, rest in copied for text in rest]
    model = tokenizers.Tokenizer.from_buffer(content)
    held_out_tokens = sum(len(model.encode(text)) for text in held_out)
    write_whole(path, content)
    return Training(
        n_merges=len(merges), n_bytes=n_bytes, library=library, seconds=seconds, held_out=held_out,
        held_out_tokens=held_out_tokens,
    )  # fmt: skip


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        problem = "training and using a tokenizer.json needs the package tokenizers"
        raise ImportError(f"{problem}: pip install 'lit-gptdata[tokenizers]'") from error
    return tokenizers


def _copy(corpus: Corpus, part: float, file: IO[bytes]) -> tuple[int, list[str]]:
    """Append the first `part` of a corpus; returns its bytes, and the start of the rest by document."""
    n_bytes = 0
    starts = [(0, file.tell())]  # bytes of text → position in the file, every 0.1 %
    rule = cut_rule(GPT2_PATTERN)
    for document in corpus:
        file.write(b"" if document.continues else END_OF_TEXT.encode())
        for chunk in safe_chunks(document.chunks, rule, CHUNK_BYTES):
            if n_bytes >= 1.001 * starts[-1][0]:
                starts.append((n_bytes, file.tell()))
            n_bytes += len(chunk)
            is_ascii = chunk.isascii()
            file.write(chunk if is_ascii else NEW_LETTERS.sub(END_OF_TEXT, chunk.decode()).encode())
    if part >= 1:
        return n_bytes, []
    limit = max(0, part - CUT_SLACK) * n_bytes
    n_trained, cut = next(start for start in reversed(starts) if start[0] <= limit)
    file.seek(cut)
    rest = file.read(HELD_OUT_BYTES).decode(errors="ignore")
    file.seek(cut)
    file.truncate()
    return n_trained, [text for text in rest.split(END_OF_TEXT) if text]


def _chunks(file: IO[bytes]) -> Iterator[str]:
    """The text in chunks that may be tokenized separately."""
    file.seek(0)
    blocks = iter(lambda: file.read(CHUNK_BYTES), b"")
    for chunk in safe_chunks(blocks, cut_rule(GPT2_PATTERN), CHUNK_BYTES):
        yield from chunk.decode().split(END_OF_TEXT)


def _learn(file: IO[bytes], vocab_size: int, tokenizers: Any) -> tuple[str, list[tuple[str, str]]]:
    """The name of the library, and the merges in the order of their ranks."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    try:
        import gigatoken
    except ImportError:
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = byte_level(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=byte_level.alphabet(), show_progress=False
        )
        model.train_from_iterator(_chunks(file), trainer)
        merges = json.loads(model.to_str())["model"]["merges"]
        return "tokenizers", [tuple(merge) for merge in merges]
    with _no_output():
        _, learned = gigatoken.train_bpe(f"/dev/fd/{file.fileno()}", vocab_size, [END_OF_TEXT])
    learned = learned[: _n_counted(learned, gigatoken.pretokenizer, file)]
    return "gigatoken", [(_visible(left), _visible(right)) for left, right in learned]


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Discard what a library prints without Python: gigatoken prints its progress."""
    sys.stdout.flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with open(os.devnull, "wb") as null:
        for descriptor in kept:
            os.dup2(null.fileno(), descriptor)
    try:
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def _n_counted(merges: list[tuple[bytes, bytes]], words_of: Any, file: IO[bytes]) -> int:
    """How many merges are of pairs that the text has; gigatoken continues with others.

    No pair is left once every word is a token.
    """
    numbers = {left + right: n for n, (left, right) in reversed([*enumerate(merges, 1)])}
    last = 0
    for chunk in _chunks(file):
        for word in words_of(chunk.encode()):
            if len(word) > 1:
                if word not in numbers:
                    return len(merges)
                last = max(last, numbers[word])
    return last


def _visible(token: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in token)


def _as_json(merges: list[tuple[str, str]]) -> bytes:
    """The contents of a tokenizer.json; the ids are those of GPT-2: bytes, merges, `<|endoftext|>`."""
    tokens = [*sorted(CHARACTERS.values()), *map("".join, merges), END_OF_TEXT]
    vocab = {token: id for id, token in enumerate(dict.fromkeys(tokens))}
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    byte_level = {"type": "ByteLevel", **flags}
    special = {
        "id": vocab[END_OF_TEXT], "content": END_OF_TEXT, "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
        "merges": [" ".join(merge) for merge in merges],
    }  # fmt: skip
    value = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": model,
    }  # fmt: skip
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
