"""Train a GPT on raw text: `python train.py`. `python train.py --help` describes all options."""

import sys

from lit_gptdata.cli.main import main

if __name__ == "__main__":  # shell completion looks for the text @hydra.main in this file
    raise SystemExit(main(["train", *sys.argv[1:]]))
