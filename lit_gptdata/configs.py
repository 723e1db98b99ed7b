"""The shipped Hydra configs: their folder, the arithmetic in them, and messages about wrong options."""

import difflib
import json
import operator
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# Hydra config → the extra of this package that installs it.
EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_local": "submitit",
    "hydra/launcher/submitit_slurm": "submitit",
    "hydra/sweeper/optuna": "optuna",
}


def conf_dir() -> Path:
    """Find the folder conf/: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/train.yaml in {package} or its parent: install lit-gptdata again")


def register_resolvers() -> None:
    """Let configs divide integers: `${lit_gptdata.floordiv:256,${data.max_length}}`."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("lit_gptdata.floordiv", operator.floordiv, replace=True)


def without_null_groups(overrides: Sequence[str]) -> list[str]:
    """Make `callbacks=null` work, for which Hydra wants none. It refuses data=none, with the choices."""
    defaults = ("experiment=null", "debug=null")
    groups = r"(callbacks|logger|data|stem|model|trainer)=null"
    return [re.sub(f"^{groups}$", r"\1=none", word) for word in overrides if word not in defaults]


def root_cause(error: BaseException) -> BaseException:
    """Return the error that an object's constructor raised, without the errors Hydra wraps around it."""
    from hydra.errors import InstantiationException

    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(text: str) -> str:
    """Join the lines of a message, and leave out all but the first three."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3]) + (f" … and {len(lines) - 3} more lines" if len(lines) > 3 else "")


def message_for_user(error: BaseException, command: Sequence[str]) -> str | None:
    """Return the message of an error that the user can fix, or None for a bug of ours.

    `command` is what the user typed, in words. A wrong option gets a close match or the line to type.
    """
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    if found := re.match("Error locating target '(.*?)',", str(error)):
        return f"cannot import {found[1]}: {str(error.__cause__).splitlines()[-1]}"
    error = root_cause(error)
    text = str(error) or type(error).__name__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if extra := EXTRAS.get(error.missing_cfg_file):
            return f"{group}={name} needs an extra: pip install 'lit-gptdata[{extra}]'"
        if error.options:
            return f"{group}={name} does not exist: choose one of {', '.join(error.options)}"
    if isinstance(error, HydraException):
        return _about_override(getattr(error, "override", None) or "", text, command)
    if isinstance(error, OmegaConfBaseException):
        key, (first, *_) = str(error.full_key or ""), text.splitlines()
        return first if key in first else f"{key}: {first}"
    fixable = isinstance(error, (ValueError, TypeError, OSError, RuntimeError))
    fixable |= isinstance(error, ImportError) and "pip install" in text
    return text if fixable or type(error).__name__ == "MisconfigurationException" else None


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
        example = f"data.corpus={word}" if "/" in word else f"{word}=…"
        return f"{word!r} is not an option: options have the form key=value, such as {example}"
    if found := re.match("Could not override '(.*)'", text):
        near, node = _similar_keys(found[1]), found[1].partition(".")[0]
        hint = "`train.py --cfg job` lists all options."
        if found[1] in near:  # data=files, with a config in which it replaces all of `data`
            hint = f"leave {node}=… out, because this config has no choices for {node}"
        elif near:
            hint = f"did you mean {' or '.join(near)}?"
        return f"the option {found[1]} does not exist: {hint} (+{found[1]}=… adds a new option)"
    return text


def quote_value(override: str) -> str:
    """Quote a value for Hydra where necessary: a=é.txt → a="é.txt", and a=[x,é] → a=["x","é"]."""
    if re.fullmatch(r"[\w.-]+=[\w./-]+", override, re.ASCII):
        return override

    def quoted(text: str) -> str:
        # Backslashes count only before a quote, in Hydra, and before "${", in OmegaConf.
        text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", text)
        text = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + (m[2] and r"\""), text)
        return f'"{text}"'

    key, _, value = override.partition("=")
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(quoted(item.strip()) for item in value[1:-1].split(','))}]"
    return f"{key}={quoted(value)}"


def as_override(value: object) -> str:
    """Plain values in Hydra's grammar, in which keys have no quotes: {"web": "a b"} → {web: "a b"}."""
    return re.sub(r'"([A-Za-z_][\w-]*)": ', r"\1: ", json.dumps(value, ensure_ascii=False))


def _similar_keys(wrong: str) -> list[str]:
    """Return up to three keys of the default config that look like `wrong`, or end with it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    def walk(node: object, prefix: str = "") -> Iterator[str]:
        for name, value in node.items() if isinstance(node, Mapping) else ():
            yield f"{prefix}{name}"
            yield from walk(value, f"{prefix}{name}.")

    register_resolvers()
    keys: list[str] = []
    with suppress(Exception), initialize_config_dir(str(conf_dir()), version_base="1.3"):
        keys += walk(OmegaConf.to_container(compose("train")))
    ends = [key for key in keys if key.endswith(f".{wrong}")]
    return (ends or difflib.get_close_matches(wrong, keys, cutoff=0.75))[:3]
