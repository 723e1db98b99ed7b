"""GPT-2's architecture on an EmbeddingStem, trained and scored by Lightning.

    ids (B, T) ──► stem ──► n_layers × Block ──► final norm ──► head ──► logits (B, T, V)
                                                                 └─ the stem's token table again

B: batch, T: tokens in a sequence, D: embedding_dim, H: n_heads, V: vocab_size. Layer by layer as in
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gptdata.model.block import NORM_EPS, Block
from lit_gptdata.model.gpt2_weights import read_gpt2
from lit_gptdata.model.stem import INIT_STD, EmbeddingStem

IGNORE_INDEX = -100  # a target of this value is not scored; torch's own default in cross_entropy

Batch = tuple[Tensor, Tensor]  # inputs and targets, both int64 (B, T)


class GPT(L.LightningModule):
    """Integers (B, T) → logits (B, T, vocab_size), in the steps that Lightning's Trainer calls.

    Logged: train_loss while training; val_loss, val_perplexity and
    val_bits_per_byte (test_… likewise), exact over all scored targets of all ranks.

    Args:
        stem: an EmbeddingStem, or a mapping of its arguments, which is what checkpoints keep
        n_layers: blocks; 0 is the bigram model: stem and head alone, without a final norm
        n_heads: of attention; they must divide the stem's embedding_dim
        dropout: on attention weights and on what a block adds; the stem has its own
        learning_rate: the peak, reached after warmup_steps
        min_learning_rate_ratio: where the learning rate ends, as a share of the peak (see
            `learning_rate_scale`)
        warmup_steps: optimizer steps from a rate of nearly 0 to the peak; below 1 a share of all steps
        weight_decay: on matrices only
        betas: AdamW's two averages

    Raises:
        ValueError: a value out of range, or an embedding_dim that n_heads does not divide
    """

    token_bytes: Tensor | None  # (V,) int64: UTF-8 bytes of each token, as the data module says

    def __init__(
        self,
        stem: EmbeddingStem | Mapping[str, Any],
        n_layers: int = 4,
        n_heads: int = 4,
        dropout: float = 0.0,
        learning_rate: float = 1e-3,
        min_learning_rate_ratio: float = 0.1,
        warmup_steps: int | float = 100,
        weight_decay: float = 0.1,
        betas: Sequence[float] = (0.9, 0.95),
    ) -> None:
        super().__init__()
        self.stem = stem if isinstance(stem, EmbeddingStem) else _stem_from(stem)
        D = self.stem.embedding_dim
        _check(
            n_layers=n_layers,
            n_heads=n_heads,
            dropout=dropout,
            learning_rate=learning_rate,
            min_learning_rate_ratio=min_learning_rate_ratio,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            betas=betas,
        )
        if n_layers and D % n_heads:
            fits = ", ".join(str(n) for n in range(1, D + 1) if D % n == 0)
            raise ValueError(
                f"n_heads is {n_heads}, which does not divide embedding_dim {D} into equal shares;"
                f" allowed for {D} are n_heads={fits}"
            )
        # Plain values only, the stem as its arguments: GPT.load_from_checkpoint(path) then needs
        # no others, and torch.load reads the file with weights_only=True.
        self.save_hyperparameters(
            {
                "stem": dict(self.stem.hparams),
                "n_layers": int(n_layers),
                "n_heads": int(n_heads),
                "dropout": float(dropout),
                "learning_rate": float(learning_rate),
                "min_learning_rate_ratio": float(min_learning_rate_ratio),
                "warmup_steps": float(warmup_steps) if 0 < warmup_steps < 1 else int(warmup_steps),
                "weight_decay": float(weight_decay),
                "betas": [float(beta) for beta in betas],
            }
        )

        self.blocks = nn.ModuleList(Block(D, n_heads, dropout) for _ in range(n_layers))
        self.final_norm = nn.LayerNorm(D, eps=NORM_EPS) if n_layers else nn.Identity()
        self._init_blocks()

        self.token_bytes = None  # no buffer: DDP would send it to every rank at every step
        self._totals = torch.zeros(3)  # nats, scored targets, their bytes; see _start_scoring

    @classmethod
    def from_gpt2(cls, path: str | Path, dropout: float = 0.0, **options: Any) -> "GPT":
        """Hugging Face's GPT-2 in `path`, a folder with config.json and model.safetensors, as GPT.

        `dropout` is used throughout, in place of the file's; `options` are GPT's own, such as
        `learning_rate`. Whatever would make the logits differ is refused: see `read_gpt2`.
        """
        arguments, weights = read_gpt2(path)
        stem = EmbeddingStem(**arguments.pop("stem"), dropout=dropout)
        model = cls(stem, dropout=dropout, **arguments, **options)
        model.load_state_dict(weights)
        return model

    def _init_blocks(self) -> None:
        """GPT-2's: N(0, 0.02²), less at the end of a residual branch, zero biases (section 2.3)."""
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.contract.weight")):
                # 2 · n_layers branches add up, so that each gets its share of the variance.
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * len(self.blocks)))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """Integers (B, T), T ≤ max_length → logits (B, T, V); logits[:, t] predict token t + 1."""
        return self._head(self._features(ids))

    def _features(self, ids: Tensor) -> Tensor:
        x: Tensor = self.stem(ids)  # (B, T, D)
        for block in self.blocks:
            x = block(x)  # (B, T, D)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stem.token_embedding.weight)  # (…, D) → (…, V)

    def configure_model(self) -> None:
        """Under Lightning's ModelParallelStrategy, share the parameters among the ranks (FSDP2)."""
        mesh = self.device_mesh
        if mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if isinstance(self, FSDPModule):  # Lightning asks before each of validate, fit and test
            return
        for block in self.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        # What is left is one unit: the stem's token table is also the head's.
        fully_shard(self, mesh=mesh["data_parallel"])
        register_fsdp_forward_method(self, "generate")

    # Losses and metrics -----------------------------------------------------------------------

    def losses(self, batch: Batch) -> Tensor:
        """(inputs, targets) → nats of each target, float32 (B, T); 0 where it is -100."""
        inputs, targets = batch
        logits = self(inputs).float()  # (B, T, V)
        nats = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )  # (B·T,)
        return nats.reshape(targets.shape)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def log(self, *args: Any, **options: Any) -> None:
        """Lightning's own, kept out of compiled graphs: torch 2.13 cannot trace its inspection."""
        super().log(*args, **options)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        counted = (batch[1] != IGNORE_INDEX).sum()
        loss = self.losses(batch).sum() / counted.clamp(min=1)
        # Over all ranks, as the gradients are.
        self.log("train_loss", loss, on_step=True, on_epoch=False, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """`losses`: logits of a whole split would not fit in memory (200 KB a token for gpt2)."""
        return self.losses(batch)

    def setup(self, stage: str) -> None:
        # Duck-typed, so that the model knows nothing of data: a data module with an attribute
        # `token_bytes`, int64 (vocab_size,), the UTF-8 bytes of each token and 0 for special
        # ones, gets bits per byte logged; any other data module, or none, does without.
        lengths = getattr(getattr(self.trainer, "datamodule", None), "token_bytes", None)
        self.token_bytes = None if lengths is None else torch.as_tensor(lengths).to(self.device)

    def on_validation_epoch_start(self) -> None:
        self._start_scoring()

    def on_test_epoch_start(self) -> None:
        self._start_scoring()

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _start_scoring(self) -> None:
        # float64 counts tokens exactly up to 2⁵³; float32 would stop at 16 million. MPS lacks it.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self._totals = torch.zeros(3, dtype=wide, device=self.device)

    def _score(self, batch: Batch) -> None:
        targets = batch[1]
        counted = targets != IGNORE_INDEX  # (B, T)
        self._totals[0] += self.losses(batch).sum(dtype=self._totals.dtype)
        self._totals[1] += counted.sum()
        if self.token_bytes is not None:
            self._totals[2] += (self.token_bytes[targets.clamp(min=0)] * counted).sum()

    def _log_scores(self, split: str) -> None:
        self._totals = self.trainer.strategy.reduce(self._totals, reduce_op="sum")
        nats, targets, n_bytes = self._totals.tolist()
        if not targets:
            rank_zero_warn(f"{split}_loss is not logged: every target was {IGNORE_INDEX}")
            return
        loss = nats / targets
        # Beyond e^709 a double ends; a loss that high has no perplexity worth a crash.
        scores = {"loss": loss, "perplexity": math.exp(loss) if loss < 709 else math.inf}
        if n_bytes:
            scores["bits_per_byte"] = nats / math.log(2) / n_bytes
        for name, value in scores.items():
            self.log(
                f"{split}_{name}",
                torch.tensor(value, dtype=self._totals.dtype, device=self.device),
                prog_bar=name == "loss",
                # The value is the same on all ranks already; said again, because Lightning warns.
                sync_dist=True,
                batch_size=1,
            )

    # Optimizer --------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, decay on matrices (the tables included), and `learning_rate_scale` every step."""
        options = self.hparams
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in parameters if p.ndim >= 2],
                "weight_decay": options["weight_decay"],
            },
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=options["learning_rate"],
            betas=tuple(options["betas"]),
        )
        total_steps = self.trainer.estimated_stepping_batches  # inf or -1 where there is no end
        warmup_steps = options["warmup_steps"]
        if 0 < warmup_steps < 1:
            if total_steps < 1 or math.isinf(total_steps):
                raise ValueError(
                    f"warmup_steps={warmup_steps} is a share of all optimizer steps, and this run has "
                    "no end: give a whole number, or the Trainer max_steps or max_epochs"
                )
            warmup_steps = round(warmup_steps * total_steps)

        def scale(step: int) -> float:
            return learning_rate_scale(
                step, total_steps, warmup_steps, options["min_learning_rate_ratio"]
            )

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # Sampling ---------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Integers (B, T) → int64 (B, T + max_new_tokens): the prompt and what follows it.

        Each token is drawn from softmax(logits / temperature) over the `top_k` most likely ones
        (None: over all); temperature 0 takes the most likely. The model sees the last max_length
        tokens. Without dropout, and `generator` makes it repeatable.
        ValueError: an empty prompt, a value out of range.
        """
        if not isinstance(ids, Tensor) or ids.ndim != 2 or 0 in ids.shape:
            seen = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(
                f"the prompt is a tensor (batch, tokens) of at least one token; seen: {seen}."
                " With nothing to go on from, start with the end-of-text token"
            )
        _check(max_new_tokens=max_new_tokens, temperature=temperature)
        if top_k is not None:
            _check(top_k=top_k)

        ids = ids.to(self.device, torch.int64)
        with _evaluating(self):
            for _ in range(max_new_tokens):
                features = self._features(ids[:, -self.stem.max_length :])  # (B, ≤ L, D)
                logits = self._head(features[:, -1]).float()  # (B, V)
                chosen = _choose(logits, temperature, top_k, generator)  # (B, 1)
                ids = torch.cat((ids, chosen), dim=1)
        return ids


def learning_rate_scale(
    step: int, total_steps: float, warmup_steps: int, min_learning_rate_ratio: float
) -> float:
    """The factor on the peak learning rate at `step` = 0, 1, 2, …

    Linear from 1 / (warmup_steps + 1) to 1 at step warmup_steps, then half a cosine down to
    min_learning_rate_ratio at total_steps, where it stays (Loshchilov & Hutter 2017, "SGDR",
    equation 5, without restarts). Where total_steps is infinite or below 1, a run without a known
    end, the factor stays 1 after the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if total_steps < 1 or math.isinf(total_steps):
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return min_learning_rate_ratio + (1 - min_learning_rate_ratio) * cosine


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Logits (B, V) → one token each, int64 (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    best, tokens = logits.topk(k)  # both (B, k), largest first
    # Against the largest, so that a tiny temperature gives -inf and never inf - inf.
    probabilities = ((best - best[:, :1]) / temperature).softmax(dim=-1)
    return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; after it every submodule is back in the mode that it had."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _stem_from(arguments: Mapping[str, Any]) -> EmbeddingStem:
    if not isinstance(arguments, Mapping):
        raise TypeError(
            f"stem is a {type(arguments).__name__}; allowed are an EmbeddingStem and a mapping of"
            " its arguments (vocab_size, max_length, embedding_dim, …)"
        )
    return EmbeddingStem(**arguments)


def _check(**values: Any) -> None:
    for name, value in values.items():
        allowed, holds = _ALLOWED[name]
        if not holds(value):
            raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _whole(least: int) -> tuple[str, Callable[[Any], bool]]:
    def holds(value: Any) -> bool:
        return isinstance(value, Integral) and int(value) >= least

    return f"a whole number of at least {least}", holds


def _within(low: float, below: float) -> tuple[str, Callable[[Any], bool]]:
    def holds(value: Any) -> bool:
        return isinstance(value, Real) and low <= float(value) < below

    return f"a number in [{low}, {below})", holds


_ALLOWED = {
    "n_layers": _whole(0),
    "n_heads": _whole(1),
    "warmup_steps": (
        "a whole number of at least 0, or a share of all steps in (0, 1)",
        lambda value: _whole(0)[1](value) or _within(0, 1)[1](value),
    ),
    "max_new_tokens": _whole(0),
    "top_k": _whole(1),
    "dropout": _within(0, 1),
    "learning_rate": _within(0, math.inf),
    "weight_decay": _within(0, math.inf),
    "temperature": _within(0, math.inf),
    "min_learning_rate_ratio": (
        "a number in [0, 1]",
        lambda value: isinstance(value, Real) and 0 <= float(value) <= 1,
    ),
    "betas": (
        "two numbers in [0, 1)",
        lambda value: len(value) == 2 and all(_within(0, 1)[1](beta) for beta in value),
    ),
}
