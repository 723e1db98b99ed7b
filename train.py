"""Train a GPT on raw text: `python train.py`. `python train.py --help` lists all options."""

import sys

from lit_gptdata.cli.train import run

if __name__ == "__main__":
    run(sys.argv[1:])  # a Hydra app; its shell completion looks for the text @hydra.main in this file
