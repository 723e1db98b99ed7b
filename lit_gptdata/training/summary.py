"""What a run leaves for people: a table of figures, a sampled line, a picture of the losses."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from lit_gptdata._fsspec import redacted
from lit_gptdata.datamodule import GPTDataModule
from lit_gptdata.model.gpt import GPT

PROMPT_TOKENS = 8
SAMPLED_TOKENS = 32


def summarise(data: GPTDataModule, model: GPT, metrics: dict[str, Any], folder: Path) -> str:
    """The closing summary as text: data, model, figures, a sample and where the files are."""
    store = data.store
    windows = {name: len(getattr(data, f"{name}_windows")) for name in ("train", "val", "test")}
    corpus = redacted(data.hparams["store_url"] or data.hparams["corpus"])
    rows = {
        "corpus": f"{corpus} ({store.n_documents:,} documents, {store.n_bytes:,} bytes)",
        "tokens": f"{store.n_tokens:,} of {store.vocab_size:,} ({data.tokenizer.name})",
        "windows": ", ".join(f"{count:,} {name}" for name, count in windows.items() if count)
        + f", {data.hparams['max_length']} tokens each",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "tokens/s": _number(metrics.get("tokens_per_second"), ",.0f"),
    }
    for split in ("val", "test"):
        if f"{split}_loss" in metrics:
            rows[f"{split} loss"] = _number(metrics[f"{split}_loss"], ".4f") + " nats a token"
            rows[f"{split} perplexity"] = _number(metrics.get(f"{split}_perplexity"), ",.1f")
            rows[f"{split} bits/byte"] = _number(metrics.get(f"{split}_bits_per_byte"), ".4f")
    if "val_loss" not in metrics:
        rows["train loss"] = _number(metrics.get("train_loss"), ".4f") + " nats a token"
    prompt, continuation = sample_line(data, model)
    rows["sample"] = f"{prompt!r} → {continuation!r}"
    rows["folder"] = str(folder)
    return "\n".join(f"{name:<15} {value}" for name, value in rows.items())


def sample_line(data: GPTDataModule, model: GPT) -> tuple[str, str]:
    """The beginning of the first val (else train) window, and what the model makes of it."""
    windows = data.val_windows if len(data.val_windows) else data.train_windows
    inputs, _ = windows[0]
    prompt = inputs[:PROMPT_TOKENS]  # (T,)
    ids = model.generate(
        prompt[None],
        SAMPLED_TOKENS,
        temperature=0.8,
        top_k=50,
        generator=torch.Generator(model.device).manual_seed(0),
    )[0].tolist()
    known = len(prompt)
    return data.tokenizer.decode(ids[:known]), data.tokenizer.decode(ids[known:])


def draw_losses(metrics_csv: Path, picture: Path) -> None:
    """Draw train and val loss over optimizer steps, from Lightning's metrics.csv to a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    with open(metrics_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    # Lightning writes the number of the last step where it validates while it fits, and how many
    # steps there were where it validates before or after: 0 based, then 1 based.
    last = max((int(row["step"]) + 1 for row in rows if row.get("train_loss")), default=0)
    for name, style in (("train_loss", {"alpha": 0.6}), ("val_loss", {"marker": "o"})):
        points = {min(int(row["step"]) + 1, last): float(row[name]) for row in rows if row.get(name)}
        if points:
            axes.plot(list(points), list(points.values()), label=name.replace("_", " "), **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def _number(value: Any, form: str) -> str:
    return "not measured" if value is None else format(float(value), form)
