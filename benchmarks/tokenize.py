"""Time text files → published token store, against one call of tiktoken's `encode` on the same text.

    python benchmarks/tokenize.py                      # 100 MB, 5 rounds
    python benchmarks/tokenize.py --megabytes 1000 --rounds 1 --only ours,ours-tiktoken
    python benchmarks/tokenize.py --files 4 --only ours,ours-2-workers
    python benchmarks/tokenize.py --megabytes 50 --tokenizers   # others, against their libraries

Each measurement is a separate process. A round runs every candidate once, and ratios are taken within a
round. The text is source code and prose of the installed Python packages in shuffled order; a tenth is
made-up Russian, Chinese and emoji. Peak memory does not include the imports. LitData and gigatoken are
measured if they are installed.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, because its tokenize.py would hide the standard library's

import argparse
import functools
import importlib.util
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.tokenizer import Tokenizer

BASELINE = "tiktoken-encode"
CHUNK_BYTES = 1 << 20


def tiktoken_encode(files: list[Path], out: Path) -> Callable[[], int]:
    """Encode each file with one call, on one thread. Reading the files is not timed."""
    encoding = Tokenizer("gpt2").reference.encoding
    texts = [path.read_text(encoding="utf-8") for path in files]
    return lambda: sum(len(encoding.encode(t, allowed_special={"<|endoftext|>"})) for t in texts)


def gigatoken_encode(files: list[Path], out: Path) -> Callable[[], int]:
    """gigatoken alone, on chunks of 1 MiB in memory. Reading, checking and writing are not included."""
    from lit_gptdata.tokens.engines import load_engine
    from lit_gptdata.tokens.gigatoken import GigatokenEngine

    engine = load_engine(Tokenizer("gpt2"), "gigatoken")
    assert isinstance(engine, GigatokenEngine)
    data = b"".join(path.read_bytes() for path in files)
    chunks = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    return lambda: sum(len(engine._gigatoken.encode(chunk)) for chunk in chunks)


def vocabularies() -> dict[str, str]:
    """Tokenizers by name; most of them are in packages that LIT_GPTDATA_VOCABULARIES has."""
    root = Path(os.environ.get("LIT_GPTDATA_VOCABULARIES", "vocabularies"))
    return {
        "cl100k": "cl100k_base",
        "o200k": "o200k_base",
        "llama3": str(root / "llama_models/llama3/tokenizer.model"),
        "qwen2": str(root / "dashscope/resources/qwen.tiktoken"),
        "deepseek": str(root / "litellm/litellm_core_utils/tokenizers/deepseek_tokenizer.json"),
        "mistral": str(root / "mistral_common/data/tokenizer.model.v1"),
    }


def library_batch(tokenizer: str) -> Callable[[list[Path], Path], Callable[[], int]]:
    """The batch call of the tokenizer's library on one thread, with documents of 20 kB in memory."""

    def candidate(files: list[Path], out: Path) -> Callable[[], int]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        text = "".join(path.read_text(encoding="utf-8") for path in files)
        documents = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
        reference: Any = Tokenizer(tokenizer).reference
        if reference.library == "tiktoken":
            encode = functools.partial(reference.encoding.encode_ordinary_batch, num_threads=1)
            return lambda: sum(map(len, encode(documents)))
        if reference.library == "tokenizers":
            backend = reference._tokenizer
            return lambda: sum(len(each.ids) for each in backend.encode_batch(documents))
        return lambda: sum(map(len, reference.model.Encode(documents, num_threads=1)))

    return candidate


def ours(
    engine: str, workers: int, tokenizer_name: str = "gpt2"
) -> Callable[[list[Path], Path], Callable[[], int]]:
    """`prepare_store`: read, check, encode, hash, write, sync, publish."""

    def candidate(files: list[Path], out: Path) -> Callable[[], int]:
        from lit_gptdata.text.files import FilesCorpus
        from lit_gptdata.tokens.build.local import prepare_store

        tokenizer = Tokenizer(tokenizer_name)
        tokenizer.reference  # noqa: B018 loaded before the clock starts, like the others
        return lambda: (
            prepare_store(
                FilesCorpus(files), tokenizer, out, BuildOptions(engine=engine, workers=workers)
            ).n_tokens
        )

    return candidate


def nanogpt_way(files: list[Path], out: Path) -> Callable[[], int]:
    """Like nanoGPT's prepare.py: the ids of each document as a list, then written to a memory map."""
    encoding = Tokenizer("gpt2").reference.encoding

    def run() -> int:
        ids = []
        for path in files:
            ids.append([*encoding.encode_ordinary(path.read_text(encoding="utf-8")), encoding.eot_token])
        n = sum(map(len, ids))
        written = np.memmap(out / "train.bin", dtype=np.uint16, mode="w+", shape=(n,))
        at = 0
        for document in ids:
            written[at : at + len(document)] = document
            at += len(document)
        written.flush()
        return n

    return run


def _litdata_items(path: str):  # type: ignore[no-untyped-def]
    import torch

    encoding = Tokenizer("gpt2").reference.encoding
    with open(path, encoding="utf-8") as file:
        while text := file.read(CHUNK_BYTES):
            yield torch.tensor(encoding.encode_ordinary(text), dtype=torch.int32)


