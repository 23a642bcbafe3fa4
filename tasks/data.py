"""Files and what is in them, read and checked.

A reader of a task gets a `Document`: the unpacked text of one file with the sha256 of its bytes, so
that every record can name exactly what was read. Whatever is wrong with a file is reported with
its path and line. Where the files come from is the matter of `tasks.sources`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tasks.rows import BLOCK

T = TypeVar("T")

_GZIP_MAGIC = b"\x1f\x8b"
#: bytes of a file that are text at a time.
_PIECE = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text file, unpacked.

    Attributes:
        path: where it was read, for messages.
        name: its name without ``.gz``.
        data: its unpacked bytes, UTF-8.
        sha256: of `data`, hexadecimal.
    """

    path: Path
    name: str
    data: bytes = field(repr=False)
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Size of the unpacked file."""
        return len(self.data)

    @property
    def text(self) -> str:
        """The whole content, line ends as they are in the file; `read_lines` takes less memory."""
        return self.data.decode("utf-8").removeprefix("\ufeff")


def listing(folder: Path, limit: int = 20) -> str:
    """Return the names in `folder` for a message, folders with a slash."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    if not names:
        return "nothing"
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def find_file(folder: Path, name: str) -> Path | None:
    """Return ``folder/name`` or ``folder/name.gz``, or None if neither is there.

    Raises:
        ValueError: both are there, so it is not clear which one counts; or a link to nothing.
    """
    plain, packed = folder / name, folder / f"{name}.gz"
    if plain.is_file() and packed.is_file():
        raise ValueError(f"{folder} holds both {plain.name} and {packed.name}; remove one of them")
    found = next((path for path in (plain, packed) if path.is_file()), None)
    for path in (plain, packed) if found is None else ():
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link to {path.readlink()}, which is not there; mend the link, or put "
                "the file in its place"
            )
    return found


def read_document(path: Path) -> Document:
    """Read a UTF-8 text file, plain or gzip (by its content, not by its name).

    Raises:
        ValueError: it is empty, its gzip stream is damaged or ends early, or it is not UTF-8.
    """
    data = path.read_bytes()
    if path.suffix == ".gz" and data and not data.startswith(_GZIP_MAGIC):
        raise ValueError(f"{path} is named .gz but is no gzip file (starts with {data[:8]!r})")
    if data.startswith(_GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except EOFError as error:
            raise ValueError(
                f"{path}: the gzip stream ends early, so the file is truncated; copy it again"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}: the gzip stream is damaged ({error}); copy it again"
            ) from error
    if not data or data.isspace():
        raise ValueError(f"{path} is empty ({len(data)} bytes)")
    _check_utf8(data, path)
    return Document(path, path.name.removesuffix(".gz"), data, hashlib.sha256(data).hexdigest())


def _check_utf8(data: bytes, path: Path) -> None:
    """Decode `data` piece by piece: as one Python string it would take up to four times as much."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), _PIECE):
        waiting = len(decoder.getstate()[0])  # bytes of a character that the piece before cut
        try:
            decoder.decode(data[start : start + _PIECE], final=start + _PIECE >= len(data))
        except UnicodeDecodeError as error:
            at = start - waiting + error.start
            line = data.count(b"\n", 0, at) + 1
            raise ValueError(
                f"{path}, line {line}: byte 0x{data[at]:02x} is not UTF-8 ({error.reason}); the "
                "official files are UTF-8, convert this one"
            ) from error


def read_lines(document: Document) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end).

    Only a line feed (with or without a carriage return before it) ends a line; `str.splitlines`
    would also split at characters that texts may contain.
    """
    data, number = document.data, 0
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        yield number, data[start:end].decode("utf-8").removesuffix("\r")
        start = end + 1


