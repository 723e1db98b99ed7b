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
        ours, n_ids = self.tokenizer, None
        if tokenizer is not None:
            library, loaded = tokenizer.backend, tokenizer.processor
            n_ids = loaded.get_vocab_size() if library == "huggingface" else tokenizer.vocab_size
            if ours is None and library != "huggingface":
                file = "data.tokenizer=…/tokenizer.model"
                raise ValueError(f"tokenizer_dir has a tokenizer of {library}: name its file, {file}")
            ours = loaded if ours is None else ours
        if ours is None:
            raise ValueError("there is no tokenizer: set tokenizer_dir, or data.tokenizer, such as gpt2")
        stride = max_seq_length if self.stride is None else self.stride
        self.module = GPTDataModule(
            tokenizer=ours, max_length=max_seq_length, stride=stride, batch_size=batch_size,
            drop_padded=True, **self.options,  # LitGPT's targets are ids, which cannot mark padding
        )  # fmt: skip
        if n_ids not in (None, self.module.vocab_size):
            problem = f"data.tokenizer={ours!r} has {self.module.vocab_size:,} ids"
            problem += f", and the tokenizer in LitGPT's tokenizer_dir has {n_ids:,}"
            raise ValueError(f"{problem}: leave one of the two options out")

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
