"""The view of a sweep as text: Markdown, CSV, and lines for the terminal."""

from __future__ import annotations

import csv
import io
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from scripts.reporting.formats import head_lines, md_table
from scripts.sweeping.content import CHOSEN_ON, SHOWN

Content = Mapping[str, Any]
BEST, TIED, CHOSEN = "★", "·", "◆"
WIDTH = 100
#: states of runs in the order in which they are told.
STATES = ("done", "failed", "refused", "held", "partial", "stale", "missing")
WORDS = {"held": "held by another process", "missing": "not run", "partial": "not finished"}
LEFT = "another process works on it; the same command takes it up later"
HOW_TO_READ = (
    "Mean over seeds ± half of the 95 % interval (Student t); in brackets the number of seeds. "
    f"{BEST} best mean. {TIED} not distinguishable from the best: paired t test over common seeds, "
    f"corrected for the number of cells (Holm), at 5 %. {CHOSEN} chosen: best on the validation "
    "split. The best of many cells looks better than it is, on the split that it is the best of; "
    "a test score of a chosen cell has had no part in its choice."
)
SAME_SPLIT = "**Chosen and scored on the same split** (no labels of a test split are public): "


def score_name(content: Content, experiment: str, measure: str) -> str:
    """Return what a score is called: ``BLEU, test split``."""
    score = content["scores"][experiment][measure]
    lower = " (lower is better)" if score["better"] == "lower" else ""
    return f"{score['label']}, {score['split']} split{lower}"


def cell_state(row: Mapping[str, Any]) -> str:
    """Return the state of a cell without a value, in a word or two."""
    states = {run["state"] for run in row["all_runs"]}
    state = next((s for s in STATES[1:] if s in states), "done")
    return "no score" if state == "done" else {"held": "held"}.get(state, WORDS.get(state, state))


def cell_text(content: Content, number: int, measure: str, *, has_n: bool = True) -> str:
    """Return a cell as ``37.31 ± 2.20 (3)``, or its state."""
    row = content["rows"][number]
    summary = row[measure]
    if summary["n"] == 0:
        return cell_state(row)
    decimals = content["scores"][row["experiment"]][measure]["decimals"]
    text = f"{summary['mean']:.{decimals}f}"
    if summary["half"] is not None:
        text += f" ± {summary['half']:.{decimals}f}"
    return f"{text} ({summary['n']})" if has_n else text


def marks(panel: Mapping[str, Any], number: int, measure: str) -> str:
    """Return the marks of a cell."""
    best = panel["best"][measure]
    text = BEST if number == best["cell"] else TIED if number in best["tied"] else ""
    return text + (CHOSEN if number in [c["cell"] for c in panel["chosen"]] else "")


# ---------------------------------------------------------------------- files


def to_csv(content: Content) -> str:
    """Return one line a run: its place, its state, every score."""
    rows = content["rows"]
    names = sorted({name for row in rows for run in row["all_runs"] for name in run["scores"]})
    axes = [axis["name"] for axis in content["axes"]]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["sweep", "scale", "experiment", "method", "is_reference", *axes, "seed", "signature",
         "state", "validation_metric", CHOSEN_ON, *names]
    )  # fmt: skip
    for row in rows:
        for run in row["all_runs"]:
            writer.writerow(
                [content["sweep"], content["scale"], row["experiment"], row["method"],
                 int(row["is_reference"]), *(row["values"].get(axis) for axis in axes),
                 run["seed"], run["signature"], run["state"],
                 content["scores"][row["experiment"]][CHOSEN_ON]["name"], run[CHOSEN_ON],
                 *(run["scores"].get(name) for name in names)]
            )  # fmt: skip
    return stream.getvalue()


def to_pivot(content: Content) -> str:
    """Return the heat maps as CSV: one line a line, cells as the page has them."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    first = content["axes"][0]
    writer.writerow(
        ["panel", "score", "line", *(f"{first['label']} = {v}" for v in first["values"])]
    )
    for panel in content["panels"]:
        before = f"{panel['row']} = " if panel["row"] else ""
        for measure in (SHOWN, CHOSEN_ON):
            score = score_name(content, panel["experiment"], measure)
            for number, (label, *texts) in enumerate(_pivot(content, panel, measure)[1]):
                is_grid = number < len(panel["lines"])
                name = f"{before}{label}" if is_grid else label
                writer.writerow([panel_title(panel), score, name, *texts])
    return stream.getvalue()


def to_markdown(content: Content) -> str:
    """Return the page: facts, picture, the chosen cells, every number, what is missing."""
    lines = head_lines(content)
    lines += [
        "",
        f"![{content['title']}: heat maps and profiles; the numbers stand below](sweep.svg)",
    ]
    lines += ["", HOW_TO_READ]
    for panel in content["panels"]:
        lines += ["", f"## {panel_title(panel)}", "", *chosen_lines(content, panel)]
        if content["scores"][panel["experiment"]][SHOWN]["split"] == "validation":
            lines += ["", f"{SAME_SPLIT}the score of a chosen cell is too good by its choice."]
        for measure in (SHOWN, CHOSEN_ON):
            lines += ["", f"### {score_name(content, panel['experiment'], measure)}", ""]
            lines += md_table(*_pivot(content, panel, measure))
    absent = list(absent_lines(content))
    if absent:
        lines += ["", "## Not there", "", *(f"- {_escape(line)}" for line in absent)]
    lines += ["", f"Every run with all its scores: [sweep.csv](sweep.csv). {state_line(content)}."]
    return "\n".join(lines) + "\n"


def panel_title(panel: Mapping[str, Any]) -> str:
    """Return the name of a panel."""
    return ": ".join(filter(None, [panel["experiment"], panel["title"]]))


def _pivot(
    content: Content, panel: Mapping[str, Any], measure: str
) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the grid, and of the references below it."""
    corner = " \\ ".join(filter(None, [panel["row"], panel["column"]]))
    head = [corner, *panel["columns"]]
    lines = []
    for label, cells in zip(panel["lines"], panel["grid"], strict=True):
        texts = [f"{cell_text(content, c, measure)} {marks(panel, c, measure)}" for c in cells]
        lines.append([label, *(text.strip() for text in texts)])
    for reference in panel["references"]:
        texts = [cell_text(content, cell, measure) for cell in reference["cells"]]
        if len(texts) == 1:
            texts += [""] * (len(panel["columns"]) - 1)
        lines.append([reference["label"], *texts])
    return head, lines


