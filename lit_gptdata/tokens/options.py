"""What a user gives for each named source of a mixture, and for the stages of its weights.

{"web": {"path": "web/", "weight": 0.6}, "code": {…}}  ──▶  {"web": Source(…), "code": Source(…)}
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lit_gptdata._checks import check_flag, check_integer, check_number, check_string, plain
from lit_gptdata.text.document import Corpus
from lit_gptdata.text.formats import EncodingErrors, Reading
from lit_gptdata.tokens.build.plan import BuildOptions, OnBadDocument
from lit_gptdata.tokens.source import LocalBuild
from lit_gptdata.tokens.tokenizer import Tokenizer

NAME = re.compile("[A-Za-z_][A-Za-z0-9_-]*")  # names become Hydra keys, metrics and file names


@dataclass(frozen=True)
class Source:
    """One source of a mixture: `path` or `store_url`, and its own value of some options.

    An option that is None has the data module's value. `weight` is the share of the training tokens, in
    any unit; 0 keeps the source for validation only. Without any weight, sources count by their size.
    """

    path: str | Sequence[str] | Any = None
    """What `GPTDataModule(corpus=…)` takes, except for a mapping."""
    weight: float | None = None
    store_url: str | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None
    text_column: str | None = None
    encoding_errors: EncodingErrors | None = None
    strip_gutenberg: bool | None = None
    on_bad_document: OnBadDocument | None = None
    min_document_bytes: int | None = None
    max_document_bytes: int | None = None
    drop_duplicates: bool | None = None
    stream: bool | None = None

    def given(self) -> dict[str, Any]:
        """The options that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


def read_sources(option: str, sources: Mapping[Any, Any]) -> dict[str, Source]:
    """Read a mapping of sources; raises TypeError or ValueError that names the source and the value."""
    if not isinstance(sources, Mapping):
        raise TypeError(f"{option} must be a mapping, {{name: path, …}}, got {sources!r}")
    if not sources:
        raise ValueError(f"{option} is an empty mapping: name at least one source")
    found = {name: _read_source(f"{option}.{name}", name, value) for name, value in sources.items()}
    without = [name for name, source in found.items() if source.weight is None]
    if 0 < len(without) < len(found):
        problem = f"{option}: {', '.join(without)} has no weight, but another source has one"
        advice = (
            "Give each source a weight (0: validation only), or none, to count sources by their size"
        )
        raise ValueError(f"{problem}. {advice}")
    return found


def _read_source(option: str, name: Any, value: Any) -> Source:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{option.partition('.')[0]}: the name of a source has letters, digits, _ and -, and does "
            f"not start with a digit or -, got {name!r}"
        )
    known = [f.name for f in fields(Source)]
    if isinstance(value, str) and value.startswith("{") and ":" in value:  # LightningCLI did not know it
        raise ValueError(f"{option} must be a path or have options of {', '.join(known)}, got {value!r}")
    if isinstance(value, Mapping) and not isinstance(value, Corpus):
        if unknown := [key for key in value if key not in known]:
            raise ValueError(f"{option} has no option {unknown[0]!r}: choose from {', '.join(known)}")
        value = Source(**value)
    source = value if isinstance(value, Source) else Source(path=value)
    if (source.path is None) == (source.store_url is None):
        got = "neither" if source.path is None else "both"
        raise ValueError(f"{option} must have either path or store_url, got {got}")
    if source.weight is None:
        return source
    return replace(source, weight=check_number(f"{option}.weight", source.weight, math.inf))


def read_stages(
    stages: Sequence[Mapping[str, Any]], sources: Mapping[str, Source]
) -> list[dict[str, Any]]:
    """Read the option `stages`, as plain dicts; raises TypeError or ValueError that names the stage."""
    if any(source.weight is not None for source in sources.values()):
        raise ValueError("stages replace the weights of the sources: remove `weight` from each source")
    found = []
    for option, stage, tokens in _parts("stages", stages, "weights", "{…}"):
        key = f"{option}.weights"
        if not isinstance(given := stage["weights"], Mapping):
            raise TypeError(f"{key} must be a mapping, {{source: weight, …}}, got {given!r}")
        weights = {name: check_number(f"{key}.{name}", share, math.inf) for name, share in given.items()}
        if weights.keys() != sources.keys():
            names = f"{', '.join(sources)} (0 is allowed)"
            raise ValueError(f"{key} must name the sources {names}, got {[*weights]}")
        if not any(weights.values()):
            raise ValueError(f"{key} are all 0: at least one source must train")
        found.append({"tokens": tokens, "weights": {name: weights[name] for name in sources}})
    return found


