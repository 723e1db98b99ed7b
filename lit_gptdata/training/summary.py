"""The results of a finished run: final metrics, a table of results, a generated text and a plot."""

import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lit_gptdata._fsspec import redacted
from lit_gptdata._io import write_whole
from lit_gptdata.configs import SPLITS, find_loss
from lit_gptdata.datamodule import GPTDataModule
from lit_gptdata.report.jobs import read_columns
from lit_gptdata.training.val_sets import coverage

PROMPT_TOKENS = 8
GENERATED_TOKENS = 64
SHOWN_CHARACTERS = 120
Metrics = Mapping[str, Any]


def evaluate(
    trainer: Any, model: Any, data: GPTDataModule, *splits: str, monitor: str | None = None
) -> dict[str, float]:
    """Return the metrics of "val" and "test", as far as the data has the split and the model a step.

    The losses are named val_loss and test_loss. Raises ValueError if the model does not log `monitor`.
    """
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
                metrics |= name_losses(found, monitor)
                if monitor and step == "validation_step" and monitor not in found:
                    problem = f"monitor must be a name that the model logs, got {monitor}"
                    raise ValueError(f"{problem}: it logs {', '.join(found)}")
            if trainer.received_sigterm:  # in the last batch, after which Lightning ignores it
                raise SIGTERMException
    return metrics


def name_losses(metrics: Metrics, monitor: str | None = None) -> dict[str, float]:
    """Return the metrics, in which the model's losses are train_loss, val_loss and test_loss."""
    found = {name: value for name, value in metrics.items() if name != "loss"}  # of which split?
    for split in SPLITS:
        if (name := find_loss(found, split, monitor)) is not None:
            found[f"{split}_loss"] = found[name] if name == monitor else found.pop(name)
    return found


def save_summary(
    trainer: Any, model: Any, data: GPTDataModule, metrics: Metrics, folder: Path, rows: dict[str, str],
    monitor: str | None = None,
) -> None:  # fmt: skip
    """Write loss.png and summary.txt, and print the summary, which ends with `rows`.

    A part that fails is named, not raised.
    """
    try:  # on all ranks, because each may hold a part of the model
        summary = summarize(data, model, metrics, rows)
    except Exception as error:
        summary = f"no summary: {type(error).__name__}: {error}"
    if not trainer.is_global_zero:
        return
    try:
        if (folder / "metrics.csv").exists():
            plot_losses(folder / "metrics.csv", folder / "loss.png", monitor)
    except Exception as error:
        summary += f"\nno loss.png: {type(error).__name__}: {error}"
    print(f"\n{summary}")
    write_whole(folder / "summary.txt", f"{summary}\n".encode(errors="backslashreplace"))


