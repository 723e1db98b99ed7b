"""LitGPT's pretraining on our batches. Its own command line takes the same data:

litgpt pretrain pythia-14m --data lit_gptdata.interop.litgpt.LitGPTData --data.tokenizer gpt2

python examples/litgpt_pretrain.py pythia-14m
torchrun --nproc-per-node 2 examples/litgpt_pretrain.py pythia-14m
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than a run of seconds

import lightning as L
from litgpt import Config
from litgpt.args import EvalArgs, TrainArgs
from litgpt.pretrain import main
from litgpt.utils import choose_logger

from lit_gptdata.interop.litgpt import LitGPTData

LENGTH, STEPS = 32, 60
OUT = Path("litgpt")

devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
logger = choose_logger("csv", OUT, name="pretrain")
fabric = L.Fabric(devices=devices, loggers=logger)
fabric.launch()
main(
    fabric=fabric,
    devices=devices,
    seed=0,
    initial_checkpoint_dir=None,
    resume="auto",  # from the newest checkpoint in OUT/step-…, with the next batch
    # The model is an argument of this script, because LitGPT's checkpoints keep the command line.
    config=Config.from_name(sys.argv[1], n_layer=1, n_embd=16, n_head=2, block_size=LENGTH),
    data=LitGPTData(tokenizer="gpt2", corpus="sample"),
    out_dir=OUT,
    tokenizer_dir=None,
    tokenizer=None,
    train=TrainArgs(
        micro_batch_size=4,
        global_batch_size=4 * devices,
        max_tokens=STEPS * 4 * devices * LENGTH,
        save_interval=5,
        lr_warmup_steps=5,
        max_norm=1.0,
    ),
    eval=EvalArgs(interval=20, max_iters=4),
    optimizer="AdamW",
)
