"""An LSTM language model, to show how train.py trains a model that is not GPT."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LSTM(L.LightningModule):
    """Maps token ids (B, T) to logits (B, T, V). `vocab_size` comes from the data."""

    def __init__(
        self, vocab_size: int, width: int = 96, n_layers: int = 1, learning_rate: float = 3e-3
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(vocab_size, width)
        self.rnn = nn.LSTM(width, width, n_layers, batch_first=True)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        features, _ = self.rnn(self.embedding(ids))  # (B, T, D)
        return F.linear(features, self.embedding.weight)  # (B, T, V)

    def losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch  # int64 (B, T) each; the target -100 is padding
        return F.cross_entropy(self(inputs).transpose(1, 2), targets, reduction="none")  # (B, T)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.losses(batch).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.losses(batch)  # the callback Scores logs the loss and bits per byte

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)
