"""GPTDataModule for LitGPT: `litgpt pretrain … --data lit_gptdata.interop.litgpt.LitGPTData`."""

from __future__ import annotations

from typing import Any

from lit_gptdata.datamodule import GPTDataModule

try:
    from litgpt.data import DataModule
except ImportError as error:
    raise ImportError("LitGPTData needs litgpt: pip install 'lit-gptdata[integrations]'") from error


class LitGPTData(DataModule):  # type: ignore[misc]  # mypy does not read litgpt
    """Batches for LitGPT's `pretrain`: ids (micro_batch_size, max_seq_length + 1), uint16 or uint32.

    LitGPT decides the length and the batch size. Its checkpoints keep the loader's position, so its
    `resume` continues with the next batch. After `connect`, `module` is the GPTDataModule.

    Args:
        tokenizer: as in GPTDataModule; None: the tokenizer.json in LitGPT's `tokenizer_dir`
        stride: tokens between the starts of two train windows; None: `max_seq_length`
        options: the other options of GPTDataModule
    """

    module: GPTDataModule

    def __init__(self, tokenizer: Any = None, stride: int | None = None, **options: Any) -> None:
        super().__init__()
        self.tokenizer, self.stride = tokenizer, stride
        self.options = options  # LitGPT's command line follows this name to the options it has

    def connect(
        self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: Any = None, **_: Any
    ) -> None:
        """Make `module`. Raises ValueError if LitGPT's `tokenizer` is missing or differs from ours."""
        if (kind := self.options.get("windows", "sliding")) != "sliding":
            raise ValueError(f"LitGPT cannot train on padding, which windows={kind} has: leave it out")
        is_json = tokenizer is not None and tokenizer.backend == "huggingface"
        if self.tokenizer is None and not is_json:
            advice = "set data.tokenizer, such as gpt2 or …/tokenizer.model"
            raise ValueError(f"LitGPT's tokenizer_dir has no tokenizer.json, or is not set: {advice}")
        self.module = GPTDataModule(
            tokenizer=tokenizer.processor if self.tokenizer is None else self.tokenizer,
            max_length=max_seq_length, stride=max_seq_length if self.stride is None else self.stride,
            batch_size=batch_size, drop_padded=True,  # LitGPT's targets are ids, which cannot be -100
            **self.options,
        )  # fmt: skip
        theirs = getattr(tokenizer, "vocab_size", None)
        theirs = tokenizer.processor.get_vocab_size() if is_json else theirs  # with added tokens
        if theirs not in (None, ours := self.module.vocab_size):
            problem = f"data.tokenizer={self.tokenizer!r} has {ours:,} ids, but LitGPT's has {theirs:,}"
            raise ValueError(f"{problem}: leave out data.tokenizer or tokenizer_dir")

    def prepare_data(self) -> None:
        self.module.prepare_data()

    def setup(self, stage: str = "") -> None:
        self.module.setup()

    def train_dataloader(self) -> Any:
        loader: Any = self.module.train_dataloader()
        loader.is_compact = True  # LitGPT splits the ids itself
        return loader

    def val_dataloader(self) -> Any:
        """All val sets in one loader, without windows that need padding."""
        loader: Any = self.module.val_dataloader()
        if not loader:
            raise ValueError("LitGPT needs a val split of at least one window: raise data.val_fraction")
        loader.is_compact = True
        return loader

    def __repr__(self) -> str:
        return repr(self.module) if hasattr(self, "module") else f"LitGPTData({self.options})"

    __str__ = __repr__
