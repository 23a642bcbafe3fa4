"""The forms in which people have the files of a GLUE task, and their rows in the hub's columns.

A part of a split (``train``, ``dev``, ``dev_matched``, ``test``) is read from the first of these
that its folder holds; two forms of one part are refused:

- ``train.tsv`` with the hub's columns, or as in the archives of gluebenchmark.com: other names of
  columns (`OFFICIAL`), CoLA without a header, QQP with some broken rows, which the hub leaves out
  too;
- MRPC as Microsoft gives it, ``msr_paraphrase_train.txt`` and ``msr_paraphrase_test.txt``, with
  GLUE's ``dev_ids.tsv``, which tells train and dev apart;
- ``train.jsonl``, ``train-00000-of-00001.parquet`` (or ``train.parquet``), and a folder ``train``
  of `datasets.save_to_disk`, with the hub's columns; these call dev ``validation``.

The folder is `data_dir` or the one in it of the task's name; case and signs do not count, so that
``SST-2`` and ``QNLIv2`` are found.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.data import (
    Document,
    check_file,
    check_text,
    find_file,
    header_of,
    json_of,
    listing,
    read_document,
    read_jsonl,
    read_lines,
    read_tables,
    read_tsv,
    shorten,
    warn_if_cut,
)

logger = logging.getLogger(__name__)

LABEL = "label"
#: task -> the hub's column -> that of the official TSV files, where they differ.
OFFICIAL: dict[str, dict[str, str]] = {
    "mnli": {"premise": "sentence1", "hypothesis": "sentence2", LABEL: "gold_label"},
    "mrpc": {"sentence1": "#1 String", "sentence2": "#2 String", LABEL: "Quality"},
    "qqp": {LABEL: "is_duplicate"},
    "stsb": {LABEL: "score"},
}
#: columns of CoLA's official files, which have no header; the third is the author's mark.
_COLA = ("source", LABEL, "mark", "sentence")
_MSR_IDS = ("#1 ID", "#2 ID")
#: the official QQP file has fewer broken rows than one in so many.
_RARE = 1000

Rows = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Part:
    """The files of one part of a split.

    Attributes:
        form: ``tsv``, ``msr``, ``jsonl``, ``parquet`` or ``arrow``.
        paths: the files; of ``msr`` also ``dev_ids.tsv`` where it is needed.
    """

    form: str
    paths: tuple[Path, ...]


def task_folder(folder: Path, task: str) -> Path:
    """Return the folder of a task's name in `folder`, or `folder` where it has none.

    Raises:
        ValueError: it has several.
    """
    while True:
        if (folder / task).is_dir():
            folder = folder / task
            continue
        wanted = {_plain(task), f"{_plain(task)}v2"}
        named = [p for p in sorted(folder.iterdir()) if _plain(p.name) in wanted and p.is_dir()]
        if not named:
            return folder
        if len(named) > 1:
            raise ValueError(
                f"{folder} holds {' and '.join(p.name for p in named)}, which may both be GLUE "
                f"{task}; name the one that counts: task.data_dir={named[0]}"
            )
        folder = named[0]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def find(folder: Path, task: str, name: str) -> Part:
    """Return the files of a part of a split in the folder of a task.

    Args:
        folder: from `task_folder`.
        task: its name.
        name: of the part, for example ``dev_matched``.

    Raises:
        FileNotFoundError: there are none, or not all.
        ValueError: there are several forms.
    """
    hub = name.replace("dev", "validation")
    tsv = find_file(folder, f"{name}.tsv") or find_file(folder, f"{name}_subset.tsv")
    forms = {
        "tsv": (tsv,) if tsv else (),
        "msr": _find_msr(folder, name) if task == "mrpc" and not tsv else (),
        "jsonl": tuple(
            path
            for each in dict.fromkeys((name, hub))
            if (path := find_file(folder, f"{each}.jsonl"))
        ),
        "parquet": _find_parquet(folder, hub),
        "arrow": _find_saved(folder / hub),
    }
    found = [Part(form, paths) for form, paths in forms.items() if paths]
    if len(found) > 1 or (found and found[0].form == "jsonl" and len(found[0].paths) > 1):
        names = [path.name for part in found for path in part.paths]
        raise ValueError(
            f"{folder} holds {', '.join(names)}, all of which may be {name} of GLUE {task}; leave "
            "one form there"
        )
    if found:
        return found[0]
    msr = ", or msr_paraphrase_train.txt with dev_ids.tsv" if task == "mrpc" else ""
    raise FileNotFoundError(
        f"{folder} has no {name}.tsv or {name}_subset.tsv (plain or .gz){msr}, nor {hub}.jsonl, "
        f"{hub}-*.parquet or a folder {hub} of datasets.save_to_disk, which GLUE {task} needs; it "
        f"holds {listing(folder)}"
    )


def _find_msr(folder: Path, name: str) -> tuple[Path, ...]:
    if name == "test":
        path = find_file(folder, "msr_paraphrase_test.txt")
        return (path,) if path else ()
    path = find_file(folder, "msr_paraphrase_train.txt")
    ids = find_file(folder, "dev_ids.tsv")
    if path and not ids:
        raise FileNotFoundError(
            f"{folder} has {path.name} but no dev_ids.tsv, GLUE's list of those of its rows that "
            "are the dev set; add it, or take files that are split already (train.tsv, dev.tsv)"
        )
    return (path, ids) if path and ids else ()


def _find_parquet(folder: Path, hub: str) -> tuple[Path, ...]:
    """Return the one file or all shards of a split."""
    whole = folder / f"{hub}.parquet"
    shards = sorted(folder.glob(f"{hub}-*-of-*.parquet"))
    if not shards:
        check_file(whole)
        return (whole,) if whole.is_file() else ()
    for shard in shards:
        check_file(shard)
    if whole.exists():
        return (whole, *shards)
    match = re.fullmatch(r".*-of-(\d{1,6})", shards[0].stem)
    count = int(match[1]) if match else len(shards)
    expected = {f"{hub}-{n:05d}-of-{count:05d}.parquet" for n in range(count)}
    names = {path.name for path in shards}
    if names != expected:
        odd = sorted(names ^ expected)[:5]
        raise FileNotFoundError(
            f"{folder}: the Parquet files of {hub} are not {count} of one set ({', '.join(odd)} "
            "missing or too many); copy all of them again"
        )
    return tuple(shards)


def _find_saved(folder: Path) -> tuple[Path, ...]:
    """Return the files that `datasets.save_to_disk` has written for a split."""
    state = folder / "state.json"
    check_file(state)
    if not state.is_file():
        return ()
    content = json_of(read_document(state).text, str(state), whole=True)
    try:
        names = [entry["filename"] for entry in content["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{state} does not name the files of a data set ({type(error).__name__}: {error}); "
            "save it again with datasets.save_to_disk"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(
                f"{state} names {shorten(name)}: only files beside it are read; save it again"
            )
        check_file(folder / name)
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, which {state} names; copy it")
    if not names:
        raise ValueError(f"{state} names no file; save it again with datasets.save_to_disk")
    return tuple(folder / name for name in names)


def read(part: Part, task: str, name: str, columns: Sequence[str]) -> tuple[Rows, dict[str, Any]]:
    """Return the rows of a part, by the hub's columns, and what is to be recorded of its files.

    Args:
        part: from `find`.
        task: its name.
        name: of the part.
        columns: of text.

    Raises:
        ValueError: a file is damaged; rows do so when they are taken.
    """
    if part.form in ("parquet", "arrow"):
        required = columns if name.startswith("test") else (*columns, LABEL)
        tables = read_tables(part.paths, part.form, required, (LABEL,))
        return _texts(tables, columns), _facts(part.paths)
    document = read_document(part.paths[0])
    facts: dict[str, Any] = {
        "name": document.name, "sha256": document.sha256, "bytes": document.num_bytes
    }  # fmt: skip
    if part.form == "jsonl":
        rows = (
            (f"{document.path}, line {number}", values)
            for number, values in read_jsonl(document, columns, raw=(LABEL,))
        )
        return _texts(rows, columns), facts
    warn_if_cut(document)
    if part.form == "msr" and len(part.paths) > 1:
        ids = read_document(part.paths[1])
        return _msr(document, ids, columns, is_dev=name == "dev"), {
            **facts,
            "split_by": {"name": ids.name, "sha256": ids.sha256},
        }
    return _tsv(document, task, columns, facts, is_test=name.startswith("test")), facts


def _facts(paths: Sequence[Path]) -> dict[str, Any]:
    """Return what is to be recorded of files that are read by others; of several, joined by +."""
    contents = [path.read_bytes() for path in paths]
    return {
        "name": "+".join(path.name for path in paths),
        "sha256": "+".join(hashlib.sha256(content).hexdigest() for content in contents),
        "bytes": sum(map(len, contents)),
    }


def _texts(rows: Rows, columns: Sequence[str]) -> Rows:
    """Check the texts of rows that come from typed files."""
    for place, values in rows:
        for column in columns:
            check_text(values[column], column, place)
        yield place, values


def _tsv(
    document: Document, task: str, columns: Sequence[str], facts: dict[str, Any], *, is_test: bool
) -> Rows:
    """Yield the rows of a TSV file with the hub's columns or the official ones."""
    header = header_of(document)
    is_bare = task == "cola" and len(header) == len(_COLA) and header[1] in ("0", "1")
    header = list(_COLA) if is_bare else header
    official = OFFICIAL.get(task, {})
    theirs = {c: c if c in header else official.get(c, c) for c in (*columns, LABEL)}
    # Of a header that is neither's, the message names the hub's columns.
    theirs |= {column: column for column in columns if theirs[column] not in header}
    short: list[int] | None = [] if task == "qqp" and theirs[LABEL] != LABEL else None
    texts = [theirs[column] for column in columns]
    rows = read_tsv(
        document,
        texts if is_test else (*texts, theirs[LABEL]),
        (theirs[LABEL],),
        header=header if is_bare else None,
        short=short,
        named_by=f"task.columns={list(columns)}",
    )
    count = 0
    for number, values in rows:
        count += 1
        found = {ours: values[name] for ours, name in theirs.items() if name in values}
        yield f"{document.path}, line {number}", found
    if short and len(short) * _RARE > count:
        raise ValueError(
            f"{document.path}, line {short[0]}: fewer fields than the header's {len(header)} "
            f"({', '.join(header)}), and so in {len(short)} of {count + len(short)} rows; in the "
            f"official file fewer than one row in {_RARE} is broken: copy it again"
        )
    if short:
        facts["left_out"] = len(short)
        logger.warning(
            "%s: %d rows with fewer fields than the header's %d are left out, as in the hub's "
            "release (first: line %d)", document.path, len(short), len(header), short[0],
        )  # fmt: skip


