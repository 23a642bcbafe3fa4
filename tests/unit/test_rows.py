"""Rows as Arrow columns: they read as a sequence of objects."""

from __future__ import annotations

import pyarrow as pa
import pytest

from tasks import rows
from tasks.rows import Rows, gather

SCHEMA = pa.schema([("name", pa.string()), ("number", pa.int64())])
VALUES = [{"name": f"é{n}", "number": n} for n in range(7)] + [{"number": 7}]
EXPECTED = [(value.get("name"), value["number"]) for value in VALUES]


def make(*values: object) -> tuple[object, ...]:
    return values


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Rows[tuple[object, ...]]:
    monkeypatch.setattr(rows, "BLOCK", 3)
    table = gather(iter(VALUES), SCHEMA)
    assert table["name"].num_chunks == 3
    return Rows(table, make)


def test_rows_are_a_sequence(found: Rows[tuple[object, ...]]) -> None:
    assert len(found) == 8
    assert list(found) == EXPECTED
    assert [found[n] for n in range(-8, 8)] == EXPECTED * 2
    for part in (slice(2, 5), slice(None, 3), slice(6, 99), slice(None, None, -2), slice(3, 3)):
        assert list(found[part]) == EXPECTED[part]
    with pytest.raises(IndexError):
        found[8]


def test_rows_are_equal_to_what_has_the_same_objects(found: Rows[tuple[object, ...]]) -> None:
    assert found == EXPECTED
    assert found == Rows(gather(VALUES, SCHEMA), make)
    assert found != EXPECTED[:-1]
    assert found != [*EXPECTED[:-1], ("é7", 7)]
    assert found != 8


def test_no_rows_give_an_empty_table() -> None:
    assert gather([], SCHEMA).schema == SCHEMA
    assert list(Rows(gather([], SCHEMA), make)) == []


class Counted(dict):
    """A row that counts how many of its kind exist at once."""

    alive = most = 0

    def __init__(self, **values: object) -> None:
        super().__init__(values)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self) -> None:
        Counted.alive -= 1


def test_rows_are_objects_only_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BLOCK", 5)
    table = gather((Counted(name=str(n), number=n) for n in range(100)), SCHEMA)
    assert len(table) == 100
    assert 5 <= Counted.most <= 10
