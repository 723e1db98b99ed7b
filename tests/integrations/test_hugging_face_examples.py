"""Examples with Hugging Face's libraries: killed and run again, they train on the same windows."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from tests.examples import check_epochs, check_resume, run

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script", ["hf_trainer.py", "accelerate_loop.py"])
def test_a_killed_run_continues_exactly(script, ranks, tmp_path):
    whole = check_resume(script, tmp_path, ranks=ranks)
    check_epochs(whole)
    if ranks == 1:
        with pytest.raises(FileNotFoundError, match="rank0"):  # a finished run trains on nothing
            run(script, tmp_path / "whole", ranks=ranks)
