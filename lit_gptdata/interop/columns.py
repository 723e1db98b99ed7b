"""Parquet and Arrow files with a column of lists of ids, such as `input_ids`; each row is a document."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lit_gptdata.interop.blocks import Block, Part
from lit_gptdata.text.formats import ROWS, needs

NAMES = ("input_ids", "tokens", "ids")  # the order of preference among columns with lists of integers
NOT_IDS = ("attention_mask", "token_type_ids", "special_tokens_mask", "labels")  # only with --column


def read(path: Path, dtype: np.dtype, column: str | None) -> Iterator[Block]:
    """The ids of a file; raises ValueError for other columns or a damaged file, ImportError."""
    arrow, compute = (needs(name, "parquet", path) for name in ("pyarrow", "pyarrow.compute"))
    n_rows = n_ids = 0
    try:
        schema, batches = _open(path)
        for batch in batches(name := _column(path, schema, column)):
            rows = batch.column(name).drop_null()
            ends = np.cumsum(compute.list_value_length(rows).to_numpy(), dtype=np.int64)
            if (ids := rows.flatten()).null_count:
                raise ValueError(f"{path}: after row {n_rows:,} there is a null in a list: remove it")
            starts = np.unique(np.append(0, ends))[:-1]  # an empty document is left out
            yield Block(ids.to_numpy(), starts, ("id", n_ids, 1))
            n_rows, n_ids = n_rows + len(batch), n_ids + len(ids)
    except (arrow.ArrowException, OSError) as error:
        problem = f"is broken after row {n_rows:,}, or was cut short"
        raise ValueError(f"{path} {problem}: {error}") from None


def _open(path: Path) -> tuple[Any, Callable[[str], Iterator[Any]]]:
    """The schema of a file, and a function from the name of a column to its batches."""
    if path.suffix == ".parquet":
        table = needs("pyarrow.parquet", "parquet", path).ParquetFile(path, pre_buffer=False)
        return table.schema_arrow, lambda name: table.iter_batches(ROWS, columns=[name])
    arrow, ipc = (needs(name, "parquet", path) for name in ("pyarrow", "pyarrow.ipc"))
    file = arrow.OSFile(str(path))
    if file.read(6) == b"ARROW1":
        table = ipc.open_file(file)
        return table.schema, lambda _: map(table.get_batch, range(table.num_record_batches))
    file.seek(0)
    table = ipc.open_stream(file)  # as the package datasets writes it
    return table.schema, lambda _: iter(table)


def _column(path: Path, schema: Any, wanted: str | None) -> str:
    """The name of the column of ids; raises ValueError that lists the columns."""
    kinds = {field.name: str(getattr(field.type, "value_type", "no list")) for field in schema}
    found = [name for name, kind in kinds.items() if re.fullmatch(r"u?int\d+", kind)]
    preferred = [name for name in NAMES if kinds.get(name, "no list") != "no list"][:1]
    names = [wanted] if wanted else preferred or [name for name in found if name not in NOT_IDS]
    if len(names) == 1 and names[0] in found:
        return names[0]
    advice = f"give --column with one of {found}; " * bool(found)
    raise ValueError(f"{path}: no single column has lists of integers: {advice}it has {kinds}")


def write(folder: Path, name: str, part: Part) -> None:
    """Write `name`.parquet with a row per document in the column `input_ids`; holds one in memory."""
    path, last = folder / f"{name}.parquet", np.empty(0, part.store.dtype)
    arrow, parquet = (needs(name, "parquet", path) for name in ("pyarrow", "pyarrow.parquet"))
    schema = arrow.schema({NAMES[0]: arrow.list_(arrow.from_numpy_dtype(last.dtype))})
    with parquet.ParquetWriter(path, schema) as writer:
        for block in itertools.chain(part.blocks(), [Block(last, np.zeros(1, int))]):
            # the last document of a block may continue in the next one
            edges = np.append(np.zeros(int(len(last) > 0), int), np.asarray(block.starts) + len(last))
            ids = np.append(last, block.ids)
            lists = arrow.ListArray.from_arrays(edges.astype(np.int32), ids[: edges[-1]])
            writer.write_table(arrow.table([lists], schema))
            last = ids[edges[-1] :]
