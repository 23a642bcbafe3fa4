"""A share of the training examples: drawn by the seed, stated, and part of a run's name."""

from __future__ import annotations

import pytest

from scripts.runs.building import draw_rows
from scripts.runs.run import Run

ROWS = list(range(200))


def test_a_share_is_random_nested_and_repeatable() -> None:
    few, more = draw_rows(ROWS, 0.05, 1), draw_rows(ROWS, 0.2, 1)
    assert len(few) == 10
    assert len(more) == 40
    assert set(few) < set(more)
    assert few == sorted(few)
    assert few != ROWS[:10]
    assert few == draw_rows(ROWS, 0.05, 1)
    assert few != draw_rows(ROWS, 0.05, 2)


def test_no_share_and_the_whole_are_all_rows() -> None:
    assert draw_rows(ROWS, None, 1) is ROWS
    assert draw_rows(ROWS, 1.0, 1) == ROWS
    assert len(draw_rows(ROWS, 1e-9, 1)) == 1


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan"), "half"])
def test_a_bad_share_is_named(fraction: object) -> None:
    with pytest.raises((ValueError, TypeError), match="train_fraction"):
        draw_rows(ROWS, fraction, 1)  # type: ignore[arg-type]


def test_a_share_names_another_run_and_none_the_same() -> None:
    base = ["task=e2e", "method=lora", "scale=tiny"]
    plain = Run.compose(base).name
    assert Run.compose([*base, "train_fraction=null"]).name == plain
    assert Run.compose([*base, "train_fraction=0.05"]).name != plain
