"""Windows as text, token by token, for a terminal and for a notebook: `data.show(step)`."""

import codecs
import html
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lit_gptdata._checks import check_integer
from lit_gptdata.windows.dataset import IGNORE_INDEX, Windows
from lit_gptdata.windows.mixture import Mixture
from lit_gptdata.windows.sources import Sources

SEPARATOR = "·"  # printed between two tokens if the output has no colors
COLORS = ("\x1b[30;46m", "\x1b[30;47m")  # of tokens, in turn: black on cyan, black on white
RESET = "\x1b[0m"
NOTEBOOK_TOKENS = 8192  # a notebook shows about this many inputs, each 100 bytes of HTML

STYLE = """<style>
.lit-gptdata {font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere}
.lit-gptdata .row {display: flex; flex-wrap: wrap; gap: 4px 1px; margin: 2px 0 12px}
.lit-gptdata .row > span {display: flex; flex-direction: column; max-width: 100%}
.lit-gptdata .row > span > span {white-space: break-spaces; padding: 0 1px; color: #111;
  min-height: 1.5em}
.lit-gptdata .c0 {background: #a5d8f3} .lit-gptdata .c1 {background: #fdd6a0}
.lit-gptdata .c2 {background: #b9e4b4} .lit-gptdata .c3 {background: #e2c9f2}
</style>"""
N_HUES = 4  # of tokens in a notebook, in turn
MOST_PIECES = 3  # of a packed window, whose title names each; of more, it names the first and the last


def show(data: Any, step: int, window: int | None) -> "ShownText":
    """See `GPTDataModule.show`; `data` is one."""
    if window is not None:
        return ShownText("", data.train_windows, [check_integer("window", window, 0)], data._data)
    windows, indices = data._resume.find_batch(step, None, None, None)
    title = f"step {step:,}: {len(indices):,} windows, seed {data.seed}"
    return ShownText(title, windows, indices.tolist(), data._data)


class ShownWindow(NamedTuple):
    """A window's number and origin, and the ids of its inputs and targets, without padding."""

    title: str
    inputs: list[int]
    targets: list[int]


class ShownText:
    """Windows as text. `str()` has the inputs; a notebook colors each input above its target."""

    def __init__(self, title: str, windows: Windows, indices: Sequence[int], sources: Sources) -> None:
        """`windows`: train windows of `sources`, or of earlier data of the run."""
        self.title, self.tokenizer = title, sources.owner.tokenizer
        if (most := max(indices, default=0)) >= len(windows) and not isinstance(windows, Mixture):
            raise ValueError(f"window must be an integer in [0, {len(windows):,}), got {most}")
        inputs, targets = windows.batch(indices)  # (B, T) each
        names, parts = [""] * len(inputs), {"": windows}
        if isinstance(windows, Mixture):
            names, indices = (array.tolist() for array in windows.locate(indices))
            parts = windows.sources
        self.windows, self.n_shown = [], max(1, NOTEBOOK_TOKENS // windows.spans.max_length)
        for name, index, *ids in zip(names, indices, inputs.tolist(), targets.tolist(), strict=True):
            place = f"window {index:,}{name and f' of {name}'}, {_origins(parts[name], index, sources)}"
            n = len(ids[1]) - ids[1].count(IGNORE_INDEX)
            self.windows.append(ShownWindow(place, ids[0][:n], ids[1][:n]))

    def __str__(self) -> str:
        use_colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        lines = [f"{self.title}\n"] if self.title else []
        paint = colored if use_colors else separated
        for window in self.windows:
            # the text of each token; tokens that share a character come as one text
            tokens = self.tokenizer.decode_each(window.inputs)
            texts = list(codecs.iterdecode(tokens, "utf-8", "replace"))
            lines += [window.title, f"{paint(texts)}\n"]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        title = "; ".join(filter(None, [self.title, "each input is above its target, the next token"]))
        lines = [STYLE, "<div class='lit-gptdata'>", _div(title)]
        for window in self.windows[: self.n_shown]:
            above, below = self._cells(window.inputs, 0), self._cells(window.targets, 1)
            columns = (f"<span>{a}{b}</span>" for a, b in zip(above, below, strict=True))
            lines += [_div(window.title), "<div class='row'>", *columns, "</div>"]
        if (n_more := len(self.windows) - self.n_shown) > 0:
            lines += [_div(f"… and {n_more:,} more windows, which print() shows")]
        return "".join([*lines, "</div>"])

    def _cells(self, ids: Sequence[int], first_color: int) -> Iterator[str]:
        """Targets start one color later, so a target has the color of the next input, the same token."""
        for color, token in enumerate(self.tokenizer.decode_each(ids), first_color):
            text = html.escape(visible(token.decode(errors="backslashreplace"), "⏎", "⇥"))
            yield f"<span class='c{color % N_HUES}' title='id {ids[color - first_color]}'>{text}</span>"


def _div(text: str) -> str:
    return f"<div>{html.escape(text)}</div>"


def _origins(part: Windows, index: int, sources: Sources) -> str:
    """The tokens of a window's inputs, or of its targets if it has documents, and their origin."""
    begins, ends = (edges.tolist() for edges in part.ranges([index]))
    if part.kind == "sliding":
        ends = [begins[0] + part.spans.max_length]
    places = [
        f"tokens [{a:,}, {b:,}), {_origin(part, a, b, sources)}"
        for a, b in zip(begins, ends, strict=True)
    ]
    if (n := len(places)) > MOST_PIECES:
        places = [places[0], "…", places[-1]]
    return "; ".join([f"{n} documents", *places] if n > 1 else places)


def _origin(part: Windows, start: int, end: int, sources: Sources) -> str:
    """Where the text of the tokens [start, end) comes from: one document, or the first and the last."""
    store = next((source.store for source in sources.all if source.store.tokens is part.tokens), None)
    if store is None:
        return "in earlier data of this run"
    if start >= end:
        return "an empty document"
    first, last = store.place(start), store.place(end - 1)
    return str(first) if first[:2] == last[:2] else f"{first}, to {last}"


def separated(texts: Sequence[str]) -> str:
    return SEPARATOR.join(visible(text, "\n", "\t") for text in texts)


def colored(texts: Sequence[str]) -> str:
    """Put the texts on alternating backgrounds. A line end is shown as ⏎."""
    painted = ""
    for text, color in zip(texts, itertools.cycle(COLORS), strict=False):
        painted += color + visible(text, f"⏎{RESET}\n{color}", "\t") + RESET
    return painted


def visible(text: str, newline: str, tab: str) -> str:
    r"""Replace invisible characters, because text must not control a terminal: "\x1b" → "␛"."""
    own = {"\n": newline, "\t": tab, "\x7f": "␡"}
    return "".join(
        c if c.isprintable() else own.get(c) or (chr(0x2400 + ord(c)) if c < " " else ascii(c)[1:-1])
        for c in text
    )
