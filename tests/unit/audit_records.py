"""Made-up records of the audit's measurements and runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from scripts.auditing.plan import equivalence_cases, load_settings

SETTINGS = load_settings("tiny")


def one(part: str, settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return a record of a measurement."""
    return {
        "signature": f"{part}-{len(json.dumps(settings))}{abs(hash(json.dumps(settings)))}",
        "part": part,
        "settings": settings,
        "result": result,
        "model": "tiny_gpt2",
        "provenance": {
            "git": {"commit": "0123456789abcdef", "dirty": False},
            "device": {"name": "test CPU"},
        },
    }


def spectra(**by_row: list[float]) -> list[dict[str, Any]]:
    """Return a record a row, of one projection with these singular values; tolerance 1e-5, r 4."""
    found = []
    for row, values in by_row.items():
        rank = sum(value > 1e-5 for value in values)
        projection = {"rank": rank, "tolerance": 1e-5, "singular_values": values}
        result = {"method_rank": 4, "projections": {"h.0.query": projection}}
        found.append(one("rank", {"row": row, "seed": 1}, result))
    return found


def ranks(**by_row: int) -> list[dict[str, Any]]:
    """Return a record a row, of one projection of this rank of 16, far from the tolerance."""
    return spectra(**{row: [1.0] * n + [1e-9] * (16 - n) for row, n in by_row.items()})


def gaps(without: float, with_dropout: float) -> list[dict[str, Any]]:
    """Return the differences of gradients without dropout and with 0.1."""
    by = {"0": [{"mean": without, "max": without}]}
    by["0.1"] = [{"mean": with_dropout, "max": with_dropout}]
    return [one("gradients", {"loss": "cross_entropy"}, {"gaps": by})]


def comparisons(**relative: float) -> list[dict[str, Any]]:
    """Return all comparisons; `relative` is the difference by the optimiser's name."""
    chosen, found = SETTINGS["equivalence"], []
    for optimizer in chosen["optimizers"]:
        for case in equivalence_cases(chosen, optimizer):
            own = {key: optimizer[key] for key in ("optimizer", "learning_rate", "options")}
            value = relative.get(optimizer["name"], 1e-13 if optimizer["invariant"] else 0.5)
            if case["learning_rate_factor"] != 1:
                value = 1e-14
            if case["head"] and case["max_grad_norm"]:
                value = 0.3
            own["steps"] = 60
            result = {"relative": value, "max_abs": value, "moved": 1.0, "num_clipped": 3}
            found.append(one("equivalence", {**own, **case}, result))
    return found


def scored(part: str, values: Mapping[str, list[float]]) -> dict[str, dict[int, Any]]:
    """Return runs with these BLEU of the seeds 1, 2, ..., by ``<row>/<x>``."""
    return {
        f"{part}/{name}": {
            seed: {"metrics": {"bleu": v / 100}, "training": {"examples": 29, "steps": 160}}
            for seed, v in enumerate(by_seed, start=1)
        }
        for name, by_seed in values.items()
    }


def rounding(in_place: float, rounded: float) -> list[dict[str, Any]]:
    """Return the errors of two forms at a learning rate of 2e-5."""
    found = []
    for form, value in (("in_place", in_place), ("in_place_rounded", rounded)):
        result = {"errors": [[5, value], [10, value]], "weight_rms": 0.1}
        found.append(one("precision", {"learning_rate": 2e-5, "form": form}, result))
    return found


def memory_of(name: str, measured: int, expected: int) -> dict[str, Any]:
    """Return the bytes of a method at one size, whose formula is right but for the peak."""
    point = {"batch": 2, "length": 32, "measured": {"weights": 500, "peak": measured}}
    point["expected"] = {"weights": 500, "peak": expected}
    return one("memory", {"name": name}, {"grid": [point]})
