"""Hugging Face's Trainer on our windows, with an exact resume.

python examples/hf_trainer.py
torchrun --nproc-per-node 2 examples/hf_trainer.py
"""

import json
from pathlib import Path

import torch
import transformers as hf

from lit_gptdata import GPTDataModule

STEPS, SAVE_EVERY = 60, 5


class SavePosition(hf.TrainerCallback):
    """Save the loader's position into each checkpoint, as its last file."""

    def on_save(self, args, state, control, **kwargs):
        args.distributed_state.wait_for_everyone()  # every rank has written its part of the checkpoint
        if state.is_world_process_zero:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", "position.json")
            path.with_suffix(".unfinished").write_text(json.dumps(loader.state_dict()))
            path.with_suffix(".unfinished").rename(path)


class WindowTrainer(hf.Trainer):
    """Reads our loader as it is. It knows its rank, so accelerate need not divide its batches."""

    def get_train_dataloader(self):
        return loader


data = GPTDataModule(corpus="sample", max_length=64, stride=64, batch_size=4, batch_format="hf")
args = hf.TrainingArguments(
    "hf", max_steps=STEPS, save_steps=SAVE_EVERY, save_total_limit=2, logging_steps=SAVE_EVERY,
    learning_rate=1e-3, report_to="none", disable_tqdm=True, per_device_train_batch_size=data.batch_size,
    use_cpu=not torch.cuda.is_available(),  # without it, two processes on CPUs train two models
    ignore_data_skip=True,  # the loader continues with the next window
)  # fmt: skip
if args.use_cpu:  # the Trainer loads the optimizer to "cpu:0", which torch.load does not know
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, place: storage if place == "cpu:0" else None
    )
with args.main_process_first():
    data.prepare_data()
data.setup()
loader = data.train_dataloader()
complete = Path(args.output_dir).glob("checkpoint-*/position.json")
last = max(complete, key=lambda path: int(path.parent.name.split("-")[1]), default=None)
if last:
    loader.load_state_dict(json.loads(last.read_text()))

hf.set_seed(0)
size = {"n_positions": data.max_length, "n_embd": 16, "n_layer": 1, "n_head": 2}
model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=data.vocab_size, **size))
trainer = WindowTrainer(model, args, callbacks=[SavePosition])
trainer.train(resume_from_checkpoint=last and str(last.parent))
# Otherwise a thread of gloo may still free the tensors of the last gather while Python exits: it aborts.
trainer.accelerator.wait_for_everyone()
