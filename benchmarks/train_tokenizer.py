"""Time `train_tokenizer` with gigatoken and with tokenizers, against tokenizers alone, on text files.

    python benchmarks/train_tokenizer.py 16384 text.txt

Each one is a separate process. Memory is the peak with imports, without the pages of mapped files.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, because its tokenize.py would hide the standard library's

import subprocess
import time
from contextlib import suppress
from pathlib import Path


def alone(path: Path, vocab_size: int, files: list[str]) -> None:
    """As in the documentation of tokenizers, which reads the files line by line."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    model.train(files, trainer)
    model.save(str(path))


def ours(path: Path, vocab_size: int, files: list[str]) -> None:
    from lit_gptdata.text.files import FilesCorpus
    from lit_gptdata.tokens.libraries.train import train_tokenizer

    train_tokenizer(path, vocab_size, [(FilesCorpus(files), 1.0)])


def ours_without_gigatoken(path: Path, vocab_size: int, files: list[str]) -> None:
    sys.modules["gigatoken"] = None  # type: ignore[assignment]
    ours(path, vocab_size, files)


CANDIDATES = {f.__name__: f for f in (alone, ours_without_gigatoken, ours)}


def main() -> None:
    for name in CANDIDATES:
        peak, start = 0, time.perf_counter()
        process = subprocess.Popen([sys.executable, __file__, name, *sys.argv[1:]])
        while process.poll() is None:
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = max(peak, next(int(line.split()[1]) for line in lines if "RssAnon" in line))
            time.sleep(0.01)
        print(f"{name}: {time.perf_counter() - start:.1f} s with imports, {peak / 1000:.0f} MB")


if __name__ == "__main__":
    if sys.argv[1] in CANDIDATES:
        CANDIDATES[sys.argv[1]](Path(f"{sys.argv[1]}.json"), int(sys.argv[2]), sys.argv[3:])
    else:
        main()
