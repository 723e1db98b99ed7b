"""Files in every format, valid or not, are read as documents or refused with a clear error."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gptdata.text import formats as module
from lit_gptdata.text import remote_file
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import FileSlice, Reading, format_of, read_documents
from lit_gptdata.text.listing import expand_url
from lit_gptdata.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
ENCODING = Tokenizer("gpt2").reference.encoding
RULE = Tokenizer("gpt2").cut_rule
assert RULE


def zstd() -> Any:
    return pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def zstd_frame(data: bytes, **parameters: int) -> bytes:
    """`data` as one zstd frame."""
    names = zstd().CompressionParameter
    return zstd().compress(data, options={names[name]: value for name, value in parameters.items()})


def pack(path: Path, data: bytes) -> Path:
    """Write `data`, compressed if the path ends in .gz or .zst."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data, 1)
    elif path.suffix == ".zst":
        data = zstd_frame(data, checksum_flag=1)
    path.write_bytes(data)
    return path


def write_parquet(path: Path, columns: dict[str, object], **options) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path, **options)
    return path


def test_a_parquet_file_that_would_lose_rows_is_refused(tmp_path):
    for index in (False, True):
        one = write_parquet(tmp_path / "a.parquet", {"text": ["one"] * 9}, write_page_index=index)
        assert texts(one) == ["one"] * 9
        for n in (1, 5000):  # the second part is longer, or shorter
            two = write_parquet(tmp_path / "b.parquet", {"text": [str(i) for i in range(n)]})
            for parts in ((one, two), (two, one)):
                both = tmp_path / "c.parquet"
                both.write_bytes(b"".join(part.read_bytes() for part in parts))
                with pytest.raises(ValueError, match=r"c.parquet holds several Parquet files one after"):
                    texts(both)


def test_a_parquet_file_with_two_columns_of_the_name_is_refused(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.Table.from_arrays([arrow.array(["a"]), arrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a.parquet has columns \['text', 'text'\], not one named 'text'"
    ):
        texts(tmp_path / "a.parquet")


def test_an_invalid_row_of_a_parquet_file_gets_no_advice_for_text_files(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [b"caf\xe9"]})
    with pytest.raises(UnicodeError, match=r"row 0 is not valid UTF-8.*\. Repair it, or set"):
        texts(path)


def lines(*values: object) -> bytes:
    return b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values)


def in_another_encoding(data: bytes) -> bytes:
    """Random bytes as a text that is not binary data."""
    return b"x" + data.translate(None, bytes([*range(9), *range(14, 27), 127]))


def texts(path: Path, **reading) -> list[str]:
    documents = read_documents(FileSlice(path=path), Reading(**reading))
    return [b"".join(document.chunks).decode() for document in documents]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("txt", "inside_text")),
        ("a.TXT.GZ", ("txt.gz", "never")),
        ("a.b.jsonl", ("jsonl", "after_newline")),
        ("a.b.jsonl.zst", ("jsonl.zst", "never")),
        ("a.parquet", ("parquet", "never")),
        ("notes.md", ("txt", "inside_text")),
        ("notes.md.gz", ("txt.gz", "never")),
        ("jsonl", ("txt", "inside_text")),
    ],
)
def test_a_file_name_tells_the_format(name, expected):
    found = format_of(Path(name))
    assert (found.name, found.cut) == expected


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_txt_and_jsonl_may_be_compressed(tmp_path, suffix):
    text = "caf\u00e9 \U0001f642\r\nnext\rlast"
    path = pack(tmp_path / f"a.txt{suffix}", text.encode())
    assert texts(path) == [text.replace("\r\n", "\n").replace("\r", "\n")]
    # inside a JSON string \r\n is text like any other
    assert texts(pack(tmp_path / f"a.jsonl{suffix}", lines(text, "two"))) == [text, "two"]


