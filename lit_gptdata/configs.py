"""Where the shipped Hydra configs are, the arithmetic that they use, and what Hydra says of an error."""

from __future__ import annotations

import operator
from pathlib import Path


def conf_dir() -> Path:
    """The folder conf/: inside the package in a wheel, beside it in a checkout or an editable install.

    Raises FileNotFoundError if it is in neither place.
    """
    package = Path(__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"there is no conf/train.yaml in {package} or {package.parent}: this install is not whole, "
        "install lit-gptdata again"
    )


def register_resolvers() -> None:
    """Let configs divide whole numbers: `${lit_gptdata.floordiv:256,${data.max_length}}`."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("lit_gptdata.floordiv", operator.floordiv, replace=True)


def root_cause(error: BaseException) -> BaseException:
    """The error that Hydra wrapped, where it was raised while an object was made from its config."""
    from hydra.errors import InstantiationException

    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error
