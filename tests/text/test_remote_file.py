"""Text on an S3 server on loopback gives the same tokens as on disk, or a clear error."""

from __future__ import annotations

import collections
import gzip
import io
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gptdata import GPTDataModule, _fsspec
from lit_gptdata.text import remote_file as remote
from lit_gptdata.text.corpus import open_corpus
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import FileSlice, Reading, read_documents
from lit_gptdata.text.listing import expand_url
from lit_gptdata.text.remote_file import RemoteFile
from lit_gptdata.tokens.build.local import find_store, prepare_store
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.http_server import FileServer
from tests.text.test_formats import lines, pack, write_parquet
from tests.text.test_formats import texts as read

pytest.importorskip("s3fs")
pytest.importorskip("moto")
from tests.s3_server import Fault, S3Server, forget_clients

ROOT = Path(__file__).parents[2]
GPT2 = Tokenizer("gpt2")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs,", "and", "it's", "42", "café\n"]


@pytest.fixture
def _new_client():
    """For a test that sets other environment variables."""
    forget_clients()
    yield
    forget_clients()


@pytest.fixture
def small_units(monkeypatch):
    """Work units and shards of 100 kB."""
    monkeypatch.setattr("lit_gptdata.tokens.build.plan.SHARD_BYTES", 100_000)


@pytest.fixture
def folder(request):
    """A folder name that only this test uses."""
    return request.node.name.translate(str.maketrans("", "", "[]*/. "))


