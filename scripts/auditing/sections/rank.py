"""Is the update of Delta-LoRA of high rank? The rank of a layer's change against its bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.auditing.limits import Judged, judge, nearest
from scripts.auditing.words import (
    Content,
    Record,
    Section,
    limit_of,
    listing,
    number,
    percent,
    span,
)


@dataclass(frozen=True)
class RowFacts:
    """What the projections of one method have in common.

    Attributes:
        label: name of the method.
        ranks: numerical rank of every projection of every seed.
        full: singular values of a projection.
        multiple: the bound in multiples of r; None: any rank is allowed.
        bound: the largest rank that is allowed; None: any.
        holds: whether no projection is above the bound.
        num_full: projections of full rank.
        energy: mean share of the squared norm in the first r singular values.
        tolerance: the largest of those of the projections.
        moved: the ranks under a tolerance that is as much smaller, and as much larger, as counts
            as near.
        closest: the singular value nearest its tolerance, if those ranks change the verdict (the
            bound, or the number of projections of full rank); else None.
        spectrum: mean of every singular value.
    """

    label: str
    ranks: tuple[int, ...]
    full: int
    multiple: int | None
    bound: int | None
    holds: bool
    num_full: int
    energy: float
    tolerance: float
    moved: tuple[tuple[int, ...], ...]
    closest: Judged | None
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class Facts:
    """Every method, and what they say together.

    Attributes:
        rows: by method.
        all_hold: whether every bound holds.
        free: name of the method without a bound, if bounds stand beside it.
        free_rank: the smallest rank of its projections against the largest bound.
        asked_of: names of the methods that were asked for.
        tolerance: the largest of all.
    """

    rows: tuple[RowFacts, ...]
    all_hold: bool
    free: str | None
    free_rank: Judged | None
    asked_of: tuple[str, ...]
    tolerance: float


def facts(records: Sequence[Record], settings: Content) -> Facts | None:
    """Judge the rank of the change against its bound, row by row."""
    rows = []
    for row in settings["rows"]:
        mine = [r for r in records if r["settings"]["row"] == row["name"]]
        if mine:
            rows.append(_row(row, mine, settings["near_factor"]))
    if not rows:
        return None
    bounds = [row.bound for row in rows if row.bound is not None]
    free = next((row for row in reversed(rows) if row.bound is None), None) if bounds else None
    return Facts(
        rows=tuple(rows),
        all_hold=all(row.holds for row in rows),
        free=None if free is None else free.label,
        free_rank=None if free is None else _against(free, max(bounds)),
        asked_of=tuple(row["label"] for row in settings["rows"]),
        tolerance=max(row.tolerance for row in rows),
    )


def _against(free: RowFacts, bound: int) -> Judged:
    is_near = len({min(ranks) > bound for ranks in (free.ranks, *free.moved)}) > 1
    return Judged(min(free.ranks), bound, is_near)


def _row(row: Content, records: Sequence[Record], near_factor: float) -> RowFacts:
    found = [p for r in records for p in r["result"]["projections"].values()]
    ranks = tuple(p["rank"] for p in found)
    r, full = records[0]["result"]["method_rank"], len(found[0]["singular_values"])
    bound = None if row["bound"] is None else row["bound"] * r

    def verdict(ranks: Sequence[int]) -> int:
        return sum(rank == full for rank in ranks) if bound is None else max(ranks) <= bound

    moved = tuple(_ranks_at(found, factor) for factor in (1 / near_factor, near_factor))
    is_close = any(verdict(other) != verdict(ranks) for other in moved)
    values = (judge(v, p["tolerance"], near_factor) for p in found for v in p["singular_values"])
    energy = [_energy(p["singular_values"], r) for p in found]
    columns = zip(*(p["singular_values"] for p in found), strict=True)
    return RowFacts(
        label=row["label"],
        ranks=ranks,
        full=full,
        multiple=row["bound"],
        bound=bound,
        holds=bound is None or max(ranks) <= bound,
        num_full=sum(rank == full for rank in ranks),
        energy=sum(energy) / len(energy),
        tolerance=max(p["tolerance"] for p in found),
        moved=moved,
        closest=nearest(values) if is_close else None,
        spectrum=tuple(sum(column) / len(column) for column in columns),
    )


def _ranks_at(found: Sequence[Record], factor: float) -> tuple[int, ...]:
    """Return the ranks that a tolerance `factor` times as large gives."""
    return tuple(sum(v > factor * p["tolerance"] for v in p["singular_values"]) for p in found)


def _energy(values: Sequence[float], first: int) -> float:
    total = sum(v * v for v in values)
    return sum(v * v for v in values[:first]) / total if total else 1.0


def words(facts: Facts) -> Section:
    """Return the section."""
    if facts.all_hold:
        conclusion = "The total change of a layer has the rank that the algebra gives"
        meaning = (
            'The paper\'s "high-rank" is true of the number of entries that change, not of the '
            "rank of the change."
        )
    else:
        conclusion, meaning = "The measured ranks CONTRADICT the algebra", "See the table."
    if facts.free_rank is not None:
        meaning += (
            f" The change of {facts.free} {'is' if facts.free_rank.is_above else 'is NOT'} above "
            f"those bounds in every projection{_near_bound(facts.free_rank)}; a singular value "
            "below the tolerance is not told from rounding."
        )
    return Section(
        key="rank",
        title="Is the update of Delta-LoRA of high rank?",
        asked=(
            "What is the rank of the whole change of a layer, W_T + sBA - W_0? The updates of W "
            "telescope, so the algebra allows at most 2r for Delta-LoRA, r for LoRA; training W_Q "
            "and W_V themselves can reach full rank."
        ),
        findings=[f"{conclusion}: {'; '.join(map(_sentence, facts.rows))}.", meaning],
        head=[
            "Method",
            "Numerical rank",
            "Expected",
            "Holds",
            "Norm² in the first r",
            "Tolerance",
            "Projections",
        ],
        rows=[
            [
                row.label,
                span(row.ranks),
                _expected(row),
                _verdict(row),
                percent(row.energy, ".1f"),
                number(row.tolerance),
                str(len(row.ranks)),
            ]
            for row in facts.rows
        ],
        measured_on=(
            f"the finished runs of {listing(facts.asked_of)}, every W_Q and W_V "
            f"({facts.rows[-1].full} singular values each), every seed; singular values in float64 "
            "of the difference of two float32 weights; one counts if above max(out, in) × float32 "
            "epsilon × the largest singular value of W_0 (the rounding of the stored weights)."
        ),
        not_shown=(
            "whether a higher rank would help. A wider tolerance would count fewer values: the "
            "spectrum shows them all."
        ),
        picture={
            "curves": {row.label: list(row.spectrum) for row in facts.rows},
            "tolerance": facts.tolerance,
        },
    )


def _sentence(row: RowFacts) -> str:
    separator = " " if row.bound is None else ": "
    note = ""
    if row.closest is not None:
        note = (
            f"; near the limit: a singular value of {number(row.closest.value)} against "
            f"{limit_of(row.closest)}"
        )
    return (
        f"{row.label}: rank {span(row.ranks)} of {row.full} ({_expected(row)}{separator}"
        f"{_verdict(row)}{note})"
    )


def _near_bound(rank: Judged) -> str:
    return f" (near the limit: {rank.value:g} against {rank.limit:g})" if rank.is_near else ""


def _expected(row: RowFacts) -> str:
    if row.bound is None:
        return "full"
    return f"at most {'' if row.multiple == 1 else row.multiple}r = {row.bound}"


def _verdict(row: RowFacts) -> str:
    if row.bound is None:
        return f"in {row.num_full} of {len(row.ranks)}"
    return "yes" if row.holds else "NO"
