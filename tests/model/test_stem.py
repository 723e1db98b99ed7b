import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lit_gptdata.model.stem import EmbeddingStem, sinusoids

V, MAX_LENGTH, D = 23, 8, 6
SIZES = {"vocab_size": V, "max_length": MAX_LENGTH, "embedding_dim": D}
POSITIONS = ("learned", "sinusoidal", "none")


def make_stem(position: str = "learned", **changes) -> EmbeddingStem:
    return EmbeddingStem(**(SIZES | changes), position=position)


def random_ids(batch: int = 3, tokens: int = MAX_LENGTH) -> torch.Tensor:
    return torch.randint(V, (batch, tokens), generator=torch.Generator().manual_seed(1))


def position_rows(stem: EmbeddingStem) -> torch.Tensor:
    """All position rows of a stem, (MAX_LENGTH, D)."""
    if stem.position == "learned":
        return stem.position_embedding.weight
    return stem.sinusoids if stem.position == "sinusoidal" else torch.zeros(MAX_LENGTH, D)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("tokens", [0, 1, 5, MAX_LENGTH])
def test_output_is_token_rows_plus_position_rows(position, tokens):
    stem = make_stem(position)
    ids = random_ids(tokens=tokens)
    output = stem(ids)
    assert output.shape == (3, tokens, D)
    for b, t in itertools.product(range(3), range(tokens)):
        assert torch.equal(output[b, t], stem.token_embedding.weight[ids[b, t]] + position_rows(stem)[t])


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_select_rows(position):
    stem = make_stem(position)
    ids = random_ids(tokens=4)
    positions = torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4], [0, 0, 7, 7]])
    token_rows = stem.token_embedding(ids)
    rows = position_rows(stem)
    assert torch.equal(stem(ids, positions), token_rows + rows[positions])
    assert torch.equal(stem(ids, positions[1]), token_rows + rows[positions[1]])
    assert torch.equal(stem(ids, positions.to(torch.uint8)), token_rows + rows[positions])
    assert torch.equal(stem(ids, torch.arange(4)), stem(ids))


def test_the_example_of_the_course():
    stem = EmbeddingStem(vocab_size=50257, max_length=4, embedding_dim=256)
    x = stem(torch.randint(50257, (8, 4)))
    assert x.shape == (8, 4, 256)
    assert x.dtype == torch.float32
    assert stem.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert stem.position_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8, torch.int8, torch.uint32]
)
def test_all_integer_dtypes_give_the_same_output(dtype):
    stem = make_stem()
    assert torch.equal(stem(random_ids().to(dtype)), stem(random_ids()))


def test_without_positions_the_table_is_not_copied():
    stem = make_stem()
    rows = stem._position_rows(stem.position_table, random_ids(tokens=5), None)
    assert rows.shape == (5, D)
    assert rows.data_ptr() == stem.position_embedding.weight.data_ptr()


def test_gradients_count_how_often_a_row_is_used():
    stem = make_stem()
    stem(torch.tensor([[4, 4, 9], [4, 1, 9]])).sum().backward()
    tokens = torch.zeros(V)
    tokens[[1, 4, 9]] = torch.tensor([1.0, 3.0, 2.0])
    positions = torch.tensor([2.0, 2.0, 2.0, 0, 0, 0, 0, 0])
    assert torch.equal(stem.token_embedding.weight.grad[:, 0], tokens)
    assert torch.equal(stem.position_embedding.weight.grad[:, 0], positions)


@pytest.mark.parametrize("position", POSITIONS)
def test_it_compiles_into_one_graph(position):
    torch.compiler.reset()
    stem = make_stem(position)
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")

    def gradient(module, *arguments) -> torch.Tensor:
        stem.zero_grad()
        module(*arguments).square().sum().backward()
        return stem.token_embedding.weight.grad.clone()

    for arguments in (
        (random_ids(), None),
        (random_ids(tokens=5).to(torch.uint16), None),
        (random_ids(tokens=5), torch.arange(4, -1, -1)),
    ):
        assert torch.equal(compiled(*arguments), stem(*arguments))
        assert torch.equal(gradient(compiled, *arguments), gradient(stem, *arguments))


