"""Find the tokenizer that a user named: its `Reference`, and the name and place for checkpoints.

read_tokenizer("gpt2") | read_tokenizer("tokenizer.json") | read_tokenizer("hf://org/name") | …
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_gptdata._checks import plain
from lit_gptdata._io import working_folder, write_whole
from lit_gptdata.tokens.libraries.hub import CONFIG, MODELS, check_hub_name, find_on_hub
from lit_gptdata.tokens.libraries.reference import MAX_VOCAB, Reference
from lit_gptdata.tokens.libraries.tiktoken_encoding import (
    ENCODING_FILE,
    TiktokenReference,
    checked,
    encoding_from_file,
)
from lit_gptdata.tokens.libraries.vocabularies import encoding_from_ranks, load_encoding

ALLOWED = (
    "the name of a tiktoken encoding, such as 'gpt2', a tokenizer.json, a folder with one, a .tiktoken "
    "or tokenizer.model file, hf://org/name, a tiktoken.Encoding, a tokenizers.Tokenizer or a fast "
    "tokenizer of transformers"
)


@dataclass(eq=False)
class NamedTokenizer:
    """A library's tokenizer, with the name and the place by which it is found again."""

    kind: Literal["name", "file", "object", "hub"]
    """A name alone decides the ids. A name and the hub are loaded on first use."""
    name: str
    """In manifests and messages; 8 hex digits of the contents of a file or an object end it."""
    data_dir: Path
    """For files of the hub and objects."""
    loaded: Reference | None = None
    path: str = ""
    """Of a file, as the user gave it."""

    @classmethod
    def of_object(cls, label: str, reference: Reference, data_dir: Path) -> NamedTokenizer:
        """An object, which `keep` writes into a folder below `data_dir`."""
        name = _with_digest(re.sub(r"[^\w.-]", "_", label), reference)
        return cls("object", name, data_dir, reference)

    @property
    def location(self) -> str:
        """In hyperparameters: the name, or the path with 8 hex digits of the contents."""
        if self.kind in ("name", "hub"):
            return self.name
        return f"{self.path or self._folder / self.name}#{self.reference.digest[:8]}"

    @property
    def _folder(self) -> Path:
        return self.data_dir / "tokenizers"

    @property
    def reference(self) -> Reference:
        """The tokenizer, loaded on first use; raises OSError, ValueError, ImportError."""
        if self.loaded is None and self.kind == "hub":
            path, self.name = find_on_hub(self.name, self._folder)
            self.loaded = read_file(path)
        elif self.loaded is None:
            self.loaded = TiktokenReference(load_encoding(self.name))
        return self.loaded

    def keep(self) -> None:
        """Write an object to `location`, where a checkpoint and other processes find it."""
        files = self.reference.to_files() if self.kind == "object" else {}
        for name, content in files.items():
            path = self._folder / self.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                write_whole(path, content)

    def __getstate__(self) -> dict[str, Any]:
        # the vocabulary of a name is loaded again, instead of a copy of some MB
        return vars(self) | ({"loaded": None} if self.kind == "name" else {})


def read_tokenizer(value: Any, data_dir: Path) -> NamedTokenizer:
    """Find the tokenizer that a user gave; a file is read at once, a name and the hub on first use.

    `data_dir`: where objects are kept, and files of the hub. Raises TypeError, ValueError,
    FileNotFoundError, ImportError.
    """
    if isinstance(value, (str, os.PathLike)):
        return _read_text(plain(value), data_dir)
    if hasattr(value, "_mergeable_ranks"):
        return _read_encoding(value, data_dir)
    backend = getattr(value, "backend_tokenizer", value)  # in transformers
    if hasattr(backend, "to_str"):
        from lit_gptdata.tokens.libraries.hugging_face import HuggingFaceReference

        try:
            text = backend.to_str()
        except Exception as error:  # the package raises no other class
            raise ValueError(f"the tokenizer has no tokenizer.json: {error}") from None
        reference = HuggingFaceReference(text)
        names = ("eos_token", "bos_token", "add_bos_token")
        reference.name_specials({name: getattr(value, name, None) for name in names})
        label = Path(getattr(value, "name_or_path", "") or "tokenizer").name
        return NamedTokenizer.of_object(label, reference, data_dir)
    raise TypeError(f"tokenizer must be {ALLOWED}, got {value!r} ({type(value).__name__})")


