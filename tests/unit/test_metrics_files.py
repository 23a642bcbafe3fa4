"""What the scorers' programs read: every mistake is named with file and line."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from tasks.metrics import e2e, webnlg
from tasks.metrics.files import read_pair, read_predictions, read_references


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    outputs, references = tmp_path / "outputs.txt", tmp_path / "references.txt"
    outputs.write_text("a b\n\nc\n")
    references.write_text("a\nb\n\nx\n\nc\n")
    return outputs, references


EXPECTED = (["a b", "", "c"], [["a", "b"], ["x"], ["c"]])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data + b"\n \n\n",
        lambda data: data[:-1],
        lambda data: data.replace(b"\n", b"  \n"),
        gzip.compress,
    ],
)
def test_a_pair_is_read_however_its_lines_end(
    pair: tuple[Path, Path], which: int, change: object
) -> None:
    assert read_pair(*pair) == EXPECTED
    pair[which].write_bytes(change(pair[which].read_bytes()))  # type: ignore[operator]
    assert read_pair(*pair) == EXPECTED


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\rb\u2028c\x85d\ne\n".encode())
    assert read_predictions(path) == ["a\rb\u2028c\x85d", "e"]
    assert read_references(path) == [["a\rb\u2028c\x85d"], ["e"]]


def test_blank_outputs_are_outputs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\n\n")
    assert read_predictions(path) == ["", "", ""]


@pytest.mark.parametrize("program", [e2e.main, webnlg.main])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\ncaf\u00e9\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
        ("a\n".encode("utf-16"), "line 1: it is UTF-16"),
        (b"a\n\0\n", "line 2: a NUL byte"),
        (b"", "is empty"),
        (b'{"id": "test-1", "prediction": "a"}\n', "line 1: JSON .*jq -r .prediction"),
        (b"a\nb\n", "has 2 (outputs|instances)"),
        (None, "does not exist"),
    ],
)
def test_programs_name_the_file_and_what_is_wrong(
    pair: tuple[Path, Path], program: object, which: int, data: bytes | None, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if data is None:
        pair[which].unlink()
    else:
        pair[which].write_bytes(data)
    arguments = ["--predictions", str(pair[0]), "--references", str(pair[1])]
    assert program(arguments) == 2  # type: ignore[operator]
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert pair[which].name in err
    assert re.search(message, err)


def test_one_file_is_not_both(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="for the outputs and for the references"):
        read_pair(pair[0], pair[0])
