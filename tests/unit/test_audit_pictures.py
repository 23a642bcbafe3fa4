"""The committed pictures of the audit hide nothing and cut nothing off."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from scripts.auditing.pictures import (
    HEIGHT,
    PICTURES,
    TALL,
    WIDTH,
    as_mathematics,
    power_of_ten,
    side_by_side,
)

pytest.importorskip("matplotlib")

PAGE = Path(__file__).resolve().parents[2] / "results" / "tiny" / "audit.json"
SECTIONS = json.loads(PAGE.read_text(encoding="utf-8"))["sections"]


@pytest.fixture(scope="module", params=SECTIONS, ids=lambda section: section["key"])
def figure(request: pytest.FixtureRequest) -> Any:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    key = request.param["key"]
    with mpl.rc_context({"font.size": 9}):
        made = Figure(figsize=(WIDTH, TALL if key == "equivalence" else HEIGHT),
                      layout="constrained")  # fmt: skip
        FigureCanvasAgg(made)
        PICTURES[key](made, request.param["picture"])
        made.suptitle(as_mathematics(request.param["title"]), fontsize=9)
        made.canvas.draw()
        yield made


def test_a_legend_stands_beside_the_panels(figure: Any) -> None:
    assert figure.legends
    for panel in figure.axes:
        assert panel.get_legend() is None
        for legend in figure.legends:
            assert not legend.get_window_extent().overlaps(panel.get_window_extent())


def test_nothing_is_cut_off(figure: Any) -> None:
    box = figure.get_tightbbox()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()


def test_names_are_words_and_mathematics(figure: Any) -> None:
    from matplotlib.text import Text

    texts = [t.get_text() for t in figure.findobj(Text)]
    raw = [t for t in texts if "_" in t and "$" not in t]
    assert not raw


def test_no_two_marks_of_different_names_stand_on_one_place(figure: Any) -> None:
    for panel in figure.axes:
        named = [line for line in panel.lines if not line.get_label().startswith("_child")]
        seen: dict[tuple[float, ...], str] = {}
        for line in named:
            if line.get_marker() in ("None", "", None):
                continue
            for x, y in panel.transData.transform(line.get_xydata()):
                place = (round(x), round(y))
                assert seen.setdefault(place, line.get_label()) == line.get_label()


def test_marks_that_share_a_place_are_spread_evenly() -> None:
    offsets = [side_by_side(number, 4, 0.8) for number in range(4)]
    assert sum(offsets) == pytest.approx(0)
    assert all(b - a == pytest.approx(0.2) for a, b in pairwise(offsets))
    assert side_by_side(0, 1, 0.8) == 0


def test_numbers_and_matrices_become_mathematics() -> None:
    assert power_of_ten(2e-5) == r"$2\times10^{-5}$"
    assert as_mathematics("W_Q and W_V, W, BA, DWARF") == "$W_Q$ and $W_V$, $W$, $BA$, DWARF"
    assert as_mathematics("AdamW (eps 1e-08)") == "AdamW (eps $10^{-8}$)"