def litdata_optimize(files: list[Path], out: Path) -> Callable[[], int]:
    """LitData's `optimize` with tiktoken, 2 workers, a TokensLoader, and one input per file."""
    from litdata import TokensLoader, optimize

    inputs = [str(path) for path in files]

    def run() -> int:
        optimize(
            fn=_litdata_items, inputs=inputs, output_dir=str(out / "litdata"), num_workers=2,
            chunk_size=2049 * 8192, item_loader=TokensLoader(block_size=2049),
        )  # fmt: skip
        return 0

    return run


CANDIDATES = {
    BASELINE: tiktoken_encode,
    "gigatoken-encode": gigatoken_encode,
    "ours": ours("auto", 1),
    "ours-2-workers": ours("auto", 2),
    "ours-tiktoken": ours("tiktoken", 1),
    "nanogpt-way": nanogpt_way,
    "litdata-optimize": litdata_optimize,
}
for _name, _location in vocabularies().items():
    CANDIDATES[f"{_name}:library"] = library_batch(_location)
    CANDIDATES[f"{_name}:ours"] = ours("auto", 1, _location)
NEEDS = {
    "gigatoken-encode": "gigatoken", "ours": "gigatoken", "ours-2-workers": "gigatoken",
    "litdata-optimize": "litdata",
}  # fmt: skip


def make_text(folder: Path, megabytes: int, files: int) -> list[Path]:
    """Write `files` files of `megabytes` MB each."""
    rng = random.Random(0)
    suffixes = {".py", ".pyi", ".txt", ".md", ".rst", ".h", ".hpp", ".json"}
    roots = {Path(np.__file__).parents[1], Path(json.__file__).parents[1]}
    sources = sorted(
        p for root in roots for p in root.rglob("*") if p.suffix in suffixes and p.is_file()
    )
    rng.shuffle(sources)
    words = made_up_words(rng)
    paths, at = [], 0
    for number in range(files):
        path = folder / f"text-{number}.txt"
        with open(path, "wb") as out:
            while out.tell() < megabytes * 1_000_000:
                source = sources[at % len(sources)].read_bytes()[: 1 << 20]
                at += 1
                out.write(source.decode("utf-8", "ignore").replace("\0", "").encode())
                if rng.random() < 0.5:
                    out.write(foreign(rng, words, len(source) // 5).encode())
        paths.append(path)
    return paths


def made_up_words(rng: random.Random) -> list[str]:
    """Make 5,000 random words in Cyrillic, Chinese or emoji."""
    # first character, last character, most letters in a word
    scripts = ((0x430, 0x44F, 9), (0x4E00, 0x5E00, 3), (0x1F600, 0x1F64F, 2))
    chosen = [scripts[rng.randrange(3)] for _ in range(5000)]
    return [
        "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, letters)))
        for low, high, letters in chosen
    ]


def foreign(rng: random.Random, words: list[str], length: int) -> str:
    """Make a text of about `length` bytes. Few words are frequent, as in language (Zipf's law)."""
    ranks = [int(len(words) ** rng.random()) for _ in range(length // 12)]
    return " ".join(words[rank] for rank in ranks) + "\n"


def measure(name: str, files: list[Path], out: Path) -> dict[str, float]:
    """Run one candidate in this process: seconds, and MB of peak memory without the imports."""
    import tiktoken  # noqa: F401

    import lit_gptdata.tokens.build.local  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = CANDIDATES[name](files, out)
    start = time.perf_counter()
    n_tokens = run()
    seconds = time.perf_counter() - start
    peak = max(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {"seconds": seconds, "n_tokens": n_tokens, "memory_mb": (peak - before) / 1000}


def run_process(name: str, files: list[Path], folder: Path) -> dict[str, float]:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [sys.executable, __file__, "--measure", name, "--out", str(out), *map(str, files)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="candidates, comma-separated; the baseline is always run")
    parser.add_argument("--tokenizers", action="store_true", help="other tokenizers than gpt2")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help="text files to use instead of made-up ones")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.paths, args.out)))
        return
    wanted = [BASELINE, *args.only.split(",")] if args.only else [n for n in CANDIDATES if ":" not in n]
    if args.tokenizers:
        chosen = args.only.split(",") if args.only else vocabularies()
        wanted = [f"{name}:{side}" for name in chosen for side in ("library", "ours")]
    names = [n for n in dict.fromkeys(wanted) if n not in NEEDS or importlib.util.find_spec(NEEDS[n])]
    with tempfile.TemporaryDirectory() as folder:
        files = args.paths or make_text(Path(folder), args.megabytes, args.files)
        total = sum(path.stat().st_size for path in files) / 1e6
        rounds = [
            {name: run_process(name, files, Path(folder)) for name in names} for _ in range(args.rounds)
        ]
    print(f"\n{len(files)} file(s), {total:,.0f} MB, medians of {args.rounds} rounds\n")
    other = "its library" if args.tokenizers else BASELINE
    print(f"| candidate | speed ÷ {other} | lowest – highest | memory ÷ {other} | memory MB |")
    print("|---|---|---|---|---|")
    for name in names:
        base = f"{name.partition(':')[0]}:library" if args.tokenizers else BASELINE
        ratios = [r[base]["seconds"] / r[name]["seconds"] for r in rounds]
        memory = statistics.median(r[name]["memory_mb"] for r in rounds)
        share = statistics.median(r[name]["memory_mb"] / r[base]["memory_mb"] for r in rounds)
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"| {name} | {middle:.2f} | {low:.2f} – {high:.2f} | {share:.3f} | {memory:,.0f} |")


if __name__ == "__main__":
    main()
