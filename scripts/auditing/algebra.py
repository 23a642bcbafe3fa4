"""Sections of the audit that judge the algebra: rank, gradients, equivalence with LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.auditing.words import Content, Record, Section, listing, number, span

LOSS_LABELS = {
    "cross_entropy": "cross-entropy",
    "label_smoothing": "label smoothing 0.1",
    "mean_squared_error": "mean squared error",
    "policy_gradient": "policy gradient (REINFORCE)",
    "contrastive": "contrastive (InfoNCE)",
}


# ---------------------------------------------------------------------- (a) rank


def rank_section(records: Sequence[Record], settings: Content) -> Section | None:
    """Judge the rank of the change against its bound, row by row."""
    if not records:
        return None
    rows, sentences, curves = [], [], {}
    verdicts: list[bool] = []
    bounds: list[int] = []
    free: tuple[str, int] | None = None
    full_rank = 0
    for row in settings["rows"]:
        mine = [r for r in records if r["settings"]["row"] == row["name"]]
        if not mine:
            continue
        found = [p for r in mine for p in r["result"]["projections"].values()]
        ranks = [p["rank"] for p in found]
        r, full = mine[0]["result"]["method_rank"], len(found[0]["singular_values"])
        full_rank = full
        share = [_energy(p["singular_values"], r) for p in found]
        if row["bound"] is None:
            num_full = sum(rank == full for rank in ranks)
            wanted, verdict = "full", f"in {num_full} of {len(ranks)}"
            free = (row["label"], min(ranks))
        else:
            bound = row["bound"] * r
            holds = max(ranks) <= bound
            wanted = f"at most {'' if row['bound'] == 1 else row['bound']}r = {bound}"
            verdict = "yes" if holds else "NO"
            verdicts.append(holds)
            bounds.append(bound)
        separator = " " if row["bound"] is None else ": "
        sentences.append(
            f"{row['label']}: rank {span(ranks)} of {full} ({wanted}{separator}{verdict})"
        )
        rows.append([
            row["label"], span(ranks), wanted, verdict,
            f"{100 * sum(share) / len(share):.1f} %", number(max(p["tolerance"] for p in found)),
            str(len(found)),
        ])  # fmt: skip
        curves[row["label"]] = _mean_spectrum(found)
    conclusion = (
        "The total change of a layer has the rank that the algebra gives"
        if all(verdicts)
        else "The measured ranks CONTRADICT the algebra"
    )
    meaning = (
        'The paper\'s "high-rank" is true of the number of entries that change, not of the rank of '
        "the change."
        if all(verdicts)
        else "See the table."
    )
    if free is not None and bounds:
        is_above = free[1] > max(bounds)
        meaning += (
            f" The change of {free[0]} {'is' if is_above else 'is NOT'} above those bounds in "
            "every projection; a singular value below the tolerance is not told from rounding."
        )
    return Section(
        key="rank",
        title="Is the update of Delta-LoRA of high rank?",
        asked=(
            "What is the rank of the whole change of a layer, W_T + sBA - W_0? The updates of W "
            "telescope, so the algebra allows at most 2r for Delta-LoRA, r for LoRA; training W_Q "
            "and W_V themselves can reach full rank."
        ),
        findings=[
            f"{conclusion}: {'; '.join(sentences)}.",
            meaning,
        ],
        head=["Method", "Numerical rank", "Expected", "Holds", "Norm² in the first r", "Tolerance",
              "Projections"],
        rows=rows,
        measured_on=(
            f"the finished runs of {listing([r['label'] for r in settings['rows']])}, every W_Q "
            f"and W_V ({full_rank} singular values each), every seed; singular values in float64 "
            "of the difference of two float32 weights; one counts if above max(out, in) × float32 "
            "epsilon × the largest singular value of W_0 (the rounding of the stored weights)."
        ),
        not_shown=(
            "whether a higher rank would help. A wider tolerance would count fewer values: the "
            "spectrum shows them all."
        ),
        picture={"curves": curves, "tolerance": max(
            p["tolerance"] for r in records for p in r["result"]["projections"].values())},
    )  # fmt: skip


def _energy(values: Sequence[float], first: int) -> float:
    total = sum(v * v for v in values)
    return sum(v * v for v in values[:first]) / total if total else 1.0


def _mean_spectrum(found: Sequence[Record]) -> list[float]:
    columns = zip(*(p["singular_values"] for p in found), strict=True)
    return [sum(column) / len(column) for column in columns]


# ---------------------------------------------------------------------- (b) gradients


def gradient_section(records: Sequence[Record], settings: Content) -> Section | None:
    """Judge whether dL/dW equals dL/d(BA)/s, with and without dropout."""
    if not records:
        return None
    limit = settings["holds_below"]
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
    without = (
        f"agreed to {number(worst)} at worst under {_all(means)}"
        if worst < limit
        else f"did NOT agree: they differed by up to {number(worst)} (limit {limit:g})"
    )
    if positive:
        smallest = [by[positive[0]] for by in means.values()]
        largest = [by[positive[-1]] for by in means.values()]
        broken = min(smallest) >= limit
        with_dropout = (
            f"with dropout {positive[0]} they differ by {_percent(smallest)}, with "
            f"{positive[-1]} by {_percent(largest)}"
            if broken
            else f"with dropout {positive[0]} they STILL agreed under at least one loss"
        )
    else:
        with_dropout = "no dropout was measured"
    return Section(
        key="gradients",
        title="Is the gradient of W that of the product BA?",
        asked=(
            "Delta-LoRA moves W along with BA because both have the same gradient, "
            "dL/dW = dL/d(BA) / s. Does this hold for other losses than cross-entropy, and how "
            "much of it is left with dropout in the branch?"
        ),
        findings=[
            f"Without dropout the gradients of W and BA {without}; {with_dropout}.",
            "The identity is one of the layer, so the loss does not matter; dropout in the branch "
            "breaks it, because W sees x and BA sees the masked x."
            if worst < limit
            else "See the table.",
        ],
        head=["Loss", *(f"dropout {d}" for d in ["0", *positive])],
        rows=[
            [LOSS_LABELS[loss], *(number(by[d]) for d in ["0", *positive])]
            for loss, by in means.items()
        ],
        measured_on=(
            f"the branches that the runs of row {settings['row']} have learned (every seed), in "
            f"float64, one batch of {settings['batch']} × {settings['length']} tokens of the "
            f"training "
            f"text, {settings['num_masks']} draws of the dropout; mean over projections, draws and "
            "seeds of |dL/dW - dL/d(BA)/s| / |dL/dW|. MSE and InfoNCE read the mean last state, "
            "the policy gradient samples every token and rewards even token numbers."
        ),
        not_shown=(
            "what the broken identity costs in score, which the section on dropout asks. The three "
            "losses other than cross-entropy are made up for this test."
        ),
        picture={"gaps": {LOSS_LABELS[loss]: by for loss, by in means.items()}, "limit": limit},
    )


def _all(means: Mapping[str, Any]) -> str:
    return f"all {len(means)} losses" if len(means) > 1 else LOSS_LABELS[next(iter(means))]


def _percent(values: Sequence[float]) -> str:
    return span([100 * v for v in values], "{:.0f}") + " %"


# ---------------------------------------------------------------------- (c) equivalence


def grade(relative: float, settings: Content) -> str:
    """Return ``equal``, ``close`` or ``different`` by the thresholds of the settings."""
    if relative < settings["exact_below"]:
        return "equal"
    return "close" if relative < settings["close_below"] else "different"


def _clipping(
    records: Sequence[Record],
    clip: float,
    column: str,
    broken_by: Mapping[str, Sequence[str]],
    mended_by: Mapping[str, Sequence[str]],
) -> list[str]:
    """Return what clipping the branches alone at `clip` did, in words."""
    mine = [r for r in records if r["settings"]["max_grad_norm"] == clip]
    acted = [r["result"]["num_clipped"] for r in mine if not r["settings"]["head"]]
    if not acted:
        return []
    text = (
        f"Clipping the global norm of the branches at {clip:g} acted on Delta-LoRA in "
        f"{span(acted)} of {mine[0]['settings']['steps']} steps, and the equality was lost under "
        f"{listing(broken_by[column])}"
    )
    if mended_by[column]:
        text += (
            f", gained under {listing(mended_by[column])}: a gradient that is cut to one norm in "
            "every step has lost the factor"
        )
    return [text + "."]


def equivalence_section(records: Sequence[Record], settings: Content) -> Section | None:
    """Judge where Delta-LoRA equals the LoRA of alpha * (1 + lambda)."""
    if not records:
        return None
    first = settings["start_steps"][0]
    rows, grid, plain, surprises = [], {}, {}, []
    base_case = (first, None, False, False)
    columns: dict[tuple[Any, ...], str] = {base_case: f"K = {first}"}
    columns |= {(first, c, False, False): f"clipped at {c:g}" for c in settings["clips"]}
    columns[first, None, True, False] = "another module"
    columns[first, settings["clips"][0], True, False] = (
        f"another module, clipped at {settings['clips'][0]:g}"
    )
    columns |= {(K, None, False, False): f"K = {K}" for K in settings["start_steps"][1:]}
    columns |= {(first, None, False, True): "rate / (1 + λ)"}
    broken_by: dict[str, list[str]] = {name: [] for name in columns.values()}
    mended_by: dict[str, list[str]] = {name: [] for name in columns.values()}
    for optimizer in settings["optimizers"]:
        mine = {}
        for record in records:
            case = record["settings"]
            same = ("optimizer", "learning_rate", "options")
            if all(case[key] == optimizer[key] for key in same):
                key = (
                    case["start_step"],
                    case["max_grad_norm"],
                    bool(case["head"]),
                    case["learning_rate_factor"] != 1,
                )
                mine[columns[key]] = record["result"]
        if columns[base_case] not in mine:
            continue
        base = mine[columns[base_case]]["relative"]
        plain[optimizer["label"]] = base
        if (grade(base, settings) == "different") == optimizer["invariant"]:
            surprises.append(optimizer["label"])
        for name, result in mine.items():
            worse = grade(result["relative"], settings) == "different"
            if worse and grade(base, settings) != "different":
                broken_by[name].append(optimizer["label"])
            if not worse and grade(base, settings) == "different":
                mended_by[name].append(optimizer["label"])
        rows.append([
            optimizer["label"],
            *(number(mine[c]["relative"]) if c in mine else "" for c in columns.values()),
            number(mine[columns[base_case]]["max_abs"]),
        ])  # fmt: skip
        grid[optimizer["label"]] = {c: mine[c]["relative"] for c in columns.values() if c in mine}
    by_grade = {
        name: [label for label, value in plain.items() if grade(value, settings) == name]
        for name in ("equal", "close", "different")
    }
    others = [columns[(K, None, False, False)] for K in settings["start_steps"][1:]]
    later = sorted({label for name in others for label in broken_by[name]})
    lines = [
        f"With W updated from the first step on, Delta-LoRA and LoRA of α(1 + λ) gave the same "
        f"weights (relative difference below {settings['exact_below']:g}) under "
        f"{listing(by_grade['equal'])}, close ones (below {settings['close_below']:g}) under "
        f"{listing(by_grade['close'])}, and different ones under {listing(by_grade['different'])}.",
    ]
    if surprises:
        lines.append(
            f"This CONTRADICTS the expectation for {listing(surprises)}: optimisers whose step "
            "does not change with the scale of the gradient should agree and others should not."
        )
    else:
        lines.append(
            "Optimisers whose step does not change when a gradient is multiplied by a constant "
            "cancel the factor 1 + λ, which is all that tells the two apart; the epsilon of Adam "
            "limits how well. SGD does not cancel it."
        )
    last = columns[first, None, False, True]
    rescued = [label for label, by in grid.items() if last in by]
    if rescued:
        good = [label for label in rescued if grade(grid[label][last], settings) != "different"]
        lines.append(
            f"At a learning rate divided by 1 + λ the LoRA gives Delta-LoRA's weights under "
            f"{listing(good)}"
            + ("." if len(good) == len(rescued) else f", of {listing(rescued)} where it should.")
        )
    for clip in settings["clips"]:
        lines += _clipping(records, clip, columns[first, clip, False, False], broken_by, mended_by)
    alone, both = (
        columns[first, None, True, False],
        columns[first, settings["clips"][0], True, False],
    )
    lines.append(
        f"Where another module trains, whose gradient does not carry the factor, the equality was "
        f"lost under {listing(broken_by[alone])} without clipping and under "
        f"{listing(broken_by[both])} with clipping at {settings['clips'][0]:g}"
        + (", which turns the common direction." if broken_by[both] else ".")
    )
    if others:
        lines.append(
            f"Where W follows later ({listing(others)}), the LoRA continues on a base shifted by "
            f"the fixed -λs B_k A_k; the equality was lost under {listing(later)}."
        )
    return Section(
        key="equivalence",
        title="Is Delta-LoRA the LoRA of α(1 + λ)?",
        asked=(
            "The layer of Delta-LoRA with K = -1 is W_0 + (1 + λ)sBA, that of a LoRA with "
            "α(1 + λ); only the gradients of A and B differ, by the factor 1 + λ. For which "
            "optimisers do the two give the same weights, and what breaks it?"
        ),
        findings=lines,
        head=["Optimiser", *columns.values(), f"largest difference, K = {first}"],
        rows=rows,
        measured_on=(
            f"{settings['steps']} steps in float64 of both from one start, rank "
            f"{settings['rank']}, "
            f"α {settings['alpha']}, λ {settings['update_ratio']:g}, "
            f"{settings['batch']} × {settings['length']} tokens a step, constant learning rate, no "
            "weight decay, no dropout. Relative: norm of the difference of the merged W_Q and W_V "
            "over the norm of how far Delta-LoRA moved them."
        ),
        not_shown=(
            "how rounding in float32 adds to it, nor longer runs, in which small differences grow. "
            "Weight decay, which acts on A and B alike, was left out."
        ),
        picture={
            "grid": grid,
            "exact_below": settings["exact_below"],
            "close_below": settings["close_below"],
        },
    )
