"""Training a tokenizer: both libraries write the same file, from the train split alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lit_gptdata.text.corpus import open_corpus
from lit_gptdata.text.document import Document
from lit_gptdata.tokens.engines import load_engine
from lit_gptdata.tokens.libraries.train import HELD_OUT_BYTES, train_tokenizer
from lit_gptdata.tokens.tokenizer import END_OF_TEXT, Tokenizer
from tests.conftest import ListCorpus
from tests.tokens.builds import file_size_limit
from tests.tokens.test_chunks import random_texts

tokenizers = pytest.importorskip("tokenizers")
LIBRARIES = ("gigatoken", "tokenizers")
SAMPLE = open_corpus("sample")
NEW = "\u088f\U0002b73a"  # letters since Unicode 17


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch) -> str:
    """Each library that may learn the merges."""
    use_library(request.param, monkeypatch)
    return request.param


def use_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "gigatoken":
        pytest.importorskip("gigatoken")
    else:
        monkeypatch.setitem(sys.modules, "gigatoken", None)


def train(texts: list[str], vocab_size: int, part: float = 1.0) -> dict[str, int]:
    """The vocabulary of a tokenizer of these documents."""
    with warnings.catch_warnings(action="ignore"):
        train_tokenizer(Path("own.json"), vocab_size, [(ListCorpus(texts), part)])
    return json.loads(Path("own.json").read_bytes())["model"]["vocab"]


def in_new_process(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60)


def test_the_file_is_the_same_with_both_libraries_and_any_number_of_threads(tmp_path):
    code = """
from pathlib import Path
from lit_gptdata.text.corpus import open_corpus
from lit_gptdata.tokens.engines import load_engine
from lit_gptdata.tokens.libraries.train import train_tokenizer
train_tokenizer(Path("own.json"), 2000, [(open_corpus("sample"), 0.9)])
"""
    pytest.importorskip("gigatoken")
    train_tokenizer(tmp_path / "here.json", 2000, [(SAMPLE, 0.9)])
    for threads, hidden in (("3", ""), ("1", "import sys; sys.modules['gigatoken'] = None")):
        done = in_new_process(hidden + code, RAYON_NUM_THREADS=threads, PYTHONHASHSEED=threads)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert Path("own.json").read_bytes() == (tmp_path / "here.json").read_bytes()


def test_both_libraries_learn_the_same_merges_from_hostile_texts(monkeypatch):
    pytest.importorskip("gigatoken")
    rng = random.Random(0)
    alphabets = ["ab", " \n\t", "aé1.' ", [END_OF_TEXT, "<|end", "x "], ["\0", "a", *NEW]]
    cases = [
        (["".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 60))) for _ in range(3)], size)
        for size in (257, 258, 270, 300, 400) for _ in range(12)
    ]  # fmt: skip
    first = [train(*case) for case in cases]
    use_library("tokenizers", monkeypatch)
    for case, vocab in zip(cases, first, strict=True):
        assert train(*case) == vocab, case


def test_the_ids_are_gpt2s_bytes_then_merges_then_the_special_token(library):
    vocab = train(["to be or not to be"] * 9, 262)
    gpt2 = Tokenizer("gpt2").token_bytes
    own = Tokenizer("own.json")
    assert own.token_bytes[:256] == gpt2[:256]
    assert len(vocab) + 1 == own.vocab_size == 262
    assert own.special_ids == {END_OF_TEXT: 261}
    assert own.end_of_document == 261
    assert own.encode("be" + END_OF_TEXT)[-1] == 261
    assert own.is_lossless


def test_a_short_text_writes_the_real_size_with_one_warning(library):
    with pytest.warns(
        UserWarning, match=r"yields 7 merges.* has 264 tokens, not vocab_size=1,000"
    ) as seen:
        _, used, _ = train_tokenizer(Path("own.json"), 1000, [(ListCorpus(["hi hi there"]), 1.0)])
    assert len(seen) == 1
    assert used == library
    assert Tokenizer("own.json").vocab_size == 264
    assert Tokenizer("own.json").encode("hi hi there") == [256, 260, 262]


def test_no_token_crosses_documents_or_holds_a_special_string(library):
    vocab = train(["ab", "c"] * 50 + [f"x{END_OF_TEXT}y"] * 50 + [f"p{NEW}q"] * 50, 400)
    assert set(vocab) - set(map(chr, range(0x180))) == {"ab"}


def test_only_the_train_split_trains(library):
    texts = [f"train {n} train" for n in range(900)] + ["secret"] * 100
    train(texts, 400, part=0.9)
    assert "secret" not in json.loads(Path("own.json").read_bytes())["model"]["vocab"]
    assert "Ġtrain" in json.loads(Path("own.json").read_bytes())["model"]["vocab"]
    one = [" ".join(["train"] * 5000 + ["secret"] * 500)]
    assert "Ġsecret" not in train(one, 300, part=0.9)
    assert "Ġsecret" in train(one, 300)


def test_held_out_text_follows_what_trained(library):
    texts = [(SAMPLE, 0.5), (ListCorpus(["abc"] * 99), 1.0)]
    n_trained, _, rest = train_tokenizer(Path("own.json"), 300, texts)
    text = "".join(topic for topic in SAMPLE.topics.values())
    held_out = "".join(rest)
    assert held_out in text
    n_bytes = len(text.encode())
    assert 0.45 * n_bytes < n_trained - 297 <= 0.49 * n_bytes
    assert 0 < len(held_out) <= HELD_OUT_BYTES


def test_other_programs_load_the_file_and_give_the_same_ids(library):
    train_tokenizer(Path("own.json"), 1000, [(SAMPLE, 0.9)])
    rng = random.Random(0)
    text = "".join(SAMPLE.topics.values())
    hostile = ["é", "語🙂", "\0", "\r\n", "  ", "'s", NEW, END_OF_TEXT, "<|endof", "1234", "\u0301"]
    starts = [rng.randrange(len(text) - 30) for _ in range(10_000)]
    strings = [text[a : a + rng.randrange(30)] + rng.choice(hostile) + text[a : a + 3] for a in starts]
    theirs = tokenizers.Tokenizer.from_file("own.json")
    own = Tokenizer("own.json")
    assert [own.encode(s) for s in strings] == [e.ids for e in theirs.encode_batch(strings)]
    assert [own.decode(own.encode(s)) for s in strings] == strings
    if library == "gigatoken":
        import gigatoken

        loaded = gigatoken.Tokenizer("own.json")
        strings = [string for string in strings if NEW not in string]
        assert [loaded.encode(s).tolist() for s in strings] == [own.encode(s) for s in strings]


def test_nothing_is_printed(library, capfd):
    train_tokenizer(Path("own.json"), 300, [(SAMPLE, 0.9)])
    print("still works")
    assert capfd.readouterr() == ("still works\n", "")


def test_a_kill_leaves_nothing(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from lit_gptdata.tokens.libraries import train
train.write_whole = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from lit_gptdata.text.corpus import open_corpus
train.train_tokenizer(Path({str(tmp_path / "own.json")!r}), 300, [(open_corpus("sample"), 0.9)])
"""
    assert in_new_process(code).returncode == -9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [1000, 400_000])
