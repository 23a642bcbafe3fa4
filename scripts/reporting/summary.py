"""A table or figure for the terminal: what a person reads when the runs have ended.

Methods and controls with mean and interval, the best marked, verdicts in words, where the files
are. The files say the rest (the paper's numbers, resources, every part of a claim).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.reporting import stats
from scripts.reporting.figures import SERIES_LABELS
from scripts.reporting.formats import scope_lines, stands_alone
from scripts.reporting.marks import BEST, TIED, mark_best
from scripts.reporting.spec import SERIES

Results = Mapping[str, Any]

WIDTH = 100
#: columns between two cells.
_GAP = "  "
#: a label is wrapped rather than narrower than this.
_LEAST_LABEL = 26
_BEST, _TIED = "*", "~"


@dataclass(frozen=True)
class _Column:
    """One score: its head, its decimals, its sign (+1: higher is better, 0: no direction)."""

    label: str
    decimals: int
    sign: int


@dataclass(frozen=True)
class _Row:
    """One method: its label and, by column, the value of each seed."""

    label: str
    is_control: bool
    values: Sequence[Mapping[int, float]]
    state: str


def summary(content: Results, paths: Sequence[Path], width: int = WIDTH) -> str:
    """Return a table or figure as lines of at most `width` columns.

    Args:
        content: from `build_results` or `build_figure`.
        paths: the files that hold it, named at the end.
        width: of the terminal; at least 60 columns.

    Returns:
        The lines; a path or a single word that is longer than `width` stays whole.

    Raises:
        ValueError: `width` is below 60.
    """
    if width < 60:
        raise ValueError(f"width={width}: a table needs at least 60 columns")
    columns, rows = _figure(content) if "figure" in content else _table(content)
    lines = _head(content, width)
    for block in _blocks(columns, rows, width):
        lines += ["", *block]
    lines += ["", *_wrap(_legend(columns, rows, "figure" in content), width)]
    for reason in _reasons(content):
        lines += _wrap(reason, width, "  ! ")
    if content["claims"]:
        lines += ["", f"Claims of the paper, judged at scale {content['scale']}"]
        for claim in content["claims"]:
            text = f"{claim['verdict']}: {claim['statement']} ({_parts(claim)})"
            lines += _wrap(text, width, f"  {claim['id']}  ", "      ")
    if paths:
        lines += ["", *_files(paths, width)]
    return "\n".join(lines) + "\n"


def _head(content: Results, width: int) -> list[str]:
    kind = "Figure" if "figure" in content else "Table"
    title = f"{kind} {content['number']}: {content['title']} (scale: {content['scale']})"
    lines = _wrap(title, width)
    if stands_alone(content):
        for line in scope_lines(content):
            lines += _wrap(line, width)
    elif content["scale"] != "paper":
        lines += _wrap("These are not the paper's numbers: other models on other data.", width)
    elif content["overrides"]:
        lines += _wrap("Settings differ from the paper's.", width)
    num_done = sum(len(row["runs"]) for row in content["rows"])
    num_all = num_done + sum(len(row["absent"]) for row in content["rows"])
    facts = f"{num_done} of {num_all} runs finished; seeds {_list(content['seeds'])}"
    if content["overrides"]:
        facts += f"; overrides {' '.join(content['overrides'])}"
    return lines + _wrap(facts, width)


def _table(content: Results) -> tuple[list[_Column], list[_Row]]:
    specs = content["column_specs"]
    columns = [
        _Column(s["label"], s["decimals"], 1 if s["better"] == "higher" else -1) for s in specs
    ]
    rows = [
        _Row(
            row["label"],
            row["is_control"],
            [_by_seed(row["metrics"][spec["name"]]) for spec in specs],
            _state(row),
        )
        for row in content["rows"]
    ]
    return columns, rows


def _figure(content: Results) -> tuple[list[_Column], list[_Row]]:
    """Return the similarity of each weight, by seed the mean over the blocks."""
    columns = [_Column(SERIES_LABELS[role], 3, 0) for role in SERIES]
    rows = [
        _Row(
            row["label"],
            row["is_control"],
            [_mean_of([_by_seed(block) for block in row["series"][role]]) for role in SERIES],
            _state(row),
        )
        for row in content["rows"]
    ]
    return columns, rows


def _by_seed(cell: Mapping[str, Any]) -> dict[int, float]:
    return {int(seed): value for seed, value in cell["values"].items()}


def _mean_of(blocks: Sequence[Mapping[int, float]]) -> dict[int, float]:
    if not blocks:
        return {}
    seeds = sorted(set.intersection(*map(set, blocks)))
    return {seed: stats.summarize(block[seed] for block in blocks).mean for seed in seeds}


def _state(row: Mapping[str, Any]) -> str:
    """Return what a cell without a value says."""
    if row["runs"]:
        return "–"
    return "failed" if any(item["state"] == "failed" for item in row["absent"]) else "not run"


def _marks(column: _Column, values: Sequence[Mapping[int, float]]) -> list[str]:
    """Return the sign of each row in one column: the best, what is not distinguishable, or none."""
    signs = {BEST: _BEST, TIED: _TIED, None: ""}
    return [signs[mark] for mark in mark_best(values, column.sign)]


def _cell(column: _Column, values: Mapping[int, float], state: str) -> str:
    if not values:
        return state
    found = stats.summarize(values.values())
    mean = f"{found.mean:.{column.decimals}f}"
    half = found.half_width
    return mean if half is None else f"{mean} ±{half:.{column.decimals}f}"


def _blocks(columns: Sequence[_Column], rows: Sequence[_Row], width: int) -> list[list[str]]:
    """Return the table, split by columns into as few blocks as fit, of about the same size."""
    cells: list[list[str]] = []  # by column: its head, then a cell a row
    for i, column in enumerate(columns):
        values = [row.values[i] for row in rows]
        marks = _marks(column, values)
        shown = [_cell(column, v, row.state) for v, row in zip(values, rows, strict=True)]
        # The mark has a place of its own, so that the numbers stand one below the other.
        texts = [f"{text}{mark or ' '}" for text, mark in zip(shown, marks, strict=True)]
        longest = max(map(len, [f"{column.label} ", *texts]))
        cells.append([text.rjust(longest) for text in [f"{column.label} ", *texts]])
    widths = [len(_GAP) + len(column[0]) for column in cells]
    longest_label = max([len(row.label) for row in rows] + [len("Control")])
    room = width - min(longest_label, _LEAST_LABEL)
    blocks = []
    for chosen in _split(widths, room):
        label_width = min(longest_label, width - sum(widths[i] for i in chosen))
        blocks.append(_block([cells[i] for i in chosen], rows, label_width))
    return blocks


def _split(widths: Sequence[int], room: int) -> list[list[int]]:
    """Return the columns of each block: the least number of blocks, then the most even one."""
    for num_blocks in range(1, len(widths) + 1):
        size, more = divmod(len(widths), num_blocks)
        sizes = [size + (i < more) for i in range(num_blocks)]
        starts = [sum(sizes[:i]) for i in range(num_blocks)]
        chosen = [list(range(start, start + n)) for start, n in zip(starts, sizes, strict=True)]
        if all(sum(widths[i] for i in block) <= room for block in chosen):
            return chosen
    return [[i] for i in range(len(widths))]


def _block(cells: Sequence[Sequence[str]], rows: Sequence[_Row], label_width: int) -> list[str]:
    def line(label: str, texts: Iterable[str]) -> str:
        return (label.ljust(label_width) + "".join(_GAP + text for text in texts)).rstrip()

    total = label_width + sum(len(_GAP) + len(column[0]) for column in cells)
    lines = [line("Method", (column[0] for column in cells)), "-" * total]
    is_control = False
    for i, row in enumerate(rows, start=1):
        if row.is_control and not is_control:
            is_control = True
            lines.append("Controls " + "-" * (total - len("Controls ")))
        first, *rest = _wrap_label(row.label, label_width)
        lines.append(line(first, (column[i] for column in cells)))
        lines += rest
    return lines


def _wrap_label(label: str, width: int) -> list[str]:
    """Wrap a label, but not within a short pair of brackets: (1 + λ)."""
    held = re.sub(r"\([^()]{1,12}\)", lambda match: match[0].replace(" ", "\0"), label)
    lines = textwrap.wrap(held, width, subsequent_indent="  ")
    return [line.replace("\0", " ") for line in lines]


def _legend(columns: Sequence[_Column], rows: Sequence[_Row], is_figure: bool) -> str:
    most = max((len(values) for row in rows for values in row.values), default=0)
    if most == 0:
        return "No run has finished."
    text = "Mean over seeds"
    if most >= 2:
        text += " ± half of the 95 % interval (Student t)"
    if is_figure:
        return f"{text} of the cosine similarity of W before and after, mean over the blocks."
    if most < 2:
        return f"{text}; {_BEST} best. One seed has no interval and decides nothing."
    text += f"; {_BEST} best of its column; {_TIED} not distinguishable from it (paired, 95 %)"
    lower = [column.label for column in columns if column.sign < 0]
    return f"{text}." + (f" Lower is better: {', '.join(lower)}." if lower else "")


def _reasons(content: Results) -> list[str]:
    """Return why cells are empty: runs without a record, scores that could not be made."""
    lost: dict[tuple[str, str, str], list[int]] = {}
    unscored: dict[str, None] = {}
    for row in content["rows"]:
        for item in row["absent"]:
            run = f" on {item['run']}" if len(content["tasks"]) > 1 else ""
            state = {"missing": "not run", "partial": "not finished"}.get(item["state"])
            key = (row["label"] + run, state or item["state"], " ".join(item["reason"].split()))
            lost.setdefault(key, []).append(item["seed"])
        for spec in content.get("column_specs", []):
            for reason in row["metrics"][spec["name"]]["missing"]:
                unscored[" ".join(reason.split())] = None  # it begins with the column's label
    lines = [
        f"{name}, seed {_list(seeds)}: {state}{': ' if reason else ''}{reason[:300]}"
        for (name, state, reason), seeds in lost.items()
    ]
    return [*lines, *unscored]


def _parts(claim: Mapping[str, Any]) -> str:
    if len(claim["parts"]) == 1:
        return str(claim["reason"])
    return f"{len(claim['parts'])} parts: {claim['reason']}"


def _files(paths: Sequence[Path], width: int) -> list[str]:
    """Return where the files are, one line a folder and name: ``results/tiny/table1.{md,csv}``."""
    suffixes: dict[Path, list[str]] = {}
    for path in paths:
        suffixes.setdefault(path.with_suffix(""), []).append(path.suffix.removeprefix("."))
    return [
        line
        for stem, found in suffixes.items()
        for line in _wrap(f"{stem}.{{{','.join(found)}}}", width, "wrote ")
    ]


def _list(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items))


def _wrap(text: str, width: int, first: str = "", rest: str | None = None) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first) if rest is None else rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