def prose(n_bytes: int, seed: int = 0) -> str:
    """Words in an order that rarely repeats."""
    text, state = [], seed + 1
    for _ in range(n_bytes // 4):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        text.append(WORDS[(state >> 8) % len(WORDS)])
    return " ".join(text)[:n_bytes]


def upload(s3: S3Server, source: Path, folder: str) -> str:
    """Upload every file of a folder on disk; returns the URL of the folder."""
    for path in source.rglob("*"):
        if path.is_file():
            s3.put(f"{folder}/{path.relative_to(source).as_posix()}", path.read_bytes())
    return f"{s3.url}/{folder}/"


def bytes_of(store) -> list[bytes]:
    return [(store.path / file.name).read_bytes() for file in store.files]


def texts(corpus) -> list[bytes]:
    return [b"".join(document.chunks) for document in corpus]


def one_of_every_format(folder: Path) -> Path:
    pack(folder / "a.txt", prose(3000, 1).encode())
    pack(folder / "b.jsonl.gz", lines(prose(500, 2), "caf\u00e9", prose(5000, 3)))
    pack(folder / "c.txt.zst", prose(900_000, 4).encode())
    pack(folder / "sub" / "e.jsonl", lines("one", "", prose(400, 5)))
    pack(folder / "sub.txt", b"sorts after sub/, as paths do")
    pack(folder / "f.txt.gz", prose(2000, 6).encode())
    pack(folder / "g.jsonl.zst", lines(*(prose(300, seed) for seed in range(50))))
    pack(folder / "notes.md", b"not searched for")
    table = {"id": list(range(900)), "text": [prose(i, i) for i in range(900)]}
    write_parquet(folder / "d.parquet", table, row_group_size=100)
    return folder


# The same tokens -----------------------------------------------------------------------------------


def test_every_format_gives_the_same_store_as_on_disk(s3, tmp_path, folder):
    texts = one_of_every_format(tmp_path / "texts")
    url = upload(s3, texts, folder)
    local = prepare_store(FilesCorpus(texts), GPT2, tmp_path / "local")
    from_url = prepare_store(open_corpus(url), GPT2, tmp_path / "url")
    assert from_url.fingerprint == local.fingerprint
    assert bytes_of(from_url) == bytes_of(local)
    names = [source.path.removeprefix(url) for source in from_url.manifest.sources]
    assert names == [str(path.relative_to(texts)) for path in FilesCorpus(texts).files]
    assert FilesCorpus(url).fingerprint == FilesCorpus(texts).fingerprint
    # the store of the same text exists, so nothing is tokenized again
    assert prepare_store(open_corpus(url), GPT2, tmp_path / "local").path == local.path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_large_object_is_read_in_work_units(s3, tmp_path, folder, small_units, workers):
    texts = tmp_path / "texts"
    pack(texts / "a.txt", prose(800_000).encode())
    pack(texts / "b.jsonl", lines(*(prose(4000, seed) for seed in range(120))))
    url = upload(s3, texts, folder)
    local = prepare_store(FilesCorpus(texts), GPT2, tmp_path / "local")
    from_url = prepare_store(open_corpus(url), GPT2, tmp_path / "url", BuildOptions(workers=workers))
    assert len(from_url.shards) > 10
    assert bytes_of(from_url) == bytes_of(local)
    assert from_url.fingerprint == local.fingerprint


def test_a_slice_fetches_only_its_own_bytes(s3, tmp_path, folder, monkeypatch):
    url = s3.put(f"{folder}/a.jsonl", lines(*(prose(4000, seed) for seed in range(120))))
    corpus = FilesCorpus(url)
    part = corpus.work_units(100_000, None)[2][0]
    assert part.start > 0
    assert len(pickle.dumps(part)) < 500
    monkeypatch.setattr(remote, "BLOCK_BYTES", 70_000)
    s3.requests.clear()
    documents = [b"".join(d.chunks) for d in read_documents(pickle.loads(pickle.dumps(part)), Reading())]
    assert len(documents) >= 20
    spans = [tuple(map(int, seen.split("=")[1].split("-"))) for seen in s3.asked("bytes=")]
    assert [spans[0][0], spans[-1][1] + 1] == [part.start, part.stop]
    assert all(one[1] + 1 == two[0] for one, two in itertools.pairwise(spans))
    lengths = [last + 1 - first for first, last in spans]
    assert lengths[0] == 70_000


TREE = ["a.txt", "b.jsonl", "a/c.txt", "a/.hidden.txt", "a/b/d.txt", ".h/e.txt", "x1.txt", "x2.txt.gz",
        "x[1].txt", "n.md", "a/n.md", "z/y/w.txt", "zz.txt", "a.b/f.txt"]  # fmt: skip


@pytest.fixture(scope="module")
def trees(s3_running, tmp_path_factory):
    """The same files on disk, in a bucket, and in a file system that is walked folder by folder."""
    disk = tmp_path_factory.mktemp("tree")
    for name in TREE:
        pack(disk / name, name.encode())
    upload(s3_running, disk, "tree")
    memory = fsspec.filesystem("memory")
    for name in TREE:
        memory.pipe_file(f"/tree/{name}", (disk / name).read_bytes())
    yield {"disk": str(disk), "s3": f"{s3_running.url}/tree", "memory": "memory://tree"}
    memory.rm("/tree", recursive=True)


@pytest.mark.parametrize("scheme", ["s3", "memory"])
@pytest.mark.parametrize(
    "pattern",
    ["", "/", "/*.txt", "/**/*.txt", "/*/*.txt", "/a/**", "/**/b/*", "/*/.*", "/x?.txt*", "/x[12]*",
     "/x[1].txt", "/a*/*", "/a/n.md", "/a", "/*/b/d.txt", "/.h/*"],
)  # fmt: skip
def test_a_url_names_the_same_files_as_a_path(s3, trees, scheme, pattern):
    local = FilesCorpus(trees["disk"] + pattern).files
    from_url = FilesCorpus(trees[scheme] + pattern).files
    root = trees[scheme]
    assert [str(file).removeprefix(root) for file in from_url] == [
        str(path).removeprefix(trees["disk"]) for path in local
    ]
    assert [file.size for file in from_url] == [path.stat().st_size for path in local]


@pytest.mark.usefixtures("s3")
def test_a_list_may_mix_urls_and_paths(trees):
    disk = Path(trees["disk"])
    s3, memory = trees["s3"], trees["memory"]
    note = (disk / "n.md").as_uri()
    corpus = open_corpus(
        [
            f"{s3}/zz.txt",
            disk / "a.txt",
            f"{memory}/*.jsonl",
            note,
            f"{s3}/[ax]*.txt",
            f"file://{disk}/a",
        ]
    )
    names = " ".join(path.name for path in corpus.files)
    assert names == "zz.txt a.txt b.jsonl n.md a.txt x1.txt x[1].txt d.txt c.txt"
    assert [type(path) for path in corpus.files[:4]] == [RemoteFile, type(disk), RemoteFile, type(disk)]
    some = [path for path in corpus.files if path.name != "b.jsonl"]  # which holds no JSON
    documents = [d for path in some for d in read_documents(FileSlice(path=path), Reading())]
    assert b"".join(documents[0].chunks) == b"zz.txt"
    assert len(corpus.file_stats()) == len(corpus.names) == len(set(corpus.names)) == 9


def test_a_folder_is_listed_with_one_request_for_any_number_of_files(s3, tmp_path, folder):
    for i in range(30):
        s3.put(f"{folder}/{i:02d}.txt", b"text")
    s3.requests.clear()
    corpus = open_corpus(f"{s3.url}/{folder}/")
    assert len(s3.requests) == 1
    assert len({stamp[2] for stamp in corpus.file_stats()}) == 1  # the same contents, the same ETag
    assert len(s3.requests) == 2
    store = prepare_store(corpus, GPT2, tmp_path)
    s3.requests.clear()
    assert find_store(open_corpus(f"{s3.url}/{folder}/"), GPT2, tmp_path).path == store.path
    assert len(s3.requests) == 2


def test_the_data_module_reads_a_url(s3, tmp_path, folder):
    url = s3.put(f"{folder}/a.txt", prose(20_000).encode())
    data = GPTDataModule(url, max_length=16, stride=16, data_dir=tmp_path)
    with pytest.raises(RuntimeError, match=rf"'{url}' is not tokenized yet"):
        data.setup()
    data.prepare_data()
    data.setup()
    assert len(data.train_windows) > 50
    assert str(data.store.place(0)) == f"{url}, document 1, byte 0"
    assert not (tmp_path / "downloads").exists()


# Changes -------------------------------------------------------------------------------------------


def test_a_changed_object_is_a_new_store(s3, tmp_path, folder):
    url = s3.put(f"{folder}/a.txt", b"one text")
    corpus = open_corpus(url)
    first = prepare_store(corpus, GPT2, tmp_path)
    s3.put(f"{folder}/a.txt", b"two text")  # as long
    assert find_store(corpus, GPT2, tmp_path) is None
    second = prepare_store(open_corpus(url), GPT2, tmp_path)
    assert second.fingerprint != first.fingerprint
    s3.put(f"{folder}/a.txt", b"a longer text than it was when the corpus was opened")
    assert prepare_store(corpus, GPT2, tmp_path).n_bytes == 52
    s3.put(f"{folder}/a.txt", b"one text")
    assert prepare_store(open_corpus(url), GPT2, tmp_path).path == first.path


@pytest.mark.parametrize("new", [b"a longer text than it was", b"as long as it"])
def test_an_object_that_changes_while_it_is_read_is_refused(s3, tmp_path, folder, new):
    url = s3.put(f"{folder}/a.txt", b"as long, at i")
    corpus = open_corpus(url)

    def change(seen: str) -> None:
        if "bytes=" in seen:
            s3.heal()
            s3.put(f"{folder}/a.txt", new)

    s3.fault = change
    with pytest.raises(RuntimeError, match=r"changed while it was read: run again"):
        prepare_store(corpus, GPT2, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    store = prepare_store(open_corpus(url), GPT2, tmp_path)
    assert store.n_bytes == len(new)


def test_an_object_that_shrinks_while_it_is_read_is_refused(s3, folder):
    url = s3.put(f"{folder}/a.txt", b"x" * 1000)
    (file,) = expand_url(url)
    s3.put(f"{folder}/a.txt", b"x" * 10)
    with pytest.raises(OSError, match=rf"{url} cannot be read: .*got 10 bytes .*, or the file changed"):
        read(file)


def test_an_object_that_disappears_is_named(s3, tmp_path, folder):
    url = s3.put(f"{folder}/a.txt", b"text")
    s3.put(f"{folder}/b.txt", b"text")
    corpus = open_corpus(f"{s3.url}/{folder}/")
    s3.delete(f"{folder}/a.txt")
    for look in (corpus.file_stats, corpus.sources, lambda: texts(corpus)):
        with pytest.raises(FileNotFoundError, match=rf"{url} is gone: it was there when the corpus"):
            look()
    with pytest.raises(FileNotFoundError, match=rf"{url} does not exist .*: check the address"):
        open_corpus(url)


# Transient failures --------------------------------------------------------------------------------


def test_cut_connections_and_server_errors_are_retried(s3, tmp_path, folder, caplog):
    texts = one_of_every_format(tmp_path / "texts")
    url = upload(s3, texts, folder)
    local = prepare_store(FilesCorpus(texts), GPT2, tmp_path / "local")
    corpus = open_corpus(url)
    failures = itertools.cycle([Fault(status=500), Fault(cut=17), Fault(status=503), Fault(cut=0)])
    often = collections.Counter()

    def fail_twice(seen: str) -> Fault | None:
        often[seen] += 1
        return next(failures) if often[seen] % 3 else None

    s3.fault = fail_twice
    from_url = prepare_store(corpus, GPT2, tmp_path / "url")
    assert from_url.fingerprint == local.fingerprint
    assert bytes_of(from_url) == bytes_of(local)
    of_archive = [message for message in caplog.messages if f"{url}c.txt.zst: " in message]
    assert any("(attempt 2 of 5), next" in message for message in of_archive)


def test_a_listing_is_complete_or_an_error(s3, folder):
    """fsspec's own glob skips a folder that cannot be listed."""
    for name in ("a/x.txt", "b/x.txt"):
        s3.put(f"{folder}/{name}", b"text")

    def fail(seen: str) -> Fault | None:
        return next(failures, None) if f"{folder}%2Fb%2F&" in seen else None

    failures = iter([Fault(status=500), Fault(status=503)])
    s3.fault = fail
    assert len(expand_url(f"{s3.url}/{folder}/*/*.txt")) == 2
    assert next(failures, None) is None
    s3.fault = lambda seen: Fault(status=500)
    for name in ("*/*.txt", "**/*.txt", "", "*.txt", "a/x.txt"):
        with pytest.raises(OSError, match=rf"{folder}.* cannot be read: .*\(attempt 5 of 5\)\. Check"):
            expand_url(f"{s3.url}/{folder}/{name}")


def test_a_file_system_that_is_walked_is_listed_completely_or_not(tmp_path, monkeypatch):
    for name in ("a/x.txt", "b/x.txt"):
        pack(tmp_path / name, b"text")
    walked = type(fsspec.filesystem("local"))
    ls, broken = walked.ls, {str(tmp_path / "b")}

    def fail(self, path, *args, **kwargs):
        if path in broken:
            raise OSError("broken")
        return ls(self, path, *args, **kwargs)

    monkeypatch.setattr(_fsspec, "BACKOFF_S", 0.001)
    monkeypatch.setattr(walked, "ls", fail)
    for name in ("", "/*/*.txt", "/**/*.txt"):
        with pytest.raises(OSError, match=r"local://.* cannot be read: OSError: broken"):
            expand_url(f"local://{tmp_path}{name}")
    broken.clear()
    assert [file.name for file in expand_url(f"local://{tmp_path}")] == ["x.txt", "x.txt"]


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(status=503), Fault(cut=4)])
def test_a_server_that_always_fails_or_cuts_the_body_is_given_up(s3, tmp_path, folder, fault):
    url = s3.put(f"{folder}/a.txt", b"some text")
    corpus = open_corpus(url)
    s3.fault = lambda seen: fault
    with pytest.raises(OSError, match=rf"{url} cannot be read: .*\(attempt 5 of 5\)\. Check the"):
        prepare_store(corpus, GPT2, tmp_path)
    s3.heal()
    assert prepare_store(corpus, GPT2, tmp_path).n_bytes == 9


