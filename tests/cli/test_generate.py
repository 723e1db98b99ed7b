"""`lit-gptdata generate` and `export hf`, on the checkpoint of a run."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lit_gptdata import GPT, EmbeddingStem, GPTDataModule, Tokenizer
from lit_gptdata.cli.main import main
from tests.training.run_train import STORY, run_train, run_train_here

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run of train.py with its own tokenizer."""
    pytest.importorskip("tokenizers")
    folder, before = tmp_path_factory.mktemp("run"), Path.cwd()
    os.chdir(folder)
    Path("story.txt").write_text(STORY)
    run_train_here(
        "data.corpus=story.txt", "threads=1", "debug=fast", "vocab_size=270", "output_dir=run"
    )
    os.chdir(before)
    return folder / "run"


def save(model: L.LightningModule, file: str = "a.ckpt", **options) -> Path:
    """Save a checkpoint as a Trainer does."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer._data_connector.attach_datamodule(model, GPTDataModule(**options))
    trainer.save_checkpoint(file)
    return Path(file)


def generated(capsys, *words: str) -> str:
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_generate_continues_a_prompt_with_the_tokenizer_of_the_run(run, capsys, monkeypatch):
    options = ("max_new_tokens=12", "temperature=1", "top_k=null")
    out = generated(capsys, run, "It was on", *options)
    model = GPT.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True)
    tokenizer = Tokenizer(run / "tokenizer.json")
    prompt = torch.tensor([tokenizer.encode("It was on")])
    (ids,) = model.generate(prompt, 12, generator=torch.Generator().manual_seed(0)).tolist()
    assert out == f"{tokenizer.decode(ids)}\n"
    assert generated(capsys, run / "checkpoints" / "last.ckpt", "It was on", *options) == out
    monkeypatch.setattr(sys, "stdin", io.StringIO("It was on\n"))
    assert generated(capsys, run, "-", *options) == out


def test_each_sample_can_be_repeated_by_its_seed(run, capsys):
    options = ("It", "max_new_tokens=5", "temperature=2")
    samples = [generated(capsys, run, *options, f"seed={seed}") for seed in (3, 4)]
    assert generated(capsys, run, *options, "seed=3", "n=2") == "\n--- seed=4\n".join(samples)
    assert samples[0] != samples[1]


def test_without_a_prompt_the_text_starts_after_end_of_text(run, capsys):
    model = GPT.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True)
    tokenizer = Tokenizer(run / "tokenizer.json")
    first = model.generate(torch.tensor([[tokenizer.end_of_document]]), 3, temperature=0)[0, 1:]
    expected = f"{tokenizer.decode(first.tolist())}\n"
    assert generated(capsys, run, "max_new_tokens=3", "temperature=0") == expected
    assert generated(capsys, run, "", "max_new_tokens=3", "temperature=0") == expected


def test_a_model_with_a_document_mask_continues_a_prompt_as_the_start_of_a_document(capsys):
    save(model := GPT(EmbeddingStem(50257, 8, 8), 1, 2, document_mask=True))
    out = generated(capsys, "a.ckpt", "Hello", "max_new_tokens=9", "temperature=0")
    tokenizer = Tokenizer("gpt2")
    prompt = torch.tensor([[tokenizer.end_of_document, *tokenizer.encode("Hello")]])
    (ids,) = model.generate(prompt, 9, temperature=0)[:, 1:].tolist()
    assert out == f"{tokenizer.decode(ids)}\n"


def test_the_folder_of_a_run_may_move_with_its_tokenizer(run, capsys, tmp_path):
    expected = generated(capsys, run, "It was", "max_new_tokens=4")
    moved = shutil.copytree(run, tmp_path / "moved")
    away = run.rename(run.with_name("away"))
    try:
        assert generated(capsys, moved, "It was", "max_new_tokens=4") == expected
        (moved / "tokenizer.json").rename(moved / "own.json")
        assert main(["generate", str(moved), "It was"]) == 1
        assert f"{run}/tokenizer.json. If it is elsewhere, give tokenizer=…" in capsys.readouterr().err
        words = ("It was", "max_new_tokens=4", f"tokenizer={moved}/own.json")
        assert generated(capsys, moved, *words) == expected
        changed = (moved / "own.json").read_text().replace("endoftext", "end_of_text")
        (moved / "tokenizer.json").write_text(changed)
        assert main(["generate", str(moved), "It was"]) == 1
        assert "tokenizer.json has other contents than it had" in capsys.readouterr().err
    finally:
        away.rename(run)


def test_a_sample_ends_at_end_of_text(run, capsys, monkeypatch):
    tokenizer = Tokenizer(run / "tokenizer.json")
    new = torch.tensor([[*tokenizer.encode(" of é 🙂"), tokenizer.end_of_document, 11]])
    monkeypatch.setattr(GPT, "generate", lambda self, ids, n: torch.cat([ids, new], dim=1))
    assert generated(capsys, run, "It was") == "It was of é 🙂\n"


class Echo(L.LightningModule):
    """A foreign model, which repeats the last token and takes no generator."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

    def generate(self, ids, n, temperature=1.0):
        return torch.cat([ids, *[ids[:, -1:]] * n], dim=1)


