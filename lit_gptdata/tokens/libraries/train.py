"""Train a byte-level BPE tokenizer on texts.

    documents  ──▶  a temporary file  ──▶  merges (gigatoken, or tokenizers)  ──▶  tokenizer.json

gigatoken and tokenizers learn the same merges, so the file does not depend on the library.
"""

import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lit_gptdata._checks import check_integer
from lit_gptdata._io import write_whole
from lit_gptdata.text.document import Document
from lit_gptdata.text.formats import needs
from lit_gptdata.tokens.chunks import CLASSES_DIFFER, GPT2_PATTERN, RULES, safe_chunks
from lit_gptdata.tokens.gigatoken import CHARACTERS, output_hidden
from lit_gptdata.tokens.libraries.hugging_face import BYTES
from lit_gptdata.tokens.libraries.reference import END_OF_TEXT, MAX_VOCAB
from lit_gptdata.tokens.shards import writing

MIN_VOCAB = 257  # the bytes and <|endoftext|>
CHUNK_BYTES = 1 << 12  # of text; the train part ends at the start of a chunk
HELD_OUT_BYTES = 1 << 20  # of each corpus, to measure bytes per token
CUT_SLACK = 0.01  # a split may move to a document boundary within 1 % of the corpus (windows/split.py)

# The libraries disagree whether these characters are letters. They are left out, so both learn the same.
NEW = re.compile("[" + "".join(f"{chr(a)}-{chr(b)}" for a, b in CLASSES_DIFFER) + "]+")


def train_tokenizer(
    path: Path, vocab_size: int, texts: Iterable[tuple[Iterable[Document], float]]
) -> tuple[int, str, list[str]]:
    """Train on the first part of each corpus, given as a fraction of its bytes; write a tokenizer.json.

    `vocab_size` counts the 256 bytes and `<|endoftext|>`, which has the last id. No token spans two
    documents. The text is copied to a nameless file in the folder of `path`. Returns the bytes of the
    text that trained, the library, and the start of the text that did not train, by document. Raises
    TypeError or ValueError for a wrong size and a text that is too short, ImportError, OSError.
    """
    check_integer("vocab_size", vocab_size, MIN_VOCAB, f"256 bytes, the merges and {END_OF_TEXT}")
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"vocab_size must be an integer ≤ {MAX_VOCAB:,}, got {vocab_size:,}")
    tokenizers = needs("tokenizers", "tokenizers", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), tempfile.TemporaryFile(dir=path.parent) as file:
        copied = [_copy(corpus, part, file) for corpus, part in texts]
        file.flush()
        if not (n_bytes := sum(n for n, _ in copied)):
            problem = "no text is left to train on before the first space or line end to cut at"
            raise ValueError(f"{problem}: give more text, or lower val_fraction and test_fraction")
        library, model = _train(file, vocab_size, tokenizers)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([END_OF_TEXT])
    if (size := model.get_vocab_size()) < vocab_size:
        problem = f"the text yields {size - MIN_VOCAB:,} merges, so the tokenizer has {size:,} tokens"
        warnings.warn(f"{problem}, not vocab_size={vocab_size:,}: give more text", stacklevel=2)
    write_whole(path, model.to_str(pretty=True).encode())
    return n_bytes, library, [text for _, rest in copied for text in rest]


def _copy(corpus: Iterable[Document], part: float, file: IO[bytes]) -> tuple[int, list[str]]:
    """Append the first `part` of a corpus; returns its bytes, and the start of the rest by document."""
    n_bytes, starts = 0, [(0, file.tell())]  # bytes of text → position in the file, every 0.1 %
    for document in corpus:
        file.write(b"" if document.continues else END_OF_TEXT.encode())
        for chunk in safe_chunks(document.chunks, RULES[GPT2_PATTERN], CHUNK_BYTES):
            if n_bytes >= 1.001 * starts[-1][0]:
                starts.append((n_bytes, file.tell()))
            n_bytes += len(chunk)
            file.write(chunk if chunk.isascii() else NEW.sub(END_OF_TEXT, chunk.decode()).encode())
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
    for chunk in safe_chunks(blocks, RULES[GPT2_PATTERN], CHUNK_BYTES):
        yield from chunk.decode().split(END_OF_TEXT)


def _train(file: IO[bytes], vocab_size: int, tokenizers: Any) -> tuple[str, Any]:
    """The name of the library, and a `tokenizers.Tokenizer` whose ids are GPT-2's bytes, then merges."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    try:
        import gigatoken
    except ImportError:
        options = {"initial_alphabet": [*BYTES], "show_progress": False}
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size - 1, **options)
        model.train_from_iterator(_chunks(file), trainer)
        return "tokenizers", model
    sys.stdout.flush()
    with output_hidden(1), output_hidden(2):  # gigatoken prints its progress
        _, pairs = gigatoken.train_bpe(f"/dev/fd/{file.fileno()}", vocab_size, [END_OF_TEXT])
    pairs = pairs[: _n_counted(pairs, gigatoken.pretokenizer, file)]
    merges = [tuple(token.decode("latin-1").translate(CHARACTERS) for token in pair) for pair in pairs]
    tokens = [*sorted(BYTES), *map("".join, merges)]
    model.model = tokenizers.models.BPE({token: id for id, token in enumerate(tokens)}, merges)
    return "gigatoken", model


def _n_counted(pairs: list[tuple[bytes, bytes]], words_of: Any, file: IO[bytes]) -> int:
    """How many pairs the text has; gigatoken continues with others once every word is one token."""
    numbers = {left + right: n for n, (left, right) in reversed([*enumerate(pairs, 1)])}
    last = 0
    for chunk in _chunks(file):
        for word in words_of(chunk.encode()):
            if len(word) > 1 and word not in numbers:
                return len(pairs)
            last = max(last, numbers.get(word, 0))
    return last
