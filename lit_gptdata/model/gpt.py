"""GPT-2's architecture on an EmbeddingStem, as a LightningModule that trains, scores and generates.

    ids (B, T) ──► stem ──► n_layers × Block ──► final norm ──► head ──► logits (B, T, V)
                                                                 └─ the stem's token table again

B: batch, T: tokens in a sequence, D: embedding_dim, V: vocab_size. Source: see block.py.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gptdata._checks import check_flag, check_integer, check_number
from lit_gptdata.model.block import NORM_EPS, Block, KeyValueCache
from lit_gptdata.model.documents import HAS_TRITON, Mask, attention_mask, block_mask, document_positions
from lit_gptdata.model.gpt2_weights import read_gpt2, write_gpt2
from lit_gptdata.model.learning_rate import Schedule, check_schedule, make_schedule
from lit_gptdata.model.sampling import sample_tokens
from lit_gptdata.model.scores import IGNORE_INDEX, ScoreSums, token_losses
from lit_gptdata.model.stem import (
    INIT_STD,
    EmbeddingStem,
    build_stem,
    check_separator,
    check_stem,
    stem_arguments,
)

Batch = tuple[Tensor, Tensor] | Mapping[str, Tensor]  # see `inputs_and_targets`


class GPT(L.LightningModule):
    """GPT-2 as a LightningModule. It maps integer token ids (B, T) to float logits (B, T, vocab_size).

    It logs train_loss for each step, and val_loss, val_perplexity and val_bits_per_byte (or test_…),
    computed exactly over all scored targets of all ranks. For sets with names it also logs
    val_loss/<name> and val_bits_per_byte/<name>; the others then cover the sets whose source trains.

    Args:
        stem: an EmbeddingStem, or a mapping of its arguments, which is what checkpoints contain. Or any
            module that maps ids (B, T) to (B, T, D), and has max_length, embedding_dim, and a
            token_embedding.weight (V, D), which is the head, too
        n_layers: number of blocks; 0 is the bigram model: stem and head without a final norm
        n_heads: number of attention heads, a divisor of the stem's embedding_dim
        dropout: on attention weights and on the output of each residual branch, not on the stem
        learning_rate: peak value, reached after the warm-up
        min_learning_rate_ratio: final learning rate as a fraction of the peak
        warmup_tokens: tokens of all ranks until the peak; a value below 1 is a fraction of the whole run
        warmup_steps: the same as a number of optimizer steps; without either, 100 steps
        schedule: after the warm-up: "cosine" | "warmup-stable-decay", constant until a linear decay
        decay_tokens: length of that decay; a value below 1 is a fraction of the whole run
        weight_decay: for matrices only
        betas: AdamW's two decay rates
        document_mask: attend only to tokens of the same document, and count positions from its start.
            On CUDA this uses FlexAttention, unless dropout or a shorter sequence needs a mask of pairs
        eot: token that starts a document, the data's `eot`; None: 50256 for a vocabulary of 50,257

    Raises ValueError for a value out of range.
    """

    stem: Any  # an EmbeddingStem, or what `check_stem` accepts
    _scores: ScoreSums

    def __init__(
        self,
        stem: nn.Module | Mapping[str, Any],
        n_layers: int = 4,
        n_heads: int = 4,
        dropout: float = 0.0,
        learning_rate: float = 1e-3,
        min_learning_rate_ratio: float = 0.1,
        warmup_steps: int | float | None = None,
        weight_decay: float = 0.1,
        betas: Sequence[float] = (0.9, 0.95),
        warmup_tokens: int | float | None = None,
        schedule: Schedule = "cosine",
        decay_tokens: int | float = 0.2,
        document_mask: bool = False,
        eot: int | None = None,
    ) -> None:
        super().__init__()
        self.stem = check_stem(build_stem(stem) if isinstance(stem, Mapping) else stem)
        if not hasattr(betas, "__len__") or len(betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
        ratio = check_number("min_learning_rate_ratio", min_learning_rate_ratio, 1, include_high=True)
        # Plain values, and the stem as its arguments: GPT.load_from_checkpoint(path) then needs no other
        # arguments, and torch.load reads the file with weights_only=True.
        options: dict[str, Any] = {
            "stem": stem_arguments(self.stem),
            "n_layers": check_integer("n_layers", n_layers, 0),
            "n_heads": check_integer("n_heads", n_heads, 1),
            "dropout": check_number("dropout", dropout, 1),
            "learning_rate": check_number("learning_rate", learning_rate, math.inf),
            "min_learning_rate_ratio": ratio,
            **check_schedule(warmup_steps, warmup_tokens, schedule, decay_tokens),
            "weight_decay": check_number("weight_decay", weight_decay, math.inf),
            "betas": [check_number(f"betas[{i}]", beta, 1) for i, beta in enumerate(betas)],
        }
        self.document_mask = check_flag("document_mask", document_mask)
        if self.document_mask:  # otherwise checkpoints stay as they were
            self.eot = check_separator(self.stem, eot)
            options |= {"document_mask": True, "eot": self.eot}
        self.save_hyperparameters(options)
        self._optimizer_options = options  # a subclass may save other hyperparameters of the same names
        D: int = self.stem.embedding_dim
        if n_layers and D % n_heads:
            got = f"n_heads={n_heads} and embedding_dim={D}"
            divisors = ", ".join(str(n) for n in range(1, D + 1) if D % n == 0)
            raise ValueError(f"n_heads must divide embedding_dim, got {got}; allowed: {divisors}")
        self.blocks = nn.ModuleList(Block(D, n_heads, dropout) for _ in range(n_layers))
        self.final_norm = nn.LayerNorm(D, eps=NORM_EPS) if n_layers else nn.Identity()
        self._init_blocks()

    @classmethod
    def from_gpt2(cls, path: str | Path, dropout: float = 0.0, **options: Any) -> "GPT":
        """Load a GPT-2 of Hugging Face: a folder with config.json and safetensors, or a name on the hub.

        A folder may have model.safetensors, or shards and their index. A name is gpt2, org/name or
        hf://org/name[@revision], unless a folder has the same name; huggingface_hub caches the files.
        `dropout` replaces the values in config.json. `options` are further arguments of GPT. Raises
        ValueError if the tensors do not match config.json, and the errors of `read_gpt2`.
        """
        arguments, weights = read_gpt2(path)
        stem = EmbeddingStem(**arguments.pop("stem"), dropout=dropout)
        model = cls(stem, dropout=dropout, **arguments, **options)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:  # it names the missing, unexpected and wrong tensors
            raise ValueError(f"the tensors in {path} do not match its config.json: {error}") from error
        return model

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write a folder that AutoModelForCausalLM of transformers and `from_gpt2` load.

        `tokenizer`, anything that `Tokenizer` takes, adds the files that AutoTokenizer loads. With FSDP
        all ranks must call this, and rank 0 writes. It warns if the model has a document mask, which
        transformers does not apply. Raises ValueError that names what GPT-2's
        architecture cannot hold, such as position="sinusoidal", and ImportError.
        """
        if self.document_mask:
            rank_zero_warn(
                "transformers does not mask documents: give it one document at a time. For this package,"
                f" load the folder with GPT.from_gpt2(…, document_mask=True, eot={self.eot})"
            )
        weights = self.state_dict()
        for name, tensor in weights.items():
            if hasattr(tensor, "full_tensor"):  # with FSDP each rank has a part of it
                weights[name] = tensor.full_tensor()
        rank_zero_only(write_gpt2)(Path(folder), self, weights, tokenizer)

    def _init_blocks(self) -> None:
        """Initialize the blocks like GPT-2: matrices from N(0, 0.02²), biases 0 (section 2.3)."""
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.contract.weight")):
                # The outputs of 2 · n_layers residual branches add up, so each gets a smaller variance.
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * len(self.blocks)))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, padded: bool = False) -> Tensor:
        """Return logits (B, T, V) for `ids` (B, T), T ≤ max_length; logits[:, t] predict token t + 1.

        `padded` appends logits of -inf up to a multiple of 64. The loss stays the same, bit for bit, and
        the matrix product is up to twice as fast, because all rows start at an aligned address.
        """
        x, table = self._features(ids), self.stem.token_embedding.weight
        if not padded or not (extra := -len(table) % 64):
            return self._head(x)
        bias = F.pad(table.new_zeros(len(table)), (0, extra), value=-torch.inf)
        return F.linear(x, F.pad(table, (0, 0, 0, extra)), bias)

    def _features(self, ids: Tensor, caches: Sequence[KeyValueCache] = ()) -> Tensor:
        """Features of `ids` (B, T), without the tokens that are cached: (B, T - begin, D)."""
        begin = caches[0].n if caches else 0
        options: dict[str, Tensor] = {}  # your own stem need not take positions
        if self.document_mask:
            options["positions"] = document_positions(ids, self.eot)[:, begin:]
        elif caches:
            options["positions"] = torch.arange(begin, ids.shape[1], device=ids.device)
        # without a slice, so that the stem names a wrong shape
        x = self.stem(ids[:, begin:] if begin else ids, **options)  # (B, T - begin, D)
        # your own block need not take a mask
        masks = {"mask": self._mask(ids, begin)} if self.document_mask else {}
        for i, block in enumerate(self.blocks):
            x = block(x, *caches[i : i + 1], **masks)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def _mask(self, ids: Tensor, begin: int) -> Mask:
        """FlexAttention's mask for a window of max_length on CUDA, or a mask of pairs of tokens.

        Other lengths, as of a prompt, would each compile another kernel. A kernel needs 16 columns of
        each head, and has no dropout.
        """
        no_dropout = not (self.training and self._optimizer_options["dropout"])
        is_wide = self.stem.embedding_dim >= 16 * self._optimizer_options["n_heads"]
        is_window = begin == 0 and ids.shape[1] == self.stem.max_length
        if ids.is_cuda and HAS_TRITON and is_window and is_wide and no_dropout:
            return block_mask(ids, self.eot)
        return attention_mask(ids, self.eot, begin)

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stem.token_embedding.weight)  # (…, D) → (…, V)

    @property
    def _own_code(self) -> list[str]:
        """What may compute other logits than GPT's code: methods of a subclass, modules of others."""
        methods = ("forward", "_features", "_head")
        own = type(self)
        found = [f"{own.__name__}.{m}" for m in methods if getattr(own, m) is not getattr(GPT, m)]
        for name, module in list(self.named_modules())[1:]:
            packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
            if packages - {"torch", "lit_gptdata", "lightning", "builtins", "typing", "abc"}:
                found.append(f"{name} ({type(module).__name__})")
        return found

    def configure_model(self) -> None:
        """Shard the parameters over the ranks (FSDP2) if Lightning uses its ModelParallelStrategy."""
        mesh = self.device_mesh
        if mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if isinstance(self, FSDPModule):  # Lightning calls this before each validate, fit and test
            return
        for block in self.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        # Stem and head stay in one unit because they use the same token table.
        fully_shard(self, mesh=mesh["data_parallel"])
        register_fsdp_forward_method(self, "generate")

    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each target in nats, float32 (B, T), with 0 where the target is -100."""
        inputs, targets = inputs_and_targets(batch)
        # A subclass may have a forward of its own, without `padded`.
        options = {"padded": True} if type(self).forward is GPT.forward else {}
        return token_losses(self(inputs, **options), targets)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def log(self, *args: Any, **options: Any) -> None:
        """Call Lightning's `log` outside of compiled graphs: torch 2.13 cannot trace its inspection."""
        super().log(*args, **options)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        n_scored = (inputs_and_targets(batch)[1] != IGNORE_INDEX).sum()
        loss = self.losses(batch).sum() / n_scored.clamp(min=1)
        # sync_dist averages over the ranks, as DDP does with the gradients.
        self.log("train_loss", loss, on_step=True, on_epoch=False, prog_bar=True, sync_dist=True)
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return `losses`; the logits of a split would not fit in memory (200 KB per token for gpt2)."""
        return self.losses(batch)

    def on_validation_epoch_start(self) -> None:
        self._scores = ScoreSums(self.trainer)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._scores.add(self.losses(batch), inputs_and_targets(batch)[1], dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._scores.log(self.trainer, self.log)

    # Test works like validation; only the names of the metrics differ.
    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError that names what differs if the checkpoint's architecture is another one."""
        saved, own = _architecture(checkpoint.get("hyper_parameters", {})), _architecture(self.hparams)
        names = [name for name in own if name in saved and saved[name] != own[name]]
        if differ := "; ".join(f"{name} was {saved[name]!r}, now {own[name]!r}" for name in names):
            raise ValueError(
                f"the checkpoint's model differs from this run's: {differ}. Set the checkpoint's values;"
                " stem.vocab_size follows data.tokenizer, and stem.max_length follows data.max_length"
            )

    def on_train_start(self) -> None:
        # `estimated_stepping_batches` below makes Lightning load the data before it restores a
        # checkpoint. It then forgets the positions that loaders without a GPTDataModule have saved.
        self.trainer.fit_loop._load_combined_loader_states()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with weight decay on matrices and tables only, and its learning-rate schedule."""
        options = self._optimizer_options
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options["weight_decay"]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        betas = tuple(options["betas"])
        optimizer = torch.optim.AdamW(groups, lr=options["learning_rate"], betas=betas)
        factor = make_schedule(options, self.trainer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt: integers (B, T) → int64 (B, T + max_new_tokens), the prompt included.

        Each token is drawn from softmax(logits / temperature) over the `top_k` most likely tokens
        (None: over all). Temperature 0 takes the most likely token. The model sees the last max_length
        tokens and applies no dropout. Keys and values are cached until the text has max_length tokens.
        After that each token costs a whole window, because the positions of all tokens change. Raises
        ValueError for an empty prompt or a value out of range.
        """
        new = list(sample_tokens(self, ids, max_new_tokens, temperature, top_k, generator))
        return torch.cat([ids.to(self.device, torch.int64), *new], dim=1)


def inputs_and_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 (B, T) each, of a batch of GPTDataModule in any `batch_format`."""
    return (batch["input_ids"], batch["shift_labels"]) if isinstance(batch, Mapping) else batch


def _architecture(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that determine what the weights mean, by their names in a config."""
    found = {f"model.{name}": hparams[name] for name in ("n_layers", "n_heads") if name in hparams}
    if found:
        found["model.document_mask"] = hparams.get("document_mask", False)
        found |= {"model.eot": hparams.get("eot")} if found["model.document_mask"] else {}
    if isinstance(stem := hparams.get("stem"), Mapping):
        stem = {"_target_": "EmbeddingStem", **stem}
        found |= {f"stem.{k}": value for k, value in stem.items() if k not in ("dropout", "freeze")}
        if stem.get("position") != "learned":
            found.pop("stem.max_length", None)  # such a stem has no weights for positions
    return found
