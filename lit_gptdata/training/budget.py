"""Limit a training run to a number of tokens, so that runs with different batches are comparable."""

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from lit_gptdata._checks import check_integer
from lit_gptdata._lightning import has_trained
from lit_gptdata.datamodule import GPTDataModule
from lit_gptdata.training.throughput import batches_done, count_tokens


class TokenBudget(L.Callback):
    """Stop training after `max_tokens` tokens, and log `tokens`, the number so far over all ranks.

    It sets the Trainer's max_steps, rounded down. With manual optimization, where a batch may take
    several steps, it stops the Trainer after a number of batches. If you pass Trainer(max_steps=…),
    that number is used and `max_tokens` has no effect. Also pass Trainer(max_epochs=-1).

    Args:
        max_tokens: tokens to train on, or None for no limit
        val_every_tokens: tokens between validations, rounded to whole batches; in a batch schedule, to
            batches of the first size. None: set by the Trainer

    In `fit` it raises ValueError if `max_tokens` is less than one optimizer step or the data has no full
    batch, and TypeError if a limit is set without a GPTDataModule.
    """

    def __init__(self, max_tokens: int | None = None, val_every_tokens: int | None = None) -> None:
        for name, value in {"max_tokens": max_tokens, "val_every_tokens": val_every_tokens}.items():
            if value is not None:
                check_integer(name, value, 1, "a number of tokens")
        self.max_tokens, self.val_every_tokens = max_tokens, val_every_tokens
        self.tokens = 0
        self._tokens_of_steps = 0  # without batches whose gradients wait for an optimizer step
        self._sets_limit = False  # whether the end of the run comes from `max_tokens`

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        data = trainer.datamodule
        if stage != "fit":
            return
        if not isinstance(data, GPTDataModule):
            if self.max_tokens is None and self.val_every_tokens is None:
                return
            advice = "fit with datamodule=GPTDataModule(…), or limit the run with Trainer(max_steps=…)"
            raise TypeError(f"TokenBudget needs a GPTDataModule, but the Trainer has {data!r}: {advice}")
        for name in ("accumulate_grad_batches", "val_check_interval"):
            if getattr(trainer, name, None) == 0:
                raise ValueError(f"trainer.{name} must be at least 1, got 0")
        if not has_trained(trainer):  # the tokens are those of another Trainer
            self.tokens = self._tokens_of_steps = 0
        if not data.train_steps.remaining():
            data.train_dataloader()  # raises the error, before the model's schedule misses an end
        tokens_per_batch = data.train_steps.width * data.max_length  # over all ranks
        self._sets_limit |= self.max_tokens is not None and trainer.max_steps == -1
        if self._sets_limit:
            self._limit(trainer)
        if self.val_every_tokens is not None:
            trainer._val_check_time_interval = None
            trainer.val_check_interval = max(1, round(self.val_every_tokens / tokens_per_batch))
            trainer.check_val_every_n_epoch = None  # count batches across epochs

    def _limit(self, trainer: Any, resumed: bool = False) -> None:
        """End the run after `max_tokens` tokens, counted from its beginning."""
        data = trainer.datamodule
        if not data.train_steps.limited(trainer.limit_train_batches):
            trainer.fit_loop.epoch_loop.max_steps = 0  # limit_train_batches=0 ends without training
            return
        steps = data._resume.steps_within(self.max_tokens)
        if not steps and not resumed:
            per_step = data.train_steps.width * data.max_length * trainer.accumulate_grad_batches
            raise ValueError(
                f"max_tokens must be at least one optimizer step of {per_step:,} tokens "
                "(batch_size × max_length × ranks × accumulate_grad_batches), got "
                f"{self.max_tokens:,}: raise it or lower batch_size"
            )
        if trainer.lightning_module.automatic_optimization:
            trainer.fit_loop.epoch_loop.max_steps = steps

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        tokens = f", {state['tokens']:,} tokens" if state else ""
        resumed = f"resumed from step {checkpoint['global_step']:,}{tokens} ({trainer.ckpt_path})"
        rank_zero_only(logging.getLogger(__name__).info)("%s", resumed)
        if self._sets_limit and state:
            self._limit(trainer, resumed=True)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._stop_at_limit(trainer)  # a resumed run may have reached it

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = count_tokens(trainer, batch)
        if trainer.world_size == 1:
            self.tokens += tokens
        elif not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.tokens += tokens * trainer.world_size
        else:  # ranks may have different numbers of windows
            total = torch.tensor(tokens, device=trainer.strategy.root_device)
            self.tokens += int(trainer.strategy.reduce(total, reduce_op="sum"))
        if not trainer.fit_loop._should_accumulate():
            self._tokens_of_steps = self.tokens
        pl_module.log("tokens", float(self.tokens), on_step=True, on_epoch=False)
        self._stop_at_limit(trainer)

    def _stop_at_limit(self, trainer: Any) -> None:
        if self._sets_limit and not trainer.lightning_module.automatic_optimization:  # a step is a batch
            before, done = trainer.datamodule._resume.tokens_before, batches_done(trainer)
            own = before(done + 1) - before(done)
            trainer.should_stop |= self.tokens + own > self.max_tokens

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("tokens", float(self.tokens))

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self._tokens_of_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens = self._tokens_of_steps = state_dict["tokens"]