def read_batch_schedule(options: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Read the option `batch_schedule`, as plain dicts; raises TypeError or ValueError."""
    if (schedule := options["batch_schedule"]) is None:
        return None
    found = []
    for option, part, tokens in _parts("batch_schedule", schedule, "batch_size", "…"):
        size = check_integer(f"{option}.batch_size", part["batch_size"], 1, "the windows in a batch")
        found.append({"tokens": tokens, "batch_size": size})
    return found


def read_skip_steps(options: Mapping[str, Any]) -> list[list[int]] | None:
    """Read the option `skip_steps`, sorted and merged; raises TypeError or ValueError."""
    if (ranges := options["skip_steps"]) is None:
        return None
    form = "[begin, end], two numbers of batches"
    if isinstance(ranges, str) or not isinstance(ranges, Sequence):
        raise TypeError(f"skip_steps must be a list of {form} each, got {ranges!r}")
    found: list[list[int]] = []
    for i, pair in enumerate(ranges):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"skip_steps[{i}] must be {form}, got {pair!r}")
        begin = check_integer(f"skip_steps[{i}][0]", pair[0], 0, "the first batch that is skipped")
        end = check_integer(f"skip_steps[{i}][1]", pair[1], begin + 1, "the batch after the last one")
        found.append([begin, end])
    merged: list[list[int]] = []
    for begin, end in sorted(found):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


def _parts(
    name: str, parts: Any, key: str, form: str
) -> Iterator[tuple[str, Mapping[str, Any], int | None]]:
    """The parts of a run in the option `name`, {tokens, `key`} each: (option, part, its tokens).

    The last part has no end, so its tokens are None.
    """
    if isinstance(parts, str) or not isinstance(parts, Sequence) or not parts:
        raise TypeError(f"{name} must be a list of {{tokens: …, {key}: {form}}}, got {parts!r}")
    for number, part in enumerate(parts):
        if not isinstance(part, Mapping) or not {key} <= set(part) <= {"tokens", key}:
            raise ValueError(f"{name}[{number}] must have the keys tokens and {key}, got {part!r}")
        option, tokens = f"{name}[{number}]", part.get("tokens")
        if (tokens is None) != (number == len(parts) - 1):
            rule = f"only the last one of {name} has no end: give tokens to all others"
            raise ValueError(f"{option}.tokens is {tokens}, but {rule}")
        if tokens is not None:
            meaning = "a length in input tokens of all ranks"
            tokens = check_integer(f"{option}.tokens", tokens, 1, meaning)
        yield option, part, tokens


def local_build(options: Mapping[str, Any], tokenizer: Tokenizer, data_dir: Path) -> LocalBuild:
    """The build of `options["corpus"]`; checks the options of GPTDataModule or of a source."""
    reading = Reading(
        encoding_errors=plain(options["encoding_errors"]),
        text_column=check_string("text_column", options["text_column"]),
        strip_gutenberg=check_flag("strip_gutenberg", options["strip_gutenberg"]),
    )
    names = [field.name for field in fields(BuildOptions) if field.name != "workers"]
    build = BuildOptions(workers=options["build_workers"], **{name: options[name] for name in names})
    stream = check_flag("stream", options["stream"])
    return LocalBuild(options["corpus"], tokenizer, data_dir, reading, stream, build)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Make an error name the source."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        if name and isinstance(error, OSError) and error.strerror:
            error.strerror = f"source {name}: {error.strerror}"
        elif name:
            error.args = (f"source {name}: {error}",)
        raise