def test_a_full_disk_keeps_the_old_file_and_is_named(tmp_path, library, limit):
    out = tmp_path / "own.json"
    out.write_text("old")
    with file_size_limit(limit), pytest.raises(OSError, match=r"File too large: .* '.*/own\.json'"):
        train_tokenizer(out, 300, [(SAMPLE, 0.9)])
    short = ListCorpus([text[:200] for text in SAMPLE.topics.values()])
    with file_size_limit(20_000), pytest.raises(OSError, match=r"File too large: '.*/own\.json'"):
        train_tokenizer(out, 1200, [(short, 1.0)])  # its tokenizer.json is larger than the text
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (256, ValueError, "vocab_size must be an integer ≥ 257, got 256"),
        ("8k", TypeError, "vocab_size must be an integer ≥ 257, got '8k'"),
        (10**9, ValueError, "vocab_size must be an integer ≤ 16,777,216, got 1,000,000,000"),
    ],
)
def test_wrong_sizes_are_refused(size, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(Path("own.json"), size, [(SAMPLE, 0.9)])
    assert not Path("own.json").exists()


def test_a_text_without_a_train_split_is_refused(library):
    class Empty(ListCorpus):
        def __iter__(self):
            yield Document(source="nothing", chunks=[])

    for corpus, part in ((Empty([]), 1.0), (SAMPLE, 0.001)):
        with pytest.raises(ValueError, match=r"no text is left to train on .*: give more text, or l"):
            train_tokenizer(Path("own.json"), 300, [(corpus, part)])
    assert os.listdir() == []


@pytest.mark.parametrize("text", ["a" * 60_000, "語" * 60_000])
def test_a_text_without_a_place_to_cut_is_refused(text):
    with pytest.raises(ValueError, match="no text is left to train on before the first space"):
        train_tokenizer(Path("own.json"), 300, [(ListCorpus([text]), 0.9)])


def test_without_either_library_the_error_has_the_pip_command(monkeypatch):
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'lit-gptdata\[tokenizers\]'"):
        train_tokenizer(Path("own.json"), 300, [(SAMPLE, 0.9)])


@pytest.mark.heavy
def test_gigatoken_gives_the_ids_of_the_library_with_a_tokenizer_trained_here():
    pytest.importorskip("gigatoken")
    code = b"".join(chunk for each in open_corpus("stdlib") for chunk in each.chunks).decode()
    train_tokenizer(Path("own.json"), 8192, [(SAMPLE, 1.0), (open_corpus("stdlib"), 0.9)])
    own = Tokenizer("own.json")
    engine = load_engine(own, "gigatoken")
    strings = [*random_texts(100_000, seed=15)]
    mixed = [
        code[at : at + 2000] + " ".join(strings[at // 2000 :: 2000]) for at in range(0, len(code), 2000)
    ]
    assert sum(len(text.encode()) for text in mixed) > 10_000_000
    for text in strings + mixed:
        assert engine.encode(text.encode()).tolist() == own.encode(text), repr(text)
    assert engine.name == "gigatoken"
