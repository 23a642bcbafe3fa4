"""Write a results mapping (`scripts.tables.build_results`) as Markdown, CSV, LaTeX and JSON.

Pure functions of the mapping, without clock, locale or environment: the same records give the same
bytes.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scripts.reporting.spread import BASE, WHAT_IT_IS, part_words, share_words
from scripts.runs.durations import format_seconds

Results = Mapping[str, Any]

#: how the status of a number of the paper is shown.
STATUS_NOTES = {
    "recalled": "in parentheses: recalled, check against the PDF",
    "derived": "[d]: derived by arithmetic",
    "text": "[t]: stated in text that was read",
}
CSV_HEAD = (
    "table", "scale", "method", "label", "trainable_parameters", "updatable_parameters", "column",
    "mean", "std", "n", "ci95_low", "ci95_high", "paper_value", "paper_status",
)  # fmt: skip
UNDECIDED = "undecided: neither, or fewer than two seeds. A claim holds only if all its parts do."
CPU_MEMORY = (
    "Peak memory on a CPU is that of the whole process (libraries, allocator, and what an earlier "
    "run of the same worker left), so it says little about a method; the audit measures memory by "
    "category."
)
HOW_TO_MEASURE = (
    "`python scripts/item_spread.py` adds it to runs whose folders are at hand; new runs have it."
)
LEGEND = "mean ± half of the 95 % interval (n runs; sample std), Student t over seeds"
_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "^": r"\textasciicircum{}", "_": r"\_", "~": r"\textasciitilde{}", "%": r"\%",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "†": r"\dag{}", "‡": r"\ddag{}", "λ": r"$\lambda$", "×": r"$\times$", "±": r"$\pm$",
    "–": "--", "↳": r"\quad",
}  # fmt: skip


class _Notes:
    """Numbered footnotes in the order in which they are first referred to."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def mark(self, texts: Sequence[str]) -> str:
        """Return the marks of `texts`, for example `` [1] [2]``; empty without texts."""
        numbers = [self.texts.setdefault(text, len(self.texts) + 1) for text in texts]
        return "".join(f" [{number}]" for number in numbers)


def to_json(results: Results) -> str:
    """Return the results as JSON."""
    return json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(results: Results) -> str:
    """Return one line per row and column, the resources included; empty cells are unknown."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for row in results["rows"]:
        head = [results["table"], results["scale"], row["method"], row["label"]]
        head += [row["trainable_parameters"], row["updatable_parameters"]]
        cells = {**row["metrics"], **row.get("side_metrics", {}), **row["resources"]}
        for name, cell in cells.items():
            low, high = cell["ci95"] or (None, None)
            paper = row["paper"].get(name, {})
            values = [cell["mean"], cell["std"], cell["n"], low, high]
            writer.writerow([*head, name, *values, paper.get("value"), paper.get("status")])
    return stream.getvalue()


def to_markdown(results: Results) -> str:
    """Return the table with its header, footnotes, claims and contrasts."""
    notes = _Notes()
    lines = head_lines(results)
    lines += ["", *_main_table(results, notes), ""]
    lines.append(f"Cells: {LEGEND}")
    if not stands_alone(results):
        lines[-1] += '. Rows "↳ paper": the paper\'s own numbers, never mixed with ours'
    statuses = _statuses(results)
    lines[-1] += "".join(f"; {md_text(STATUS_NOTES[status])}" for status in statuses) + "."
    if "cpu" in results["device_types"]:
        lines += ["", CPU_MEMORY]
    if notes.texts:
        lines.append("")
        lines += [f"[{number}] {md_text(text)}  " for text, number in notes.texts.items()]
    if results["side_column_specs"]:
        lines += ["", "## Other scores of the same runs", "", *_side_table(results)]
    if results["claims"]:
        lines += ["", "## Claims of the paper", "", *claims_table(results), ""]
        lines.append(
            "Reproduced: the 95 % interval of the paired difference (same seeds) lies wholly on "
            "the claim's side of zero (memory and time: the ratio is wholly within the limit); not "
            f"reproduced: wholly on the other side; {UNDECIDED}"
        )
    if results["contrasts"]:
        lines += ["", "## Against the controls (not claims of the paper)", ""]
        lines += _contrasts_table(results)
    if "spread" in results:
        lines += ["", "## Where the spread comes from", "", *_spread_lines(results)]
    return "\n".join(lines) + "\n"


def head_lines(results: Results) -> list[str]:
    """Return title, warning and facts of a table or figure as lines of Markdown."""
    lines = [f"# {md_text(_title(results))}", "", *map(md_text, _warning(results))]
    return lines + [f"- {md_text(line)}" for line in _facts(results)]


def to_latex(results: Results) -> str:
    """Return a LaTeX table; it needs the package booktabs."""
    notes = _Notes()
    specs = results["column_specs"]
    head = ["Method", "Trainable", "Updatable", *(spec["label"] for spec in specs)]
    head += ["Memory", "Training"]
    body: list[str] = []
    for row in results["rows"]:
        if row["is_control"] and not any(line == r"\midrule" for line in body):
            body.append(r"\midrule")
        body.append(_tex_line(_our_cells(results, row, notes)))
        paper = _paper_cells(results, row, notes)
        if paper is not None:
            body.append(_tex_line(paper))
    facts = [LEGEND + ".", *(f"{line}." for line in _facts(results))]
    facts += [f"{STATUS_NOTES[status]}." for status in _statuses(results)]
    facts += [f"[{number}] {text}" for text, number in notes.texts.items()]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\footnotesize",
            rf"\caption{{{_tex(_title(results))}. {_tex(' '.join(_warning(results)))}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            _tex_line(head),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par {_tex(line)}" for line in facts),
            r"\end{table}",
            "",
        ]
    )


FORMATS: dict[str, Callable[[Results], str]] = {
    "md": to_markdown,
    "csv": to_csv,
    "tex": to_latex,
    "json": to_json,
}


# ---------------------------------------------------------------------- parts shared by formats


def _title(results: Results) -> str:
    if "sweep" in results:
        name = f"Sweep {results['sweep']}"
    else:
        name = f"{'Figure' if 'figure' in results else 'Table'} {results['number']}"
    return f"{name}: {results['title']} (scale: {results['scale']})"


def stands_alone(results: Results) -> bool:
    """Return whether a table is not to be compared with the paper's; see `scope`."""
    return "other_model" in results or "part" in results