def _read_text(text: str, data_dir: Path) -> NamedTokenizer:
    import tiktoken

    names = tiktoken.list_encoding_names()
    if text in names:
        return NamedTokenizer("name", text, data_dir)
    if text.startswith("hf://"):
        check_hub_name(text)
        return NamedTokenizer("hub", text, data_dir)
    has_digest = re.fullmatch("(.*)#([0-9a-f]{8})", text)  # in a checkpoint
    name, digest = has_digest.groups() if has_digest else (text, "")
    path = working_folder() / os.path.expanduser(name)
    if not path.exists() and (kept := data_dir / "tokenizers" / path.name).exists():
        path = kept  # the data_dir of a checkpoint may have moved
    if name and path.exists():
        reference = read_file(path)
        found = reference.digest[:8]
        if digest not in ("", found):
            problem = f"{path} has other contents than it had: its digest was {digest}"
            raise ValueError(f"{problem}, now {found}. Give the file that it was")
        return NamedTokenizer("file", _with_digest(path.stem, reference), data_dir, reference, name)
    if "/" in name or path.suffix in (".json", ".tiktoken", ".model"):
        hub = f", or for the hub hf://{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise FileNotFoundError(f"tokenizer={name!r}: there is no such file or folder: {path}{hub}")
    raise ValueError(_unknown_name(text, names))


def read_file(path: Path) -> Reference:
    """The tokenizer of a file, or of a folder with one; its content decides the format."""
    if path.is_dir():
        found = [path / name for name in (*MODELS, ENCODING_FILE) if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"the folder {path} has neither {' nor '.join(MODELS)}")
        path = found[0]
    try:
        reference = _read_content(path.read_bytes())
        # beside a file of another name it may belong to another tokenizer
        config = path.with_name(CONFIG)
        if path.name in MODELS and config.is_file():
            path = config
            reference.name_specials(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"tokenizer {path} cannot be read: {error}") from error
    if reference.vocab_size > MAX_VOCAB:
        problem = f"has the id {reference.vocab_size - 1:,}, and a model has an embedding per id"
        raise ValueError(f"tokenizer {path} {problem}: use ids < {MAX_VOCAB:,}")
    return reference


def _read_content(content: bytes) -> Reference:
    if content.lstrip()[:1] == b"{":
        values = json.loads(content)
        if "mergeable_ranks" in values:
            return TiktokenReference(checked(encoding_from_file(values)))
        from lit_gptdata.tokens.libraries.hugging_face import HuggingFaceReference

        return HuggingFaceReference(content.decode())
    if content[:1] == b"\n":  # the first field of a protobuf message
        from lit_gptdata.tokens.libraries.sentencepiece_model import SentencePieceReference

        return SentencePieceReference(content)
    return TiktokenReference(encoding_from_ranks(content))


def _read_encoding(encoding: Any, data_dir: Path) -> NamedTokenizer:
    """A `tiktoken.Encoding`; one that tiktoken knows is its name."""
    import tiktoken

    name = encoding.name
    known = load_encoding("gpt2") if name == "gpt2" else tiktoken.registry.ENCODINGS.get(name)
    reference = TiktokenReference(encoding)
    if known is encoding or (known and TiktokenReference(known).digest == reference.digest):
        return NamedTokenizer("name", name, data_dir)
    checked(encoding)
    return NamedTokenizer.of_object(name, reference, data_dir)


def _with_digest(label: str, reference: Reference) -> str:
    digest = reference.digest[:8]
    return label if label.endswith(f"-{digest}") else f"{label}-{digest}"


def _unknown_name(name: str, names: list[str]) -> str:
    from tiktoken.model import encoding_name_for_model

    try:
        hint = f"the encoding of this model is {encoding_name_for_model(name)!r}, give that name"
    except KeyError:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        hint += f"tiktoken knows {sorted(names)}; 'gpt2' needs no network"
    return f"unknown encoding {name!r}: {hint}. For other tokenizers give {ALLOWED}"
