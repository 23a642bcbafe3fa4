"""Which parameters of a long test `make test` tries; `make faults` tries all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], number: int = 1) -> list[Any]:
    """Return parameters of which all but the first `number` are of the long tests."""
    return [
        value if place < number else pytest.param(value, marks=pytest.mark.long)
        for place, value in enumerate(values)
    ]


def firsts(rows: Iterable[tuple[Any, ...]], number: int = 1) -> list[Any]:
    """Return the same of several parameters a test."""
    return [
        row if place < number else pytest.param(*row, marks=pytest.mark.long)
        for place, row in enumerate(rows)
    ]