def chosen_lines(content: Content, panel: Mapping[str, Any]) -> list[str]:
    """Return, by method, what is chosen on the validation split and how good it is."""
    lines = []
    for chosen in panel["chosen"]:
        if chosen["cell"] is None:
            continue
        row = content["rows"][chosen["cell"]]
        score = content["scores"][row["experiment"]][SHOWN]
        lines.append(
            f"- Chosen: **{row['label']}**: {score_name(content, row['experiment'], CHOSEN_ON)} "
            f"{cell_text(content, chosen['cell'], CHOSEN_ON)}; "
            f"{score_name(content, row['experiment'], SHOWN)} "
            f"{cell_text(content, chosen['cell'], SHOWN)}. {_certainty(chosen)}"
        )
        for item in chosen["against"]:
            label, decimals = content["rows"][item["cell"]]["label"], score["decimals"]
            text = f"{score['label']} {item['difference']:+.{decimals}f}"
            if item["ci95"] is not None:
                low, high = item["ci95"]
                text += f" (95 % interval {low:+.{decimals}f} to {high:+.{decimals}f})"
            lines.append(f"  - against {label}: {text}; common seeds: {item['n']}")
    return lines or ["- No cell has a score of the validation split."]


def _certainty(chosen: Mapping[str, Any]) -> str:
    """Return how far the choice is more than chance."""
    if chosen["of"] == 1:
        return "It is the only cell."
    if chosen["compared"] == 0:
        return "One seed decides nothing: no cell is compared with it."
    return (
        f"Not distinguishable from it on the validation split: {len(chosen['tied'])} of the "
        f"{chosen['compared']} cells that it is compared with."
    )


def _escape(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")


# ---------------------------------------------------------------------- what is missing


def state_counts(content: Content) -> Counter[str]:
    """Return how many runs are in which state; equal runs count once."""
    states: dict[Any, str] = {}
    for row in content["rows"]:
        for run in row["all_runs"]:
            key = run["signature"] or (row["point"], row["experiment"], run["seed"])
            states[key] = run["state"]
    return Counter(states.values())


def state_line(content: Content) -> str:
    """Return how many runs are in which state: ``9 done, 1 failed``."""
    counts = state_counts(content)
    known = [state for state in STATES if counts[state]]
    return ", ".join(f"{counts[state]} {WORDS.get(state, state)}" for state in known)


def absent_lines(content: Content) -> Iterator[str]:
    """Yield one line for every cell with runs that are not done, and why."""
    for row in content["rows"]:
        reasons: dict[tuple[str, str], list[int]] = {}
        for item in row["absent"]:
            key = (item["state"], " ".join(item["reason"].split())[:300])
            reasons.setdefault(key, []).append(item["seed"])
        for (state, reason), seeds in reasons.items():
            seed = "seed" if len(seeds) == 1 else "seeds"
            name = f"{row['label']} on {row['experiment']}, {seed} {', '.join(map(str, seeds))}"
            yield f"{name}: {WORDS.get(state, state)}{': ' if reason else ''}{reason}"


def last_line(content: Content) -> str:
    """Return how many runs are in which state, and the names of those that are not done."""
    line = state_line(content)
    absent = [text.partition(": ")[0] for text in absent_lines(content)]
    return f"{line}: {'; '.join(absent)}" if absent else line


def damaged_lines(content: Content) -> list[str]:
    """Return what is damaged, and what to do, of each run whose record cannot be read."""
    runs = (run for row in content["rows"] for run in row["all_runs"])
    return list(dict.fromkeys(run["reason"] for run in runs if run["state"] == "damaged"))


def terminal(content: Content) -> str:
    """Return the view for the terminal: the grid of the test score, and what is chosen."""
    lines = [f"Sweep {content['sweep']}: {content['title']} (scale: {content['scale']})"]
    for panel in content["panels"]:
        lines += ["", f"{panel_title(panel)}: {score_name(content, panel['experiment'], SHOWN)}"]
        head, body = _pivot(content, panel, SHOWN)
        table = [head, *body]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        for line in table:
            first, *rest = [t.ljust(w) for t, w in zip(line, widths, strict=True)]
            lines.append("  ".join([first, *rest]).rstrip())
        for text in chosen_lines(content, panel):
            lines += textwrap.wrap(text.replace("**", ""), WIDTH, subsequent_indent="    ")
    words = f"{BEST} best; {TIED} not distinguishable from it (paired, Holm); {CHOSEN} chosen "
    return "\n".join([*lines, "", f"{words}on the validation split"]) + "\n"
