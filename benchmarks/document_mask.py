"""Time a training step of GPT with a document mask against the same step without one.

    python -m benchmarks.document_mask                  # model=nano on one core of the CPU
    python -m benchmarks.document_mask --device cuda    # GPT-2 small, FlexAttention against SDPA

A step is forward, backward and AdamW. All candidates run in one process on the same batch and take
turns; ratios are taken within a turn. On the CPU, times are CPU time, which other processes change
little. The documents have log-normal lengths, median 300 tokens and sigma 1.2.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.measure import Round, median, options, ratios, report, three
from lit_gptdata import GPT, EmbeddingStem
from lit_gptdata.model import documents, gpt

V, EOT = 50_257, 50_256
Size = tuple[int, int]
"""Batch, tokens in a window."""

SIZES: dict[str, list[Size]] = {"cpu": [(8, 64), (8, 256), (4, 1024)], "cuda": [(16, 1024)]}
MODELS = {"cpu": ("nano", 3, 4, 96), "cuda": ("gpt2", 12, 12, 768)}
Batch = tuple[torch.Tensor, torch.Tensor]
PAIRS = partial(patch.object, gpt, "block_mask", documents.attention_mask)
"""Use SDPA with a mask of pairs where the model would use FlexAttention."""


def random_batch(size: Size, device: str) -> Batch:
    """Windows cut from a sequence of documents, as sliding windows are: inputs and targets (B, T)."""
    random = np.random.default_rng(0)
    lengths = np.ceil(random.lognormal(np.log(300), 1.2, 1 + size[0] * size[1] // 50)).astype(int)
    ids = random.integers(0, EOT, lengths.sum() + size[0] * size[1])
    ids[lengths.cumsum()] = EOT
    rows = torch.from_numpy(ids[: size[0] * (size[1] + 1)]).view(size[0], size[1] + 1).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def new_step(size: Size, device: str, document_mask: bool) -> Callable[[], None]:
    _, n_layers, n_heads, width = MODELS[device]
    torch.manual_seed(0)
    stem = EmbeddingStem(V, size[1], width)
    model = GPT(stem, n_layers, n_heads, document_mask=document_mask, eot=EOT).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = random_batch(size, device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            model.losses(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(step: Callable[[], None], times: int, device: str) -> dict[str, float]:
    """Run a step `times` times: the mean time, and the largest memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    for _ in range(times):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = (clock() - start) / times
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return {"seconds": seconds, "gigabytes": memory}


def compare(size: Size, device: str, turns: int) -> list[Round]:
    """Measure all candidates in turns. The order turns around after each turn."""
    steps = {"no mask": new_step(size, device, False), "SDPA with mask": new_step(size, device, True)}
    if device == "cuda":
        steps["FlexAttention"] = steps["SDPA with mask"]

    def run(name: str, times: int) -> dict[str, float]:
        if name != "SDPA with mask":
            return measure(steps[name], times, device)
        with PAIRS():
            return measure(steps[name], times, device)

    first = {name: run(name, 1)["seconds"] for name in steps}
    times = max(1, round(1 / max(run(name, 3)["seconds"] for name in steps)))  # about a second per turn
    print(f"{size}: first steps, seconds: " + ", ".join(f"{n} {t:.1f}" for n, t in first.items()))
    rounds = []
    for turn in range(turns):
        names = list(steps) if turn % 2 == 0 else list(steps)[::-1]
        rounds.append({name: run(name, times) for name in names})
    return rounds


def main() -> None:
    parser = options(__doc__, rounds=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: leave --device=cuda out to measure on the CPU")
        return
    torch.set_num_threads(1)
    rows, measured = [], []
    for size in SIZES[args.device]:
        rounds = compare(size, args.device, args.rounds)
        measured.append({"size": size, "rounds": rounds})
        for name in rounds[0]:
            seconds = median(rounds, name, "seconds")
            row = ["×".join(map(str, size)), name, three(seconds * 1e3)]
            row += [f"{size[0] * size[1] / seconds:,.0f}", *ratios(rounds, name, "seconds", "no mask")]
            row += [three(median(rounds, name, "gigabytes"))] if args.device == "cuda" else []
            rows.append(row)
            print(*row, flush=True)
    columns = ["windows", "attention", "step, ms", "tokens/s", "speed ÷ no mask", "lowest – highest"]
    columns += ["peak memory, GB"] if args.device == "cuda" else []
    where = "CUDA, bfloat16" if args.device == "cuda" else "CPU time of one core"
    setting = (
        f"A training step of model={MODELS[args.device][0]}, {where}; medians of {args.rounds} turns"
    )
    report(setting, columns, rows, measured=measured, to=args.json)


if __name__ == "__main__":
    main()
