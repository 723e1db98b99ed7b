"""Paths, folders, globs, names and lists become a corpus; text is read like `open` reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gptdata.text import formats as module
from lit_gptdata.text.corpus import download_path, open_corpus
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import FileSlice, Reading, read_documents
from lit_gptdata.text.gutenberg import strip_gutenberg
from lit_gptdata.text.sample import SampleCorpus
from tests.text.test_formats import in_another_encoding


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / (name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def texts(corpus) -> list[str]:
    return [b"".join(document.chunks).decode() for document in corpus]


def read_text(path: Path, errors: str, chunk: int = 1 << 20) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        (text,) = texts(read_documents(FileSlice(path=path), Reading(encoding_errors=errors)))
    return text


def test_a_path_a_folder_a_glob_and_a_list(tmp_path):
    write(tmp_path, b="B", a="A", sub__c="C")
    (tmp_path / "notes.md").write_text("M")
    assert texts(FilesCorpus(tmp_path / "a.txt")) == ["A"]
    assert texts(FilesCorpus(tmp_path)) == ["A", "B", "C"]
    assert texts(FilesCorpus(f"{tmp_path}/*.txt")) == ["A", "B"]
    assert texts(FilesCorpus(f"{tmp_path}/**/*.txt")) == ["A", "B", "C"]
    some = FilesCorpus([f"{tmp_path}/b.txt", tmp_path / "notes.md", tmp_path / "sub"])
    assert texts(some) == ["B", "M", "C"]


def test_a_name_with_glob_characters_is_a_name_if_it_exists(tmp_path):
    (tmp_path / "book[1].txt").write_text("one")
    assert texts(FilesCorpus(tmp_path / "book[1].txt")) == ["one"]


def test_a_tilde_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, a="A")
    assert texts(FilesCorpus("~/a.txt")) == ["A"]


@given(
    data=st.lists(
        st.sampled_from(["a", "é", "語", "🙂", "\r", "\n", "\r\n", "\ufeff", "NUL \0", "\x1c", "\u2028"])
    ).map("".join),
    chunk=st.integers(1, 9),
)
def test_text_is_read_as_open_reads_it_for_any_chunk_size(tmp_path_factory, data, chunk):
    path = tmp_path_factory.mktemp("t") / "x.txt"
    path.write_bytes(data.encode())
    with open(path, encoding="utf-8") as file:
        assert read_text(path, "strict", chunk) == file.read()


@given(data=st.binary(max_size=40).map(in_another_encoding), chunk=st.integers(1, 9))
def test_invalid_bytes_are_replaced_as_open_replaces_them(tmp_path_factory, data, chunk):
    path = tmp_path_factory.mktemp("t") / "x.txt"
    path.write_bytes(data)
    with open(path, encoding="utf-8", errors="replace") as file:
        assert read_text(path, "replace", chunk) == file.read()


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_invalid_utf8_names_file_and_offset(tmp_path, chunk):
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve \r\n".encode() + b"caf\xe9 au lait")
    with pytest.raises(UnicodeError) as caught:
        read_text(path, "strict", chunk)
    message = str(caught.value)
    assert f"{path} is not valid UTF-8: byte 0xe9 at offset 12" in message
    assert "encoding_errors=replace" in message


def test_a_file_that_ends_inside_a_character_is_invalid(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes("語".encode()[:2])
    with pytest.raises(UnicodeError, match=r"byte 0xe8 at offset 0 \(unexpected end of data\)"):
        read_text(path, "strict")


@pytest.mark.parametrize(
    ("corpus", "error", "message"),
    [
        ("folder/*.text", FileNotFoundError, r"no such file or folder: 'folder/\*.text'. Give a path"),
        ("books/*.txt", FileNotFoundError, "no such file or folder: 'books/.*. Give a path"),
        ("folder", FileNotFoundError, r"/folder holds no text: looked for \*.txt"),
        ("book.txt", FileNotFoundError, r"no such file or folder: 'book.txt'.*'sample'"),
        (".", ValueError, r"b.txt is empty \(0 bytes\): remove it"),
        ([], ValueError, "the corpus is an empty list"),
    ],
)
def test_a_corpus_without_text_is_refused(corpus, error, message):
    write(Path(), a="A", b="", folder__n="N")
    Path("folder/n.txt").rename("folder/n.md")
    with pytest.raises(error, match=message):
        FilesCorpus(corpus)


@pytest.mark.parametrize("corpus", ["", ["a.txt", ""]])
def test_an_empty_name_is_not_the_current_folder(corpus):
    Path("a.txt").write_text("some text")
    with pytest.raises(ValueError, match=r"empty string: name a file, a folder \('\.' is the current"):
        FilesCorpus(corpus)
    assert len(FilesCorpus(".").files) == 1


def test_an_unknown_error_policy_is_refused():
    with pytest.raises(
        ValueError, match=r"encoding_errors must be one of .'strict', 'replace'., got 'ignore'"
    ):
        Reading(encoding_errors="ignore")


@pytest.mark.parametrize("corpus", [5, None, ["a.txt", 5], b"a.txt"])
def test_an_object_that_names_no_text_is_refused(corpus):
    message = r"expected the name of a text, got .*\. Give 'sample', 'stdlib', one of .* a URL, a path"
    with pytest.raises(TypeError, match=message):
        open_corpus(corpus)


def test_the_sample_is_the_language_reference():
    corpus = open_corpus("sample")
    assert isinstance(corpus, SampleCorpus)
    names = [document.source for document in corpus]
    assert names == sorted(names)
    assert len(names) > 50
    assert sum(map(len, texts(corpus))) > 400_000
    assert corpus.fingerprint == SampleCorpus().fingerprint


def test_a_url_that_is_not_downloaded_yet_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not downloaded yet: .* Call prepare_data\(\)"):
        open_corpus("frankenstein", downloads=tmp_path, download=False)


def test_an_unknown_scheme_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown scheme 'gopher'; fsspec knows .*s3"):
        open_corpus("gopher://example.org/book.txt", downloads=tmp_path)


def test_download_names_are_readable_and_unique(tmp_path):
    one = download_path("https://example.org/84/pg84.txt?a=1", tmp_path)
    two = download_path("https://example.org/84/pg84.txt?a=2", tmp_path)
    assert one != two
    assert one.name.startswith("pg84-")
    assert one.suffix == ".txt"
    assert download_path("https://example.org/", tmp_path).parent == tmp_path
    assert "/" not in download_path("https://example.org/a%2F..%2Fb", tmp_path).name


def test_strip_gutenberg_keeps_the_text_between_the_markers():
    marker = "*** {} OF THE PROJECT GUTENBERG EBOOK X ***"
    book = f"licence\n{marker.format('START')}\n\n\nText\n\n{marker.format('END')}\nmore"
    assert strip_gutenberg(book, "x.txt") == "Text\n"
    with pytest.raises(ValueError, match=r"x.txt has no line '\*\*\* START OF"):
        strip_gutenberg("no markers", "x.txt")
    with pytest.raises(ValueError, match=r"x.txt has no line '\*\*\* END OF"):
        strip_gutenberg(book.split("*** END")[0], "x.txt")


MARKER = "*** {} OF THE PROJECT GUTENBERG EBOOK X ***"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "marker",
    [
        MARKER,
        "***{} OF THIS PROJECT GUTENBERG EBOOK X***",
        "  *** {} of the Project Gutenberg eBook X ***",
        "*** {} OF THE PROJECT GUTENBERG EBOOK",
        "*** {} OF THE PROJECT GUTENBERG EBOOK THE LONG\nADVENTURES OF A\nSAILOR ***",
        "*** {} OF THE PROJECT GUTENBERG EBOOK THE LONG\n***",
    ],
)
def test_markers_of_gutenberg_have_many_forms(marker, newline):
    start, end = marker.format("START"), marker.format("END")
    text = "  Text ***\n\n***\n\nmore"
    book = f"\ufefflicense\n{start}\n\n{text}\n\n{end}\nlicense".replace("\n", newline)
    assert strip_gutenberg(book, "x.txt") == text.replace("\n", newline) + "\n"


def test_a_marker_without_asterisks_at_its_end_takes_no_text():
    start = "*** START OF THIS PROJECT GUTENBERG EBOOK X"
    book = f"license\n{start}\nText *** of\n*** a note ***\nmore\n{MARKER.format('END')}\n"
    assert strip_gutenberg(book, "x.txt") == "Text *** of\n*** a note ***\nmore\n"


def test_every_book_of_a_file_is_stripped():
    start, end = MARKER.format("START"), MARKER.format("END")
    book = f"license\n{start}\n\n{{}}\n\n{end}\nlicense\n"
    assert strip_gutenberg(book.format("One") + book.format("Two"), "x.txt") == "One\n\nTwo\n"
    for text, missing in ((f"{start}\nOne\n{start}\nTwo\n{end}", "END"), (f"One\n{end}", "START")):
        with pytest.raises(ValueError, match=rf"x.txt has no line '\*\*\* {missing} OF .* before the"):
            strip_gutenberg(text, "x.txt")


def test_rows_are_stripped_if_they_have_the_markers(tmp_path):
    rows = [f"license\n{MARKER.format('START')}\nBook\n{MARKER.format('END')}\n", "no markers"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert texts(FilesCorpus(path, Reading(strip_gutenberg=True))) == ["Book\n", "no markers"]
    path.write_text(json.dumps({"text": MARKER.format("START")}))
    with pytest.raises(ValueError, match=r"a.jsonl: line at byte 0 has no line '\*\*\* END OF"):
        texts(FilesCorpus(path, Reading(strip_gutenberg=True)))
