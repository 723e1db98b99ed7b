"""Tokenizers of every kind: ids of their library, and checkpoints that find them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import tiktoken
import torch

from lit_gptdata import GPT, EmbeddingStem, GPTDataModule
from lit_gptdata.text.sample import SampleCorpus
from lit_gptdata.tokens.engines import load_engine
from lit_gptdata.tokens.libraries.hub import find_on_hub
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.hub_server import hub_server
from tests.tokens.test_chunks import with_gpt2_ranks

sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

TOPICS = list(SampleCorpus().topics.values())
HOSTILE = "It's  1818:\n\n\té 語 🙂</s><|endoftext|> e\u0301 ﬁ  x"


def byte_level(normalizer: Any = None) -> tokenizers.Tokenizer:
    """A byte-level BPE with 400 tokens, such as `lit-gptdata train-tokenizer` writes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TOPICS[:5], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def piece_model() -> bytes:
    """A sentencepiece BPE model with byte fallback and 400 pieces, like Llama 2's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(TOPICS[:5]).splitlines()), model_writer=model, vocab_size=400,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory, piece_model) -> Path:
    folder = tmp_path_factory.mktemp("files")
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").write_bytes(piece_model)
    (folder / "model").mkdir()
    byte_level().save(str(folder / "model" / "tokenizer.json"))
    config = {"eos_token": {"content": "<s>"}, "bos_token": "<s>"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "a.txt").write_text("\n".join(TOPICS[:4]), encoding="utf-8")
    (folder / "b.txt").write_text(HOSTILE + TOPICS[4], encoding="utf-8")
    return folder


KINDS = ("gpt2", "cl100k_base", "json", "folder", "pieces", "encoding", "hugging_face")


def make(kind: str, files: Path) -> Any:
    """A value for `tokenizer=`, and the library's own encode."""
    if kind in ("gpt2", "cl100k_base"):
        if kind != "gpt2":
            pytest.importorskip("bpe_openai")
        encoding = Tokenizer(kind).reference.encoding
        return kind, lambda text: encoding.encode(text, allowed_special={"<|endoftext|>"})
    if kind == "encoding":
        own = with_gpt2_ranks(r"\w+|\W+", name="own").reference.encoding
        return own, lambda text: own.encode(text, allowed_special={"<|endoftext|>"})
    if kind == "pieces":
        path = files / "tokenizer.model"
        return path, sentencepiece.SentencePieceProcessor(model_file=str(path)).Encode
    own = byte_level()
    encode = lambda text: own.encode(text, add_special_tokens=False).ids  # noqa: E731
    if kind == "transformers":  # in tests/integrations
        import transformers

        own.post_processor = processors.TemplateProcessing("$A <s>", special_tokens=[("<s>", 1)])
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|endoftext|>")
        return fast, encode
    return {"json": str(files / "tokenizer.json"), "folder": files / "model"}.get(kind, own), encode


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_librarys_own_and_special_strings_follow_the_policy(kind, files):
    value, encode = make(kind, files)
    tokenizer = Tokenizer(value)
    for text in (HOSTILE, TOPICS[7], "", " ", "a"):
        assert tokenizer.encode(text) == list(encode(text))
    end = "</s>" if kind == "pieces" else "<|endoftext|>"
    text = Tokenizer(value, "text").encode(f"a{end}b")
    assert tokenizer.special_ids[end] not in text
    assert (tokenizer.special_ids[end] in tokenizer.encode(f"a{end}b")) == (kind != "pieces")
    with pytest.raises(ValueError, match=f"contains the special token {end!r}".replace("|", r"\|")):
        Tokenizer(value, "error").encode(f"a{end}b")
    assert tokenizer.is_lossless == (kind != "pieces")