def read_csv(document: Document, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the line a row starts at, its values in the order of `columns`).

    Args:
        document: a comma-separated file with a header.
        columns: the header that it must have.

    Raises:
        ValueError: another header, a row with more or fewer fields, a row that is no valid CSV,
            or a file that ends within a quoted field.
    """
    reader = csv.reader(io.StringIO(document.text, newline=""), strict=True)
    start = 1
    try:
        header = next(reader)
        if header != list(columns):
            raise ValueError(f"{document.path}, line 1: columns {header}; expected {list(columns)}")
        start = reader.line_num + 1
        for values in reader:
            if len(values) != len(columns):
                raise ValueError(
                    f"{document.path}, line {start}: {len(values)} fields, expected "
                    f"{len(columns)} ({', '.join(columns)}); the row is truncated or a quote "
                    f"is missing: {shorten(values)}"
                )
            yield start, values
            start = reader.line_num + 1
    except csv.Error as error:
        reason = (
            "the file ends within a quoted field, so it is truncated"
            if "unexpected end of data" in str(error)
            else f"no valid CSV ({error})"
        )
        raise ValueError(f"{document.path}, line {start}: {reason}") from error


def read_tsv(
    document: Document, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, column -> value) of a tab-separated file with a header, without quoting.

    A quote is a character like any other, as in the GLUE files. Columns beyond those named are
    left out.

    Raises:
        ValueError: a required column is missing or twice in the header, or a row has more or fewer
            fields than it.
    """
    lines = read_lines(document)
    _, first = next(lines)
    header = first.removeprefix("\ufeff").split("\t")
    for column in required:
        if header.count(column) != 1:
            problem = "no" if column not in header else "more than one"
            raise ValueError(
                f"{document.path}, line 1: {problem} column {column!r}; the header is {header}, "
                f"needed are {list(required)}, separated by tabs"
            )
    wanted = [column for column in (*required, *optional) if column in header]
    for number, line in lines:
        values = line.split("\t")
        if len(values) != len(header):
            raise ValueError(
                f"{document.path}, line {number}: {len(values)} fields, but the header has "
                f"{len(header)} ({', '.join(header)}); the row is truncated or has a tab within a "
                f"field: {shorten(line)}"
            )
        row = dict(zip(header, values, strict=True))
        yield number, {column: row[column] for column in wanted}


def read_parquet(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, column -> value) of a Parquet file.

    Raises:
        ValueError: it is no Parquet file, or a required column is missing.
    """
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    names = file.schema_arrow.names
    if missing := [column for column in required if column not in names]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(names)}")
    wanted = [column for column in (*required, *optional) if column in names]
    batches = file.iter_batches(BLOCK, columns=wanted)
    # The file's order of columns is not the wanted one.
    rows = chain.from_iterable(batch.select(wanted).to_pylist() for batch in batches)
    yield from enumerate(rows, start=1)


def read_jsonl(
    document: Document, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, key -> text) of a file with one JSON object a line.

    Numbers and null of optional keys become their text and an empty one; other keys are left out.

    Raises:
        ValueError: a line is no JSON object, lacks a required key, or holds something else than
            text there.
    """
    for number, line in read_lines(document):
        place = f"{document.path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}: no valid JSON ({error.msg} at column {error.colno}): {shorten(line)}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, got {shorten(line)}")
        if missing := [key for key in required if key not in row]:
            raise ValueError(
                f"{place}: no {', '.join(map(repr, missing))}; the object has "
                f"{', '.join(map(repr, row)) or 'no keys'}"
            )
        for key in required:
            if not isinstance(row[key], str):
                raise ValueError(f"{place}: {key!r} is {shorten(row[key])}; expected a text")
            try:
                row[key].encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{place}: {key!r} has half of a character ({error.object[error.start]!a}); "
                    f"remove or mend the row: {shorten(row[key])}"
                ) from error
        values = {key: row[key] for key in required}
        for key in optional:
            if row.get(key) is not None:
                values[key] = str(row[key])
        yield number, values


def file_facts(document: Document, num_rows: int, official_sha256: str | None) -> dict[str, Any]:
    """Return what a record says of a file: name, sha256, bytes, rows, and whether it is official.

    Args:
        document: what was read.
        num_rows: rows that it gave.
        official_sha256: of the unpacked official file; None where there is none to compare with.
    """
    return {
        "name": document.name,
        "sha256": document.sha256,
        "bytes": document.num_bytes,
        "rows": num_rows,
        "official": official_sha256 is not None and document.sha256 == official_sha256,
    }


def of_split(table: Mapping[str, T], split: str) -> T:
    """Return what `table` holds of a split; it is empty until a task is loaded.

    Raises:
        RuntimeError: nothing is loaded.
        ValueError: there is no such split.
    """
    if not table:
        raise RuntimeError("the data are not loaded; call load() first")
    if split not in table:
        raise ValueError(f"split={split!r}; allowed: {', '.join(table)}")
    return table[split]


def shorten(value: object, limit: int = 80) -> str:
    """Return ``repr(value)``, cut to `limit` characters for a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
