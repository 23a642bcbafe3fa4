"""The view of a study: its trials as data and as a page. `study_pictures` draws it.

A study has one seed, so nothing here is an interval or a test. What it says of the best trial is
what one run can say.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_lora.writing import write_text
from scripts.reporting.figures import try_to_draw
from scripts.reporting.formats import head_lines, md_table
from scripts.reporting.results import Entry, facts_of
from scripts.reporting.spec import Row, TableSpec
from scripts.runs.cells import Cell
from scripts.sweeping.content import CHOSEN_ON, SHOWN, all_scores, values_of
from scripts.sweeping.page import SAME_SPLIT, WIDTH, WORDS, score_name
from scripts.sweeping.search import Trial
from scripts.sweeping.study_pictures import draw_study

if TYPE_CHECKING:
    from scripts.sweeping.study import Study

Content = Mapping[str, Any]
STATES = ("done", "pruned", "failed", "refused", "held", "missing")
HOW_TO_READ = (
    "A trial is one run with one seed; the sampler chose its setting from the validation scores of "
    "earlier trials. Pruned: given up at an evaluation where it was worse than most; it has no "
    "score of the test split, and the validation score shown is that of its last evaluation, which "
    "cannot be compared with those of finished runs. A setting that learns slowly at first may be "
    "pruned unjustly."
)


def build_study(study: Study, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the content of ``study.json``; scores are in the units of the tables.

    Args:
        study: the study.
        trials: those to show.

    Raises:
        ValueError: the records must not stand together (data, protocol, task version).
    """
    on, first = str(study.first.choices.task), study.first
    cells = {t.number: Cell(f"trial {t.number}", on, study.run_of(t) or first) for t in trials}
    entries = []
    for trial in trials:
        cell = cells[trial.number]
        record = cell.run.record() if trial.state == "done" else None
        entries.append(Entry(cell, record, trial.state, trial.reason))
    space = study.search.space
    title = f"search over {', '.join(d.label for d in space)}"
    spec = TableSpec(
        name=study.name, kind="table", number="", title=title,
        tuning="what is searched; the best trial is chosen on the validation split",
        runs={on: tuple(study.fixed)}, columns=(),
        rows=tuple(Row(e.cell.row, e.cell.row, (), False) for e in entries),
        claims=(), contrasts=(), paper={"title": title, "rows": {}},
    )  # fmt: skip
    scale, seed = str(first.choices.scale), first.seed
    extra = [o for o in study.fixed if o.partition("=")[0] not in ("seed", "scale")]
    rows = [
        _row(study, trial, entry, study.scores)
        for trial, entry in zip(trials, entries, strict=True)
    ]
    settings = study.search.settings
    return {
        "sweep": study.name,
        **facts_of(spec, scale, [seed], extra, entries),
        "study": {key: value for key, value in study.identity.items() if key not in ("space",)},
        "n_trials": settings.n_trials,
        "axes": [d.describe() for d in space],
        "experiment": on,
        "scores": {on: study.scores},
        "trials": rows,
        "best": _best(rows, study.scores[CHOSEN_ON]["better"]),
        "again": _again(study, rows),
        "rows": [
            {"runs": [row["signature"]] if row["state"] == "done" else [],
             "absent": [] if row["state"] == "done" else [row["state"]]}
            for row in rows
        ],
    }  # fmt: skip


def _row(study: Study, trial: Trial, entry: Entry, scores: Mapping[str, Any]) -> dict[str, Any]:
    space = study.search.space
    scale = scores[CHOSEN_ON]["scale"]
    values = {d.key: d.text(trial.params[d.key]) for d in space}
    run = study.run_of(trial)
    known = [value for value in trial.curve if math.isfinite(value)]
    last = known[-1] if known and trial.state == "pruned" else None
    return {
        "trial": trial.number,
        "label": ", ".join(f"{d.label} = {_short(values[d.key])}" for d in space),
        "values": values,
        "params": dict(trial.params),
        "signature": None if run is None else run.name,
        "state": trial.state,
        "reason": " ".join(trial.reason.split())[:300],
        "step": trial.step,
        "evaluations": len(trial.curve),
        "last": None if last is None else last * scale,
        **values_of(entry.record, scores),
        "scores": all_scores(entry.record, scores),
    }


