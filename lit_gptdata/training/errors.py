"""Print an error of train.py in one line. HYDRA_FULL_ERROR=1 prints the traceback instead."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hydra._internal import utils as hydra_utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from lit_gptdata.configs import message_for_user, one_line, root_cause
from lit_gptdata.training.ranks import in_sweep

# These packages raise errors about what the user gave. Others, such as torch, may need a traceback.
_PACKAGES = ("lit_gptdata", "__main__", "train", "lightning")


@contextmanager
def short_errors() -> Iterator[None]:
    """Print errors of a block that runs Hydra, and exit with status 1; Ctrl-C exits with 130."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        yield
        return
    hydras_own, hydra_utils.run_and_report = hydra_utils.run_and_report, lambda func: func()
    try:
        yield
    except BaseException as error:
        stopped = _is_ctrl_c(error)
        if not (stopped or isinstance(error, Exception)):
            raise
        close_progress_bars()
        print("stopped" if stopped else f"error: {describe(error)}", file=sys.stderr)
        raise SystemExit(130 if stopped else 1) from None
    finally:
        hydra_utils.run_and_report = hydras_own  # which prints tracebacks


def _is_ctrl_c(error: BaseException) -> bool:
    if isinstance(error, SystemExit) and error.code == 1:  # Lightning exits so after Ctrl-C
        error = error.__context__ or error
    # gigatoken turns it into a PanicException
    return isinstance(error, KeyboardInterrupt) or (
        type(error).__name__ == "PanicException" and "KeyboardInterrupt" in str(error)
    )


def close_progress_bars() -> None:
    """End the line of each progress bar on the screen, so that a message starts on a new line."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    sys.stdout.flush()


@contextmanager
def short_job_errors() -> Iterator[None]:
    """Print the errors of a single job before Hydra does; a sweep needs them as exceptions."""
    if not HydraConfig.initialized() or in_sweep():
        yield
        return
    with short_errors():
        yield


def describe(error: BaseException) -> str:
    """Return the message of an error, and how to see its origin if it may be a bug."""
    cause = root_cause(error)
    message = message_for_user(error, ["python", *sys.argv])
    *_, (innermost, _) = traceback.walk_tb(cause.__traceback__)
    package = innermost.f_globals.get("__name__", "").split(".")[0]
    from_option = cause is not error or isinstance(
        cause, (HydraException, OmegaConfBaseException, OSError)
    )
    if message is not None and (from_option or package in _PACKAGES):
        return one_line(message)
    text = f"{type(cause).__name__}: {one_line(str(cause))}"
    return f"{text} (HYDRA_FULL_ERROR=1 shows where it was raised)"