def test_a_folder_of_mixed_formats_is_read_in_the_order_of_paths(tmp_path):
    pack(tmp_path / "b.jsonl.gz", lines("b1", "b2"))
    pack(tmp_path / "c.txt.zst", b"c")
    pack(tmp_path / "sub" / "e.jsonl", lines("e"))
    pack(tmp_path / "a.txt", b"a")
    pack(tmp_path / "x.md.gz", b"not searched for")
    write_parquet(tmp_path / "d.parquet", {"text": ["d1", None, "d2"]})
    corpus = FilesCorpus(tmp_path)
    seen = [(b"".join(document.chunks).decode(), document.number) for document in corpus]
    assert seen == [("a", 0), ("b1", 1), ("b2", 1), ("c", 2), ("d1", 3), ("d2", 3), ("e", 4)]
    some = FilesCorpus([f"{tmp_path}/*.jsonl*", tmp_path / "d.parquet", tmp_path / "c.txt.zst"])
    assert [path.name for path in some.files] == ["b.jsonl.gz", "d.parquet", "c.txt.zst"]


def test_a_file_name_of_any_bytes_becomes_valid_json(tmp_path):
    path = tmp_path / "caf\udce9.txt"
    path.write_text("text")
    corpus = FilesCorpus(tmp_path)
    noted = [corpus.file_stats(), [source.to_dict() for source in corpus.sources()], repr(corpus)]
    assert json.dumps(noted, ensure_ascii=False).encode().count(b"caf\\\\xe9.txt") == 3


# jsonl ---------------------------------------------------------------------------------------------


def test_every_line_of_a_jsonl_with_a_text_is_a_document(tmp_path):
    rows = [
        b'\xef\xbb\xbf{"text": "after a BOM"}\r\n',  # as Windows tools write
        b" \t\r\n\n",
        b'{"text": null}\n',
        b'{"id": 1, "text": "a\\nb"}\r\n',
        '{"text": "one \u2028 line \u2029 \x85 "}\n'.encode(),
        b'{"text": ""}\n',
        b'{"text": "\\ud83d\\ude42"}',  # a whole surrogate pair; the last line lacks its \n
    ]
    path = pack(tmp_path / "a.jsonl", b"".join(rows))
    assert texts(path) == ["after a BOM", "a\nb", "one \u2028 line \u2029 \x85 ", "", "\U0001f642"]
    assert texts(pack(tmp_path / "bom.jsonl", b"\xef\xbb\xbf")) == []


def test_the_text_column_is_chosen_by_name(tmp_path):
    path = pack(tmp_path / "a.jsonl", b'{"text": "no", "body": "yes"}\n')
    assert texts(path, text_column="body") == ["yes"]
    table = {"body.x": ["no"], "text": ["no"], "body": ["yes"]}
    assert texts(write_parquet(tmp_path / "a.parquet", table), text_column="body") == ["yes"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"content": "a", "id": 1}', r" has the keys \['content', 'id'\], not 'text': set"),
        (b'["a"]', " holds list, expected an object with the key 'text'"),
        (b'"a"', " holds str, expected an object"),
        (b'{"text": 5}', ": 'text' holds int, not text: set data.text_column"),
        (b'{"text": ["a"]}', ": 'text' holds list, not text"),
        (b'{"text": "a"', r" is not JSON \(.*\): it reads b'\{\"text\": \"a\"'"),
        (b"plain text", " is not JSON"),
        (b"[" * 100_000, " is not JSON"),
        (b'{"text": "tab\t"}', r" is not JSON \(Invalid control character"),
        ('{"text": "a"}'.encode("utf-16-le"), " is not JSON"),
        (b'{"text": "caf\xe9"}', " is not valid UTF-8: byte 0xe9 at offset 29 .*encoding_errors"),
        (b'{"text": "\\ud800"}', r" holds a lone surrogate '\\ud800': set encoding_errors"),
    ],
)  # fmt: skip
def test_an_invalid_line_is_named(tmp_path, line, message):
    path = pack(tmp_path / "a.jsonl", b'{"text": "ok"}\n\n' + line + b"\n" + lines("after"))
    with pytest.raises(ValueError, match=f"{path}: line at byte 16{message}"):
        texts(path)


