"""Is Delta-LoRA the LoRA of alpha * (1 + lambda)? By optimiser, and what breaks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.auditing.limits import Judged, judge, nearest
from scripts.auditing.words import (
    Content,
    Record,
    Section,
    listing,
    near,
    near_among,
    number,
    setting,
    span,
)

#: what was compared: K, clipping, whether another module trains, whether the rate was divided.
Case = tuple[int, float | None, bool, bool]


@dataclass(frozen=True)
class Grade:
    """A relative difference in a word.

    Attributes:
        value: the relative difference of the merged weights.
        name: ``equal``, ``close`` or ``different``.
        closest: it against the limit that it is nearest, None where it is near none.
        against_close: it against the limit from which on weights are different.
    """

    value: float
    name: str
    closest: Judged | None
    against_close: Judged

    @property
    def is_different(self) -> bool:
        """Whether the two trainings count as different."""
        return not self.against_close.is_below


@dataclass(frozen=True)
class Column:
    """One case over all optimisers.

    Attributes:
        name: in words.
        grades: by the optimiser's label.
        lost: optimisers whose plain case agrees and this one does not.
        gained: the other way round.
    """

    name: str
    grades: Mapping[str, Grade]
    lost: tuple[str, ...]
    gained: tuple[str, ...]

    @property
    def near(self) -> dict[str, Judged]:
        """Every figure against the limit that decides whether the equality is lost."""
        return {label: grade.against_close for label, grade in self.grades.items()}


@dataclass(frozen=True)
class Clipping:
    """Clipping the gradients of the branches, which alone train.

    Attributes:
        norm: the global norm.
        acted: at how many steps it acted on Delta-LoRA, by optimiser.
        steps: of how many.
        column: what it did.
    """

    norm: float
    acted: tuple[int, ...]
    steps: int
    column: Column


@dataclass(frozen=True)
class Facts:
    """Where the two trainings agree.

    Attributes:
        first: K of the plain case.
        columns: every case, the plain one first.
        max_abs: by optimiser, the largest difference of an entry in the plain case.
        surprises: optimisers whose plain case is not as expected.
        clipped: by norm.
        alone: another module trains, without clipping.
        both: another module trains, with clipping.
        later: the cases with a later K.
        divided: the learning rate of the twin divided by 1 + lambda.
        rescued: optimisers that agree then.
        settings: of the measurement.
    """

    first: int
    columns: tuple[Column, ...]
    max_abs: Mapping[str, float]
    surprises: tuple[str, ...]
    clipped: tuple[Clipping, ...]
    alone: Column
    both: Column
    later: tuple[Column, ...]
    divided: Column
    rescued: tuple[str, ...]
    settings: Content

    @property
    def plain(self) -> Mapping[str, Grade]:
        """The grades without anything that could break the equality."""
        return self.columns[0].grades


def grade(relative: float, settings: Content) -> Grade:
    """Grade a relative difference by the limits of the settings."""
    factor = settings["near_factor"]
    exact = judge(relative, settings["exact_below"], factor)
    close = judge(relative, settings["close_below"], factor)
    name = "equal" if exact.is_below else "close" if close.is_below else "different"
    return Grade(relative, name, nearest([exact, close]), close)


def facts(records: Sequence[Record], settings: Content) -> Facts | None:
    """Judge where Delta-LoRA equals the LoRA of alpha * (1 + lambda)."""
    if not records:
        return None
    first, *others = settings["start_steps"]
    clips = settings["clips"]
    plain: Case = (first, None, False, False)
    by_optimizer = {
        optimizer["label"]: mine
        for optimizer in settings["optimizers"]
        if plain in (mine := _cases_of(records, optimizer))
    }
    columns = {
        case: _column(name, case, plain, by_optimizer, settings)
        for case, name in _names(first, clips, others).items()
    }
    invariant = {o["label"]: o["invariant"] for o in settings["optimizers"]}
    graded = columns[plain].grades
    later = tuple(columns[K, None, False, False] for K in others)
    divided = columns[first, None, False, True]
    return Facts(
        first=first,
        columns=tuple(columns.values()),
        max_abs={label: mine[plain]["max_abs"] for label, mine in by_optimizer.items()},
        surprises=tuple(
            label for label, found in graded.items() if found.is_different == invariant[label]
        ),
        clipped=tuple(
            clipping
            for norm in clips
            if (clipping := _clipping(records, norm, columns[first, norm, False, False]))
        ),
        alone=columns[first, None, True, False],
        both=columns[first, clips[0], True, False],
        later=later,
        divided=divided,
        rescued=tuple(label for label, g in divided.grades.items() if not g.is_different),
        settings=settings,
    )


def _names(first: int, clips: Sequence[float], others: Sequence[int]) -> dict[Case, str]:
    """Return every case in words, in the order of the table."""
    names: dict[Case, str] = {(first, None, False, False): f"K = {first}"}
    names |= {(K, None, False, False): f"K = {K}" for K in others}
    names |= {(first, c, False, False): f"clipped at {c:g}" for c in clips}
    names[first, None, True, False] = "another module"
    names[first, clips[0], True, False] = f"another module, clipped at {clips[0]:g}"
    names[first, None, False, True] = "rate / (1 + λ)"
    return names


def _cases_of(records: Sequence[Record], optimizer: Content) -> dict[Case, Content]:
    """Return the results of one optimiser by case."""
    found: dict[Case, Content] = {}
    for record in records:
        case = record["settings"]
        if all(case[key] == optimizer[key] for key in ("optimizer", "learning_rate", "options")):
            is_divided = case["learning_rate_factor"] != 1
            key = (case["start_step"], case["max_grad_norm"], bool(case["head"]), is_divided)
            found[key] = record["result"]
    return found


def _column(
    name: str,
    case: Case,
    plain: Case,
    by_optimizer: Mapping[str, Mapping[Case, Content]],
    settings: Content,
) -> Column:
    grades, lost, gained = {}, [], []
    for label, mine in by_optimizer.items():
        if case not in mine:
            continue
        here = grade(mine[case]["relative"], settings)
        before = grade(mine[plain]["relative"], settings)
        grades[label] = here
        if here.is_different and not before.is_different:
            lost.append(label)
        if before.is_different and not here.is_different:
            gained.append(label)
    return Column(name, grades, tuple(lost), tuple(gained))


def _clipping(records: Sequence[Record], norm: float, column: Column) -> Clipping | None:
    mine = [r for r in records if r["settings"]["max_grad_norm"] == norm]
    acted = tuple(r["result"]["num_clipped"] for r in mine if not r["settings"]["head"])
    return Clipping(norm, acted, mine[0]["settings"]["steps"], column) if acted else None


def words(facts: Facts) -> Section:
    """Return the section."""
    settings = facts.settings
    lines = [_graded(facts), _expected(facts)]
    if facts.divided.grades:
        lines.append(_divided(facts))
    lines += [_clipped(clipping) for clipping in facts.clipped]
    lines.append(_with_another_module(facts))
    if facts.later:
        lines.append(_later(facts))
    return Section(
        key="equivalence",
        title="Is Delta-LoRA the LoRA of α(1 + λ)?",
        asked=(
            "The layer of Delta-LoRA with K = -1 is W_0 + (1 + λ)sBA, that of a LoRA with "
            "α(1 + λ); only the gradients of A and B differ, by the factor 1 + λ. For which "
            "optimisers do the two give the same weights, and what breaks it?"
        ),
        findings=lines,
        head=[
            "Optimiser",
            *(column.name for column in facts.columns),
            f"largest difference, K = {facts.first}",
        ],
        rows=[
            [label, *(_value(column, label) for column in facts.columns), number(largest)]
            for label, largest in facts.max_abs.items()
        ],
        measured_on=(
            f"{settings['steps']} steps in float64 of both from one start, rank "
            f"{settings['rank']}, α {settings['alpha']}, λ {settings['update_ratio']:g}, "
            f"{settings['batch']} × {settings['length']} tokens a step, constant learning rate, no "
            "weight decay, no dropout. Relative: norm of the difference of the merged W_Q and W_V "
            "over the norm of how far Delta-LoRA moved them. Near a limit: within a factor of "
            f"{settings['near_factor']:g} of it, since another processor can change such a figure "
            "by that much."
        ),
        not_shown=(
            "how rounding in float32 adds to it, nor longer runs, in which small differences grow. "
            "Weight decay, which acts on A and B alike, was left out."
        ),
        picture={
            "grid": {
                label: {c.name: c.grades[label].value for c in facts.columns if label in c.grades}
                for label in facts.plain
            },
            "exact_below": settings["exact_below"],
            "close_below": settings["close_below"],
        },
    )


def _value(column: Column, label: str) -> str:
    return number(column.grades[label].value) if label in column.grades else ""


def _graded(facts: Facts) -> str:
    def under(name: str) -> str:
        graded = {label: g for label, g in facts.plain.items() if g.name == name}
        return listing([f"{label}{near(g.closest)}" for label, g in graded.items()])

    exact, close = (setting(facts.settings[key]) for key in ("exact_below", "close_below"))
    return (
        "With W updated from the first step on, Delta-LoRA and LoRA of α(1 + λ) gave the same "
        f"weights (relative difference below {exact}) under {under('equal')}, close ones (below "
        f"{close}) under {under('close')}, and different ones under {under('different')}."
    )


def _expected(facts: Facts) -> str:
    if facts.surprises:
        return (
            f"This CONTRADICTS the expectation for {listing(facts.surprises)}: optimisers whose "
            "step does not change with the scale of the gradient should agree and others should "
            "not."
        )
    return (
        "Optimisers whose step does not change when a gradient is multiplied by a constant cancel "
        "the factor 1 + λ, which is all that tells the two apart; the epsilon of Adam limits how "
        "well. SGD does not cancel it."
    )


def _divided(facts: Facts) -> str:
    column = facts.divided
    asked, good = tuple(column.grades), facts.rescued
    end = "" if good == asked else f", of {listing(asked)} where it should"
    return (
        "At a learning rate divided by 1 + λ the LoRA gives Delta-LoRA's weights under "
        f"{listing(good)}{end}{near_among(column.near)}."
    )


def _clipped(clipping: Clipping) -> str:
    column = clipping.column
    gained = (
        f", gained under {listing(column.gained)}: a gradient that is cut to one norm in every "
        "step has lost the factor"
        if column.gained
        else ""
    )
    return (
        f"Clipping the global norm of the branches at {clipping.norm:g} acted on Delta-LoRA in "
        f"{span(clipping.acted)} of {clipping.steps} steps, and the equality was lost under "
        f"{listing(column.lost)}{near_among(column.near)}{gained}."
    )


def _with_another_module(facts: Facts) -> str:
    alone, both = facts.alone, facts.both
    why = ", which turns the common direction" if both.lost else ""
    return (
        "Where another module trains, whose gradient does not carry the factor, the equality was "
        f"lost under {listing(alone.lost)}{near_among(alone.near)} without clipping and under "
        f"{listing(both.lost)}{near_among(both.near)} with clipping at "
        f"{facts.settings['clips'][0]:g}{why}."
    )


def _later(facts: Facts) -> str:
    by_case = [f"under {listing(c.lost)} at {c.name}{near_among(c.near)}" for c in facts.later]
    return (
        "Where W follows later, the LoRA continues on a base shifted by the fixed -λs B_k A_k; the "
        f"equality was lost {listing(by_case)}."
    )
