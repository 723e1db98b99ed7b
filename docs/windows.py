"""Draw the pictures of windows.md with the data module and the mask: `python docs/windows.py`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_gptdata import GPTDataModule, document_positions
from lit_gptdata.model.documents import attention_mask

DOCS = Path(__file__).parent
TEXTS = [
    "The fox ran to the river.",
    "A dog barked.",
    "Rain fell on the old town all night long, and the streets were empty until the morning bells rang.",
    "Ships left at dawn.",
    "No.",
    "She read the letter twice.",
]
COLORS = [*matplotlib.color_sequences["Set2"][:6], "#f4f4f4"]  # of the documents, and of padding
TITLES = {
    "sliding": "sliding: every window starts stride tokens after the one before",
    "packed": "packed: whole documents, in the windows where they fit best",
    "documents": "documents: one document per window",
}


def load(folder: Path, windows: str) -> GPTDataModule:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    data = GPTDataModule(
        str(folder / "texts.jsonl"), windows=windows, max_length=16, stride=16, val_fraction=0,
        data_dir=folder / "data",
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    return data


def rows_of(data: GPTDataModule) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of all train windows (N, T), and the number of the document of each, 6 for padding."""
    numbers = np.arange(len(data.train_windows))
    inputs, targets = (part.numpy() for part in data.train_windows.batch(numbers))
    tokens = data.train_windows.target_tokens(numbers)  # of the next token, which an input belongs to
    ends = np.flatnonzero(data.store.tokens[0 : data.store.n_tokens] == data.eot)
    documents = np.searchsorted(ends, np.where(tokens < 0, data.store.n_tokens, tokens))
    return inputs, np.where(targets < 0, len(TEXTS), documents)


def text_of(data: GPTDataModule, token: int) -> str:
    return "E" if token == data.eot else data.tokenizer.decode([token]).strip()


def draw_windows(axes: Axes, data: GPTDataModule, title: str) -> None:
    inputs, documents = rows_of(data)
    axes.pcolormesh(documents, cmap=palette(), vmin=0, vmax=len(TEXTS), edgecolors="white", lw=1.5)
    for (row, place), token in np.ndenumerate(inputs):
        is_padding = documents[row, place] == len(TEXTS)
        text = "" if is_padding else text_of(data, token)
        axes.text(place + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(yticks=np.arange(len(inputs)) + 0.5, yticklabels=range(1, len(inputs) + 1), xticks=[])
    axes.invert_yaxis()


def draw_mask(axes: Axes, data: GPTDataModule, document_mask: bool) -> None:
    inputs, documents = (rows[1:2] for rows in rows_of(data))  # a window of three documents
    ids = torch.from_numpy(inputs)
    eot = data.eot if document_mask else -1  # no token is -1
    allowed = attention_mask(ids, eot)[0, 0].numpy()
    cells = np.where(allowed, documents[0][:, None], len(TEXTS))
    axes.pcolormesh(cells, cmap=palette(), vmin=0, vmax=len(TEXTS), edgecolors="white", lw=1)
    positions = document_positions(ids, eot)[0].tolist()
    words = [text_of(data, token) for token in inputs[0]]
    ticks = np.arange(len(words)) + 0.5
    labels = [f"{word}  {position:>2}" for word, position in zip(words, positions, strict=True)]
    axes.set_xticks(ticks, words, rotation=90, fontsize=7)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set(title=f"document_mask={str(document_mask).lower()}", ylabel="token and its position")
    axes.set(xlabel="attends to", aspect="equal")
    axes.invert_yaxis()


def palette() -> Any:
    return matplotlib.colors.ListedColormap(COLORS)


def main() -> None:
    with tempfile.TemporaryDirectory() as name, matplotlib.rc_context({"axes.spines.left": False}):
        data = {windows: load(Path(name), windows) for windows in TITLES}
        heights = [len(each.train_windows) for each in data.values()]
        figure = Figure(figsize=(9, 0.34 * sum(heights) + 1.2), layout="constrained")
        for axes, (windows, title) in zip(
            figure.subplots(len(data), height_ratios=heights), TITLES.items(), strict=True
        ):
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            draw_windows(axes, data[windows], title)
        figure.savefig(DOCS / "windows.png", dpi=110)
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        for axes, document_mask in zip(figure.subplots(1, 2), (False, True), strict=True):
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            draw_mask(axes, data["packed"], document_mask)
        figure.savefig(DOCS / "document-mask.png", dpi=110)


if __name__ == "__main__":
    main()
