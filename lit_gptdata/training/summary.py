"""The results of a finished run: final metrics, a table of results, a generated text and a plot."""

import csv
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_gptdata._fsspec import redacted
from lit_gptdata._io import write_whole
from lit_gptdata.datamodule import GPTDataModule
from lit_gptdata.training.val_sets import coverage

PROMPT_TOKENS = 8
GENERATED_TOKENS = 32
Metrics = Mapping[str, Any]


def evaluate(trainer: Any, model: Any, data: GPTDataModule, *splits: str) -> dict[str, float]:
    """Return the metrics of "val" and "test", as far as the data has the split and the model a step."""
    metrics: dict[str, float] = {}
    fractions = zip(*(source.fractions for source in data.sources.values()), strict=True)
    has_val, has_test = map(any, fractions)  # known before the data is prepared
    runs = {
        "val": (has_val or data.hparams["val_corpus"], "validation_step", trainer.validate),
        "test": (has_test, "test_step", trainer.test),
    }
    for has_split, step, run in map(runs.__getitem__, splits):
        if has_split and is_overridden(step, model):
            for found in run(model, datamodule=data, verbose=False):  # none if the split is empty
                metrics |= found
    return metrics


def save_summary(trainer: Any, model: Any, data: GPTDataModule, metrics: Metrics, folder: Path) -> None:
    """Write loss.png and summary.txt, and print the summary. A part that fails is named, not raised."""
    try:  # on all ranks, because each may hold a part of the model
        summary = summarize(data, model, metrics, folder)
    except Exception as error:
        summary = f"no summary: {type(error).__name__}: {error}"
    if not trainer.is_global_zero:
        return
    try:
        if (folder / "metrics.csv").exists():
            plot_losses(folder / "metrics.csv", folder / "loss.png")
    except Exception as error:
        summary += f"\nno loss.png: {type(error).__name__}: {error}"
    print(f"\n{summary}")
    write_whole(folder / "summary.txt", f"{summary}\n".encode(errors="backslashreplace"))


def summarize(data: GPTDataModule, model: Any, metrics: Metrics, folder: Path) -> str:
    """Return a text table of the data, the model, its metrics, a generated text and the run's folder."""
    stores = [source.store for source in data.sources.values()]
    n_documents, n_bytes, n_tokens = (
        sum(getattr(store, name) for store in stores) for name in ("n_documents", "n_bytes", "n_tokens")
    )
    windows = {name: len(getattr(data, f"{name}_windows")) for name in ("train", "val", "test")}
    window_counts = ", ".join(f"{count:,} {name}" for name, count in windows.items() if count)
    corpus = data.hparams["store_url"] or data.hparams["corpus"]
    corpus = ", ".join(corpus) if isinstance(corpus, dict) else redacted(corpus)
    covers = [source.split.val_sources for source in data.sources.values() if not source.name]
    covers = list(filter(None, [*covers, coverage(data, model)]))
    rows = {
        "corpus": f"{corpus} ({n_documents:,} documents, {n_bytes:,} bytes)",
        **_source_rows(data, metrics),
        "tokens": f"{n_tokens:,} of {data.vocab_size:,} ({data.tokenizer.name})",
        "windows": f"{window_counts}, {data.max_length} tokens each",
        **({"val covers": "; ".join(covers)} if covers else {}),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "tokens/s": _number(metrics.get("tokens_per_second"), ",.0f"),
    }
    for split in ("val", "test"):
        if f"{split}_loss" in metrics:
            rows[f"{split} loss"] = _number(metrics[f"{split}_loss"], ".4f") + " nats per token"
            rows[f"{split} perplexity"] = _number(metrics.get(f"{split}_perplexity"), ",.1f")
            rows[f"{split} bits/byte"] = _number(metrics.get(f"{split}_bits_per_byte"), ".4f")
    if "val_loss" not in metrics:
        rows["train loss"] = _number(metrics.get("train_loss"), ".4f") + " nats per token"
    losses = {name: metrics[name] for name in ("train_loss", "val_loss", "test_loss") if name in metrics}
    if bad := ", ".join(f"{name} is {x:g}" for name, x in losses.items() if not math.isfinite(x)):
        rows["warning"] = f"{bad}: lower model.learning_rate or raise model.warmup_steps"
    try:
        prompt, continuation = generate_sample(data, model)
        rows["sample"] = f"{prompt!r} → {continuation!r}"
    except Exception as error:
        rows["sample"] = f"none: {error}"
    rows["folder"] = str(folder)
    return "\n".join(f"{name:<15} {value}" for name, value in rows.items())


def _source_rows(data: GPTDataModule, metrics: Metrics) -> dict[str, str]:
    """One row for each source with a name."""
    rows = {}
    for source in (each for each in data._data.all if each.name):
        row = f"{redacted(source.text.name)}, {source.store.n_tokens:,} tokens"
        row += "" if source.weight is None else f", weight {source.weight:g}"
        loss = metrics.get(f"val_loss/{source.name}")
        rows[f"  {source.name}"] = row + ("" if loss is None else f", val loss {loss:.4f}")
    return rows


def generate_sample(data: GPTDataModule, model: Any) -> tuple[str, str]:
    """Return the start of the first val (or train) window as a prompt, and the model's continuation."""
    if getattr(model, "generate", None) is None:
        raise TypeError(f"{type(model).__name__} has no method generate")
    inputs, _ = (data.val_windows if len(data.val_windows) else data.train_windows)[0]
    prompt = inputs[None, :PROMPT_TOKENS]  # (1, T)
    generator = torch.Generator(model.device).manual_seed(0)
    (ids,) = model.generate(prompt, GENERATED_TOKENS, 0.8, top_k=50, generator=generator).tolist()
    n = prompt.shape[1]
    return data.tokenizer.decode(ids[:n]), data.tokenizer.decode(ids[n:])


def plot_losses(metrics_csv: Path, png: Path) -> None:
    """Plot the train and val loss over optimizer steps, from Lightning's metrics.csv to a PNG file."""
    from matplotlib.figure import Figure  # not pyplot, which has global state and needs a display

    with open(metrics_csv, newline="") as file:
        rows = list(reader := csv.DictReader(file))
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    # Lightning's `step` is the last step's index during the fit, and the number of steps outside it.
    n_steps = max((int(row["step"]) + 1 for row in rows if row.get("train_loss")), default=0)
    for name in filter(re.compile("train_loss$|val_loss(/|$)").match, reader.fieldnames or []):
        style: Any = {"alpha": 0.6} if name == "train_loss" else {"marker": "o"}
        points = {min(int(row["step"]) + 1, n_steps): float(row[name]) for row in rows if row.get(name)}
        if points:
            axes.plot(*zip(*sorted(points.items()), strict=True), label=name.replace("_", " "), **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(buffer := io.BytesIO(), dpi=120)
    write_whole(png, buffer.getbuffer())


def _number(value: Any, format_spec: str) -> str:
    return "not measured" if value is None else format(float(value), format_spec)
