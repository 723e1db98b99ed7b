"""Compare the data of two runs, in plain values; open an earlier run's windows, and list seen text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_gptdata.windows.dataset import Spans, Windows
from lit_gptdata.windows.mixture import EndlessOrder, Mixture, Stage, taken_windows
from lit_gptdata.windows.order import SMALL
from lit_gptdata.windows.sources import Sources
from lit_gptdata.windows.steps import RunSegment, parts_before, trained_before

WINDOW_OPTIONS = (
    "windows", "max_length", "stride", "val_fraction", "test_fraction", "shuffle", "seed", "n_windows",
)  # fmt: skip
"""What determines the windows of a store and their order; a resumed run keeps it."""


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError unless two identities give the same windows; names each difference."""
    if differ := "; ".join(differences(saved, now)):
        raise ValueError(
            f"the checkpoint's windows differ from this run's: {differ}. Set the checkpoint's values, "
            "load only its weights, or continue with the new data: on_change=continue. batch_size and "
            "the number of devices may change"
        )


def check_complete(state: dict[str, Any], key: str) -> None:
    """Raise ValueError for a state that a subclass of GPTDataModule saved without the position."""
    if not {"data", "batches", "epoch", "index", "legs"} <= state.keys():
        problem = f"the saved state of {key} has only {sorted(state)}, no position in the data"
        advice = "Its state_dict() must return {**super().state_dict(), …}"
        raise ValueError(f"{problem}. {advice}. Without the position, load only the model's weights")


def differences(saved: dict[str, Any], now: dict[str, Any], owner: str = "") -> list[str]:
    """What differs between two identities, for people: "source web: weight was 0.6, now 0.5"."""
    if ("sources" in saved) != ("sources" in now):
        was, now_is = ("a mixture", "one corpus") if "sources" in saved else ("one corpus", "a mixture")
        return [f"the corpus was {was}, now it is {now_is}"]
    old, new = saved.get("sources", {}), now.get("sources", {})
    found = []
    for name in dict.fromkeys([*old, *new]):
        if name not in old or name not in new:
            found.append(f"source {name} {'was not there' if name not in old else 'is missing now'}")
        else:
            found += differences(old[name], new[name], f"source {name}: ")
    saved = {"windows": "sliding", **saved} if "max_length" in saved else saved  # an older checkpoint
    names = [n for n in saved if n not in ("sources", "mixture") and saved[n] != now.get(n)]
    if saved.get("store") == now.get("store"):  # a corpus may move, if its tokens stay the same
        kept = (*WINDOW_OPTIONS, "train_tokens", "weight", "stages")
        names = [name for name in names if name in kept]
    if "windows" in names:
        names = [name for name in names if name not in ("stride", "n_windows")]  # which follow from it
    return found + [f"{owner}{name} was {saved[name]!r}, now {now.get(name)!r}" for name in names]


def _trained(identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The identities of the sources that train, by name; a corpus without names is "corpus"."""
    if "sources" not in identity:
        return {"corpus": identity}
    names = identity["mixture"]["stages"][0][1]
    return {name: identity["sources"][name] for name in names}


def windows_of(identity: dict[str, Any], data: Sources) -> Windows:
    """The train windows that an identity describes; `data` opens the stores."""
    options = {name: identity[name] for name in ("max_length", "stride")}
    options["kind"] = identity.get("windows", "sliding")
    windows = {}
    for name, source in _trained(identity).items():
        store, span = data.open_store(source["store"], source["corpus"]), tuple(source["train_tokens"])
        windows[name] = data.open_windows(store, span, **options)
    if (mixture := identity.get("mixture")) is None:
        return windows["corpus"]
    stages = [Stage(begin, tuple(weights.values())) for begin, weights in mixture["stages"]]
    seed = identity["seed"] if identity["shuffle"] else None
    return Mixture(windows, stages, seed=seed, first_epoch=mixture["first_epoch"])


def segments_of(data: dict[str, Any]) -> list[RunSegment]:
    """The segments of one data of a run's history; no store is opened.

    The number of windows follows from the identity.
    """
    spans = {name: data["data"][name] for name in ("max_length", "stride")}
    n = 0
    for source in _trained(data["data"]).values():
        begin, end = source["train_tokens"]
        n += source.get("n_windows") or len(Spans(n_tokens=end - begin, **spans))
    return [RunSegment.from_dict(leg, n) for leg in data["legs"]]


def trained_ranges(segments: Sequence[RunSegment], stop: int) -> list[tuple[int, int]]:
    """The positions [begin, end) of all ranks' batches before `stop`; epoch e starts at e * n."""
    ranges: list[tuple[int, int]] = []
    for segment, end in parts_before(segments, stop):
        if segment.text_order:
            raise ValueError("the run overfits: each of its epochs has the same first windows")
        batch, steps = segment.batch, segment.steps
        while batch < end:
            at = segment.position(batch)
            begin, batches = at.epoch * steps.n + at.index, segment.first_batch(at.epoch + 1)
            batches = min(batches, end) - batch
            to = min(begin + batches * steps.width, (at.epoch + 1) * steps.n)
            if ranges and ranges[-1][1] == begin:
                begin = ranges.pop()[0]
            ranges.append((begin, to))
            batch += batches
    return ranges


def seen(history: list[dict[str, Any]], stop: int, present: Sources) -> list[dict[str, Any]]:
    """What the batches before `stop` took from each source, on all ranks, in plain values.

    `present`: of the run's present data. `history`: see `Resume.history`. `stop` also counts batches
    that were skipped. `documents`: those with a token that was an input or a target, [(first, last), …],
    counted from 1.
    """
    found: list[dict[str, Any]] = []
    runs = [segments_of(data) for data in history]
    ends = [min(stop, run[0].number) for run in runs[1:]] + [stop]
    for data, segments, end in zip(history, runs, ends, strict=True):
        identity = data["data"]
        windows, sources = windows_of(identity, present), _trained(identity)
        ranges = trained_ranges(segments, trained_before(segments, end))
        if isinstance(windows, Mixture):
            taken = windows.taken(ranges)
        else:
            seed = identity["seed"] if identity["shuffle"] else None
            order = EndlessOrder(len(windows), seed, SMALL - 1)  # equals each epoch's EpochPermutation
            taken = {"corpus": taken_windows(order, ranges)}
        for name, (n_windows, which) in taken.items():
            source = sources[name]
            store = present.open_store(source["store"], source["corpus"])
            part = windows.sources[name] if isinstance(windows, Mixture) else windows
            documents = store.documents(*_ranges(part, which))
            found.append({
                "source": name, "steps": [min(segments[0].number, end), end],
                "tokens": n_windows * windows.spans.max_length, "epochs": n_windows / len(which),
                "n_documents": sum(last - first + 1 for first, last in documents),
                "of": store.n_documents, "documents": documents,
            })  # fmt: skip
    return found


def _ranges(windows: Windows, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of windows, bool (n,): first tokens and ends, int64 (P,) each."""
    if windows.kind != "sliding" or windows.spans.stride > windows.spans.max_length + 1:
        return windows.ranges(np.flatnonzero(taken))
    edges = np.flatnonzero(np.diff(taken, prepend=False, append=False))  # of windows in a row
    return windows.ranges(edges[::2])[0], windows.ranges(edges[1::2] - 1)[1]
