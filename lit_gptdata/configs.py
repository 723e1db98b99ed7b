"""The shipped Hydra configs: their folder, the arithmetic in them, and messages about wrong options."""

import difflib
import errno
import json
import operator
import re
import shlex
import sys
from collections.abc import Sequence
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


def read_options(path: Path) -> dict[str, tuple[str, str]]:
    """Key → (value, comment) of a config, as its file and the files that it includes say."""
    text = path.read_text(encoding="utf-8")
    options: dict[str, tuple[str, str]] = {}
    for included in re.findall("^  - ([a-z]+)$", text, re.MULTILINE):
        options |= read_options(path.with_name(f"{included}.yaml"))
    is_global = path.parent == conf_dir() or "# @package _global_" in text
    parents, key = [] if is_global else [path.parent.name], ""
    depth = len(parents)
    for line in text.splitlines():
        if found := re.match(r"( *)(\w+):(?: +([^#\s].*?))?(?: +# (.*))?$", line):
            indent, name, value, comment = found.groups(default="")
            parents[depth + len(indent) // 2 :] = [name]
            key = ".".join(parents)
            options[key] = (value, options.get(key, ("", ""))[1] or comment)
        elif key and (found := re.match(" +# (.*)", line)):  # the comment continues
            options[key] = (options[key][0], f"{options[key][1]} {found[1]}")
    return {key: option for key, option in options.items() if not re.match(r"defaults|hydra|.*\b_", key)}


def default_groups() -> dict[str, str]:
    """Group → the choice in conf/train.yaml, without the groups that have none."""
    text = (conf_dir() / "train.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^  - (\w+): (?!null)(\w+)", text, re.MULTILINE))


def all_options() -> dict[str, dict[str, tuple[str, str]]]:
    """Group → the options of its default choice, "data=mixture" → the options that others add."""
    sections = {"": read_options(conf_dir() / "train.yaml")}
    known = set(sections[""])
    for group, default in default_groups().items():
        names = {path.stem for path in conf_dir().glob(f"{group}/*.yaml")} - {default}
        for name in (default, *sorted(names)):
            options = read_options(conf_dir() / group / f"{name}.yaml")
            title = group if name == default else f"{group}={name}"
            sections[title] = {key: option for key, option in options.items() if key not in known}
            known |= set(options)
    return sections


def typed_command() -> list[str]:
    """The words of the command line that started this process."""
    script = sys.argv[0]
    is_script = script.endswith(".py") and not script.endswith("__main__.py")
    return ["python", *sys.argv] if is_script else ["lit-gptdata", *sys.argv[1:]]


def explain_flag(message: str, flags: Sequence[str] = ()) -> str:
    """Explain argparse's message about a flag that does not exist, such as --batch-size."""
    if not (found := re.search(r"unrecognized arguments: (--?([\w-]+))", message)):
        return message
    near = [f"{key}=…" for key in similar_keys(found[2].replace("-", "_"))]
    near = difflib.get_close_matches(found[1], flags) or near
    hint = f": did you mean {' or '.join(near)}?" if near else ""
    return f"{found[1]} does not exist, because options have the form key=value{hint}"


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
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
    from yaml import MarkedYAMLError

    if found := re.match("Error locating target '(.*?)',", str(error)):
        return f"cannot import {found[1]}: {str(error.__cause__).splitlines()[-1]}"
    error = root_cause(error)
    text = str(error) or type(error).__name__
    if isinstance(error, MissingConfigException) and (file := error.missing_cfg_file):
        group, _, name = file.partition("/") if file.startswith("data/") else file.rpartition("/")
        if extra := EXTRAS.get(file):
            return f"{group}={name} needs an extra: pip install 'lit-gptdata[{extra}]'"
        if error.options:
            names = ", ".join(name for name in error.options if name != "options")
            own = "; for your own text, data=files data.corpus=PATH" if group == "data" else ""
            return f"{group}={name} does not exist: choose one of {names}{own}"
        text = text.partition("\nConfig search path")[0]
    if isinstance(error, HydraException):
        return _about_override(getattr(error, "override", None) or "", text, command)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: give {error.full_key}=…"
    if isinstance(error, OmegaConfBaseException):
        key, (first, *_) = str(error.full_key or ""), text.splitlines()
        return first if key in first else f"{key}: {first}"
    if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark):
        return f"{mark.name}, line {mark.line + 1}, is not YAML: {error.problem}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        advice = ": give another folder, or change its permissions"
        denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        return f"{error.filename}: {error.strerror}{advice if denied else ''}"
    if "No supported gpu backend" in text:
        return "torch finds no GPU on this machine: train on its CPU with trainer=cpu"
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
        near, node = similar_keys(found[1]), found[1].partition(".")[0]
        hint = "`lit-gptdata train --help` describes all options."
        if (conf_dir() / found[1]).is_dir() and found[1] not in default_groups():
            return f"{found[1]}=… needs a plus sign: +{found[1]}=…"
        if found[1] in near:  # data=files, with a config in which it replaces all of `data`
            hint = f"leave {node}=… out, because this config has no choices for {node}"
        elif near:
            hint = f"did you mean {' or '.join(near)}?"
        return f"the option {found[1]} does not exist: {hint} (+{found[1]}=… adds a new option)"
    return text


def quote_text(text: str) -> str:
    """Quote a text for Hydra: é.txt → "é.txt"."""
    # Backslashes count only before a quote, in Hydra, and before "${", in OmegaConf.
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", text)
    text = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + (m[2] and r"\""), text)
    return f'"{text}"'


def quote_value(override: str) -> str:
    """Quote a value for Hydra where necessary: a=é.txt → a="é.txt", and a=[x,é] → a=["x","é"]."""
    if re.fullmatch(r"[\w.-]+=[\w./-]+", override, re.ASCII):
        return override
    key, _, value = override.partition("=")
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(quote_text(item.strip()) for item in value[1:-1].split(','))}]"
    return f"{key}={quote_text(value)}"


def as_override(value: object) -> str:
    """Plain values in Hydra's grammar, in which keys have no quotes: {"web": "a b"} → {web: "a b"}."""
    return re.sub(r'"([A-Za-z_][\w-]*)": ', r"\1: ", json.dumps(value, ensure_ascii=False))


def similar_keys(wrong: str) -> list[str]:
    """Return up to three options with a similar name, or with the word `wrong` in their comments."""
    options = {key: comment for each in all_options().values() for key, (_, comment) in each.items()}
    if found := [key for key in options if key == wrong or key.endswith(f".{wrong}")]:
        return found[:1] if wrong in found else found[:3]
    if found := difflib.get_close_matches(wrong, options, cutoff=0.75):
        return found
    ends = {key: key.rpartition(".")[2] for key in options}
    close = difflib.get_close_matches(wrong.rpartition(".")[2], {*ends.values()}, cutoff=0.75)
    word = re.compile(rf"\b{re.escape(wrong)}\b")
    found = [key for name in close for key in options if ends[key] == name]
    found += [key for key, end in ends.items() if wrong == "".join(re.findall("_?([a-z])[a-z]*", end))]
    return (found or [key for key, comment in options.items() if word.search(comment)])[:3]