@pytest.mark.usefixtures("_new_client")
def test_an_unreachable_server_is_named(s3, monkeypatch):
    monkeypatch.setattr(_fsspec, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"s3://nobody/x cannot be read: .*\(attempt 1 of 1\)\. Check the"):
        open_corpus("s3://nobody/x")


# Credentials ---------------------------------------------------------------------------------------


def test_wrong_credentials_name_the_places_to_look(s3, folder):
    url = s3.put(f"{folder}/a.txt", b"some text")
    corpus = open_corpus(url)
    for look in (corpus.file_stats, lambda: texts(corpus), lambda: open_corpus(f"{s3.url}/{folder}/")):
        s3.fault = lambda seen: Fault(status=403)
        with pytest.raises(PermissionError) as caught:
            look()
        assert str(caught.value).startswith(f"{s3.url}/{folder}/")
        assert "may not be read" in str(caught.value)
        assert "looked for in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(caught.value)
        s3.heal()
        assert open_corpus(url).files == corpus.files  # nothing of the failure is kept


@pytest.mark.parametrize("url", ["/data/x.bin", "file:///data/x.bin"])
def test_a_folder_of_this_machine_has_permissions_instead_of_credentials(url):
    def refuse():
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError, match=r"may not be written .*: give another folder, or change"):
        _fsspec.retry(url, refuse, done="written")


