"""The three rows that the project turns on, for README: LoRA, Delta-LoRA, LoRA at alpha (1 + λ).

From the content of ``table1.json``: ``key_rows.md`` and the picture ``key_rows.{svg,png}``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.reporting import stats
from scripts.reporting.figures import picture, scale_note
from scripts.reporting.forest import draw_panel
from scripts.reporting.formats import md_table

Results = Mapping[str, Any]

TABLE = "table1"
#: the row that is compared, and the rows that it is compared to.
ROW, OTHERS = "delta_lora", ("lora", "lora_scaled")
NAME = "key_rows"


def find_rows(results: Results) -> list[Mapping[str, Any]]:
    """Return the three rows, or nothing where the table lacks one or one has no score."""
    rows = [row for row in results["rows"] if row["method"] in (ROW, *OTHERS)]
    has_all = len(rows) == 1 + len(OTHERS)
    return rows if has_all and all(_scores(row) for row in rows) else []


def to_markdown(results: Results, verdicts: Sequence[str]) -> str:
    """Return the three rows, how they differ, and how many claims have which verdict.

    Args:
        results: the content of Table 1, with the three rows.
        verdicts: of every claim that was judged at this scale.
    """
    rows = find_rows(results)
    specs = results["column_specs"]
    head = [f"E2E, scale {results['scale']}", *(spec["label"] for spec in specs)]
    body = [
        [row["label"], *(_number(row["metrics"][s["name"]], s["decimals"]) for s in specs)]
        for row in rows
    ]
    lines = [*md_table(head, body), ""]
    lines += [f"- {_difference(rows, other, specs)}" for other in OTHERS]
    counts = Counter(verdicts)
    found = ", ".join(f"{counts[verdict]} {verdict}" for verdict in stats.VERDICTS)
    lines.append(f"- Of {len(verdicts)} claims that were judged at this scale: {found}.")
    return "\n".join(lines) + "\n"


def draw_key_rows(results: Results, folder: Path) -> list[Path]:
    """Draw the three rows to ``folder/key_rows.{svg,png}``; return the files."""
    rows, specs = find_rows(results), results["column_specs"]
    title = f"E2E: mean over {len(results['seeds'])} seeds, 95 % interval {scale_note(results)}"
    with picture(folder / NAME, size=(9.0, 1.6), title=title) as (figure, paths):
        panels = figure.subplots(1, len(specs), squeeze=False)[0]
        for number, (panel, spec) in enumerate(zip(panels, specs, strict=True)):
            draw_panel(panel, rows, spec, has_labels=number == 0, far=math.inf)
            panel.locator_params(axis="x", nbins=4)
    return paths


def _scores(row: Mapping[str, Any]) -> int:
    return sum(cell["n"] > 0 for cell in row["metrics"].values())


def _number(cell: Mapping[str, Any], decimals: int) -> str:
    if cell["n"] == 0:
        return "–"
    mean = f"{cell['mean']:.{decimals}f}"
    if cell["ci95"] is None:
        return mean
    return f"{mean} ± {(cell['ci95'][1] - cell['ci95'][0]) / 2:.{decimals}f}"


def _difference(
    rows: Sequence[Mapping[str, Any]], other: str, specs: Sequence[Mapping[str, Any]]
) -> str:
    """Return in words in how many scores `ROW` is better than `other`, by paired intervals."""
    by_name = {row["method"]: row for row in rows}
    found: Counter[str] = Counter()
    for spec in specs:
        mine, theirs = (by_name[name]["metrics"][spec["name"]]["values"] for name in (ROW, other))
        difference = stats.paired_difference(
            {int(seed): value for seed, value in mine.items()},
            {int(seed): value for seed, value in theirs.items()},
        )
        judgement = stats.judge_difference(difference, claims_positive=spec["better"] == "higher")
        found[judgement.verdict] += 1
    words = {
        stats.REPRODUCED: "better in {}",
        stats.NOT_REPRODUCED: "worse in {}",
        stats.UNDECIDED: "not distinguishable in {}",
    }
    text = ", ".join(words[verdict].format(found[verdict]) for verdict in words if found[verdict])
    labels = [by_name[name]["label"] for name in (ROW, other)]
    return f"{labels[0]} against {labels[1]}: {text} of {len(specs)} scores."
