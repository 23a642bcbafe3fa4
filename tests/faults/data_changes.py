"""What can be wrong with a data file: one list of changes, for every kind of file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from tests.faults.damage import NotApplicableError
from tests.faults.data_layouts import TEXTUAL


@dataclass(frozen=True)
class Change:
    """One change of a file.

    Attributes:
        apply: takes the file, and is to change it in place; it may raise `NotApplicableError`.
        kinds: of files that it is for.
        legal: whether it makes other data, which nobody has to be told of.
    """

    apply: Callable[[Path], object]
    kinds: tuple[str, ...] = (*TEXTUAL, "parquet", "arrow")
    legal: bool = False


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        before = path.read_bytes()
        after = change(before)
        if after == before:
            raise NotApplicableError
        path.write_bytes(after)

    return apply


def _text(change: Callable[[str], str]) -> Callable[[Path], None]:
    return _bytes(lambda data: change(data.decode()).encode())


def _lines(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """Change the lines of a text, which all have their ends."""

    def apply(text: str) -> str:
        lines = text.split("\n")
        ends = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
        return "".join(change(ends))

    return _text(apply)


def _encoded(encoding: str) -> Callable[[Path], None]:
    def change(data: bytes) -> bytes:
        try:
            return data.decode().encode(encoding)
        except UnicodeEncodeError as error:
            raise NotApplicableError from error

    return _bytes(change)


def _half(data: bytes) -> bytes:
    if data[len(data) // 2 - 1 : len(data) // 2] == b"\n":
        raise NotApplicableError  # a row less
    return data[: len(data) // 2]


def _zip(data: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("file", data)
    return packed.getvalue()


def _instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


def _swapped(path: Path) -> None:
    """Put another split's file in its place."""
    others = [p for p in sorted(path.parent.glob(f"*{path.suffix}")) if p != path]
    others = [p for p in others if p.stem != "dev_ids" and p.read_bytes() != path.read_bytes()]
    if not others or path.stem == "dev_ids":
        raise NotApplicableError
    shutil.copy(others[0], path)


def _other_task(path: Path) -> None:
    """Put a file of another task's form in its place."""
    text = "a || b\tc" if path.suffix in (".json", ".jsonl") else '{"document": "a", "id": 1}'
    path.write_text("\n".join([text] * 3) + "\n", encoding="utf-8")


def _both(path: Path) -> None:
    if path.suffix == ".arrow" or path.suffix == ".parquet":
        raise NotApplicableError
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))


def _output_less(path: Path) -> None:
    if path.name == "references.txt":  # there it is a text less
        raise NotApplicableError
    _lines(lambda lines: lines[1:])(path)


def _middle(lines: list[str]) -> int:
    if len(lines) < 3:
        raise NotApplicableError
    return len(lines) // 2


def _at_middle(change: Callable[[str], str]) -> Callable[[list[str]], list[str]]:
    def apply(lines: list[str]) -> list[str]:
        at = _middle(lines)
        while not lines[at].strip() and at + 1 < len(lines):  # between groups of references
            at += 1
        return [*lines[:at], change(lines[at]), *lines[at + 1 :]]

    return apply


def _insert(line: str, place: Callable[[list[str]], int]) -> Callable[[list[str]], list[str]]:
    def apply(lines: list[str]) -> list[str]:
        at = place(lines)
        return [*lines[:at], line, *lines[at:]]

    return apply


_ROWS = ("lines", "csv", "tsv", "jsonl", "texts")
_PLAIN = ("lines", "csv", "tsv", "texts")

