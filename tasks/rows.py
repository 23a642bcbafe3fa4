"""Rows of a data set as Arrow columns: every text stands once, as UTF-8, and outside of Python.

A Python object for each row of MNLI or XSum, with its strings, takes several times the size of the
texts. Here a row becomes an object when it is read, and is gone afterwards. Where the columns come
from a file that is mapped into memory, they take none of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar, overload

import pyarrow as pa

T = TypeVar("T")

#: rows that are Python objects at the same time.
BLOCK = 4096


class Rows(Sequence[T], Generic[T]):
    """A table of Arrow, read as a sequence of objects.

    Args:
        table: the columns.
        make: called with the values of one row, in the order of the columns.
    """

    def __init__(self, table: pa.Table, make: Callable[..., T]) -> None:
        self.table = table
        self._make = make

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Rows[T]: ...
    def __getitem__(self, index: int | slice) -> T | Rows[T]:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            if chosen.step == 1:
                return Rows(self.table.slice(chosen.start, len(chosen)), self._make)
            return Rows(self.table.take(list(chosen)), self._make)
        at = range(len(self))[index]
        return self._make(*(column[at].as_py() for column in self.table.columns))

    def take(self, places: Sequence[int]) -> Rows[T]:
        """Return the rows at some places, in their order."""
        return Rows(self.table.take(list(places)), self._make)

    def __iter__(self) -> Iterator[T]:
        for batch in self.table.to_batches(max_chunksize=BLOCK):
            columns = [column.to_pylist() for column in batch.columns]
            yield from map(self._make, *columns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


def gather(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return `rows` as a table, of which only `BLOCK` are Python objects at a time.

    Args:
        rows: column -> value; a column that a row lacks is null there.
        schema: names and types of the columns.
    """
    stream = iter(rows)
    batches = []
    while block := list(islice(stream, BLOCK)):
        batches.append(pa.RecordBatch.from_pylist(block, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)