def _short(text: str) -> str:
    """Return a number in four digits, any other text as it is."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def _best(rows: Sequence[Mapping[str, Any]], better: str) -> int | None:
    """Return the number of the trial with the best validation score, the first of equal ones."""
    known = [row for row in rows if row[CHOSEN_ON] is not None]
    sign = -1.0 if better == "higher" else 1.0
    return min(known, key=lambda row: sign * row[CHOSEN_ON], default={"trial": None})["trial"]


def _again(study: Study, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the command that runs the best trial with three other seeds."""
    best = _best(rows, study.scores[CHOSEN_ON]["better"])
    if best is None:
        return None
    values = rows[best]["values"]
    fixed = [o for o in study.fixed if not o.startswith("seed=")]
    seeds = ",".join(str(study.first.seed + i) for i in (1, 2, 3))
    own = [f"{key}={value}" for key, value in values.items()]
    return f"python scripts/train.py -m {shlex.join([*fixed, *own])} seed={seeds}"


def write_study(content: Content, folder: Path) -> list[Path]:
    """Write ``folder/study.{json,csv,md,svg,png}``; return the files."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return [
        write_text(folder / "study.json", text),
        write_text(folder / "study.csv", to_csv(content)),
        write_text(folder / "study.md", to_markdown(content)),
        *try_to_draw(draw_study, content, folder, "study"),
    ]


# ---------------------------------------------------------------------- files


def to_csv(content: Content) -> str:
    """Return one line a trial: its setting, its state, every score."""
    rows = content["trials"]
    names = sorted({name for row in rows for name in row["scores"]})
    axes = [axis["key"] for axis in content["axes"]]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["study", "scale", "experiment", "trial", *axes, "seed", "signature", "state",
         "pruned_at_step", "evaluations", "reason", "validation_metric", CHOSEN_ON,
         "last_validation_of_pruned", *names]
    )  # fmt: skip
    metric = content["scores"][content["experiment"]][CHOSEN_ON]["name"]
    for row in rows:
        writer.writerow(
            [content["sweep"], content["scale"], content["experiment"], row["trial"],
             *(row["values"][axis] for axis in axes), content["seeds"][0], row["signature"],
             row["state"], row["step"], row["evaluations"], row["reason"], metric, row[CHOSEN_ON],
             row["last"], *(row["scores"].get(name) for name in names)]
        )  # fmt: skip
    return stream.getvalue()


def to_markdown(content: Content) -> str:
    """Return the page: facts, picture, the best trial and what it is worth, every trial."""
    on = content["experiment"]
    lines = [*head_lines(content), f"- Search: {_search(content)}"]
    lines += ["", f"![{content['title']}: scores by setting; the numbers stand below](study.svg)"]
    lines += ["", HOW_TO_READ, "", "## Best trial", ""]
    lines += [f"- {text}" for text in best_lines(content)]
    if content["again"]:
        lines += ["", "```bash", content["again"], "```"]
    if content["scores"][on][SHOWN]["split"] == "validation":
        lines += ["", f"{SAME_SPLIT}the score of the best trial is too good by its choice."]
    head = ["trial", *(axis["label"] for axis in content["axes"]), "state"]
    head += [score_name(content, on, measure) for measure in (CHOSEN_ON, SHOWN)]
    body = [_table_line(content, row) for row in _ordered(content)]
    lines += ["", "## All trials, the best first", "", *md_table(head, body)]
    absent = [row for row in content["trials"] if row["state"] not in ("done", "pruned")]
    if absent:
        lines += ["", "## Not there", ""]
        lines += [f"- {_escape(_absent(row))}" for row in absent]
    lines += ["", f"Every trial with all its scores: [study.csv](study.csv). "
              f"{state_line(content)}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _search(content: Content) -> str:
    """Return in words how trials were chosen."""
    own = content["study"]
    pruned = "none is given up"
    if own["pruner"] == "median":
        pruned = (
            f"given up where worse than the median of {own['pruner_startup']} or more earlier ones"
        )
    return (
        f"Optuna's sampler {own['sampler']}, seed {own['seed']}, {own['n_jobs']} trials chosen "
        f"together; {pruned}"
    )


def best_lines(content: Content) -> list[str]:
    """Return what the best trial is, and how little one run says of it."""
    if content["best"] is None:
        return ["No trial is done."]
    on, row = content["experiment"], content["trials"][content["best"]]
    texts = [
        f"{score_name(content, on, measure)} {_number(content, row[measure], measure)}"
        for measure in (CHOSEN_ON, SHOWN)
    ]
    num_done = sum(each["state"] == "done" for each in content["trials"])
    num_runs = len({each["signature"] for each in content["trials"] if each["state"] == "done"})
    of = f"{num_done} finished trials"
    if num_runs < num_done:
        of += f" ({num_runs} different runs)"
    return [
        f"**Trial {row['trial']}: {row['label']}**: {'; '.join(texts)}.",
        f"It is the best of {of}, each with the one seed {content['seeds'][0]}. The best of many "
        "looks better than it is on the split that it is the best of. Its test score has had no "
        "part in the choice, but is one run's: other seeds say what the setting is worth.",
    ]


def _ordered(content: Content) -> list[Mapping[str, Any]]:
    better = content["scores"][content["experiment"]][CHOSEN_ON]["better"]
    sign = -1.0 if better == "higher" else 1.0

    def key(row: Mapping[str, Any]) -> tuple[int, float, int]:
        value = row[CHOSEN_ON]
        return STATES.index(row["state"]), 0.0 if value is None else sign * value, row["trial"]

    return sorted(content["trials"], key=key)


def _table_line(content: Content, row: Mapping[str, Any]) -> list[str]:
    values = [_short(row["values"][axis["key"]]) for axis in content["axes"]]
    state = WORDS.get(row["state"], row["state"])
    if row["state"] == "pruned":
        last = _number(content, row["last"], CHOSEN_ON)
        return [str(row["trial"]), *values, f"pruned at step {row['step']}", f"({last})", ""]
    scores = [_number(content, row[measure], measure) for measure in (CHOSEN_ON, SHOWN)]
    mark = "**" if row["trial"] == content["best"] else ""
    return [f"{mark}{row['trial']}{mark}", *map(_escape, values), state, *scores]


def _number(content: Content, value: float | None, measure: str) -> str:
    decimals = content["scores"][content["experiment"]][measure]["decimals"]
    return "" if value is None else f"{value:.{decimals}f}"


def _escape(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")


# ---------------------------------------------------------------------- words


def trial_line(trial: Trial, overrides: Sequence[str], metric: str) -> str:
    """Return what came of a trial, for the terminal."""
    what = f"trial {trial.number}: {' '.join(overrides)}: "
    if trial.state == "done":
        return f"{what}validation {metric} {trial.value:.4g}"
    at = f" at step {trial.step}" if trial.state == "pruned" else ""
    return f"{what}{WORDS.get(trial.state, trial.state)}{at}: {trial.reason}"


def _absent(row: Mapping[str, Any]) -> str:
    state = WORDS.get(row["state"], row["state"])
    return f"trial {row['trial']} ({row['label']}): {state}: {row['reason']}"


def state_line(content: Content) -> str:
    """Return how many trials are in which state: ``13 done, 6 pruned, 1 failed``."""
    counts = Counter(row["state"] for row in content["trials"])
    known = [state for state in STATES if counts[state]]
    return ", ".join(f"{counts[state]} {WORDS.get(state, state)}" for state in known)


def last_line(content: Content) -> str:
    """Return how many trials are in which state, and the names of those that came to nothing."""
    absent = [
        f"trial {row['trial']} ({row['label']})"
        for row in content["trials"]
        if row["state"] not in ("done", "pruned")
    ]
    line = state_line(content)
    return f"{line}: {'; '.join(absent)}" if absent else line


def terminal(content: Content) -> str:
    """Return the view for the terminal: the best trials, and what the best is worth."""
    lines = [f"Study {content['sweep']}: {content['title']} (scale: {content['scale']})", ""]
    on = content["experiment"]
    for row in _ordered(content)[:5]:
        if row["state"] == "done":
            texts = [
                f"{score_name(content, on, m)} {_number(content, row[m], m)}"
                for m in (CHOSEN_ON, SHOWN)
            ]
            lines.append(f"trial {row['trial']}: {row['label']}: {'; '.join(texts)}")
    lines.append("")
    for text in best_lines(content):
        lines += textwrap.wrap(text.replace("**", ""), WIDTH)
    return "\n".join([*lines, *filter(None, ["", content["again"]])]) + "\n"
