import math

import pytest
import torch

from lit_gptdata.model.block import KeyValueCache
from lit_gptdata.model.gpt import GPT
from lit_gptdata.model.stem import EmbeddingStem
from tests.model.small_gpt import MAX_LENGTH, D, V, batch_of, make_gpt, random_windows

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_sampling_takes_the_most_likely_token_and_crops_the_context():
    model = make_gpt()
    prompt = batch_of(random_windows(2, tokens=3))[0]
    out = model.generate(prompt, max_new_tokens=12, temperature=0)
    assert out.shape == (2, 15)
    assert torch.equal(out[:, :3], prompt)
    for t in range(3, 15):
        logits = model(out[:, max(0, t - MAX_LENGTH) : t])[:, -1]
        assert torch.equal(out[:, t], logits.argmax(-1))
    assert torch.equal(model.generate(prompt, 12, temperature=0), out)
    assert torch.equal(model.generate(prompt, 12, temperature=1e-30), out)
    assert torch.equal(model.generate(prompt, 12, top_k=1), out)
    assert torch.equal(model.generate(prompt.to(torch.uint16), 12, temperature=0), out)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_top_k_draws_the_k_most_likely_tokens_with_their_probabilities():
    model = make_gpt()
    with torch.no_grad():
        model.stem.token_embedding.weight.mul_(20)  # so that probabilities differ
    prompt = torch.full((4000, 1), 7)
    drawn = model.generate(prompt, 1, temperature=2.0, top_k=3, generator=generator(0))[:, 1]
    top_logits, tokens = model(prompt[:1])[0, -1].topk(3)
    probabilities = (top_logits / 2.0).softmax(0)
    assert set(drawn.tolist()) <= set(tokens.tolist())
    for token, probability in zip(tokens.tolist(), probabilities.tolist(), strict=True):
        assert (drawn == token).float().mean().item() == pytest.approx(probability, abs=0.04)


def test_a_seeded_generator_makes_samples_repeatable():
    model = make_gpt()
    prompt = torch.zeros(1, 1, dtype=torch.int64)

    def sample(seed: int, n: int = 30, **options) -> torch.Tensor:
        return model.generate(prompt, n, generator=generator(seed), **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(1, 9, top_k=10**6), sample(1)[:, :10])


def test_generate_turns_dropout_off_and_restores_all_modes():
    model = make_gpt(dropout=0.5)
    model.blocks[0].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    out = model.generate(prompt, 20, temperature=0)
    assert torch.equal(model.generate(prompt, 20, temperature=0), out)
    assert not out.requires_grad
    assert {name: m.training for name, m in model.named_modules()} == modes
    with pytest.raises(IndexError, match="vocab_size=50"):
        model.generate(torch.tensor([[99]]), 1)
    assert {name: m.training for name, m in model.named_modules()} == modes


class OwnFeatures(GPT):
    def _features(self, ids):
        return super()._features(ids) * 2


class OwnStem(EmbeddingStem):
    def forward(self, ids):
        return super().forward(ids)


def gpt_with_own_block() -> GPT:
    class Block(type(make_gpt().blocks[0])):
        def forward(self, x):
            return super().forward(x)

    model = make_gpt()
    model.blocks[1].__class__ = Block
    return model


def count_tokens(model: GPT) -> list[int]:
    """A list that gets the number of tokens that each call of the stem embeds."""
    lengths: list[int] = []
    model.stem.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    return lengths


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cached_logits_equal_those_of_the_whole_text(position, dtype):
    model = make_gpt(position=position, dropout=0.5).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        ids = batch_of(random_windows(3))[0]  # (3, 8)
        caches = [KeyValueCache() for _ in model.blocks]
        parts = [model._head(model._features(ids[:, :n], caches)) for n in range(3, 9)]
        expected = model(ids)
    atol = 1e-5 if dtype != torch.bfloat16 else 0.5
    assert expected.std() > 0.5
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=atol)


def test_generate_embeds_each_token_once_until_the_window_slides():
    model = make_gpt()
    lengths = count_tokens(model)
    model.generate(torch.zeros(2, 3, dtype=torch.int64), 8, temperature=0)
    assert lengths == [3, 1, 1, 1, 1, 1, 8, 8]  # max_length is 8
    lengths.clear()
    model.generate(torch.zeros(2, 20, dtype=torch.int64), 2)
    assert lengths == [8, 8]


@pytest.mark.parametrize("n", [5, 30])
def test_the_cache_changes_no_sample(n, monkeypatch):
    model, prompt = make_gpt(n_layers=3), batch_of(random_windows(4, tokens=2))[0]
    lengths = count_tokens(model)
    cached = model.generate(prompt, n, 0.7, top_k=20, generator=generator(5))
    monkeypatch.setattr(GPT, "_own_code", ["off"])
    assert torch.equal(model.generate(prompt, n, 0.7, top_k=20, generator=generator(5)), cached)
    assert lengths[n : n + 3] == [2, 3, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnFeatures(EmbeddingStem(V, MAX_LENGTH, D)),
        lambda: GPT(OwnStem(V, MAX_LENGTH, D)),
        gpt_with_own_block,
    ],
)
def test_own_code_in_a_model_is_called_as_before(make):
    model = make()
    lengths = count_tokens(model)
    out = model.generate(torch.zeros(1, 2, dtype=torch.int64), 4, temperature=0)
    assert lengths == [2, 3, 4, 5]
    assert torch.equal(out[:, -1], model(out[:, :-1])[:, -1].argmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, r"temperature must be a number in \[0, inf\), got -1"),
        ({"temperature": math.nan}, "temperature must be .* got nan"),
        ({"top_k": 0}, "top_k must be an integer ≥ 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer ≥ 0, got -1"),
        ({"ids": torch.zeros(1, 0, dtype=torch.int64)}, r"at least one token, got the shape \(1, 0\)"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, r"\(batch, tokens\) .* got the shape \(3,\)"),
        ({"ids": [[1]]}, "got list"),
    ],
)
def test_generate_rejects_bad_arguments(options, message):
    arguments = {"ids": torch.zeros(1, 1, dtype=torch.int64), "max_new_tokens": 1} | options
    with pytest.raises(ValueError, match=message):
        make_gpt().generate(**arguments)