def _msr(document: Document, ids: Document, columns: Sequence[str], *, is_dev: bool) -> Rows:
    """Yield the rows of Microsoft's training file that are of train, or of dev."""
    chosen = set()
    for number, line in read_lines(ids):
        pair = tuple(line.split("\t"))
        if len(pair) != len(_MSR_IDS) or not all(each.strip().isdecimal() for each in pair):
            raise ValueError(
                f"{ids.path}, line {number}: {shorten(line)}; expected the two numbers of a pair "
                "of sentences, separated by a tab; copy it again"
            )
        chosen.add(tuple(each.strip() for each in pair))
    official = OFFICIAL["mrpc"]
    theirs = {column: official.get(column, column) for column in (*columns, LABEL)}
    unseen = set(chosen)
    for number, values in read_tsv(document, (*theirs.values(), *_MSR_IDS)):
        pair = tuple(values[name] for name in _MSR_IDS)
        unseen.discard(pair)
        if (pair in chosen) == is_dev:
            found = {ours: values[name] for ours, name in theirs.items()}
            yield f"{document.path}, line {number}", found
    if unseen:
        raise ValueError(
            f"{ids.path} names {len(unseen)} pairs that {document.path} does not have (first: "
            f"{' and '.join(min(unseen))}); one of the two is not whole: copy them again"
        )
