"""Print an error of train.py in one line. HYDRA_FULL_ERROR=1 prints the traceback instead."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hydra._internal import utils as hydra_utils
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from yaml import YAMLError

from lit_gptdata.configs import message_for_user, one_line, root_cause, typed_command

# These packages raise errors about what the user gave. Others, such as torch, may need a traceback.
_PACKAGES = ("lit_gptdata", "__main__", "lightning")


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
        exits_like_lightning = isinstance(error, SystemExit) and error.code == 1  # after Ctrl-C
        cause = error.__context__ if exits_like_lightning else error
        if isinstance(cause, KeyboardInterrupt):
            status, message = 130, "stopped"
        elif isinstance(error, Exception):
            status, message = 1, f"error: {describe(error)}"
        else:
            raise
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # so that the message starts on a new line
        sys.stdout.flush()
        print(message, file=sys.stderr)
        raise SystemExit(status) from None
    finally:
        hydra_utils.run_and_report = hydras_own  # which prints tracebacks


def describe(error: BaseException) -> str:
    """Return the message of an error, and how to see its origin if it may be a bug."""
    cause = root_cause(error)
    message = message_for_user(error, typed_command())
    *_, (innermost, _) = traceback.walk_tb(cause.__traceback__)
    package = innermost.f_globals.get("__name__", "").split(".")[0]
    from_option = isinstance(cause, HydraException | OmegaConfBaseException | YAMLError | OSError)
    if message is not None and (from_option or cause is not error or package in _PACKAGES):
        return one_line(message)
    text = f"{type(cause).__name__}: {one_line(str(cause))}"
    return f"{text} (HYDRA_FULL_ERROR=1 shows where it was raised)"
