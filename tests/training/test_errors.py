"""How train.py ends after an error or Ctrl-C: one line, on its own line of the terminal."""

from __future__ import annotations

import sys

import pytest
from tqdm import tqdm

from lit_gptdata.training.errors import short_errors


def exit_like_lightning():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("action", [exit_like_lightning, interrupt])
def test_ctrl_c_exits_with_130_and_one_line(action, capsys):
    with pytest.raises(SystemExit, match=r"^130$"), short_errors(), short_errors():
        action()
    assert capsys.readouterr().err == "stopped\n"


def test_another_exit_keeps_its_status(capsys):
    with pytest.raises(SystemExit, match=r"^143$"), short_errors():
        sys.exit(143)
    assert not capsys.readouterr().err


def fail_under_a_progress_bar():
    bar = tqdm(total=2, file=sys.stderr)
    raise OSError(f"no disk\nunder {bar.total}")


def test_a_message_starts_below_the_progress_bar_and_has_one_line(capsys):
    with pytest.raises(SystemExit, match=r"^1$"), short_errors():
        fail_under_a_progress_bar()
    assert capsys.readouterr().err.endswith("]\nerror: no disk under 2\n")
