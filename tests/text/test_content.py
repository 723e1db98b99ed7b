"""A file that is not what its name promises is refused with what it is and the command that helps."""

from __future__ import annotations

import array
import bz2
import gzip
import io
import json
import lzma
import random
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import FileSlice, Reading, format_of, read_documents
from lit_gptdata.text.listing import expand_url
from lit_gptdata.text.sample import SampleCorpus
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.text.test_formats import pack, texts, zstd

LINE = "It was a dark night in November and the wind went round the house.\n"
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему.\n"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"
HINDI = "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।\n"
ROWS = b'{"text": "one", "id": 1}\n{"text": "two", "id": 2}\n'


def zipped(*names: str, content: str | bytes = LINE * 9) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return out.getvalue()


def tarred(form: int = tarfile.PAX_FORMAT) -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w", format=form) as archive:
        member = tarfile.TarInfo("book.txt")
        member.size = len(LINE)
        archive.addfile(member, io.BytesIO(LINE.encode()))
    return out.getvalue()


def numpy_file() -> bytes:
    np.save(out := io.BytesIO(), np.arange(9))
    return out.getvalue()


def token_ids(kind: str) -> bytes:
    """The ids of a text as nanoGPT writes them, without a header."""
    ids = Tokenizer("gpt2").reference.encoding.encode("".join(SampleCorpus().topics.values())[:100_000])
    return array.array(kind, ids).tobytes()


NOTEBOOK = {"cells": [{"cell_type": "code", "source": ["print(1)"]}], "nbformat": 4}
BINARY = {
    "gzip": (gzip.compress(LINE.encode()), "is gzip data: run mv a.txt a.txt.gz and give the result"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "is zstd data: run mv a.txt a.txt.zst"),
    "parquet": (b"PAR1\x15\4\x15\x10", "is a Parquet file: run mv a.txt a.parquet"),
    "zip": (zipped("book.txt"), "is a zip archive: run unzip a.txt -d a-text"),
    "word": (
        zipped("[Content_Types].xml"),
        "is an Office file: run soffice --headless --convert-to txt",
    ),
    "epub": (zipped("mimetype", content="application/epub+zip"), "is an EPUB book: run pandoc -t plain"),
    "xz": (lzma.compress(LINE.encode()), "is xz data: run xz -dc a.txt > a-text.txt"),
    "bz2": (bz2.compress(LINE.encode()), "is bzip2 data: run bunzip2 -c a.txt > a-text.txt"),
    "tar": (tarred(), "is a tar archive: run mkdir a-text && tar -xf a.txt -C a-text"),
    "gnu tar": (tarred(tarfile.GNU_FORMAT), "is a tar archive"),
    "error": (
        b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>',
        "is an error message of a server: remove it and fetch the text again",
    ),
    "pdf": (
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj",
        "is a PDF document: run pdftotext a.txt a-text.txt",
    ),
    "doc": (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(99), "is an old Office file…: run soffice"),
    "rtf": (rb"{\rtf1\ansi text}", "is an RTF document: run soffice"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is a Git LFS pointer: run git lfs pull",
    ),
    "annex": (b"/annex/objects/MD5E-s1--0.txt\n", "is a git-annex pointer: run git annex get a.txt"),
    "npy": (numpy_file(), "is a NumPy array: to train on token ids, run lit-gptdata import npy a.txt"),
    "arrow": (
        b"ARROW1\0\0\xff\xff\xff\xff",
        "is an Arrow file, not Parquet: … run lit-gptdata import arrow a.txt",
    ),
    "llm.c": (
        struct.pack("<256i", 20240520, 1, *[0] * 254),
        "is token ids of llm.c: … run lit-gptdata import llmc a.txt",
    ),
    "megatron": (
        b"MMIDIDX\0\0\1\0\0\0\0\0\0\0\x08",
        "is an index of token ids of Megatron: … run lit-gptdata import megatron a.txt",
    ),
    "uint16 ids": (
        token_ids("H"),
        "is binary data, perhaps token ids: … run lit-gptdata import nanogpt a.txt",
    ),
    "uint32 ids": (token_ids("I"), "is binary data, perhaps token ids"),
    "characters": (
        bytes(2 * [7, 0, 40, 0, 1, 0, 64, 0, 13, 0] * 99),
        "is binary data, perhaps token ids",
    ),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "is binary data, perhaps token ids"),
    "iso-2022-jp": (JAPANESE.encode("iso-2022-jp"), "is ISO-2022-JP: run iconv -f iso-2022-jp -t utf-8"),
    "zeros": (bytes(4000), "is text with many NUL bytes"),
    "NULs": (b"word\0\0\0\0" * 99, r"is text with many NUL bytes: run tr -d '\0' < a.txt > a-text.txt"),
}
for encoding in ("utf-16", "utf-32"):
    for number, text in enumerate((LINE, RUSSIAN, JAPANESE * 30, HINDI)):
        command = rf"{encoding} -t utf-8 a.txt > a-text.txt"
        BINARY[f"{encoding} {number}"] = (
            text.encode(encoding),
            f"is {encoding.upper()}: run iconv -f {command}",
        )
        for end in ("le", "be"):
            problem = (
                f"is {encoding.upper()} without a byte order mark: run iconv -f {encoding}{end} -t utf-8"
            )
            BINARY[f"{encoding}{end} {number}"] = text.encode(encoding + "-" + end), problem


