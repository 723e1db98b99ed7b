"""Text to token ids and back, with the tokenizer of any library.

    Tokenizer("gpt2").encode("hello world")  ->  [31373, 995]

The vocabulary of "gpt2" comes from an installed package, so it needs no network. The folder libraries/
has an adapter for each library, a `Reference`; this file has what they share.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from lit_gptdata._checks import check_choice, check_flag, check_string
from lit_gptdata.tokens.chunks import CutRule, cut_rule
from lit_gptdata.tokens.libraries.reading import NamedTokenizer, read_tokenizer
from lit_gptdata.tokens.libraries.reference import END_OF_TEXT

if TYPE_CHECKING:
    import tiktoken

SpecialTokens = Literal["allow", "text", "error"]

# The names that published tokenizers give to the end and the begin of a text.
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
BEGINS = ("<|begin_of_text|>", "<s>", "<bos>", "<｜begin▁of▁sentence｜>")


class Tokenizer(NamedTokenizer):
    """A tokenizer, a policy for special strings inside a text, and what stands between documents.

    `tokenizer`: the name of a tiktoken encoding, a tokenizer.json, a folder with one, a .tiktoken or
    tokenizer.model file, hf://org/name, a `tiktoken.Encoding`, a `tokenizers.Tokenizer`, a fast
    tokenizer of transformers, or another `Tokenizer`.
    `special_tokens`: what special strings in a text become. "allow": special tokens, if the library
    would do so: all of them in a tokenizer.json, only the end of a document with tiktoken, none with
    sentencepiece. "text": ordinary text. "error" refuses them.
    `end_of_document`: the special string between documents; None: the tokenizer's own. `bos`: whether
    each document starts with the tokenizer's BOS token. `data_dir`: for files of the hub and objects.

    Raises TypeError, ValueError, FileNotFoundError or ImportError for a tokenizer that cannot work,
    ValueError for an unknown policy.
    """

    def __init__(
        self,
        tokenizer: str | tiktoken.Encoding | Tokenizer | Any = "gpt2",
        special_tokens: SpecialTokens = "allow",
        end_of_document: str | None = None,
        bos: bool = False,
        data_dir: Path = Path("data"),
    ) -> None:
        policy: Any = check_choice("special_tokens", special_tokens, get_args(SpecialTokens))
        if end_of_document is not None:
            end_of_document = check_string("end_of_document", end_of_document)
        bos = check_flag("bos", bos)
        if isinstance(tokenizer, Tokenizer):
            policy = _either("special_tokens", policy, tokenizer.special_tokens, "allow")
            end_of_document = _either("end_of_document", end_of_document, tokenizer.own_end, None)
            bos = bos or tokenizer.bos
        self.special_tokens: SpecialTokens = policy
        self.own_end: str | None = end_of_document
        self.bos: bool = bos
        found = tokenizer if isinstance(tokenizer, Tokenizer) else read_tokenizer(tokenizer, data_dir)
        super().__init__(found.kind, found.name, data_dir, found.loaded, found.path)

    @property
    def encoding(self) -> tiktoken.Encoding:
        """The `tiktoken.Encoding`; AttributeError for a tokenizer of another library."""
        return self.reference.encoding  # type: ignore[attr-defined, no-any-return]

    @property
    def vocab_size(self) -> int:
        """One more than the largest possible id."""
        return self.reference.vocab_size

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Little-endian uint16 if every id fits into it, otherwise uint32."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @property
    def special_ids(self) -> dict[str, int]:
        """Every special string, with its id."""
        return self.reference.special_ids

    @functools.cached_property
    def allowed_special(self) -> dict[str, int]:
        """The special strings that become special tokens inside a text, with their ids."""
        end = self._end
        if self.special_tokens != "allow" or self.reference.library == "sentencepiece":
            if end is not None and self.special_ids[end] in self.reference.encode(end, frozenset()):
                problem = f"{self.name!r} reads {end!r} in a text as the special token"
                advice = f"Set special_tokens='allow' instead of {self.special_tokens!r}"
                raise ValueError(f"{problem}. {advice}")
            return {}
        if self.reference.library == "tokenizers":
            return self.special_ids
        return {} if end is None else {end: self.special_ids[end]}

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id; b"" for special and unused ones."""
        return self.reference.token_bytes()

    @property
    def is_lossless(self) -> bool:
        """Whether the bytes of the ids of a text always sum to the text's UTF-8 bytes."""
        return self.reference.is_lossless

    @functools.cached_property
    def adds_space(self) -> bool:
        """Whether the first id of a text has a space that is not in the text, as in sentencepiece."""
        if self.is_lossless:
            return False
        try:
            ids = self.reference.encode("a", frozenset())[:1].tolist()
        except ValueError:  # "a" is not in its vocabulary
            return False
        return any(self.token_bytes[id].startswith(b" ") for id in ids)

    @functools.cached_property
    def cut_rule(self) -> CutRule | None:
        """Where a text may be cut without a change of its ids. None: nowhere."""
        return cut_rule(self.reference)

    @functools.cached_property
    def _end(self) -> str | None:
        """The special string between documents; None if there is none, or several."""
        if self.own_end is not None:
            if self.own_end not in self.special_ids:
                problem = f"end_of_document={self.own_end!r} is not a special token of {self.name!r}"
                raise ValueError(f"{problem}: choose one of {_some(self.special_ids)}")
            return self.own_end
        return _only(self.reference.ends, ENDS, self.special_ids)

    @property
    def separator(self) -> int | None:
        """The id that separates documents; None if there is none, or several."""
        return None if self._end is None else self.special_ids[self._end]

    @property
    def end_of_document(self) -> int:
        """The id that separates documents; raises ValueError if there is none, or several."""
        if (id := self.separator) is None:
            problem = f"tokenizer {self.name!r} does not tell which token ends a document"
            advice = f"set end_of_document to one of {_some(self.special_ids)}, or "
            raise ValueError(f"{problem}: {advice * bool(self.special_ids)}give one document")
        return id

    @functools.cached_property
    def begin(self) -> str | None:
        """The tokenizer's BOS token, if it has one."""
        return _only(self.reference.begins, BEGINS, self.special_ids)

    @property
    def bos_id(self) -> int | None:
        """The id in front of each document, or None; raises ValueError if the tokenizer has none."""
        if not self.bos:
            return None
        if self.begin is None:
            raise ValueError(f"bos=True, but tokenizer {self.name!r} has no BOS token: set bos=False")
        return self.special_ids[self.begin]

    @property
    def separators(self) -> dict[str, int]:
        """The special tokens that a build inserts, with their ids."""
        inserted = (self._end, self.begin if self.bos else None)
        return {token: self.special_ids[token] for token in inserted if token is not None}

    @property
    def left_out(self) -> list[str]:
        """The special tokens that the library adds to each text, and a build does not insert."""
        return [token for token in self.reference.added if token not in self.separators]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines the ids: the tokenizer and the options.

        A tiktoken encoding counts by its name, without loading it: tiktoken checks its files.
        """
        named = self.kind == "name"
        identity = f"tiktoken:{self.name}" if named else f"content:{self.reference.digest}"
        identity += f"\n{self.special_tokens}"
        if not named or self.own_end is not None or self.bos:
            if self.reference.library != "tiktoken" or self._end not in (None, END_OF_TEXT):
                identity += f"\nend_of_document:{self._end}"
            identity += f"\nbos:{self.begin}" if self.bos else ""
        return hashlib.sha256(identity.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Text to ids; raises ValueError for a special string if the policy is "error"."""
        self.check_special(text)
        ids: list[int] = self.reference.encode(text, frozenset(self.allowed_special)).tolist()
        return ids

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
        return self.reference.decode(ids)

    def decode_each(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each id, those of its name for a special token."""
        names = {id: name.encode() for name, id in self.special_ids.items()}
        return [self.token_bytes[id] or names.get(id, b"") for id in ids]

    def __repr__(self) -> str:
        options = "" if self.special_tokens == "allow" else f", special_tokens={self.special_tokens!r}"
        options += "" if self.own_end is None else f", end_of_document={self.own_end!r}"
        options += ", bos=True" if self.bos else ""
        return f"Tokenizer({self.name!r}{options})"


def _either(option: str, value: Any, own: Any, default: Any) -> Any:
    """`value`, or what a given tokenizer has of its `own`; raises ValueError if the two differ."""
    if default not in (value, own) and value != own:
        raise ValueError(f"{option}={value!r} differs from {own!r} of the given tokenizer: give one")
    return own if value == default else value


def _only(own: Sequence[str], known: Sequence[str], special_ids: dict[str, int]) -> str | None:
    """The only special string that the tokenizer names, or else whose name is known."""
    found = special_ids.keys() & (own or known)
    return found.pop() if len(found) == 1 else None


def _some(special_ids: dict[str, int]) -> list[str]:
    return sorted(special_ids)[:12] + ["…"] * (len(special_ids) > 12)
