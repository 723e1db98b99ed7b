"""The examples of README and docs/ run, their commands parse, and the files that they name exist."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

import lit_gptdata
from lit_gptdata import GPT, GPTDataModule
from lit_gptdata.cli.main import COMMANDS
from lit_gptdata.cli.overrides import compose_config

ROOT = Path(__file__).parents[1]
PAGES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands() -> list[str]:
    """The command lines of all pages, without comments, those of several lines joined."""
    text = "\n".join(block for page in PAGES for block in blocks(page, "bash")).replace("\\\n", " ")
    text = re.sub("[…<>]", "x", text)  # placeholders
    text = re.sub(
        "python train.py", "lit-gptdata train", re.sub("torchrun .*-m lit_gptdata", "lit-gptdata", text)
    )
    found = re.findall("^lit-gptdata (?!train --config-dir).*$", text, re.MULTILINE)
    return [shlex.join(shlex.split(line, comments=True)) for line in dict.fromkeys(found)]


(EXAMPLE,), (RESUME,), (MIXTURE,), (INSPECT, PLACE), (TRAINED,) = (
    blocks(page, "python") for page in ("README", "resume", "mixtures", "inspect", "train")
)

# The examples have no checkpoint on their first start and use the default logger: Lightning warns.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_the_python_example_runs():
    assert "max_steps=200" in EXAMPLE
    names: dict[str, Any] = {}
    exec(EXAMPLE.replace("max_steps=200", "max_steps=2, limit_val_batches=1"), names)
    assert "windows of 256 every 128 tokens" in str(names["data"])
    inputs, targets = names["inputs"], names["targets"]
    assert inputs.shape == targets.shape == (4, 256)
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    assert names["stem"](inputs).shape == (4, 256, 256)


def test_the_mixture_example_runs(capsys):
    Path("notes.txt").write_text("A text that is only scored. " * 200)
    names: dict[str, Any] = {}
    exec(MIXTURE, names)
    assert set(names["names"]) <= {"prose", "code"}
    assert len(names["windows"]) == 4
    assert re.search("  notes .*'notes.txt' \\(val_corpus\\)", capsys.readouterr().out)


def test_the_resume_example_continues_after_a_kill(tmp_path, monkeypatch, capsys):
    setup = EXAMPLE[: EXAMPLE.index("L.Trainer")].replace("256", "32")
    fit = RESUME.replace(": 50", ": 4").replace("max_steps=200", "max_steps=12, limit_val_batches=1")
    assert fit.count("callbacks=saves") == 1
    fit = fit.replace("callbacks=saves", "callbacks=[Kill(), saves]")
    kill = """
import os, signal
class Kill(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        print(batch_idx, batch[0].sum().item(), flush=True)
        if batch_idx == 6 and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
"""
    script = "import lightning as L\nL.seed_everything(0)\n" + setup + kill + fit
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    uninterrupted.mkdir(), killed.mkdir()
    (uninterrupted / "killed").touch()

    def batches(folder: Path) -> list[str]:
        monkeypatch.chdir(folder)
        exec(script, {})
        return re.findall(r"^\d+ \d+$", capsys.readouterr().out, re.MULTILINE)

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        path = max((folder / "checkpoints").glob("last*.ckpt"), key=lambda p: p.stat().st_mtime)
        return torch.load(path, weights_only=True)["state_dict"]

    all_batches = batches(uninterrupted)
    assert len(all_batches) == 12
    command, env = [sys.executable, "-c", script], os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, cwd=killed, env=env).returncode == -signal.SIGKILL
    assert batches(killed) == all_batches[4:]
    expected, resumed = weights(uninterrupted), weights(killed)
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())

    names: dict[str, Any] = {"GPTDataModule": GPTDataModule, "GPT": GPT, "L": L}
    for code in (INSPECT, PLACE, TRAINED):
        exec(code.replace("outputs/…/checkpoints/last.ckpt", "checkpoints/last.ckpt"), names)
    assert f"3 {names['inputs'].sum()}" == all_batches[3]
    assert names["place"].source == names["data"].store.place(0).source
    assert names["losses"].shape == names["tokens"].shape == (4, 32)
    assert "\nThe value of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "number"),
    [
        (page, i)
        for page in ("text", "integrations", "windows")
        for i in range(len(blocks(page, "python")))
    ],
)
def test_every_other_python_example_runs(page, number):
    code = blocks(page, "python")[number]
    if "save_pretrained" in code:
        pytest.importorskip("safetensors")
    if not code.startswith("class GPTCLI"):  # test_lightning_cli.py compares this with the source
        exec(code, {"__name__": "__main__"})


def test_every_command_exists_and_so_do_its_options():
    for launcher in ("hydra_joblib_launcher", "hydra_submitit_launcher", "hydra_optuna_sweeper"):
        pytest.importorskip(f"hydra_plugins.{launcher}")
    known: set[str] = set()
    for line in commands():
        _, command, *words = shlex.split(line)
        assert command in {"--help", *COMMANDS}, line
        overrides = [word for word in words if re.match(r"\+?[a-z][\w./@]*=|~[a-z]", word)]
        found = {each.key_or_group: each for each in OverridesParser.create().parse_overrides(overrides)}
        if command in ("import", "generate", "score") or words[:1] == ["hf"] or found.keys() <= known:
            continue
        known |= found.keys()
        plain = []
        for name, override in found.items():
            if override.is_sweep_override():
                plain.append(f"{override.get_key_element()}={next(override.sweep_string_iterator())}")
            elif name not in ("step", "window"):
                plain.append(override.input_line)
        assert compose_config(plain), line


def test_the_reference_has_every_public_name_and_every_command():
    names = re.findall(r"^::: lit_gptdata\..*\.(\w+)$", PAGES["python"], re.MULTILINE)
    assert sorted(names) == sorted(lit_gptdata.__all__)
    assert re.findall(r"^\$ lit-gptdata ([\w-]+) --help", PAGES["commands"], re.MULTILINE) == [*COMMANDS]


def test_every_named_file_exists():
    paths = re.findall(r"`((?:lit_gptdata|conf)/[\w./]*)`", "".join(PAGES.values()))
    links = re.findall(r"\]\(([^)#:]+)\)", PAGES["README"])  # mkdocs checks the links of the other pages
    assert links
    assert paths
    for name in links + paths:
        assert (ROOT / name).exists() or "mine.yaml" in name, name