def test_dropout_acts_only_during_training():
    stem = make_stem(dropout=0.5)
    assert (stem(random_ids()) == 0).any()
    without_dropout = EmbeddingStem(**{**stem.hparams, "dropout": 0.0})
    without_dropout.load_state_dict(stem.state_dict())
    assert torch.equal(stem.eval()(random_ids()), without_dropout(random_ids()))


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_sinusoids_follow_the_paper(width):
    table = sinusoids(9, width)
    assert table.shape == (9, width)
    for p, column in itertools.product(range(9), range(width)):
        angle = p / 10000 ** (2 * (column // 2) / width)
        value = math.cos(angle) if column % 2 else math.sin(angle)
        assert table[p, column].item() == pytest.approx(value, abs=1e-6)


def test_only_learned_tables_are_parameters_and_saved():
    assert set(make_stem().state_dict()) == {"token_embedding.weight", "position_embedding.weight"}
    for position in ("sinusoidal", "none"):
        stem = make_stem(position)
        assert set(stem.state_dict()) == {"token_embedding.weight"}
        assert [name for name, _ in stem.named_parameters()] == ["token_embedding.weight"]
        assert sum(isinstance(m, nn.Embedding) for m in stem.modules()) == 1


def test_hparams_are_plain_values_also_for_numpy_arguments():
    stem = EmbeddingStem(np.int64(V), np.int32(MAX_LENGTH), D, "none", np.float64(0.5))
    assert dict(stem.hparams) == SIZES | {"position": "none", "dropout": 0.5}
    assert {type(value) for value in stem.hparams.values()} == {int, str, float}


def test_repr_shows_the_sizes():
    text = repr(make_stem("sinusoidal"))
    assert "max_length=8, position='sinusoidal'" in text
    assert "Embedding(23, 6)" in text


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        *((name, [0, -3, 2.5, "8", None], "an integer ≥ 1") for name in SIZES),
        ("position", ["rotary"], "one of .'learned', 'sinusoidal', 'none'."),
        ("dropout", [-0.1, 1, 1.0, 7, math.nan], r"a number in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_rejected(name, values, allowed):
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"{name} must be {allowed}, got {value!r}"):
            EmbeddingStem(**(SIZES | {name: value}))


@pytest.mark.parametrize("position", POSITIONS)
def test_a_sequence_longer_than_max_length_is_rejected(position):
    message = r"at most max_length=8 tokens, got 9: shorten .*max_length=9 or more"
    with pytest.raises(ValueError, match=message):
        make_stem(position)(random_ids(tokens=MAX_LENGTH + 1))


@pytest.mark.parametrize(("low", "high"), [(0, V), (-1, 3), (2, 60000)])
def test_an_id_outside_the_vocabulary_is_rejected(low, high):
    message = rf"ids must be in 0 … 22, got values from {low} to {high}: .*vocab_size=23"
    with pytest.raises(IndexError, match=message):
        make_stem()(torch.tensor([[low, high]]))


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
@pytest.mark.parametrize("bad", [-1, MAX_LENGTH])
def test_a_position_outside_its_table_is_rejected(position, bad):
    with pytest.raises(IndexError, match=r"positions must be in 0 … 7, got .*max_length=8"):
        make_stem(position)(random_ids(tokens=2), torch.tensor([bad, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_tensors_of_other_dtypes_are_rejected(dtype):
    with pytest.raises(TypeError, match=rf"ids must have an integer .*, got {dtype}.*ids\.long\(\)"):
        make_stem()(torch.zeros(1, 2, dtype=dtype))
    with pytest.raises(TypeError, match=rf"positions must have an integer .*, got {dtype}"):
        make_stem()(random_ids(1, 2), torch.zeros(2, dtype=dtype))


def test_wrong_shapes_and_lists_are_rejected():
    with pytest.raises(ValueError, match=r"positions must have the shape \(4,\) or \(2, 4\).* \(3,\)"):
        make_stem()(random_ids(2, 4), torch.arange(3))
    with pytest.raises(ValueError, match=r"\(batch, tokens\), got \(4,\): .*ids\[None, :\]"):
        make_stem()(torch.arange(4))
    with pytest.raises(TypeError, match=r"ids must be an integer tensor, got list: .*torch\.as_tensor"):
        make_stem()([[1, 2]])
