"""`data.show` prints a training step as text, and gives a notebook inputs above targets."""

from __future__ import annotations

import html
import json
import re

import pytest

from lit_gptdata import GPTDataModule, WindowDataset, create_dataloader
from lit_gptdata.cli.main import main
from lit_gptdata.report.show import SEPARATOR, visible
from tests.runs import opened, write_sources, write_text

LENGTHS = {"max_length": 8, "stride": 8, "batch_size": 3}
CELL = re.compile(r"<span class='c(\d)' title='id (\d+)'>(.*?)</span>", re.DOTALL)


@pytest.fixture
def words(tmp_path):
    return opened(GPTDataModule(write_text(tmp_path), data_dir=tmp_path / "data", **LENGTHS))


def cells(shown) -> tuple[list, list]:
    """The cells of all inputs and of all targets, each (color, id, text)."""
    found = [(int(c), int(i), html.unescape(text)) for c, i, text in CELL.findall(shown._repr_html_())]
    return found[::2], found[1::2]


def test_print_has_the_text_of_the_step_and_equals_the_command(words, tmp_path, capsys):
    inputs, _ = words.batch_at(4)
    printed = str(words.show(4))
    assert repr(words.show(4)) == printed
    assert printed.startswith("step 4: 3 windows, seed 0\n\nwindow ")
    texts = [part.split("\n")[1] for part in printed.split("\n\n")[1:]]
    assert [text.replace(SEPARATOR, "") for text in texts] == [
        words.tokenizer.decode(ids) for ids in inputs.tolist()
    ]
    overrides = [f"data.{name}={value}" for name, value in LENGTHS.items()]
    overrides += ["data=files", f"data.corpus={tmp_path}/words.txt", f"data.data_dir={tmp_path}/data"]
    assert main(["show", "step=4", *overrides]) == 0
    assert capsys.readouterr().out == f"{printed}\n"


def test_a_notebook_shows_each_input_above_its_target_in_the_color_of_the_next_input(words):
    inputs, targets = words.batch_at(2)
    above, below = cells(words.show(2))
    assert [id for _, id, _ in above] == inputs.flatten().tolist()
    assert [id for _, id, _ in below] == targets.flatten().tolist()
    assert [text for *_, text in above[:8]] == [
        words.tokenizer.decode([id]) for id in inputs[0].tolist()
    ]
    assert [color for color, *_ in above[1:8]] == [color for color, *_ in below[:7]]
    assert len({color for color, *_ in above}) == 4


def test_one_window_can_be_shown(words):
    shown = words.show(window=5)
    assert [id for _, id, _ in cells(shown)[0]] == words.train_windows[5][0].tolist()
    assert str(shown).startswith("window 5, tokens [40, 48), ")
    for window, allowed in (
        (10**6, r"an integer in \[0, \d+\), got 1000000"),
        (-1, "an integer ≥ 0, got -1"),
    ):
        with pytest.raises(ValueError, match=f"window must be {allowed}"):
            words.show(window=window)


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        (-1, ValueError, "step=-1 does not exist"),
        (1.5, TypeError, "step must be an integer, got 1.5"),
        ("3", TypeError, "step must be an integer, got '3'"),
    ],
)
def test_a_step_that_does_not_exist_has_the_error_of_batch_at(words, step, kind, message):
    with pytest.raises(kind, match=message) as expected:
        words.batch_at(step)
    with pytest.raises(kind, match=message) as error:
        words.show(step)
    assert str(error.value) == str(expected.value)
    assert "\n" not in str(error.value)


def test_a_mixture_names_the_source_of_each_window(tmp_path):
    data = opened(GPTDataModule(write_sources(tmp_path), data_dir=tmp_path / "data", **LENGTHS))
    names, windows = data.train_windows.locate(data.windows_at(3))
    shown = data.show(3)
    found = re.findall(
        r"window (\d+) of (\w+), tokens \[\d+, \d+\), (\S+)/(\w+)\.txt, document 1", str(shown)
    )
    assert [(window, name, file) for window, name, _, file in found] == [
        (str(window), name, name) for window, name in zip(windows, names, strict=True)
    ]
    assert f"window {windows[0]} of {names[0]}" in shown._repr_html_()


