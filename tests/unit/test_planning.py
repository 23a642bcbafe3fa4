"""Costs of runs before they start: sizes, lengths, time, disk."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import get_class, instantiate
from torch.utils._python_dispatch import TorchDispatchMode

from delta_lora import delta
from delta_lora.analysis.memory_model import LiveBytes, measure_step
from delta_lora.methods.full import Full
from scripts import dry_run
from scripts.planning import disk, memory, speed
from scripts.planning.adaptation import KINDS, read_adaptation
from scripts.planning.architecture import UnknownCostError, read_architecture
from scripts.planning.forward import Batch, write_down
from scripts.planning.ledger import CPU, CUDA
from scripts.planning.lengths import SHARES, Lengths, read_lengths
from scripts.planning.workload import read_decoding, read_workload
from scripts.reporting.plan import describe_costs
from scripts.reporting.spec import ROOT, load_table
from scripts.runs import costs, space
from scripts.runs.building import random_model
from scripts.runs.checks import check
from scripts.runs.composition import compose
from scripts.runs.durations import Durations
from scripts.runs.recording import config_of
from scripts.runs.run import Run
from tests.choices import first
from tests.unit.test_parameter_counts import COUNTS, METHODS, SETTINGS

E2E, WEBNLG, XSUM, COLA = SETTINGS.values()
GIB = 2**30


def small_ledger(cfg: Any, batch: Batch | None = None) -> Any:
    shape = read_architecture(cfg)
    batch = batch or Batch(1, 2, shape.family == "gpt2", targets=1)
    return write_down(shape, read_adaptation(cfg), batch, CPU)


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize("table", first(SETTINGS))
def test_parameters_are_those_of_the_real_architectures(table: int) -> None:
    total, embeddings, head, dense, low_rank, singular_values = COUNTS[table]
    for name in METHODS:
        ledger = small_ledger(compose([*SETTINGS[table], f"method={name}"]))
        assert ledger.parameters == total
        assert ledger.dense == dense
        expected = {
            "full": total, "full_frozen_embeddings": total - embeddings,
            "full_query_value": dense + head, "adalora": low_rank + singular_values + head,
        }.get(name, low_rank + head)  # fmt: skip
        assert ledger.trained == expected, name
        assert ledger.updatable == (dense if name == "delta_lora" else 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["++model.architecture={model_type: llama}"], "'llama'"),
        (["model.architecture=null", "model.hub_id=some/model"], "configs/plan/models.yaml"),
        (["model.path=/nowhere"], "/nowhere/config.json"),
        (["method=peft"], "the method peft is not planned"),
        (["method._target_=my.lora.Lora"], "the method my.lora.Lora is not planned"),
    ],
)
def test_what_is_not_known_is_said_and_not_guessed(overrides: list[str], message: str) -> None:
    cost = costs.estimate(compose([*E2E, *overrides]))
    assert cost.seconds is cost.device_bytes is cost.disk_bytes is None
    assert message in cost.basis
    assert costs.device_bytes(compose([*E2E, *overrides])) is None


@pytest.mark.parametrize("name", KINDS)
def test_a_method_is_planned_by_the_name_that_it_declares(name: str) -> None:
    cfg = compose([*E2E, f"method={name}"])
    assert read_adaptation(cfg).method == get_class(cfg.method["_target_"]).name == name


@pytest.mark.parametrize("wrong", ["recipe.rank=abc", "trainer.batch_size=0", "recipe.rank=null"])
def test_a_wrong_value_does_not_stop_a_plan(wrong: str) -> None:
    cost = costs.estimate(compose([*E2E, "method=lora", wrong]))
    assert cost.seconds is cost.device_bytes is None
    assert "cannot be planned with" in cost.basis
    with pytest.raises(ValueError, match=wrong.partition("=")[0].rpartition(".")[2]):
        check(Run.compose([*E2E, "method=lora", wrong]))


def test_a_local_model_is_read_from_its_folder(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_architecture(compose([*E2E, f"model.path={tmp_path}"]))
    assert (shape.width, shape.num_layers, shape.vocabulary, shape.inner) == (64, 2, 99, 256)


def test_a_tiny_model_is_that_of_the_run_that_pre_trains_it() -> None:
    shape = read_architecture(compose([*E2E, "scale=tiny"]))
    assert (shape.family, shape.width, shape.num_layers, shape.vocabulary) == ("gpt2", 128, 3, 1536)
    assert read_architecture(compose([*XSUM, "scale=tiny"])).num_decoder_layers > 0
    assert costs.estimate(compose([*COLA, "method=lora", "scale=tiny"])).disk_bytes
    named = "model.pretrain=['model=tiny_gpt2_scratch']"
    assert read_architecture(compose([*E2E, "scale=tiny", named])) == shape


@pytest.mark.parametrize("table", ["table1", "table3"])
@pytest.mark.parametrize("name", ["full", "delta_lora"])
def test_decoding_takes_what_was_planned(table: str, name: str) -> None:
    spec = load_table(table)
    row = next(r for r in spec.rows if r.name == name)
    cfg = compose(dry_run.row_settings(spec, row, is_small=True)["overrides"])
    task, method = instantiate(cfg.task), instantiate(cfg.method)
    model = random_model(cfg, task)
    method.inject(model, projections=None, head=task.head, total_steps=100, seed=1)
    model.eval()
    shape, adaptation, inputs, length, new = (
        read_architecture(cfg), read_adaptation(cfg), 3, 60, 24,
    )  # fmt: skip
    if shape.family == "gpt2":
        settings = {"max_new_tokens": new, "num_beams": 5, "early_stopping": "never"}
        search = instantiate(cfg.task.decoding, **settings)
        prompts: Any = ([list(range(5, 5 + length))] * inputs, [900])
    else:
        settings = {"max_length": new + 1, "num_beams": 5, "early_stopping": "never"}
        search = instantiate(cfg.task.decoding, **settings)
        prompts = ([torch.arange(5, 5 + length)] * inputs,)
    with LiveBytes() as counter, method.merged(model) as merged:
        search.generate(merged, *prompts)
    measured = counter.peak + sum(p.numel() * p.element_size() for p in model.parameters())
    planned = memory.decoding_bytes(
        shape, adaptation, small_ledger(cfg), inputs=inputs, num_beams=5, input_length=length,
        new_tokens=new,
    )  # fmt: skip
    kept = 2 * small_ledger(cfg).adapters * 4 if name == "delta_lora" else 0  # from a training
    assert planned - kept == pytest.approx(measured, rel=0.15)


def test_on_cuda_masks_are_bytes_and_attention_keeps_no_square() -> None:
    cfg = compose([*COLA, "method=lora"])
    shape, adaptation, batch = read_architecture(cfg), read_adaptation(cfg), Batch(16, 128)
    square = 16 * shape.num_heads * 128**2 * 4
    for kernels, number in ((CPU, 3 * shape.num_layers), (CUDA, 0)):
        operations = write_down(shape, adaptation, batch, kernels).operations
        sizes = [size for operation in operations for size in operation.kept.values()]
        assert sizes.count(square) == number
    plain = dataclasses.replace(shape, attention_dropout=0.0)
    cpu, cuda = (
        memory.step_bytes(write_down(plain, adaptation, batch, k), accumulates=False)["activations"]
        for k in (CPU, CUDA)
    )
    entries = 2 * shape.num_layers * 16 * 128 * shape.width + 2 * 16 * shape.width
    assert cpu - cuda == 3 * entries


def test_gradients_of_earlier_micro_batches_are_counted() -> None:
    torch.manual_seed(0)
    model, method = (
        torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)]),
        Full(learning_rate=0.1),
    )
    x = torch.randn(2, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    one, two = (
        measure_step(model, method, optimizer, lambda: model(x).sum(), micro_batches=number)
        for number in (1, 2)
    )
    assert two["gradients"] == one["gradients"]
    assert two["peak"] > one["peak"]
    with pytest.raises(ValueError, match="micro_batches=0"):
        measure_step(model, method, optimizer, lambda: model(x).sum(), micro_batches=0)


# ---------------------------------------------------------------------- lengths and work


def test_the_longest_of_a_batch_follows_from_quantiles() -> None:
    draw = random.Random(0)
    values = sorted(round(draw.gammavariate(4, 10)) + 5 for _ in range(20_000))
    quantiles = tuple(values[min(len(values) - 1, int(u * len(values)))] for u in SHARES)
    lengths = Lengths(sum(values) / len(values), 20.0, quantiles, values[-1])
    for number in (1, 8, 32):
        seen = sum(max(draw.choices(values, k=number)) for _ in range(4000)) / 4000
        assert lengths.mean_of_longest(number) == pytest.approx(seen, rel=0.05)
    for parts in (2, 8):
        seen = 0.0
        for _ in range(1000):
            step = sorted(draw.choices(values, k=64))
            seen += sum(step[64 * (p + 1) // parts - 1] for p in range(parts)) / parts / 1000
        assert lengths.mean_of_sorted_parts(64, parts) == pytest.approx(seen, rel=0.05)
        assert lengths.mean_of_sorted_parts(64, parts) < lengths.mean_of_longest(64 // parts)
    assert lengths.largest_sum(8) <= 8 * values[-1]
    cut = lengths.cut(40)
    assert cut.longest == 40
    assert max(cut.quantiles) == 40


@pytest.mark.parametrize(
    ("settings", "steps", "micro_batches"),
    [(E2E, 26290, 1), (WEBNLG, 11270, 1), (XSUM, 79725, 2), (COLA, 80 * 268, 1)],
)
def test_steps_and_micro_batches_are_the_recipes(
    settings: list[str], steps: int, micro_batches: int
) -> None:
    cfg = compose([*settings, "method=lora"])
    work = read_workload(cfg, read_architecture(cfg), read_lengths(cfg))
    assert (work.steps, work.micro_batches) == (steps, micro_batches)
    rows = read_lengths(cfg).rows["train"]
    assert instantiate(cfg.trainer).total_steps(rows) == steps
    assert work.largest.length >= work.mean.length


def test_evaluations_are_counted_in_batches() -> None:
    cfg = compose([*COLA, "method=lora"])
    work = read_workload(cfg, read_architecture(cfg), read_lengths(cfg))
    assert work.evaluated == 80 * (17 + 17) + 17  # loss and metric of 80 epochs, final scores
    cfg = compose([*E2E, "method=lora"])
    work = read_workload(cfg, read_architecture(cfg), read_lengths(cfg))
    assert work.evaluated == 5 * 584
    never = compose([*E2E, "method=lora", "trainer.evaluate_every_epochs=null"])
    assert read_workload(never, read_architecture(never), read_lengths(never)).evaluated == 0


class CountedOperations(TorchDispatchMode):
    """Counts the operations that compute something."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        alias = returns[0].alias_info if returns else None
        self.number += alias is None or alias.is_write
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["full", "full_query_value", "lora", "adalora", "delta_lora"])
def test_kernels_of_a_step_are_about_its_counted_operations(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "STAGED", ("cpu",))  # the plan counts CUDA's form
    spec = load_table("table1")
    row = next(r for r in spec.rows if r.name == name)
    overrides = dry_run.row_settings(spec, row, is_small=True)["overrides"]
    deep = "{model_type: gpt2, vocab_size: 29, n_embd: 16, n_layer: 24, n_head: 2}"
    cfg, batch = compose([*overrides, f"++model.architecture={deep}"]), Batch(2, 12, True, 6)
    task, trainer, method = (instantiate(cfg[part]) for part in ("task", "trainer", "method"))
    model = random_model(cfg, task)
    method.inject(model, projections=None, head=task.head, total_steps=1000, seed=1)
    optimizer, loss = (
        trainer.build_optimizer(model, method),
        dry_run._loss(cfg, task, model.train(), batch),
    )
    for step in range(2):
        with CountedOperations() as counted:
            total, extra = loss(), method.extra_loss()
            (total if extra is None else total + extra).backward()
            method.before_step(step)
            optimizer.step()
            method.after_step(step)
        optimizer.zero_grad()
    ledger = small_ledger(cfg, batch)
    further = speed.BRANCH_LAUNCHES.get(ledger.adaptation.method, 0) * ledger.num_branches
    planned = ledger.forward_launches + ledger.backward_launches + further
    # A CPU makes dropout of several operations, CUDA of one.
    assert planned == pytest.approx(counted.number, rel=0.25)