class Mute(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)


@pytest.mark.parametrize("kind", [Echo, Mute])
def test_a_foreign_model_generates_if_it_can(kind, capsys):
    Path("run/checkpoints").mkdir(parents=True)
    width = "width: 3" if kind is Echo else ""
    Path("run/config.yaml").write_text(
        f"model:\n  _target_: {__name__}.{kind.__name__}\n  {width}\ndata: {{max_length: 8}}\n"
    )
    save(kind(*[3] * (kind is Echo)), "run/checkpoints/last.ckpt", tokenizer="gpt2")
    status = main(["generate", "run", "Hello you", "max_new_tokens=3"])
    printed = capsys.readouterr()
    if kind is Echo:
        assert (status, printed.out) == (0, "Hello you you you you\n"), printed.err
    else:
        assert status == 1
        assert "Mute has no method generate" in printed.err


def test_own_modules_are_imported_from_the_folder_of_configs_or_named(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("run/checkpoints", "configs"):
        Path(name).mkdir(parents=True)
    Path("configs/stems_of_mine.py").write_text(
        "from lit_gptdata import EmbeddingStem\nclass Mine(EmbeddingStem): pass\n"
    )
    config = Path("run/config.yaml")
    config.write_text("stem:\n  _target_: stems_of_mine.Mine\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(Path("configs").absolute())
        from stems_of_mine import Mine

        save(GPT(Mine(50257, 8, 4), n_layers=0), "run/checkpoints/last.ckpt", tokenizer="gpt2")
    monkeypatch.delitem(sys.modules, "stems_of_mine")
    assert main(["generate", "run", "Hello"]) == 1
    assert "stems_of_mine" in (printed := capsys.readouterr().err)
    assert "Put the folder of the module on PYTHONPATH" in printed
    config.write_text(
        f"{config.read_text()}hydra:\n  searchpath: ['file://{Path('configs').absolute()}']\n"
    )
    assert main(["generate", "run", "Hello", "max_new_tokens=1"]) == 0, capsys.readouterr().err
    config.unlink()
    save(Echo(3), "run/checkpoints/last.ckpt", tokenizer="gpt2")
    assert main(["generate", "run", "Hello"]) == 1
    assert "is not of GPT, and has no config.yaml of its run" in capsys.readouterr().err


def test_a_checkpoint_without_a_data_module_needs_a_tokenizer(capsys):
    model = GPT(EmbeddingStem(50257, 8, 4), n_layers=0)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint("a.ckpt")
    assert main(["generate", "a.ckpt", "Hello"]) == 1
    assert "names no tokenizer: give tokenizer=…, such as tokenizer=gpt2" in capsys.readouterr().err
    out = generated(capsys, "a.ckpt", "Hello", "tokenizer=gpt2", "max_new_tokens=2")
    assert out.startswith("Hello")


@pytest.mark.heavy
def test_the_parts_of_a_checkpoint_become_one_file_with_the_printed_command(capsys):
    options = ("data.corpus=story.txt", "debug=fast", "output_dir=a run", "trainer.accelerator=cpu")
    Path("story.txt").write_text(STORY)
    parts = ("trainer=fsdp", "trainer.strategy.save_distributed_checkpoint=true")
    run_train(*options, *parts, cwd=Path.cwd())
    assert main(["generate", "a run", "Hello"]) == 1
    module, file = shlex.split(capsys.readouterr().err.partition("python -m ")[2])
    subprocess.run([sys.executable, "-m", module, file], check=True)
    out = generated(capsys, f"{file}.consolidated", "Hello", "max_new_tokens=2")
    assert out.startswith("Hello")


def test_export_hf_writes_the_weights_and_the_tokenizer(run, capsys):
    Path("3").symlink_to(run)  # a job of a sweep
    assert main(["export", "hf", "out", "ckpt=3"]) == 0
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in Path("out").iterdir()) == files
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{Path.cwd()}/out/{name}" for name in files
    ]
    model = GPT.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True)
    loaded = GPT.from_gpt2("out").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    text = "It was on a dreary night"
    assert Tokenizer("out").encode(text) == Tokenizer(run / "tokenizer.json").encode(text)
