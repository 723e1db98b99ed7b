"""The command that writes the loss of each document of a split, or of another text."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from lit_gptdata._checks import accepted, check_choice, check_integer
from lit_gptdata._io import is_terminal
from lit_gptdata.cli.generate import load_model, read_checkpoint
from lit_gptdata.cli.overrides import as_overrides, compose_config, split_options

OPTIONS = {"split": None, "output": None, "min_tokens": 32}
SPLITS = ("val", "test", "train", "all")
HELP = """options of the form name=value:
  split=val            val | test | train | all; with another text, the default is all
  output=scores.csv    .csv or .parquet; default: a .csv file next to the checkpoint
  min_tokens=32        tokens of a document in the lists and the picture; the file has all documents
  data.eval_windows=documents   score each document from its start, without the text before it
  trainer.devices=2    and other options of the Trainer
"""


def score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, HELP
    parser.add_argument("ckpt", metavar="CKPT", help="the .ckpt file of a run, or the folder of a run")
    words = "another text to score, and options; without a text, the data of the run is scored"
    parser.add_argument("words", nargs="*", metavar="TEXT or key=value", help=words)


def score(args: argparse.Namespace) -> None:
    """Write the loss of each document, and print the documents with the highest loss."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from lit_gptdata.cli.train import keep_memory
    from lit_gptdata.report.documents import check_output
    from lit_gptdata.report.scoring import DocumentScores, ScoredData, check_model

    words, options = split_options(args.words, OPTIONS)
    file, content, cfg = read_checkpoint(args.ckpt)
    overrides = as_overrides(words)
    precision = OmegaConf.select(cfg, "trainer.precision") or "32-true"
    defaults = ["trainer.accelerator=auto", f"++trainer.precision={precision}"]
    composed = compose_config([*defaults, *overrides])
    given = data_options(composed, overrides)
    is_other = bool(given.keys() & {"corpus", "store_url"})
    split = check_choice("split", options["split"] or ("all" if is_other else "val"), SPLITS)
    output = Path(options["output"] or file.with_name(f"{file.stem}-scores-{split}.csv"))
    check_output(output := output.expanduser().absolute())
    min_tokens = check_integer("min_tokens", options["min_tokens"], 0, "tokens of a document in lists")

    saved = content.get("datamodule_hyper_parameters", {})
    if not (saved or is_other):
        raise ValueError(f"{file} names no data: give a text, such as lit-gptdata score {file} books/")
    if is_other:  # these belong to the text of the run
        saved |= dict.fromkeys(("store_url", "val_corpus", "stages"))
    saved |= {"batch_schedule": None, "drop_padded": False, "windows": "sliding"}
    model, tokenizer = load_model(file, content, cfg, given.pop("tokenizer", None))
    check_model(model)
    takes = accepted(ScoredData)
    arguments = {name: value for name, value in (saved | given).items() if name in takes}
    data = ScoredData(**arguments | {"tokenizer": tokenizer.location})
    data.scored = split

    status = file.stat()
    devices = [str(composed.trainer.get(key)) for key in ("accelerator", "precision", "strategy")]
    origin = [str(file.resolve()), status.st_size, status.st_mtime_ns, *devices]
    callback = DocumentScores(output, min_tokens, origin)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel("WARNING")  # no tips
    trainer: Any = instantiate(
        composed.trainer, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=is_terminal(sys.stdout),
    )  # fmt: skip
    keep_memory()
    trainer.predict(model, datamodule=data, return_predictions=False)


def data_options(cfg: Any, overrides: list[str]) -> dict[str, Any]:
    """The options of the data module that the overrides of `cfg` set, in plain values."""
    from omegaconf import OmegaConf

    keys = [word.lstrip("+").partition("=")[0] for word in overrides]
    for word, key in zip(overrides, keys, strict=True):
        if key.partition(".")[0] not in ("data", "trainer"):
            problem = f"{word} has no effect, because the model is the checkpoint's"
            raise ValueError(f"{problem}. Give data.…, trainer.…, or one of {', '.join(OPTIONS)}")
    values: Any = OmegaConf.to_container(cfg.data, resolve=True)
    names = {key.split(".")[1] if "." in key else "corpus" for key in keys if key.startswith("data")}
    return {name: value for name, value in values.items() if name in names}