def summarize(data: GPTDataModule, model: Any, metrics: Metrics, last_rows: dict[str, str]) -> str:
    """Return a text table of the data, the model, its metrics, generated texts and `last_rows`."""
    stores = [source.store for source in data.sources.values()]
    n_documents, n_bytes, n_tokens = (
        sum(getattr(store, name) for store in stores) for name in ("n_documents", "n_bytes", "n_tokens")
    )
    kinds = {"train": data.windows, "val": data.eval_windows, "test": data.eval_windows}
    titles = {name: name if kind == "sliding" else f"{name} ({kind})" for name, kind in kinds.items()}
    counts = {name: len(getattr(data, f"{name}_windows")) for name in titles}
    window_counts = ", ".join(f"{n:,} {titles[name]}" for name, n in counts.items() if n)
    corpus = data.hparams["store_url"] or data.hparams["corpus"]
    corpus = ", ".join(corpus) if isinstance(corpus, dict) else redacted(corpus)
    covers = [source.split.val_sources for source in data.sources.values() if not source.name]
    covers = list(filter(None, [*covers, coverage(data, model)]))
    rows = {
        "corpus": f"{corpus} ({n_documents:,} documents, {n_bytes:,} bytes)",
        **_source_rows(data, metrics),
        "tokens": f"{n_tokens:,}, vocabulary of {data.vocab_size:,} ({data.tokenizer.name})",
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
        rows["warning"] = f"{bad}: lower model.learning_rate or raise model.warmup_tokens"
    prompt, after = sample(data, model)
    if prompt:
        before = {"before training": ""}  # from `last_rows`, unless the run was resumed
        rows |= {"prompt": prompt} | before | {"after training": after}
    else:
        rows["sample"] = after
    rows |= last_rows
    return "\n".join(f"{name:<15} {value}" for name, value in rows.items() if value)


def _source_rows(data: GPTDataModule, metrics: Metrics) -> dict[str, str]:
    """One row for each source with a name."""
    rows = {}
    for source in (each for each in data._data.all if each.name):
        row = f"{redacted(source.text.name)}, {source.store.n_tokens:,} tokens"
        row += "" if source.weight is None else f", weight {source.weight:g}"
        loss = metrics.get(f"val_loss/{source.name}")
        rows[f"  {source.name}"] = row + ("" if loss is None else f", val loss {loss:.4f}")
    return rows


def sample(data: GPTDataModule, model: Any) -> tuple[str, str]:
    """Return a prompt from the corpus and its continuation, quoted; or "" and why there is none."""
    try:
        if getattr(model, "generate", None) is None:
            raise TypeError(f"{type(model).__name__} has no method generate")
        prompt = choose_prompt(data)[None]  # (1, T)
        generator = torch.Generator(model.device).manual_seed(0)
        (ids,) = model.generate(prompt, GENERATED_TOKENS, 0.8, top_k=50, generator=generator).tolist()
    except Exception as error:
        return "", f"none: {error}"
    parts = map(data.tokenizer.decode, (ids[: prompt.shape[1]], ids[prompt.shape[1] :]))
    start, text = (re.sub("  +", " ", part) for part in parts)  # an indented text has many spaces
    return repr(start), repr(text[:SHOWN_CHARACTERS])


def choose_prompt(data: GPTDataModule) -> Tensor:
    """Return the start, int64 (T,), of a val (or train) window that starts with words."""
    windows = data.val_windows if len(data.val_windows) else data.train_windows
    prompts = [windows[i][0][:PROMPT_TOKENS] for i in range(min(100, len(windows)))]

    def words(prompt: Tensor) -> float:
        text = data.tokenizer.decode(prompt.tolist())
        return sum(map(str.isalpha, text)) / max(1, len(text))

    return next((prompt for prompt in prompts if words(prompt) > 0.75), max(prompts, key=words))


def plot_losses(metrics_csv: Path, png: Path, monitor: str | None = None) -> None:
    """Plot the train and val loss over training tokens, from metrics.csv to a PNG file.

    The train loss is one batch at each point, so a line through local means shows its course.
    """
    from matplotlib.figure import Figure  # not pyplot, which has global state and needs a display

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    columns = read_columns(metrics_csv)
    train, val = find_loss(columns, "train"), find_loss(columns, "val", monitor)
    of_sets = [name for name in columns if name.startswith("val_loss/")]
    for name in dict.fromkeys(filter(None, [train, val, *of_sets])):
        if not columns[name]:
            continue
        x, y = zip(*sorted(columns[name].items()), strict=True)
        bad = [tokens for tokens, loss in columns[name].items() if not math.isfinite(loss)]
        label = name.replace("_", " ") + (f", NaN or inf from {min(bad):,.0f} tokens" if bad else "")
        if name == train and len(x) > 5:
            (line,) = axes.plot(x, y, alpha=0.3)
            reach = len(y) // 20 + 1
            axes.plot(x, smooth(y, reach), color=line.get_color(), label=f"{label}, smoothed")
        else:
            axes.plot(x, y, marker="o", markersize=5, label=label)
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(buffer := io.BytesIO(), dpi=120)
    write_whole(png, buffer.getbuffer())


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and up to `reach` neighbors on each side, fewer at the ends."""
    n = len(values)
    half = [min(reach, i, n - 1 - i) for i in range(n)]
    return [statistics.fmean(values[i - k : i + k + 1]) for i, k in enumerate(half)]


def _number(value: Any, format_spec: str) -> str:
    return "not measured" if value is None else format(float(value), format_spec)