def test_a_file_in_place_of_a_folder_is_not_tried_again(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    monkeypatch.setattr(_fsspec.time, "sleep", lambda _: pytest.fail("tried again"))
    with pytest.raises(OSError, match="cannot be read: NotADirectoryError"):
        _fsspec.retry(str(tmp_path / "a/b"), (tmp_path / "a/b").read_bytes)


@pytest.mark.usefixtures("_new_client")
def test_missing_credentials_name_the_places_to_look(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(PermissionError, match=r"NoCredentialsError: .* FSSPEC_S3_ANON=true reads a pub"):
        open_corpus(f"{s3.url}/a.txt")


@pytest.mark.parametrize("url", ["s3://KEY:HIDDEN@bucket/a.txt", "gs://HIDDEN@bucket/a.txt"])
def test_credentials_in_a_bucket_url_are_refused_and_redacted(url):
    with pytest.raises(ValueError, match=r"//\*\*\*@bucket/a.txt: give no credentials in a") as caught:
        open_corpus(url)
    assert "HIDDEN" not in str(caught.value)


def test_ctrl_c_between_two_attempts_prints_no_secrets(monkeypatch):
    def fail():
        raise OSError("url is http://host/a?token=SECRET")

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(_fsspec.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt) as info:
        _fsspec.retry("http://host/a?token=SECRET", fail)
    assert info.value.__context__ is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pw@host/a.txt", "https://***@host/a.txt"),
        ("at https://host/a.txt?token, then", "at https://host/a.txt?… then"),
        ("url: /a.txt?X-Amz-Signature=1 ('x')", "url: /a.txt?… ('x')"),
        ("s3://bucket/part-?.txt", "s3://bucket/part-?.txt"),
        ("s3://bucket/a.txt?versionId=1", "s3://bucket/a.txt?…"),
        ("['sftp://u:p@host/a?.txt', 'ftp://u@h/b']", "['sftp://***@host/a?.txt', 'ftp://***@h/b']"),
        ("hf://datasets/a/b@main/c", "hf://datasets/a/b@main/c"),
    ],
)
def test_secrets_are_redacted(text, expected):
    assert _fsspec.redact(text) == expected


