"""Sections of the audit about costs: what a bfloat16 W loses, what a step takes in memory."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.auditing.words import Content, Record, Section, listing, number

FORM_LABELS = {
    "in_place": "in place, W float32",
    "in_place_rounded": "in place, W rounded to bfloat16 after every step",
    "closed_form": "closed form over a bfloat16 W",
}
MIB = 2**20


# ---------------------------------------------------------------------- (f) precision


def precision_section(records: Sequence[Record], settings: Content) -> Section | None:
    """Judge which forms keep the update of W, and compare with what was expected."""
    if not records:
        return None
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for record in records:
        rate = f"{record['settings']['learning_rate']:g}"
        curves.setdefault(rate, {})[record["settings"]["form"]] = record["result"]["errors"]
    expected = {f"{float(rate):g}": value for rate, value in settings["learning_rates"].items()}
    rates = sorted(curves, key=float)
    rows, rounded, fine, lost, compared = [], [], [], [], []
    for rate in rates:
        for form in settings["forms"]:
            if form not in curves[rate]:
                continue
            last = curves[rate][form][-1][1]
            first = curves[rate][form][0][1]
            is_lost = last > settings["lost_above"]
            if form == "in_place_rounded":
                rounded.append(f"{number(last)} at learning rate {rate}")
                difference = abs(last - expected[rate])
                verdict = (
                    "agrees with" if difference <= settings["agrees_within"] else "differs from"
                )
                compared.append(f"{number(last)} at {rate} {verdict} {expected[rate]:g}")
            else:
                (lost if is_lost else fine).append((form, last))
            rows.append([
                FORM_LABELS[form], rate, number(first), number(last), "lost" if is_lost else "kept"
            ])  # fmt: skip
    kept = (
        f"the forms that are allowed keep it ({number(max(v for _, v in fine))} at worst)"
        if fine and not lost
        else "a form that is allowed LOSES it: "
        + listing([f"{FORM_LABELS[form]} {number(value)}" for form, value in lost])
        if lost
        else "the allowed forms were not measured"
    )
    errors = [curves[rate]["in_place_rounded"][-1][1] for rate in rates
              if "in_place_rounded" in curves[rate]]  # fmt: skip
    is_lost = bool(errors) and min(errors) > settings["lost_above"]
    how = "loses much of its update" if is_lost else "does NOT lose its update at every rate"
    return Section(
        key="precision",
        title="What does a bfloat16 W lose?",
        asked=(
            "Written in place into a bfloat16 W, small updates round away. How wrong is the "
            "change of "
            "W after training, against float32 and against the closed form, which never writes W?"
        ),
        findings=[
            f"A W that is stored in bfloat16 {how}: relative error {listing(rounded)}; {kept}.",
            f"Of the values expected beforehand for the rounded form, {listing(compared)}; the "
            "size depends on how large the weights are against the updates "
            f"(here a root mean square of {number(records[0]['result']['weight_rms'])}).",
        ],
        head=["Form", "Learning rate", "First error", "Last error", "Update"],
        rows=rows,
        measured_on=(
            f"{settings['steps']} steps of AdamW with the recipe's betas, epsilon and weight "
            f"decay, constant learning rate, rank {settings['rank']}, α {settings['alpha']}, "
            f"λ {settings['update_ratio']:g}, K = {settings['start_step']}; all forms start from "
            "weights rounded to bfloat16. The library refuses to write into a bfloat16 W, so its "
            "storage is emulated: W is rounded to bfloat16 after every step. Error: distance of "
            "the "
            "change of W from λs(B_t A_t - B_k A_k) in float64, over the norm of that; lost: above "
            f"{settings['lost_above']:g}."
        ),
        not_shown=(
            "the effect on a score, nor stochastic rounding, which would keep the update on "
            "average."
        ),
        picture={"curves": curves},
    )


# ---------------------------------------------------------------------- (g) memory


def memory_section(records: Sequence[Record], settings: Content) -> Section | None:
    """Compare methods by peak, and the formula with what was measured."""
    if not records:
        return None
    by_name = {record["settings"]["name"]: record["result"]["grid"] for record in records}
    labels = {method["name"]: method["label"] for method in settings["methods"]}
    errors: dict[str, float] = {}
    for grid in by_name.values():
        for point in grid:
            for category, measured in point["measured"].items():
                expected = point["expected"][category]
                gap = abs(expected - measured) / max(measured, 1)
                errors[category] = max(errors.get(category, 0.0), gap)
    worst = max(errors, key=lambda name: errors[name])
    fits = errors[worst] <= settings["fits_within"]
    largest = {
        name: max(grid, key=lambda p: (p["batch"] * p["length"], p["length"]))
        for name, grid in by_name.items()
    }
    point = next(iter(largest.values()))
    at = f"batch {point['batch']} × {point['length']} tokens"
    lines = []
    reference = settings["reference"]
    if reference in largest:
        peaks = {name: p["measured"]["peak"] for name, p in largest.items()}
        ratios = [
            f"{labels[name]} {peaks[name] / peaks[reference]:.3f}" for name in labels
            if name in peaks and name != reference
        ]  # fmt: skip
        lines.append(f"Peak memory over that of {labels[reference]} at {at}: {', '.join(ratios)}.")
        chosen = largest[reference]["measured"]
        shares = [f"{c} {100 * chosen[c] / chosen['peak']:.1f} %" for c in chosen if c != "peak"]
        lines.append(
            f"Of the peak of {labels[reference]}, {', '.join(shares)}; the rest are the logits, "
            "their gradient and whatever else lives for a moment."
        )
    lines.append(
        f"The formula {'fits' if fits else 'does NOT fit'}: over {len(by_name)} methods and "
        f"{len(settings['batches']) * len(settings['lengths'])} sizes its largest relative error "
        f"is {100 * errors[worst]:.2f} % ({worst}); the peak is off by at most "
        f"{100 * errors['peak']:.2f} %."
    )
    lines.append(
        "Exact in every measurement: "
        + listing([c for c, error in errors.items() if error == 0])
        + "."
    )
    categories = [c for c in point["measured"] if c != "peak"]
    rows = []
    for name in labels:
        if name not in largest:
            continue
        p = largest[name]
        rows.append([
            labels[name],
            *(f"{p['measured'][c] / MIB:.2f}" for c in categories),
            f"{p['measured']['peak'] / MIB:.2f}",
            f"{p['expected']['peak'] / MIB:.2f}",
        ])  # fmt: skip
    return Section(
        key="memory",
        title="What does Delta-LoRA cost in memory?",
        asked=(
            "How much memory does one training step take by method, batch and length, in which "
            "category, and can it be computed beforehand?"
        ),
        findings=lines,
        head=["Method", *(f"{c}, MiB" for c in categories), "peak, MiB", "formula, MiB"],
        rows=rows,
        measured_on=(
            f"one step after another one, batches "
            f"{listing([str(b) for b in settings['batches']])}, "
            f"lengths {listing([str(t) for t in settings['lengths']])}, rank {settings['rank']}; "
            f"the table shows {at}. Bytes of living tensors; activations are what autograd saves; "
            f"peak on "
            "a CPU by counting every tensor made and freed, on CUDA by its allocator. Formula: "
            "delta_lora/analysis/memory_model.py."
        ),
        not_shown=(
            "memory inside kernels, of the libraries and of a fragmented allocator; padding; "
            "gradient checkpointing; the shares of a larger model, whose weights and optimiser "
            "state grow with the square of the width."
        ),
        picture={
            "grids": {labels[name]: by_name[name] for name in labels if name in by_name},
            "at": at,
            "categories": categories,
        },
    )
