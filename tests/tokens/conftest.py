from __future__ import annotations

import pytest

from lit_gptdata.tokens.build import plan
from lit_gptdata.tokens.build.encode import Encoder
from tests.tokens.builds import SHARD_BYTES


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch) -> None:
    monkeypatch.setattr(plan, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The work units that this process encoded."""
    seen, encode = [], Encoder.encode_unit
    monkeypatch.setattr(
        Encoder, "encode_unit", lambda self, unit, *rest: seen.append(unit) or encode(self, unit, *rest)
    )
    return seen