def test_a_signed_address_is_streamed_and_its_secrets_are_not_stored(s3, tmp_path, folder, caplog):
    pytest.importorskip("aiohttp")
    s3.put(f"{folder}/a.txt", prose(5000).encode())
    host = s3.endpoint.removeprefix("http://")
    url = f"http://user:PASSWORD@{host}/{s3.bucket}/{folder}/a.txt?X-Signature=SECRET"
    data = GPTDataModule(url, max_length=16, stride=16, data_dir=tmp_path, stream=True)
    failures = iter([Fault(status=500)])
    s3.fault = lambda seen: next(failures, None) if "bytes=" in seen else None
    data.prepare_data()
    data.setup()
    redacted = f"http://***@{host}/{s3.bucket}/{folder}/a.txt?…"
    assert data.store.manifest.sources[0].path == redacted
    assert data.store.n_bytes == len(prose(5000).encode())
    assert str(data.store.place(7)).startswith(f"{redacted}, document 1")
    assert not (tmp_path / "downloads").exists()
    s3.fault = lambda seen: Fault(status=404)
    with pytest.raises(FileNotFoundError) as gone:
        data.prepare_data()
    seen = [repr(data), caplog.text, str(gone.value)]
    seen += [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert "next in" in caplog.text
    assert not [text for text in seen if "SECRET" in text or "PASSWORD" in text]


def test_http_is_downloaded_once_unless_it_is_streamed(s3, tmp_path, folder):
    s3.put(f"{folder}/a.txt", b"some text")
    url = f"{s3.endpoint}/{s3.bucket}/{folder}/a.txt"
    (kept,) = open_corpus(url, downloads=tmp_path).files
    assert kept.parent == tmp_path
    assert kept.read_bytes() == b"some text"
    (streamed,) = open_corpus(url, downloads=tmp_path, stream=True).files
    assert isinstance(streamed, RemoteFile)
    assert read(streamed) == ["some text"]


def test_without_a_version_a_file_is_identified_by_its_size(tmp_path):
    pytest.importorskip("aiohttp")
    with FileServer(b"some text", etag=None) as server:
        urls = [server.address(f"/a.txt?key=SECRET{i}") for i in range(2)]
        one, two = (open_corpus(url, stream=True) for url in urls)
        assert one.names != two.names
        store = prepare_store(one, GPT2, tmp_path)
        assert find_store(one, GPT2, tmp_path).path == store.path
        assert find_store(two, GPT2, tmp_path) is None
        server.body = b"another text"
        assert find_store(one, GPT2, tmp_path) is None
    kept = [path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    assert not [text for text in kept if "SECRET" in text]


def test_a_file_without_a_version_is_read_again_before_its_tokens_are_reused(tmp_path):
    pytest.importorskip("aiohttp")
    with FileServer(b"The first text of a book.", etag=None) as server:
        corpus = open_corpus(server.url, stream=True)
        store = prepare_store(corpus, GPT2, tmp_path)
        assert prepare_store(corpus, GPT2, tmp_path).fingerprint == store.fingerprint
        server.body = b"Other text of equal size."
        changed = prepare_store(open_corpus(server.url, stream=True), GPT2, tmp_path)
        assert changed.fingerprint != store.fingerprint
        assert (
            GPT2.reference.encoding.decode(changed.tokens[: changed.n_tokens].tolist())
            == server.body.decode()
        )


def test_a_server_without_ranges_is_refused():
    pytest.importorskip("aiohttp")
    with FileServer(prose(2 << 20).encode() * 3, ranges=False) as server:
        (file,) = open_corpus(server.url, stream=True).files
        assert file.size == len(server.body)
        with pytest.raises(OSError, match=rf"{server.url} cannot be read: ValueError: The HTTP server"):
            read(file)


# Packages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "url", "line"),
    [
        ("s3fs", "s3://bucket/a.txt", "pip install 'lit-gptdata[s3]'"),
        ("gcsfs", "gs://bucket/a.txt", "pip install 'lit-gptdata[gcs]'"),
        ("huggingface_hub", "hf://datasets/a/b/c.parquet", "pip install huggingface_hub"),
    ],
)
def test_a_missing_package_is_named_with_its_pip_command(monkeypatch, package, url, line):
    monkeypatch.setitem(sys.modules, package, None)
    registry = sys.modules["fsspec.registry"]._registry  # the module: fsspec.registry is its mapping
    for name in ("s3", "gs", "hf"):
        monkeypatch.delitem(registry, name, raising=False)
    with pytest.raises(ImportError) as caught:
        open_corpus(url)
    assert str(caught.value) == f"{url} needs {package}: {line}"


def test_local_text_needs_no_fsspec(tmp_path):
    one_of_every_format(tmp_path / "texts")
    code = """
import sys
sys.modules["fsspec"] = None
from pathlib import Path
from lit_gptdata.text.corpus import open_corpus
from lit_gptdata.tokens.build.local import find_store, prepare_store
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.tokenizer import Tokenizer
corpus = open_corpus(["texts/sub", Path("texts/notes.md").resolve().as_uri(), "texts/*.[jtp]*"])
store = prepare_store(corpus, Tokenizer("gpt2"), Path("tokens"), BuildOptions(workers=2))
assert store.n_documents > 900 and find_store(corpus, Tokenizer("gpt2"), Path("tokens"))
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


# Reading -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_memory():
    """A file of 300 bytes, each equal to its position modulo 150."""
    fsspec.filesystem("memory").pipe_file("/bytes.bin", bytes(range(150)) * 2)
    (file,) = expand_url("memory://bytes.bin")
    yield file
    fsspec.filesystem("memory").rm("/bytes.bin")


@given(
    moves=st.lists(st.tuples(st.sampled_from(["seek", "read"]), st.integers(0, 320)), max_size=20),
    block=st.integers(1, 90),
)
def test_a_remote_reader_behaves_like_a_file(in_memory, moves, block):
    known, reader = io.BytesIO(bytes(range(150)) * 2), remote.RemoteReader(in_memory, 0, 300)
    with io.BufferedReader(reader, block) as raw:
        for move, number in moves:
            assert getattr(raw, move)(number) == getattr(known, move)(number)
            assert raw.tell() == known.tell()
        assert raw.seek(-10, os.SEEK_END) == known.seek(-10, os.SEEK_END)
        assert raw.read() == known.read()


@pytest.mark.parametrize(
    ("name", "contents"),
    [("a.txt.gz", [gzip.compress(b"text")[:-1]]), ("a.parquet", [b"plain text", b"PAR1"])],
)
def test_a_broken_file_is_named_like_a_local_one(tmp_path, name, contents):
    pytest.importorskip("pyarrow")
    memory = fsspec.filesystem("memory")
    for data in contents:
        path = tmp_path / name
        path.write_bytes(data)
        memory.pipe_file(f"/{name}", data)
        (file,) = expand_url(f"memory://{name}")
        messages = []
        for place in (path, file):
            with pytest.raises((OSError, ValueError)) as caught:
                read(place)
            messages.append(str(caught.value).replace(str(place), "X"))
        assert messages[0] == messages[1]
    memory.rm(f"/{name}")


def test_an_empty_object_is_named(s3, folder):
    url = s3.put(f"{folder}/a.txt", b"")
    with pytest.raises(ValueError, match=rf"{url} is empty \(0 bytes\): remove it"):
        open_corpus(f"{s3.url}/{folder}/")


def test_a_url_that_names_no_text_is_refused(s3, folder):
    s3.put(f"{folder}/a.md", b"text")
    for name, message in [
        (f"{folder}/", rf"{s3.url}/{folder}/ holds no text: looked for \*.txt, \*.jsonl"),
        (f"{folder}/*.txt", rf"{s3.url}/{folder}/\*.txt matches no file: check the pattern"),
        (f"{folder}/b.txt", rf"{s3.url}/{folder}/b.txt does not exist"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            open_corpus(f"{s3.url}/{name}")
    with pytest.raises(ValueError, match=r"zip://a.txt::s3://b/c.zip: chained file systems"):
        open_corpus("zip://a.txt::s3://b/c.zip")


LARGE = """
import sys
from pathlib import Path
from lit_gptdata.text.corpus import open_corpus

def kilobytes(name):  # not ru_maxrss, which a child inherits from its parent
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0])

