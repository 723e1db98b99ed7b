"""The numbers of the course's data chapter. The book comes over HTTP from this machine."""

from __future__ import annotations

import torch

from lit_gptdata import (
    EmbeddingStem,
    GPTDataModule,
    GPTDatasetV1,
    Tokenizer,
    WindowDataset,
    create_dataloader,
    create_dataloader_v1,
)
from tests.http_server import FileServer
from tests.runs import opened

INPUTS = [
    [171, 119, 123, 464],
    [4935, 20336, 46566, 286],
    [45738, 26, 1471, 11],
    [383, 12495, 42696, 198],
    [220, 220, 220, 220],
    [198, 1212, 47179, 318],
    [329, 262, 779, 286],
    [2687, 6609, 287, 262],
]


def test_download_tokens_windows_and_embeddings(book, tmp_path):
    with FileServer(book.read_bytes()) as server:
        lengths = {"max_length": 4, "stride": 4, "batch_size": 8}
        data = GPTDataModule(server.url, **lengths, shuffle=False, val_fraction=0, data_dir=tmp_path)
        opened(data)
    assert data.store.n_tokens == 106_361
    assert data.vocab_size == 50_257
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.tolist() == INPUTS
    flat = [i for row in INPUTS for i in row]
    assert targets.flatten()[:-1].tolist() == flat[1:]

    stem = EmbeddingStem(vocab_size=data.vocab_size, max_length=4, embedding_dim=256)
    x = stem(inputs)
    assert x.shape == (8, 4, 256)
    assert stem.position_embedding is not None
    rows = stem.token_embedding.weight[inputs] + stem.position_embedding.weight[torch.arange(4)]
    assert torch.equal(x, rows)


def test_create_dataloader(book):
    text = book.read_text(encoding="utf-8")
    batches = iter(create_dataloader(text, batch_size=1, max_length=4, stride=1, shuffle=False))
    assert [t.tolist() for t in next(batches)] == [[[171, 119, 123, 464]], [[119, 123, 464, 4935]]]
    assert [t.tolist() for t in next(batches)] == [[[119, 123, 464, 4935]], [[123, 464, 4935, 20336]]]
    inputs, _ = next(iter(create_dataloader(text, 8, 4, 4, shuffle=False)))
    assert inputs.tolist() == INPUTS


def test_the_names_of_the_course_give_the_same_batches():
    text = "A text of some words, which the snippet of the course cuts into windows. " * 30
    torch.manual_seed(123)
    shuffled = create_dataloader_v1(txt=text, batch_size=2, max_length=16, stride=8, num_workers=0)
    torch.manual_seed(123)
    expected = create_dataloader(text, batch_size=2, max_length=16, stride=8)
    assert len(shuffled) == len(expected) > 10
    for batch, same in zip(shuffled, expected, strict=True):
        assert all(map(torch.equal, batch, same))

    dataset = GPTDatasetV1(text, Tokenizer("gpt2").reference.encoding, max_length=4, stride=4)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=False, drop_last=True)
    ours = create_dataloader_v1(text, batch_size=8, max_length=4, stride=4, shuffle=False)
    assert len(loader) == len(ours)
    for batch, same in zip(loader, ours, strict=True):
        assert all(map(torch.equal, batch, same))
    same_dataset = WindowDataset(text, "gpt2", max_length=4, stride=4)
    by_name = GPTDatasetV1(txt=text, tokenizer="gpt2", max_length=4, stride=4)
    assert torch.equal(by_name[3][1], same_dataset[3][1])
    defaults = create_dataloader_v1(text * 3)  # 4 windows of 256 tokens, a new one every 128 tokens
    assert next(iter(defaults))[0].shape == (4, 256)
    assert defaults.dataset.spans.stride == 128


def test_strip_gutenberg_removes_the_license(book, tmp_path):
    data = opened(GPTDataModule(book, strip_gutenberg=True, data_dir=tmp_path))
    text = data.tokenizer.decode(data.store.tokens[:])
    assert text.startswith("Frankenstein;\n\nor, the Modern Prometheus")
    assert "Project Gutenberg" not in text
    assert 90_000 < data.store.n_tokens < 106_361
