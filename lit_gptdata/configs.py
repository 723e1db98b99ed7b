"""The shipped Hydra configs: their folder, the arithmetic and the options in them, and `monitor`."""

import difflib
import json
import operator
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


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


def shorten_warnings() -> None:
    """Print warnings without a line of source. Lightning replaces this when it is imported."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"


def own_folders(hydra: Any) -> list[str]:
    """The folders with configs of the user: --config-dir and hydra.searchpath."""
    sources = [each for each in hydra.runtime.config_sources if each.schema == "file"]
    return [each.path for each in sources if each.provider not in ("main", "schema")]


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


# Split → the words for it in the names of metrics.
SPLITS = {"train": "train|training", "val": "val|valid|validation|eval", "test": "test"}


def find_loss(names: Iterable[str], split: str, monitor: str | None = None) -> str | None:
    """Find the name of a model's loss on a split: (["epoch", "valid/loss"], "val") → "valid/loss".

    `monitor` is the name of the val loss; None: search. Lightning adds _step and _epoch to names.
    """
    words, names = SPLITS[split], [*names]
    patterns = [f"{split}_loss", f"({words})[-_/. ]?loss", f"loss[-_/. ]?({words})"]
    for pattern in [re.escape(monitor)] if monitor and split == "val" else patterns:
        for suffix in ("", "_step", "_epoch") if split == "train" else ("", "_epoch", "_step"):
            for name in names:
                if re.fullmatch(pattern + suffix, name, re.IGNORECASE):
                    return name
    return None
