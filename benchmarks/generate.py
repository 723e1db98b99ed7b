"""Measure GPT.generate with its key-value cache against a whole window for each token.

    python -m benchmarks.generate

Prints a markdown table: the best of three runs in turn, and whether both give the same ids.
"""

import time

import torch

from lit_gptdata import GPT, EmbeddingStem

NANO = {"n_layers": 3, "n_heads": 4}, 96  # conf/model/nano.yaml
GPT2 = {"n_layers": 12, "n_heads": 12}, 768
CASES = {  # name → model, max_length, tokens of the prompt, new tokens, runs
    "nano, 256 new tokens": (NANO, 512, 8, 256, 3),
    "nano, 256 new tokens, window of 64": (NANO, 64, 8, 256, 3),
    "gpt2, 64 new tokens after 448": (GPT2, 512, 448, 64, 1),
    "gpt2, 504 new tokens": (GPT2, 512, 8, 504, 1),
}


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of a CPU, float32\n")
    print("| model | whole window, s | cache, s | cache, tokens/s | speed-up | same ids |")
    print("|---|---|---|---|---|---|")
    for name, ((options, width), max_length, prompt_tokens, n, runs) in CASES.items():
        torch.manual_seed(0)
        model = GPT(EmbeddingStem(50257, max_length, width), **options)
        prompt = torch.randint(50257, (1, prompt_tokens))
        best, found = {}, {}
        for _ in range(runs):
            for cached in (False, True):
                own_code = GPT._own_code
                if not cached:
                    GPT._own_code = ["none"]  # a model with code of its own runs without a cache
                start = time.perf_counter()
                generator = torch.Generator().manual_seed(0)
                found[cached] = model.generate(prompt, n, top_k=50, generator=generator)
                seconds = time.perf_counter() - start
                GPT._own_code = own_code
                best[cached] = min(seconds, best.get(cached, seconds))
        slow, fast = best[False], best[True]
        same = "yes" if torch.equal(found[False], found[True]) else "no"
        row = f"| {name} | {slow:.2f} | {fast:.2f} | {n / fast:.0f} | {slow / fast:.1f} | {same} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