def matches(found: str, expected: str) -> bool:
    """Whether a message starts as expected; "…" stands for anything."""
    parts = map(re.escape, expected.split("…"))
    return re.match(".*".join(parts), found) is not None


def problem_of(path: Path, **reading) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        texts(path, **reading)
    return str(caught.value)


@pytest.mark.parametrize("kind", BINARY)
def test_a_file_that_is_not_text_is_refused_with_what_it_is_and_the_command_that_helps(kind):
    data, message = BINARY[kind]
    Path("a.txt").write_bytes(data)
    for errors in ("strict", "replace"):
        found = problem_of(Path("a.txt"), encoding_errors=errors)
        assert matches(found, f"a.txt {message}"), found


INSIDE = {
    "books.tar.gz": (
        tarred(),
        "holds a tar archive: run gunzip -k books.tar.gz && mkdir books-text && tar -xf books.tar",
    ),
    "books.jsonl.zst": (
        tarred(),
        "holds a tar archive: run zstd -d books.jsonl.zst && mkdir books-text && tar -xf books",
    ),
    "a.txt.gz": (gzip.compress(b"text"), "holds gzip data: run gunzip -k a.txt.gz && mv a.txt a.txt.gz"),
    "b.txt.zst": (gzip.compress(b"text"), "holds gzip data: run zstd -d b.txt.zst && mv b.txt b.txt.gz"),
    "c.jsonl.gz": (
        ROWS.decode().encode("utf-16"),
        "holds UTF-16: run gunzip -k c.jsonl.gz && iconv -f utf-16 -t utf-8 c.jsonl > c-text.jsonl",
    ),
    "d.gz": (b"%PDF-1.4 ", "holds a PDF document: run gunzip -k d.gz && pdftotext d d-text.txt"),
    "e.txt.gz": (ROWS, "holds JSON Lines, not one text…: run gunzip -k e.txt.gz && mv e.txt e.jsonl"),
    "f.json.gz": (
        b'[\n{"text": "a"}]',
        "holds a JSON array…: run gunzip -k f.json.gz && jq -c '.[]' f.json",
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_a_compressed_file_holds_is_checked_too(name):
    data, message = INSIDE[name]
    for errors in ("strict", "replace"):
        found = problem_of(pack(Path(name), data), encoding_errors=errors)
        assert matches(found, f"{name} {message}"), found


NOT_COMPRESSED = {
    "a.txt.gz": (
        LINE.encode(),
        "is not compressed, in spite of its suffix .gz: run mv a.txt.gz a.txt and",
    ),
    "a.jsonl.zst": (
        ROWS,
        "is not compressed, in spite of its suffix .zst: run mv a.jsonl.zst a.jsonl and",
    ),
    "b.txt.gz": (b"(\xb5/\xfd\x04\0", "is zstd data: run mv b.txt.gz b.txt.zst and"),
    "b.txt.zst": (gzip.compress(b"x"), "is gzip data: run mv b.txt.zst b.txt.gz and"),
    "c.txt.gz": (zipped("book.txt"), "is a zip archive: run unzip c.txt.gz -d c-text"),
    "d.txt.gz": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "is a Git LFS pointer: run git lfs pull",
    ),
    "e.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "f.parquet": (gzip.compress(b"x"), "is gzip data"),
}


@pytest.mark.parametrize("name", NOT_COMPRESSED)
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(name):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if name.endswith(".zst"):
        zstd()  # skips
    data, message = NOT_COMPRESSED[name]
    Path(name).write_bytes(data)
    found = problem_of(Path(name))
    assert matches(found, f"{name} {message}"), found


def test_a_remote_file_is_checked_like_a_local_one():
    memory = fsspec.filesystem("memory")
    for name, data in (
        ("a.txt", zipped("book.txt")),
        ("a.txt.gz", LINE.encode()),
        ("b.gz", gzip.compress(tarred())),
    ):
        memory.pipe_file(f"/{name}", data)
        (file,) = expand_url(f"memory://{name}")
        with pytest.raises(ValueError, match=rf"{name} (is|holds) .*: copy it to this machine, run "):
            texts(file)
        memory.rm(f"/{name}")


def test_every_slice_of_a_large_binary_file_names_what_it_is():
    path = Path("a.txt")
    path.write_bytes(zipped("book.txt", content=random.Random(0).randbytes(200_000)))
    with pytest.raises(ValueError, match=r"a.txt is a zip archive"):
        list(next(read_documents(FileSlice(path=path, start=90_000, stop=120_000), Reading())).chunks)


def test_random_bytes_are_called_binary_not_latin1():
    Path("a.txt").write_bytes(b"x" + random.Random(0).randbytes(2000).replace(b"\0", b""))
    assert "Binary data starts near offset 1: take it out" in problem_of(Path("a.txt"))
    assert "a.txt is binary data" in problem_of(Path("a.txt"), encoding_errors="replace")
    Path("a.txt").write_text(JAPANESE.strip() * 20, encoding="utf-16-le")  # without NUL bytes
    assert "It looks like UTF-16: convert it (iconv -f utf-16le" in problem_of(Path("a.txt"))


# JSON, tables and pages under the names of texts ---------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonlines", "c4.00000-of-01024.json", "A.JSON"]
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_have_many_suffixes(name, suffix):
    path = pack(Path("folder", name + suffix), ROWS)
    assert texts(path) == ["one", "two"]
    assert format_of(path).name == "jsonl" + suffix
    for corpus in ("folder", str(path), "folder/*"):
        assert FilesCorpus(corpus).files == [path.absolute()]


REFUSED = {
    "a.txt": (ROWS, "is JSON Lines, not one text…: run mv a.txt a.jsonl and give the result"),
    "b": (b"\xef\xbb\xbf\n" + ROWS, "is JSON Lines, not one text…: run mv b b.jsonl"),
    "c.dump": (b'{"id": 1}\n{"id": 2}\n', "is JSON Lines"),
    "d.log": (ROWS, "is JSON Lines"),
    "e.txt": (b'{"text": "' + b"x" * 99_000 + b'"}\n', "is JSON Lines"),
    "f.txt": (
        b'[{"text": "a"},\n{"text": "b"}]',
        "is a JSON array: run jq -c '.[]' f.txt > f-text.jsonl",
    ),
    "g.json": (b'[{"text": "a"}]', "is a JSON array, not one object per line: run jq -c '.[]' g.json"),
    "h.json": (b'["a", "b"]', """is a JSON array…: run jq -c '.[] | {text: .}' h.json > h-text.jsonl"""),
    "i.json": (b'{\n "data": []\n}\n', "is JSON on several lines…: run jq -c '.' i.json > i-text.jsonl"),
    "j.ipynb": (
        json.dumps(NOTEBOOK, indent=1).encode(),
        "is a notebook: run jupyter nbconvert --to script",
    ),
    "k.txt": (json.dumps(NOTEBOOK).encode(), "is a notebook"),
    "l.csv": (b"id,value\n1,2\n", 'is a table, not one text…: run python -c "import csv'),
    "m.tsv.gz": (b"text\tid\r\none\t1\r\n", "holds a table, not one text"),
    "p.txt": (b"<!--" + b"x" * 9000 + b"-->\n<body><h1>Error", "is an HTML page"),
    "n.txt": (b"\n<!DOCTYPE html>\n<p>Sign in", "is an HTML page (name it .html…: run pandoc -f html"),
    "o.jsonl": (b"<html><p>Sign in", "is an HTML page: run pandoc -f html -t plain"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_json_tables_and_pages_are_not_taken_for_a_text(name):
    data, message = REFUSED[name]
    found = problem_of(pack(Path(name), data))
    assert matches(found, f"{name} {message}"), found


TABLES = {
    "a.csv": 'id,"text"\n1,NA\n2,"two, ""2""\n lines"\n3,\n',
    "b.csv": '\ufeffid;text\n1;NA\n2;"two, ""2""\n lines"\n3;\n',
    "c.tsv": 'text\tid\nNA\t1\n"two, ""2""\n lines"\t2\n\t3\n',
    "e.PSV": 'id|text\n1|NA\n2|"two, ""2""\n lines"\n3|\n',
    "f.tab.gz": 'text\nNA\n"two, ""2""\n lines"\n""\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_the_command_for_a_table_keeps_every_text(name, tmp_path):
    path = pack(tmp_path / name, TABLES[name].encode())
    command = re.search(r"run (.*) and give the result", problem_of(path), re.DOTALL)[1]
    subprocess.run(command.replace("python -c", f"{sys.executable} -c"), shell=True, check=True)
    assert texts(tmp_path / f"{name[0]}.jsonl") == ["NA", 'two, "2"\n lines', ""]


def test_a_file_of_strings_or_of_other_keys_gets_advice_that_helps():
    Path("a.jsonl").write_text('{"meta": {"text": "x"}}\n')
    assert "not to a key inside of an object" in problem_of(Path("a.jsonl"), text_column="meta.text")
    Path("a.log").write_bytes(ROWS)
    assert "name it .log" not in problem_of(Path("a.log"))


def test_the_commands_quote_names_and_do_what_they_promise(tmp_path):
    path = tmp_path / "my {first} book's.txt"
    path.write_bytes(ROWS)
    command = re.search("run (.*) and give the result", problem_of(path))[1]
    subprocess.run(command, shell=True, check=True)
    assert texts(tmp_path / "my {first} book's.jsonl") == ["one", "two"]
    path.write_bytes(LINE.encode("utf-16"))
    command = re.search("run (.*) and give the result", problem_of(path))[1]
    subprocess.run(command, shell=True, check=True)
    assert texts(tmp_path / "my {first} book's-text.txt") == [LINE]
    pack(tmp_path / "a.tar.gz", tarred())
    command = re.search("run (.*) and give the result", problem_of(tmp_path / "a.tar.gz"))[1]
    subprocess.run(command, shell=True, check=True)
    assert texts(tmp_path / "a-text" / "book.txt") == [LINE]


# Texts ---------------------------------------------------------------------------------------------

TEXTS = {
    "english.txt": LINE * 1000,
    "russian.txt": RUSSIAN,
    "japanese.txt": JAPANESE,
    "hindi.txt": HINDI,
    "arabic.txt": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.\n",
    "emoji.txt": "🙂👩‍👩‍👧‍👦🇪🇺",
    "one.txt": "{",
    "bom.txt": "\ufeffText",
    "nul.txt": "a\0b",
    "c-string.txt": "hello\0",
    "list.txt": "".join(f"folder/file{i}.txt\0" for i in range(9)),
    "ansi.log": "\x1b[31merror\x1b[0m\x1b]0;title\x07 done\n" * 99,
    "dos.txt": "text\r\n\x1a",
    "fix.log": "8=FIX.4.2\x019=65\x0135=A\x0149=ONE\x01\n" * 9,
    "hive": "one\x01two\x01three\n" * 9,
    "code.py": "#!/usr/bin/env python\ndata = {'text': 1}\n",
    "code.js": '{ "use strict"; let text = 1 }\n{ f() }\n',
    "template.txt": "{name} writes:\n{text}\n",
    "package.txt": '{\n  "name": "text",\n  "text": 1\n}\n',
    "settings.conf": '{"theme": "dark", "nested": {"text": 1}}',
    "events.log": '{"level": "info", "msg": "one"}\n{"level": "info", "msg": "two"}\n',
    "marks.txt": "~{a~} and ~{bc~} and costs in $: \x1b[0m",
    "list.md": "[text](one.md)\n[{text}](two.md)\n",
    "table.md": "| id | text |\n|---|---|\n| 1 | one |\n",
    "page.html": "<!DOCTYPE html>\n<p>text",
    "page.xml": '<?xml version="1.0"?>\n<text/>',
    "about.txt": "PK is a name. %PDF is a sign. BZh, Rar! and GIF are, too. <html> is a tag.",
    "pk.txt": "PK\n",
    "par.txt": "PAR1 is a magic number",
    "gguf.txt": "GGUF is a format",
    "version.txt": "version https://example.org/",
    "tar.txt": LINE * 3 + "ustar",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_real_text_is_read(name, suffix):
    path = pack(Path(name + suffix), TEXTS[name].encode())
    for errors in ("strict", "replace"):
        expected = TEXTS[name].replace("\r\n", "\n")
        assert texts(path, encoding_errors=errors) == [expected]


def test_a_text_in_another_encoding_keeps_its_advice():
    Path("a.txt").write_text("Le café est à l'étage, déjà fermé l'été. " * 50, encoding="latin1")
    assert "iconv -f latin1" in problem_of(Path("a.txt"))
    assert "Le caf\ufffd est" in texts(Path("a.txt"), encoding_errors="replace")[0]
    for encoding, text in (
        ("cp1251", RUSSIAN),
        ("shift-jis", JAPANESE),
        ("gbk", "人人生而自由。\n" * 9),
    ):
        Path("a.txt").write_text(text, encoding=encoding)
        assert "iconv -f latin1" in problem_of(Path("a.txt"))
        assert texts(Path("a.txt"), encoding_errors="replace")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("array", [[{"id": 1}, {"id": 2}], [{"id": "word \u00e9" * 40_000}, {"id": 2}]])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_not_one_text(array, indent, suffix):
    path = pack(Path("a.txt" + suffix), json.dumps(array, indent=indent).encode())
    assert "jq -c '.[]' a.txt > a-text.jsonl" in problem_of(path)


@pytest.mark.parametrize(
    "text",
    [
        '["Come in," he said.] And he did.\n',
        '["a", "b"] is a list.\n',
        '["a", "b"',
        '["\\x"]',
        "[1] A note.\n",
        '["Come in,"\n' + LINE * 2000,
    ],
)
def test_a_text_may_start_like_a_json_array(text):
    Path("a.txt").write_text(text)
    assert texts(Path("a.txt")) == [text]


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (bytes(range(128, 256)) + bytes(range(32)) * 9, "Binary data starts near offset 20100: take"),
        ("Caf\u00e9".encode("latin1"), "Repair this place, convert it if all of it"),
    ],
)
def test_a_part_of_a_text_that_is_not_text_is_named(part, what):
    text = LINE.encode() * 300
    for name, data in (("a.txt", text[:20_100] + part + text), ("b.txt.gz", text[:20_100] + part)):
        assert what in problem_of(pack(Path(name), data))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("data", [b"a", b"ab", b"ab\n"])
def test_a_text_of_a_few_bytes_is_not_called_a_broken_archive(suffix, data):
    if suffix == ".zst":
        zstd()
    Path("a.txt" + suffix).write_bytes(data)
    problem = problem_of(Path("a.txt" + suffix))
    assert f"is not compressed, in spite of its suffix {suffix}: run mv a.txt{suffix} a.txt" in problem


@pytest.mark.parametrize("name", ["a.gz", "a.zst", "a.jsonl.gz", "a.parquet"])
def test_a_file_of_0_bytes_is_refused_before_it_is_opened(name):
    Path(name).touch()
    with pytest.raises(ValueError, match=rf"{name} is empty \(0 bytes\): remove it from the corpus"):
        FilesCorpus(name)
