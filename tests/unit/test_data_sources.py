"""Files and downloads: what is read, and what every kind of damage says."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tasks.data import (
    Document,
    file_facts,
    find_file,
    listing,
    of_split,
    read_csv,
    read_document,
    read_jsonl,
    read_lines,
    read_parquet,
    read_tsv,
    warn_if_cut,
    warn_of_same_files,
)
from tasks.sources import Release, Source, open_folder, remote_size

COMMIT = "0123456789" * 4


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# Documents


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_document_is_hashed_unpacked(tmp_path: Path, name: str) -> None:
    text = "é one\r\ntwo\x85\u2028still two\nthree"
    data = text.encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    document = read_document(path)
    assert (document.name, document.text, document.num_bytes) == ("a.txt", text, len(data))
    assert document.sha256 == hashlib.sha256(data).hexdigest()
    assert list(read_lines(document)) == [
        (1, "é one"),
        (2, "two\x85\u2028still two"),
        (3, "three"),
    ]


def test_damaged_files(tmp_path: Path) -> None:
    packed = gzip.compress(b"some text\n" * 200, mtime=0)
    flipped = bytearray(packed)
    flipped[-6] ^= 0xFF  # in the checksum
    cases: dict[str, tuple[bytes, str]] = {
        "cut.gz": (packed[:-12], "cut.gz: the gzip stream ends early, so the file is truncated"),
        "flipped.gz": (bytes(flipped), r"flipped.gz: the gzip stream is damaged \(CRC"),
        "plain.gz": (b"some text\n", "plain.gz is named .gz but is no gzip file"),
        "empty.txt": (b"", r"empty.txt is empty \(0 bytes\)"),
        "empty.gz": (gzip.compress(b""), "empty.gz is empty"),
        "blank.txt": (b" \n\n", r"blank.txt is empty \(3 bytes\)"),
        "latin.txt": (b"one\ntwo\nCaf\xe9 three\n", "latin.txt, line 3: byte 0xe9 is not UTF-8"),
    }
    for name, (data, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            read_document(write(tmp_path / name, data))


@pytest.mark.parametrize("piece", [1, 2, 3, 5])
def test_a_character_may_lie_across_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr("tasks.data._PIECE", piece)
    text = "é\n\u2013 \U0001f600\n"
    assert read_document(write(tmp_path / "a.txt", text)).text == text
    for end, byte in ((b"ab\xe9", "e9"), (b"\xe2\x80", "e2"), (b"\xe2\x80\x80\xff\n", "ff")):
        with pytest.raises(ValueError, match=f"a.txt, line 3: byte 0x{byte} is not UTF-8"):
            read_document(write(tmp_path / "a.txt", text.encode() + end))


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    assert read_document(write(tmp_path / "a.txt", gzip.compress(b"hi\n"))).text == "hi\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\n".encode("utf-16"), "a.txt, line 1: it is UTF-16 .*iconv -f UTF-16"),
        ("a\n".encode("utf-32"), "a.txt, line 1: it is UTF-32 "),
        ("a\nb\n".encode("utf-16-le"), "a.txt, line 1: a NUL byte.*UTF-16"),
        (b"one\ntwo\0\n", "a.txt, line 2: a NUL byte"),
        (b"PK\x03\x04rest", "it is a zip archive .*; unpack it"),
        (gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), "it is packed twice"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a placeholder of git-lfs"),
        (b"<!DOCTYPE html>\n", "a web page"),
        (b"\xef\xbb\xbf", "a.txt is empty"),
        (b"\xef\xbb\xbf \n", "a.txt is empty"),
    ],
)
def test_what_is_no_text_in_utf8_is_called_by_its_name(
    tmp_path: Path, data: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_document(write(tmp_path / "a.txt", data))


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n", "\n \n\r\n  \n"])
def test_blank_lines_at_the_end_are_none(tmp_path: Path, end: str) -> None:
    assert list(read_lines(document(tmp_path, f"a\n\nb{end}"))) == [(1, "a"), (2, ""), (3, "b")]
    rows = list(read_csv(document(tmp_path, f"mr,ref\na,b{end}", "a.csv"), ("mr", "ref")))
    assert rows[0] == (2, ["a", "b"])
    assert len(rows) == 1


def test_a_row_of_empty_fields_is_no_blank_line(tmp_path: Path) -> None:
    assert list(read_lines(document(tmp_path, "a\tb\n\t\n\n"))) == [(1, "a\tb"), (2, "\t")]


def test_a_last_line_without_an_end_may_be_half_of_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_cut(document(tmp_path, "a\nb\n"))
    assert not caplog.records
    warn_if_cut(document(tmp_path, "a\nb"))
    assert "a.tsv: there is no line end behind the last line" in caplog.text


def test_copies_in_the_place_of_another_split_are_pointed_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = [{"name": "train", "sha256": "1"}, {"name": "dev", "sha256": "2"}]
    warn_of_same_files([*files, {"name": "dev", "sha256": "2"}])  # two splits of one file
    assert not caplog.records
    warn_of_same_files([*files, {"name": "test", "sha256": "1"}])
    assert "test has the same content as train" in caplog.text


# CSV


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_csv_rows_know_their_line(tmp_path: Path, line_end: str) -> None:
    text = line_end.join(["mr,ref", 'a,"x ""y"""', '"b","two', 'lines"', "c,z", ""])
    rows = list(read_csv(read_document(write(tmp_path / "a.csv", text)), ("mr", "ref")))
    assert rows == [
        (2, ["a", 'x "y"']),
        (3, ["b", f"two{line_end}lines"]),
        (5, ["c", "z"]),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MR\na\n", r"a.csv, line 1: columns \['MR'\]; expected \['mr', 'ref'\]"),
        ("ref,mr\na,b\n", r"line 1: columns \['ref', 'mr'\]"),
        ("mr,ref\na,b\nc\n", r"line 3: 1 fields, expected 2 \(mr, ref\); the row is truncated"),
        ("mr,ref\na,b,c\n", "line 2: 3 fields, expected 2"),
        ("mr,ref\na,b\n\nc,d\n", "line 3: 0 fields"),
        ('mr,ref\n"a","b\nb"\n"c","d\nd', "line 4: the file ends within a quoted field"),
        ('mr,ref\n"a"x,b\n', "line 2: no valid CSV"),
    ],
)
def test_damaged_csv(tmp_path: Path, text: str, message: str) -> None:
    document = read_document(write(tmp_path / "a.csv", text))
    with pytest.raises(ValueError, match=message):
        list(read_csv(document, ("mr", "ref")))


