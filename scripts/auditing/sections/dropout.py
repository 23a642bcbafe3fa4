"""How much does dropout in the branch cost? Scores of LoRA and of Delta-LoRA by dropout."""

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
    minus,
    positions,
    read_scores,
)
from scripts.auditing.words import Content, Section

#: what the difference between most and no dropout says of one method.
CHANGES = {
    "above": "gained",
    "below": "lost",
    "not distinguishable": "did not clearly change",
    "not judged": "was not judged",
}
#: what the difference of two such differences says.
SENSITIVITIES = {
    "above": "less sensitive than",
    "below": "more sensitive than",
    "not distinguishable": "not distinguishable in sensitivity from",
    "not judged": "not to be judged (one seed) against",
}


@dataclass(frozen=True)
class Facts:
    """What dropout did.

    Attributes:
        xs: the dropouts, ascending; the first is 0.
        curves: by method.
        changes: by method, the score with most dropout minus that with none.
        pair: the first and the second method, where there are two.
        apart: the change of the second minus that of the first; None: not both are known.
        gaps: second minus first, by dropout.
        score: what the score is called.
        experiment: what is trained.
    """

    xs: tuple[str, ...]
    curves: Mapping[str, tuple[Point, ...]]
    changes: Mapping[str, Difference]
    pair: tuple[str, str] | None
    apart: Difference | None
    gaps: Mapping[str, Difference]
    score: str
    experiment: str


def facts(runs: Content, settings: Content) -> Facts | None:
    """Judge how much each method loses by dropout in the branch, over paired seeds.

    Args:
        runs: ``dropout/<row>/<dropout>`` -> seed -> record; others are left out.
        settings: of the whole audit.
    """
    near = settings["score"]["near_share"]
    scores = {
        row["label"]: read_scores(runs, "dropout", row["name"], settings)
        for row in settings["dropout"]["rows"]
    }
    xs = positions(list(scores.values()))
    if len(xs) < 2 or xs[0] != "0":
        return None
    ends = {label: (by.get(xs[-1], {}), by["0"]) for label, by in scores.items() if "0" in by}
    changes = {label: difference(*pair, near) for label, pair in ends.items()}
    apart, gaps, pair = None, {}, None
    if len(scores) == 2:
        first, second = pair = tuple(scores)
        if first in ends and second in ends:
            apart = difference(minus(*ends[second]), minus(*ends[first]), near)
        gaps = {
            x: difference(scores[second].get(x, {}), scores[first].get(x, {}), near) for x in xs
        }
    return Facts(
        xs=tuple(xs),
        curves={label: curve(by) for label, by in scores.items()},
        changes={label: found for label, found in changes.items() if found is not None},
        pair=pair,
        apart=apart,
        gaps={x: found for x, found in gaps.items() if found is not None},
        score=settings["score"]["label"],
        experiment=settings["experiment"],
    )


def words(facts: Facts) -> Section:
    """Return the section."""
    return Section(
        key="dropout",
        title="How much does dropout in the branch cost?",
        asked=(
            "The paper takes the dropout out of the branch because it breaks the identity of the "
            "gradients. How do the scores of LoRA and of Delta-LoRA (with the dropout let in) "
            "depend on it?"
        ),
        findings=_findings(facts),
        head=["Method", *(f"dropout {x}" for x in facts.xs)],
        rows=[[label, *cells(points, facts.xs)] for label, points in facts.curves.items()],
        measured_on=(
            f"{facts.score} of ordinary runs (experiment={facts.experiment}), which stand in "
            "Tables 1 and 5 too where they are the same; mean ± half the 95 % interval (seeds)."
        ),
        not_shown=(
            "the effect of a learning rate tuned for each dropout, nor of longer training, where "
            "dropout has more to prevent."
        ),
        picture={
            "curves": {label: drawn(points) for label, points in facts.curves.items()},
            "x": "Dropout in the branch",
            "y": facts.score,
            "log": False,
        },
    )


def _findings(facts: Facts) -> list[str]:
    changes = "; ".join(
        f"{label} {CHANGES[found.direction]}: {facts.score} {interval(found)}"
        for label, found in facts.changes.items()
    )
    lines = [
        f"Going from no dropout to {facts.xs[-1]} in the branch, {changes} (95 % interval of the "
        "paired difference)."
    ]
    if facts.pair is None:
        return lines
    first, second = facts.pair
    if facts.apart is not None:
        lines.append(
            f"By the difference of these differences, {interval(facts.apart)}, {second} is "
            f"{SENSITIVITIES[facts.apart.direction]} {first} to dropout."
        )
    if facts.gaps:
        gaps = [f"at dropout {x} {interval(found)}" for x, found in facts.gaps.items()]
        lines.append(f"{second} minus {first}: {'; '.join(gaps)}.")
    return lines
