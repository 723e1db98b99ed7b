"""A training run bounded in tokens, so that runs of other lengths and batch sizes can be compared."""

from __future__ import annotations

from typing import Any

import lightning as L

from lit_gptdata._checks import check_at_least
from lit_gptdata.datamodule import GPTDataModule
from lit_gptdata.windows.steps import Steps


class TokenBudget(L.Callback):
    """Trains on `max_tokens` tokens, over all ranks, and logs `tokens`, how many there were so far.

    The optimizer steps follow from batch size, window length, gradient accumulation and ranks; what
    does not fill a step is left out. Give Trainer(max_epochs=-1) too; a max_steps of one's own wins.
    `val_every_tokens`: validate so often, to a batch, instead of Trainer(val_check_interval=).
    None: what the Trainer says.

    Raises ValueError for fewer tokens than a step takes, TypeError without a GPTDataModule.
    """

    def __init__(self, max_tokens: int | None = None, val_every_tokens: int | None = None) -> None:
        for name, value in {"max_tokens": max_tokens, "val_every_tokens": val_every_tokens}.items():
            if value is not None:
                check_at_least(name, value, 1, "a number of tokens")
        self.max_tokens = max_tokens
        self.val_every_tokens = val_every_tokens
        self.tokens = 0
        self._per_step = 0
        self._bounds = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set late
        if stage != "fit":
            return
        if not isinstance(data, GPTDataModule):
            if self.max_tokens is None and self.val_every_tokens is None:
                return
            raise TypeError(
                f"TokenBudget counts the windows of a GPTDataModule, and the Trainer has {data!r}: fit "
                "with datamodule=GPTDataModule(…), or bound the run with Trainer(max_steps=)"
            )
        self._per_step = _tokens_per_batch(data) * trainer.accumulate_grad_batches
        if self.max_tokens is not None and (self._bounds or trainer.max_steps == -1):
            self._bounds = True
            self._bound(trainer, data, self.max_tokens)
        if self.val_every_tokens is not None:
            batches = max(1, round(self.val_every_tokens / _tokens_per_batch(data)))
            trainer.val_check_interval = batches
            trainer.check_val_every_n_epoch = None  # batches count across epochs

    def _bound(self, trainer: L.Trainer, data: GPTDataModule, tokens: int, done: int = 0) -> None:
        """End after `tokens` more tokens than at optimizer step `done`."""
        steps, length = data.train_steps, data.hparams["max_length"]
        batches = steps.limited(trainer.limit_train_batches)
        if not batches:  # which Lightning says itself
            return
        more = steps_for(max(0, tokens) // length, steps, batches, trainer.accumulate_grad_batches)
        if not done and not more:
            raise ValueError(
                f"max_tokens={tokens:,} is less than one step of {self._per_step:,} tokens (batch_size "
                "× max_length × ranks × accumulate_grad_batches): raise it, or take smaller batches"
            )
        trainer.fit_loop.epoch_loop.max_steps = done + more

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        # with other steps than before, what is left of the budget makes another number of them
        if (
            self._bounds
            and self.max_tokens is not None
            and state
            and state["per_step"] != self._per_step
        ):
            data = trainer.datamodule  # type: ignore[attr-defined]  # set late
            self._bound(trainer, data, self.max_tokens - state["tokens"], checkpoint["global_step"])

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.tokens += batch[0].numel() * trainer.world_size
        pl_module.log("tokens", float(self.tokens), on_step=True, on_epoch=False)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("tokens", float(self.tokens))

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "per_step": self._per_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = state_dict["tokens"]


def _tokens_per_batch(data: GPTDataModule) -> int:
    """Tokens of a full batch, over all ranks."""
    length: int = data.hparams["max_length"]
    return data.train_steps.width * length


def steps_for(windows: int, steps: Steps, limit: int, accumulate: int) -> int:
    """How many optimizer steps see at most `windows` windows, over all ranks.

    `limit`: batches of an epoch; `accumulate`: batches to a step, fewer in the last of an epoch.
    """
    a_step, an_epoch = steps.width * accumulate, min(limit * steps.width, steps.n)
    steps_of_epoch = -(-limit // accumulate)
    epochs, rest = divmod(windows, an_epoch)
    return epochs * steps_of_epoch + min(rest // a_step, steps_of_epoch - 1)
