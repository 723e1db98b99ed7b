"""A Ray cluster of two nodes on this machine, and its worker processes."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes with one core each."""
    from ray.cluster_utils import Cluster

    # a short path, because the path of a socket has at most 107 bytes
    folder = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)
    with folder as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", name)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        options = {"num_cpus": 1, "object_store_memory": 100 << 20}
        handler = signal.getsignal(signal.SIGTERM)  # a node replaces it
        nodes = Cluster(initialize_head=True, head_node_args=options | {"include_dashboard": False})
        nodes.add_node(**options)
        signal.signal(signal.SIGTERM, handler)
        try:
            yield nodes.address
        finally:
            nodes.shutdown()


def encoding_workers(ancestor: int) -> list[int]:
    """The descendants of process `ancestor` that encode a work unit now."""
    parent_of, busy = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            pid = int(folder.name)
            parent_of[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::_encode_unit"):
                busy.append(pid)

    def below(pid: int) -> bool:
        return pid == ancestor or (pid in parent_of and below(parent_of[pid]))

    return [pid for pid in busy if below(pid)]