def scope_lines(results: Results) -> list[str]:
    """Return in words why a table stands alone; nothing where it does not."""
    lines = []
    if "other_model" in results:
        lines.append(f"Another model than the paper's: {results['other_model']['name']}.")
    if "part" in results:
        lines.append(f"A part of the test set: {results['part']}.")
    if lines:
        lines.append("No number of the paper stands beside these, none of its claims is judged.")
    return lines


def _warning(results: Results) -> list[str]:
    if stands_alone(results):
        first, *rest = scope_lines(results)
        return [" ".join([f"**{first}**", *rest]), ""]
    if results["scale"] == "paper" and not results["overrides"]:
        return []
    if results["scale"] == "paper":
        return ["**Settings differ from the paper's**, see the overrides below.", ""]
    return [
        f"**These are not the paper's numbers.** Scale {results['scale']} trains other models on "
        "other data; values and verdicts hold for this scale only, the paper's rows are context.",
        "",
    ]


def _facts(results: Results) -> list[str]:
    """Return what a reader must know to use the numbers."""
    num_done = sum(len(row["runs"]) for row in results["rows"])
    num_all = num_done + sum(len(row["absent"]) for row in results["rows"])
    lines = [f"Model: {_list(results['models'])}"]
    for run, task in results["tasks"].items():
        known = {key.replace("_", " "): value for key, value in task.items() if value is not None}
        lines.append(f"Task {run}: " + (_list([f"{k} {v}" for k, v in known.items()])))
    for name, values in results.get("references", {}).items():
        scored = [
            f"{column['label']} {values[column['name']]:.{column['decimals']}f}"
            for column in results["column_specs"]
            if column["name"] in values
        ]
        if scored:
            lines.append(f"{name[0].upper()}{name[1:]}: {_list(scored)}")
    heads = sorted(
        {row["head_parameters"] for row in results["rows"] if row.get("head_parameters")}
    )
    if heads:
        lines.append(
            "Trainable parameters include the new head of the task "
            f"({_list([f'{count:,}' for count in heads])}); the paper's adapter rows leave it out"
        )
    lines.append(f"Seeds: {_list(results['seeds'])}; {num_done} of {num_all} runs finished")
    if results["overrides"]:
        lines.append(f"Overrides of every run: {_list(results['overrides'])}")
    lines.append(f"Checkpoint rule: {_list(results['checkpoint_rules'])}")
    if results["evaluations"] is not None:
        least, most = results["evaluations"]
        many = f"{most}" if least == most else f"{least} to {most}"
        lines[-1] += f"; evaluations of a run: {many}"
        if least == 1:
            lines[-1] += " (where there is one, best and last are the same)"
    if results["scored_ranks"]:
        ranks = _list(results["scored_ranks"])
        lines.append(f"DyLoRA trains every rank at once; scored at rank {ranks}")
    lines.append(f"Tuning budget: {results['tuning']}")
    lines.append(f"Code: {_list([_commit(item) for item in results['code']])}")
    if len(results["code"]) > 1:
        lines[-1] += " (several versions of the code in one table)"
    lines.append(f"Device: {_list(results['devices'])}")
    if "runs_on_a_device" in results:
        number = results["runs_on_a_device"]
        lines[-1] += f"; up to {number} runs at a time on one, so their times say little"
    return lines