def test_a_window_of_documents_names_its_pieces_and_shows_no_padding(tmp_path):
    texts = [" a b", " c d e", " f", " g h", " i j k"]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = {
        "max_length": 9,
        "batch_size": 2,
        "val_fraction": 0,
        "windows": "packed",
        "shuffle": False,
    }
    data = opened(GPTDataModule(path, data_dir=tmp_path / "data", **options))
    first, second = data.show(0).windows
    pieces = ((0, 3, 1), (7, 9, 3), (9, 12, 4))
    places = [f"tokens [{a}, {b}), {path}, document {n}, byte 0" for a, b, n in pieces]
    assert first.title == f"window 0, 3 documents; {'; '.join(places)}"
    assert len(first.inputs) == len(first.targets) == 8, "one position is padding"
    assert data.tokenizer.decode(second.inputs) == "<|endoftext|> c d e<|endoftext|> i j k"
    many = data.show(window=0)
    data.max_length = 20
    (title, *_) = data.show(window=0).windows[0]
    assert title.startswith(f"window 0, 5 documents; {places[0]}; …; tokens [12, 15), ")
    assert str(many).startswith(first.title)


def test_html_and_invisible_characters_in_a_text_are_shown_as_text(tmp_path):
    path = tmp_path / "<b>&'.txt"
    path.write_text("a <script>alert('1')</script>\n\x1b[31mred\tx\x00\u202e \u200b é 猫 🦜 &amp; " * 2)
    data = opened(
        GPTDataModule(path, data_dir=tmp_path / "data", val_fraction=0, max_length=40, stride=1)
    )
    shown = data.show(window=0)
    page = shown._repr_html_()
    assert re.findall("<(?!/?(?:span|div|style))", page) == []
    assert "/&lt;b&gt;&amp;&#x27;.txt" in page
    text = "".join(text for *_, text in cells(shown)[0])
    assert text.startswith("a <script>alert('1')</script>⏎␛[31mred⇥x␀")
    for invisible in ("\x1b", "\x00", "\u202e", "\u200b"):
        assert invisible not in page + str(shown)


def test_visible_keeps_letters_and_names_what_cannot_be_seen():
    assert visible("a é猫🦜", "⏎", "⇥") == "a é猫🦜"
    assert visible("\n\t\x1b\x7f\x9b\u202e", "⏎", "⇥") == r"⏎⇥␛␡\x9b\u202e"


def test_a_notebook_shows_a_part_of_a_large_batch(words, monkeypatch):
    monkeypatch.setattr("lit_gptdata.report.show.NOTEBOOK_TOKENS", 16)
    assert len(cells(words.show(0))[0]) == 16
    assert "… and 1 more windows, which print() shows" in words.show(0)._repr_html_()


def test_a_rank_without_windows_in_a_step_shows_none(words):
    shown = type(words.show(0))("step 9: 0 windows", words.train_windows, [], words._data)
    assert str(shown) == "step 9: 0 windows\n"
    assert cells(shown) == ([], [])


def test_data_of_an_earlier_stage_of_a_run_has_no_origin(words, tmp_path):
    other = opened(GPTDataModule(write_text(tmp_path), data_dir=tmp_path / "other", **LENGTHS))
    shown = type(words.show(0))("", words.train_windows, [3], other._data)
    assert str(shown).startswith("window 3, tokens [24, 32), in earlier data of this run\n")


def test_windows_print_what_they_are(tmp_path):
    data = opened(GPTDataModule(write_text(tmp_path), data_dir=tmp_path / "data", **LENGTHS))
    n, end = len(data.train_windows), data.train_windows.end
    assert (
        repr(data.train_windows) == f"Windows: {n} windows of 8 every 8 tokens, over tokens [0, {end})"
    )
    text = "one two three four five six seven"
    expected = "WindowDataset: 3 windows of 4 every 1 tokens, over tokens [0, 7) of Tokenizer('gpt2')"
    assert repr(WindowDataset(text, "gpt2", 4, 1)) == expected
    assert repr(create_dataloader(text, 1, 4, 1).dataset) == expected
    mixture = opened(GPTDataModule(write_sources(tmp_path), data_dir=tmp_path / "data", **LENGTHS))
    assert re.fullmatch(r"Mixture: \d+ windows of 8 every 8 .*3 sources", repr(mixture.train_windows))
    assert re.fullmatch(r"ChainedWindows: \d+ windows of 8 tokens, of 3 sets", repr(mixture.val_windows))
