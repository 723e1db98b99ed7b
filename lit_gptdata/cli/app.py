"""The Hydra app behind `lit-gptdata train` and `python train.py`: its help, its config, and its jobs."""

import argparse
import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lit_gptdata.cli.overrides import as_overrides
from lit_gptdata.cli.rerun import read_result
from lit_gptdata.configs import (
    all_options,
    conf_dir,
    default_groups,
    explain_flag,
    own_folders,
    register_resolvers,
    typed_command,
)

MORE = """more:
  -m                  a sweep: one job for each combination of values, such as data.max_length=32,64
  --cfg job           print the config instead of running it; with --resolve, without references ${…}
  +key=value          add an option that the class of a _target_ has: +trainer.limit_train_batches=10
  ~key                remove one: ~callbacks.progress
  model._target_=…    your own class: my_module.MyGPT, for my_module.py in the current folder
  --config-dir=DIR    more configs: DIR/model/mine.yaml for model=mine, of a class in DIR/my_module.py
  --config-path=DIR --config-name=config    run with the config.yaml of an earlier run in DIR
  --hydra-help        more about Hydra, such as shell completion
"""


def train(args: argparse.Namespace) -> None:
    """Train a GPT on a text, or run a sweep with -m."""
    # This is what the decorator @hydra.main does with sys.argv. Here sys.argv must not change, because
    # Lightning repeats it to start more processes.
    from hydra import version
    from hydra._internal.utils import _run_hydra, get_args_parser

    version.setbase("1.3")
    register_resolvers()
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(args.words)  # -m may be between two options
    args.overrides = as_overrides(args.overrides)
    if args.experimental_rerun:
        raise ValueError("--experimental-rerun has no effect: use lit-gptdata rerun DIR")
    if args.config_path is not None:
        args.config_path = os.path.abspath(args.config_path)
    hydra = partial(_run_hydra, args, parser, run_job, str(conf_dir()), "train")
    if args.cfg or args.info or args.hydra_help or args.shell_completion:  # without importing torch
        hydra()
        if args.cfg == "job":
            print("# Also: experiment=…, debug=…, +sweep=… with -m, and new options, +key=…; see --help")
        return
    if sys.stdout.isatty():
        print("loading torch and Lightning …", flush=True)
    from lit_gptdata.training.folder import share_run_name
    from lit_gptdata.training.sweep import report_at_end

    share_run_name()
    with report_at_end():
        hydra()


def run_job(cfg: Any) -> float:
    """Run one job; return the final loss, which a sweeper minimizes."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    # For model._target_=my_module.MyGPT. A job may run in a new process, which a launcher has started.
    for path in (hydra.runtime.cwd, *own_folders(hydra)):
        sys.path += [] if path in sys.path else [path]
    if os.environ.get("LIT_GPTDATA_UNFINISHED"):  # set by lit-gptdata rerun
        result = read_result(Path(hydra.runtime.output_dir))
        if result.get("overrides", hydra.overrides.task) != hydra.overrides.task:
            raise ValueError(f"the sweep has changed: this job was {result['overrides']}")
        if result.get("status") == "completed":
            return math.nan
    from lit_gptdata.cli.train import main

    return main(cfg)


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{explain_flag(message)} (--help describes all options)")


def describe_options(parser: argparse.ArgumentParser) -> None:
    """Put all options into the help of a parser: the files in conf/, and their comments."""
    command = " ".join(typed_command()[:2])
    parser.prog, parser.usage, parser.epilog = command, f"{command} [-m] [TEXT …] [key=value …]", MORE
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
    top = (conf_dir() / "train.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    parser.description = re.sub("^# ?", "", top, flags=re.MULTILINE).replace("python train.py", command)
    section = parser.add_argument_group("configs to choose from: each sets several options")
    for group in (*default_groups(), "experiment", "debug", "sweep"):
        for path in sorted(conf_dir().glob(f"{group}/*.yaml")):
            about = re.findall("^# ([^@].*)", path.read_text(encoding="utf-8"), re.MULTILINE)[0]
            about = re.sub("(:|:? python train.py .*)$", "", about)
            section.add_argument(f"{'+' if group == 'sweep' else ''}{group}={path.stem}", help=about)
    for title, options in all_options().items():
        section = parser.add_argument_group(title or "the run")
        for key, (value, comment) in options.items():
            if comment:
                section.add_argument(f"{key}={value}".rstrip("="), help=comment.replace("%", "%%"))