def _commit(item: Mapping[str, Any]) -> str:
    name = "unknown commit" if item["commit"] is None else f"commit {item['commit'][:12]}"
    changed = " with uncommitted changes" if item["dirty"] else ""
    return f"{name}{changed} ({item['runs']} runs)"


def _list(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items)) if items else "none"


def _our_cells(results: Results, row: Mapping[str, Any], notes: _Notes) -> list[str]:
    absent = [_absence(results, row, item) for item in row["absent"]]
    name = row["label"] + (" (control)" if row["is_control"] else "") + notes.mark(absent)
    cells = [name, _count(row["trainable_parameters"]), _count(row["updatable_parameters"])]
    for spec in results["column_specs"]:
        cell = row["metrics"][spec["name"]]
        if cell["n"] == 0 and not row["runs"]:
            cells.append(_state(row))
        else:
            cells.append(_number(cell, spec["decimals"]) + notes.mark(cell["missing"]))
    memory, time = (row["resources"][key]["mean"] for key in ("peak_memory_bytes", "train_time_s"))
    cells.append(_state(row) if not row["runs"] else _bytes(memory))
    cells.append(_state(row) if not row["runs"] else _time(time))
    return cells


def _paper_cells(results: Results, row: Mapping[str, Any], notes: _Notes) -> list[str] | None:
    """Return the paper's row, or None where it has none."""
    if not row["paper"] and not row["paper_parameters"]:
        return None
    cells = ["↳ paper" + notes.mark([row["paper_note"]] if row["paper_note"] else [])]
    for key in ("trainable", "updatable"):
        value = row["paper_parameters"].get(key)
        cells.append("" if value is None else _with_status(value["printed"], value["status"]))
    for spec in results["column_specs"]:
        value = row["paper"].get(spec["name"])
        text = "" if value is None else f"{value['value']:.{spec['decimals']}f}"
        cells.append("" if value is None else _with_status(text, value["status"]))
    return [*cells, "", ""]


def _with_status(text: str, status: str) -> str:
    return {"recalled": f"({text})", "derived": f"{text} [d]", "text": f"{text} [t]"}[status]


def _statuses(results: Results) -> list[str]:
    """Return the statuses that the paper's rows use, in the order of the legend."""
    used = {
        value["status"]
        for row in results["rows"]
        for value in [*row["paper"].values(), *row["paper_parameters"].values()]
    }
    return [status for status in STATUS_NOTES if status in used]