corpus = open_corpus(sys.argv[1])
before = kilobytes("VmRSS:")
n_bytes = sum(len(chunk) for document in corpus for chunk in document.chunks)
sha256 = corpus.sources()[0].sha256
print(n_bytes, sha256, (kilobytes("VmHWM:") - before) // 1024)
"""


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc to read memory from")
@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("a.txt", 200), ("a.jsonl", 60), ("a.txt.zst", 200), ("a.txt.gz", 200), ("a.parquet", 200)],
)
def test_memory_does_not_grow_with_the_object(s3, tmp_path, folder, name, megabytes):
    block = prose(1 << 20).encode()
    if name.endswith("parquet"):
        table = {"text": [block.decode()] * megabytes}
        plain = {"use_dictionary": False, "compression": "none", "row_group_size": 20}
        path = write_parquet(tmp_path / name, table, **plain)
    elif name.endswith("jsonl"):
        path = pack(tmp_path / name, lines(block.decode()) * megabytes)
    else:
        path = pack(tmp_path / name, block * megabytes)
    url = s3.put(f"{folder}/{name}", path.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", LARGE, url],
        check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    n_bytes, sha256, more = done.stdout.split()
    print(name, more, "MB more")
    assert int(n_bytes) == len(block) * megabytes
    assert sha256 == FilesCorpus(path).sources()[0].sha256
    assert int(more) < (240 if name.endswith("parquet") else 60)  # pyarrow needs 137 MB for a local file
