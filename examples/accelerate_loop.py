"""A Hugging Face model in a loop of accelerate, with an exact resume.

python examples/accelerate_loop.py
accelerate launch --num-processes 2 examples/accelerate_loop.py
"""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import GPT2Config, GPT2LMHeadModel

from lit_gptdata import GPTDataModule

STEPS, SAVE_EVERY = 60, 5
FOLDER = Path("accelerate")

accelerator = Accelerator(cpu=not torch.cuda.is_available())
data = GPTDataModule(corpus="sample", max_length=64, stride=64, batch_size=4, batch_format="hf")
with accelerator.main_process_first():
    data.prepare_data()
data.setup()
ours = data.train_dataloader()

set_seed(0)
size = {"n_positions": data.max_length, "n_embd": 16, "n_layer": 1, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(vocab_size=data.vocab_size, **size))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, ours)
accelerator.register_for_checkpointing(ours)  # the loader that we made has the position
step = max((int(path.name) for path in FOLDER.glob("[0-9]*")), default=0)
if step:
    accelerator.load_state(FOLDER / str(step))  # continues with the next window

while step < STEPS:
    for batch in loader:  # one pass is one epoch
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % SAVE_EVERY == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
            accelerator.save_state(FOLDER / "unfinished")
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                os.rename(FOLDER / "unfinished", FOLDER / str(step))  # a kill leaves no partial folder
            accelerator.wait_for_everyone()
        if step == STEPS:
            break
accelerator.end_training()
