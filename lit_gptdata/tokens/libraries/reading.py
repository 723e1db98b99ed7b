"""What a user calls a tokenizer, as an `Origin`: a name, a place that a checkpoint keeps, a Reference.

read_tokenizer("gpt2") | read_tokenizer("tokenizer.json") | read_tokenizer("hf://org/name") | …
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_gptdata._checks import plain
from lit_gptdata._io import working_folder, write_whole
from lit_gptdata.tokens.libraries.hub import check_hub_name, find_on_hub
from lit_gptdata.tokens.libraries.reference import Reference
from lit_gptdata.tokens.libraries.tiktoken_encoding import (
    ENCODING_FILE,
    TiktokenReference,
    digest_of_encoding,
    encoding_from_file,
    problem_of,
)
from lit_gptdata.tokens.libraries.vocabularies import encoding_from_ranks, load_encoding

ALLOWED = (
    "the name of a tiktoken encoding, such as 'gpt2', a tokenizer.json, a folder with one, a .tiktoken "
    "or tokenizer.model file, hf://org/name, a tiktoken.Encoding, a tokenizers.Tokenizer or a fast "
    "tokenizer of transformers"
)


class Origin:
    """Where a tokenizer comes from. `is_name`: its name alone decides the ids."""

    def __init__(
        self, name: str, location: str, reference: Reference | None = None, *, is_name: bool = False,
        is_object: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        """In manifests and messages; 8 hex digits of the contents of a file or an object end it."""
        self.location = location
        """In hyperparameters: a name, a path, or an address on the hub."""
        self.is_name, self._is_object = is_name, is_object
        self._reference = reference

    @property
    def reference(self) -> Reference:
        """The tokenizer, loaded on first use; raises OSError, ValueError, ImportError."""
        if self._reference is None:
            self._reference = self._load()
        return self._reference

    def _load(self) -> Reference:
        return TiktokenReference(load_encoding(self.name))

    def keep(self) -> None:
        """Write an object to `location`, where a checkpoint and other processes find it."""
        folder = Path(self.location)
        if self._is_object and not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.reference.to_files().items() if self._is_object else ():
            if not (folder / name).is_file():
                write_whole(folder / name, content)

    def __getstate__(self) -> dict[str, Any]:
        # the vocabulary of a name is loaded again, instead of a copy of some MB
        return vars(self) | ({"_reference": None} if self.is_name else {})


class HubOrigin(Origin):
    """A tokenizer on the Hugging Face Hub, downloaded on first use into `folder`."""

    def __init__(self, name: str, folder: Path) -> None:
        check_hub_name(name)
        super().__init__(name, name)
        self._folder = folder

    def _load(self) -> Reference:
        path, self.location = find_on_hub(self.name, self._folder)
        self.name = self.location
        return read_file(path)


def read_tokenizer(value: Any, data_dir: Path) -> Origin:
    """Find the tokenizer that a user gave; a file is read at once, a name and the hub on first use.

    `data_dir`: where objects are kept, and files of the hub. Raises TypeError, ValueError,
    FileNotFoundError, ImportError.
    """
    if isinstance(value, (str, os.PathLike)):
        return _read_text(plain(value), data_dir)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    packages = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    if "tiktoken" in packages and hasattr(value, "_mergeable_ranks"):
        return _read_encoding(value, data_dir)
    if "transformers" in packages and not hasattr(value, "backend_tokenizer"):
        raise TypeError(f"{kind} has no backend of the package tokenizers: give its tokenizer.json")
    if packages & {"tokenizers", "transformers"}:
        from lit_gptdata.tokens.libraries.hugging_face import HuggingFaceReference

        tokens = {name: getattr(value, name, None) for name in ("eos_token", "bos_token")}
        text = getattr(value, "backend_tokenizer", value).to_str()
        reference = HuggingFaceReference(text, tokens)
        label = Path(getattr(value, "name_or_path", "") or "tokenizer").name
        return _kept(label, reference, data_dir)
    raise TypeError(f"tokenizer must be {ALLOWED}, got a {kind}")


def _read_text(text: str, data_dir: Path) -> Origin:
    import tiktoken

    names = tiktoken.list_encoding_names()
    if text in names:
        return Origin(text, text, is_name=True)
    if text.startswith("hf://"):
        return HubOrigin(text, data_dir / "tokenizers")
    path = working_folder() / Path(text).expanduser()
    if not path.exists() and (kept := data_dir / "tokenizers" / path.name).is_dir():
        path = kept  # the data_dir of a checkpoint may have moved
    if text and path.exists():
        reference = read_file(path)
        return Origin(_with_digest(path.stem, reference), text, reference)
    if os.sep in text or path.suffix in (".json", ".tiktoken", ".model"):
        raise FileNotFoundError(f"tokenizer={text!r}: there is no such file or folder: {path}")
    raise ValueError(_unknown_name(text, names))


def read_file(path: Path) -> Reference:
    """The tokenizer of a file, or of a folder with one; its content decides the format."""
    config: Mapping[str, Any] = {}
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.model", ENCODING_FILE)
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"the folder {path} has neither tokenizer.json nor tokenizer.model")
        path = found[0]
    if (settings := folder / "tokenizer_config.json").is_file():
        config = json.loads(settings.read_bytes())
    content = path.read_bytes()
    try:
        return _read_content(content, config)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"tokenizer {path} cannot be read: {error}") from error


def _read_content(content: bytes, config: Mapping[str, Any]) -> Reference:
    if content.lstrip()[:1] == b"{":
        values = json.loads(content)
        if "mergeable_ranks" in values:
            return TiktokenReference(_checked(encoding_from_file(values)))
        from lit_gptdata.tokens.libraries.hugging_face import HuggingFaceReference

        return HuggingFaceReference(content.decode(), config)
    if content[:1] == b"\n":  # the first field of a protobuf message
        from lit_gptdata.tokens.libraries.sentencepiece_model import SentencePieceReference

        return SentencePieceReference(content)
    return TiktokenReference(encoding_from_ranks(content))


def _read_encoding(encoding: Any, data_dir: Path) -> Origin:
    """The origin of a `tiktoken.Encoding`; one that tiktoken knows is its name."""
    import tiktoken

    name = encoding.name
    known = load_encoding("gpt2") if name == "gpt2" else tiktoken.registry.ENCODINGS.get(name)
    if known is encoding or (known and digest_of_encoding(known) == digest_of_encoding(encoding)):
        return Origin(name, name, is_name=True)
    return _kept(name, TiktokenReference(_checked(encoding)), data_dir)


def _checked(encoding: Any) -> Any:
    if problem := problem_of(encoding):
        raise ValueError(f"encoding {encoding.name!r} {problem}")
    return encoding


def _kept(label: str, reference: Reference, data_dir: Path) -> Origin:
    name = _with_digest(label, reference)
    return Origin(name, str(data_dir / "tokenizers" / name), reference, is_object=True)


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
