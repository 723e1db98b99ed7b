"""The shipped Hydra configs: their folder, the arithmetic in them, and the errors behind Hydra's."""

import operator
from pathlib import Path


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


def root_cause(error: BaseException) -> BaseException:
    """Return the error that an object's constructor raised, without the errors Hydra wraps around it."""
    from hydra.errors import InstantiationException

    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error
