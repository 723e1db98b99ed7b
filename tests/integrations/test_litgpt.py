"""LitGPT's pretrain on our batches: its losses are those of a plain loop, also after a kill."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from lit_gptdata import GPTDataModule
from tests.examples import check_epochs, check_resume

pytest.importorskip("litgpt")
from lit_gptdata.interop.litgpt import LitGPTData

LENGTH, STEPS, SEED = 32, 60, 0  # of examples/litgpt_pretrain.py
STRIDE = 2000  # gives epochs of 60 windows


def logged_losses(folder: Path) -> dict[int, float]:
    """The losses in LitGPT's csv files: batch → loss. A later run overwrites an earlier one."""
    losses = {}
    for file in sorted(folder.glob("litgpt/logs/csv/version_*/metrics.csv")):
        rows = csv.DictReader(file.read_text().splitlines())
        losses |= {int(row["step"]): float(row["loss"]) for row in rows if row["loss"]}
    return losses


def plain_losses(data: GPTDataModule, ranks: int) -> dict[int, float]:
    """The losses of rank 0 in a loop over `data.batch_at`, from the same initial weights."""
    from litgpt import GPT, Config
    from litgpt.pretrain import get_lr, initialize_weights

    fabric = L.Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(SEED, verbose=False)
    config = Config.from_name("pythia-14m", n_layer=1, n_embd=16, n_head=2, block_size=LENGTH)
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    initialize_weights(fabric, model, n_layer=1, n_embd=16)
    optimizer = torch.optim.AdamW(model.parameters())
    losses = {}
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = get_lr(1e-3, step, 5, STEPS, 6e-5)
        optimizer.zero_grad()
        for rank in reversed(range(ranks)):
            inputs, targets = data.batch_at(step, rank=rank, world_size=ranks)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            (loss / ranks).backward()
        losses[step] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


@pytest.mark.heavy
@pytest.mark.parametrize("ranks", [1, 2])
def test_pretrain_has_the_losses_of_a_plain_loop_also_after_a_kill(ranks, tmp_path):
    whole = check_resume(
        "litgpt_pretrain.py", tmp_path, "pythia-14m", ranks=ranks, options={"stride": STRIDE}
    )
    check_epochs(whole)
    data = GPTDataModule(max_length=LENGTH, stride=STRIDE, batch_size=4, data_dir=tmp_path / "data")
    data.prepare_data()
    data.setup()
    expected = plain_losses(data, ranks)
    for run in ("whole", "killed"):
        losses = logged_losses(tmp_path / run)
        assert losses.keys() == expected.keys()
        print(run, max(abs(losses[step] - expected[step]) for step in expected))
        assert losses == pytest.approx(expected, abs=1e-5)


class OfLitGPT:
    """A tokenizer as LitGPT passes it on, with `n` ids."""

    def __init__(self, backend: str, n: int) -> None:
        from tokenizers import Tokenizer, models

        self.backend, self.vocab_size = backend, n
        self.processor = Tokenizer(models.BPE({chr(0x100 + i): i for i in range(n)}, []))


def connected(given: OfLitGPT | None = None, length: int = 8, **options) -> LitGPTData:
    data = LitGPTData(**options)
    data.connect(tokenizer=given, batch_size=3, max_seq_length=length)
    return data


@pytest.mark.parametrize(
    ("given", "tokenizer", "message"),
    [
        (None, None, r"no tokenizer\.json, or is not set: set data\.tokenizer, such as gpt2"),
        (OfLitGPT("sentencepiece", 5), None, r"set data\.tokenizer, .* or …/tokenizer\.model"),
        (OfLitGPT("huggingface", 5), "gpt2", "'gpt2' has 50,257 ids, but LitGPT's has 5: leave out"),
        (OfLitGPT("sentencepiece", 5), "gpt2", "'gpt2' has 50,257 ids, but LitGPT's has 5: leave out"),
    ],
)
def test_a_tokenizer_that_is_missing_or_another_one_is_refused(given, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        connected(given, tokenizer=tokenizer)


@pytest.mark.parametrize("options", [{"windows": "packed"}, {"eval_windows": "documents"}])
def test_windows_of_documents_are_refused_because_they_have_padding(options):
    with pytest.raises(ValueError, match=r"LitGPT cannot train on padding|set eval_windows=sliding"):
        connected(tokenizer="gpt2", **options)


def test_the_tokenizer_of_litgpt_is_used():
    assert connected(OfLitGPT("huggingface", 5)).module.vocab_size == 5


@pytest.mark.parametrize("corpus", ["sample", {"a": "sample", "b": "b.txt"}])
def test_batches_are_the_ids_of_full_windows(corpus):
    Path("b.txt").write_text("A dreary night of November. " * 50)
    data = connected(tokenizer="gpt2", corpus=corpus, num_workers=0)
    data.prepare_data()
    data.setup()
    assert str(data).startswith("GPTDataModule\n")
    module = data.module
    train = torch.cat([batch.long() for batch in data.train_dataloader()])  # (n, 9)
    inputs, targets = module.batch_at(0)
    assert torch.equal(train[:3, :-1], inputs)
    assert torch.equal(train[:3, 1:], targets)
    assert len(train) == len(module.train_windows) // 3 * 3
    val = torch.cat([batch.long() for batch in data.val_dataloader()])
    inputs, targets = module.val_windows.batch(range(len(module.val_windows)))
    assert torch.equal(val[:, :-1], inputs)
    assert torch.equal(val[:, 1:], targets)
    assert (targets >= 0).all()


def test_litgpt_without_a_val_split_is_refused():
    data = connected(tokenizer="gpt2", val_fraction=0.0)
    data.prepare_data()
    data.setup()
    with pytest.raises(ValueError, match=r"at least one window: raise data\.val_fraction"):
        data.val_dataloader()


@pytest.mark.filterwarnings("ignore")  # LitGPT calls jsonargparse by old names
def test_the_command_line_of_litgpt_has_our_options():
    from jsonargparse import capture_parser
    from litgpt.pretrain import setup
    from litgpt.utils import CLI

    parser = capture_parser(lambda: CLI(setup))  # as LitGPT's checkpoints read the command line
    args = ["pythia-14m", "--data=lit_gptdata.interop.litgpt.LitGPTData", "--data.corpus=books/"]
    options = ["--data.stride=4", "--data.tokenizer=gpt2", "--data.on_change=continue"]
    data = parser.instantiate_classes(parser.parse_args([*args, *options])).data
    data.connect(batch_size=2, max_seq_length=16)
    module = data.module
    assert (module.max_length, module.stride, module.batch_size) == (16, 4, 2)
    assert (module.hparams["corpus"], module.hparams["on_change"]) == ("books/", "continue")
    with pytest.raises(SystemExit):
        parser.parse_args([*args, "--data.max_length=4"])
