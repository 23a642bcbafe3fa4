"""What the audit says of made-up records: verdicts, those near a limit, and their words."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from scripts.auditing.limits import Judged, judge, judge_distance, nearest
from scripts.auditing.scores import difference, interval
from scripts.auditing.sections import (
    dropout,
    equivalence,
    gradients,
    low_resource,
    memory,
    precision,
    rank,
)
from scripts.auditing.words import near, near_among
from scripts.planning.adaptation import Adaptation
from scripts.planning.architecture import Architecture
from scripts.planning.forward import Batch, write_down
from scripts.planning.ledger import CPU
from scripts.planning.memory import step_bytes
from tests.unit.audit_records import (
    SETTINGS,
    comparisons,
    gaps,
    memory_of,
    ranks,
    rounding,
    scored,
    spectra,
)

# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("value", "is_near"),
    [(0.0, False), (0.9e-4, False), (1.1e-4, True), (1e-3, True), (9e-3, True), (1.1e-2, False)],
)
def test_a_figure_is_near_within_a_factor_either_way(value: float, is_near: bool) -> None:
    assert judge(value, 1e-3, 10).is_near is is_near


def test_a_limit_is_neither_above_nor_below_itself() -> None:
    found = judge(0.5, 0.5, 2)
    assert not found.is_below
    assert not found.is_above


@pytest.mark.parametrize(
    ("value", "agrees", "is_near"),
    [(0.92, True, False), (0.86, True, True), (0.80, False, True), (0.37, False, False)],
)
def test_a_distance_is_near_where_a_share_of_the_figure_turns_it(
    value: float, agrees: bool, is_near: bool
) -> None:
    found = judge_distance(value, 0.92, 0.1, 0.1)
    assert found.is_above is not agrees
    assert found.is_near is is_near


def test_of_several_limits_the_nearest_is_named() -> None:
    far, near_one, nearer = judge(1.0, 1e-9, 50), judge(0.03, 1e-3, 50), judge(2e-3, 1e-3, 50)
    assert nearest([far, near_one, nearer]) is nearer
    assert nearest([far]) is None


def test_a_note_gives_both_figures() -> None:
    assert near(judge(3.7e-5, 1e-3, 50)) == " (near the limit: 3.7e-5 against 0.001)"
    assert near(judge(3.7e-5, 1e-3, 3)) == near(None) == ""
    few = {"a": judge(2e-3, 1e-3, 3), "b": judge(1.0, 1e-3, 3)}
    assert near_among(few) == " (near the limit: a 2.0e-3 against 0.001)"
    many = {name: judge(int(name) * 1e-3, 2e-3, 3) for name in "1234"}
    assert near_among(many) == " (near the limit: all 4, 1.0e-3 to 4.0e-3 against 0.002)"
    assert near_among({**many, "9": judge(9e-3, 2e-3, 3)}).startswith(" (near the limit: 4 of 5, ")
    assert near_among({"a": judge(1.0, 1e-3, 3)}) == ""


@pytest.mark.parametrize(
    ("gap", "direction", "is_near"),
    [(30.0, "above", False), (-30.0, "below", False), (0.1, "not distinguishable", False)],
)
def test_a_difference_is_told_from_0_by_its_interval(
    gap: float, direction: str, is_near: bool
) -> None:
    found = difference({1: gap, 2: gap + 2, 3: gap + 4}, {1: 1.0, 2: 2.0, 3: 3.0}, 0.25)
    assert found is not None
    assert (found.direction, found.end.is_near) == (direction, is_near)


@pytest.mark.parametrize(("gap", "direction"), [(2.6, "above"), (2.4, "not distinguishable")])
def test_an_interval_that_ends_next_to_0_says_so(gap: float, direction: str) -> None:
    # Differences of gap - 1, gap, gap + 1: half an interval is 4.30 * 1 / sqrt(3) = 2.48.
    found = difference({1: gap - 1, 2: gap, 3: gap + 1}, {1: 0.0, 2: 0.0, 3: 0.0}, 0.25)
    assert found is not None
    assert found.direction == direction
    assert found.end.is_near
    assert re.search(r"\], near the limit: [+-]0\.\d\d against 0$", interval(found))


def test_one_seed_is_not_judged_and_no_common_seed_is_nothing() -> None:
    found = difference({1: 2.0}, {1: 1.0, 2: 5.0}, 0.25)
    assert found is not None
    assert (found.mean, found.direction, found.end) == (1.0, "not judged", None)
    assert interval(found) == "+1.00, one seed"
    assert difference({1: 2.0}, {2: 1.0}, 0.25) is None


# ---------------------------------------------------------------------- rank


def test_ranks_are_judged_against_their_bound() -> None:
    found = rank.facts(ranks(lora=4, delta_lora=8, full_query_value=16), SETTINGS["rank"])
    assert found is not None
    assert [row.bound for row in found.rows] == [4, 8, None]
    assert found.all_hold
    assert found.free_rank == Judged(16, 8, is_near=False)
    said = rank.words(found).findings
    assert said[0].startswith("The total change of a layer has the rank that the algebra gives")
    assert "Delta-LoRA: rank 8 of 16 (at most 2r = 8: yes)" in said[0]
    assert " is above those bounds" in said[1]
    assert "near the limit" not in " ".join(said)


def test_a_rank_above_its_bound_contradicts_the_algebra() -> None:
    found = rank.facts(ranks(lora=4, delta_lora=9, full_query_value=16), SETTINGS["rank"])
    assert found is not None
    assert [row.holds for row in found.rows] == [True, False, True]
    assert not found.all_hold
    said = rank.words(found).findings[0]
    assert "CONTRADICT" in said
    assert "rank 9 of 16 (at most 2r = 8: NO)" in said


def test_a_free_method_may_have_any_rank() -> None:
    found = rank.facts(ranks(delta_lora=8, full_query_value=15), SETTINGS["rank"])
    assert found is not None
    assert found.all_hold
    assert found.rows[-1].num_full == 0
    assert "rank 15 of 16 (full in 0 of 1)" in rank.words(found).findings[0]
    found = rank.facts(ranks(delta_lora=8, full_query_value=8), SETTINGS["rank"])
    assert found is not None
    assert not found.free_rank.is_above
    assert "is NOT above" in rank.words(found).findings[1]


def test_a_singular_value_near_its_tolerance_is_said_where_it_decides() -> None:
    on_the_edge = [1.0] * 8 + [9e-6] + [1e-9] * 7
    found = rank.facts(spectra(delta_lora=on_the_edge), SETTINGS["rank"])
    assert found is not None
    assert found.rows[0].holds
    assert found.rows[0].closest == Judged(9e-6, 1e-5, is_near=True)
    assert (
        "8: yes; near the limit: a singular value of 9.0e-6 against 1e-5)"
        in (rank.words(found).findings[0])
    )
    # The same value below the bound decides nothing.
    found = rank.facts(spectra(delta_lora=[1.0] * 5 + [9e-6] + [1e-9] * 10), SETTINGS["rank"])
    assert found is not None
    assert found.rows[0].closest is None
    full = spectra(delta_lora=[1.0] * 8 + [1e-9] * 8, full_query_value=[1.0] * 8 + [2e-5] * 8)
    found = rank.facts(full, SETTINGS["rank"])
    assert found is not None
    assert found.free_rank == Judged(16, 8, is_near=True)
    assert "(near the limit: 16 against 8)" in rank.words(found).findings[1]


# ---------------------------------------------------------------------- gradients


def test_gradients_are_judged_by_the_stated_limit() -> None:
    found = gradients.facts(gaps(1e-16, 0.25), SETTINGS["gradients"])
    assert found is not None
    assert found.worst == Judged(1e-16, 1e-12, is_near=False)
    assert found.least_broken == Judged(0.25, 1e-12, is_near=False)
    said = gradients.words(found).findings[0]
    assert "agreed to 1.0e-16 at worst" in said
    assert "with dropout 0.1 they differ by 25 %" in said


def test_gradients_against_the_expectation() -> None:
    found = gradients.facts(gaps(1e-3, 1e-14), SETTINGS["gradients"])
    assert found is not None
    assert not found.worst.is_below
    assert found.least_broken.is_below
    first, second = gradients.words(found).findings
    assert "did NOT agree: they differed by up to 1.0e-3 (limit 1e-12)" in first
    assert "STILL agreed" in first
    assert second == "See the table."


def test_gradients_near_the_limit_say_so() -> None:
    found = gradients.facts(gaps(5e-13, 2e-12), SETTINGS["gradients"])
    assert found is not None
    said = gradients.words(found).findings[0]
    assert "at worst under cross-entropy (near the limit: 5.0e-13 against 1e-12)" in said
    assert "by 0 % (near the limit: 2.0e-12 against 1e-12)" in said


# ---------------------------------------------------------------------- equivalence

EQUIVALENCE = SETTINGS["equivalence"]


def test_optimisers_are_graded() -> None:
    found = equivalence.facts(comparisons(), EQUIVALENCE)
    assert found is not None
    names = {label: grade.name for label, grade in found.plain.items()}
    assert names["Lion"] == "equal"
    assert names["SGD"] == "different"
    assert found.surprises == ()
    assert found.rescued == ("SGD", "SGD with momentum 0.9")
    assert [(c.norm, set(c.acted), c.steps, c.column.lost) for c in found.clipped] == [
        (1.0, {3}, 60, ()), (5.0, {3}, 60, ())
    ]  # fmt: skip
    assert found.alone.lost == ()
    assert "Lion" in found.both.lost
    assert "SGD" not in found.both.lost  # it had nothing to lose
    said = equivalence.words(found).findings
    assert "different ones under SGD and SGD with momentum 0.9." in said[0]
    assert "gives Delta-LoRA's weights under SGD and SGD with momentum 0.9." in said[2]
    assert (
        "at 1 acted on Delta-LoRA in 3 of 60 steps, and the equality was lost under none."
        in (said[3])
    )
    assert "lost under none without clipping and under AdamW (eps 1e-16)" in said[5]
    assert "CONTRADICTS" not in " ".join(said)
    assert "near the limit" not in " ".join(said)


@pytest.mark.parametrize(("name", "label", "value"), [("lion", "Lion", 0.5), ("sgd", "SGD", 1e-12)])
def test_surprises_are_said(name: str, label: str, value: float) -> None:
    found = equivalence.facts(comparisons(**{name: value}), EQUIVALENCE)
    assert found is not None
    assert found.surprises == (label,)
    assert f"CONTRADICTS the expectation for {label}" in equivalence.words(found).findings[1]


def test_a_grade_that_another_processor_turned_is_near_its_limit() -> None:
    # One processor gave 3.7e-5, which is close, another 1.2e-3, which is different.
    for value, name in ((3.7e-5, "close"), (1.2e-3, "different")):
        grade = equivalence.grade(value, EQUIVALENCE)
        assert grade.name == name
        assert grade.closest == Judged(value, 1e-3, is_near=True)
    assert equivalence.grade(4.1e-9, EQUIVALENCE).closest.limit == 1e-9
    assert equivalence.grade(1e-12, EQUIVALENCE).closest is None
    found = equivalence.facts(comparisons(lion=3.7e-5), EQUIVALENCE)
    assert found is not None
    said = equivalence.words(found).findings
    assert "close ones (below 0.001) under Lion (near the limit: 3.7e-5 against 0.001)" in said[0]
    assert "lost under none at K = 0 (near the limit: Lion 3.7e-5 against 0.001)" in said[-1]


# ---------------------------------------------------------------------- scores


def test_dropout_is_judged_over_paired_seeds() -> None:
    runs = scored("dropout", {
        "lora/0": [50, 51, 52], "lora/0.3": [40, 41.1, 42],
        "delta_lora/0": [50, 51, 52], "delta_lora/0.3": [49.9, 51.2, 52],
    })  # fmt: skip
    found = dropout.facts(runs, SETTINGS)
    assert found is not None
    assert found.xs == ("0", "0.3")
    assert found.changes["LoRA"].direction == "below"
    assert found.changes["LoRA"].mean == pytest.approx(-9.9667, abs=1e-4)
    assert found.changes["Delta-LoRA"].direction == "not distinguishable"
    assert found.apart.direction == "above"
    assert found.gaps["0.3"].mean == pytest.approx(10.0)
    said = dropout.words(found).findings
    assert "LoRA lost: BLEU -9.97" in said[0]
    assert "Delta-LoRA did not clearly change" in said[0]
    assert "less sensitive than LoRA" in said[1]
    single = dropout.facts({name: {1: by[1]} for name, by in runs.items()}, SETTINGS)
    assert single is not None
    assert "LoRA was not judged: BLEU -10.00, one seed" in dropout.words(single).findings[0]
    without = {name: by for name, by in runs.items() if not name.endswith("/0")}
    assert dropout.facts(without, SETTINGS) is None


def test_few_rows_are_judged_at_every_share() -> None:
    runs = scored("low_resource", {
        "lora/0.01": [10, 11, 12], "delta_lora/0.01": [8, 9, 10.1],
        "lora/1": [30, 31, 32], "delta_lora/1": [33, 34, 35.1],
    })  # fmt: skip
    found = low_resource.facts(runs, SETTINGS)
    assert found is not None
    assert {x: one.direction for x, one in found.against["LoRA"].items()} == {
        "0.01": "below", "1": "above"
    }  # fmt: skip
    assert list(found.against) == ["LoRA"]
    assert (found.num_rows, found.num_steps) == ((29,), (160,))
    said = low_resource.words(found).findings[0]
    assert "below it at 1 % (-1.97 [" in said
    assert "above it at 100 % (+3.03 [" in said
    assert low_resource.facts(scored("low_resource", {"lora/1": [1, 2]}), SETTINGS) is None


# ---------------------------------------------------------------------- precision


def test_precision_is_judged_by_what_is_lost() -> None:
    found = precision.facts(rounding(1e-5, 0.9), SETTINGS["precision"])
    assert found is not None
    assert found.rounded_is_lost
    assert found.worst_kept == Judged(1e-5, 0.05, is_near=False)
    assert not found.comparisons[0].distance.is_above
    said = precision.words(found).findings
    assert "loses much of its update: relative error 0.90 at learning rate 2e-5" in said[0]
    assert "0.90 at 2e-5 agrees with 0.92" in said[1]


def test_precision_against_the_expectation() -> None:
    found = precision.facts(rounding(0.2, 0.01), SETTINGS["precision"])
    assert found is not None
    assert not found.rounded_is_lost
    assert [line.form for line in found.lost] == ["in_place"]
    said = precision.words(found).findings
    assert "does NOT lose" in said[0]
    assert "a form that is allowed LOSES it: in place, W float32 0.20." in said[0]
    assert "differs from 0.92" in said[1]


def test_precision_near_the_limit_says_so() -> None:
    found = precision.facts(rounding(0.04, 0.86), SETTINGS["precision"])
    assert found is not None
    said = precision.words(found).findings
    assert "keep it (0.04 at worst) (near the limit: 0.04 against 0.05)" in said[0]
    assert "0.86 at 2e-5 agrees with 0.92 (near the limit: 0.06 against 0.1)" in said[1]


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("peak", "words"),
    [
        (1001, "The formula fits: "),
        (1005, "error, of peak, is 0.50 %, near the limit of 1 %; "),
        (1020, "The formula does NOT fit: "),
        (1500, "error, of peak, is 50.00 %; "),
    ],
)
def test_the_formula_is_judged_by_its_largest_error(peak: int, words: str) -> None:
    records = [memory_of("lora_no_dropout", 1000, peak), memory_of("full", 1500, 1500)]
    found = memory.facts(records, SETTINGS["memory"])
    assert found is not None
    assert found.worst.value == pytest.approx(abs(peak - 1000) / 1000)
    assert found.exact == ("weights",)
    assert found.ratios == {"Full": 1.5}
    assert found.shares == {"weights": 0.5}
    said = memory.words(found).findings
    assert any(words in line for line in said)
    assert (
        "Peak memory over that of LoRA without dropout at batch 2 × 32 tokens: Full 1.500." in said
    )


def test_without_the_reference_no_peak_is_compared() -> None:
    found = memory.facts([memory_of("full", 1000, 1000)], SETTINGS["memory"])
    assert found is not None
    assert (found.reference, found.ratios) == (None, {})
    assert memory.words(found).findings[0].startswith("The formula fits")


def test_the_two_formulas_of_memory_agree_where_the_pass_does_not_matter() -> None:
    """The audit's pass makes all logits, that of `scripts.planning` those with a loss."""
    root = Path(__file__).resolve().parents[2]
    content = json.loads((root / "results" / "tiny" / "audit.json").read_text(encoding="utf-8"))
    grids = next(s["picture"]["grids"] for s in content["sections"] if s["key"] == "memory")
    model = OmegaConf.load(root / "configs" / "model" / "tiny_gpt2_scratch.yaml").architecture
    shape = Architecture(
        family="gpt2", width=model.n_embd, num_layers=model.n_layer, num_heads=model.n_head,
        inner=4 * model.n_embd, vocabulary=model.vocab_size, num_positions=model.n_positions,
    )  # fmt: skip
    rank, compared = SETTINGS["memory"]["rank"], 0
    for method in SETTINGS["memory"]["methods"]:
        is_low_rank = method["kind"] == "low_rank"
        adaptation = Adaptation(
            method["kind"],
            method["name"],
            rank=rank * is_low_rank,
            forward_rank=rank * method.get("forward_rank", 1) * is_low_rank,
            extra_per_branch=rank * method.get("extra_per_branch", 0),
            kept_factors=method.get("kept_factors", 0),
            makes_a=method["name"] in ("adalora", "dylora", "delta_closed_form"),
            makes_b=method["name"] in ("dylora", "delta_closed_form"),
            dropout=0.1 * method.get("dropout", False),
            states=0 if method.get("optimizer") == "sgd" else 2,
        )
        for point in grids[method["label"]]:
            sequences, length = point["batch"], point["length"]
            batch = Batch(sequences, length, targets=sequences * (length - 1))
            planned = step_bytes(write_down(shape, adaptation, batch, CPU), accumulates=False)
            for category in ("weights", "gradients", "optimizer", "method"):
                assert planned[category] == point["expected"][category], (method["name"], category)
            for category in ("activations", "peak"):
                assert planned[category] == pytest.approx(point["measured"][category], rel=0.01)
            compared += 1
    assert compared == 54


# ---------------------------------------------------------------------- all


def test_without_records_nothing_is_said() -> None:
    for module, part in (
        (rank, "rank"), (gradients, "gradients"), (equivalence, "equivalence"),
        (precision, "precision"), (memory, "memory"),
    ):  # fmt: skip
        assert module.facts([], SETTINGS[part]) is None
    assert dropout.facts({}, SETTINGS) is None
    assert low_resource.facts({}, SETTINGS) is None


def test_facts_leave_records_and_settings_as_they_are() -> None:
    records, settings = comparisons(), copy.deepcopy(EQUIVALENCE)
    before = copy.deepcopy(records)
    found = equivalence.facts(records, settings)
    assert found is not None
    equivalence.words(found)
    assert (records, settings) == (before, EQUIVALENCE)
