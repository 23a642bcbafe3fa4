"""Files and what is in them, read and checked.

A reader of a task gets a `Document`: the unpacked text of one file with the sha256 of its bytes, so
that every record can name exactly what was read. Whatever is wrong with a file is reported with
its path and line. Where the files come from is the matter of `tasks.sources`.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tasks.rows import BLOCK

T = TypeVar("T")

logger = logging.getLogger(__name__)

_GZIP_MAGIC = b"\x1f\x8b"
#: how files begin that are no text, what each is, and what makes text of it.
_OTHER_FILES = {
    codecs.BOM_UTF32_LE: ("UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    codecs.BOM_UTF32_BE: ("UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    codecs.BOM_UTF16_LE: ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    codecs.BOM_UTF16_BE: ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"\xfd7zXZ": ("packed by xz", "unpack it"),
    b"BZh": ("packed by bzip2", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "unpack it"),
    _GZIP_MAGIC: ("packed twice", "unpack it once"),
    b"PAR1": ("a Parquet file", "name it .parquet, or write it as text"),
    b"version https://git-lfs": ("a placeholder of git-lfs", "git lfs pull brings the file"),
    b"<!DOCTYPE html": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}
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
        ValueError: both are there, so it is not clear which one counts.
        OSError: see `check_file`.
    """
    plain, packed = folder / name, folder / f"{name}.gz"
    for path in (plain, packed):
        check_file(path)
    if plain.is_file() and packed.is_file():
        raise ValueError(f"{folder} holds both {plain.name} and {packed.name}; remove one of them")
    return next((path for path in (plain, packed) if path.is_file()), None)


def check_file(path: Path) -> None:
    """Refuse what stands in the place of a file and is none: reading a device never ends.

    Raises:
        FileNotFoundError: it is a link that leads to no file.
        IsADirectoryError: it is a folder, a device or a pipe.
    """
    if path.is_file() or not os.path.lexists(path):
        return
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, which leads to no file; make the link "
            "again, or put the file there"
        )
    what = "a folder" if path.is_dir() else "no plain file (a device or a pipe)"
    raise IsADirectoryError(f"{path} is {what}; put the file of this name in its place")


def read_document(path: Path, *, blank: bool = False) -> Document:
    """Read a UTF-8 text file, plain or gzip (by its content, not by its name).

    Args:
        path: the file.
        blank: whether it may hold nothing but white space.

    Raises:
        ValueError: it is empty, its gzip stream is damaged or ends early, it is no text, or not in
            UTF-8; the message has file and line.
        OSError: it cannot be read; the message has the file.
    """
    data = _unpacked(path)
    text = data.removeprefix(codecs.BOM_UTF8)
    if not text or (text.isspace() and not blank):
        raise ValueError(f"{path} is empty ({len(data)} bytes); copy it again")
    for start, (what, advice) in _OTHER_FILES.items():
        if data.startswith(start):
            raise ValueError(
                f"{path}, line 1: it is {what} (starts with {data[: len(start)]!r}), and needed is "
                f"text in UTF-8; {advice}"
            )
    _check_utf8(data, path)
    if (at := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, at) + 1
        raise ValueError(
            f"{path}, line {line}: a NUL byte, which no text has; the file is damaged or in "
            "UTF-16: copy it again, or convert it to UTF-8"
        )
    return Document(path, path.name.removesuffix(".gz"), data, hashlib.sha256(data).hexdigest())


