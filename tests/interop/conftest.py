from __future__ import annotations

import pytest

from lit_gptdata.interop import blocks, importing


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch) -> None:
    """Several blocks, chunks and shards, so that every border is tested."""
    monkeypatch.setattr(blocks, "BLOCK_IDS", 100)
    monkeypatch.setattr(importing, "CHUNK_IDS", 16)
    monkeypatch.setattr(importing, "SHARD_IDS", 320)
    monkeypatch.setattr(importing, "SHARD_DOCUMENTS", 18)
