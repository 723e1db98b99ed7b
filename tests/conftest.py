from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from lit_gptdata.text.document import Document

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started with `&`, where children ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores

# No test asserts a duration.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SHARED_BOOK = Path(__file__).parents[2] / "shared" / "data" / "pg84.txt"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run all tests in two processes, and named files in one process, where -s shows their output."""
    return 2 if config.args_source == pytest.Config.ArgsSource.TESTPATHS else 0


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """A test runs in an empty folder, so relative paths never write into the repository."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(autouse=True)
def _loopback_without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")


@pytest.fixture(scope="module")
def one_thread():
    """Give torch one thread, because threads slow down tensors as small as in these tests."""
    import torch  # most tests do not need it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def s3_running():
    """Start one S3 server for a test file. It needs moto and s3fs."""
    from tests.s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_running):
    """Return the S3 server after removing all faults."""
    s3_running.heal()
    return s3_running


@pytest.fixture
def book() -> Path:
    """Return Frankenstein from Project Gutenberg, which we do not commit."""
    if not SHARED_BOOK.is_file():
        pytest.skip(f"the book is missing: {SHARED_BOOK}")
    return SHARED_BOOK


class ListCorpus:
    """A custom corpus: each text of a list is a document."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __iter__(self):
        for number, text in enumerate(self.texts):
            utf8 = text.encode()
            half = len(utf8) // 2  # a chunk may end anywhere, even inside a character
            yield Document(source=f"list:{number}", chunks=[utf8[:half], utf8[half:]])

    @property
    def fingerprint(self) -> str:
        return repr(self.texts)

    def __repr__(self) -> str:
        return f"ListCorpus({len(self.texts)} texts)"
