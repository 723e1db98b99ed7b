import math

import pytest
import torch
from torch import nn

from lit_gptdata.model.stem import EmbeddingStem, sinusoids

V, MAX_LENGTH, D = 23, 8, 6
POSITIONS = ("learned", "sinusoidal", "none")


def make(position: str = "learned", **changes) -> EmbeddingStem:
    arguments = {"vocab_size": V, "max_length": MAX_LENGTH, "embedding_dim": D, **changes}
    return EmbeddingStem(**arguments, position=position)


def ids(batch: int = 3, tokens: int = MAX_LENGTH) -> torch.Tensor:
    return torch.randint(V, (batch, tokens), generator=torch.Generator().manual_seed(1))


def position_rows(stem: EmbeddingStem) -> torch.Tensor:
    """The whole position table, whatever kind the stem has."""
    if stem.position == "learned":
        return stem.position_embedding.weight
    return stem.sinusoids if stem.position == "sinusoidal" else torch.zeros(MAX_LENGTH, D)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("tokens", [0, 1, 5, MAX_LENGTH])
def test_output_is_token_rows_plus_position_rows(position, tokens):
    stem = make(position)
    x = ids(tokens=tokens)
    expected = torch.empty(3, tokens, D)
    for b in range(3):
        for t in range(tokens):
            expected[b, t] = stem.token_embedding.weight[x[b, t]] + position_rows(stem)[t]
    assert torch.equal(stem(x), expected)


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_pick_rows(position):
    stem = make(position)
    x = ids(tokens=4)
    each = torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4], [0, 0, 7, 7]])
    tokens = stem.token_embedding(x)
    rows = position_rows(stem)
    assert torch.equal(stem(x, each), tokens + rows[each])
    assert torch.equal(stem(x, each[1]), tokens + rows[each[1]])
    assert torch.equal(stem(x, each.to(torch.uint8)), tokens + rows[each])
    assert torch.equal(stem(x, torch.arange(4)), stem(x))


def test_the_course_figure():
    stem = EmbeddingStem(vocab_size=50257, max_length=4, embedding_dim=256)
    x = torch.randint(50257, (8, 4))
    assert stem(x).shape == (8, 4, 256)
    assert stem(x).dtype == torch.float32
    assert stem.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert stem.position_embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8, torch.int8, torch.uint32],
)
def test_every_integer_dtype_gives_the_same(dtype):
    stem = make()
    assert torch.equal(stem(ids().to(dtype)), stem(ids()))


def test_without_positions_the_table_is_not_copied():
    stem = make()
    rows = stem._position_rows(ids(tokens=5), None)
    assert rows.shape == (5, D)
    assert rows.data_ptr() == stem.position_embedding.weight.data_ptr()


def test_gradients_count_how_often_a_row_was_used():
    stem = make()
    x = torch.tensor([[4, 4, 9], [4, 1, 9]])
    stem(x).sum().backward()
    tokens = torch.zeros(V)
    tokens[[1, 4, 9]] = torch.tensor([1.0, 3.0, 2.0])
    positions = torch.tensor([2.0, 2.0, 2.0, 0, 0, 0, 0, 0])
    assert torch.equal(stem.token_embedding.weight.grad[:, 0], tokens)
    assert torch.equal(stem.position_embedding.weight.grad[:, 0], positions)


@pytest.mark.parametrize("position", POSITIONS)
def test_compiles_into_one_graph(position):
    torch.compiler.reset()
    stem = make(position)
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    for x, positions in (
        (ids(), None),
        (ids(tokens=5).to(torch.uint16), None),
        (ids(tokens=5), torch.arange(4, -1, -1)),
    ):
        assert torch.equal(compiled(x, positions), stem(x, positions))
        stem.zero_grad()
        compiled(x, positions).square().sum().backward()
        got = stem.token_embedding.weight.grad.clone()
        stem.zero_grad()
        stem(x, positions).square().sum().backward()
        assert torch.equal(got, stem.token_embedding.weight.grad)


def test_dropout_only_while_training():
    stem = make(dropout=0.5)
    assert (stem(ids()) == 0).any()
    stem.eval()
    assert torch.equal(stem(ids()), make_like(stem)(ids()))


