"""The shipped configs, used in another Hydra app."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from unittest.mock import Mock

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lit_gptdata import hydra_plugin
from lit_gptdata.configs import conf_dir
from lit_gptdata.hydra_plugin import GROUPS, LitGptdataConfigs
from tests.training.run_train import compose_config

ROOT = Path(__file__).parents[1]
CONF = conf_dir()
SHIPPED = sorted(f"{group}={path.stem}" for group in GROUPS for path in (CONF / group).glob("*.yaml"))
# The app's value that trainer, callbacks and logger read.
APP_VALUES = {"output_dir": "run"}


@pytest.fixture(autouse=True)
def _plugin(monkeypatch):
    """Give Hydra this checkout's plugin, not an installed copy, and an empty store."""
    plugins = Plugins.instance()
    others = [c for c in plugins.discover(SearchPathPlugin) if c.__name__ != "LitGptdataConfigs"]
    by_type = plugins.plugin_type_to_subclass_list
    monkeypatch.setitem(by_type, SearchPathPlugin, [*others, LitGptdataConfigs])
    repo = {name: node for name, node in ConfigStore.instance().repo.items() if name != "lit_gptdata"}
    monkeypatch.setattr(ConfigStore.instance(), "repo", repo)


def compose_app(defaults: list, *overrides: str, **config) -> DictConfig:
    """Compose the config of an app in the working folder, with these defaults and values."""
    conf = Path("conf").absolute()
    conf.mkdir(exist_ok=True)
    OmegaConf.save({"defaults": [*defaults, "_self_"], **config}, conf / "config.yaml")
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def unresolved(node) -> object:
    return OmegaConf.to_container(node, resolve=False)


@pytest.mark.parametrize("choice", SHIPPED)
def test_every_config_composes_as_in_train_py_and_resolves(choice):
    group, name = choice.split("=")
    default = {f"lit_gptdata/{group}@{group}": name}
    cfg = compose_app([default])
    assert list(cfg) == [group]
    assert unresolved(cfg[group]) == unresolved(compose_config(choice)[group])
    nested = compose_app([{f"lit_gptdata/{group}@outer.inner": name}])
    assert list(nested) == ["outer"]
    assert unresolved(nested.outer.inner) == unresolved(cfg[group])

    cfg = compose_app([default], **({} if group in ("data", "stem", "model") else APP_VALUES))
    missing = {f"{group}.corpus"} if name in ("files", "url", "sources", "options") else set()
    assert OmegaConf.missing_keys(cfg) == missing
    OmegaConf.resolve(cfg)
    assert "${" not in OmegaConf.to_yaml(cfg)
    nodes = cfg[group].values() if group in ("callbacks", "logger") else [cfg[group]]
    for node in filter(None, nodes):  # stem=none is empty
        assert callable(get_object(node._target_))


@pytest.mark.parametrize("name", ["micro", "gpt2"])
def test_the_sizes_that_fit_a_model_are_a_separate_choice(name):
    groups = {"data": "sample", "stem": "learned", "model": name}
    defaults = [{f"lit_gptdata/{group}@{group}": choice} for group, choice in groups.items()]
    cfg = compose_app([*defaults, {"lit_gptdata/sizes": name}])
    expected = compose_config(f"model={name}")
    for group in groups:
        assert unresolved(cfg[group]) == unresolved(expected[group])
    assert cfg.stem.embedding_dim > 96 == compose_app(defaults).stem.embedding_dim


def test_values_of_the_app_override_the_configs():
    default = {"lit_gptdata/data@data": "frankenstein"}
    cfg = compose_app([default], "data.stride=3", data={"max_length": 8}, seed=5)
    assert (cfg.data.corpus, cfg.data.max_length, cfg.data.stride) == ("frankenstein", 8, 3)
    assert cfg.data.seed == 5
    assert compose_app([default], "lit_gptdata/data@data=sample").data.corpus == "sample"
    both = compose_app([default, {"lit_gptdata/stem@stem": "learned"}], data={"max_length": 8})
    assert both.stem.max_length == 8


def test_a_config_stored_by_the_app_stays():
    ConfigStore.instance().store("frankenstein", {"corpus": "mine"}, group="lit_gptdata/data")
    for _ in range(2):
        assert compose_app([{"lit_gptdata/data@data": "frankenstein"}]).data == {"corpus": "mine"}


