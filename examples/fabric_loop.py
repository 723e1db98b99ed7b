"""Lightning Fabric: your own loop, on any number of devices.

python examples/fabric_loop.py
torchrun --nproc-per-node 2 examples/fabric_loop.py
"""

import os
from pathlib import Path

import lightning as L
import torch
from torch.nn import functional as F

from lit_gptdata import GPT, EmbeddingStem, GPTDataModule

STEPS, SAVE_EVERY = 60, 5
CHECKPOINT = Path("fabric.ckpt")

fabric = L.Fabric(devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
fabric.launch()
fabric.seed_everything(0)
data = GPTDataModule(corpus="sample", max_length=64, stride=64, batch_size=4)
if fabric.local_rank == 0:
    data.prepare_data()  # once on each machine
fabric.barrier()
data.setup()
ours = data.train_dataloader()
loader = fabric.setup_dataloaders(ours)

model = GPT(EmbeddingStem(data.vocab_size, data.max_length, embedding_dim=16), n_layers=1, n_heads=2)
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
state = {"model": model, "optimizer": optimizer, "data": ours.state_dict(), "step": 0}
if CHECKPOINT.exists():
    fabric.load(CHECKPOINT, state)
    ours.load_state_dict(state["data"])  # continues with the next batch

while state["step"] < STEPS:
    for inputs, targets in loader:  # int64 (B, T); one pass is one epoch
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        if state["step"] % SAVE_EVERY == 0:
            fabric.print(f"step {state['step']}: loss {loss.item():.3f}")
            state["data"] = ours.state_dict()
            fabric.save("unfinished.ckpt", state)
            if fabric.is_global_zero:
                os.replace("unfinished.ckpt", CHECKPOINT)  # a kill never leaves half a checkpoint
        if state["step"] == STEPS:
            break
