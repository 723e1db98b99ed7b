"""GPTDataModule for LitGPT: `litgpt pretrain … --data lit_gptdata.interop.litgpt.LitGPTData`."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

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
        self.options = options  # a line of its own, in which LitGPT's command line finds the options

    def connect(
        self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any
    ) -> None:
        """Make `module`. Raises ValueError if `tokenizer`, LitGPT's, is missing or not ours."""
        self.module = GPTDataModule(
            tokenizer=_file_of(tokenizer) if self.tokenizer is None else self.tokenizer,
            max_length=max_seq_length,  # type: ignore[arg-type]  # None is refused there
            stride=max_seq_length if self.stride is None else self.stride,  # type: ignore[arg-type]
            batch_size=batch_size,
            drop_padded=True,  # LitGPT takes targets from the ids, so -100 cannot mark padding
            **self.options,
        )
        theirs = _n_ids(tokenizer)
        if theirs is not None and theirs != self.module.vocab_size:
            ours = f"data.tokenizer={self.tokenizer!r} has {self.module.vocab_size:,} ids"
            problem = f"{ours}, but the tokenizer in LitGPT's tokenizer_dir has {theirs:,}"
            raise ValueError(f"{problem}: leave one of the two options out")

    def prepare_data(self) -> None:
        self.module.prepare_data()

    def setup(self, stage: str = "") -> None:
        self.module.setup()

    def train_dataloader(self) -> DataLoader[Any]:
        return _as_ids(self.module.train_dataloader())

    def val_dataloader(self) -> DataLoader[Any]:
        """All val sets in one loader, without the windows that would need padding."""
        return _as_ids(self.module.val_dataloader())

    def __repr__(self) -> str:
        return repr(self.module) if hasattr(self, "module") else f"LitGPTData({self.options})"


def _as_ids(loader: Any) -> DataLoader[Any]:
    if not len(loader):
        raise ValueError("LitGPT needs a val split of at least one window: raise data.val_fraction")
    loader.is_compact = True  # LitGPT splits the ids on its device
    return loader  # type: ignore[no-any-return]


def _file_of(tokenizer: Any) -> Any:
    """What GPTDataModule takes for LitGPT's tokenizer."""
    if tokenizer is None:
        raise ValueError("LitGPT gave no tokenizer: set tokenizer_dir, or data.tokenizer, such as gpt2")
    if tokenizer.backend != "huggingface":
        file = "data.tokenizer=tokenizer_dir/tokenizer.model"
        raise ValueError(f"LitGPT's tokenizer is of {tokenizer.backend}: name its file, {file}")
    return tokenizer.processor


def _n_ids(tokenizer: Any) -> int | None:
    if tokenizer is None:
        return None
    is_hugging_face = tokenizer.backend == "huggingface"
    n: int = tokenizer.processor.get_vocab_size() if is_hugging_face else tokenizer.vocab_size
    return n
