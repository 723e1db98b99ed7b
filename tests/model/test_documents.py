"""The document mask: the model reads each document of a window as if it were alone."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from lit_gptdata import GPT, EmbeddingStem, GPTDataModule, cu_seqlens, document_ids, document_positions
from lit_gptdata.model import documents, gpt
from lit_gptdata.model.block import KeyValueCache
from tests.model.small_gpt import SmallData
from tests.model.test_own_stem import Plain
from tests.runs import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")
V, L, D, E = 50, 24, 32, 49  # E: the separator
LENGTHS = [[5, 3, 9, 7], [24], [1, 1, 1, 2, 19], [6, 18]]  # tokens of the documents of each row


def make_gpt(position: str = "learned", document_mask: bool = True, **options) -> GPT:
    torch.manual_seed(0)
    stem = EmbeddingStem(V, L, D, position)
    model = GPT(stem, n_layers=3, n_heads=2, document_mask=document_mask, eot=E, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def window(lengths: list[int], headless: bool = False) -> Tensor:
    """A row (T,) of documents that start with a separator; the first one starts without if headless."""
    ids = torch.randint(E, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    ids[starts[headless:]] = E
    return ids


def rows(headless: bool = False) -> Tensor:
    return torch.stack([window(lengths, headless) for lengths in LENGTHS])  # (4, L)


def parts(ids: Tensor) -> list[tuple[int, Tensor]]:
    """Each document (1, n) of all rows, with its row."""
    return [(b, part[None]) for b, row in enumerate(ids) for part in row.split(LENGTHS[b])]


# Helpers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16, torch.uint8])
@pytest.mark.parametrize("headless", [False, True])
def test_documents_positions_and_lengths_equal_a_loop_over_the_tokens(headless, dtype):
    ids = rows(headless).to(dtype)
    numbers, positions, starts = [], [], []
    for b, row in enumerate(ids.tolist()):
        number, position = 0, -1
        for t, token in enumerate(row):
            number, position = (number + 1, 0) if token == E else (number, position + 1)
            numbers.append(number)
            positions.append(position)
            starts += [b * L + t] if position == 0 else []
    assert document_ids(ids, E).flatten().tolist() == numbers
    assert document_positions(ids, E).flatten().tolist() == positions
    padding = [ids.numel()] * (40 - len(starts))
    found = cu_seqlens(ids, E, 40)
    assert (found.tolist(), found.dtype) == (starts + padding, torch.int32)
    for size in (len(starts) + 1, ids.numel() + 1, 500):
        assert cu_seqlens(ids, E, size).tolist() == (starts + [ids.numel()] * size)[:size]


def test_more_documents_than_cu_seqlens_has_places_for_are_an_error():
    ids = rows()
    n = int((ids == E).sum())
    assert cu_seqlens(ids, E, n + 1)[-1] == ids.numel()
    with pytest.raises(RuntimeError, match=f"got size={n}: {ids.numel() + 1} is enough for any batch"):
        cu_seqlens(ids, E, n)


def test_helpers_compile_into_one_graph_for_all_values():
    torch.compiler.reset()

    def helpers(ids: Tensor) -> tuple[Tensor, ...]:
        return document_ids(ids, E), document_positions(ids, E), cu_seqlens(ids, E, 40)

    compiled = torch.compile(helpers, backend="aot_eager", fullgraph=True)
    compiled(rows())
    with torch.compiler.set_stance("fail_on_recompile"):
        for found, expected in zip(compiled(rows(True)), helpers(rows(True)), strict=True):
            assert torch.equal(found, expected)


# Logits and gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "none"])
@pytest.mark.parametrize("headless", [False, True])
def test_logits_of_each_document_equal_those_of_the_document_alone(headless, position):
    model, ids = make_gpt(position), rows(headless)
    logits = model(ids)
    alone = [[], [], [], []]
    for b, part in parts(ids):
        alone[b].append(model(part)[0])
    expected = torch.stack([torch.cat(each) for each in alone])
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    unmasked = make_gpt(position, document_mask=False)
    unmasked.load_state_dict(model.state_dict())
    assert (unmasked(ids) - expected).abs().max() > 0.1  # the test would see a missing mask


def test_no_gradient_flows_from_the_loss_of_a_document_to_the_embeddings_of_another():
    model, ids = make_gpt(), rows()
    embedded: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, x: Tensor) -> Tensor:
        embedded.append(x.detach().requires_grad_())
        return embedded[0]

    model.stem.register_forward_hook(keep)
    losses = gpt.token_losses(model(ids), ids.roll(-1, 1))
    numbers = document_ids(ids, E)
    for b, lengths in enumerate(LENGTHS):
        for number in range(1, len(lengths) + 1):
            own = torch.zeros_like(ids, dtype=torch.bool)
            own[b] = numbers[b] == number
            (gradient,) = torch.autograd.grad(losses[own].sum(), embedded, retain_graph=True)
            assert gradient[own].abs().amax(-1).min() > 0
            assert not gradient[~own].any()


def test_padding_after_the_documents_changes_nothing():
    model, ids = make_gpt(), rows()
    padded = ids.clone()
    padded[:, 20:] = 0
    torch.testing.assert_close(model(padded)[:, :20], model(ids)[:, :20], rtol=0, atol=1e-6)


def test_without_the_mask_logits_are_the_same_bits_as_without_the_option():
    torch.manual_seed(0)
    before = GPT(EmbeddingStem(V, L, D), n_layers=3, n_heads=2)
    torch.manual_seed(0)
    after = GPT(EmbeddingStem(V, L, D), n_layers=3, n_heads=2, document_mask=False, eot=E)
    assert torch.equal(before(rows()), after(rows()))
    assert before.hparams == after.hparams
    assert "eot" not in after.hparams


def test_packed_windows_give_the_loss_of_documents_that_are_alone(tmp_path):
    texts = [" and so on" * (7 * n % 10) + " to the end" for n in range(20)]  # 3 to 30 tokens
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    stem = EmbeddingStem(50257, 32, 16)
    model = GPT(stem, n_layers=2, n_heads=2, document_mask=True).eval()
    sums = {}
    for kind in ("packed", "documents"):
        options = {"windows": kind, "max_length": 32, "drop_last": False, "val_fraction": 0.0}
        data = GPTDataModule(tmp_path / "texts.jsonl", **options, data_dir=tmp_path)
        data.prepare_data()
        data.setup("fit")
        with torch.no_grad():
            losses = torch.cat([model.losses(batch) for batch in data.train_dataloader()])
        sums[kind] = losses.double().sum().item(), int((losses > 0).sum()), len(losses)
    assert data.eot == model.eot
    assert sums["packed"][:2] == (pytest.approx(sums["documents"][0], rel=1e-6), sums["documents"][1])
    assert sums["packed"][2] < sums["documents"][2] == 20


# FlexAttention ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_logits_of_the_mask_of_pairs(monkeypatch):
    model, ids = make_gpt(), rows(headless=True)
    pairs = model(ids)
    monkeypatch.setattr(documents, "_compiled", lambda function: function)
    monkeypatch.setattr(gpt, "attention_mask", lambda ids, eot, begin: documents.block_mask(ids, eot))
    with torch.no_grad():  # on the CPU it has no gradients
        torch.testing.assert_close(model(ids), pairs, rtol=0, atol=1e-5)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # torch warns while it compiles
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_flex_attention_gives_the_logits_of_the_mask_of_pairs(monkeypatch, whole):
    torch.compiler.reset()
    documents._compile.cache_clear()
    model = make_gpt()
    pairs = [model(rows(headless)) for headless in (False, True)]
    monkeypatch.setattr(gpt, "attention_mask", lambda ids, eot, begin: documents.block_mask(ids, eot))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True) if whole else model
    with torch.no_grad():
        torch.testing.assert_close(compiled(rows()), pairs[0], rtol=0, atol=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(rows(True)), pairs[1], rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore")  # torch warns while it compiles
@pytest.mark.parametrize("whole", [False, True])
def test_on_cuda_flex_attention_gives_the_losses_and_gradients_of_the_mask_of_pairs(monkeypatch, whole):
    torch.compiler.reset()
    documents._compile.cache_clear()
    model = make_gpt().cuda()
    batch = rows(True).cuda(), rows().cuda().roll(-1, 1)
    assert not isinstance(model._mask(batch[0], 0), Tensor)
    compiled = torch.compile(model, fullgraph=True) if whole else model
    found = [gpt.token_losses(compiled(batch[0]), batch[1])]
    monkeypatch.setattr(gpt, "block_mask", documents.attention_mask)
    found.append(gpt.token_losses(model(batch[0]), batch[1]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
    gradients = [torch.autograd.grad(losses.mean(), [*model.parameters()]) for losses in found]
    for flex, pairs in zip(*gradients, strict=True):
        torch.testing.assert_close(flex, pairs, rtol=0, atol=1e-4)


def test_only_a_whole_window_on_cuda_without_dropout_uses_flex_attention(monkeypatch):
    monkeypatch.setattr(gpt, "HAS_TRITON", True)
    monkeypatch.setattr(gpt, "block_mask", lambda ids, eot: "blocks")

    class Cuda(Tensor):
        is_cuda = True

    def kind(model: GPT, ids: Tensor, begin: int = 0) -> str:
        mask = model._mask(ids, begin)
        return mask if isinstance(mask, str) else "pairs"

    model, ids = make_gpt(), rows().as_subclass(Cuda)
    assert kind(model, ids) == "blocks"
    assert kind(model, rows()) == kind(model, ids[:, :-1]) == kind(model, ids, begin=5) == "pairs"
    dropout = make_gpt(dropout=0.1)
    assert kind(dropout, ids) == "blocks"
    assert kind(dropout.train(), ids) == "pairs"
    monkeypatch.setitem(model._optimizer_options, "n_heads", 4)  # 8 columns per head
    assert kind(model, ids) == "pairs"
    monkeypatch.undo()
    monkeypatch.setattr(gpt, "HAS_TRITON", False)
    assert kind(model, ids) == "pairs"


# Generate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "none"])
def test_cached_logits_of_rows_with_different_documents_equal_those_of_the_whole_text(position):
    model, ids = make_gpt(position), rows()
    caches = [KeyValueCache() for _ in model.blocks]
    with torch.no_grad():
        found = [model._head(model._features(ids[:, :n], caches)) for n in (3, *range(4, L + 1))]
        torch.testing.assert_close(torch.cat(found, 1), model(ids), rtol=0, atol=1e-5)


def test_generate_continues_each_row_as_its_last_document_alone(monkeypatch):
    model = make_gpt()
    prompt = rows()[:, :12]
    out = model.generate(prompt, 40, temperature=0)
    for t in range(12, 52):
        logits = model(out[:, max(0, t - L) : t])[:, -1]
        assert torch.equal(out[:, t], logits.argmax(-1))
    sampled = model.generate(prompt, 40, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(GPT, "_own_code", ["off"])  # without the cache
    expected = model.generate(prompt, 40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sampled, expected)


# Options and checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "document_mask needs eot, .* for a vocabulary of 50: set eot to tokenizer.end_of_document"),
        ({"eot": 50}, r"eot must be in 0 … 49, the stem's vocabulary, got 50"),
        ({"eot": -1}, "eot must be an integer ≥ 0, got -1"),
        ({"eot": 1.5}, "eot must be an integer ≥ 0, got 1.5"),
        ({"document_mask": "false"}, "document_mask must be true or false, got 'false'"),
        ({"stem": Plain(), "eot": 1}, "Plain.forward takes none: add positions=None"),
    ],
)
def test_options_that_cannot_mask_documents_are_refused(options, message):
    arguments = {"stem": EmbeddingStem(V, L, D), "document_mask": True} | options
    with pytest.raises((TypeError, ValueError), match=message):
        GPT(**arguments)
    if "document_mask" not in options:
        GPT(**arguments | {"document_mask": False})


def test_the_separator_of_a_gpt2_vocabulary_is_known():
    with torch.device("meta"):
        assert GPT(EmbeddingStem(50_257, 4, 8), document_mask=True).eot == 50_256


def test_a_checkpoint_keeps_the_mask_and_refuses_another_one_by_name(tmp_path):
    stem = EmbeddingStem(V, 8, D)
    model = GPT(stem, n_layers=1, n_heads=2, document_mask=True, eot=E)
    trainer = make_trainer(max_steps=2)
    trainer.fit(model, SmallData())
    trainer.save_checkpoint(path := tmp_path / "a.ckpt")
    loaded = GPT.load_from_checkpoint(path, weights_only=True)
    assert (loaded.document_mask, loaded.eot) == (True, E)
    assert loaded.hparams == model.hparams
    saved = torch.load(path, weights_only=True)
    plain = GPT(EmbeddingStem(V, 8, D), n_layers=1, n_heads=2)
    with pytest.raises(ValueError, match=r"model\.document_mask was True, now False\. Set"):
        plain.on_load_checkpoint(saved)
    with pytest.raises(ValueError, match=r"model\.document_mask was False, now True\. Set"):
        model.on_load_checkpoint({"hyper_parameters": dict(plain.hparams)})
    with pytest.raises(ValueError, match=r"model\.eot was 49, now 3"):
        GPT(stem, n_layers=1, n_heads=2, document_mask=True, eot=3).on_load_checkpoint(saved)
    assert not GPT.load_from_checkpoint(path, document_mask=False, weights_only=True).document_mask


def test_a_masked_model_compiles_into_one_graph():
    torch.compiler.reset()
    model = make_gpt()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(rows())
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(rows(True)), model(rows(True)), rtol=0, atol=1e-5)
