"""The audit's page by made-up records, its settings, and how a killed audit continues."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import audit
from scripts.auditing import measurements
from scripts.auditing import plan as audit_plan
from scripts.auditing.algebra import equivalence_section, gradient_section, rank_section
from scripts.auditing.costs import memory_section, precision_section
from scripts.auditing.measurements import Measurement
from scripts.auditing.page import build, to_markdown
from scripts.auditing.plan import equivalence_cases, load_settings, make_plan
from scripts.auditing.scores import dropout_section, low_resource_section
from scripts.reporting.results import RESULTS
from scripts.runs import devices
from scripts.runs.devices import Cuda
from tests.unit import fake_cell

SETTINGS = load_settings("tiny")


def one(part: str, settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
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


def ranks(**by_row: int) -> list[dict[str, Any]]:
    found = []
    for row, number in by_row.items():
        values = [1.0] * number + [1e-9] * (16 - number)
        projection = {"rank": number, "tolerance": 1e-5, "singular_values": values}
        result = {"method_rank": 4, "projections": {"h.0.query": projection}}
        found.append(one("rank", {"row": row, "seed": 1}, result))
    return found


def test_ranks_are_judged_against_their_bound() -> None:
    section = rank_section(ranks(lora=4, delta_lora=8, full_query_value=16), SETTINGS["rank"])
    assert section is not None
    assert section.findings[0].startswith("The total change of a layer has the rank that the")
    assert "Delta-LoRA: rank 8 of 16 (at most 2r = 8: yes)" in section.findings[0]
    section = rank_section(ranks(lora=4, delta_lora=9, full_query_value=16), SETTINGS["rank"])
    assert section is not None
    assert "CONTRADICT" in section.findings[0]
    assert "rank 9 of 16 (at most 2r = 8: NO)" in section.findings[0]
    section = rank_section(ranks(delta_lora=8, full_query_value=15), SETTINGS["rank"])
    assert section is not None
    assert "rank 15 of 16 (full in 0 of 1)" in section.findings[0]
    assert "CONTRADICT" not in section.findings[0]
    section = rank_section(ranks(delta_lora=8, full_query_value=8), SETTINGS["rank"])
    assert section is not None
    assert "is NOT above" in section.findings[1]


def gaps(without: float, with_dropout: float) -> list[dict[str, Any]]:
    by = {"0": [{"mean": without, "max": without}]}
    by["0.1"] = [{"mean": with_dropout, "max": with_dropout}]
    return [one("gradients", {"loss": "cross_entropy"}, {"gaps": by})]


def test_gradients_are_judged_by_the_stated_limit() -> None:
    section = gradient_section(gaps(1e-16, 0.25), SETTINGS["gradients"])
    assert section is not None
    assert "agreed to 1.0e-16 at worst" in section.findings[0]
    assert "with dropout 0.1 they differ by 25 %" in section.findings[0]
    section = gradient_section(gaps(1e-3, 1e-14), SETTINGS["gradients"])
    assert section is not None
    assert "did NOT agree" in section.findings[0]
    assert "STILL agreed" in section.findings[0]


def comparisons(**relative: float) -> list[dict[str, Any]]:
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


def test_optimisers_are_graded_and_surprises_said() -> None:
    chosen = SETTINGS["equivalence"]
    section = equivalence_section(comparisons(), chosen)
    assert section is not None
    assert "different ones under SGD and SGD with momentum 0.9." in section.findings[0]
    assert "CONTRADICTS" not in " ".join(section.findings)
    assert "gives Delta-LoRA's weights under SGD and SGD with momentum 0.9." in section.findings[2]
    assert (
        "at 1 acted on Delta-LoRA in 3 of 60 steps, and the equality was lost under none."
        in (section.findings[3])
    )
    assert "lost under none without clipping and under AdamW (eps 1e-16)" in section.findings[5]
    section = equivalence_section(comparisons(lion=0.5), chosen)
    assert section is not None
    assert "CONTRADICTS the expectation for Lion" in section.findings[1]
    section = equivalence_section(comparisons(sgd=1e-12), chosen)
    assert section is not None
    assert "CONTRADICTS the expectation for SGD" in section.findings[1]


def scored(part: str, values: dict[str, list[float]]) -> dict[str, dict[int, Any]]:
    return {
        f"{part}/{name}": {
            seed: {"metrics": {"bleu": v / 100}, "training": {"examples": 29, "steps": 160}}
            for seed, v in enumerate(by_seed, start=1)
        }
        for name, by_seed in values.items()
    }


def test_dropout_is_judged_over_paired_seeds() -> None:
    runs = scored("dropout", {
        "lora/0": [50, 51, 52], "lora/0.3": [40, 41.1, 42],
        "delta_lora/0": [50, 51, 52], "delta_lora/0.3": [49.9, 51.2, 52],
    })  # fmt: skip
    section = dropout_section(runs, SETTINGS)
    assert section is not None
    assert "LoRA lost: BLEU -9.97" in section.findings[0]
    assert "Delta-LoRA did not clearly change" in section.findings[0]
    assert "less sensitive than LoRA" in section.findings[1]
    single = {name: {1: by[1]} for name, by in runs.items()}
    section = dropout_section(single, SETTINGS)
    assert section is not None
    assert "LoRA was not judged: BLEU -10.00, one seed" in section.findings[0]


def test_few_rows_are_judged_at_every_share() -> None:
    runs = scored("low_resource", {
        "lora/0.01": [10, 11, 12], "delta_lora/0.01": [8, 9, 10.1],
        "lora/1": [30, 31, 32], "delta_lora/1": [33, 34, 35.1],
    })  # fmt: skip
    section = low_resource_section(runs, SETTINGS)
    assert section is not None
    assert "below it at 1 % (-1.97 [" in section.findings[0]
    assert "above it at 100 % (+3.03 [" in section.findings[0]


def rounding(in_place: float, rounded: float) -> list[dict[str, Any]]:
    found = []
    for form, value in (("in_place", in_place), ("in_place_rounded", rounded)):
        result = {"errors": [[5, value], [10, value]], "weight_rms": 0.1}
        found.append(one("precision", {"learning_rate": 2e-5, "form": form}, result))
    return found


def test_precision_is_judged_by_what_is_lost() -> None:
    section = precision_section(rounding(1e-5, 0.9), SETTINGS["precision"])
    assert section is not None
    assert (
        "loses much of its update: relative error 0.90 at learning rate 2e-05"
        in (section.findings[0])
    )
    assert "0.90 at 2e-05 agrees with 0.92" in section.findings[1]
    section = precision_section(rounding(0.2, 0.01), SETTINGS["precision"])
    assert section is not None
    assert "does NOT lose" in section.findings[0]
    assert "a form that is allowed LOSES it" in section.findings[0]
    assert "differs from 0.92" in section.findings[1]


@pytest.mark.parametrize(("peak", "words"), [(1001, "The formula fits"), (1500, "does NOT fit")])
def test_the_formula_is_judged_by_its_largest_error(peak: int, words: str) -> None:
    measured = {"weights": 500, "peak": 1000}
    point = {"batch": 2, "length": 32, "measured": measured}
    point["expected"] = {"weights": 500, "peak": peak}
    section = memory_section(
        [one("memory", {"name": "lora_no_dropout"}, {"grid": [point]})], SETTINGS["memory"]
    )
    assert section is not None
    assert any(words in line for line in section.findings)
    assert any("weights" in line for line in section.findings if "Exact" in line)


def test_a_page_needs_a_record_and_one_scale() -> None:
    empty = {
        "scale": "tiny", "seeds": [1], "extra": [], "settings": SETTINGS, "runs": {},
        "measurements": [], "missing": [],
    }  # fmt: skip
    with pytest.raises(ValueError, match="make audit"):
        build(empty)
    runs = {"rank/lora/": {1: {"scale": "paper", "signature": "x"}}}
    with pytest.raises(ValueError, match="scale"):
        build({**empty, "runs": runs})
    made = build({**empty, "measurements": gaps(1e-16, 0.2), "missing": ["rank of lora, seed 1"]})
    text = to_markdown(made)
    assert text.startswith("# Audit of Delta-LoRA (scale: tiny)\n\n## What we found\n\n- Without")
    assert "**Not there yet (1):** rank of lora, seed 1" in text
    assert made == json.loads(json.dumps(made))


# ---------------------------------------------------------------------- plan and records


def test_settings_are_a_base_and_a_scale(tmp_path: Path) -> None:
    assert load_settings("paper")["equivalence"]["steps"] < SETTINGS["equivalence"]["steps"]
    with pytest.raises(ValueError, match=r"huge\.yaml is missing"):
        load_settings("huge")
    for name in ("_base", "tiny"):
        source = audit_plan.CONFIGS / "audit" / f"{name}.yaml"
        (tmp_path / f"{name}.yaml").write_text(source.read_text(encoding="utf-8"))
    (tmp_path / "tiny.yaml").write_text("memory: {bathces: [1]}\n")
    with pytest.raises(ValueError, match="bathces"):
        load_settings("tiny", tmp_path)


def test_runs_are_shared_with_the_tables() -> None:
    few = copy.deepcopy(SETTINGS)
    few["dropout"]["dropouts"], few["low_resource"]["fractions"] = [0.0, 0.1], [0.01, 1.0]
    few["low_resource"]["rows"] = few["low_resource"]["rows"][:2]
    few["memory"]["methods"] = few["memory"]["methods"][:2]
    plan = make_plan("tiny", [1], [], few)
    names = {cell.signature for cell in plan.cells}
    committed = {path.stem for path in (RESULTS / "runs" / "tiny").glob("*.json")}
    assert len(names & committed) >= 5  # LoRA, Delta-LoRA, both controls, fine-tuning
    assert len(names) < len(plan.cells)
    assert len({m.signature for m in plan.measurements}) == len(plan.measurements)
    other = make_plan("tiny", [1], ["recipe.weight_decay=0.1"], few)
    kept = {m.signature for m in plan.measurements} & {m.signature for m in other.measurements}
    assert not kept


def some(tmp_path: Path, **settings: Any) -> Measurement:
    return Measurement("memory", "memory of lora", settings, ("seed=1",), False, "abc", tmp_path)


def test_a_measurement_is_named_by_what_it_depends_on(tmp_path: Path) -> None:
    first = some(tmp_path, rank=4)
    assert first.signature != some(tmp_path, rank=8).signature
    assert first.signature == dataclasses.replace(first, label="x").signature
    assert first.signature != dataclasses.replace(first, start="abd").signature
    changed = dataclasses.replace(first, extra=("recipe.weight_decay=0.1",))
    assert first.signature != changed.signature
    assert measurements.compose(measurements.as_job(changed)) == changed
    (text,) = measurements.as_job(first)
    assert measurements.compose([text]) == first


def test_a_killed_audit_measures_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setitem(
        measurements.MEASURE, "memory", lambda cfg, settings: calls.append(settings) or {"grid": []}
    )
    config = SimpleNamespace(
        model=SimpleNamespace(name="tiny_gpt2"), trainer=SimpleNamespace(device="cpu")
    )
    monkeypatch.setattr(measurements.cell, "compose", lambda overrides: config)
    first, second = some(tmp_path, rank=4), some(tmp_path, rank=8)
    record = measurements.run(first)
    assert measurements.run(first) == record == first.read()
    assert second.read() is None
    second.path.write_text('{"signature": "memo')  # what a kill leaves of a file not written whole
    assert second.read() is None
    measurements.run(second)
    assert [settings["rank"] for settings in calls] == [4, 8]
    assert sorted(p.name for p in first.path.parent.iterdir()) == sorted(
        [first.path.name, second.path.name]
    )


def test_a_measurement_waits_for_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CELL_OUTPUTS", str(tmp_path))
    for name in ("compose", "status", "run_dir"):
        monkeypatch.setattr(measurements.cell, name, getattr(fake_cell, name))
    overrides = ("seed=1", "scale=tiny", "task=e2e", "method=lora")
    mine = Measurement("rank", "rank of lora", {}, overrides, True, "abc", tmp_path)
    with pytest.raises(ValueError, match="not finished"):
        measurements.run(mine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1,x"], "seeds"),
        (["--args", "seed=3"], "seed is set by"),
        (["--args", "recipe.rnak=2"], "rnak"),
        (["--workers", "none", "--seeds", "1"], "workers"),
        (["--seeds", "1", "--results", __file__], "cannot write to the results folder"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = f"paths.outputs={tmp_path}"
    if "--args" not in arguments:
        arguments = [*arguments, "--args", outputs]
    assert audit.main(["--scale", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_measurements_of_scale_paper_need_a_gpu_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cuda", lambda: Cuda((), "the driver is too old"))
    plan = audit_plan.Plan("paper", [1], [], {}, [], [some(tmp_path, rank=4)])
    with pytest.raises(ValueError, match=r"scale=paper needs a CUDA device.*driver is too old"):
        audit.run_missing(plan, "auto", tmp_path, fake_cell, "", "")


@pytest.mark.slow
@pytest.mark.skipif(
    not (RESULTS / "tiny" / "audit.md").exists(), reason="no page of the audit is committed"
)
def test_the_committed_page_follows_from_its_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--scale", "tiny", "--check"]) == 0, capsys.readouterr().out