def test_every_default_points_into_the_stored_groups():
    compose_app([])
    store = ConfigStore.instance()
    groups = [f"lit_gptdata/{group}" for group in GROUPS]
    names = [f"{group}/{name}" for group in groups for name in store.list(group)]
    assert len(names) == len(SHIPPED)
    for name in names:
        for default in store.load(name).node.defaults:
            assert re.match(r"/lit_gptdata/|\w+$", default), f"{name}: {default}"


def test_without_the_conf_folder_the_plugin_warns_once_and_the_app_runs(monkeypatch):
    monkeypatch.setattr(hydra_plugin, "conf_dir", Mock(side_effect=FileNotFoundError("no conf")))
    monkeypatch.setattr(LitGptdataConfigs, "warned", False)
    with pytest.warns(UserWarning, match=r"configs lit_gptdata/… are not available: no conf"):
        assert compose_app([], x=1) == {"x": 1}
    assert compose_app([], x=2) == {"x": 2}  # a second warning would be an error


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_only_the_hydra_node_reads_hydras_values(path):
    config = OmegaConf.load(path)
    config.pop("hydra", None)  # compose() cannot resolve ${hydra:…} in any other node
    assert "${hydra" not in OmegaConf.to_yaml(config)


def test_the_plugin_imports_nothing_large():
    code = """
import sys
from lit_gptdata.hydra_plugin import LitGptdataConfigs
LitGptdataConfigs().manipulate_search_path(None)
large = {"torch", "lightning", "numpy", "tiktoken"} & set(sys.modules)
assert not large, large
"""
    command = [sys.executable, "-W", "error", "-c", code]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT)})


APP = """
import json, sys
from pathlib import Path
import hydra
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    import lit_gptdata
    import hydra_plugins.lit_gptdata as plugin
    loaded = sorted({"torch", "lightning", "numpy"} & set(sys.modules))
    files = [plugin.__file__, lit_gptdata.__file__]
    cfg = OmegaConf.to_container(cfg, resolve=True)
    print(json.dumps({"cfg": cfg, "loaded": loaded, "files": files}))

main()
"""


def run(*command: object, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    options = {"capture_output": True, "text": True, "timeout": 100, "env": env}
    done = subprocess.run([*map(str, command)], cwd=cwd, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.heavy
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_another_app_finds_the_configs_of_an_install(how, tmp_path):
    tree = tmp_path / "tree"
    outputs = shutil.ignore_patterns(".*", "__pycache__", "outputs", "multirun", "dist", "build")
    shutil.copytree(ROOT, tree, ignore=outputs)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # Adds this interpreter's packages after the venv's own, but not its .pth files (editable installs).
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    have_backend = all(importlib.util.find_spec(name) for name in ("hatchling", "editables"))
    isolation = ["--no-build-isolation"] if have_backend else []  # else pip downloads the backend
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "-q"]
    project = ["-e", tree] if how == "editable" else [tree]
    run(*pip, "install", "--no-deps", "--force-reinstall", *isolation, *project, cwd=tmp_path)
    if how == "wheel":
        shutil.rmtree(tree)

    home = tmp_path / "app"
    (home / "conf").mkdir(parents=True)
    (home / "app.py").write_text(APP)
    choices = {"data": "frankenstein", "stem": "learned", "model": "micro"}
    defaults = [*({f"lit_gptdata/{group}@{group}": name} for group, name in choices.items()), "_self_"]
    OmegaConf.save({"defaults": defaults, "data": {"max_length": 128}}, home / "conf" / "config.yaml")
    result = json.loads(run(python, "app.py", "data.stride=128", cwd=home))
    data, stem, model = (result["cfg"][name] for name in ("data", "stem", "model"))
    assert (data["_target_"], data["corpus"]) == ("lit_gptdata.GPTDataModule", "frankenstein")
    assert data["max_length"] == data["stride"] == stem["max_length"] == 128
    assert (model["_target_"], model["n_layers"]) == ("lit_gptdata.GPT", 6)
    assert result["loaded"] == []
    assert result["files"] == [
        str(site / "hydra_plugins" / "lit_gptdata.py"),
        str((tree if how == "editable" else site) / "lit_gptdata" / "__init__.py"),
    ]
    run(python, "app.py", "-m", "lit_gptdata/data@data=frankenstein,sample", cwd=home)
    if how == "editable":  # an edit in the checkout takes effect
        path = tree / "conf" / "data" / "frankenstein.yaml"
        path.write_text(path.read_text().replace("corpus: frankenstein", "corpus: other"))
        assert json.loads(run(python, "app.py", cwd=home))["cfg"]["data"]["corpus"] == "other"
