"""Offer the shipped configs to every Hydra app: `defaults: [lit_gptdata/data@data: frankenstein]`.

Hydra looks for plugins only in the namespace package `hydra_plugins`, so pyproject.toml installs this
file as hydra_plugins/lit_gptdata.py. It uses Hydra's ConfigStore instead of a search path, because in an
editable install a pkg:// path finds nothing and reports no error.
"""

import re
import warnings
from functools import partial
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from lit_gptdata.configs import conf_dir

GROUPS = ("data", "stem", "model", "trainer", "callbacks", "logger")


def store_configs(conf: Path) -> None:
    """Put every YAML file of GROUPS into the ConfigStore, as lit_gptdata/<group>/<name>.

    Some files have the package _global_: model/micro.yaml sets `model`, but also `stem` and `data`.
    Only the app knows where its nodes are. So `model` becomes lit_gptdata/model/micro, and the rest
    becomes lit_gptdata/sizes/micro, for apps whose nodes are named `stem` and `data`.
    """
    store = partial(ConfigStore.instance().store, provider="lit_gptdata")
    for group in GROUPS:
        for path in sorted((conf / group).glob("*.yaml")):
            stored_type = ConfigStore.instance().get_type(f"lit_gptdata/{group}/{path.name}")
            if stored_type is not ObjectType.NOT_FOUND:  # Hydra has built a search path before
                continue
            config = OmegaConf.load(path)
            assert isinstance(config, DictConfig), f"{path} must be a mapping"
            defaults = config.pop("defaults", [])
            is_global = path.read_text(encoding="utf-8").startswith("# @package _global_\n")
            node = config.pop(group) if is_global else config
            # /model/nano@model → /lit_gptdata/model/nano@_here_; a name without a slash is in this group
            defaults = [re.sub("^/", "/lit_gptdata/", default) for default in defaults]
            node.defaults = [re.sub(f"@{group}$", "@_here_", default) for default in defaults]
            store(group=f"lit_gptdata/{group}", name=path.stem, node=node)
            if is_global:
                store(group="lit_gptdata/sizes", name=path.stem, node=config, package="_global_")


class LitGptdataConfigs(SearchPathPlugin):
    """Store the configs whenever Hydra builds its search path. If that fails, warn once."""

    warned = False

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        try:
            store_configs(conf_dir())
        except Exception as error:  # any kind: an app that does not use these configs must still run
            if not LitGptdataConfigs.warned:
                LitGptdataConfigs.warned = True
                warnings.warn(f"the configs lit_gptdata/… are not available: {error}", stacklevel=2)
