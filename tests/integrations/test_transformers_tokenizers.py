"""Tokenizers of transformers: we read theirs, and they read ours."""

from __future__ import annotations

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
for package in ("sentencepiece", "tokenizers"):
    pytest.importorskip(package)
from lit_gptdata.tokens.libraries.train import train_tokenizer  # noqa: E402
from lit_gptdata.tokens.tokenizer import END_OF_TEXT, Tokenizer  # noqa: E402
from tests.tokens import test_libraries as libraries  # noqa: E402
from tests.tokens.test_train_tokenizer import SAMPLE  # noqa: E402

piece_model, files = libraries.piece_model, libraries.files  # fixtures


def test_ids_are_those_of_transformers(files):
    libraries.test_ids_are_the_librarys_own_and_special_strings_follow_the_policy("transformers", files)


@pytest.mark.filterwarnings("ignore:.*by itself adds:UserWarning")
def test_a_checkpoint_keeps_a_tokenizer_of_transformers(files, tmp_path):
    libraries.test_a_checkpoint_finds_its_tokenizer_in_a_new_process_and_resumes(
        ["transformers"], files, tmp_path
    )


def test_transformers_loads_a_file_of_train_tokenizer():
    train_tokenizer(Path("own.json"), 1000, [(SAMPLE, 0.9)])
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file="own.json", eos_token=END_OF_TEXT)
    text = "naïve dict" + END_OF_TEXT
    assert loaded(text).input_ids == Tokenizer("own.json").encode(text)
    assert (len(loaded), loaded.eos_token_id) == (1000, 999)
