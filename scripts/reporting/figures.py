"""Make Figure 3 from run records: how alike W_Q and W_V are before and after training, per block.

The same records give the same bytes (PNG and SVG: with the same matplotlib). Data stand beside the
picture: ``figure3.json`` with every run's values, ``figure3.csv``, ``figure3.md``.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_lora.writing import make_folder, whole, write_text
from scripts.reporting import stats
from scripts.reporting.formats import UNDECIDED, claims_table, head_lines, md_table
from scripts.reporting.results import Entry, absent, facts_of, shown_spec
from scripts.reporting.scope import check_one_model
from scripts.reporting.spec import SERIES, Part, TableSpec

#: role -> block -> seed -> cosine similarity.
Curves = dict[str, list[dict[int, float]]]
SERIES_LABELS = {"query": "W_Q", "value": "W_V"}
#: colour-blind safe (Okabe and Ito), with markers so that print works too.
STYLES = (("#000000", "s"), ("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "v"))


def build_figure(
    spec: TableSpec,
    scale: str,
    seeds: Sequence[int],
    extra: Sequence[str],
    entries: Sequence[Entry],
) -> dict[str, Any]:
    """Return the content of ``results/<scale>/<figure>.json``; arguments as `build_results`."""
    check_one_model(spec.name, [entry.cell for entry in entries])
    facts = facts_of(spec, scale, seeds, extra, entries)
    spec = shown_spec(spec, scale, extra, entries)[0]
    curves = {row.name: _curves(row.name, entries) for row in spec.rows}
    rows = []
    for row in spec.rows:
        mine = [entry for entry in entries if entry.cell.row == row.name]
        rows.append(
            {
                "method": row.name,
                "label": row.label,
                "is_control": row.is_control,
                "series": {
                    role: [_summary(values) for values in curves[row.name][role]] for role in SERIES
                },
                "runs": [entry.record["signature"] for entry in mine if entry.record is not None],
                "absent": absent(mine),
            }
        )
    return {
        "figure": spec.name,
        **facts,
        "rows": rows,
        "claims": [
            _judge(claim.id, claim.statement, claim.status, claim.parts, spec, curves)
            for claim in spec.claims
        ],
    }


def _curves(row: str, entries: Sequence[Entry]) -> Curves:
    curves: Curves = {role: [] for role in SERIES}
    for entry in entries:
        if entry.cell.row != row or entry.record is None:
            continue
        found: dict[str, list[float]] = {role: [] for role in SERIES}
        for name, value in entry.record["cosine_similarity"].items():
            role = name.rpartition(".")[2]
            if role in found:
                found[role].append(value)
        for role, values in found.items():
            while len(curves[role]) < len(values):
                curves[role].append({})
            for block, value in enumerate(values):
                curves[role][block][entry.cell.seed] = value
    return curves


def _summary(values: Mapping[int, float]) -> dict[str, Any]:
    summary = stats.summarize(values[seed] for seed in sorted(values))
    return {
        "mean": summary.mean,
        "std": summary.std,
        "n": summary.n,
        "ci95": None if summary.ci95 is None else list(summary.ci95),
        "values": {str(seed): values[seed] for seed in sorted(values)},
    }


def _judge(
    claim_id: str,
    statement: str,
    status: str,
    parts: Sequence[Part],
    spec: TableSpec,
    curves: Mapping[str, Curves],
) -> dict[str, Any]:
    """Judge "highest (lowest) in most blocks": the share of blocks, minus one half, over seeds."""
    judged: list[dict[str, Any]] = []
    for part in parts:
        for role in part.columns:
            shares = _shares(part, role, curves)
            summary = stats.summarize(shares.values()) if shares else None
            judgement = stats.judge_difference(summary, claims_positive=True)
            others = " and ".join(spec.row(name).label for name in part.against)
            judged.append(
                {
                    "statement": (
                        f"{spec.row(part.row).label} {part.expect} of all against {others}, "
                        f"{SERIES_LABELS[role]} (share of blocks)"
                    ),
                    "row": part.row,
                    "against": list(part.against),
                    "column": role,
                    "measure": "share of blocks, minus one half",
                    "difference": None if summary is None else summary.mean,
                    "ci95": None if summary is None or summary.ci95 is None else [*summary.ci95],
                    "n": 0 if summary is None else summary.n,
                    "verdict": judgement.verdict,
                    "reason": judgement.reason,
                    "paper_difference": None,
                }
            )
    overall = stats.combine([stats.Judgement(p["verdict"], p["reason"]) for p in judged])
    return {
        "id": claim_id,
        "statement": statement,
        "difference": None,
        "ci95": None,
        "verdict": overall.verdict,
        "reason": overall.reason,
        "status": status,
        "parts": judged,
    }


def _shares(part: Part, role: str, curves: Mapping[str, Curves]) -> dict[int, float]:
    """Return, by seed, the share of blocks where `part.row` is strictly the extreme, less half."""
    sign = 1.0 if part.expect == "highest" else -1.0
    mine = curves[part.row][role]
    others = [curves[name][role] for name in part.against]
    if not mine or any(len(other) != len(mine) for other in others):
        return {}
    seeds = set.intersection(*(set(block) for curve in (mine, *others) for block in curve))
    return {
        seed: sum(
            all(sign * (mine[b][seed] - other[b][seed]) > 0 for other in others)
            for b in range(len(mine))
        )
        / len(mine)
        - 0.5
        for seed in sorted(seeds)
    }


def figure_to_markdown(results: Mapping[str, Any]) -> str:
    """Return the figure's page: what it was made on, the picture, the values, the verdict."""
    lines = head_lines(results)
    lines += ["", f"![Figure {results['number']}: {results['title']}]({results['figure']}.svg)", ""]
    lines.append(
        "Mean over seeds; bars: 95 % interval. 1 means that the weight did not turn at all."
    )
    num_blocks = max(len(row["series"][role]) for row in results["rows"] for role in SERIES)
    head = ["Method", "Weight", *(f"Block {block + 1}" for block in range(num_blocks))]
    body = [
        [
            row["label"],
            SERIES_LABELS[role],
            *(f"{block['mean']:.6f}" for block in row["series"][role]),
            *[""] * (num_blocks - len(row["series"][role])),
        ]
        for row in results["rows"]
        for role in SERIES
    ]
    lines += ["", *md_table(head, body)]
    if results["claims"]:
        lines += ["", "## Claims of the paper", "", *claims_table(results), ""]
        lines.append(
            "Reproduced: the 95 % interval over seeds of the share of blocks lies wholly above one "
            f"half (most blocks); not reproduced: wholly below; {UNDECIDED}"
        )
    return "\n".join(lines) + "\n"


