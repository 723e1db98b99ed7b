"""Turn raw text into batches for training GPT models, as a PyTorch Lightning DataModule.

    text → documents → tokens → windows → batches         GPTDataModule
    batches → token embedding + position embedding        EmbeddingStem
    embeddings → transformer blocks → logits              GPT

Public names are imported on first use (PEP 562). A process that only tokenizes does not load torch or
lightning.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_gptdata.datamodule import GPTDataModule
    from lit_gptdata.model.documents import cu_seqlens, document_ids, document_positions
    from lit_gptdata.model.gpt import GPT
    from lit_gptdata.model.stem import EmbeddingStem
    from lit_gptdata.tokens.options import Source
    from lit_gptdata.tokens.store import TokenStore
    from lit_gptdata.tokens.tokenizer import Tokenizer
    from lit_gptdata.training.budget import TokenBudget
    from lit_gptdata.training.lightning_cli import GPTCLI
    from lit_gptdata.training.scores import Scores
    from lit_gptdata.training.throughput import Throughput
    from lit_gptdata.windows.dataset import GPTDatasetV1, WindowDataset
    from lit_gptdata.windows.loader import create_dataloader, create_dataloader_v1

__version__ = "0.1.0"

_MODULE_OF = {
    "GPT": "lit_gptdata.model.gpt",
    "GPTCLI": "lit_gptdata.training.lightning_cli",
    "EmbeddingStem": "lit_gptdata.model.stem",
    "GPTDataModule": "lit_gptdata.datamodule",
    "GPTDatasetV1": "lit_gptdata.windows.dataset",
    "Scores": "lit_gptdata.training.scores",
    "Source": "lit_gptdata.tokens.options",
    "Throughput": "lit_gptdata.training.throughput",
    "TokenBudget": "lit_gptdata.training.budget",
    "TokenStore": "lit_gptdata.tokens.store",
    "Tokenizer": "lit_gptdata.tokens.tokenizer",
    "WindowDataset": "lit_gptdata.windows.dataset",
    "create_dataloader": "lit_gptdata.windows.loader",
    "create_dataloader_v1": "lit_gptdata.windows.loader",
    "cu_seqlens": "lit_gptdata.model.documents",
    "document_ids": "lit_gptdata.model.documents",
    "document_positions": "lit_gptdata.model.documents",
}

__all__ = [
    "GPT", "GPTCLI", "EmbeddingStem", "GPTDataModule", "GPTDatasetV1", "Scores", "Source",
    "Throughput", "TokenBudget", "TokenStore", "Tokenizer", "WindowDataset", "create_dataloader",
    "create_dataloader_v1", "cu_seqlens", "document_ids", "document_positions",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
