"""What does a bfloat16 W lose? Which forms of the update keep it, and how much goes in rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.auditing.limits import Judged, judge, judge_distance
from scripts.auditing.words import Content, Record, Section, listing, near, number, setting

FORM_LABELS = {
    "in_place": "in place, W float32",
    "in_place_rounded": "in place, W rounded to bfloat16 after every step",
    "closed_form": "closed form over a bfloat16 W",
}
#: the form that the library refuses and that is emulated here.
ROUNDED = "in_place_rounded"


@dataclass(frozen=True)
class Line:
    """One form at one learning rate.

    Attributes:
        form: a key of `FORM_LABELS`.
        rate: the learning rate.
        curve: (number of steps, relative error of the change of W).
        last: the error at the end; the update is lost if above the limit.
    """

    form: str
    rate: float
    curve: tuple[tuple[int, float], ...]
    last: Judged

    @property
    def is_lost(self) -> bool:
        """Whether the update is lost."""
        return self.last.is_above


@dataclass(frozen=True)
class Comparison:
    """The error of the rounded form against what was expected before it was measured.

    Attributes:
        rate: the learning rate.
        error: at the end.
        expected: what it should have been.
        distance: between the two; they agree if not above the limit.
    """

    rate: float
    error: float
    expected: float
    distance: Judged


@dataclass(frozen=True)
class Facts:
    """Every form at every learning rate.

    Attributes:
        lines: by rate, then by form.
        rounded: those of the form that rounds.
        lost: those of an allowed form that loses the update.
        rounded_is_lost: whether the rounded form loses the update at every rate.
        worst_kept: the largest error of an allowed form that keeps the update; None: none does.
        comparisons: with what was expected, by rate.
        weight_rms: root mean square of the weights.
        settings: of the measurement.
    """

    lines: tuple[Line, ...]
    rounded: tuple[Line, ...]
    lost: tuple[Line, ...]
    rounded_is_lost: bool
    worst_kept: Judged | None
    comparisons: tuple[Comparison, ...]
    weight_rms: float
    settings: Content


def facts(records: Sequence[Record], settings: Content) -> Facts | None:
    """Judge which forms keep the update of W, and compare with what was expected."""
    if not records:
        return None
    found = {
        (float(r["settings"]["learning_rate"]), r["settings"]["form"]): r["result"]["errors"]
        for r in records
    }
    lines = tuple(
        _line(form, rate, found[rate, form], settings)
        for rate in sorted({rate for rate, _ in found})
        for form in settings["forms"]
        if (rate, form) in found
    )
    rounded = tuple(line for line in lines if line.form == ROUNDED)
    kept = [line.last for line in lines if line.form != ROUNDED and not line.is_lost]
    return Facts(
        lines=lines,
        rounded=rounded,
        lost=tuple(line for line in lines if line.form != ROUNDED and line.is_lost),
        rounded_is_lost=bool(rounded) and all(line.is_lost for line in rounded),
        worst_kept=max(kept, key=lambda last: last.value, default=None),
        comparisons=tuple(_compare(line, settings) for line in rounded),
        weight_rms=records[0]["result"]["weight_rms"],
        settings=settings,
    )


def _line(form: str, rate: float, errors: Sequence[Sequence[float]], settings: Content) -> Line:
    return Line(
        form=form,
        rate=rate,
        curve=tuple((int(step), error) for step, error in errors),
        last=judge(errors[-1][1], settings["lost_above"], settings["near_factor"]),
    )


def _compare(line: Line, settings: Content) -> Comparison:
    by_rate = {float(rate): value for rate, value in settings["learning_rates"].items()}
    error, expected = line.last.value, by_rate[line.rate]
    distance = judge_distance(error, expected, settings["agrees_within"], settings["near_share"])
    return Comparison(line.rate, error, expected, distance)


def words(facts: Facts) -> Section:
    """Return the section."""
    settings = facts.settings
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for line in facts.lines:
        curves.setdefault(f"{line.rate:g}", {})[line.form] = [list(point) for point in line.curve]
    return Section(
        key="precision",
        title="What does a bfloat16 W lose?",
        asked=(
            "Written in place into a bfloat16 W, small updates round away. How wrong is the change "
            "of W after training, against float32 and against the closed form, which never writes "
            "W?"
        ),
        findings=[f"{_rounded(facts)}; {_allowed(facts)}.", _compared(facts)],
        head=["Form", "Learning rate", "First error", "Last error", "Update"],
        rows=[
            [
                FORM_LABELS[line.form],
                setting(line.rate),
                number(line.curve[0][1]),
                number(line.last.value),
                "lost" if line.is_lost else "kept",
            ]
            for line in facts.lines
        ],
        measured_on=(
            f"{settings['steps']} steps of AdamW with the recipe's betas, epsilon and weight "
            f"decay, constant learning rate, rank {settings['rank']}, α {settings['alpha']}, "
            f"λ {settings['update_ratio']:g}, K = {settings['start_step']}; all forms start from "
            "weights rounded to bfloat16. The library refuses to write into a bfloat16 W, so its "
            "storage is emulated: W is rounded to bfloat16 after every step. Error: distance of "
            "the change of W from λs(B_t A_t - B_k A_k) in float64, over the norm of that; lost: "
            f"above {setting(settings['lost_above'])}."
        ),
        not_shown=(
            "the effect on a score, nor stochastic rounding, which would keep the update on "
            "average."
        ),
        picture={"curves": curves},
    )


def _rounded(facts: Facts) -> str:
    how = "loses much of its update"
    if not facts.rounded_is_lost:
        how = "does NOT lose its update at every rate"
    errors = [
        f"{number(line.last.value)} at learning rate {setting(line.rate)}{near(line.last)}"
        for line in facts.rounded
    ]
    return f"A W that is stored in bfloat16 {how}: relative error {listing(errors)}"


def _allowed(facts: Facts) -> str:
    if facts.lost:
        lost = [
            f"{FORM_LABELS[line.form]} {number(line.last.value)}{near(line.last)}"
            for line in facts.lost
        ]
        return f"a form that is allowed LOSES it: {listing(lost)}"
    if facts.worst_kept is None:
        return "the allowed forms were not measured"
    worst = facts.worst_kept
    return f"the forms that are allowed keep it ({number(worst.value)} at worst){near(worst)}"


def _compared(facts: Facts) -> str:
    compared = []
    for one in facts.comparisons:
        verdict = "differs from" if one.distance.is_above else "agrees with"
        compared.append(
            f"{number(one.error)} at {setting(one.rate)} {verdict} {setting(one.expected)}"
            f"{near(one.distance)}"
        )
    return (
        f"Of the values expected beforehand for the rounded form, {listing(compared)}; the size "
        "depends on how large the weights are against the updates (here a root mean square of "
        f"{number(facts.weight_rms)})."
    )
