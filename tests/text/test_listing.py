"""A search through a folder loses no text and adds none; names mean what they seem to mean."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lit_gptdata.text.corpus import open_corpus
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import Reading
from lit_gptdata.text.listing import expand_url
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.source import LocalBuild
from lit_gptdata.tokens.tokenizer import Tokenizer


def write(*names: str | Path) -> None:
    """Write files whose text is their path."""
    for name in map(Path, names):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(f"{name}\n")


def found(*names: str | Path) -> list[str]:
    corpus = FilesCorpus(names)
    return [os.path.relpath(file) for file in corpus.files]


# Hidden names and links ----------------------------------------------------------------------------


def test_a_search_leaves_out_hidden_names_that_can_be_named_outright():
    hidden = ["c/.a.txt", "c/.ipynb_checkpoints/a.txt", "c/__MACOSX/._a.txt", "c/__MACOSX/a.txt"]
    write("c/a.txt", "c/sub/b.txt", *hidden)
    for name in ("c", "c/**/*.txt", "c/**"):
        assert found(name) == ["c/a.txt", "c/sub/b.txt"]
    named = found("c/.a.txt", "c/.ipynb_checkpoints", "c/__MACOSX/*.txt")
    assert named == [hidden[0], hidden[1], hidden[3]]
    assert found("c/.i*/*.txt") == [hidden[1]]
    memory = fsspec.filesystem("memory")
    for name in ("a.txt", "sub/b.txt", ".x/c.txt", "__MACOSX/d.txt"):
        memory.pipe_file(f"/hidden/{name}", b"text")
    assert [file.name for file in expand_url("memory://hidden")] == ["a.txt", "b.txt"]
    assert [file.name for file in expand_url("memory://hidden/.x")] == ["c.txt"]
    memory.rm("/hidden", recursive=True)


@pytest.mark.parametrize("name", ["c", "c/**/*.txt", "c/**"])
def test_links_to_folders_are_searched_once(name):
    write("c/a.txt", "c/z/b.txt", "other/d.txt", "other/deep/e.txt")
    Path("c/linked").symlink_to(Path("other").resolve())
    Path("c/z/loop").symlink_to("..")
    Path("c/again").symlink_to("linked")
    Path("c/diamond").symlink_to("z")
    assert found(name) == ["c/a.txt", "c/again/d.txt", "c/again/deep/e.txt", "c/z/b.txt"]


def test_a_link_to_a_folder_around_the_searched_one_is_named(caplog):
    write("c/a.txt", "other.txt")
    Path("c/up").symlink_to(Path.cwd())
    assert found("c") == ["c/a.txt"]
    assert re.search("/c/up leads to a folder around .*/c, which is not searched", caplog.text)


def test_a_link_to_a_file_of_the_same_search_is_named(caplog):
    write("c/a.txt")
    Path("c/b.txt").symlink_to("a.txt")
    assert found("c") == ["c/a.txt"]
    assert re.search("/c/b.txt is the same file as .*/c/a.txt, which is read once", caplog.text)
    os.link("c/a.txt", "c/c.txt")  # a hard link is like a copy
    Path("c/b.txt").unlink()
    assert found("c") == ["c/a.txt", "c/c.txt"]


@pytest.mark.parametrize("target", ["gone", "b.txt"])
def test_a_broken_link_is_an_error_if_it_is_a_text_and_else_logged(target, caplog):
    write("c/a.txt")
    Path("c/b.txt").symlink_to(target)
    for name in ("c", "c/*.txt", "c/**/b*", "c/b.txt"):
        with pytest.raises(FileNotFoundError, match=f"/c/b.txt is a broken link to {target}: repair or"):
            FilesCorpus(name)
    Path("c/b.txt").rename("c/folder")
    assert found("c") == ["c/a.txt"]
    assert f"/c/folder is a broken link to {target}, which is left out" in caplog.text


def test_a_folder_that_cannot_be_searched_is_named(monkeypatch):
    write("c/a.txt", "c/private/b.txt")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("private"):  # root may read every folder
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for name in ("c", "c/**/*.txt", "c/*/b.txt"):
        with pytest.raises(PermissionError, match=r"Permission denied: .*/c/private"):
            FilesCorpus(name)


def test_a_pipe_or_socket_is_refused_and_does_not_hang():
    write("c/a.txt")
    os.mkfifo("c/b.txt")
    for name in ("c", "c/*", "c/b.txt", "/dev/null"):
        with pytest.raises(ValueError, match="is a pipe, socket or device: write its text to a file"):
            FilesCorpus(name)
    Path("c/b.txt").rename("c/b")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("c/s")
        assert found("c") == ["c/a.txt"]


@pytest.mark.parametrize(
    "names",
    [
        ["c/a.txt", "c/a.txt"],
        ["c", Path("c/a.txt")],
        ["c/*.txt", "c/a*"],
        ["c/a.txt", "link"],
        ["c", "./c/../c/a.txt"],
        ["memory://twice/a.txt", "memory://twice"],
    ],
)
def test_a_file_that_is_named_twice_is_refused(names):
    write("c/a.txt", "c/b.txt")
    Path("link").symlink_to("c/a.txt")
    fsspec.filesystem("memory").pipe_file("/twice/a.txt", b"text")
    message = rf"(a.txt|link) is in the corpus twice, as '{re.escape(str(names[0]))}' and .* To repeat"
    with pytest.raises(ValueError, match=message):
        FilesCorpus(names)


def test_a_file_that_is_named_in_two_spellings_is_refused():
    fsspec.filesystem("memory").pipe_file("/twice/a.txt", b"text")
    with pytest.raises(ValueError, match="is in the corpus twice"):
        FilesCorpus(["memory://twice/a.txt", "memory:///twice/a.txt"])


def test_a_search_leaves_out_what_runs_wrote():
    run = ["config.yaml", "result.json", "summary.txt", "train.log", "tokenizer.json"]
    run += ["wandb/run-1/files/requirements.txt"]
    write("c/a.txt", "c/book/config.yaml", "c/book/b.txt", *(f"c/outputs/1/{name}" for name in run))
    for name in ("c", "c/**/*.txt"):
        assert found(name) == ["c/a.txt", "c/book/b.txt"]
    assert found("c/outputs/1/summary.txt") == ["c/outputs/1/summary.txt"]
    write("c/config.yaml", "c/result.json", "c/summary.txt")  # a run with output_dir=c
    assert found("c") == found("c/**/*.txt") == ["c/a.txt", "c/book/b.txt"]


def test_a_search_names_the_files_that_it_leaves_out(caplog):
    write("c/a.txt", "c/README.md", "c/b.md", "c/sub/c.md", "c/e.txt.xz", "c/.hidden.md")
    assert found("c") == found("c/") == ["c/a.txt"]
    assert "c also has files that are not read. It holds 2 *.md, 1 *.xz. To read them" in caplog.text
    assert "a glob such as 'c/**/*.md'" in caplog.text


def test_a_glob_leaves_out_a_folder_that_is_not_searched(caplog):
    write("c/a.txt", "c/data/tokens/b.bin", "c/data/c.txt", "c/sub/d.txt")
    not_searched = frozenset([os.path.realpath("c/data")])
    for glob in ("c/**", "c/**/*", "c/*/"):
        paths = FilesCorpus(glob, not_searched=not_searched).files
        assert [str(path.relative_to(Path.cwd())) for path in paths][-1:] == ["c/sub/d.txt"]
        assert not any("data" in path.parts for path in paths)
    assert not caplog.text


def test_a_glob_says_nothing_of_files_that_it_does_not_match(caplog):
    write("n/a.txt", "n/b.md", "n/sub/c.txt", "n/sub/d.py")
    assert found("n/**/*.txt") == ["n/a.txt", "n/sub/c.txt"]
    assert found("n/*/*.txt") == ["n/sub/c.txt"]
    memory = fsspec.filesystem("memory")
    for name in ("a.txt", "b.md", "sub/c.txt"):
        memory.pipe_file(f"/unmatched/{name}", b"text")
    assert len(FilesCorpus("memory://unmatched/**/*.txt").files) == 2
    assert not caplog.text
    assert found("n/*/") == ["n/sub/c.txt"]
    assert "n/*/ also has files that are not read. It holds 1 *.py. To read them" in caplog.text


def test_a_glob_that_matches_folders_says_that_it_does_not_search_them(caplog):
    write("g/a.txt", "g/sub/b.txt", "g/sub/more/c.txt")
    assert found("g/*") == ["g/a.txt"]
    assert "/g/sub is a folder, which is not searched: ** searches subfolders" in caplog.text
    assert found("g/*/") == found("g/s*/") == ["g/sub/b.txt", "g/sub/more/c.txt"]
    memory = fsspec.filesystem("memory")
    for name in ("a.txt", "sub/b.txt"):
        memory.pipe_file(f"/folders/{name}", b"text")
    caplog.clear()
    assert [file.name for file in expand_url("memory://folders/*")] == ["a.txt"]
    assert "/folders/sub is a folder, which is not searched" in caplog.text
    assert [file.name for file in expand_url("memory://folders/*/")] == ["b.txt"]
    memory.rm("/folders", recursive=True)


# Names ---------------------------------------------------------------------------------------------


def test_brackets_in_a_name_are_literal_if_it_exists():
    write("[2020] a?b/a[1].txt", "[2020] a?b/sub/b.txt", "2/c.txt")
    assert found("[2020] a?b") == ["[2020] a?b/a[1].txt", "[2020] a?b/sub/b.txt"]
    assert found("[2020] a?b/*.txt") == ["[2020] a?b/a[1].txt"]
    assert found("[2020] a?b/a[1].txt") == ["[2020] a?b/a[1].txt"]
    assert found("[2020]/*.txt") == ["2/c.txt"]
    assert found(Path("[2020] a?b/**/*.txt").resolve().as_uri()) == found("[2020] a?b")
    assert found(f"file://localhost{Path.cwd()}/%5B2020%5D%20a%3Fb/sub") == ["[2020] a?b/sub/b.txt"]
    os.chdir("[2020] a?b")
    assert found("*.txt", "**/b.txt") == ["a[1].txt", "sub/b.txt"]


def test_a_leading_tilde_is_home_or_part_of_the_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "~$x.txt", "~notes.txt", "café/é.txt")
    assert FilesCorpus("~/a.txt").files == FilesCorpus("~/*.txt").files == [tmp_path / "a.txt"]
    assert found("~$x.txt", "~notes.txt", "café") == ["~$x.txt", "~notes.txt", "café/é.txt"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("bokos/a.txt", r"The closest names in /.*: \['books'\]"),
        ("books/frank", r"The closest names in /.*/books: \['frank.txt'\]"),
        ("books/frank.txt/a.txt", r"The closest names in /.*/books: \['frank.txt'\]"),
        (Path("https://a.org/b.txt"), ".* a URL as a string"),
    ],
)
def test_a_wrong_name_gets_similar_names(name, advice):
    write("books/frank.txt")
    message = rf"no such file or folder: '{name}'\. {advice}"
    with pytest.raises(FileNotFoundError, match=message):
        FilesCorpus(name)


def test_a_folder_without_texts_shows_the_glob_to_type():
    write("code/a.py", "code/sub/b.py", "code/c.csv.gz", "code/.git/d.md", "code/.e.md")
    with pytest.raises(
        FileNotFoundError, match=r"It holds 2 \*\.py, 1 \*\.csv\.gz\. .* 'code/\*\*/\*\.py'"
    ):
        FilesCorpus("code/")
    assert found("code/**/*.py") == ["code/a.py", "code/sub/b.py"]
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/code/a.py", b"x")
    with pytest.raises(FileNotFoundError, match=r"such as 'memory://code/\*\*/\*\.py'"):
        FilesCorpus("memory://code/")


LINE = "It was a dark night in November, and the wind went round the house? [Yes.] "


@pytest.mark.parametrize(
    "text",
    [
        LINE,
        LINE * 500,
        "Two\nlines",
        "a\0b.txt",
        "語" * 100,
        "See https://a.org/x\nfor more",
        "a/" * 3000,
    ],
)
def test_the_text_itself_is_not_its_path(text):
    for corpus in (text, [text]):
        with pytest.raises(FileNotFoundError, match="For a text itself, use create_data") as caught:
            open_corpus(corpus)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("corpus", [[["a.txt"], ("b.txt",)], np.array(["a.txt", "b.txt"])])
def test_any_sequence_of_names_is_a_list(corpus):
    write("a.txt", "b.txt")
    assert [file.name for file in open_corpus(corpus).files] == ["a.txt", "b.txt"]
    assert local_build(corpus).name == ["a.txt", "b.txt"]
    assert {type(name) for name in local_build(corpus).name} == {str}


def test_a_name_that_the_package_knows_is_a_string():
    write("sample", "frankenstein")
    assert open_corpus(["sample"]) != open_corpus("./sample")
    for name in (Path("sample"), "./sample", Path("frankenstein")):
        assert len(open_corpus(name).files) == 1
    with pytest.raises(ValueError, match=r"'sample' cannot be part of a list.*\./sample"):
        open_corpus(["sample", "./frankenstein"])


# Relative names ------------------------------------------------------------------------------------


def local_build(corpus) -> LocalBuild:
    return LocalBuild(corpus, Tokenizer("gpt2"), Path.cwd() / "data", Reading(), False, BuildOptions())


@pytest.mark.parametrize("corpus", ["c/a.txt", "c", "c/*.txt", ["c/a.txt"], Path("c")])
def test_a_relative_corpus_is_the_one_at_construction(corpus, monkeypatch):
    write("[x]/c/a.txt", "[x]/elsewhere/b.txt")
    monkeypatch.chdir("[x]")
    source, direct = local_build(corpus), FilesCorpus(corpus)
    source.prepare()
    monkeypatch.chdir("elsewhere")
    assert source.find().manifest.sources[0].path.endswith("/[x]/c/a.txt")
    assert [b"".join(d.chunks) for d in direct] == [b"[x]/c/a.txt\n"]
