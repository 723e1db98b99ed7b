from __future__ import annotations

import signal
from pathlib import Path

import pytest

from lit_gptdata.text.document import Document

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # begun with `&`: no child would see Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_BOOK = Path(__file__).parents[2] / "shared" / "data" / "pg84.txt"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Whatever a test writes under relative names lands outside the repository."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(autouse=True)
def _loopback_without_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")


@pytest.fixture(scope="module")
def one_thread():
    """Tensors this small lose time to threads, and much of it where other programs run."""
    import torch  # most tests do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def s3_running():
    """An S3 server for the tests of a file, which then have moto and s3fs."""
    from tests.s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_running):
    """The server without faults."""
    s3_running.heal()
    return s3_running


@pytest.fixture
def book() -> Path:
    """Frankenstein as Gutenberg serves it; it is not ours to commit."""
    if not SHARED_BOOK.is_file():
        pytest.skip(f"the book is not here: {SHARED_BOOK}")
    return SHARED_BOOK


class ListCorpus:
    """A corpus of one's own: documents from a list of texts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __iter__(self):
        for number, text in enumerate(self.texts):
            utf8 = text.encode()
            half = len(utf8) // 2  # chunks may end anywhere, also inside a character
            yield Document(source=f"list:{number}", chunks=[utf8[:half], utf8[half:]])

    @property
    def fingerprint(self) -> str:
        return repr(self.texts)

    def __repr__(self) -> str:
        return f"ListCorpus({len(self.texts)} texts)"