CHANGES: dict[str, Change] = {
    # the whole file
    "empty": Change(_bytes(lambda data: b"")),
    "blank": Change(_bytes(lambda data: b" \n\n"), TEXTUAL),
    "half": Change(_bytes(_half)),
    "last byte lost": Change(_bytes(lambda data: data[:-1])),
    "five bytes lost": Change(
        _bytes(lambda data: data[:-5]), ("json", "jsonl", "parquet", "arrow")
    ),
    "cut in its last row": Change(
        _text(lambda text: text.rstrip("\n")[:-2]), ("lines", "csv", "tsv", "jsonl")
    ),
    "last text cut": Change(_text(lambda text: text.rstrip("\n")[:-2]), ("texts",), legal=True),
    "binary": Change(_bytes(lambda data: bytes(range(256)) * 4)),
    "zeros": Change(_bytes(lambda data: bytes(len(data)))),
    "hole of zeros": Change(
        _bytes(lambda data: data[: len(data) // 3] + bytes(40) + data[len(data) // 3 + 40 :])
    ),
    "web page": Change(_bytes(lambda data: b"<!DOCTYPE html>\n<html><body>Log in</body></html>\n")),
    "placeholder": Change(
        _bytes(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    ),
    "zip": Change(_bytes(_zip)),
    "xz": Change(_bytes(lzma.compress)),
    "bz2": Change(_bytes(bz2.compress)),
    "gzip": Change(_bytes(gzip.compress)),
    "gzip twice": Change(_bytes(lambda data: gzip.compress(gzip.compress(data))), TEXTUAL),
    "gzip cut": Change(_bytes(lambda data: gzip.compress(data)[:-9]), TEXTUAL),
    "gzip with more behind": Change(_bytes(lambda data: gzip.compress(data) + b"x"), TEXTUAL),
    "named gz": Change(
        lambda path: path.rename(path.with_name(f"{path.name}.gz")),
        ("lines", "csv", "tsv", "json", "jsonl"),
    ),
    "both": Change(_both, ("lines", "csv", "tsv", "json", "jsonl")),
    "missing": Change(lambda path: path.unlink()),
    "folder": Change(_instead(lambda path: path.mkdir())),
    "dangling link": Change(_instead(lambda path: path.symlink_to("nowhere"))),
    "link to itself": Change(_instead(lambda path: path.symlink_to(path.name))),
    "link to a device": Change(_instead(lambda path: path.symlink_to("/dev/zero"))),
    "pipe": Change(_instead(lambda path: os.mkfifo(path))),
    "other case": Change(lambda path: path.rename(path.with_name(path.name.upper()))),
    "of another split": Change(_swapped),
    "of another task": Change(_other_task, ("lines", "csv", "tsv", "json", "jsonl")),
    # encodings and line ends
    "byte order mark": Change(_bytes(lambda data: b"\xef\xbb\xbf" + data), TEXTUAL),
    "two byte order marks": Change(
        _bytes(lambda data: b"\xef\xbb\xbf" * 2 + data.removeprefix(b"\xef\xbb\xbf")), TEXTUAL
    ),
    "utf-16": Change(_encoded("utf-16"), TEXTUAL),
    "utf-16-le": Change(_encoded("utf-16-le"), TEXTUAL),
    "utf-16-be": Change(_encoded("utf-16-be"), TEXTUAL),
    "utf-32": Change(_encoded("utf-32"), TEXTUAL),
    "cp1252": Change(_encoded("cp1252"), TEXTUAL),
    "utf-7": Change(_encoded("utf-7"), TEXTUAL, legal=True),  # plain ASCII: nothing tells
    "invalid byte": Change(_bytes(lambda data: data[:-20] + b"\xff" + data[-20:]), TEXTUAL),
    "half a character": Change(_bytes(lambda data: data[:-3] + b"\xe2\x82" + data[-3:]), TEXTUAL),
    "surrogate bytes": Change(
        _bytes(lambda data: data[:-20] + b"\xed\xa0\x80" + data[-20:]), TEXTUAL
    ),
    "NUL": Change(_bytes(lambda data: data[:-20] + b"\0" + data[-20:]), TEXTUAL),
    "CRLF": Change(_bytes(lambda data: data.replace(b"\n", b"\r\n")), TEXTUAL),
    "CR": Change(_bytes(lambda data: data.replace(b"\n", b"\r")), _PLAIN),
    "mixed ends": Change(_bytes(lambda data: data.replace(b"\n", b"\r\n", 2)), TEXTUAL),
    "blank lines behind": Change(_bytes(lambda data: data + b"\n \n\r\n\n"), TEXTUAL),
    "blank line before": Change(_bytes(lambda data: b"\n" + data), _PLAIN),
    "blank line within": Change(_lines(_insert("\n", _middle)), ("lines", "csv", "tsv", "jsonl")),
    "two blank lines within": Change(
        _lines(lambda lines: _insert("\n", _middle)(_insert("\n", _middle)(lines))), _ROWS
    ),
    "trailing spaces": Change(
        _lines(lambda lines: [line.replace("\n", "  \n") for line in lines]),
        ("lines", "tsv", "jsonl", "texts"),
    ),
    "trailing tabs": Change(
        _lines(lambda lines: [line.replace("\n", "\t\n") for line in lines]), ("tsv",)
    ),
    "no end": Change(_bytes(lambda data: data.rstrip(b"\r\n")), TEXTUAL),
    "control characters": Change(
        _lines(_at_middle(lambda line: line.replace(" ", " \x07\x1b[0m ", 1))), _PLAIN, legal=True
    ),
    # rows
    "a row less": Change(
        _lines(lambda ls: ls[: _middle(ls)] + ls[_middle(ls) + 1 :]),
        ("csv", "lines", "tsv", "jsonl"),
        legal=True,
    ),
    "a row twice": Change(
        _lines(_at_middle(lambda line: line * 2)), ("csv", "lines", "tsv", "jsonl"), legal=True
    ),
    "an output less": Change(_output_less, ("texts",)),
    "two rows changed over": Change(
        _lines(lambda ls: [*ls[:-2], ls[-1], ls[-2]]), ("csv", "lines", "tsv", "jsonl"), legal=True
    ),
    "the first line less": Change(_lines(lambda lines: lines[1:]), ("csv",)),
    "the header twice": Change(_lines(lambda lines: [lines[0], *lines]), ("csv",)),
    "only the first line": Change(_lines(lambda lines: lines[:1]), ("csv",)),
    "a comment": Change(
        _lines(_insert("# made by hand\n", _middle)), ("lines", "tsv", "csv", "jsonl")
    ),
    "half a row": Change(
        _lines(_at_middle(lambda line: line[: len(line) // 2] + "\n")), ("csv", "jsonl")
    ),
    "half the fields": Change(
        _lines(_at_middle(lambda ls: ls.rpartition("\t")[0] + "\n")), ("tsv",)
    ),
    "a row over two lines": Change(
        _lines(_at_middle(lambda line: line[:10] + "\n" + line[10:])), ("lines", "tsv", "jsonl")
    ),
    "two rows in one line": Change(
        _lines(_at_middle(lambda line: line.rstrip("\n"))), ("lines", "csv", "tsv", "jsonl")
    ),
    "an enormous text": Change(
        _lines(
            _at_middle(lambda line: re.sub(r"(\w)(\W*)\n", r"\1" + "a" * 3_000_000 + r"\2\n", line))
        ),
        _PLAIN,
        legal=True,
    ),
    "a delimiter more": Change(
        _lines(_at_middle(lambda line: re.sub(r"(\|\||\t)", r"\1\1", line, count=1))),
        ("lines", "tsv"),
    ),
    "a comma more": Change(_lines(_at_middle(lambda line: line.replace('","', '",,"'))), ("csv",)),
    "a delimiter less": Change(
        _lines(_at_middle(lambda line: re.sub(r"(\|\||\t)", " ", line, count=1))), ("lines", "tsv")
    ),
    "spaces for tabs": Change(_text(lambda text: text.replace("\t", "    ")), ("tsv",)),
    "commas for tabs": Change(_text(lambda text: text.replace("\t", ",")), ("tsv",)),
    "semicolons": Change(_text(lambda text: text.replace(",", ";")), ("csv",)),
    "a quote more": Change(_lines(_at_middle(lambda line: f'"{line}')), ("csv",)),
    "quotes": Change(_lines(_at_middle(lambda line: f'"{line}')), ("tsv", "lines"), legal=True),
    "JSON": Change(
        _text(lambda text: "".join(json.dumps({"text": t}) + "\n" for t in text.split("\n"))),
        ("lines", "csv", "tsv", "texts"),
    ),
}


# ---------------------------------------------------------------------- tables with a header


def _header(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(lines: list[str]) -> list[str]:
        names_ = lines[0].rstrip("\r\n").split("\t")
        end = "\r\n" if lines[0].endswith("\r\n") else "\n"
        if not any(name.lstrip("\ufeff").isidentifier() and name.islower() for name in names_):
            raise NotApplicableError
        if names_[0] == "gj04":
            raise NotApplicableError
        return ["\t".join(change(names_)) + end, *lines[1:]]

    return _lines(apply)


def _columns(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(lines: list[str]) -> list[str]:
        if lines[0].startswith("gj04"):
            raise NotApplicableError
        return ["\t".join(change(line.rstrip("\n").split("\t"))) + "\n" for line in lines]

    return _lines(apply)


def _field(at: int, value: str) -> Callable[[Path], None]:
    def change(line: str) -> str:
        fields = line.rstrip("\r\n").split("\t")
        if not -len(fields) <= at < len(fields):
            raise NotApplicableError
        fields[at] = value
        return "\t".join(fields) + "\n"

    return _lines(_at_middle(change))


_LABELS = {"label", "score", "gold_label", "is_duplicate", "Quality"}


def _label(value: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        header = path.read_text(encoding="utf-8-sig").split("\n")[0].rstrip("\r").split("\t")
        at = next((header.index(name) for name in _LABELS if name in header), None)
        if at is None and header[0] != "gj04":
            raise NotApplicableError
        _field(1 if at is None else at, value)(path)

    return apply


CHANGES |= {
    "columns turned round": Change(_columns(lambda row: row[::-1]), ("tsv",)),
    "a column more": Change(_columns(lambda row: [*row, "more"]), ("tsv",)),
    "a column more before": Change(_columns(lambda row: ["more", *row]), ("tsv",)),
    "the last column less": Change(_columns(lambda row: row[:-1]), ("tsv",)),
    "the first column less": Change(_columns(lambda row: row[1:]), ("tsv",)),
    "a name twice": Change(_header(lambda names_: [names_[1], *names_[1:]]), ("tsv",)),
    "upper case": Change(_header(lambda names_: [name.upper() for name in names_]), ("tsv",)),
    "spaces in the header": Change(_header(lambda names_: [f" {n} " for n in names_]), ("tsv",)),
    "quoted header": Change(_header(lambda names_: [f'"{n}"' for n in names_]), ("tsv",)),
    **{
        # In a text these are words; what they are as labels is asked below.
        f"field {at} is {value!r}": Change(_field(at, value), ("tsv",), legal=bool(value.strip()))
        for at in (0, 1, 2, -2, -1)
        for value in ("", " ", "x y", "nan", "7")
    },
    **{
        f"label {value!r}": Change(_label(value), ("tsv",))
        for value in ("", " ", "x y", "nan", "-1", "7", "1e400", "None", "0,5", "+", "٣", "1 1")
    },
}


# ---------------------------------------------------------------------- JSON


def _json(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Change the objects of rows, in a file of lines or in a whole file of JSON."""

    def apply(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines()]
            at = len(rows) // 2
            found = change(rows[at])
            rows[at] = rows[at] if found is None else found
            after = "\n".join(json.dumps(row) for row in rows) + "\n"
        else:
            whole = json.loads(text)
            at = len(whole["entries"]) // 2
            ((key, entry),) = whole["entries"][at].items()
            found = change(entry)
            whole["entries"][at] = {key: entry if found is None else found}
            after = json.dumps(whole)
        path.write_text(after.replace('"<RAW>', "").replace('<RAW>"', ""), encoding="utf-8")

    return apply


def _each(path: str, value: object, *, drop: bool = False) -> Callable[[Any], None]:
    """Return what puts a value in the place of one of an object; `path` is like ``a.0.b``."""

    def change(row: Any) -> None:
        *parents, last = path.split(".")
        try:
            for parent in parents:
                row = row[int(parent) if isinstance(row, list) else parent]
            key: Any = int(last) if isinstance(row, list) else last
            assert row[key] is not None
        except (KeyError, IndexError, TypeError) as error:
            raise NotApplicableError from error
        if drop:
            del row[key]
        else:
            row[key] = value

    return change


_PATHS = {
    "jsonl": (
        "id",
        "document",
        "summary",
        "category",
        "triples",
        "triples.0",
        "triples.0.1",
        "references",
        "references.0",
        "label",
        "premise",
        "sentence2",
    ),
    "json": (
        "category",
        "modifiedtripleset",
        "modifiedtripleset.0",
        "modifiedtripleset.0.subject",
        "lexicalisations",
        "lexicalisations.0",
        "lexicalisations.0.lex",
        "lexicalisations.0.comment",
    ),
}
_DEEP = "<RAW>" + "[" * 3000 + "]" * 3000 + "<RAW>"
_VALUES: dict[str, object] = {
    "null": None,
    "true": True,
    "a number": 3,
    "a real": 2.5,
    "NaN": float("nan"),
    "a huge number": "<RAW>" + "9" * 5000 + "<RAW>",
    "a list": ["a", 1],
    "an object": {"a": "b"},
    "empty": "",
    "blank": " \n ",
    "empty list": [],
    "a surrogate": "half \ud800",
    "NUL": "a\0b",
    "nested": _DEEP,
    "a pair": "\U0001f600",
}
# What is another value of that kind.
_LEGAL = (
    {
        (path, value)
        for path in ("id",)
        for value in ("a number", "null", "empty", "blank", "a real", "a pair")
    }
    | {("label", "a number"), ("label", "a real")}
    | {
        (path, "a pair")
        for path in (
            "document",
            "summary",
            "category",
            "triples.0.1",
            "references.0",
            "premise",
            "sentence2",
            "modifiedtripleset.0.subject",
            "lexicalisations.0.lex",
            "lexicalisations.0.comment",
        )
    }
)
CHANGES |= {
    f"{path} is {name}": Change(_json(_each(path, value)), (kind,), legal=(path, name) in _LEGAL)
    for kind, paths in _PATHS.items()
    for path in paths
    for name, value in _VALUES.items()
}
CHANGES |= {
    # One of a list less is a whole row less.
    f"no {path}": Change(
        _json(_each(path, None, drop=True)), (kind,), legal=path == "id" or path.endswith(".0")
    )
    for kind, paths in _PATHS.items()
    for path in paths
}
CHANGES |= {
    "keys turned round": Change(
        _json(lambda row: dict(reversed(list(row.items())))), ("json", "jsonl")
    ),
    "a key more": Change(_json(lambda row: {**row, "more": [1, {"a": None}]}), ("json", "jsonl")),
    "an empty object": Change(_json(lambda row: {}), ("json", "jsonl")),
    "a list for an object": Change(_json(lambda row: list(row)), ("json", "jsonl")),
    "a text for an object": Change(_json(lambda row: "row"), ("json", "jsonl")),
    "null for an object": Change(_json(lambda row: "<RAW>null<RAW>"), ("json", "jsonl")),
    "a nest for an object": Change(_json(lambda row: _DEEP), ("json", "jsonl")),
    "a list of rows": Change(
        _text(lambda text: "[" + ",\n".join(text.splitlines()) + "]\n"), ("jsonl",)
    ),
    "a comma more": Change(_lines(_at_middle(lambda ls: ls.replace("}\n", ",}\n"))), ("jsonl",)),
    "single quotes": Change(_lines(_at_middle(lambda ls: ls.replace('"', "'"))), ("jsonl",)),
    "a key twice": Change(
        _lines(_at_middle(lambda line: line.replace("{", '{"document": "x", "id": "x", ', 1))),
        ("jsonl",),
    ),
    "written over many lines": Change(
        _text(lambda text: json.dumps(json.loads(text), indent=4, ensure_ascii=True)), ("json",)
    ),
    "rows over many lines": Change(
        _text(
            lambda t: "".join(json.dumps(json.loads(s), indent=1) + "\n" for s in t.splitlines())
        ),
        ("jsonl",),
    ),
    "a list for the whole": Change(
        _text(lambda text: json.dumps(json.loads(text)["entries"])), ("json",)
    ),
    "other entries": Change(_text(lambda text: text.replace("entries", "data", 1)), ("json",)),
    "no entries": Change(_text(lambda text: '{"entries": []}'), ("json",)),
    "a whole nest": Change(_text(lambda text: "[" * 100_000), ("json", "jsonl")),
    "two documents": Change(_text(lambda text: text + text), ("json",)),
}


# ---------------------------------------------------------------------- tables of Arrow


def _table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        if path.suffix == ".json":
            raise NotApplicableError
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(path)), path)
            return
        with pa.OSFile(str(path)) as source:
            table = change(pa.ipc.open_stream(source).read_all())
        path.unlink()
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)

    return apply


def _column(name: str, values: Callable[[int], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        if at < 0:
            raise NotApplicableError
        return table.set_column(at, name, pa.array(values(len(table))))

    return change


_TABLES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "no rows": lambda table: table[:0],
    "columns turned round": lambda table: table.select(table.column_names[::-1]),
    "a column more": lambda table: table.append_column("more", pa.array([1] * len(table))),
    "a column less": lambda table: table.drop_columns(table.column_names[0]),
    "no label": lambda table: table.drop_columns("label"),
    "other names": lambda table: table.rename_columns([n.upper() for n in table.column_names]),
    "a name twice": lambda table: table.append_column("label", table["label"]),
    **{
        f"{name} of {kind}": _column(name, values)
        for name in ("premise", "sentence2", "label")
        for kind, values in (
            ("numbers", lambda n: [7] * n),
            ("nulls", lambda n: [None] * n),
            ("bytes", lambda n: [b"\xff"] * n),
            ("lists", lambda n: [["a"]] * n),
            ("empty texts", lambda n: [""] * n),
            ("NaN", lambda n: [float("nan")] * n),
            ("NUL", lambda n: ["a\0"] * n),
        )
    },
}
CHANGES |= {
    f"table: {name}": Change(_table(change), ("parquet", "arrow"))
    for name, change in _TABLES.items()
}
CHANGES |= {
    f"byte {at} of 20 flipped": Change(
        _bytes(lambda d, at=at: d[: (i := len(d) * at // 20)] + bytes([d[i] ^ 255]) + d[i + 1 :]),
        ("parquet", "arrow"),
    )
    for at in range(20)
}
