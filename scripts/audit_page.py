"""The page of the audit: what was found, by rules, from records and from nothing else.

Every sentence under "finding" is chosen by a rule from the numbers it states, with the thresholds
of ``configs/audit``; a number that contradicts what was expected gives the sentence that says so.
The same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from delta_lora import stats
from scripts.table_formats import md_table
from scripts.table_results import code_of, device_of

Content = Mapping[str, Any]
Record = Mapping[str, Any]

LOSS_LABELS = {
    "cross_entropy": "cross-entropy",
    "label_smoothing": "label smoothing 0.1",
    "mean_squared_error": "mean squared error",
    "policy_gradient": "policy gradient (REINFORCE)",
    "contrastive": "contrastive (InfoNCE)",
}
FORM_LABELS = {
    "in_place": "in place, W float32",
    "in_place_rounded": "in place, W rounded to bfloat16 after every step",
    "closed_form": "closed form over a bfloat16 W",
}
MIB = 2**20


@dataclass
class Section:
    """One question and its answer.

    Attributes:
        key: name of its picture is ``audit_<key>``.
        title: the question in a few words.
        asked: what was asked.
        findings: sentences; the first is repeated on top of the page.
        head: of the table.
        rows: of the table.
        measured_on: what it was measured on.
        not_shown: what it does not show.
        picture: data of the picture.
    """

    key: str
    title: str
    asked: str
    findings: list[str]
    head: list[str]
    rows: list[list[str]]
    measured_on: str
    not_shown: str
    picture: dict[str, Any] = field(default_factory=dict)


def build(records: Content) -> dict[str, Any]:
    """Return the content of ``audit.json``.

    Args:
        records: from `scripts.audit.read_records`.

    Returns:
        JSON values: facts, ``found`` (one sentence a question) and ``sections``.

    Raises:
        ValueError: there is no record at all, or one is of another scale.
    """
    runs, measured = records["runs"], records["measurements"]
    used = [record for by_seed in runs.values() for record in by_seed.values()]
    if not used and not measured:
        raise ValueError("the audit has no record yet; run: make audit")
    wrong = sorted({r["scale"] for r in used} - {records["scale"]})
    if wrong:
        raise ValueError(f"records of scale {wrong} on a page of scale {records['scale']}")
    by_part: dict[str, list[Record]] = {}
    for record in measured:
        by_part.setdefault(record["part"], []).append(record)
    settings = records["settings"]
    made: list[Section | None] = [
        rank_section(by_part.get("rank", []), settings["rank"]),
        gradient_section(by_part.get("gradients", []), settings["gradients"]),
        equivalence_section(by_part.get("equivalence", []), settings["equivalence"]),
        dropout_section(runs, settings),
        low_resource_section(runs, settings),
        precision_section(by_part.get("precision", []), settings["precision"]),
        memory_section(by_part.get("memory", []), settings["memory"]),
    ]
    sections = [section for section in made if section is not None]
    distinct = {r["signature"]: r for r in [*used, *measured]}.values()
    return {
        "page": "audit",
        "scale": records["scale"],
        "seeds": list(records["seeds"]),
        "overrides": list(records["extra"]),
        "models": sorted(
            {
                r["model"]["name"] if isinstance(r["model"], Mapping) else r["model"]
                for r in distinct
            }
        ),
        "num_runs": len({r["signature"] for r in used}),
        "num_measurements": len(measured),
        "code": code_of(list(distinct)),
        "devices": sorted({device_of(record) for record in distinct}),
        "missing": list(records["missing"]),
        "found": [section.findings[0] for section in sections],
        "sections": [asdict(section) for section in sections],
    }


def to_markdown(content: Content) -> str:
    """Return the page."""
    seeds = ",".join(map(str, content["seeds"]))
    command = f"make audit SCALE={content['scale']} SEEDS={seeds}"
    if content["overrides"]:
        command += f' ARGS="{" ".join(content["overrides"])}"'
    lines = [f"# Audit of Delta-LoRA (scale: {content['scale']})", "", "## What we found", ""]
    lines += [f"- {sentence}" for sentence in content["found"]]
    if content["scale"] != "paper":
        lines += [
            "",
            "**These are not the paper's models.** What is algebra holds at every size; a ",
        ]
        lines[-1] += "score, an error or a memory size holds for this scale only."
    lines += ["", f"Made by `{command}` from {content['num_runs']} runs and "]
    lines[-1] += f"{content['num_measurements']} measurements; generated, never edited."
    lines += ["", f"- Model: {', '.join(content['models'])}"]
    commits = [
        f"{str(c['commit'])[:12]}{' with uncommitted changes' if c['dirty'] else ''} ({c['runs']})"
        for c in content["code"]
    ]
    lines += [f"- Code: commit {', '.join(commits)}", f"- Device: {', '.join(content['devices'])}"]
    if content["missing"]:
        shown = ", ".join(content["missing"][:6])
        lines.append(f"- **Not there yet ({len(content['missing'])}):** {shown}, ...")
    for section in content["sections"]:
        lines += ["", f"## {section['title']}", "", f"**Asked.** {section['asked']}", ""]
        lines += [f"![{section['title']}](audit_{section['key']}.svg)", ""]
        lines += ["**Found.** " + " ".join(section["findings"]), ""]
        lines += md_table(section["head"], section["rows"])
        lines += ["", f"**Measured on.** {section['measured_on']}", ""]
        lines += [f"**Does not show.** {section['not_shown']}"]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- words


def number(value: float) -> str:
    """Return a measured number with two significant digits."""
    if value == 0:
        return "0"
    return f"{value:.2f}" if 0.01 <= abs(value) < 100 else f"{value:.1e}".replace("e-0", "e-")


def span(values: Iterable[float], form: str = "{:g}") -> str:
    """Return ``4`` or ``3 to 4``."""
    found = sorted(values)
    low, high = form.format(found[0]), form.format(found[-1])
    return low if low == high else f"{low} to {high}"


def listing(names: Sequence[str]) -> str:
    """Return names as a list in words, or ``none``."""
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def interval(summary: stats.Summary) -> str:
    """Return mean and interval, with the sign."""
    if summary.ci95 is None:
        return f"{summary.mean:+.2f} (one seed)"
    return f"{summary.mean:+.2f} [{summary.ci95[0]:+.2f}, {summary.ci95[1]:+.2f}]"


def direction(summary: stats.Summary) -> str:
    """Return ``above``, ``below`` or ``not distinguishable`` from the interval of a difference."""
    if summary.ci95 is None or summary.ci95[0] <= 0 <= summary.ci95[1]:
        return "not distinguishable"
    return "above" if summary.mean > 0 else "below"


# ---------------------------------------------------------------------- (a) rank


def rank_section(records: Sequence[Record], settings: Content) -> Section | None:
    """Judge the rank of the change against its bound, row by row."""
    if not records:
        return None
    rows, sentences, verdicts, curves = [], [], [], {}
    full_rank = 0
    for row in settings["rows"]:
        mine = [r for r in records if r["settings"]["row"] == row["name"]]
        if not mine:
            continue
        found = [p for r in mine for p in r["result"]["projections"].values()]
        ranks = [p["rank"] for p in found]
        r, full = mine[0]["result"]["method_rank"], len(found[0]["singular_values"])
        full_rank = full
        bound = full if row["bound"] is None else row["bound"] * r
        holds = (min(ranks) == full) if row["bound"] is None else (max(ranks) <= bound)
        share = [_energy(p["singular_values"], r) for p in found]
        wanted = (
            "full"
            if row["bound"] is None
            else f"at most {'' if row['bound'] == 1 else row['bound']}r = {bound}"
        )
        text = (
            f"{row['label']}: rank {span(ranks)} of {full} ({wanted}: {'yes' if holds else 'NO'})"
        )
        sentences.append(text)
        verdicts.append(holds)
        rows.append([
            row["label"], span(ranks), wanted, "yes" if holds else "**no**",
            f"{100 * sum(share) / len(share):.1f} %", number(max(p["tolerance"] for p in found)),
            str(len(found)),
        ])  # fmt: skip
        curves[row["label"]] = _mean_spectrum(found)
    conclusion = (
        "The total change of a layer has the rank that the algebra gives"
        if all(verdicts)
        else "The measured ranks CONTRADICT the algebra"
    )
    return Section(
        key="rank",
        title="Is the update of Delta-LoRA of high rank?",
        asked=(
            "What is the rank of the whole change of a layer, W_T + sBA - W_0? The updates of W "
            "telescope, so the algebra allows at most 2r for Delta-LoRA, r for LoRA; training W_Q and "
            "W_V themselves can reach full rank."
        ),
        findings=[
            f"{conclusion}: {'; '.join(sentences)}.",
            "The paper's \"high-rank\" is true of the number of entries that change, not of the rank "
            "of the change." if all(verdicts) else "See the table.",
        ],
        head=["Method", "Numerical rank", "Expected", "Holds", "Squared norm in the first r", "Tolerance", "Projections"],
        rows=rows,
        measured_on=(
            f"the finished runs of {listing([r['label'] for r in settings['rows']])}, every W_Q and "
            f"W_V ({full_rank} singular values each), every seed; singular values in float64 of the "
            "difference of two float32 weights; one counts if it is above max(out, in) × float32 "
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
            "dL/dW = dL/d(BA) / s. Does this hold for other losses than cross-entropy, and how much "
            "of it is left with dropout in the branch?"
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
            f"float64, one batch of {settings['batch']} × {settings['length']} tokens of the training "
            f"text, {settings['num_masks']} draws of the dropout; mean over projections, draws and "
            "seeds of |dL/dW - dL/d(BA)/s| / |dL/dW|. MSE and InfoNCE read the mean last state, the "
            "policy gradient samples every token and rewards even token numbers."
        ),
        not_shown=(
            "what the broken identity costs in score; that is the next question but one. The three "
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


def equivalence_section(records: Sequence[Record], settings: Content) -> Section | None:
    """Judge where Delta-LoRA equals the LoRA of alpha * (1 + lambda)."""
    if not records:
        return None
    first = settings["start_steps"][0]
    rows, grid, plain, surprises = [], {}, {}, []
    columns: dict[tuple[Any, ...], str] = {
        (first, False, False, False): f"K = {first}",
        (first, True, False, False): f"K = {first}, clipped",
        (first, False, True, False): f"K = {first}, another module",
        (first, True, True, False): f"K = {first}, another module, clipped",
    }
    columns |= {(K, False, False, False): f"K = {K}" for K in settings["start_steps"][1:]}
    columns |= {(first, False, False, True): f"K = {first}, rate / (1 + λ)"}
    broken_by: dict[str, list[str]] = {name: [] for name in columns.values()}
    for optimizer in settings["optimizers"]:
        mine = {}
        for record in records:
            case = record["settings"]
            same = ("optimizer", "learning_rate", "options")
            if all(case[key] == optimizer[key] for key in same):
                key = (
                    case["start_step"],
                    case["max_grad_norm"] is not None,
                    bool(case["head"]),
                    case["learning_rate_factor"] != 1,
                )
                mine[columns[key]] = record["result"]
        if columns[(first, False, False, False)] not in mine:
            continue
        base = mine[columns[(first, False, False, False)]]["relative"]
        plain[optimizer["label"]] = base
        if (grade(base, settings) == "different") == optimizer["invariant"]:
            surprises.append(optimizer["label"])
        for name, result in mine.items():
            worse = grade(result["relative"], settings) == "different"
            if worse and grade(base, settings) != "different":
                broken_by[name].append(optimizer["label"])
        rows.append([
            optimizer["label"],
            *(number(mine[c]["relative"]) if c in mine else "" for c in columns.values()),
            number(mine[columns[(first, False, False, False)]]["max_abs"]),
        ])  # fmt: skip
        grid[optimizer["label"]] = {c: mine[c]["relative"] for c in columns.values() if c in mine}
    by_grade = {
        name: [label for label, value in plain.items() if grade(value, settings) == name]
        for name in ("equal", "close", "different")
    }
    clipped = [r["result"]["num_clipped"] for r in records if r["settings"]["max_grad_norm"]]
    with_head = columns[(first, True, True, False)]
    without_head = columns[(first, True, False, False)]
    others = [columns[(K, False, False, False)] for K in settings["start_steps"][1:]]
    later = sorted({label for name in others for label in broken_by[name]})
    lines = [
        f"With W updated from the first step on, Delta-LoRA and LoRA of α(1 + λ) gave the same "
        f"weights (relative difference below {settings['exact_below']:g}) under "
        f"{listing(by_grade['equal'])}, close ones (below {settings['close_below']:g}) under "
        f"{listing(by_grade['close'])}, and different ones under {listing(by_grade['different'])}.",
    ]
    if surprises:
        lines.append(
            f"This CONTRADICTS the expectation for {listing(surprises)}: optimisers whose step does "
            "not change with the scale of the gradient should agree and others should not."
        )
    else:
        lines.append(
            "Optimisers whose step does not change when a gradient is multiplied by a constant cancel "
            "the factor 1 + λ, which is all that tells the two apart; the epsilon of Adam limits how "
            "well. SGD does not cancel it."
        )
    last = columns[(first, False, False, True)]
    rescued = [label for label, by in grid.items() if last in by]
    if rescued:
        good = [label for label in rescued if grade(grid[label][last], settings) != "different"]
        lines.append(
            f"At a learning rate divided by 1 + λ the LoRA gives Delta-LoRA's weights under "
            f"{listing(good)}"
            + ("." if len(good) == len(rescued) else f", of {listing(rescued)} where it should.")
        )
    lines.append(
        f"Clipping the global norm at {settings['clip']:g} acted in {span(clipped)} of "
        f"{settings['steps']} steps and broke the equality for {listing(broken_by[without_head])} "
        f"(branches only) and for {listing(broken_by[with_head])} (another module trains too, whose "
        "gradient does not carry the factor); the other module alone broke it for "
        f"{listing(broken_by[columns[(first, False, True, False)]])}."
        if clipped
        else "Clipping was not measured."
    )
    if others:
        lines.append(
            f"Where W follows later ({listing(others)}), the LoRA continues on a base shifted by the "
            f"fixed -λs B_k A_k; that broke the equality for {listing(later)}."
        )
    return Section(
        key="equivalence",
        title="Is Delta-LoRA the LoRA of α(1 + λ)?",
        asked=(
            "The layer of Delta-LoRA with K = -1 is W_0 + (1 + λ)sBA, that of a LoRA with "
            "α(1 + λ); only the gradients of A and B differ, by the factor 1 + λ. For which optimisers "
            "do the two give the same weights, and what breaks it?"
        ),
        findings=lines,
        head=["Optimiser", *columns.values(), f"largest difference, K = {first}"],
        rows=rows,
        measured_on=(
            f"{settings['steps']} steps in float64 of both from one start, rank {settings['rank']}, "
            f"α {settings['alpha']}, λ {settings['update_ratio']:g}, "
            f"{settings['batch']} × {settings['length']} tokens a step, constant learning rate, no "
            "weight decay, no dropout. Relative: norm of the difference of the merged W_Q and W_V over "
            "the norm of how far Delta-LoRA moved them."
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


# ---------------------------------------------------------------------- (d), (e) scores


def _scores(runs: Content, part: str, row: str, settings: Content) -> dict[str, dict[int, float]]:
    """Return value on the x axis -> seed -> score in printed units."""
    score = settings["score"]
    found: dict[str, dict[int, float]] = {}
    for name, by_seed in runs.items():
        which, _, rest = name.partition("/")
        mine, _, x = rest.partition("/")
        if (which, mine) == (part, row):
            found[x] = {
                seed: float(record["metrics"][score["metric"]]) * score["scale"]
                for seed, record in by_seed.items()
                if record["metrics"].get(score["metric"]) is not None
            }
    return {x: values for x, values in found.items() if values}


def _cell(values: Mapping[int, float] | None) -> str:
    if not values:
        return ""
    summary = stats.summarize(values[seed] for seed in sorted(values))
    half = summary.half_width
    return f"{summary.mean:.2f}" + ("" if half is None else f" ± {half:.2f}") + f" ({summary.n})"


def _curve(values: Mapping[str, Mapping[int, float]]) -> list[dict[str, Any]]:
    curve = []
    for x in sorted(values, key=float):
        summary = stats.summarize(values[x][seed] for seed in sorted(values[x]))
        curve.append({"x": float(x), "mean": summary.mean, "half": summary.half_width})
    return curve


def _minus(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def dropout_section(runs: Content, settings: Content) -> Section | None:
    """Judge how much each method loses by dropout in the branch, over paired seeds."""
    rows, label = settings["dropout"]["rows"], settings["score"]["label"]
    scores = {row["name"]: _scores(runs, "dropout", row["name"], settings) for row in rows}
    xs = sorted({x for by in scores.values() for x in by}, key=float)
    if len(xs) < 2 or xs[0] != "0":
        return None
    losses: dict[str, dict[int, float]] = {}
    sentences = []
    for row in rows:
        mine = scores[row["name"]]
        if xs[-1] not in mine or "0" not in mine:
            continue
        losses[row["name"]] = _minus(mine[xs[-1]], mine["0"])
        if losses[row["name"]]:
            summary = stats.summarize(losses[row["name"]].values())
            word = {
                "above": "gained", "below": "lost", "not distinguishable": "did not clearly change"
            }[direction(summary)]  # fmt: skip
            sentences.append(f"{row['label']} {word}: {interval(summary)} {label}")
    lines = [
        f"Going from no dropout to {xs[-1]} in the branch, {'; '.join(sentences)} "
        "(95 % interval of the paired difference)."
    ]
    names = [row["name"] for row in rows]
    if len(names) == 2 and all(losses.get(name) for name in names):
        apart = _minus(losses[names[1]], losses[names[0]])
        if apart:
            summary = stats.summarize(apart.values())
            how = {
                "above": "less sensitive than", "below": "more sensitive than",
                "not distinguishable": "not distinguishable in sensitivity from",
            }[direction(summary)]  # fmt: skip
            lines.append(
                f"By the difference of these differences, {interval(summary)}, {rows[1]['label']} is "
                f"{how} {rows[0]['label']} to dropout."
            )
    gaps = []
    for x in xs:
        pair = [scores[name].get(x, {}) for name in names[:2]]
        if len(pair) == 2 and (difference := _minus(pair[1], pair[0])):
            summary = stats.summarize(difference.values())
            gaps.append(f"{interval(summary)} at dropout {x}")
    if gaps:
        lines.append(f"{rows[1]['label']} minus {rows[0]['label']}: {'; '.join(gaps)}.")
    return Section(
        key="dropout",
        title="How much does dropout in the branch cost?",
        asked=(
            "The paper takes the dropout out of the branch because it breaks the identity of the "
            "gradients. How do the scores of LoRA and of Delta-LoRA (with the dropout let in) depend "
            "on it?"
        ),
        findings=lines,
        head=["Method", *(f"dropout {x}" for x in xs)],
        rows=[[row["label"], *(_cell(scores[row["name"]].get(x)) for x in xs)] for row in rows],
        measured_on=(
            f"{label} of ordinary runs of the recipe ({' '.join(settings['run'])}), which stand in "
            "Tables 1 and 5 too where they are the same; mean ± half the 95 % interval (seeds)."
        ),
        not_shown=(
            "the effect of a learning rate tuned for each dropout, nor of longer training, where "
            "dropout has more to prevent."
        ),
        picture={
            "curves": {row["label"]: _curve(scores[row["name"]]) for row in rows},
            "x": "Dropout in the branch",
            "y": label,
            "log": False,
        },
    )


def low_resource_section(runs: Content, settings: Content) -> Section | None:
    """Compare the methods at each share of the training rows, over paired seeds."""
    rows, label = settings["low_resource"]["rows"], settings["score"]["label"]
    scores = {row["name"]: _scores(runs, "low_resource", row["name"], settings) for row in rows}
    xs = sorted({x for by in scores.values() for x in by}, key=float)
    if not xs or "delta_lora" not in scores:
        return None
    labels = {row["name"]: row["label"] for row in rows}
    lines = []
    for name in labels:
        if name == "delta_lora":
            continue
        parts: dict[str, list[str]] = {}
        for x in xs:
            pair = scores["delta_lora"].get(x, {}), scores[name].get(x, {})
            if difference := _minus(*pair):
                summary = stats.summarize(difference.values())
                text = f"{float(x) * 100:g} % ({interval(summary)})"
                parts.setdefault(direction(summary), []).append(text)
        if parts:
            said = [
                f"{word} {'from ' if word == 'not distinguishable' else ''}it at {listing(where)}"
                for word, where in parts.items()
            ]
            lines.append(f"Against {labels[name]}, Delta-LoRA was {'; '.join(said)} of the rows.")
    if not lines:
        return None
    counts = sorted(
        {r["training"]["examples"] for name, by in runs.items() for r in by.values()
         if name.startswith("low_resource/")}
    )  # fmt: skip
    steps = {
        r["training"]["steps"] for name, by in runs.items() for r in by.values()
        if name.startswith("low_resource/")
    }  # fmt: skip
    return Section(
        key="low_resource",
        title="Does Delta-LoRA help where there is little data?",
        asked="How do the methods compare on a small share of the training rows?",
        findings=lines,
        head=["Method", *(f"{float(x) * 100:g} % of the rows" for x in xs)],
        rows=[[labels[n], *(_cell(scores[n].get(x)) for x in xs)] for n in labels],
        measured_on=(
            f"{label} of ordinary runs of the recipe ({' '.join(settings['run'])}) on "
            f"{listing([str(count) for count in counts])} rows, drawn anew by every seed and the same "
            f"for every method; {listing([str(step) for step in sorted(steps)])} steps whatever the "
            "share, so few rows are seen often; mean ± half the 95 % interval (seeds)."
        ),
        not_shown="settings tuned to few rows: length and learning rate are those of all rows.",
        picture={
            "curves": {labels[n]: _curve(scores[n]) for n in labels},
            "x": "Share of the training rows",
            "y": label,
            "log": True,
        },
    )


# ---------------------------------------------------------------------- (f) precision


def precision_section(records: Sequence[Record], settings: Content) -> Section | None:
    """Judge which forms keep the update of W, and compare with what the library states."""
    if not records:
        return None
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for record in records:
        rate = f"{record['settings']['learning_rate']:g}"
        curves.setdefault(rate, {})[record["settings"]["form"]] = record["result"]["errors"]
    stated = {f"{float(rate):g}": value for rate, value in settings["learning_rates"].items()}
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
                difference = abs(last - stated[rate])
                verdict = (
                    "agrees with" if difference <= settings["agrees_within"] else "differs from"
                )
                compared.append(f"{number(last)} at {rate} {verdict} {stated[rate]:g}")
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
            "Written in place into a bfloat16 W, small updates round away. How wrong is the change of "
            "W after training, against float32 and against the closed form, which never writes W?"
        ),
        findings=[
            f"A W that is stored in bfloat16 {how}: relative error {listing(rounded)}; {kept}.",
            f"Of the values that the library states for the rounded form, {listing(compared)}; the "
            "size depends on how large the weights are against the updates "
            f"(here a root mean square of {number(records[0]['result']['weight_rms'])}).",
        ],
        head=["Form", "Learning rate", "First error", "Last error", "Update"],
        rows=rows,
        measured_on=(
            f"{settings['steps']} steps of AdamW with the recipe's betas, epsilon and weight decay, "
            f"constant learning rate, rank {settings['rank']}, α {settings['alpha']}, "
            f"λ {settings['update_ratio']:g}, K = {settings['start_step']}; all forms start from "
            "weights rounded to bfloat16. The library refuses to write into a bfloat16 W, so its "
            "storage is emulated: W is rounded to bfloat16 after every step. Error: distance of the "
            "change of W from λs(B_t A_t - B_k A_k) in float64, over the norm of that; lost: above "
            f"{settings['lost_above']:g}."
        ),
        not_shown=(
            "the effect on a score, nor stochastic rounding, which would keep the update on average."
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
    if "lora" in largest:
        peaks = {name: p["measured"]["peak"] for name, p in largest.items()}
        ratios = [
            f"{labels[name]} {peaks[name] / peaks['lora']:.3f}" for name in labels
            if name in peaks and name != "lora"
        ]  # fmt: skip
        lines.append(f"Peak memory over LoRA's at {at}: {', '.join(ratios)}.")
    lines.append(
        f"The formula {'fits' if fits else 'does NOT fit'}: over {len(by_name)} methods and "
        f"{len(settings['batches']) * len(settings['lengths'])} sizes its largest relative error is "
        f"{100 * errors[worst]:.2f} % ({worst}); the peak is off by at most "
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
            f"one step after another one, batches {listing([str(b) for b in settings['batches']])}, "
            f"lengths {listing([str(t) for t in settings['lengths']])}, rank {settings['rank']}; the "
            f"table shows {at}. Bytes of living tensors; activations are what autograd saves; peak on "
            "a CPU by counting every tensor made and freed, on CUDA by its allocator. Formula: "
            "delta_lora/analysis/memory_model.py."
        ),
        not_shown=(
            "memory inside kernels, of the libraries and of a fragmented allocator; padding; "
            "gradient checkpointing. With a model this small the logits are most of the peak; in a "
            "large one weights and optimiser state are."
        ),
        picture={
            "grids": {labels[name]: by_name[name] for name in labels if name in by_name},
            "at": at,
            "categories": categories,
        },
    )
