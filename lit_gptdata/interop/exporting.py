"""Write tokens into a new folder, in the format of another program."""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from lit_gptdata._io import sync_folder
from lit_gptdata.interop.blocks import Part
from lit_gptdata.interop.formats import Format


def export(format: Format, parts: Mapping[str, Part], folder: Path) -> list[Path]:
    """Write all `parts` or none, and return the files. A name may have a subfolder: "web/train".

    Raises FileExistsError unless the folder is new or empty, OSError.
    """
    assert format.write is not None
    check_new(folder)
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        for path, part in ((new / name, part) for name, part in parts.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            format.write(path.parent, path.name, part)
        files = sorted(path for path in new.rglob("*") if path.is_file())
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        for path in {new, *(path.parent for path in files)}:
            sync_folder(path)
        os.rename(new, folder)
        sync_folder(folder.parent)
    except OSError as error:
        advice = "nothing is written. Free some space, or give another folder"
        raise OSError(error.errno, f"{error.strerror or error}: {advice}", str(folder)) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return [folder / path.relative_to(new) for path in files]


def check_new(folder: Path) -> None:
    """Raise FileExistsError unless a folder is new or empty."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: give a new folder, or remove it")