def figure_to_csv(results: Mapping[str, Any]) -> str:
    """Return one line per method, weight and block."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["figure", "scale", "method", "weight", "block", "mean", "std", "n"])
    for row in results["rows"]:
        for role in SERIES:
            for block, value in enumerate(row["series"][role], start=1):
                numbers = [value["mean"], value["std"], value["n"]]
                head = [results["figure"], results["scale"], row["method"], role, block]
                writer.writerow([*head, *numbers])
    return stream.getvalue()


def write_figure(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the data to ``folder/<figure>.{json,csv,md}``; return the files."""
    make_folder(folder)
    name = results["figure"]
    content = {
        "json": json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "csv": figure_to_csv(results),
        "md": figure_to_markdown(results),
    }
    return [write_text(folder / f"{name}.{suffix}", text) for suffix, text in content.items()]


def draw_figure(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw one panel a weight: block on the x axis, cosine similarity on the y axis."""
    title = f"Figure {results['number']}: does W keep its direction? {scale_note(results)}"
    with picture(folder / results["figure"], size=(7.2, 3.4), title=title) as (figure, paths):
        panels = figure.subplots(1, len(SERIES), sharey=True)
        for panel, role in zip(panels, SERIES, strict=True):
            _draw_series(panel, results["rows"], role)
            panel.set_title(math_label(SERIES_LABELS[role]))
            panel.set_xlabel("Attention block")
        panels[0].set_ylabel("Cosine similarity\nof $W_0$ and $W^*$")
        # Below the panels: inside it would hide an interval.
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return paths


def try_to_draw(
    draw: Callable[[Mapping[str, Any], Path], list[Path]],
    results: Mapping[str, Any],
    folder: Path,
    name: str,
) -> list[Path]:
    """Draw a picture, which decides nothing: where that fails, say so and go on without it.

    Args:
        draw: `draw_figure`, `draw_forest` or `draw_key_rows`.
        results: what it draws.
        folder: where it draws.
        name: of the picture. An older one is removed where the new one fails.

    Returns:
        The files; none where drawing failed.
    """
    try:
        return draw(results, folder)
    except Exception as error:
        print(f"no picture {name}: {type(error).__name__}: {error}", file=sys.stderr)
        for suffix in (".svg", ".png"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
        return []


def _draw_series(panel: Any, rows: Sequence[Mapping[str, Any]], role: str) -> None:
    """Draw one curve a row, moved sideways a little, so that no mark hides another's interval."""
    num_blocks = max((len(row["series"][role]) for row in rows), default=0)
    for number, (row, (colour, marker)) in enumerate(zip(rows, STYLES, strict=False)):
        blocks = row["series"][role]
        shift = 0.05 * (number - (len(rows) - 1) / 2)
        panel.errorbar(
            [block + 1 + shift for block in range(len(blocks))],
            [block["mean"] for block in blocks],
            yerr=[b["ci95"][1] - b["mean"] if b["ci95"] else 0.0 for b in blocks],
            color=colour, marker=marker, markersize=4, linewidth=1, capsize=2,
            label=math_label(row["label"]),
        )  # fmt: skip
    if num_blocks:
        panel.set_xlim(0.7, num_blocks + 0.3)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)


def scale_note(results: Mapping[str, Any]) -> str:
    """Return what a picture says of the scale of its runs."""
    if results["scale"] == "paper":
        other = ", not the paper's model" if "other_model" in results else ""
        return f"(scale: paper{other})"
    return f"(scale: {results['scale']}, not the paper's numbers)"


def math_label(text: str) -> str:
    """Return `text` with W_Q and W_V set as mathematics."""
    return re.sub(r"\bW_([A-Z])\b", r"$W_\1$", text)


@contextlib.contextmanager
def picture(stem: Path, *, size: tuple[float, float], title: str) -> Iterator[tuple[Any, list]]:
    """Give an empty figure to draw on and a list, which then holds its SVG and its PNG.

    The same drawing gives the same bytes with the same matplotlib.

    Args:
        stem: of the files, without suffix; its folder exists.
        size: width and height in inches.
        title: above the panels.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.hashsalt": "delta_lora", "svg.fonttype": "none", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure, paths = Figure(figsize=size, layout="constrained"), list[Path]()
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        yield figure, paths
        for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            path = stem.with_name(f"{stem.name}.{suffix}")
            with whole(path) as temporary:
                figure.savefig(temporary, metadata=metadata, dpi=150, format=suffix)
            paths.append(path)