def _unpacked(path: Path) -> bytes:
    """Return the bytes of a file, unpacked where they are gzip."""
    check_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror}; mend or copy it") from error
    if path.suffix == ".gz" and data and not data.startswith(_GZIP_MAGIC):
        raise ValueError(
            f"{path} is named .gz but is no gzip file (starts with {data[:8]!r}); name it without "
            ".gz, or copy it again"
        )
    if not data.startswith(_GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise ValueError(
            f"{path}: the gzip stream ends early, so the file is truncated; copy it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip stream is damaged ({error}); copy it again") from error


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
    would also split at characters that texts may contain. Blank lines at the end of the file are
    none.
    """
    data, number = document.data, 0
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    stop = _end_of_lines(data)
    while start < stop:
        end = data.find(b"\n", start, stop)
        end = stop if end < 0 else end
        number += 1
        yield number, data[start:end].decode("utf-8").removesuffix("\r")
        start = end + 1


def _end_of_lines(data: bytes) -> int:
    """Return where the last line that is not blank ends. One of tabs alone is a row, not blank."""
    end = len(data)
    while True:
        start = data.rfind(b"\n", 0, end) + 1
        if start == 0 or data[start:end].strip(b" \r"):
            return end
        end = start - 1


def warn_if_cut(document: Document) -> None:
    """Warn where the last line has no end: it may be the first half of one."""
    if b"\n" not in document.data[_end_of_lines(document.data) :]:
        logger.warning(
            "%s: there is no line end behind the last line; where the file was cut off, copy it "
            "again", document.path,
        )  # fmt: skip


def warn_of_same_files(files: Sequence[Mapping[str, Any]]) -> None:
    """Warn of splits that are copies of one another.

    Args:
        files: from `file_facts`; where one entry is of several files, names and checksums are
            joined by ``+``.
    """
    seen: dict[str, str] = {}
    for file in files:
        names, hashes = str(file["name"]).split("+"), str(file["sha256"]).split("+")
        for name, sha256 in zip(names, hashes, strict=True):
            if seen.setdefault(sha256, name) != name:
                logger.warning(
                    "%s has the same content as %s: one was copied into the place of the other",
                    name, seen[sha256],
                )  # fmt: skip


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
        blank = 0
        for values in reader:
            is_blank = not "".join(values).strip() and len(values) != len(columns)
            if is_blank:
                blank = blank or start  # an error where a row follows
            elif blank or len(values) != len(columns):
                found = [] if blank else values
                raise ValueError(
                    f"{document.path}, line {blank or start}: {len(found)} fields, expected "
                    f"{len(columns)} ({', '.join(columns)}); the row is truncated or a quote "
                    f"is missing: {shorten(found)}"
                )
            else:
                yield start, values
            start = reader.line_num + 1
    except csv.Error as error:
        reason = (
            "the file ends within a quoted field, so it is truncated"
            if "unexpected end of data" in str(error)
            else f"no valid CSV ({error})"
        )
        raise ValueError(
            f"{document.path}, line {start}: {reason}; mend the row, or copy the file again"
        ) from error


def read_tsv(
    document: Document,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    header: Sequence[str] | None = None,
    short: list[int] | None = None,
    named_by: str = "",
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, column -> value) of a tab-separated file without quoting.

    A quote is a character like any other, as in the GLUE files. Columns beyond those named are
    left out.

    Args:
        document: the file.
        required: columns that it must have.
        optional: columns that it may have.
        header: names of the columns of a file whose first line is a row; None takes the first line.
        short: numbers of the lines with fewer fields are put here, and the lines left out; None
            refuses them.
        named_by: the setting that names the required columns, for the message.

    Raises:
        ValueError: a required column is missing or one is twice in the header, or a row has more or
            fewer fields than it.
    """
    lines = read_lines(document)
    if header is None:
        header = header_of(document)
        next(lines)
    for column in (*required, *optional):
        if header.count(column) > 1 or (column in required and column not in header):
            problem = "no" if column not in header else "more than one"
            raise ValueError(
                f"{document.path}, line 1: {problem} column {column!r}; the header is "
                f"{shorten(list(header), 400)}, needed are {list(required)}"
                f"{f' ({named_by})' if named_by else ''}, separated by tabs; correct the one or "
                "the other"
            )
    wanted = [column for column in (*required, *optional) if column in header]
    for number, line in lines:
        values = line.split("\t")
        if short is not None and len(values) < len(header):
            short.append(number)
            continue
        if len(values) != len(header):
            raise ValueError(
                f"{document.path}, line {number}: {len(values)} fields, but the header has "
                f"{len(header)} ({', '.join(header)}); the row is truncated or has a tab within a "
                f"field, mend it or copy the file again: {shorten(line)}"
            )
        row = dict(zip(header, values, strict=True))
        yield number, {column: row[column] for column in wanted}


def header_of(document: Document) -> list[str]:
    """Return the fields of the first line of a tab-separated file."""
    return next(read_lines(document))[1].removeprefix("\ufeff").split("\t")


def read_parquet(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, column -> value) of a Parquet file.

    Raises:
        ValueError: it is no Parquet file, or a required column is missing.
    """
    import pyarrow.parquet

    check_file(path)
    with _as_damage(path, "Parquet file"):
        file = pyarrow.parquet.ParquetFile(path)
        wanted = _columns(path, file.schema_arrow.names, required, optional)
        batches = file.iter_batches(BLOCK, columns=wanted)
        # The file's order of columns is not the wanted one.
        rows = chain.from_iterable(batch.select(wanted).to_pylist() for batch in batches)
        yield from enumerate(rows, start=1)


def read_arrow(
    path: Path, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, column -> value) of a file of `datasets` (an Arrow stream).

    Raises:
        ValueError: it is no such file, or a required column is missing.
    """
    import pyarrow as pa

    check_file(path)
    with _as_damage(path, "Arrow stream of datasets"):
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        table.validate(full=True)  # offsets beyond the file would be followed
        wanted = _columns(path, table.schema.names, required, optional)
        batches = table.select(wanted).to_batches(max_chunksize=BLOCK)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from enumerate(rows, start=1)


def read_tables(
    paths: Sequence[Path], form: str, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and row, column -> value) of the files of a table.

    Args:
        paths: the files, in their order.
        form: ``parquet`` or ``arrow``.
        required: columns that each must have.
        optional: columns that they may have.

    Raises:
        ValueError: a file is damaged, has no rows, or lacks a required column.
    """
    read = {"parquet": read_parquet, "arrow": read_arrow}[form]
    for path in paths:
        number = 0
        for number, values in read(path, required, optional):
            yield f"{path}, row {number}", values
        if not number:
            raise ValueError(f"{path} has no rows; copy it again")


def _columns(
    path: Path, names: Sequence[str], required: Sequence[str], optional: Sequence[str]
) -> list[str]:
    """Return the columns of a table that are read."""
    wanted = [column for column in (*required, *optional) if column in names]
    missing = [column for column in required if column not in names]
    twice = [column for column in wanted if names.count(column) > 1]
    if missing or twice:
        raise ValueError(
            f"{path}: {'no' if missing else 'more than one'} column "
            f"{', '.join(missing or twice)}; it has {shorten(list(names), 400)}, needed once each "
            f"are {', '.join(required)}"
        )
    return list(dict.fromkeys(wanted))


@contextlib.contextmanager
def _as_damage(path: Path, what: str) -> Iterator[None]:
    """Say which file is damaged where Arrow does not."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = shorten(" ".join(str(error).split()), 200)
        raise ValueError(f"{path} is no {what}, or damaged: {reason}; copy it again") from error


def read_jsonl(
    document: Document,
    required: Sequence[str],
    optional: Sequence[str] = (),
    raw: Sequence[str] = (),
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, key -> text) of a file with one JSON object a line.

    An optional key may be null, which counts as missing. The values of `raw` are given as they are,
    where they are there. Other keys are left out.

    Raises:
        ValueError: a line is no JSON object, lacks a required key, or holds something else than
            text there.
    """
    for number, line in read_lines(document):
        place = f"{document.path}, line {number}"
        row = json_of(line, place)
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, got {shorten(line)}")
        if missing := [key for key in required if key not in row]:
            raise ValueError(
                f"{place}: no {', '.join(map(repr, missing))}; the object has "
                f"{shorten(list(row), 200)}; give every row its keys"
            )
        values: dict[str, Any] = {key: check_text(row[key], key, place) for key in required}
        for key in optional:
            if row.get(key) is not None:
                values[key] = check_text(row[key], key, place)
        yield number, values | {key: row[key] for key in raw if key in row}


def json_of(text: str, place: str, *, whole: bool = False) -> Any:
    """Return what JSON says.

    Args:
        text: of a line, or of a whole file.
        place: file and line, or the file.
        whole: whether it is a whole file, so that the error has to say the line.

    Raises:
        ValueError: it is no JSON, has a key twice in an object, or goes deeper than anyone reads.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(found)
        if len(names) < len(found):
            keys = [key for key, _ in found]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {shorten(twice)} is twice in one object")
        return names

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if whole else ""
        shown = "" if whole else f": {shorten(text)}"
        raise ValueError(
            f"{place}{line}: no valid JSON ({error.msg} at column {error.colno}); the file is "
            f"truncated or of another format, copy it again{shown}"
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{place}: the JSON is nested too deeply to be read: {shorten(text)}; it is damaged or "
            "of another format, copy it again"
        ) from error
    except ValueError as error:  # also of a number with thousands of digits
        raise ValueError(f"{place}: no valid JSON ({error}); mend it, or copy it again") from error


def check_text(value: object, key: str, place: str) -> str:
    """Return a value of JSON that must be a text.

    Args:
        value: from `json_of`.
        key: where it stands in the object.
        place: file and line or entry.

    Raises:
        ValueError: it is none, or holds what no text file can: half of a character, or NUL.
    """
    if not isinstance(value, str):
        raise ValueError(f"{place}: {key!r} is {shorten(value)}; expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {key!r} has half of a character ({error.object[error.start]!a}); "
            f"remove or mend the row: {shorten(value)}"
        ) from error
    if "\0" in value:
        raise ValueError(
            f"{place}: {key!r} has the character NUL, which no text has; remove or mend the row: "
            f"{shorten(value)}"
        )
    return value


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
