"""A model of sentencepiece, such as Llama 2's or Mistral's tokenizer.model, as a Reference."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_gptdata.text.formats import needs
from lit_gptdata.tokens.libraries.hugging_face import piece_bytes
from lit_gptdata.tokens.libraries.reference import Reference, digest_of


class SentencePieceReference(Reference):
    """A `sentencepiece.SentencePieceProcessor`, which reads special strings in a text as text."""

    library = "sentencepiece"

    def __init__(self, proto: bytes) -> None:
        """`proto`: the contents of the model's file. Raises ValueError, ImportError."""
        sentencepiece = needs("sentencepiece", "tokenizers", "a sentencepiece model")
        model = self.model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise ValueError(f"sentencepiece cannot read it: {error}") from None
        self._proto = proto
        self.vocab_size: int = model.GetPieceSize()
        control = [id for id in range(self.vocab_size) if model.IsControl(id) or model.IsUnknown(id)]
        self.special_ids: dict[str, int] = {model.IdToPiece(id): id for id in control}
        self.ends = [model.IdToPiece(model.eos_id())] if model.eos_id() >= 0 else []
        self.begins = [model.IdToPiece(model.bos_id())] if model.bos_id() >= 0 else []
        self.rule = json.dumps(_specs(proto), sort_keys=True)

    @functools.cached_property
    def digest(self) -> str:
        content = hashlib.sha256(self._proto).hexdigest()
        return digest_of([content, [*self.ends], [*self.begins]])

    def encode(self, text: str, allowed: frozenset[str]) -> np.ndarray:
        return np.array(self.model.EncodeAsIds(text), np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.model.DecodeIds([int(i) for i in ids]))

    def token_bytes(self) -> list[bytes]:
        special = set(self.special_ids.values())
        pieces = (self.model.IdToPiece(id) for id in range(self.vocab_size))
        return [b"" if id in special else piece_bytes(piece) for id, piece in enumerate(pieces)]

    def content(self) -> bytes:
        return self._proto

    def to_files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._proto}


def _specs(proto: bytes) -> dict[str, Any]:
    """The parts of the model's file that decide how a text is split."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto.FromString(proto)  # type: ignore[attr-defined]
    charsmap = model.normalizer_spec.precompiled_charsmap
    trainer = ("model_type", "byte_fallback", "treat_whitespace_as_suffix")
    normalizer = ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces")
    return {
        "charsmap": hashlib.sha256(charsmap).hexdigest(),
        **{name: getattr(model.trainer_spec, name) for name in trainer},
        **{name: getattr(model.normalizer_spec, name) for name in normalizer},
    }
