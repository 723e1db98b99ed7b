"""Time `EmbeddingStem` against the course's two `nn.Embedding`s, forward and backward.

    python -m benchmarks.stem                          # on the CPU
    python -m benchmarks.stem --compile                # both, also with torch.compile
    python -m benchmarks.stem --device cuda --compile --json benchmarks/results/stem-cuda.json

A pass is forward, backward of a fixed gradient, and setting gradients to None. Vocabulary 50,257,
max_length 256, float32. Both run in one process and take turns; ratios are taken within a turn.

On CUDA, events measure the time. The least bytes that a pass can move, divided by its time, are compared
with the bandwidth of a 1 GiB device copy. Those bytes are: ids read twice; D floats per token read,
written, and their gradient read; the dense gradient of the token table written once, and read and
written for each token in the batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import Round, median, options, ratios, report, three
from lit_gptdata import EmbeddingStem

V, L = 50_257, 256
SIZES = [(B, T, D) for D in (256, 768) for B, T in ((8, 4), (8, 256), (32, 256))]
Size = tuple[int, int, int]
"""Batch, tokens in a sequence, width."""

Pass = Callable[[], None]


class CourseStem(nn.Module):
    """The course's stem: the sum of a token embedding and a position embedding."""

    def __init__(self, vocab_size: int, max_length: int, embedding_dim: int) -> None:
        super().__init__()
        self.tok = nn.Embedding(vocab_size, embedding_dim)
        self.pos = nn.Embedding(max_length, embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tok(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))  # (B, T, D)


def new_pass(stem: nn.Module, ids: Tensor, grad: Tensor, compiled: bool) -> Pass:
    # The default mode, which most people use. Shapes are fixed, so nothing is compiled twice.
    forward = torch.compile(stem, dynamic=False) if compiled else stem

    def run() -> None:
        forward(ids).backward(grad)
        stem.zero_grad(set_to_none=True)

    return run


def microseconds(run: Callable[[], object], times: int, device: str) -> float:
    """Run a pass `times` times and return the mean time."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - start) / times * 1e6
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(times):
        run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / times * 1e3


def bytes_moved(size: Size) -> int:
    """Count the bytes that a pass must read and write if all ids in the batch are different."""
    B, T, D = size
    tokens, row = B * T, 4 * D
    forward = 8 * tokens + 2 * tokens * row + T * row  # ids, token rows in and out, position rows
    backward = 8 * tokens + tokens * row + V * row + 2 * tokens * row + L * row
    return forward + backward


def copy_bandwidth() -> float:
    """Measure a device copy of 1 GiB: bytes read and written, in GB/s."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copies = [microseconds(lambda: target.copy_(source), 20, "cuda") for _ in range(5)]
    return 2 * source.nbytes / statistics.median(copies) / 1e3


def check_same(course: CourseStem, ours: EmbeddingStem, ids: Tensor, grad: Tensor) -> None:
    """Check that the same tables give the same vectors and the same gradients."""
    assert ours.position_embedding is not None
    pairs = [(course.tok, ours.token_embedding), (course.pos, ours.position_embedding)]
    for theirs, mine in pairs:
        mine.weight.data.copy_(theirs.weight.data)
    assert torch.equal(course(ids), ours(ids))
    for stem in (course, ours):
        stem(ids).backward(grad)
    for theirs, mine in pairs:
        torch.testing.assert_close(mine.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
        theirs.weight.grad = mine.weight.grad = None


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="also measure both with torch.compile")
    parser.add_argument("--threads", type=int, help="number of torch threads on the CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    bandwidth = copy_bandwidth() if args.device == "cuda" else None
    measured: list[dict[str, object]] = []
    rows = []
    for compiled in (False, True) if args.compile else (False,):
        for size in SIZES:
            rounds = compare(size, compiled, args.device, args.rounds)
            times = [median(rounds, name, "microseconds") for name in ("course", "ours")]
            row = ["compiled" if compiled else "eager", "×".join(map(str, size)), *map(three, times)]
            row += ratios(rounds, "ours", "microseconds", "course")
            if bandwidth:
                moved = bytes_moved(size) / times[1] / 1e3
                row += [f"{moved:,.0f}", f"{moved / bandwidth:.0%}"]
            rows.append(row)
            measured.append({"compiled": compiled, "size": size, "rounds": rounds})
            print(*row, flush=True)
    columns = ["mode", "B×T×D", "course µs", "ours µs", "speed ÷ course", "lowest – highest"]
    where = f"the CPU, {torch.get_num_threads()} torch thread(s)"
    if bandwidth:
        columns += ["ours GB/s", "share of copy"]
        where = f"CUDA; a device copy moves {bandwidth:,.0f} GB/s"
    report(
        f"Forward and backward on {where}; medians of {args.rounds} turns",
        columns, rows, measured=measured, to=args.json,
    )  # fmt: skip


def compare(size: Size, compiled: bool, device: str, turns: int) -> list[Round]:
    """Measure both in turns. They swap places after each turn."""
    B, T, D = size
    torch.manual_seed(0)
    torch.compiler.reset()
    course, ours = CourseStem(V, L, D).to(device), EmbeddingStem(V, L, D).to(device)
    ids = torch.randint(V, (B, T), device=device)
    grad = torch.randn(B, T, D, device=device)
    check_same(course, ours, ids, grad)
    passes = {
        "course": new_pass(course, ids, grad, compiled),
        "ours": new_pass(ours, ids, grad, compiled),
    }
    for run in passes.values():
        microseconds(run, 3, device)
    slower = max(microseconds(run, 3, device) for run in passes.values())
    times = max(1, min(200, round(30_000 / slower)))  # about 30 ms per turn
    rounds = []
    for turn in range(turns):
        names = list(passes) if turn % 2 == 0 else list(passes)[::-1]
        rounds.append({n: {"microseconds": microseconds(passes[n], times, device)} for n in names})
    return rounds


if __name__ == "__main__":
    main()