# Folders


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_folder("data") == open_folder(tmp_path / "data") == tmp_path / "data"
    with pytest.raises(FileNotFoundError, match=r"data_dir='dta' does not exist .* holds data/"):
        open_folder("dta")
    write(tmp_path / "file", "x")
    with pytest.raises(NotADirectoryError, match="'file' is a file"):
        open_folder("file")


def test_finding_files(tmp_path: Path) -> None:
    assert find_file(tmp_path, "a.txt") is None
    assert listing(tmp_path) == "nothing"
    packed = write(tmp_path / "a.txt.gz", b"")
    assert find_file(tmp_path, "a.txt") == packed
    write(tmp_path / "a.txt", b"")
    with pytest.raises(ValueError, match=r"holds both a.txt and a.txt.gz; remove one"):
        find_file(tmp_path, "a.txt")
    assert listing(tmp_path, limit=1) == "a.txt and 1 more"
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"b.txt is a link to .*/gone, which leads to no"):
        find_file(tmp_path, "b.txt")
    (tmp_path / "c.txt").mkdir()
    with pytest.raises(IsADirectoryError, match=r"c.txt is a folder; put the file"):
        find_file(tmp_path, "c.txt")
    with pytest.raises(IsADirectoryError, match=r"c.txt is a folder"):
        read_document(tmp_path / "c.txt")