def train(data: GPTDataModule, folder: Path, **options: Any) -> L.Trainer:
    model = GPT(EmbeddingStem(data.vocab_size, 16, 8), n_layers=1, n_heads=2)
    trainer = L.Trainer(
        max_steps=options.pop("max_steps", 2), logger=False, accelerator="cpu", num_sanity_val_steps=0,
        val_check_interval=options.pop("val_check_interval", None),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, datamodule=data, weights_only=True, **options)
    return trainer


LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
from lit_gptdata import GPTDataModule
for checkpoint in sys.argv[1:]:
    data = GPTDataModule.load_from_checkpoint(checkpoint, weights_only=True)
    data.prepare_data(); data.setup()
    print(data.store.fingerprint, data.tokenizer.end_of_document, data.tokenizer.bos_id)
"""


@pytest.mark.filterwarnings("ignore:.*by itself adds:UserWarning")
@pytest.mark.parametrize("kinds", [KINDS[2:4], pytest.param(KINDS, marks=pytest.mark.heavy)])
def test_a_checkpoint_finds_its_tokenizer_in_a_new_process_and_resumes(kinds, files, tmp_path):
    expected, checkpoints = [], []
    for kind in kinds:
        value, _ = make(kind, files)
        options: dict[str, Any] = {"corpus": str(files / "*.txt"), "max_length": 16, "stride": 16}
        options |= {"data_dir": str(tmp_path / kind), "bos": kind in ("folder", "pieces")}
        data = GPTDataModule(tokenizer=value, **options)
        assert not (tmp_path / kind).exists()  # nothing is written at construction
        train(data, tmp_path).save_checkpoint(checkpoint := tmp_path / f"{kind}.ckpt")
        checkpoints.append(checkpoint)
        tokenizer = data.tokenizer
        expected.append(f"{data.store.fingerprint} {tokenizer.end_of_document} {tokenizer.bos_id}")
        saved = torch.load(checkpoint, weights_only=True)["datamodule_hyper_parameters"]
        again = GPTDataModule(tokenizer=saved["tokenizer"], **options)
        assert again.tokenizer.name == tokenizer.name
        assert train(again, tmp_path, max_steps=4, ckpt_path=checkpoint).global_step == 4
        assert torch.equal(again.batch_at(3)[0], data.batch_at(3)[0])
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", LOAD, *checkpoints]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    assert output.splitlines() == expected


def test_without_the_object_or_its_file_a_checkpoint_is_refused_by_name(files, tmp_path):
    data = GPTDataModule(str(files / "a.txt"), byte_level(), 16, data_dir=tmp_path / "data")
    data.prepare_data()
    location = data.hparams["tokenizer"]
    path, _, digest = location.partition("#")
    assert (len(digest), path.endswith(digest)) == (8, True)
    (tmp_path / "data" / "tokenizers").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=f"tokenizer='{path}': there is no such file"):
        GPTDataModule(tokenizer=location, data_dir=tmp_path / "data")
    (tmp_path / "other").mkdir()
    (tmp_path / "moved").rename(tmp_path / "other" / "tokenizers")  # with a data_dir that moved
    moved = GPTDataModule(tokenizer=location, data_dir=tmp_path / "other").tokenizer
    assert moved.fingerprint == data.tokenizer.fingerprint


def test_a_changed_file_is_another_store_by_name(files, tmp_path):
    path = tmp_path / "tok.json"
    byte_level().save(str(path))
    options: dict[str, Any] = {"max_length": 16, "stride": 16, "data_dir": tmp_path / "data"}
    data = GPTDataModule(str(files / "a.txt"), path, **options)
    train(data, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    assert data.tokenizer.name.startswith("tok-")
    byte_level(normalizers.Lowercase()).save(str(path))
    changed = GPTDataModule(str(files / "a.txt"), path, **options)
    with pytest.raises(ValueError, match=f"tokenizer was '{data.tokenizer.name}', now 'tok-"):
        train(changed, tmp_path, ckpt_path=tmp_path / "a.ckpt", max_steps=4)
    byte_level().save(str(tmp_path / "copy.json"))  # the same contents elsewhere are the same store
    copy = Tokenizer(tmp_path / "copy.json")
    assert copy.fingerprint == data.tokenizer.fingerprint


def test_documents_are_separated_by_the_tokenizers_own_end_and_start_with_bos(
    files, tmp_path, monkeypatch
):
    def ids(tokenizer: Any, **options: Any) -> list[int]:
        data = GPTDataModule(
            ["b.txt", "c.txt"], tokenizer, 4, val_fraction=0.0, data_dir=tmp_path, **options
        )
        data.prepare_data()
        data.setup()
        return data.store.tokens[:].tolist()

    (tmp_path / "b.txt").write_text(" one two", encoding="utf-8")
    (tmp_path / "c.txt").write_text("three", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(files / "tokenizer.model"))
    one, three = pieces.Encode(" one two"), pieces.Encode("three")
    assert ids(files / "tokenizer.model") == [*one, pieces.eos_id(), *three]
    bos = [pieces.bos_id()]
    assert ids(files / "tokenizer.model", bos=True) == [*bos, *one, pieces.eos_id(), *bos, *three]
    own = byte_level()
    one, three = own.encode(" one two").ids, own.encode("three").ids
    assert ids(files / "tokenizer.json") == [*one, 0, *three]
    assert ids(files / "tokenizer.json", end_of_document="<s>") == [*one, 1, *three]
    assert ids(files / "model", bos=True) == [1, *one, 1, 1, *three]  # tokenizer_config.json names both


def test_an_unknown_end_of_document_has_to_be_named(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["</s>"])
    with pytest.raises(
        ValueError, match=r"does not tell which .* set end_of_document to one of \['</s>'"
    ):
        _ = Tokenizer(tokenizer).end_of_document
    assert Tokenizer(tokenizer, end_of_document="</s>").end_of_document == 400
    with pytest.raises(ValueError, match=r"end_of_document='</x>' is not a special token of .* choose"):
        _ = Tokenizer(tokenizer, end_of_document="</x>").end_of_document
    with pytest.raises(ValueError, match=r"bos=True, but tokenizer 'gpt2' has no BOS token"):
        _ = Tokenizer("gpt2", bos=True).bos_id
    with pytest.raises(TypeError, match="end_of_document must be a string, got 7"):
        Tokenizer("gpt2", end_of_document=7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bos must be true or false"):
        Tokenizer("gpt2", bos="no")  # type: ignore[arg-type]


def test_a_bos_token_that_is_left_out_is_told(files, tmp_path):
    own = byte_level()
    own.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    data = GPTDataModule(str(files / "a.txt"), own, 16, data_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"by itself adds <s> to each text.* set bos=True to have it"):
        data.prepare_data()
    GPTDataModule(str(files / "a.txt"), own, 16, data_dir=tmp_path, bos=True).prepare_data()


def test_bits_per_byte_count_the_bytes_of_the_text(files, tmp_path, piece_model):
    """The pieces of a document have one space more than its text."""
    data = GPTDataModule(
        {"main": str(files / "a.txt")}, files / "tokenizer.model", 16, data_dir=tmp_path, bos=True,
        val_corpus={"other": str(files / "b.txt")},
    )  # fmt: skip
    metrics = train(data, tmp_path, val_check_interval=2).callback_metrics
    text = (files / "b.txt").read_text(encoding="utf-8")
    nats = float(metrics["val_loss/other"]) * (data._data.named("other").store.n_tokens - 1)
    bits = nats / math.log(2) / len(text.encode())
    assert float(metrics["val_bits_per_byte/other"]) == pytest.approx(bits, rel=1e-9)
    (begin, end), store = data.sources["main"].split.val, data.store
    pieces = sentencepiece.SentencePieceProcessor(model_proto=piece_model)
    decoded = "".join(pieces.IdToPiece(store.tokens[begin + 1 : end].tolist())).replace("▁", " ")
    n_bytes = len(re.sub("<0x..>", "x", decoded).encode())
    assert data.scored_bytes("val", end - begin - 1, 0, 0, "main") == n_bytes


def test_bits_per_byte_are_not_logged_where_a_normalizer_hides_the_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("ﬁve wives " * 400, encoding="utf-8")  # NFKC turns ﬁ into fi
    tokenizer = byte_level(normalizers.NFKC())
    data = GPTDataModule(str(tmp_path / "a.txt"), tokenizer, 16, data_dir=tmp_path / "data")
    with pytest.warns(UserWarning, match="val bits per byte are not logged: the tokenizer changes"):
        trainer = train(data, tmp_path, val_check_interval=2)
    assert "val_loss" in trainer.callback_metrics
    assert "val_bits_per_byte" not in trainer.callback_metrics


def test_a_total_over_sets_with_unknown_bytes_is_not_logged(files, tmp_path):
    (tmp_path / "a.txt").write_text("ﬁve wives " * 400, encoding="utf-8")
    corpus = {"known": str(files / "a.txt"), "unknown": str(tmp_path / "a.txt")}
    data = GPTDataModule(corpus, byte_level(normalizers.NFKC()), 16, data_dir=tmp_path / "data")
    with pytest.warns(UserWarning, match="bits per byte are not logged"):
        metrics = train(data, tmp_path, val_check_interval=2).callback_metrics
    assert {name for name in metrics if "bits" in name} == {"val_bits_per_byte/known"}


def word_level(unknown: str = "[UNK]", **words: int) -> tokenizers.Tokenizer:
    vocab = words or {word: id for id, word in enumerate(["[UNK]", "</s>", "ab", "cd"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([token for token in ("[UNK]", "</s>") if token in vocab])
    return tokenizer


def clip_like() -> tokenizers.Tokenizer:
    tokenizer = byte_level()
    tokenizer.model.end_of_word_suffix = "</w>"
    return tokenizer


@pytest.mark.parametrize("make", [word_level, clip_like], ids=["word_level", "suffix"])
def test_the_places_of_a_tokenizer_that_changes_the_text_stay_inside_it(make, tmp_path):
    (tmp_path / "a.txt").write_text("some ab cd unknown words\n" * 300, encoding="utf-8")
    tokenizer = Tokenizer(make())
    assert not tokenizer.is_lossless
    data = GPTDataModule(str(tmp_path / "a.txt"), tokenizer, 8, data_dir=tmp_path / "data")
    data.prepare_data()
    data.setup()
    places = [data.store.byte_at(token) for token in range(data.store.n_tokens + 1)]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, data.store.n_bytes)
    begin, end = data.sources["corpus"].split.val
    assert 0.05 < (places[end] - places[begin]) / data.store.n_bytes < 0.15


def test_text_cannot_stay_text_where_a_special_string_is_a_word_of_the_vocabulary():
    assert Tokenizer(word_level()).encode("ab </s> cd") == [2, 1, 3]
    with pytest.raises(ValueError, match=r"reads '</s>' .* Set special_tokens='allow' instead"):
        Tokenizer(word_level(), "text").encode("ab </s> cd")


def test_dropout_is_off_and_a_word_that_is_not_in_the_vocabulary_is_an_error():
    tokenizer = byte_level()
    tokenizer.model.dropout = 0.5
    assert Tokenizer(tokenizer).encode(TOPICS[0]) == byte_level().encode(TOPICS[0]).ids
    without = Tokenizer(word_level("[NONE]", ACGT=0))
    assert without.encode("ACGT ACGT") == [0, 0]
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode the text: .*UNK"):
        without.encode("xyz")


def test_a_name_in_tokenizer_config_counts_even_if_the_token_is_not_called_special(files, tmp_path):
    own = byte_level()
    own.add_tokens(["<|im_end|>"])
    own.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "<|im_end|>", "bos_token": "<s>", "add_bos_token": true}')
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.end_of_document, tokenizer.left_out) == (400, ["<s>"])
    assert tokenizer.fingerprint != Tokenizer(own).fingerprint
    config.write_text('{"eos_token": "<|no|>"}')
    with pytest.raises(ValueError, match="does not tell which token ends a document"):
        _ = Tokenizer(tmp_path).end_of_document
    config.write_text("{")
    with pytest.raises(ValueError, match=f"tokenizer {config} cannot be read"):
        Tokenizer(tmp_path)
    own.save(str(tmp_path / "mine.json"))  # the config is of tokenizer.json
    assert Tokenizer(tmp_path / "mine.json").fingerprint == Tokenizer(own).fingerprint


def test_a_relative_path_in_a_checkpoint_does_not_take_another_file(files, tmp_path, monkeypatch):
    for folder, tokenizer in (("a", byte_level()), ("b", byte_level(normalizers.Lowercase()))):
        (tmp_path / folder).mkdir()
        tokenizer.save(str(tmp_path / folder / "tok.json"))
    monkeypatch.chdir(tmp_path / "a")
    location = GPTDataModule(str(files / "a.txt"), "tok.json").hparams["tokenizer"]
    assert Tokenizer(location).encode("AB") == byte_level().encode("AB").ids
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ValueError, match=r"tok\.json has other contents than it had: its digest was"):
        Tokenizer(location)


def test_objects_stay_below_the_data_dir_whatever_their_name(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)}
    own = tiktoken.Encoding("x/../y", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={})
    data = GPTDataModule("sample", Tokenizer(own), 8, data_dir=tmp_path)
    data.tokenizer.keep()
    (kept,) = (tmp_path / "tokenizers").iterdir()
    assert kept.name == data.tokenizer.name == f"x_.._y-{data.tokenizer.reference.digest[:8]}"


def test_two_options_that_differ_are_refused():
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["</s>"])
    with pytest.raises(ValueError, match="end_of_document='<s>' differs from '</s>' of the given"):
        Tokenizer(Tokenizer(tokenizer, end_of_document="</s>"), end_of_document="<s>")


def test_truncation_and_padding_of_a_tokenizer_json_are_ignored():
    own = byte_level()
    own.enable_truncation(3)
    own.enable_padding(length=50)
    assert Tokenizer(own).encode(TOPICS[0]) == byte_level().encode(TOPICS[0]).ids
    assert Tokenizer(own).fingerprint == Tokenizer(byte_level()).fingerprint
    assert own.truncation["max_length"] == 3  # the user's object stays as it is


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tok.json", b"", "it has 0 ranks, but no split pattern"),
        ("tok.json", b"{", "Expecting property name"),
        ("tok.json", b'{"model": 1}', "it is not a tokenizer.json"),
        ("tok.json", b'{"mergeable_ranks": "x"}', "neither a tokenizer.json"),
        (
            "my.tiktoken",
            b"IQ== 0\nIg== 1\n",
            r"it has 2 ranks, .* Give its tokenizer\.json, or a tiktoken",
        ),
        ("my.tiktoken", b"some text\n", "neither a tokenizer.json"),
        ("tokenizer.model", b"\n\x0b\x0c", "sentencepiece cannot read it"),
        ("tok.json", byte_level().to_str().encode()[:5000], "cannot be read"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_its_name(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer {path} cannot be read: .*({problem})|{problem}"):
        Tokenizer(path)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer='no/tok': there is no such file or folder"):
        Tokenizer("no/tok")
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer(tmp_path)


def test_an_object_with_parts_in_python_is_refused():
    own = byte_level()
    own.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(SimpleNamespace(pre_tokenize=print))
    with pytest.raises(ValueError, match=r"the tokenizer has no tokenizer\.json: Custom"):
        Tokenizer(own)


def test_a_missing_package_is_named_with_its_extra(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs tokenizers: pip install 'lit-gptdata"):
        Tokenizer(files / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"needs sentencepiece: pip install 'lit-gpt"):
        Tokenizer(files / "tokenizer.model")


HUB = """
import sys
from pathlib import Path
from lit_gptdata.tokens.tokenizer import Tokenizer
for word in sys.argv[2:]:
    name, folder = word.split("=")
    tokenizer = Tokenizer(name, data_dir=Path(sys.argv[1], folder))
    try:
        print(tokenizer.vocab_size, tokenizer.location, tokenizer.fingerprint)
    except OSError as error:
        print(error)
