"""Plain PyTorch: DistributedDataParallel, started by torchrun on one machine or more.

torchrun --nproc-per-node 2 examples/ddp_loop.py
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lit_gptdata import GPT, EmbeddingStem, GPTDataModule

STEPS, SAVE_EVERY = 60, 5
CHECKPOINT = Path("ddp.ckpt")

dist.init_process_group()  # before the first batch: the loader takes its rank from here
local_rank = int(os.environ["LOCAL_RANK"])
device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
data = GPTDataModule(corpus="sample", max_length=64, stride=64, batch_size=4)
if local_rank == 0:
    data.prepare_data()  # once on each machine
dist.barrier()
data.setup()
loader = data.train_dataloader()  # reads this rank's windows, without a DistributedSampler

torch.manual_seed(0)
stem = EmbeddingStem(data.vocab_size, data.max_length, embedding_dim=16)
model = DistributedDataParallel(GPT(stem, n_layers=1, n_heads=2).to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
step = 0
if CHECKPOINT.exists():
    saved = torch.load(CHECKPOINT, map_location=device, weights_only=True)
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loader.load_state_dict(saved["loader"])  # continues with the next batch
    step = saved["step"]

while step < STEPS:
    for inputs, targets in loader:  # int64 (B, T); one pass is one epoch
        logits = model(inputs.to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if (
            step % SAVE_EVERY == 0 and dist.get_rank() == 0
        ):  # the loader's state is the same on all ranks
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
            saved = {"model": model.module, "optimizer": optimizer, "loader": loader}
            saved = {name: part.state_dict() for name, part in saved.items()} | {"step": step}
            torch.save(saved, "unfinished.ckpt")
            os.replace("unfinished.ckpt", CHECKPOINT)  # a kill never leaves half a checkpoint
        if step == STEPS:
            break
dist.destroy_process_group()