# Downloads


class _QuietHandler(SimpleHTTPRequestHandler):
    requests: list[str]

    def log_message(self, format: str, *args: object) -> None:
        self.requests.append(self.path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder that a local server answers from, and its address."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    _QuietHandler.requests = []
    web = HTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    thread.join()
    web.server_close()


def release(url: str, **contents: str) -> Release:
    files = {
        name.replace("_", "."): hashlib.sha256(text.encode()).hexdigest()
        for name, text in contents.items()
    }
    return Release("owner/name", COMMIT, url, files)


def test_a_download_is_verified_and_kept(server: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = server
    write(folder / "a.txt", "one\n")
    write(folder / "b.txt", "two\n")
    pinned = release(url, a_txt="one\n", b_txt="two\n")
    assert pinned.revision == f"owner/name@{COMMIT}"
    got = pinned.fetch(tmp_path / "cache")
    assert {path.name: path.read_text() for path in got.iterdir()} == {
        "a.txt": "one\n",
        "b.txt": "two\n",
    }
    assert len(_QuietHandler.requests) == 2
    assert pinned.fetch(tmp_path / "cache") == got
    assert len(_QuietHandler.requests) == 2
    write(got / "a.txt", "damaged later")
    assert (pinned.fetch(tmp_path / "cache") / "a.txt").read_text() == "one\n"
    assert len(_QuietHandler.requests) == 3


def test_another_file_than_the_pinned_one(server: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = server
    write(folder / "a.txt", "<html>please log in</html>")
    with pytest.raises(ValueError, match=r"/a.txt is not the pinned file of owner/name@.*files"):
        release(url, a_txt="one\n").fetch(tmp_path / "cache", retries=0)
    assert not list((tmp_path / "cache").rglob("*.txt"))


def test_a_missing_file_and_no_server(server: tuple[Path, str], tmp_path: Path) -> None:
    _, url = server
    with pytest.raises(
        RuntimeError, match=r"could not download .*/a.txt .*404.*task\.source=files"
    ):
        release(url, a_txt="one\n").fetch(tmp_path / "cache", retries=0)
    with pytest.raises(RuntimeError, match=r"could not download .*task\.source=files"):
        release("http://127.0.0.1:9", a_txt="one\n").fetch(tmp_path / "cache", retries=0)


def test_a_release_is_checked_without_a_download(server: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = server
    write(folder / "a.txt", "one\n")
    pinned = release(url, a_txt="one\n", b_txt="two\n")
    with pytest.raises(
        RuntimeError, match=r"/b\.txt .*@.* cannot be downloaded: 404.*source=files"
    ):
        pinned.check_source(tmp_path / "cache")
    write(folder / "b.txt", "two\n")
    pinned.check_source(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert remote_size(f"{url}/a.txt", timeout_s=5) == 4
    pinned.fetch(tmp_path / "cache")
    num_requests = len(_QuietHandler.requests)
    pinned.check_source(tmp_path / "cache")
    assert len(_QuietHandler.requests) == num_requests
    with pytest.raises(RuntimeError, match=r"cannot be downloaded.*task\.source=files"):
        release("http://127.0.0.1:9", a_txt="one\n").check_source(tmp_path / "other")


def test_a_mirror_of_the_hub_is_asked_in_its_place(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = server
    monkeypatch.setenv("HF_ENDPOINT", f"{url}/")
    (folder / "datasets").mkdir()
    write(folder / "datasets" / "a.txt", "one\n")
    pinned = release("https://huggingface.co/datasets/", a_txt="one\n")
    pinned.check_source(tmp_path / "cache")
    assert (pinned.fetch(tmp_path / "cache") / "a.txt").read_text() == "one\n"
    assert release("https://example.org/x", a_txt="").file_url("a.txt") == (
        "https://example.org/x/a.txt"
    )


def test_a_release_must_be_pinned() -> None:
    with pytest.raises(ValueError, match="commit='main' is not allowed; write a full hash"):
        Release("owner/name", "main", "http://127.0.0.1", {})
    with pytest.raises(ValueError, match=r"a\.txt='abc' is not allowed; write a sha256"):
        Release("owner/name", COMMIT, "http://127.0.0.1", {"a.txt": "abc"})


# Sources


def write_corpus(folder: Path, *, seed: int, sizes: dict[str, int] | None) -> None:
    write(folder / "a.txt", f"{seed} {sizes}")


def test_every_source_gives_a_folder_with_the_files(
    server: tuple[Path, str], tmp_path: Path
) -> None:
    served, url = server
    write(served / "a.txt", "one\n")
    pinned, cache = release(url, a_txt="one\n"), tmp_path / "cache"
    hub = Source(kind="hub", write=write_corpus, release=pinned, cache_dir=cache)
    files = Source(kind="files", write=write_corpus, data_dir=served, cache_dir=cache)
    embedded = Source(
        kind="embedded", write=write_corpus, release=pinned, embedded_seed=3,
        embedded_sizes={"train": 2}, cache_dir=cache,
    )  # fmt: skip
    expected = {"hub": "one\n", "files": "one\n", "embedded": "3 {'train': 2}"}
    for source in (hub, files, embedded):
        with source.open() as folder:
            assert (folder / "a.txt").read_text() == expected[source.kind]
        assert folder.exists() == (source.kind != "embedded")
        assert source.encoded_folder == (None if source is embedded else cache / "encoded")
    assert hub.facts() == {
        "source": "hub", "revision": pinned.revision, "embedded_seed": None
    }  # fmt: skip
    assert files.facts() == {"source": "files", "revision": None, "embedded_seed": None}
    assert embedded.facts() == {"source": "embedded", "revision": None, "embedded_seed": 3}
    assert hub.official("a.txt") == pinned.files["a.txt"]
    assert hub.official("b.txt") is files.official("a.txt") is None


def test_a_source_is_checked_without_reading_it(tmp_path: Path) -> None:
    def find(folder: Path) -> None:
        raise FileNotFoundError(f"{folder} has no a.txt")

    Source(kind="embedded", write=write_corpus).check(find)
    with pytest.raises(FileNotFoundError, match=r"has no a\.txt"):
        Source(kind="files", write=write_corpus, data_dir=tmp_path).check(find)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Source(kind="files", write=write_corpus, data_dir=tmp_path / "none").check(find)
    pinned = release("http://127.0.0.1:9", a_txt="one\n")
    with pytest.raises(RuntimeError, match="cannot be downloaded"):
        Source(kind="hub", write=write_corpus, release=pinned, cache_dir=tmp_path).check(find)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "web"}, r"task\.source='web'.*'hub', 'files', 'embedded'"),
        ({"kind": "files"}, r"task\.source=files with task\.data_dir=None"),
        ({"kind": "embedded", "data_dir": "x"}, r"task\.source=embedded with task\.data_dir=x"),
        ({"kind": "hub", "key": "release_lora"}, r"task\.source=hub without task\.release_lora"),
        (
            {
                "kind": "hub",
                "release": release("http://127.0.0.1:9", a_txt=""),
                "needed": ["a.txt", "b.txt"],
            },
            r"task\.release\.files lacks \['b\.txt'\]",
        ),
    ],
)
def test_settings_of_a_source(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(write=write_corpus, **settings)


def test_nothing_is_of_a_split_before_loading() -> None:
    with pytest.raises(RuntimeError, match=r"call load\(\) first"):
        of_split({}, "train")
    assert of_split({"train": 1}, "train") == 1
    with pytest.raises(ValueError, match="split='dev'; allowed: train"):
        of_split({"train": 1}, "dev")


# Tab-separated values, JSON lines, Parquet, the hub


def document(tmp_path: Path, data: bytes | str, name: str = "a.tsv") -> Document:
    return read_document(write(tmp_path / name, data))


def test_tsv_has_no_quoting_and_any_order_of_columns(tmp_path: Path) -> None:
    read = document(tmp_path, 'idx\tb\ta\n0\t"x\ty"\r\n1\tx\u2028y\t\n')
    assert list(read_tsv(read, ["a", "b"], ["label"])) == [
        (2, {"a": 'y"', "b": '"x'}),
        (3, {"a": "", "b": "x\u2028y"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tc\n1\t2\n", r"line 1: no column 'b'; the header is \['a', 'c'\]"),
        ("a\tb\tb\n1\t2\t3\n", "line 1: more than one column 'b'"),
        ("a\tb\n1\t2\n1\n", "line 3: 1 fields, but the header has 2"),
        ("a\tb\n1\t2\t3\n", "line 2: 3 fields, but the header has 2 .* a tab within a field"),
    ],
)
def test_wrong_tsv_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"a.tsv, {message}"):
        list(read_tsv(document(tmp_path, text), ["a", "b"]))


def test_json_lines(tmp_path: Path) -> None:
    text = '{"a": "x", "b": "y", "id": 7, "z": []}\n{"id": null, "a": "é\\u2028", "b": null}\n'
    assert list(read_jsonl(document(tmp_path, text), ["a"], ["b"], raw=["id"])) == [
        (1, {"a": "x", "b": "y", "id": 7}),
        (2, {"a": "é\u2028", "id": None}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "x"}\n{"a": "x"\n', "line 2: no valid JSON .* at column"),
        ("[1]\n", r"line 1: expected a JSON object, got '\[1\]'"),
        ('{"b": "x"}\n', r"line 1: no 'a'; the object has \['b'\]; give"),
        ('{"a": null}\n', "line 1: 'a' is None; expected a text"),
        ('{"a": "x\\ud83d"}\n', r"line 1: 'a' has half of a character \('\\ud83d'\)"),
        ('{"a": "x\\u0000"}\n', r"line 1: 'a' has the character NUL"),
        ('{"a": "x", "a": "y"}\n', r"line 1: no valid JSON \(the key 'a' is twice"),
        ('{"a": "x"}\n{"a": ' + "[" * 100_000, "line 2: the JSON is nested too deeply"),
        ('{"a": "x", "b": ' + "9" * 5000 + "}\n", "line 1: no valid JSON .*; mend it"),
        ('{"a": "x"}\n\n{"a": "y"}\n', "line 2: no valid JSON"),
    ],
)
def test_wrong_json_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"a.tsv, {message}"):
        list(read_jsonl(document(tmp_path, text), ["a"]))


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"idx": [4, 5], "label": [1, 0], "text": ["é", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_parquet(tmp_path / "a.parquet", ["text"], ["label", "other"])) == [
        (1, {"text": "é", "label": 1}),
        (2, {"text": "b", "label": 0}),
    ]
    with pytest.raises(
        ValueError, match=r"no column sentence; it has \['idx', 'label', 'text'\], needed"
    ):
        list(read_parquet(tmp_path / "a.parquet", ["sentence"]))
    write(tmp_path / "b.parquet", "text")
    with pytest.raises(ValueError, match=r"b\.parquet is no Parquet file"):
        list(read_parquet(tmp_path / "b.parquet", ["text"]))


def test_facts_of_a_file(tmp_path: Path) -> None:
    read = document(tmp_path, "text\n")
    sha256 = hashlib.sha256(b"text\n").hexdigest()
    assert file_facts(read, 3, sha256) == {
        "name": "a.tsv", "sha256": sha256, "bytes": 5, "rows": 3, "official": True,
    }  # fmt: skip
    assert file_facts(read, 3, None)["official"] is False


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"\xef\xbb\xbfname : A||a\n")
    document = read_document(path)
    assert document.text == "name : A||a\n"
    assert document.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
