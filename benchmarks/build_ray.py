"""Time a build on a Ray cluster against the same build by processes.

    python -m benchmarks.build_ray                     # 64 files, 1 GB, 5 rounds
    python -m benchmarks.build_ray --megabytes 2 --rounds 1
    python -m benchmarks.build_ray --json benchmarks/results/build_ray.json

The cluster has two nodes on this machine, with one core each. It runs before the clock starts. The time
includes connecting, starting workers, loading engines, writing every shard, hashing and publishing.
`publish-N` writes the store to a URL, here a folder; there the driver hashes the text before the cluster
encodes it. A build into a folder lets the driver hash at the same time.

Each measurement is a separate driver process and starts after the imports. A round runs every candidate
once, and ratios are taken within a round. Every store is verified, and its manifest must equal the first
one. The engine is gigatoken if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ray.cluster_utils import Cluster

from benchmarks.measure import median, options, ratios, report, run_rounds, three
from benchmarks.tokenize import make_text
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import ray_tasks as build_ray
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.build.plan import BuildName, BuildOptions
from lit_gptdata.tokens.remote.publish import publish_text
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer

CANDIDATES: dict[str, tuple[BuildName, int | None]] = {
    "processes-1": ("processes", 1),
    "processes-2": ("processes", 2),
    "ray-1": ("ray", 1),
    "ray-2": ("ray", None),  # the default: every core of the cluster
    "publish-1": ("ray", 1),
    "publish-2": ("ray", None),
}
BASELINES = ("processes-1", "ray-1")


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[str]:
    """Run a cluster of two nodes with one core each. Yields its address; its logs go to `folder`."""
    os.environ |= {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster.address
    finally:
        cluster.shutdown()


def measure(name: str, folder: Path, address: str) -> dict[str, float]:
    """Run one candidate in this process: seconds, and millions of tokens per second."""
    assert build_ray.encode_units  # imported before the clock starts
    build, workers = CANDIDATES[name]
    tokenizer = Tokenizer("gpt2")
    tokenizer.reference.encoding  # noqa: B018 loaded before the clock starts
    out = folder / "out"
    make = publish_text if name.startswith("publish") else prepare_store
    start = time.perf_counter()
    made = make(
        FilesCorpus(folder / "text"),
        tokenizer,
        out,
        BuildOptions(workers=workers, build=build, ray_address=address),
    )
    seconds = time.perf_counter() - start
    store = TokenStore(made) if isinstance(made, str) else made
    store.verify()
    expected = folder / "manifest.json"  # of the first candidate: sizes and SHA-256 of all shards
    manifest = store.manifest.to_json().decode()
    if not expected.exists():
        expected.write_text(manifest)
    assert manifest == expected.read_text(), name
    shutil.rmtree(out)
    return {"seconds": seconds, "million_tokens_per_s": store.n_tokens / seconds / 1e6}


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--megabytes", type=int, default=16, help="size of each of the 64 files")
    for hidden in ("--measure", "--folder", "--address"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, Path(args.folder), args.address)))
        return
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # a socket path has ≤ 107 bytes
        folder = Path(name)
        (folder / "text").mkdir()
        files = make_text(folder / "text", args.megabytes, files=64)
        total = sum(path.stat().st_size for path in files) / 1e6
        with two_nodes(folder / "ray") as address:
            rounds = run_rounds(
                "benchmarks.build_ray", list(CANDIDATES), args.rounds, folder, [f"--address={address}"]
            )
    rows = [
        [
            name,
            three(median(rounds, name, "seconds")),
            three(median(rounds, name, "million_tokens_per_s")),
            *(cell for baseline in BASELINES for cell in ratios(rounds, name, "seconds", baseline)),
        ]
        for name in CANDIDATES
    ]
    scaled, low_high = ratios(rounds, "publish-2", "seconds", "publish-1")
    spread = "lowest – highest"
    columns = [column for baseline in BASELINES for column in (f"speed ÷ {baseline}", spread)]
    report(
        f"64 files, {total:,.0f} MB, to a published store; medians of {args.rounds} rounds",
        ["candidate", "s", "million tokens/s", *columns],
        rows, measured=rounds, notes=[f"publish-2 ÷ publish-1: {scaled} ({low_high})"], to=args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
