"""The shipped configs for any Hydra app: `defaults: [lit_gptdata/data@data: frankenstein]`.

Hydra looks for plugins in the namespace package `hydra_plugins` alone, so pyproject.toml puts this file
there, as hydra_plugins/lit_gptdata.py: moved in a wheel, copied by an editable install. The configs go
through Hydra's ConfigStore, not through a search path: in an editable install pkg:// paths find nothing
and say nothing.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from lit_gptdata.configs import conf_dir

GROUPS = ("data", "stem", "model", "trainer", "callbacks", "logger")


def store_configs(conf: Path) -> None:
    """Put every YAML of GROUPS under `conf` into the ConfigStore, as lit_gptdata/<group>/<name>.

    A file for the package _global_ (model/micro.yaml) sets its own group's node and others beside it. An
    app says itself where its nodes are, so the own node is the config, and what is left of the file is
    lit_gptdata/sizes/<name>, for the nodes of an app that calls them `stem` and `data`.
    What the store has already stays: Hydra calls this each time it builds a search path.
    """
    for group in GROUPS:
        for path in sorted((conf / group).glob("*.yaml")):
            if _is_stored(group, path.stem):
                continue
            config = OmegaConf.load(path)
            assert isinstance(config, DictConfig), f"{path} is not a mapping"
            defaults = [_moved(default, group) for default in config.pop("defaults", [])]
            global_ = re.match(r"# @package _global_\n", path.read_text(encoding="utf-8"))
            own = config.pop(group) if global_ else config
            own.defaults = defaults
            _store(group, path.stem, own)
            if global_:
                _store("sizes", path.stem, config, package="_global_")


def _moved(default: str, group: str) -> str:
    """A default where it is now: /model/nano@model → /lit_gptdata/model/nano@_here_.

    Names without a slash are of the same group, and stay.
    """
    return re.sub(f"@{group}$", "@_here_", re.sub(r"^/", "/lit_gptdata/", default))


def _is_stored(group: str, name: str) -> bool:
    kind = ConfigStore.instance().get_type(f"lit_gptdata/{group}/{name}.yaml")
    return kind is not ObjectType.NOT_FOUND


def _store(group: str, name: str, node: object, package: str | None = None) -> None:
    ConfigStore.instance().store(
        group=f"lit_gptdata/{group}", name=name, node=node, package=package, provider="lit_gptdata"
    )


class LitGptdataConfigs(SearchPathPlugin):
    """Stores the configs when Hydra builds its search path; warns once, and goes on, if it cannot."""

    warned = False

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        try:
            store_configs(conf_dir())
        except Exception as error:  # of whatever kind: most apps do not use these configs
            if not LitGptdataConfigs.warned:
                LitGptdataConfigs.warned = True
                warnings.warn(f"the configs lit_gptdata/… are not there: {error}", stacklevel=2)
