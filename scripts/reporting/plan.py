"""What a table still needs, in words: its cells, their state, and what they cost."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from scripts.reporting.scope import Other
from scripts.reporting.spec import TableSpec
from scripts.runs.cells import Cell
from scripts.runs.costs import Cost, estimate
from scripts.runs.durations import Durations, format_seconds
from scripts.runs.run import Status
from scripts.runs.space import disk_need, gib

WIDTH = 100


def describe(spec: TableSpec, cells: Sequence[Cell], states: Mapping[str, Status]) -> list[str]:
    """Return the plan of a table as lines: totals, then every row that is not done.

    Args:
        spec: the table.
        cells: from `scripts.runs.cells.list_cells`.
        states: state by signature.
    """
    counts = Counter(states[cell.signature].state for cell in cells)
    order = ["done", "partial", "stale", "failed", "missing"]
    if counts["damaged"]:
        order.append("damaged")
    totals = ", ".join(f"{counts[state]} {state}" for state in order)
    lines = [f"{spec.name}: {len(cells)} runs: {totals}"]
    for row in spec.rows:
        mine = [cell for cell in cells if cell.row == row.name]
        open_cells = [cell for cell in mine if states[cell.signature].state != "done"]
        if not open_cells:
            continue
        if all(states[cell.signature].state == "missing" for cell in mine):
            lines.append(f"  {row.name}: {len(mine)} missing")
            continue
        lines.append(f"  {row.name}: {len(mine) - len(open_cells)} of {len(mine)} done")
        for cell in open_cells:
            status = states[cell.signature]
            reason = " ".join(status.reason.split())
            if status.state != "damaged":  # there the path and what to do must be whole
                reason = reason[:200]
            reason = f" ({reason})" if reason else ""
            lines.append(f"    {cell.on}, seed {cell.seed}: {status.state}{reason}")
    return lines


def describe_scope(other: Other | None) -> list[str]:
    """Return what is said of a table of another model than its own; nothing of its own."""
    if other is None:
        return []
    text = (
        f"{other.name}, not the paper's model: without the paper's numbers and verdicts, in the "
        f"folder {other.folder} of the scale"
    )
    return _wrapped("model", text)


def describe_refusals(refused: Iterable[tuple[Cell, str]]) -> list[str]:
    """Return which rows can only fail, one line each reason, with a last empty one.

    Args:
        refused: a cell of each such row, and why.
    """
    by_reason: dict[str, list[str]] = {}
    for cell, reason in refused:
        by_reason.setdefault(" ".join(reason.split()), []).append(f"{cell.row} on {cell.on}")
    lines = [f"would be refused: {', '.join(rows)}: {why}" for why, rows in by_reason.items()]
    return [*lines, ""] if lines else []


def describe_costs(todo: Sequence[Cell], num_workers: int, durations: Durations) -> list[str]:
    """Return what open runs cost, as lines of at most 100 characters; none where there is no run.

    Args:
        todo: the open runs of a table.
        num_workers: runs that work at the same time.
        durations: earlier runs on this machine, which count before any estimate.
    """
    if not todo:
        return []
    costs = [estimate(item.run.config) for item in todo]
    lines = [
        ("time", _time(todo, costs, num_workers, durations)),
        ("memory", _memory(todo, costs)),
        ("disk", _disk(todo, num_workers)),
    ]
    return [line for name, text in lines if text for line in _wrapped(name, text)]


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"  {name:<8}", subsequent_indent=" " * 10,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _time(
    todo: Sequence[Cell],
    costs: Sequence[Cost],
    num_workers: int,
    durations: Durations,
) -> str:
    """Return the time of the runs: from earlier runs where there are some, else by estimate."""
    earlier, estimated, unknown = [], [], []
    for item, cost in zip(todo, costs, strict=True):
        seconds = durations.expect(item.run)
        if seconds is not None:
            earlier.append(seconds)
        elif cost.seconds is not None:
            estimated.append((cost.seconds, cost.device, cost.basis))
        else:
            unknown.append(cost.basis)
    parts = []
    if earlier:
        parts.append(
            f"{format_seconds(sum(earlier) / num_workers)} for {len(earlier)} runs, from earlier "
            "runs on this machine"
        )
    for device in dict.fromkeys(device for _, device, _ in estimated):
        mine = [(seconds, basis) for seconds, name, basis in estimated if name == device]
        whole = sum(seconds for seconds, _ in mine)
        bases = "; ".join(dict.fromkeys(basis for _, basis in mine))
        parts.append(
            f"{format_seconds(whole)} of one {device} for {len(mine)} runs, one at a time "
            f"({bases}; without scoring, reading data and writing checkpoints)"
        )
    if unknown:
        reasons = "; ".join(dict.fromkeys(unknown))
        parts.append(f"unknown for {len(unknown)} runs: none of their kind was made, and {reasons}")
    return "; ".join(parts)


def _memory(todo: Sequence[Cell], costs: Sequence[Cost]) -> str:
    """Return the largest peak of device memory and whose it is; empty where all run on a CPU."""
    known = [(c.device_bytes, c, item) for c, item in zip(costs, todo, strict=True)
             if c.device_bytes is not None]  # fmt: skip
    if not known:
        return ""
    size, cost, item = max(known, key=lambda entry: entry[0])
    missing = len(todo) - len(known)
    rest = f"; unknown for {missing} runs" if missing else ""
    return (
        f"at most {gib(size)} of device memory for one run: {item.row} on {item.on}, "
        f"while {cost.device_peak}{rest}"
    )


def _disk(todo: Sequence[Cell], num_workers: int) -> str:
    """Return the disk at peak and after, and what has to be downloaded."""
    need = disk_need(todo, num_workers)
    if need.unknown == len(todo):
        return ""
    peak, kept = gib(need.peak), gib(need.kept)
    text = f"at most {peak} with {num_workers} worker(s), {kept} when all is done"
    if need.unknown:
        text += f"; unknown for {need.unknown} runs"
    sizes = [
        f"{name} {gib(size) if size is not None else '(size unknown)'}"
        for name, size in need.downloads.items()
    ]
    return f"{text}; to download: {', '.join(sizes)}" if sizes else text
