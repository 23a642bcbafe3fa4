"""Is the gradient of W that of the product BA? With and without dropout, under five losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.auditing.limits import Judged, judge
from scripts.auditing.words import Content, Record, Section, near, number, setting, span

LOSS_LABELS = {
    "cross_entropy": "cross-entropy",
    "label_smoothing": "label smoothing 0.1",
    "mean_squared_error": "mean squared error",
    "policy_gradient": "policy gradient (REINFORCE)",
    "contrastive": "contrastive (InfoNCE)",
}


@dataclass(frozen=True)
class Facts:
    """How far the gradients are apart.

    Attributes:
        means: by loss and dropout, mean over projections, draws and seeds.
        worst: the largest difference of any projection without dropout; equal if below the limit.
        dropouts: those above 0, ascending.
        at_least_dropout: the means of all losses at the smallest of them.
        at_most_dropout: and at the largest.
        least_broken: the smallest mean at the smallest dropout, which is broken if not below the
            limit; None: no dropout was measured.
        settings: of the measurement.
    """

    means: Mapping[str, Mapping[str, float]]
    worst: Judged
    dropouts: tuple[str, ...]
    at_least_dropout: tuple[float, ...]
    at_most_dropout: tuple[float, ...]
    least_broken: Judged | None
    settings: Content


def facts(records: Sequence[Record], settings: Content) -> Facts | None:
    """Judge whether dL/dW equals dL/d(BA)/s."""
    if not records:
        return None
    limit, factor = settings["holds_below"], settings["near_factor"]
    gaps: dict[str, dict[str, list[float]]] = {}
    worst = 0.0
    for record in records:
        mine = gaps.setdefault(record["settings"]["loss"], {})
        for dropout, masks in record["result"]["gaps"].items():
            mine.setdefault(dropout, []).extend(mask["mean"] for mask in masks)
            if float(dropout) == 0:
                worst = max(worst, *(mask["max"] for mask in masks))
    means = {
        loss: {d: sum(values) / len(values) for d, values in by.items()}
        for loss, by in gaps.items()
    }
    positive = sorted({d for by in means.values() for d in by if float(d) > 0}, key=float)
    smallest = tuple(by[positive[0]] for by in means.values()) if positive else ()
    return Facts(
        means=means,
        worst=judge(worst, limit, factor),
        dropouts=tuple(positive),
        at_least_dropout=smallest,
        at_most_dropout=tuple(by[positive[-1]] for by in means.values()) if positive else (),
        least_broken=judge(min(smallest), limit, factor) if positive else None,
        settings=settings,
    )


def words(facts: Facts) -> Section:
    """Return the section."""
    settings = facts.settings
    holds = facts.worst.is_below
    columns = ["0", *facts.dropouts]
    return Section(
        key="gradients",
        title="Is the gradient of W that of the product BA?",
        asked=(
            "Delta-LoRA moves W along with BA because both have the same gradient, "
            "dL/dW = dL/d(BA) / s. Does this hold for other losses than cross-entropy, and how "
            "much of it is left with dropout in the branch?"
        ),
        findings=[
            f"Without dropout the gradients of W and BA {_without(facts)}; {_with(facts)}.",
            "The identity is one of the layer, so the loss does not matter; dropout in the branch "
            "breaks it, because W sees x and BA sees the masked x."
            if holds
            else "See the table.",
        ],
        head=["Loss", *(f"dropout {d}" for d in columns)],
        rows=[
            [LOSS_LABELS[loss], *(number(by[d]) for d in columns)]
            for loss, by in facts.means.items()
        ],
        measured_on=(
            f"the branches that the runs of row {settings['row']} have learned (every seed), in "
            f"float64, one batch of {settings['batch']} × {settings['length']} tokens of the "
            f"training text, {settings['num_masks']} draws of the dropout; mean over projections, "
            "draws and seeds of |dL/dW - dL/d(BA)/s| / |dL/dW|. MSE and InfoNCE read the mean last "
            "state, the policy gradient samples every token and rewards even token numbers."
        ),
        not_shown=(
            "what the broken identity costs in score, which the section on dropout asks. The three "
            "losses other than cross-entropy are made up for this test."
        ),
        picture={
            "gaps": {LOSS_LABELS[loss]: dict(by) for loss, by in facts.means.items()},
            "limit": facts.worst.limit,
        },
    )


def _without(facts: Facts) -> str:
    worst, losses = facts.worst, list(facts.means)
    under = f"all {len(losses)} losses" if len(losses) > 1 else LOSS_LABELS[losses[0]]
    if worst.is_below:
        return f"agreed to {number(worst.value)} at worst under {under}{near(worst)}"
    return (
        f"did NOT agree: they differed by up to {number(worst.value)} (limit "
        f"{setting(worst.limit)}){near(worst)}"
    )


def _with(facts: Facts) -> str:
    if facts.least_broken is None:
        return "no dropout was measured"
    first, last, note = facts.dropouts[0], facts.dropouts[-1], near(facts.least_broken)
    if facts.least_broken.is_below:
        return f"with dropout {first} they STILL agreed under at least one loss{note}"
    return (
        f"with dropout {first} they differ by {_in_percent(facts.at_least_dropout)}, with "
        f"{last} by {_in_percent(facts.at_most_dropout)}{note}"
    )


def _in_percent(shares: Sequence[float]) -> str:
    return span([100 * share for share in shares], "{:.0f}") + " %"
