"""Print an error of a command in one line. HYDRA_FULL_ERROR=1 prints the traceback instead."""

import errno
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra._internal import utils as hydra_utils
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError

from lit_gptdata._io import close_bars
from lit_gptdata.configs import conf_dir, default_groups, quote_value, similar_keys, typed_command

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
ADVICE = dict.fromkeys(_DENIED, ": give another folder, or change its permissions")
ADVICE[errno.ENOSPC] = ": make room on the disk, and run the same command again"
# These packages raise errors about what the user gave. Others, such as torch, may need a traceback.
_PACKAGES = ("lit_gptdata", "__main__", "lightning")
PLUGIN = r"hydra/(launcher|sweeper)/(joblib|submitit|optuna)"  # configs of Hydra that need an extra


@contextmanager
def short_errors(command: Sequence[str] = ()) -> Iterator[None]:
    """Print errors of a block that runs `command`, and exit with status 1; Ctrl-C exits with 130."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        yield
        return
    hydras_own, hydra_utils.run_and_report = hydra_utils.run_and_report, lambda func: func()
    try:
        yield
    except BrokenPipeError:  # `lit-gptdata show | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except BaseException as error:
        exits_like_lightning = isinstance(error, SystemExit) and error.code == 1  # after Ctrl-C
        cause = error.__context__ if exits_like_lightning else error
        if isinstance(cause, KeyboardInterrupt):
            status, message = 130, "stopped; the same command continues" if command else "stopped"
        elif isinstance(error, Exception):
            status, message = 1, f"error: {describe(error, command or typed_command())}"
        else:
            raise
        close_bars()
        sys.stdout.flush()
        print(message, file=sys.stderr)
        raise SystemExit(status) from None
    finally:
        hydra_utils.run_and_report = hydras_own  # which prints tracebacks


def describe(error: BaseException, command: Sequence[str] = ()) -> str:
    """Return the message of an error, and how to see its origin if it may be a bug.

    `command` is what the user typed, in words. A wrong option gets a close match or the line to type.
    """
    if found := re.match("Error locating target '(.*?)',", str(error)):
        return f"cannot import {found[1]}: {str(error.__cause__).splitlines()[-1]}"
    cause = root_cause(error)
    text = str(cause) or type(cause).__name__
    if message := _about_config(cause, text, command):
        return one_line(message)
    if isinstance(cause, OSError) and cause.strerror and cause.filename:
        advice = ADVICE.get(cause.errno or 0, "")
        return f"{cause.filename}: {cause.strerror}{advice}"
    if "No supported gpu backend" in text:
        return "torch finds no GPU on this machine: train on its CPU with trainer=cpu"
    *_, (innermost, _) = traceback.walk_tb(cause.__traceback__)
    package = innermost.f_globals.get("__name__", "").split(".")[0]
    fixable = isinstance(cause, ValueError | TypeError | OSError | RuntimeError)
    fixable |= isinstance(cause, ImportError) and "pip install" in text
    fixable |= type(cause).__name__ == "MisconfigurationException"
    if fixable and (isinstance(cause, OSError) or cause is not error or package in _PACKAGES):
        return one_line(text)
    text = f"{type(cause).__name__}: {one_line(str(cause))}"
    return f"{text} (HYDRA_FULL_ERROR=1 shows where it was raised)"


def root_cause(error: BaseException) -> BaseException:
    """Return the error that an object's constructor raised, without the errors Hydra wraps around it."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(text: str) -> str:
    """Join the lines of a message, and leave out all but the first three."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3]) + (f" … and {len(lines) - 3} more lines" if len(lines) > 3 else "")


def _about_config(error: BaseException, text: str, command: Sequence[str]) -> str:
    """Explain an error of Hydra, OmegaConf or YAML; "" for another error."""
    if isinstance(error, MissingConfigException) and (file := error.missing_cfg_file):
        group, _, name = file.partition("/") if file.startswith("data/") else file.rpartition("/")
        if plugin := re.match(PLUGIN, file):
            return f"{group}={name} needs an extra: pip install 'lit-gptdata[{plugin[2]}]'"
        if error.options:
            names = ", ".join(name for name in error.options if name != "options")
            own = "; for your own text, data=files data.corpus=PATH" if group == "data" else ""
            return f"{group}={name} does not exist: choose one of {names}{own}"
        return text.partition("\nConfig search path")[0]
    if isinstance(error, HydraException):
        return _about_override(getattr(error, "override", None) or "", text, command)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: give {error.full_key}=…"
    if isinstance(error, OmegaConfBaseException):
        key, (first, *_) = str(error.full_key or ""), text.splitlines()
        return first if key in first else f"{key}: {first}"
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
        return f"{mark.name}, line {mark.line + 1}, is not YAML: {error.problem}"
    return ""


def _about_override(word: str, text: str, command: Sequence[str]) -> str:
    """Explain Hydra's error `text` about a word of the command line."""
    meaning = "characters with a meaning in Hydra"
    if found := re.match("Ambiguous value for argument '(.*)'\n", text):
        word, meaning = found[1], "a comma: a list has brackets, [a,b], and a sweep needs -m"
    if "=" in word:
        corrected = shlex.join(quote_value(other) if other == word else other for other in command)
        advice = f"For a plain text, quote it for Hydra and for the shell: {corrected}"
        return f"{word} has {meaning}. {advice}"
    if word:
        return f"{word!r} is not an option: options have the form key=value, such as {word}=…"
    if found := re.match("Could not override '(.*)'", text):
        near = similar_keys(key := found[1])
        if (conf_dir() / key).is_dir() and key not in default_groups():
            return f"{key}=… needs a plus sign: +{key}=…"
        if key in near:  # a dict with other keys than the config's
            own = "; for your own mixture: data=sources 'data.corpus={…}'" * (key == "data.corpus")
            return f"{key}=… has keys that the config does not have: ++{key}=… adds them{own}"
        hint = f"did you mean {' or '.join(near)}?" if near else "train --help describes all options"
        return f"the option {key} does not exist: {hint} (+{key}=… adds a new option)"
    return text