"""


def test_a_tokenizer_on_the_hub_is_downloaded_once_and_its_commit_is_kept(files, tmp_path):
    content = (files / "tokenizer.json").read_bytes()
    a, b, fingerprint = "a" * 40, "b" * 40, Tokenizer(files / "tokenizer.json").fingerprint
    with hub_server({"tokenizer.json": content}, kind="models") as hub:
        env = os.environ | hub.environ | {
            "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip

        def run(*words: str) -> list[str]:
            command = [sys.executable, "-c", HUB, tmp_path, *words]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
            return done.stdout.splitlines()

        first, second = (f"400 hf://me/books@{commit} {fingerprint}" for commit in (a, b))
        assert run("hf://me/books=data") == [first]
        hub.commit, asked = b, len(hub.asked)  # someone pushes
        assert run("hf://me/books=data", f"hf://me/books@{a}=data") == [first, first]
        assert len(hub.asked) == asked  # no request after the first run
        new = run("hf://me/books=new", f"hf://me/books@{a}=elsewhere", "hf://me/nothing=data")
        assert new[:2] == [second, first]
        assert new[2].startswith("hf://me/nothing@main cannot be downloaded: ")
        assert len(new) == 3  # one line
    offline = run("hf://me/books=data", "hf://me/books@v2=data")
    assert offline[0] == first
    assert offline[1].startswith("hf://me/books@v2 cannot be downloaded: ")


def test_a_wrong_name_on_the_hub_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"must be hf://org/name or hf://org/name@revision"):
        Tokenizer("hf://gpt2/a/b")
    with pytest.raises(ValueError, match=r"must be hf://org/name"):
        find_on_hub("hf://gpt2", tmp_path)


def test_the_offline_vocabularies_are_openais(monkeypatch):
    pytest.importorskip("bpe_openai")
    monkeypatch.setattr("requests.get", lambda *_, **__: pytest.fail("the network was asked"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/nowhere")
    assert Tokenizer("cl100k_base").encode("hello world") == [15339, 1917]
    assert Tokenizer("o200k_base").encode("hello world") == [24912, 2375]
    assert Tokenizer("o200k_base").end_of_document == 199_999


def test_own_special_tokens_of_tiktoken_end_a_document():
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "own", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<eos>": 256, "<|x|>": 257}
    )
    tokenizer = Tokenizer(encoding)
    assert tokenizer.end_of_document == 256
    ids = tokenizer.encode("a<eos><|x|>")
    assert ids == [97, 256, *b"<|x|>"]
    assert tokenizer.decode_each(ids)[:2] == [b"a", b"<eos>"]
    assert np.array(ids).max() < tokenizer.vocab_size


def test_added_tokens_that_overlap_are_found_in_the_librarys_order():
    """tokenizers looks for special tokens first, gigatoken for the longest token."""
    pytest.importorskip("gigatoken")
    tokenizer = byte_level()
    tokenizer.add_tokens(["<a>b", tokenizers.AddedToken("<|end", normalized=False)])
    tokenizer.add_special_tokens(["<a>"])
    for policy, text in (("allow", "x<a>b"), ("text", "x<|endoftext|>"), ("allow", "x<a>b<|end<a>")):
        own = Tokenizer(tokenizer, policy)
        engine = load_engine(own)
        engine.encode(b"a" * (1 << 17))  # the sample at the start of a build is over
        assert engine.name == "gigatoken"
        assert engine.encode(text.encode()).tolist() == own.encode(text)
