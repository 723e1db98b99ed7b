"""Measure GPT.generate with its key-value cache against a whole window for each token.

    python -m benchmarks.generate

Prints a markdown table: CPU time per token on one thread, after the first token, which costs the whole
prompt either way. The two are measured in turn; a row has the lower value of its runs.
"""

import time

import torch

from lit_gptdata import GPT, EmbeddingStem

NANO = {"n_layers": 3, "n_heads": 4}, 96  # conf/model/nano.yaml
GPT2 = {"n_layers": 12, "n_heads": 12}, 768
CASES = {  # name → model, max_length, tokens of the prompt, new tokens, runs
    "nano, 256 new tokens": (NANO, 512, 8, 256, 2),
    "nano, 256 new tokens, of which 56 fit into its window of 64": (NANO, 64, 8, 256, 2),
    "gpt2, the last 6 of 512 tokens": (GPT2, 512, 506, 6, 1),
}


def cpu_seconds(model: GPT, prompt: torch.Tensor, n: int, cached: bool) -> tuple[float, torch.Tensor]:
    own_code = GPT._own_code
    try:
        if not cached:
            GPT._own_code = ["none"]  # a model with code of its own runs without a cache
        start = time.process_time()
        ids = model.generate(prompt, n, top_k=50, generator=torch.Generator().manual_seed(0))
        return time.process_time() - start, ids
    finally:
        GPT._own_code = own_code


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread of a CPU, float32\n")
    print("| model | whole window, ms per token | cache, ms per token | speed-up | same ids |")
    print("|---|---|---|---|---|")
    for name, ((options, width), max_length, prompt_tokens, n, runs) in CASES.items():
        torch.manual_seed(0)
        model = GPT(EmbeddingStem(50257, max_length, width), **options)
        prompt = torch.randint(50257, (1, prompt_tokens))
        best, found = {}, {}
        for _ in range(runs):
            for cached in (False, True):
                first, _ = cpu_seconds(model, prompt, 1, cached)
                seconds, found[cached] = cpu_seconds(model, prompt, n, cached)
                each = 1000 * (seconds - first) / (n - 1)
                best[cached] = min(each, best.get(cached, each))
        slow, fast = best[False], best[True]
        same = "yes" if torch.equal(found[False], found[True]) else "no"
        print(f"| {name} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} | {same} |", flush=True)


if __name__ == "__main__":
    main()