def _absence(results: Results, row: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    run = f" on {item['run']}" if len(results["tasks"]) > 1 else ""
    state = {"missing": "not run", "partial": "not finished"}.get(item["state"], item["state"])
    reason = " ".join(item["reason"].split())
    text = f"{row['label']}{run}, seed {item['seed']}: {state}"
    return f"{text}: {reason[:300]}" if reason else text


def _state(row: Mapping[str, Any]) -> str:
    return "failed" if any(item["state"] == "failed" for item in row["absent"]) else "not run"


def _number(cell: Mapping[str, Any], decimals: int) -> str:
    if cell["n"] == 0:
        return "–"
    mean = f"{cell['mean']:.{decimals}f}"
    if cell["ci95"] is None:
        return f"{mean} (1)"
    half = (cell["ci95"][1] - cell["ci95"][0]) / 2
    return f"{mean} ± {half:.{decimals}f} ({cell['n']}; {cell['std']:.{decimals}f})"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _time(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} s" if value < 60 else format_seconds(value)


# ---------------------------------------------------------------------- Markdown


def _main_table(results: Results, notes: _Notes) -> list[str]:
    head = ["Method", "Trainable", "Updatable"]
    head += [spec["label"] for spec in results["column_specs"]] + ["Peak memory", "Training"]
    rows = []
    for row in results["rows"]:
        rows.append(_our_cells(results, row, notes))
        paper = _paper_cells(results, row, notes)
        if paper is not None:
            rows.append(paper)
    return md_table(head, rows)


def _side_table(results: Results) -> list[str]:
    specs = results["side_column_specs"]
    rows = [
        [
            row["label"] + (" (control)" if row["is_control"] else ""),
            *(_number(row["side_metrics"][spec["name"]], spec["decimals"]) for spec in specs),
        ]
        for row in results["rows"]
    ]
    return md_table(["Method", *(spec["label"] for spec in specs)], rows)


def claims_table(results: Results) -> list[str]:
    """Return the claims with their parts and verdicts as a Markdown table."""
    decimals = {spec["name"]: spec["decimals"] for spec in results.get("column_specs", [])}
    rows = []
    for claim in results["claims"]:
        verdict = f"**{claim['verdict']}** ({claim['reason']})"
        rows.append([f"**{claim['id']}**", claim["statement"], "", "", "", "", verdict])
        for part in claim["parts"]:
            shown = "" if part["paper_difference"] is None else f"{part['paper_difference']:+g} [t]"
            cells = _comparison_cells(part, decimals)
            is_told = part["n"] < 2 or "comparisons" in part or "note" in part
            reason = f" ({part['reason']})" if is_told else ""
            rows.append(["", part["statement"], *cells, shown, part["verdict"] + reason])
    head = ["Claim", "Comparison", "Difference", "95 % interval", "n", "Paper", "Verdict"]
    return md_table(head, rows)


def _contrasts_table(results: Results) -> list[str]:
    decimals = {spec["name"]: spec["decimals"] for spec in results["column_specs"]}
    labels = {row["method"]: row["label"] for row in results["rows"]}
    shown = results["column_specs"]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for item in results["contrasts"]:
        difference, interval, num_seeds = _comparison_cells(item, decimals)
        line = cells.setdefault((item["row"], item["against"]), {})
        line[item["column"]] = f"{difference} {interval} ({num_seeds})"
    rows = [
        [f"{labels[row]} minus {labels[other]}", *(line.get(s["name"], "") for s in shown)]
        for (row, other), line in cells.items()
    ]
    return md_table(["Difference, 95 % interval (n)", *(s["label"] for s in shown)], rows)


def _spread_lines(results: Results) -> list[str]:
    """Return what is uncertain by seeds and by test items, or why it is not known."""
    spread = results["spread"]
    reasons = "; ".join(map(md_text, spread["not_measured"])) or "no run is finished"
    if not spread["rows"]:
        return [f"Test items: not measured ({reasons}). {HOW_TO_MEASURE}"]
    lines = [WHAT_IT_IS]
    if (words := share_words(spread)) is not None:
        lines[0] += f" {words}"
    for key, head in (("score", "Mean"), ("difference", "Mean difference")):
        found = {(row["method"], row["column"]): row[key] for row in spread["rows"]}
        if any(part is not None for part in found.values()):
            lines += ["", *_spread_table(results, found, head)]
    if spread["not_measured"]:
        lines += ["", f"Not measured, and –: {reasons}. {HOW_TO_MEASURE}"]
    return lines


def _spread_table(results: Results, found: Mapping[tuple[str, str], Any], head: str) -> list[str]:
    """Return a line a row with both standard errors of every score."""
    specs, base = results["column_specs"], _label_of(results, BASE)
    rows = []
    for row in results["rows"]:
        parts = [found.get((row["method"], spec["name"])) for spec in specs]
        if any(part is not None for part in parts):
            label = row["label"] if head == "Mean" else f"{row['label']} minus {base}"
            cells = [part_words(p, s["decimals"]) for p, s in zip(parts, specs, strict=True)]
            rows.append([label, *cells])
    return md_table([f"{head}: seeds / items", *(spec["label"] for spec in specs)], rows)


def _label_of(results: Results, method: str) -> str:
    return next((str(r["label"]) for r in results["rows"] if r["method"] == method), method)


def _comparison_cells(item: Mapping[str, Any], decimals: Mapping[str, int]) -> list[str]:
    """Return difference, interval and n; one digit more than the table, so that signs show."""
    if item["difference"] is None:
        return ["–", "–", "0"]
    shift = 0.0
    if item["measure"] == "relative difference":
        pattern, factor = "{:+.1f} %", 100.0
    elif item["measure"] == "share of blocks, minus one half":
        pattern, factor, shift = "{:.0f} %", 100.0, 50.0
    else:
        pattern, factor = f"{{:+.{decimals[item['column']] + 1}f}}", 1.0
    difference = pattern.format(item["difference"] * factor + shift)
    if item["ci95"] is None:
        return [difference, "–", str(item["n"])]
    low, high = (pattern.format(end * factor + shift) for end in item["ci95"])
    return [difference, f"[{low}, {high}]", str(item["n"])]


def md_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, padded so that it reads in a terminal as well."""
    content = [[md_text(text) for text in line] for line in [head, *rows]]
    widths = [max(3, *(len(line[i]) for line in content)) for i in range(len(head))]

    def join(line: Sequence[str]) -> str:
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = f"| {' | '.join('-' * width for width in widths)} |"
    return [join(content[0]), rule, *map(join, content[1:])]


def md_text(text: str) -> str:
    """Return `text` safe in a Markdown table cell: no HTML, no pipes, one line."""
    return html.escape(" ".join(text.split("\n")), quote=False).replace("|", "\\|")


# ---------------------------------------------------------------------- LaTeX


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text.replace("**", ""))


def _tex_line(cells: Sequence[str]) -> str:
    return " & ".join(_tex(cell) for cell in cells) + r" \\"
