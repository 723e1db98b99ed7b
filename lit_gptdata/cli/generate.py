"""The command that continues a prompt with a trained model."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lit_gptdata._checks import accepted, check_integer
from lit_gptdata.cli.overrides import split_options

if TYPE_CHECKING:
    from lit_gptdata.tokens.tokenizer import Tokenizer

OPTIONS = {"max_new_tokens": 100, "temperature": 0.8, "top_k": 50, "seed": 0, "n": 1, "tokenizer": None}
HELP = """options of the form name=value:
  max_new_tokens=100   tokens to append; the end-of-text token ends a sample early
  temperature=0.8      0 takes the most likely token; 1 draws with the model's probabilities
  top_k=50             draw from this number of most likely tokens; null: from all
  seed=0               of the first sample; the second one has seed + 1
  n=1                  number of samples
  tokenizer=…          instead of the tokenizer that the checkpoint names
"""


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, HELP
    parser.add_argument("ckpt", metavar="CKPT", help="the .ckpt file of a run, or the folder of a run")
    words = "a text in quotes, or - for standard input; without one, the text starts with end-of-text"
    parser.add_argument("words", nargs="*", metavar="PROMPT or name=value", help=words)


def generate(args: argparse.Namespace) -> None:
    """Continue a prompt with the model of a checkpoint."""
    import torch

    prompts, options = split_options(args.words, OPTIONS)
    if len(prompts) > 1:
        raise ValueError(f"got {len(prompts)} prompts, {prompts}: put the prompt in quotes")
    text = prompts[0] if prompts else ""
    text = sys.stdin.read().removesuffix("\n") if text == "-" else text
    n, seed = check_integer("n", options.pop("n"), 1), check_integer("seed", options.pop("seed"), 0)
    model, tokenizer = load_run(args.ckpt, options.pop("tokenizer"))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if getattr(model, "generate", None) is None:
        raise TypeError(f"{type(model).__name__} has no method generate: add one, as in lit_gptdata.GPT")
    prompt = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt += tokenizer.encode(text)
    if not prompt or getattr(model, "document_mask", False):  # it has learned that documents start so
        prompt.insert(0, tokenizer.end_of_document)
    n_new, takes = options.pop("max_new_tokens"), accepted(model.generate)
    inputs, n_characters = torch.tensor([prompt], device=model.device), len(tokenizer.decode(prompt))
    for number in range(seed, seed + n):
        torch.manual_seed(number)  # for a foreign model, which may take no generator
        options["generator"] = torch.Generator(model.device).manual_seed(number)
        given = {name: value for name, value in options.items() if name in takes}
        with torch.no_grad():
            (ids,) = model.generate(inputs, n_new, **given).tolist()
        if tokenizer.separator in ids[len(prompt) :]:
            ids = ids[: ids.index(tokenizer.separator, len(prompt))]
        title = f"\n--- seed={number}\n" if number > seed else ""
        print(f"{title}{text}{tokenizer.decode(ids)[n_characters:]}", flush=True)


def read_checkpoint(ckpt: str) -> tuple[Path, dict[str, Any], Any]:
    """The file of a checkpoint, its content, and the config.yaml of its run, which may be empty.

    `ckpt`: a file of train.py or LightningCLI, or the folder of a run. Raises FileNotFoundError and
    ValueError.
    """
    from omegaconf import OmegaConf

    from lit_gptdata.training.folder import load_checkpoint

    file = find_checkpoint(Path(str(ckpt)).expanduser())  # ckpt=3 is read as a number
    content = load_checkpoint(file, {"state_dict"}, "give the .ckpt file or the folder of a run")
    config = file.absolute().parents[1] / "config.yaml"
    return file, content, OmegaConf.load(config) if config.is_file() else OmegaConf.create()


def load_run(ckpt: str, tokenizer: Any = None) -> tuple[Any, Tokenizer]:
    """The model of a checkpoint, in eval mode on the CPU, and its data's tokenizer.

    Raises the errors of `read_checkpoint` and of `Tokenizer`.
    """
    return load_model(*read_checkpoint(ckpt), tokenizer)


def load_model(
    file: Path, content: dict[str, Any], cfg: Any, tokenizer: Any = None
) -> tuple[Any, Tokenizer]:
    """`load_run` for what `read_checkpoint` returned."""
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    config = file.absolute().parents[1] / "config.yaml"
    found = find_tokenizer(content.get("datamodule_hyper_parameters", {}), tokenizer, config.parent)
    name = OmegaConf.select(cfg, "model._target_") or OmegaConf.select(cfg, "model.class_path")
    folders = OmegaConf.select(cfg, "hydra.searchpath") or []  # of --config-dir
    sys.path += [os.getcwd(), *(url.removeprefix("file://") for url in folders)]
    stem = OmegaConf.select(cfg, "stem._target_") or "lit_gptdata.EmbeddingStem"
    try:
        kind: Any = get_class(name or "lit_gptdata.GPT")
        get_class(stem)  # loading a checkpoint imports no stem
    except ImportError as error:
        raise ValueError(f"{config}: {error}. Put the folder of the module on PYTHONPATH") from error
    try:
        model = kind.load_from_checkpoint(file, map_location="cpu", weights_only=True)
    except TypeError as error:  # it has not saved its arguments
        if "data" not in cfg:
            raise ValueError(f"{file} is not of GPT, and has no config.yaml of its run") from error
        from lit_gptdata.cli.train import build_model

        length = cfg.data.max_length
        sizes = SimpleNamespace(vocab_size=found.vocab_size, max_length=length, eot=found.separator)
        model = build_model(cfg, sizes)  # type: ignore[arg-type]
        model.load_state_dict(content["state_dict"])
    return model.eval(), found


def find_checkpoint(path: Path) -> Path:
    """The file, or the one to resume from in the folder of a run: last.ckpt, or else the newest."""
    if path.is_dir() and not (path / "meta.pt").exists():
        found = [*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")]
        if not found:
            raise FileNotFoundError(f"{path} has no .ckpt file: give the folder of a run, outputs/…")
        path = max(found, key=lambda file: (file.name == "last.ckpt", file.stat().st_mtime))
    if path.is_dir():  # the tool of lightning.pytorch fails with the parts that trainer=fsdp saves
        command = f"python -m lightning.fabric.utilities.consolidate_checkpoint {shlex.quote(str(path))}"
        raise ValueError(f"{path} has the parts of a checkpoint. Make one file of them: {command}")
    path.stat()  # raises FileNotFoundError
    return path


def find_tokenizer(hparams: Mapping[str, Any], given: Any, run: Path) -> Tokenizer:
    """The tokenizer `given`, or else the data module's; its file may be in the folder of the `run`."""
    from lit_gptdata.tokens.tokenizer import Tokenizer

    if (name := given or hparams.get("tokenizer")) is None:
        raise ValueError("the checkpoint names no tokenizer: give tokenizer=…, such as tokenizer=gpt2")
    path, _, digest = str(name).partition("#")
    if digest and not Path(path).exists() and (kept := run / Path(path).name).exists():
        name = f"{kept}#{digest}"  # the folder of the run has moved
    names = ("special_tokens", "end_of_document", "bos")
    policy = {option: hparams[option] for option in names if option in hparams}
    try:
        return Tokenizer(name, **policy, data_dir=Path(hparams.get("data_dir", "data")))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. If it is elsewhere, give tokenizer=…") from None
