"""Commands run in the process of the test: what Hydra sets up for a process ends with the test."""

import logging
import sys

import pytest
from hydra.core.hydra_config import HydraConfig


@pytest.fixture(autouse=True)
def _process(monkeypatch):
    """Restore sys.path, the config that Hydra knows, and logging, with its open files."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()  # train.log
    root.handlers, root.level = handlers, level
