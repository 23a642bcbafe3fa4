"""The files of a GLUE task: which they are, and how they become rows.

The pinned files of the hub are Parquet; what people have in a folder of their own has many forms,
see `tasks.glue_layouts`. Every mistake is reported with file and line.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks import glue_layouts as layouts
from tasks.data import read_parquet, shorten, warn_of_same_files
from tasks.rows import Rows, gather
from tasks.sources import Source

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
#: split -> start of the names of its TSV files.
TSV_NAMES = {"train": "train", "validation": "dev", "test": "test"}
#: what the hub and many files write where a label is hidden.
HIDDEN = "-1"
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?(e-?[0-9]+)?")


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        id: part and row number, for example ``dev_matched-0017``.
        texts: one or two sentences.
        label: class number, or a real number in a regression; None where it is hidden.
        part: which part of the split it is of (``matched``), or an empty text.
    """

    id: str
    texts: tuple[str, ...]
    label: float | None
    part: str


@dataclass(frozen=True, kw_only=True)
class GlueFiles:
    """The files of one task.

    Attributes:
        source: where they come from.
        task: its name, also that of the folder of its files.
        columns: one or two columns of text.
        labels: names of the classes in the order of their numbers; None for a regression.
        num_rows: rows of the complete files, by file name without suffix.
        parts: names of the parts of the dev and test set, or empty.
        splits: those that are read.
    """

    source: Source
    task: str
    columns: Sequence[str]
    labels: Sequence[str] | None
    num_rows: Mapping[str, int]
    parts: Sequence[str]
    splits: Sequence[str]

    def check(self) -> None:
        """Check that every file is there or can be downloaded, see `Source.check`."""
        self.source.check(
            lambda folder: [
                self._find(name, folder) for split in self.splits for name in self._names(split)
            ]
        )

    def read(self) -> tuple[dict[str, Rows[Row]], list[dict[str, Any]]]:
        """Return the rows of each split, and what is to be recorded of each file.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or has a row or label that is not allowed.
        """
        with self.source.open() as folder:
            found = {split: self._read_split(split, folder) for split in self.splits}
        files = [facts for _, files in found.values() for facts in files]
        warn_of_same_files(files)
        return {split: rows for split, (rows, _) in found.items()}, files

    def _names(self, split: str) -> list[str]:
        """Return the names of the files of a split, without their endings."""
        parts = self.parts if self.parts and split != "train" else ("",)
        return [f"{TSV_NAMES[split]}_{part}" if part else TSV_NAMES[split] for part in parts]

    def _read_split(self, split: str, folder: Path) -> tuple[Rows[Row], list[dict[str, Any]]]:
        """Return the rows of all parts of a split, and what is to be recorded of each file."""
        read = self._read_hub if self.source.kind == "hub" else self._read_own
        tables, files = [], []
        for name in self._names(split):
            part = name.removeprefix(TSV_NAMES[split]).removeprefix("_")
            found, facts = read(name, folder)
            table = self._table(name, part, split, found)
            # None: of a test set with labels, GLUE gives no number of rows to compare with.
            is_complete = len(table) == self.num_rows[name] if name in self.num_rows else None
            if is_complete is False and self.source.kind == "files":
                logger.warning(
                    "GLUE %s: %s has %d rows, the complete one %d: its scores are no GLUE scores",
                    self.task, facts["name"], len(table), self.num_rows[name],
                )  # fmt: skip
            files.append({**facts, "rows": len(table), "complete": is_complete})
            tables.append(table)
            self._warn_of_one_label(facts["name"], table)
        rows = Rows(pa.concat_tables(tables), _make_row)
        if split == "test":
            self._check_hidden(rows)
        return rows, files

    def _table(
        self, name: str, part: str, split: str, found: Iterable[tuple[str, Mapping[str, Any]]]
    ) -> pa.Table:
        """Return the rows of a part, with the columns that `_make_row` takes."""
        texts = text_columns(len(self.columns))
        label = pa.float64() if self.labels is None else pa.int64()
        schema = pa.schema([*((text, pa.string()) for text in texts), ("label", label)])
        table = gather(
            (
                {
                    **{text: values[c] for text, c in zip(texts, self.columns, strict=True)},
                    "label": self._label(values, split, place),
                }
                for place, values in found
            ),
            schema,
        )
        width = math.floor(math.log10(max(len(table), 1))) + 1
        ids = pa.array([f"{name}-{index:0{width}d}" for index in range(len(table))], pa.string())
        table = table.add_column(0, "part", pa.repeat(part, len(table)))
        return table.add_column(0, "id", ids)

    def _read_own(self, name: str, folder: Path) -> tuple[layouts.Rows, dict[str, Any]]:
        part = self._find(name, folder)
        found, facts = layouts.read(part, self.task, name, self.columns)

        def rows() -> layouts.Rows:
            place = None
            for place, values in found:
                for column in self.columns:
                    if not values[column].strip():
                        raise ValueError(
                            f"{place}: {column} is empty; the row is truncated: mend it, or copy "
                            "the file again"
                        )
                yield place, values
            if place is None:
                raise ValueError(f"{part.paths[0]} has a header but no rows; copy it again")

        return rows(), facts

    def _find(self, name: str, folder: Path) -> layouts.Part:
        """Return the files of a part of a split, see `tasks.glue_layouts`."""
        return layouts.find(layouts.task_folder(folder, self.task), self.task, name)

    def _read_hub(
        self, name: str, folder: Path
    ) -> tuple[Iterator[tuple[str, dict[str, Any]]], dict[str, Any]]:
        hub_name = name.replace(TSV_NAMES["validation"], "validation")
        file = f"{self.task}/{hub_name}-00000-of-00001.parquet"
        path = folder / file
        rows = (
            (f"{path}, row {number}", values)
            for number, values in read_parquet(path, (*self.columns, "label"))
        )
        facts = {"name": file, "sha256": self.source.official(file), "bytes": path.stat().st_size}
        return rows, facts

    def _label(self, values: Mapping[str, Any], split: str, place: str) -> float | None:
        value = values.get("label")
        text = HIDDEN if value is None else str(value).strip()
        if split == "test" and (not text or text in (HIDDEN, f"{HIDDEN}.0")):
            return None
        if self.labels is not None:
            names = {name: number for number, name in enumerate(self.labels)}
            names |= {str(number): number for number in range(len(self.labels))}
            if text not in names:
                allowed = ", ".join(f"{n} ({name})" for n, name in enumerate(self.labels))
                raise ValueError(
                    f"{place}: label {shorten(text)} of GLUE {self.task}; allowed: {allowed}"
                )
            return names[text]
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not 0 <= number <= 5:
            raise ValueError(
                f"{place}: label {shorten(text)} of GLUE {self.task}; allowed: a number from 0 to 5"
            )
        return number

    def _warn_of_one_label(self, name: str, table: pa.Table) -> None:
        """Warn of a file from which nothing can be learnt, and which tells nothing of a model."""
        labels = pc.unique(table["label"])
        if len(table) > 1 and len(labels) == 1 and labels[0].is_valid:
            label = labels[0].as_py()
            named = f"{label:g}" if self.labels is None else self.labels[label]
            logger.warning(
                "GLUE %s: all %d rows of %s have the label %s: nothing can be learnt from them, "
                "and no score of them means anything", self.task, len(table), name, named,
            )  # fmt: skip

    def _check_hidden(self, rows: Sequence[Row]) -> None:
        hidden = sum(row.label is None for row in rows)
        if 0 < hidden < len(rows):
            raise ValueError(
                f"GLUE {self.task}: {hidden} of {len(rows)} test rows have no label; give all of "
                "them one, or none"
            )
        if hidden:
            logger.warning(
                "GLUE %s: the test set has no labels; predictions are written, nothing is scored",
                self.task,
            )


def text_columns(count: int) -> list[str]:
    """Return the names of the columns of text in a table of rows."""
    return [f"text_{number}" for number in range(count)]


def _make_row(id: str, part: str, *values: Any) -> Row:
    *texts, label = values
    return Row(id, tuple(texts), label, part)