def test_less_data_and_fewer_steps_are_less_work() -> None:
    cfg = compose([*E2E, "method=lora", "train_fraction=0.1"])
    assert read_workload(cfg, read_architecture(cfg), read_lengths(cfg)).steps == 5 * 526
    cfg = compose([*XSUM, "method=lora", "task.max_rows={test: 500}"])
    assert read_decoding(cfg, read_lengths(cfg)).chunks == math.ceil(500 / 16)
    with pytest.raises(UnknownCostError, match="embedded"):
        read_lengths(compose([*E2E, "scale=tiny"]))


# ---------------------------------------------------------------------- time


H100 = speed.Device(
    "NVIDIA H100 80GB HBM3", True, {"fp32": 67e12, "tf32": 495e12}, {"fp32": 0.6, "tf32": 0.4},
    25e-6, 3.35e12, {},
)  # fmt: skip
STEP = {
    "model": "gpt2_medium", "method": "lora", "precision": "fp32", "matmul_precision": "fp32",
    "batch_tokens": 420, "batch_size": 8, "ms_per_step": 40.0, "peak_bytes": 2_000_000_000,
}  # fmt: skip


def measured(**changes: Any) -> speed.Device:
    return speed.Device(**{**vars(H100), "costs": {"steps": [{**STEP, **changes}]}})


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plan on a given device."""

    def use(device: speed.Device) -> None:
        monkeypatch.setattr(speed, "planned_device", lambda: device)
        costs._estimate.cache_clear()

    yield use
    costs._estimate.cache_clear()


def test_a_step_is_bound_by_its_kernels_or_by_its_flops(on: Any) -> None:
    on(H100)
    e2e, xsum = (costs.estimate(compose([*s, "method=lora"])) for s in (E2E, XSUM))
    # 26,290 steps of some 1,200 kernels; 79,725 steps of some 34 TFLOP: 64 articles in two sorted
    # parts, which end at 398 and at 768 tokens.
    assert 26290 * 1000 * 25e-6 < e2e.seconds < 26290 * 1500 * 25e-6
    assert e2e.seconds < 0.05 * xsum.seconds
    assert xsum.seconds == pytest.approx(79725 * 34e12 / (0.6 * 67e12), rel=0.1)
    assert "60% of 67 TFLOP/s (fp32), at least 25 us a kernel" in e2e.basis
    adalora = costs.estimate(compose([*E2E, "method=adalora"]))
    assert adalora.seconds > 1.5 * e2e.seconds


def test_a_measured_peak_corrects_the_planned_one(on: Any) -> None:
    cfg = compose([*E2E, "method=lora", "predict=false"])
    on(H100)
    planned = costs.estimate(cfg).device_bytes
    shape, adaptation = read_architecture(cfg), read_adaptation(cfg)
    batch = read_workload(cfg, shape, read_lengths(cfg)).mean
    ledger = write_down(shape, adaptation, dataclasses.replace(batch, length=420), CUDA)
    there = memory.step_bytes(ledger, accumulates=False)["peak"]
    on(measured(peak_bytes=round(1.2 * there)))
    assert costs.estimate(cfg).device_bytes == pytest.approx(1.2 * planned, rel=1e-6)


def test_a_measured_step_counts_before_an_estimate(on: Any) -> None:
    on(measured())
    cost = costs.estimate(compose([*E2E, "method=lora"]))
    assert cost.seconds == pytest.approx(26290 * 0.040, rel=0.1)
    assert "steps measured on NVIDIA H100" in cost.basis
    same = costs.estimate(compose([*E2E, "method=lora_high_lr"]))
    assert same.seconds == cost.seconds


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "bart_large"}, {"method": "full"}, {"precision": "bf16"},
        {"matmul_precision": "tf32"}, {"batch_size": 16}, {"batch_tokens": 800},
    ],
)  # fmt: skip
def test_a_step_of_another_kind_is_not_used(changes: dict[str, Any]) -> None:
    cfg = compose([*E2E, "method=lora"])
    batch = read_workload(cfg, read_architecture(cfg), read_lengths(cfg)).mean
    assert speed.measured_step(cfg, batch, measured()) is not None
    assert speed.measured_step(cfg, batch, measured(**changes)) is None


def test_measured_files_that_do_not_fit_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"schema": 1, "device": {"name": "NVIDIA H100 PCIe"}, "costs": {"steps": [STEP]}}
    (tmp_path / "a.json").write_text(json.dumps(good))
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_text(json.dumps({**good, "schema": 2}))
    (tmp_path / "d.json").write_text(json.dumps({**good, "device": {"name": "NVIDIA A100"}}))
    assert speed.measured_costs("H100", tmp_path) == {"steps": [STEP], "file": "a.json"}
    assert "b.json" in caplog.text
    assert "schema 2" in caplog.text
    assert speed.measured_costs("L4", tmp_path) == {}
    broken = speed.Device(**{**vars(H100), "costs": {"steps": [{"model": "gpt2_medium"}]}})
    cfg = compose([*E2E, "method=lora"])
    assert speed.measured_step(cfg, Batch(8, 420, True, 10), broken) is None
    assert "does not fit" in caplog.text


def test_an_unknown_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "cuda_device_name", lambda: "Tesla K80")
    speed.planned_device.cache_clear()
    costs._estimate.cache_clear()
    try:
        cost = costs.estimate(compose([*E2E, "method=lora"]))
    finally:
        speed.planned_device.cache_clear()
        costs._estimate.cache_clear()
    assert cost.seconds is None
    assert "Tesla K80" in cost.basis
    assert cost.device_bytes is not None


def test_the_reserve_of_a_worker_is_above_the_peak() -> None:
    cfg = compose([*E2E, "method=lora"])
    planned = costs.estimate(cfg)
    assert planned.device_bytes + costs.CONTEXT_BYTES < costs.device_bytes(cfg) < 12 * GIB
    on_cpu = compose([*E2E, "method=lora", "trainer.device=cpu"])
    assert costs.device_bytes(on_cpu) is None
    assert costs.estimate(on_cpu).disk_bytes is not None


def config(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "choices": {"scale": "paper", "task": "e2e"},
        "model": {"name": "gpt2_medium"},
        "trainer": {"max_steps": None, "num_epochs": 5, "batch_size": 8},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        base[part] = {**base.get(part, {}), name: value}
    return base


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__max_steps": 20}, {"model__name": "distilgpt2"}, {"choices__scale": "small"},
        {"choices__task": "webnlg"}, {"task__max_rows": {"train": 10}}, {"trainer__batch_size": 16},
        {"trainer__precision": "bf16"}, {"trainer__matmul_precision": "tf32"},
        {"model__path": "/a/model"}, {"model__hub_id": "them/it"}, {"model__init": "random"},
        {"task__max_inputs": 5}, {"task__data_dir": "/a/data"},
        {"trainer__evaluate_every_epochs": 1}, {"trainer__gradient_checkpointing": True},
    ],
)  # fmt: skip
def test_a_run_of_another_kind_predicts_nothing(changes: dict[str, Any]) -> None:
    durations = Durations()
    durations.add("a", config(**changes), 30.0)
    run = SimpleNamespace(group="b", config=config())
    assert durations.expect(run) is None
    assert durations.basis(run) == "no earlier run"
    durations.add("c", config(), 50.0)
    assert durations.expect(run) == 50.0
    assert durations.basis(run) == "same task, model, data and steps"


def test_a_folder_is_the_same_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    durations = Durations()
    durations.add("a", config(model__path="/a/model"), 30.0)
    for path in ("a/model", "/b/../a/model"):
        run = SimpleNamespace(group="b", config=config(model__path=path))
        assert durations.expect(run) == 30.0
    assert durations.expect(SimpleNamespace(group="b", config=config(model__path="/b"))) is None


def test_a_record_and_a_composed_run_of_one_kind_are_seen_as_such() -> None:
    run = Run.compose([*E2E, "method=lora", "scale=tiny"])
    other = Run.compose([*E2E, "method=full", "scale=tiny"])
    durations = Durations()
    durations.add(run.group, json.loads(json.dumps(config_of(run))), 30.0)
    assert durations.expect(other) == 30.0
    untrained = Run.compose([*E2E, "method=lora", "scale=tiny", "trainer.max_steps=0"])
    assert durations.expect(untrained) is None


# ---------------------------------------------------------------------- disk


@pytest.mark.parametrize(
    ("method", "checkpoint", "adapter"),
    [
        ("full", 3 * 354_823_168 * 4, 354_823_168 * 4),
        ("lora", 3 * 393_216 * 4, 393_216 * 4),
        # Whole layers of query, key and value.
        ("delta_lora", (24 * 3 * 1024**2 + 3 * 393_216) * 4, (24 * 3 * 1024**2 + 393_216) * 4),
    ],
)
def test_disk_is_three_checkpoints_and_an_adapter(
    method: str, checkpoint: int, adapter: int
) -> None:
    cfg = compose([*E2E, f"method={method}"])
    work = read_workload(cfg, read_architecture(cfg), read_lengths(cfg))
    found = disk.run_disk(cfg, small_ledger(cfg), work, 630)
    assert found.checkpoint == pytest.approx(checkpoint, rel=0.01)
    assert found.adapter == pytest.approx(adapter, rel=0.01)
    assert found.peak == found.kept + 3 * found.checkpoint
    best = compose([*COLA, f"method={method}"])
    work = read_workload(best, read_architecture(best), read_lengths(best))
    found = disk.run_disk(best, small_ledger(best), work, 0)
    assert found.peak == found.kept + 3 * found.checkpoint + 3 * found.adapter
    whole = compose([*E2E, f"method={method}", "save_model=true"])
    more = disk.run_disk(whole, small_ledger(whole), work, 630).kept
    assert more > 354_823_168 * 4


def cells(*overrides: str, table: str = "table1", seeds: tuple[int, ...] = (1,)) -> list[Any]:
    spec = load_table(table)
    return spec.cells(scale="paper", seeds=seeds, extra=overrides)


@pytest.fixture
def nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_disk_that_is_too_small_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch, nothing_cached: Path
) -> None:
    outputs = nothing_cached / "outputs"
    todo = cells(f"paths.outputs={outputs}")
    one, two = space.disk_need(todo, 1), space.disk_need(todo, 2)
    assert one.kept == two.kept == sum(costs.estimate(c.run.config).disk_bytes for c in todo)
    assert one.peak < two.peak
    free = SimpleNamespace(free=one.peak)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"need .* GiB in .*outputs .*, but .* GiB are free") as found:
        space.check_disk_space(todo, 1)  # the download is on top
    for text in ("paths.outputs=FOLDER", "WORKERS=1", str(outputs), "downloads to"):
        assert text in str(found.value)
    free.free += sum(one.downloads.values())
    space.check_disk_space(todo, 1)
    with pytest.raises(OSError, match="while 2 work"):
        space.check_disk_space(todo, 2)
    assert not outputs.exists()
    space.check_disk_space([], 1)


def test_what_is_in_the_cache_is_not_downloaded(nothing_cached: Path) -> None:
    cfg = compose([*XSUM, "method=lora"])
    wanted = disk.downloads(cfg)
    assert {repository for repository, _ in wanted} == {"facebook/bart-large", "EdinburghNLP/xsum"}
    assert sum(wanted.values()) == 1_020_000_000 + 338_049_041
    held = nothing_cached / "hub" / "models--facebook--bart-large" / "snapshots" / "abc"
    held.mkdir(parents=True)
    assert {repository for repository, _ in disk.downloads(cfg)} == {"EdinburghNLP/xsum"}
    assert disk.downloads(compose([*XSUM, "method=lora", "scale=tiny"])) == {}


# ---------------------------------------------------------------------- the plan


@pytest.mark.parametrize("table", ["table1", "table3"])
def test_the_plan_of_a_table_names_time_memory_and_disk(
    table: str, on: Any, nothing_cached: Path
) -> None:
    on(H100)
    todo = cells(table=table)
    lines = describe_costs(todo, 1, Durations())
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 100
    assert f"of one NVIDIA H100 80GB HBM3 for {len(todo)} runs" in text
    assert "25 us a kernel" in text
    largest = {"table1": "adalora", "table3": "full"}[table]
    assert f"of device memory for one run: {largest} on" in text
    assert "with 1 worker(s)" in text
    assert "to download:" in text
    assert describe_costs([], 1, Durations()) == []


def test_earlier_runs_count_before_an_estimate(on: Any) -> None:
    on(H100)
    todo, durations = cells(), Durations()
    durations.add(todo[0].run.group, {}, 7200.0)
    text = " ".join(" ".join(describe_costs(todo, 2, durations)).split())
    assert "1 h 00 min for 1 runs, from earlier runs on this machine" in text
    assert "for 11 runs, one at a time" in text


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from scripts.runs.composition import compose; from scripts.runs import costs; "
        f"cost = costs.estimate(compose({[*E2E, 'method=lora']!r})); assert cost.device_bytes; "
        "heavy = {'torch', 'transformers'} & set(sys.modules); "
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