def test_invalid_characters_are_replaced_as_tiktoken_replaces_them(tmp_path):
    line = b'{"text": "\\ud800a\\udc00\\ud83d\\ude42 caf\xe9"}\n'
    path = pack(tmp_path / "a.jsonl", line)
    assert texts(path, encoding_errors="replace") == ["\ufffda\ufffd\U0001f642 caf\ufffd"]
    surrogates = "\ud800a\udc00\ud83d\ude42"  # ids and not text: tiktoken's own replacement
    (text,) = texts(pack(path, lines(surrogates)), encoding_errors="replace")
    assert ENCODING.encode(text) == ENCODING.encode(surrogates)


def test_a_line_may_be_as_long_as_the_limit_and_no_longer(tmp_path, monkeypatch):
    line = lines("x" * 100)[:-1]
    monkeypatch.setattr(module, "LINE_LIMIT", len(line))
    many = pack(tmp_path / "many.jsonl", (line + b"\n") * 50)  # the file, read at once, is longer
    assert len(texts(many)) == 50
    monkeypatch.setattr(module, "CHUNK_BYTES", 7)
    long = pack(tmp_path / "long.jsonl", line + b"\n" + line + b" " * 9 + b"\n")
    message = rf"{long}: the line at byte {len(line) + 1} is longer than {len(line)} bytes: split it"
    with pytest.raises(ValueError, match=message):
        texts(long)


@given(
    values=st.lists(st.text(st.characters(codec="utf-8"), max_size=8) | st.none(), max_size=6),
    ends=st.sampled_from(["\n", "\r\n", "\n\n"]),
    chunk=st.integers(1, 40),
    escape=st.booleans(),
)
def test_a_jsonl_is_read_alike_for_any_chunk_size(tmp_path_factory, values, ends, chunk, escape):
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": v}, ensure_ascii=escape) + ends for v in values), newline=""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        assert texts(path) == [value for value in values if value is not None]


# parquet -------------------------------------------------------------------------------------------


