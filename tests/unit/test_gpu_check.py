"""The machinery of `make gpu-check`: what a GPU shows is not tested here, but that checks fail."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from delta_lora.delta import Differences
from scripts.checking import (
    catalogue,
    children,
    environment,
    explore,
    golden,
    lengths,
    recipes,
    report,
    resume,
    speed,
    steps,
)
from scripts.checking.catalogue import Check
from scripts.checking.finding import Context, Finding
from scripts.checking.worker import Worker


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("cpu", is_small=True, folder=tmp_path)


def fake(name: str, **values: object) -> Check:
    return Check(99, name, f"tests.unit.fake_checks:{name}", 60.0, **values)  # type: ignore[arg-type]


# ---------------------------------------------------------------- findings, lines, the worker


def test_a_check_without_a_requirement_has_shown_nothing() -> None:
    assert not Finding(values={"ms": 1.0}).holds


def test_nan_is_within_no_limit() -> None:
    finding = Finding()
    finding.at_most("ratio", float("nan"), 1.0)
    finding.at_least("ratio", float("nan"), 1.0)
    assert [each.holds for each in finding.requirements] == [False, False]


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (fake("fine"), "PASS 99 fine answer=42 | answer==42"),
        (fake("wrong"), "FAIL 99 wrong ratio=1.5 | ratio<=1.15 | failed: ratio"),
        (fake("nothing"), "FAIL 99 nothing"),
        (fake("raising"), "FAIL 99 raising ValueError: a broken check"),
        (fake("fine", needs_cuda=True), "SKIP 99 fine needs a CUDA device"),
        (fake("wrong", is_judged=False), "DONE 99 wrong ratio=1.5 | ratio<=1.15 | failed: ratio"),
    ],
)
def test_one_line_says_status_name_value_and_limit(
    check: Check, expected: str, context: Context
) -> None:
    assert catalogue.line(catalogue.run(check, context)) == expected


@pytest.mark.long
def test_a_check_that_hangs_or_crashes_fails_and_the_next_one_runs(context: Context) -> None:
    with Worker(context) as worker:
        first = worker.run(fake("fine"), 60)
        again = worker.run(fake("fine"), 60)
        hung = worker.run(fake("hanging"), 10)
        crashed = worker.run(fake("crashing"), 60)
        raised = worker.run(fake("raising"), 60)
        last = worker.run(fake("fine"), 60)
    assert hung["status"] == "FAIL"
    assert hung["reason"] == "no answer within 10 s"
    assert crashed["reason"] == "the process ended with exit code 3"
    assert raised["reason"] == "ValueError: a broken check"
    assert last["status"] == "PASS"
    assert first["values"] == again["values"]
    assert last["values"] != first["values"]
    # What the hanging check had started ended with it.
    sleeper = int((context.folder / "sleeper").read_text())
    for _ in range(100):
        if not _is_running(sleeper):
            break
        time.sleep(0.1)
    assert not _is_running(sleeper)


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_child_that_fails_is_reported_with_its_last_lines(context: Context) -> None:
    child = children.start("count_steps", {"unknown": 1}, context.folder)
    with children.ended_after([child]):
        children.wait([child], 60, "a child")
    with pytest.raises(RuntimeError, match=r"count_steps ended with 1: .*unexpected keyword"):
        child.result()


def test_a_child_that_hangs_is_killed(context: Context) -> None:
    child = children.start("count_steps", {}, context.folder)
    os.kill(child.process.pid, signal.SIGSTOP)
    message = r"a child did not end within 0\.2 s"
    with pytest.raises(TimeoutError, match=message), children.ended_after([child]):
        children.wait([child], 0.2, "a child")
    assert child.process.returncode == -signal.SIGKILL


# ---------------------------------------------------------------- lengths, recipes, report


def test_lengths_are_those_of_e2e() -> None:
    drawn = lengths.draw(250, seed=3)
    assert len(lengths.PAIRS) == 100
    assert sorted(drawn[:100]) == sorted(lengths.PAIRS)
    assert drawn != lengths.draw(250, seed=4)
    assert sum(a + b for a, b in lengths.PAIRS) / 100 == pytest.approx(53.3, abs=0.1)
    assert sum(lengths.fill(480, drawn)) == 480
    with pytest.raises(ValueError, match="fewer than 480 tokens"):
        lengths.fill(480, drawn[:2])


def test_steps_of_the_tables_follow_from_the_recipes() -> None:
    counted = {task: recipes.total_steps(task) for task in ("e2e", "webnlg", "xsum")}
    assert counted == {"e2e": 26_290, "webnlg": 11_270, "xsum": 79_725}
    assert recipes.total_steps("glue/mnli") == 736_320
    assert sum(recipes.total_steps(f"glue/{task}") for task in recipes.GLUE) == 1_688_275
    assert recipes.recipe("glue/rte")["alpha"] == 8
    assert recipes.recipe("glue/rte")["learning_rate"]["adalora"] == 5e-4
    assert recipes.recipe("glue/rte")["adalora"]["orth_reg_weight"] == 0.3
    assert recipes.recipe("glue/rte")["adalora"]["init_rank"] == 8


def test_every_row_of_the_tables_has_the_step_of_a_timed_method() -> None:
    times = dict.fromkeys(("lora", "delta_lora", "full", "adalora", "dylora"), 40.0)
    for table in report.TABLES:
        rows = [row["name"] for row in recipes.read(f"table/{table}")["rows"]]
        unknown = [row for row in rows if report.measured_method(row, times) is None]
        assert unknown == ["untrained"], table
    assert report.measured_method("lora_scaled", times) == "lora"
    assert (
        report.measured_method("lora_scaled", times | {"lora_no_dropout": 1}) == "lora_no_dropout"
    )
    assert report.measured_method("delta_lora_dropout", times) == "delta_lora"
    assert report.measured_method("full_query_value", times) == "full"
    assert report.measured_method("adalora", {"lora": 1.0}) is None


def _step(method: str, ms: float, **values: object) -> dict[str, object]:
    return {
        "model": "gpt2_medium", "method": method, "precision": "fp32", "matmul_precision": "fp32",
        "batch_size": 8, "batch_tokens": 420.0, "ms_per_step": ms, "peak_bytes": 1,
        "micro_batches": 1, **values,
    }  # fmt: skip


def test_hours_are_steps_times_seeds_times_rows() -> None:
    times = {"full": 50.0, "lora": 40.0, "dylora": 45.0, "adalora": 60.0, "delta_lora": 42.0}
    costs = {
        "steps": [_step(method, ms) for method, ms in times.items()],
        "decoding": [{"model": "gpt2_medium", "seconds": 3.0, "chunks_of_the_test_set": 20}],
    }
    table = report.hours(costs)["table1"]["fp32, matmul fp32"]
    # three rows of full, four of LoRA (three controls), two of Delta-LoRA (one control)
    ms = 3 * 50 + 45 + 60 + 4 * 40 + 2 * 42
    assert table["training_hours"] == pytest.approx(26_290 * 3 * ms / 1000 / 3600, abs=0.01)
    assert table["decoding_hours"] == pytest.approx(12 * 3 * 20 * 3 / 3600, abs=0.01)
    assert table["rows_without_a_time"] == []


def test_hours_count_the_micro_batches_of_a_step() -> None:
    methods = ("full", "lora", "dylora", "adalora", "delta_lora")
    step = {"model": "bart_large", "batch_size": 8, "micro_batches": 8}
    costs = {"steps": [_step(method, 100.0, **step) for method in methods], "decoding": []}
    table = report.hours(costs)["table3"]["fp32, matmul fp32"]
    assert table["training_hours"] == pytest.approx(8 * 3 * 79_725 * 0.8 / 3600, abs=0.01)


def test_an_entry_is_of_one_micro_batch(context: Context) -> None:
    workload = speed._bart(context)
    cost = steps.StepCost(ms=[80.0, 120.0])
    entry = steps.entry(workload, "lora", cost, precision="fp32", matmul_precision="tf32")
    assert entry["micro_batches"] == 2
    assert entry["ms_per_step"] == 50.0
    assert entry["best_ms_per_step"] == 40.0
    assert entry["batch_size"] == 2
    assert entry["batch_tokens"] == (2 * (12 + 12) + 2 * (24 + 12)) / 2


def test_articles_are_timed_as_a_sorted_step_holds_them() -> None:
    assert lengths.sorted_articles(1) == [768]
    assert lengths.sorted_articles(2) == [398, 768]
    assert lengths.sorted_articles(8)[3::4] == [398, 768]
    assert lengths.sorted_articles(8) == sorted(lengths.sorted_articles(8))


def test_hours_of_a_row_that_nobody_timed_are_unknown() -> None:
    costs = {"steps": [_step("lora", 40.0, matmul_precision="tf32")], "decoding": []}
    table = report.hours(costs)["table1"]["fp32, matmul tf32"]
    assert table["training_hours"] is None
    assert table["decoding_hours"] is None
    assert "full_query_value" in table["rows_without_a_time"]


def test_costs_have_the_form_that_the_planner_reads() -> None:
    finding = Finding()
    finding.cost("steps", **_step("lora", 40.0))
    for size, rate in ((10, 1.0), (400, 7.0)):
        finding.cost("checkpoint", bytes=size, write_bytes_per_s=rate, read_bytes_per_s=9.0)
    entry = catalogue.outcome(catalogue.by_number(4), "PASS", finding=finding)
    content = report.build(
        {"device": {"name": "NVIDIA H100 80GB HBM3"}}, [entry], is_small=False, not_run=[13],
        seconds=1.0,
    )  # fmt: skip
    assert content["schema"] == 1
    assert content["costs"]["steps"] == [_step("lora", 40.0)]
    assert content["costs"]["checkpoint"]["write_bytes_per_s"] == 7.0
    assert content["not_run"] == [13]
    assert report.slug(content["device"]["name"]) == "nvidia-h100-80gb-hbm3"


def _report(
    checks: dict[int, str], step: dict[str, Any], not_run: list[int], *, name: str = "NVIDIA A"
) -> dict[str, Any]:
    entries = [
        {"number": number, "name": f"check {number}", "status": status, "values": {},
         "costs": {"steps": [step]} if number == 4 else {}}
        for number, status in checks.items()
    ]  # fmt: skip
    facts = {"device": {"name": name, "type": "cuda"}, "versions": {}, "git": {"commit": "a"}}
    return report.build(facts, entries, is_small=True, not_run=not_run, seconds=10.0)


def test_a_later_part_takes_the_place_of_its_checks_and_costs() -> None:
    old = _report({1: "PASS", 4: "FAIL"}, _step("lora", 80.0), [13, 14])
    old["costs"]["steps"].append(_step("full", 90.0))
    new = _report({4: "PASS", 14: "DONE"}, _step("lora", 60.0), [])
    both = report.add(old, new)
    assert {c["number"]: c["status"] for c in both["checks"]} == {1: "PASS", 4: "PASS"}
    assert [(e["number"], e["status"]) for e in both["explore"]] == [(14, "DONE")]
    assert [s["ms_per_step"] for s in both["costs"]["steps"]] == [60.0, 90.0]
    assert both["not_run"] == [13]
    assert both["seconds"] == 20.0
    assert [part["checks"] for part in both["again"]] == [[4, 14]]
    with pytest.raises(ValueError, match="device='NVIDIA A', this run 'NVIDIA B'"):
        report.add(old, _report({4: "PASS"}, _step("lora", 1.0), [], name="NVIDIA B"))


# ---------------------------------------------------------------- the checks can fail


def test_golden_sees_a_wrong_update_of_w(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "MODELS", ("gpt2_medium",))
    monkeypatch.setattr(golden.models, "METHODS", ("delta_lora",))
    assert golden.golden(context).holds
    add_to = Differences.add_to

    def more(self: Differences, *args: Any, factors: list[float], **kwargs: Any) -> None:
        add_to(self, *args, factors=[factor * 1.001 for factor in factors], **kwargs)

    monkeypatch.setattr(Differences, "add_to", more)
    assert [r.name for r in golden.golden(context).requirements if not r.holds] == ["telescoping"]


def test_golden_sees_a_device_that_computes_something_else(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "MODELS", ("gpt2_medium",))
    monkeypatch.setattr(golden.models, "METHODS", ("lora", "delta_lora"))
    examples = golden._examples
    calls = iter(range(4 * golden.STEPS))
    # One other batch at the last step of the second run.
    monkeypatch.setattr(
        golden, "_examples", lambda name, seed: examples(name, seed + (next(calls) == 39))
    )
    failed = [r.name for r in golden.golden(context).requirements if not r.holds]
    assert failed == ["merged_difference"]


def test_packed_sees_sequences_that_look_at_one_another(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "_positions", lambda rows: list(range(sum(map(len, rows)))))
    failed = [r.name for r in golden.packed(context).requirements if not r.holds]
    assert "float32_difference" in failed


def test_a_machine_without_cuda_fails_the_first_check(context: Context) -> None:
    finding = environment.environment(context)
    assert not finding.holds
    assert len(finding.values["errors"]) == 3


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_syncs_are_counted_between_two_steps_and_named(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    before_step = speed.models.Lora.before_step

    def waiting(self: object, step: int) -> None:
        before_step(self, step)  # type: ignore[arg-type]
        for _ in range(3):
            warnings.warn(speed.SYNC_WARNING, stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(speed.models.Lora, "before_step", waiting)
    with pytest.warns(UserWarning, match="something else"):  # the steps outside
        counted, where = speed._count_syncs(context, steps.gpt2(context, steps=4), "lora")
    assert counted == 3
    assert list(where.values()) == [3 * speed.SYNC_STEPS]
    assert next(iter(where)).startswith("unit/test_gpu_check.py:")
    assert modes == ["warn", "default"]


@pytest.mark.long
def test_the_half_precision_run_stops_and_resumes(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    # float16 needs a GPU; bfloat16 shows the way there and back, and does not overflow.
    def trainer(**settings: object) -> object:
        return partial(resume_trainer, **settings)(precision="bf16")  # type: ignore[arg-type]

    resume_trainer = resume.Trainer
    monkeypatch.setattr(resume, "Trainer", lambda **settings: trainer(**settings))
    for name, value in (("FP16_STEPS", 12), ("FP16_STOP", 6), ("FP16_OVERFLOW", 2)):
        monkeypatch.setattr(resume, name, value)
    finding = resume.fp16(context)
    held = {r.name: r.holds for r in finding.requirements}
    assert finding.values["ms_after_resume"] > 0
    assert held == {
        "was_stopped": True, "skipped_steps": False, "skipped_steps_resumed": False,
        "steps_resumed": True, "finite_losses": True, "calls_after_resume": True,
    }  # fmt: skip


# ---------------------------------------------------------------- measuring


def test_a_step_is_measured_over_whole_epochs(context: Context) -> None:
    workload = steps.gpt2(context)
    started: list[int] = []
    cost = steps.measure(
        context, workload, "delta_lora", epochs=3, profiled_steps=1,
        at_start=lambda: started.append(1),
    )  # fmt: skip
    assert started == [1]
    assert len(cost.ms) == 3
    assert cost.best_ms == min(cost.ms) <= cost.ms_per_step
    assert cost.first_epoch_ms > 0
    assert 0 < cost.loss < float("inf")
    assert cost.launches is None  # a CPU launches no kernel
    entry = steps.entry(workload, "delta_lora", cost, precision="fp32", matmul_precision="fp32")
    assert entry["steps_timed"] == 6
    tokens = sum(len(s.tokens) - 1 for group in workload.groups for s in group)
    assert entry["batch_tokens"] == tokens / 2
    assert not list(context.folder.rglob("step-*"))  # no checkpoint was written


def test_an_epoch_of_one_step_cannot_be_measured(context: Context) -> None:
    workload = steps.gpt2(context)
    with pytest.raises(ValueError, match="at least two whole steps"):
        steps.Workload("gpt2_medium", workload.groups[:1], 1, 8, True)


@pytest.mark.long
def test_processes_that_train_together_are_counted(context: Context) -> None:
    found = speed.together(context, 1, {}, {})
    assert found["processes"] == 1
    assert found["steps_per_s"] > 0


def test_slots_over_one_base_do_not_see_one_another() -> None:
    torch.manual_seed(0)
    base = explore.models.build("gpt2_medium", "cpu", small=True, layers=1).transformer.h[0]
    layer = base.attn.c_attn
    slots = explore.SlotLinear(layer, [0, 128], 3)
    for B in slots.B:
        torch.nn.init.normal_(B)
    x_MTI = torch.randn(3, 5, 64)
    out_MTO = slots(x_MTI)
    for row in range(3):
        expected = layer(x_MTI[row])
        for number, start in enumerate((0, 128)):
            A = slots.A[row, :, number * explore.RANK : (number + 1) * explore.RANK]
            delta = x_MTI[row] @ A @ slots.B[number][row] * explore.SCALING
            expected[:, start : start + 64] += delta
        torch.testing.assert_close(out_MTO[row], expected)


def test_the_mask_handed_in_is_the_one_that_positions_give(context: Context) -> None:
    assert explore.mask_difference(context) < 1e-6


FAKE_MPS = """#!{python}
import os, pathlib, sys, time
folder = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
if sys.argv[1:] == ["-f"]:
    (folder / "control").touch()
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(300)
(folder / "said").write_text(sys.stdin.read())
"""


def test_an_mps_daemon_of_our_own_ends_with_the_idea(
    context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / explore.MPS
    program.write_text(FAKE_MPS.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with explore._mps_daemon(context) as variables:
        folder = Path(variables["CUDA_MPS_PIPE_DIRECTORY"])
        assert folder.is_relative_to(context.folder)
        while not (folder / "pid").exists():
            time.sleep(0.01)
        assert _is_running(int((folder / "pid").read_text()))
    assert not _is_running(int((folder / "pid").read_text()))
    assert (folder / "said").read_text() == "quit\n"


def test_an_idea_that_fails_says_why_and_stops_no_other(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(context: Context) -> dict[str, object]:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(explore, "slots", broken)
    finding = explore.explore(context)
    assert finding.values["slots_over_one_base"] == {"failed": "RuntimeError: no such thing"}
    skipped = {"skipped": "needs a CUDA device"}
    assert finding.values["cuda_graph"] == finding.values["processes_under_mps"] == skipped
