"""Does Delta-LoRA help where there is little data? Scores by the share of the training rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scripts.auditing.scores import (
    Difference,
    Point,
    cells,
    curve,
    difference,
    drawn,
    interval,
    positions,
    read_scores,
)
from scripts.auditing.words import Content, Section, listing, percent

#: the row that the others are compared with.
OURS = "delta_lora"
COMPARISONS = {
    "above": "above it",
    "below": "below it",
    "not distinguishable": "not distinguishable from it",
    "not judged": "not judged",
}


@dataclass(frozen=True)
class Facts:
    """How the methods compare.

    Attributes:
        xs: shares of the training rows, ascending.
        curves: by method.
        against: by other method and share, Delta-LoRA minus it.
        num_rows: training rows at the shares, ascending.
        num_steps: of the runs, ascending.
        score: what the score is called.
        experiment: what is trained.
    """

    xs: tuple[str, ...]
    curves: Mapping[str, tuple[Point, ...]]
    against: Mapping[str, Mapping[str, Difference]]
    num_rows: tuple[int, ...]
    num_steps: tuple[int, ...]
    score: str
    experiment: str


def facts(runs: Content, settings: Content) -> Facts | None:
    """Compare the methods at each share of the training rows, over paired seeds.

    Args:
        runs: ``low_resource/<row>/<share>`` -> seed -> record; others are left out.
        settings: of the whole audit.
    """
    labels = {row["name"]: row["label"] for row in settings["low_resource"]["rows"]}
    scores = {name: read_scores(runs, "low_resource", name, settings) for name in labels}
    xs = positions(list(scores.values()))
    ours = scores.get(OURS, {})
    against = {}
    for name, label in labels.items():
        found = {
            x: difference(ours.get(x, {}), scores[name].get(x, {}), settings["score"]["near_share"])
            for x in xs
        }
        known = {x: one for x, one in found.items() if one is not None}
        if name != OURS and known:
            against[label] = known
    if not against:
        return None
    trained = [
        record["training"]
        for name, by_seed in runs.items()
        if name.startswith("low_resource/")
        for record in by_seed.values()
    ]
    return Facts(
        xs=tuple(xs),
        curves={label: curve(scores[name]) for name, label in labels.items()},
        against=against,
        num_rows=tuple(sorted({training["examples"] for training in trained})),
        num_steps=tuple(sorted({training["steps"] for training in trained})),
        score=settings["score"]["label"],
        experiment=settings["experiment"],
    )


def words(facts: Facts) -> Section:
    """Return the section."""
    return Section(
        key="low_resource",
        title="Does Delta-LoRA help where there is little data?",
        asked="How do the methods compare on a small share of the training rows?",
        findings=[_against(label, by_x) for label, by_x in facts.against.items()],
        head=["Method", *(f"{_share(x)} of the rows" for x in facts.xs)],
        rows=[[label, *cells(points, facts.xs)] for label, points in facts.curves.items()],
        measured_on=(
            f"{facts.score} of ordinary runs (experiment={facts.experiment}) on "
            f"{listing([str(number) for number in facts.num_rows])} rows, drawn anew by every seed "
            "and the same for every method; "
            f"{listing([str(number) for number in facts.num_steps])} steps whatever the share, so "
            "few rows are seen often; mean ± half the 95 % interval (seeds)."
        ),
        not_shown="settings tuned to few rows: length and learning rate are those of all rows.",
        picture={
            "curves": {label: drawn(points) for label, points in facts.curves.items()},
            "x": "Share of the training rows",
            "y": facts.score,
            "log": True,
        },
    )


def _against(label: str, by_x: Mapping[str, Difference]) -> str:
    parts: dict[str, list[str]] = {}
    for x, found in by_x.items():
        parts.setdefault(found.direction, []).append(f"{_share(x)} ({interval(found)})")
    said = [f"{COMPARISONS[word]} at {listing(where)}" for word, where in parts.items()]
    return f"Against {label}, Delta-LoRA was {'; '.join(said)} of the rows."


def _share(x: str) -> str:
    return percent(float(x), "g")