def make_like(stem: EmbeddingStem) -> EmbeddingStem:
    """The same tables without dropout, made the way a checkpoint is loaded."""
    twin = EmbeddingStem(**{**stem.hparams, "dropout": 0.0})
    twin.load_state_dict(stem.state_dict())
    return twin


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_sinusoids_follow_the_paper(width):
    table = sinusoids(9, width)
    assert table.shape == (9, width)
    for p in range(9):
        for column in range(width):
            angle = p / 10000 ** (2 * (column // 2) / width)
            value = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[p, column].item() == pytest.approx(value, abs=1e-6)


def test_only_learned_tables_are_parameters_and_saved():
    assert set(make().state_dict()) == {"token_embedding.weight", "position_embedding.weight"}
    for position in ("sinusoidal", "none"):
        stem = make(position)
        assert set(stem.state_dict()) == {"token_embedding.weight"}
        assert [name for name, _ in stem.named_parameters()] == ["token_embedding.weight"]
        assert sum(isinstance(m, nn.Embedding) for m in stem.modules()) == 1


def test_hparams_are_plain_even_from_numpy():
    np = pytest.importorskip("numpy")
    stem = EmbeddingStem(np.int64(V), np.int32(MAX_LENGTH), D, "none", np.float64(0.5))
    assert dict(stem.hparams) == {
        "vocab_size": V,
        "max_length": MAX_LENGTH,
        "embedding_dim": D,
        "position": "none",
        "dropout": 0.5,
    }
    assert {type(value) for value in stem.hparams.values()} == {int, str, float}


@pytest.mark.parametrize("name", ["vocab_size", "max_length", "embedding_dim"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "8", None])
def test_sizes_below_one_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value!r}; .* at least 1"):
        make(**{name: value})


def test_unknown_position_is_refused():
    with pytest.raises(ValueError, match="'rotary'; allowed are 'learned', 'sinusoidal', 'none'"):
        make("rotary")


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.0, 7, float("nan")])
def test_dropout_outside_its_range_is_refused(dropout):
    with pytest.raises(ValueError, match=rf"dropout is {dropout!r}.*\[0, 1\)"):
        make(dropout=dropout)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_sequence_longer_than_max_length_is_refused(position):
    with pytest.raises(ValueError, match=r"9 tokens .* max_length of 8; shorten .*max_length=9"):
        make(position)(ids(tokens=MAX_LENGTH + 1))


@pytest.mark.parametrize(("low", "high"), [(0, V), (-1, 3), (2, 60000)])
def test_an_id_outside_the_vocabulary_is_refused(low, high):
    message = rf"ids run from {low} to {high}; allowed are 0 to 22: .*vocab_size=23"
    with pytest.raises(IndexError, match=message):
        make()(torch.tensor([[low, high]]))


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
@pytest.mark.parametrize("bad", [-1, MAX_LENGTH])
def test_a_position_outside_its_table_is_refused(position, bad):
    message = r"positions run from .* allowed are 0 to 7: .*max_length=8"
    with pytest.raises(IndexError, match=message):
        make(position)(ids(tokens=2), torch.tensor([bad, 0]))


def test_positions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\); allowed .* \(2, 4\) are \(4,\) and \(2, 4"):
        make()(ids(2, 4), torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_ids_that_are_no_integers_are_refused(dtype):
    with pytest.raises(TypeError, match=rf"ids have the dtype {dtype}.*ids\.long\(\)"):
        make()(torch.zeros(1, 2, dtype=dtype))
    with pytest.raises(TypeError, match=rf"positions have the dtype {dtype}"):
        make()(ids(1, 2), torch.zeros(2, dtype=dtype))


def test_ids_that_are_no_batch_of_sequences_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4,\); .*ids\[None, :\]"):
        make()(torch.arange(4))
    with pytest.raises(TypeError, match=r"ids are a list; .*torch\.as_tensor"):
        make()([[1, 2]])


def test_it_prints_what_it_holds():
    text = repr(make("sinusoidal"))
    assert "max_length=8, position='sinusoidal'" in text
    assert "Embedding(23, 6)" in text