def test_parquet_rows_are_documents(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    values = [f"row {i} \u00e9" * (i % 3) if i % 5 else None for i in range(1000)]
    expected = [value for value in values if value is not None]
    for kind in (arrow.string(), arrow.large_string()):
        column = {"text": arrow.array(values, kind)}
        path = write_parquet(tmp_path / "a.parquet", column, row_group_size=300)
        assert texts(path) == expected
    monkeypatch.setattr(module, "BATCH_BYTES", 1)  # as if rows were long: one at a time
    assert texts(path) == expected
    assert texts(write_parquet(tmp_path / "b.parquet", {"text": arrow.array([], arrow.string())})) == []


def test_parquet_text_of_every_arrow_type_is_read(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    values = [f"row {i % 7} \u00e9" if i % 5 else None for i in range(200)]
    expected = [value for value in values if value is not None]
    strings = arrow.array(values)
    columns = [strings.dictionary_encode(), strings.cast(arrow.large_string()).dictionary_encode()]
    columns += [strings.cast(kind) for kind in (arrow.binary(), arrow.large_binary())]
    columns += [arrow.array(values, arrow.string_view())]
    for column in columns:
        assert texts(write_parquet(tmp_path / "a.parquet", {"text": column})) == expected
    raw = arrow.array([b"fine", b"\xff\xd8\xff"], arrow.binary())
    with pytest.raises(UnicodeError, match=r"row 1 is not valid UTF-8: byte 0xff at offset 0"):
        texts(write_parquet(tmp_path / "a.parquet", {"text": raw}))


def test_a_parquet_without_a_valid_text_column_is_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "a.parquet", {"body": ["a"], "id": [1], "parts": [["a"]]})
    message = rf"{path} has columns \['body', 'id', 'parts'\], not one named 'text': set data"
    with pytest.raises(ValueError, match=message):
        texts(path)
    for column, kind in (("id", "int64"), ("parts", "list")):
        with pytest.raises(ValueError, match=rf"{path}: '{column}' holds {kind}.*, not text: set data"):
            texts(path, text_column=column)
    invalid = arrow.array([b"fine", b"caf\xe9"], arrow.binary()).view(arrow.string())
    path = write_parquet(tmp_path / "b.parquet", {"text": invalid})
    with pytest.raises(UnicodeError, match=rf"{path}: row 1 is not valid UTF-8: byte 0xe9 at offset 3"):
        texts(path)
    assert texts(path, encoding_errors="replace") == ["fine", "caf\ufffd"]


def test_an_invalid_or_broken_parquet_is_named(tmp_path):
    rows = [f"{i * 7919 % 100_003:x}" * 40 for i in range(2000)]
    options = {"compression": "zstd", "use_dictionary": False}
    path = write_parquet(tmp_path / "a.parquet", {"text": rows}, **options)
    whole = path.read_bytes()
    for content in (b"plain text", b"PAR1", whole[:-9], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path} is not a parquet file, or cut short: "):
            texts(path)
    middle = len(whole) // 2
    path.write_bytes(whole[: middle - 200] + bytes(400) + whole[middle + 200 :])
    with pytest.raises(OSError, match=rf"{path} is broken \(.*\): fetch it again"):
        texts(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_parquet_is_refused(tmp_path, suffix):
    path = pack(tmp_path / f"a.parquet{suffix}", b"x")
    with pytest.raises(ValueError, match=rf"{path}: parquet files are compressed inside; unpack it"):
        texts(path)


# Archives ------------------------------------------------------------------------------------------


def test_a_broken_or_short_gzip_is_named_wherever_it_is_cut(tmp_path):
    content = b"".join(b"%x " % (i * i * 7919) for i in range(60_000))  # hard to compress
    path = pack(tmp_path / "a.txt.gz", content)
    whole = path.read_bytes()
    message = rf"{path} is broken or cut short \(.*\): fetch it again, or run gzip -t or zstd -t"
    for length in (3, 5, 12, len(whole) // 3, len(whole) - 5, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(OSError, match=message):
            texts(path)
    middle = len(whole) // 2
    for bad in (whole[:middle] + b"\xff" * 99 + whole[middle + 99 :], whole + b"rubbish"):
        path.write_bytes(bad)
        with pytest.raises(OSError, match=message):
            texts(path)
    path.write_bytes(whole + whole)  # two gzip members
    assert texts(path) == [(content * 2).decode()]


def zstd_frames() -> tuple[list[bytes], bytes]:
    """Frames of every kind with a skipped frame after each one, and the bytes that they hold."""
    skipped = b"\x5a\x2a\x4d\x18\x05\0\0\0hello"
    frames, content = [], b""
    for data in (b"", b"x", b"run " * 300_000, bytes(range(1, 127)) * 9000):
        for parameters in ({}, {"checksum_flag": 1}, {"content_size_flag": 0, "compression_level": 1}):
            frames += [zstd_frame(data, **parameters), skipped]
            content += data
    return frames, content


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_zst_cut_inside_a_frame_is_broken(tmp_path, monkeypatch, place):
    monkeypatch.setattr(remote_file, "BLOCK_BYTES", 1000)
    frames, content = zstd_frames()
    large = zstd_frame(random.Random(0).randbytes(300_000).hex().encode(), checksum_flag=1)

    def read(data: bytes) -> str:
        path = tmp_path / "a.txt.zst"
        path.write_bytes(data)
        file = path
        if place == "memory":
            fsspec.filesystem("memory").pipe_file("/a.txt.zst", data)
            (file,) = expand_url("memory://a.txt.zst")
        return "".join(texts(file, encoding_errors="replace"))

    assert read(b"".join(frames)) == content.decode().replace("\r", "\n")
    assert len(read(large * 2)) > 300_000
    cuts = [len(large) * i // 9 for i in range(1, 9)]
    files = [large[:cut] for cut in cuts] + [large + large[:cut] for cut in cuts]
    files += [b"".join(frames)[:-cut] for cut in range(1, 30) if cut != len(frames[-1])]
    files += [large + b"rubbish", large[:4000] + b"\xff" * 99 + large[4099:]]
    for data in files:
        with pytest.raises(OSError, match=r"a.txt.zst is broken or cut short \(.*\): fetch it again"):
            read(data)


def test_a_zst_with_the_longest_window_is_read(tmp_path):
    data = zstd_frame(b"text " * 9, window_log=31, enable_long_distance_matching=1, content_size_flag=0)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(data)
    assert texts(path) == ["text " * 9]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_invalid_utf8_in_an_archive_is_named_by_its_offset_in_the_text(tmp_path, suffix):
    path = pack(tmp_path / f"a.txt{suffix}", b"x" * 3_000_000 + b"\xe9")
    with pytest.raises(UnicodeError, match=rf"{path} is not valid UTF-8: byte 0xe9 at offset 3000000"):
        texts(path)
    assert texts(path, encoding_errors="replace")[0].endswith("x\ufffd")


@pytest.mark.parametrize(
    ("name", "module_name", "extra"),
    [
        ("a.parquet", "pyarrow", "parquet"),
        ("a.txt.zst", "backports.zstd", "zstd"),
        ("a.jsonl.zst", "backports.zstd", "zstd"),
    ],
)
def test_a_missing_package_is_named_with_its_pip_command(monkeypatch, name, module_name, extra):
    monkeypatch.setitem(sys.modules, module_name, None)
    Path(name).write_bytes(b"x")
    with pytest.raises(ImportError) as caught:
        texts(Path(name))
    assert str(caught.value) == f"{name} needs {module_name}: pip install 'lit-gptdata[{extra}]'"


# Work units ----------------------------------------------------------------------------------------

ATOMS = ["a", " ", "\r", "\n", "\r\n", ".", "é", "語", "。", "🙂", "1", "<|endoftext|>", " the"]


def joined(corpus: FilesCorpus, unit_bytes: int, find_cut) -> list[str]:
    """The documents of all work units, their slices joined."""
    found: list[str] = []
    for file in itertools.chain.from_iterable(corpus.work_units(unit_bytes, find_cut)):
        for document in read_documents(file, corpus.reading):
            if not document.continues:
                found.append("")
            found[-1] += b"".join(document.chunks).decode()
    return found


@given(
    text=st.lists(st.sampled_from(ATOMS), min_size=1, max_size=40).map("".join), size=st.integers(1, 60)
)
def test_the_work_units_of_a_text_join_to_the_text(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("p") / "a.txt"
    data = text.encode()
    path.write_bytes(data)
    corpus = FilesCorpus(path)
    units = corpus.work_units(size, RULE.first_cut)
    assert units == corpus.work_units(size, RULE.first_cut)
    slices = [file for unit in units for file in unit]
    for file in slices[1:]:
        assert data[file.start - 1 : file.start + 1] != b"\r\n"
        data[: file.start].decode()  # not inside a character
    assert joined(corpus, size, RULE.first_cut) == texts(path)
    assert joined(corpus, size, None) == texts(path)


@given(data=st.binary(max_size=60).map(in_another_encoding), size=st.integers(1, 20))
def test_the_work_units_of_invalid_text_join_to_the_replaced_text(tmp_path_factory, data, size):
    path = tmp_path_factory.mktemp("p") / "a.txt"
    path.write_bytes(data)
    corpus = FilesCorpus(path, Reading(encoding_errors="replace"))
    assert joined(corpus, size, RULE.first_cut) == texts(path, encoding_errors="replace")


@given(
    values=st.lists(st.lists(st.sampled_from(ATOMS)).map("".join), min_size=1, max_size=8),
    size=st.integers(1, 90),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_the_work_units_of_a_jsonl_hold_its_lines(tmp_path_factory, values, size, end):
    path = tmp_path_factory.mktemp("p") / "a.jsonl"
    path.write_text(end.join(json.dumps({"text": v}, ensure_ascii=False) for v in values), newline="")
    corpus = FilesCorpus(path)
    assert joined(corpus, size, None) == values
    assert joined(corpus, size, RULE.first_cut) == values


def test_work_units_have_about_the_requested_size(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 50_000)
    (tmp_path / "b.txt").write_text("x" * 300_000)  # nowhere to cut
    for name in "cdefgh":
        (tmp_path / f"{name}.txt").write_text("short " * 2000)
    pack(tmp_path / "i.txt.gz", b"one compressed file is one unit " * 9)
    units = FilesCorpus(tmp_path).work_units(100_000, RULE.first_cut)
    sizes = [sum((p.stop or p.path.stat().st_size) - p.start for p in unit) for unit in units]
    assert max(sizes) == 300_000
    assert [size for size in sizes if size > 100_100] == [300_000]
    assert sum(sizes) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert len(units) <= 6 + 1 + 2


@pytest.mark.parametrize("tail", range(8))
def test_a_cut_across_two_reads_is_found(tmp_path, tail):
    """The only cut is after an ideographic full stop near the end of the first 64 KiB read."""
    at = 80_000 - 4 + 65_536 - tail  # the search starts 4 bytes before the middle
    data = b"x" * (at - 3) + "\u8a9e\u3002".encode() + b"x" * (160_000 - at - 3)
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    units = FilesCorpus(path).work_units(len(data) // 2 + 1, RULE.first_cut)
    assert [file.start for unit in units for file in unit] == [0, at]


# Bombs ---------------------------------------------------------------------------------------------

BOMB = """
import resource, sys
from pathlib import Path
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.tokenizer import Tokenizer
tokenizer = Tokenizer("gpt2")
tokenizer.reference.encoding
corpus = FilesCorpus(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    options = BuildOptions(engine="tiktoken", max_document_bytes=1_000_000)
    prepare_store(corpus, tokenizer, Path(sys.argv[2]), options)
except ValueError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, error)
"""


def bomb(path: Path, head: bytes, n_bytes: int) -> Path:
    """A compressed file of `head` and `n_bytes` equal bytes, written in constant memory."""
    block = b"x" * (1 << 20)
    is_gzip = path.suffix == ".gz"
    with gzip.open(path, "wb", 1) if is_gzip else zstd().ZstdFile(path, "wb", level=1) as file:
        file.write(head)
        for _ in range(n_bytes >> 20):
            file.write(block)
    return path


def build(path: Path, root: Path) -> tuple[int, str]:
    """(megabytes that a build needs in addition to its imports, its error)."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BOMB, path, root],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    megabytes, _, message = done.stdout.strip().partition(" ")
    assert not [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    return int(megabytes), message


TOO_LONG = "the document is longer than max_document_bytes=1,000,000: set on_bad_document=skip"
LONG_LINE = "the line at byte 0 is longer than 268,435,456 bytes"


@pytest.mark.parametrize(
    ("name", "head", "n_bytes", "problem", "limit"),
    [
        ("a.txt", b"", 20 << 20, TOO_LONG, 12),
        pytest.param("a.txt", b"", 1 << 30, TOO_LONG, 12, marks=pytest.mark.heavy),
        pytest.param("a.jsonl", b'{"text": "', 1 << 30, LONG_LINE, 400, marks=pytest.mark.heavy),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_refused_in_bounded_memory(tmp_path, name, suffix, head, n_bytes, problem, limit):
    path = bomb(tmp_path / f"{name}{suffix}", head, n_bytes)
    megabytes, message = build(path, tmp_path / "tokens")
    assert message.startswith(f"{path}: {problem}")
    assert megabytes < limit


@pytest.mark.heavy
def test_a_parquet_that_repeats_a_long_text_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x" * 1_000_001] * 1000})
    assert path.stat().st_size < 100_000
    megabytes, message = build(path, tmp_path / "tokens")
    assert message.startswith(f"{path}: row 0: the document is longer than max_document_bytes=1,000,000")
    assert megabytes < 350  # pyarrow and a batch of rows


def test_a_long_line_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LINE_LIMIT", 4 << 20)
    path = bomb(tmp_path / "a.jsonl.gz", b'{"text": "', 20 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="the line at byte 0 is longer than 4,194,304 bytes"):
        texts(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10
