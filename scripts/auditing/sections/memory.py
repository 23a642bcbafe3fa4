"""What does Delta-LoRA cost in memory? Peaks by method, and the formula against the count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.auditing.limits import Judged, judge
from scripts.auditing.words import Content, Record, Section, listing, percent

MIB = 2**20


@dataclass(frozen=True)
class Facts:
    """The bytes of one step.

    Attributes:
        grids: by method, the measured and expected bytes at every batch and length.
        largest: by method, those at the largest batch.
        at: batch and length of those.
        categories: what the peak is made of.
        reference: name of the method that peaks are compared with; None: it was not measured.
        ratios: by other method, its peak over that of the reference.
        shares: by category, its share of the peak of the reference.
        worst_category: where the formula is most wrong.
        worst: that relative error; the formula fits if not above the limit.
        worst_peak: the largest relative error of the peak.
        exact: categories without any error.
        num_sizes: batches times lengths.
        settings: of the measurement.
    """

    grids: Mapping[str, Sequence[Content]]
    largest: Mapping[str, Content]
    at: tuple[int, int]
    categories: tuple[str, ...]
    reference: str | None
    ratios: Mapping[str, float]
    shares: Mapping[str, float]
    worst_category: str
    worst: Judged
    worst_peak: float
    exact: tuple[str, ...]
    num_sizes: int
    settings: Content


def facts(records: Sequence[Record], settings: Content) -> Facts | None:
    """Compare methods by peak, and the formula with what was measured."""
    if not records:
        return None
    by_name = {record["settings"]["name"]: record["result"]["grid"] for record in records}
    grids = {m["label"]: by_name[m["name"]] for m in settings["methods"] if m["name"] in by_name}
    largest = {label: largest_point(grid) for label, grid in grids.items()}
    point = next(iter(largest.values()))
    errors = _errors(grids)
    worst = max(errors, key=lambda name: errors[name])
    label = next(m["label"] for m in settings["methods"] if m["name"] == settings["reference"])
    reference = largest[label]["measured"] if label in largest else None
    ratios, shares = {}, {}
    if reference is not None:
        peak = reference["peak"]
        ratios = {n: p["measured"]["peak"] / peak for n, p in largest.items() if n != label}
        shares = {c: size / peak for c, size in reference.items() if c != "peak"}
    return Facts(
        grids=grids,
        largest=largest,
        at=(point["batch"], point["length"]),
        categories=tuple(c for c in point["measured"] if c != "peak"),
        reference=None if reference is None else label,
        ratios=ratios,
        shares=shares,
        worst_category=worst,
        worst=judge(errors[worst], settings["fits_within"], settings["near_factor"]),
        worst_peak=errors["peak"],
        exact=tuple(category for category, error in errors.items() if error == 0),
        num_sizes=len(settings["batches"]) * len(settings["lengths"]),
        settings=settings,
    )


def largest_point(grid: Sequence[Content]) -> Content:
    """Return the point with most tokens, of several the one with the longest sequences."""
    return max(grid, key=lambda p: (p["batch"] * p["length"], p["length"]))


def _errors(grids: Mapping[str, Sequence[Content]]) -> dict[str, float]:
    """Return the largest relative error of the formula by category, the peak among them."""
    errors: dict[str, float] = {}
    for grid in grids.values():
        for point in grid:
            for category, measured in point["measured"].items():
                gap = abs(point["expected"][category] - measured) / max(measured, 1)
                errors[category] = max(errors.get(category, 0.0), gap)
    return errors


def words(facts: Facts) -> Section:
    """Return the section."""
    settings = facts.settings
    at = f"batch {facts.at[0]} × {facts.at[1]} tokens"
    return Section(
        key="memory",
        title="What does Delta-LoRA cost in memory?",
        asked=(
            "How much memory does one training step take by method, batch and length, in which "
            "category, and can it be computed beforehand?"
        ),
        findings=[*_compared(facts, at), *_formula(facts)],
        head=["Method", *(f"{c}, MiB" for c in facts.categories), "peak, MiB", "formula, MiB"],
        rows=[
            [
                label,
                *(_mib(point["measured"][category]) for category in facts.categories),
                _mib(point["measured"]["peak"]),
                _mib(point["expected"]["peak"]),
            ]
            for label, point in facts.largest.items()
        ],
        measured_on=(
            f"one step after another one, batches {listing(_texts(settings['batches']))}, lengths "
            f"{listing(_texts(settings['lengths']))}, rank {settings['rank']}; the table shows "
            f"{at}. Bytes of living tensors; activations are what autograd saves; peak on a CPU by "
            "counting every tensor made and freed, on CUDA by its allocator. Formula: "
            "delta_lora/analysis/memory_model.py."
        ),
        not_shown=(
            "memory inside kernels, of the libraries and of a fragmented allocator; padding; "
            "gradient checkpointing; the shares of a larger model, whose weights and optimiser "
            "state grow with the square of the width."
        ),
        picture={
            "grids": {label: list(grid) for label, grid in facts.grids.items()},
            "at": at,
            "categories": list(facts.categories),
        },
    )


def _compared(facts: Facts, at: str) -> list[str]:
    if facts.reference is None:
        return []
    ratios = ", ".join(f"{label} {ratio:.3f}" for label, ratio in facts.ratios.items())
    shares = ", ".join(f"{c} {percent(share, '.1f')}" for c, share in facts.shares.items())
    return [
        f"Peak memory over that of {facts.reference} at {at}: {ratios}.",
        f"Of the peak of {facts.reference}, {shares}; the rest are the logits, their gradient and "
        "whatever else lives for a moment.",
    ]


def _formula(facts: Facts) -> list[str]:
    verdict = "does NOT fit" if facts.worst.is_above else "fits"
    limit = percent(facts.worst.limit, "g")
    close = f", near the limit of {limit}" if facts.worst.is_near else ""
    return [
        f"The formula {verdict}: over {len(facts.grids)} methods and {facts.num_sizes} sizes its "
        f"largest relative error, of {facts.worst_category}, is "
        f"{percent(facts.worst.value, '.2f')}{close}; the peak is off by at most "
        f"{percent(facts.worst_peak, '.2f')}.",
        f"Exact in every measurement: {listing(facts.exact)}.",
    ]


def _texts(numbers: Sequence[Any]) -> list[str]:
    return [str(number) for number in numbers]


def _mib(size: int) -> str:
    return f"{size / MIB:.2f}"
