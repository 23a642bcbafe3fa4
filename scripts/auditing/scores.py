"""Sections of the audit that compare scores of ordinary runs: dropout, few training rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.auditing.words import Content, Section, direction, interval, listing
from scripts.reporting import stats

#: what the interval of a difference says, by `direction`.
CHANGES = {
    "above": "gained",
    "below": "lost",
    "not distinguishable": "did not clearly change",
    "not judged": "was not judged",
}
SENSITIVITIES = {
    "above": "less sensitive than",
    "below": "more sensitive than",
    "not distinguishable": "not distinguishable in sensitivity from",
    "not judged": "not to be judged (one seed) against",
}
COMPARISONS = {
    "above": "above it",
    "below": "below it",
    "not distinguishable": "not distinguishable from it",
    "not judged": "not judged",
}


def _scores(runs: Content, part: str, row: str, settings: Content) -> dict[str, dict[int, float]]:
    """Return value on the x axis -> seed -> score in printed units."""
    score = settings["score"]
    found: dict[str, dict[int, float]] = {}
    for name, by_seed in runs.items():
        which, _, rest = name.partition("/")
        mine, _, x = rest.partition("/")
        if (which, mine) == (part, row):
            found[x] = {
                seed: float(record["metrics"][score["metric"]]) * score["scale"]
                for seed, record in by_seed.items()
                if record["metrics"].get(score["metric"]) is not None
            }
    return {x: values for x, values in found.items() if values}


def _cell(values: Mapping[int, float] | None) -> str:
    if not values:
        return ""
    summary = stats.summarize(values[seed] for seed in sorted(values))
    half = summary.half_width
    return f"{summary.mean:.2f}" + ("" if half is None else f" ± {half:.2f}") + f" ({summary.n})"


def _curve(values: Mapping[str, Mapping[int, float]]) -> list[dict[str, Any]]:
    curve = []
    for x in sorted(values, key=float):
        summary = stats.summarize(values[x][seed] for seed in sorted(values[x]))
        curve.append({"x": float(x), "mean": summary.mean, "half": summary.half_width})
    return curve


def _minus(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def dropout_section(runs: Content, settings: Content) -> Section | None:
    """Judge how much each method loses by dropout in the branch, over paired seeds."""
    rows, label = settings["dropout"]["rows"], settings["score"]["label"]
    scores = {row["name"]: _scores(runs, "dropout", row["name"], settings) for row in rows}
    xs = sorted({x for by in scores.values() for x in by}, key=float)
    if len(xs) < 2 or xs[0] != "0":
        return None
    losses: dict[str, dict[int, float]] = {}
    sentences = []
    for row in rows:
        mine = scores[row["name"]]
        if xs[-1] not in mine or "0" not in mine:
            continue
        losses[row["name"]] = _minus(mine[xs[-1]], mine["0"])
        if losses[row["name"]]:
            summary = stats.summarize(losses[row["name"]].values())
            word = CHANGES[direction(summary)]
            sentences.append(f"{row['label']} {word}: {label} {interval(summary)}")
    lines = [
        f"Going from no dropout to {xs[-1]} in the branch, {'; '.join(sentences)} "
        "(95 % interval of the paired difference)."
    ]
    names = [row["name"] for row in rows]
    if len(names) == 2 and all(losses.get(name) for name in names):
        apart = _minus(losses[names[1]], losses[names[0]])
        if apart:
            summary = stats.summarize(apart.values())
            how = SENSITIVITIES[direction(summary)]
            lines.append(
                f"By the difference of these differences, {interval(summary)}, {rows[1]['label']} "
                f"is {how} {rows[0]['label']} to dropout."
            )
    gaps = []
    for x in xs:
        pair = [scores[name].get(x, {}) for name in names[:2]]
        if len(pair) == 2 and (difference := _minus(pair[1], pair[0])):
            summary = stats.summarize(difference.values())
            gaps.append(f"{interval(summary)} at dropout {x}")
    if gaps:
        lines.append(f"{rows[1]['label']} minus {rows[0]['label']}: {'; '.join(gaps)}.")
    return Section(
        key="dropout",
        title="How much does dropout in the branch cost?",
        asked=(
            "The paper takes the dropout out of the branch because it breaks the identity of the "
            "gradients. How do the scores of LoRA and of Delta-LoRA (with the dropout let in) "
            "depend on it?"
        ),
        findings=lines,
        head=["Method", *(f"dropout {x}" for x in xs)],
        rows=[[row["label"], *(_cell(scores[row["name"]].get(x)) for x in xs)] for row in rows],
        measured_on=(
            f"{label} of ordinary runs of the recipe ({' '.join(settings['run'])}), which stand in "
            "Tables 1 and 5 too where they are the same; mean ± half the 95 % interval (seeds)."
        ),
        not_shown=(
            "the effect of a learning rate tuned for each dropout, nor of longer training, where "
            "dropout has more to prevent."
        ),
        picture={
            "curves": {row["label"]: _curve(scores[row["name"]]) for row in rows},
            "x": "Dropout in the branch",
            "y": label,
            "log": False,
        },
    )


def low_resource_section(runs: Content, settings: Content) -> Section | None:
    """Compare the methods at each share of the training rows, over paired seeds."""
    rows, label = settings["low_resource"]["rows"], settings["score"]["label"]
    scores = {row["name"]: _scores(runs, "low_resource", row["name"], settings) for row in rows}
    xs = sorted({x for by in scores.values() for x in by}, key=float)
    if not xs or "delta_lora" not in scores:
        return None
    labels = {row["name"]: row["label"] for row in rows}
    lines = []
    for name in labels:
        if name == "delta_lora":
            continue
        parts: dict[str, list[str]] = {}
        for x in xs:
            pair = scores["delta_lora"].get(x, {}), scores[name].get(x, {})
            if difference := _minus(*pair):
                summary = stats.summarize(difference.values())
                text = f"{float(x) * 100:g} % ({interval(summary)})"
                parts.setdefault(direction(summary), []).append(text)
        if parts:
            said = [f"{COMPARISONS[word]} at {listing(where)}" for word, where in parts.items()]
            lines.append(f"Against {labels[name]}, Delta-LoRA was {'; '.join(said)} of the rows.")
    if not lines:
        return None
    counts = sorted(
        {r["training"]["examples"] for name, by in runs.items() for r in by.values()
         if name.startswith("low_resource/")}
    )  # fmt: skip
    steps = {
        r["training"]["steps"] for name, by in runs.items() for r in by.values()
        if name.startswith("low_resource/")
    }  # fmt: skip
    return Section(
        key="low_resource",
        title="Does Delta-LoRA help where there is little data?",
        asked="How do the methods compare on a small share of the training rows?",
        findings=lines,
        head=["Method", *(f"{float(x) * 100:g} % of the rows" for x in xs)],
        rows=[[labels[n], *(_cell(scores[n].get(x)) for x in xs)] for n in labels],
        measured_on=(
            f"{label} of ordinary runs of the recipe ({' '.join(settings['run'])}) on "
            f"{listing([str(count) for count in counts])} rows, drawn anew by every seed and the "
            f"same "
            f"for every method; {listing([str(step) for step in sorted(steps)])} steps whatever "
            "the share, so few rows are seen often; mean ± half the 95 % interval (seeds)."
        ),
        not_shown="settings tuned to few rows: length and learning rate are those of all rows.",
        picture={
            "curves": {labels[n]: _curve(scores[n]) for n in labels},
            "x": "Share of the training rows",
            "y": label,
            "log": True,
        },
    )
