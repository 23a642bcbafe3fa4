"""One run from composition to record: every method, kills, locks, stale and failed runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from omegaconf import OmegaConf

from delta_lora import wandb_file
from scripts.dashboards import panels, reports, views
from scripts.dashboards.subjects import of_sweep, of_table
from scripts.reporting.results import collect
from scripts.reporting.spec import load_table
from scripts.runs.cells import Cell
from scripts.runs.composition import options
from scripts.runs.execution import execute
from scripts.runs.folder import LockedError, lock
from scripts.runs.mirroring import group_of
from scripts.runs.run import Run, Status
from scripts.sweeping.spec import load_sweep
from tests.choices import first
from tests.faults.damage import rewrite
from tests.smoke.conftest import command, environment
from tests.smoke.mirrored import logged

#: of the package peft only its LoRA: its other methods run in test_peft.py and in their contract.
METHODS = [name for name in options("method") if "/" not in name]
DETERMINISTIC = (
    "metrics.jsonl", "predictions.jsonl", "record.json", "item_spread.json", "adapter",
)  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """Return the checksums of everything that a repetition must give again."""
    files = [p for name in DETERMINISTIC for p in ([folder / name, *(folder / name).glob("*")])]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}


@pytest.mark.parametrize("method", first(METHODS, 4))
def test_every_method_runs_through(method: str, small: Callable[..., list[str]]) -> None:
    run = Run.compose(small(f"method={method}"))
    assert run.status().state in ("missing", "done")
    record = execute(run)
    assert record["status"] == "completed"
    assert record["method"] == method
    assert record["task"]["protocol"] == "lora"
    assert record["training"]["steps"] == 6
    assert set(record["metrics"]) | set(record["missing_metrics"]) == {
        "bleu", "nist", "meteor", "rouge_l", "cider",
    }  # fmt: skip
    assert "Java not found" in record["missing_metrics"]["meteor"]
    assert record["resources"]["train_time_s"] > 0
    spread = record["item_spread"]
    assert spread["num_items"] == 3
    assert set(spread["scores"]) | set(spread["missing"]) == {
        *record["metrics"], *record["missing_metrics"],
    }  # fmt: skip
    folder = run.folder
    assert list((folder / "checkpoints").iterdir()), "METEOR is missing and can be scored later"
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 3
    low_rank = 3 * 2 * 4 * 2 * 128
    expected = {
        "delta_lora": (low_rank, 3 * 2 * 128 * 128),
        "delta_lora_dropout": (low_rank, 3 * 2 * 128 * 128),
        "adalora": (low_rank + 3 * 2 * 4, 0),
        "full_query_value": (3 * 2 * 128 * 128, 0),
        "full": (record["parameters"]["total"], 0),
        "peft": (3 * 4 * (128 + 3 * 128), 0),  # one A and one B for the whole fused layer
        "full_frozen_embeddings": (record["parameters"]["total"] - 700 * 128, 0),
    }.get(method, (low_rank, 0))
    assert (record["parameters"]["trainable"], record["parameters"]["updatable"]) == expected
    assert run.status().state == "done"
    again = execute(run)
    assert again == record


def test_delta_lora_writes_w_and_says_how_often(small: Callable[..., list[str]]) -> None:
    record = execute(Run.compose(small("method=delta_lora")))
    assert record["training"]["method"] == {
        "num_weight_updates": 4,
        "first_weight_update_step": 2,
    }


def test_runs_without_updates_of_w_are_the_same_run(small: Callable[..., list[str]]) -> None:
    delta = Run.compose(small("method=delta_lora", "method.update_ratio=0"))
    plain = Run.compose(small("method=lora_no_dropout"))
    for run in (delta, plain):
        execute(run)
    a, b = (contents(run.folder) for run in (delta, plain))
    for name in ("metrics.jsonl", "predictions.jsonl", "adapter_model.safetensors"):
        assert a[name] == b[name]


@pytest.mark.parametrize("moment", first(["decoding", "training"]))
def test_a_run_that_was_killed_continues_to_the_same_bits(
    moment: str, small: Callable[..., list[str]], outputs: Path, tmp_path: Path
) -> None:
    arguments = ["method=delta_lora", "seed=5"]
    if moment == "training":
        arguments += ["trainer.max_steps=40"]
    else:  # long enough to be hit
        arguments += ["task.embedded_sizes={train:12,validation:3,test:60}"]
    straight = Run.compose(small(*arguments))
    execute(straight)
    killed = Run.compose(small(*arguments, folder=tmp_path))
    base = straight.pretraining.folder
    (tmp_path / base.name).symlink_to(base)
    folder = killed.folder
    assert folder.name == straight.folder.name

    file = "metrics.jsonl" if moment == "training" else "predictions.partial.jsonl"
    process = subprocess.Popen(
        command(small(*arguments, folder=tmp_path)), env=environment(), stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if (folder / file).exists() and (folder / file).stat().st_size > 0:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait(30)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert killed.status().state == "partial"
    execute(killed)
    assert contents(folder) == contents(straight.folder)


@pytest.mark.long
def test_a_pruned_run_is_no_failed_one_and_goes_on_where_it_was_when_asked_without_pruning(
    small: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("method=delta_lora", "recipe.batch_size=22")  # two steps an epoch
    straight = Run.compose(small(*arguments))
    execute(straight)
    monkeypatch.setattr(Broken, "ends", [])
    mirror = f"logger._target_={__name__}.Broken"
    run = Run.compose(small(*arguments, mirror, folder=tmp_path))
    base = straight.pretraining.folder
    (tmp_path / base.name).symlink_to(base)

    record = execute(run, prune=lambda validation: "of a test" if len(validation) == 2 else None)
    assert record == run.record()
    assert record["status"] == "pruned"
    assert record["pruned"] == {"step": 4, "of": 6, "reason": "of a test"}
    assert [entry["step"] for entry in record["training"]["validation"]] == [2, 4]
    assert run.status() == Status("partial", "pruned at step 4 of 6, because of a test")
    assert run.completed() is None
    assert not (run.folder / "predictions.jsonl").exists()
    assert list((run.folder / "checkpoints").iterdir())
    (entry,) = collect([Cell("delta_lora", "e2e", run)])
    assert entry.record is None  # so it is in no table

    execute(run)
    assert Broken.ends == ["pruned", "completed"]
    assert contents(run.folder) == contents(straight.folder)


def test_a_second_process_in_the_same_folder_is_refused(small: Callable[..., list[str]]) -> None:
    run = Run.compose(small("method=lora", "seed=77"))
    with (
        lock(run.folder, wait=False),
        pytest.raises(LockedError, match=r"process \d+ on \S+ is already working in"),
    ):
        execute(run, wait=False)


class Broken:
    """A mirror that loses its connection at the end."""

    ends: ClassVar[list[str]] = []

    def __init__(self, **_: Any) -> None: ...

    def begin(self, facts: Any) -> Broken:
        return self

    def log(self, step: int, values: Any) -> None: ...

    def close(self, status: str, error: str = "") -> None:
        self.ends.append(status)
        raise RuntimeError("no connection")


def test_a_dashboard_that_fails_costs_no_record_and_is_told_how_a_run_ended(
    small: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from tasks.e2e import E2E

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Broken, "ends", [])
    caplog.set_level("DEBUG", "delta_lora.runlog")
    run = Run.compose(small("method=lora", "seed=81", f"logger._target_={__name__}.Broken"))
    with monkeypatch.context() as patch:
        patch.setattr(E2E, "score", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            execute(run)
    assert Broken.ends == ["failed"]
    assert execute(run)["status"] == "completed"
    assert Broken.ends == ["failed", "completed"]
    assert "RuntimeError: no connection" in caplog.text


def test_a_failing_run_leaves_its_reason_and_can_be_run_again(
    small: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.e2e import E2E

    run = Run.compose(small("method=lora", "seed=78"))

    def broken(*_: Any) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(E2E, "score", broken)
        with pytest.raises(RuntimeError, match="the disk is full"):
            execute(run)
    record = json.loads((run.folder / "record.json").read_text())
    assert record["status"] == "failed"
    assert "in broken" in record["error"]["traceback"]
    assert run.status() == Status("failed", "the disk is full")
    assert execute(run)["status"] == "completed"


def test_a_run_on_another_base_is_stale(
    small: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.compose(small("method=lora"))
    execute(run)
    base = run.pretraining.folder / "record.json"
    original = base.read_text()
    rewrite(base, lambda record: record["model"].update(saved_weights_sha256="0" * 64))
    try:
        assert run.status().state == "stale"
    finally:
        base.write_text(original)
    assert run.status().state == "done"


def test_the_untrained_model_is_a_run_of_no_steps(small: Callable[..., list[str]]) -> None:
    record = execute(Run.compose(small("method=lora", "trainer.max_steps=0")))
    assert record["training"]["steps"] == 0
    assert record["num_predictions"] == 3


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # of wandb-workspaces
def test_wandb_runs_offline_without_a_question_and_changes_no_bit(
    small: Callable[..., list[str]], train: Any
) -> None:
    # A seed of its own: of a run that another test has made nothing would be left to mirror.
    arguments = small("method=delta_lora", "seed=75")
    run = Run.compose(arguments)
    done = train([*arguments, "logger=wandb"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WARNING delta_lora.runlog" not in done.stdout
    (path,) = run.outputs.glob(f"wandb/offline-run-*/run-{run.name}.wandb")
    found = wandb_file.read(path)
    assert found.run.display_name.startswith("delta_lora e2e tiny seed 75 λ=2 K=1 ")
    assert found.run.run_group == group_of(run)
    assert (found.exit_code, found.summary["status"]) == (0, "completed")
    curves = dict(found.history)
    assert [curves[step]["delta/num_updates"] for step in (2, 4, 6)] == [0, 2, 4]
    assert curves[2]["delta/w_change_norm"] == 0 < curves[6]["delta/w_change_norm"]
    assert curves[6]["perf/step_time_s"] > 0
    record = run.record()
    assert found.summary["test/bleu"] == pytest.approx(100 * record["metrics"]["bleu"])
    (table,) = (path.parent / "files/media/table").glob("*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == [
        *("id", "input", "prediction", "references"),
        *([] if "rouge_l" in record["missing_metrics"] else ["ROUGE-L"]),
    ]
    assert all(row[3] for row in content["data"])

    # What the panels of a table and a sweep read, this run has, or says why not (it has no Java).
    table1, lambda_k = load_table("table1"), load_sweep("lambda_k", "tiny", {"K": ["1"]})
    table1 = dataclasses.replace(table1, rows=(table1.row("delta_lora"),))
    for subject in (of_table(table1, "tiny"), of_sweep(lambda_k, "tiny")):
        (view,) = views.views_of(subject, entity="me", project="mine")
        report = reports.report_of(subject, entity="me", project="mine", results=run.outputs)
        for shown in (views.content_of(view), reports.content_of(report)):
            lacking = panels.keys_of(shown) - logged(found)
            assert lacking == {f"test/{name}" for name in record["missing_metrics"]}

    with_mirror = (run.folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(run.folder)
    assert execute(run)["adapter_sha256"] == record["adapter_sha256"]
    assert (run.folder / "metrics.jsonl").read_bytes() == with_mirror


@pytest.mark.long
def test_a_sweep_runs_every_combination_but_the_refused_one(
    small: Callable[..., list[str]], train: Any, outputs: Path, tmp_path: Path
) -> None:
    before = set((outputs / "sweeps").glob("*"))  # of other tests
    runs = ("method=delta_lora", "seed=31")  # which no other test makes
    done = train(["-m", *small(*runs, "method.update_ratio=0.5,-1,1")])
    assert done.returncode == 1, done.stderr[-2000:]
    last = "2 done, 1 refused: delta_lora, λ = -1 on e2e, seed 31"
    assert done.stderr.splitlines()[-1] == last
    for ratio in ("0.5", "1"):
        run = Run.compose(small(*runs, f"method.update_ratio={ratio}"))
        assert run.status().state == "done"
    (made,) = set((outputs / "sweeps").glob("update_ratio-*")) - before
    assert len(list(made.glob("sweep.*"))) == 5
    assert OmegaConf.load(run.folder / "config.yaml").part_of == [made.name]
    assert not list(tmp_path.iterdir())  # the working folder of the command


@pytest.mark.long
def test_a_study_searches_gives_up_what_is_hopeless_and_costs_nothing_again(
    small: Callable[..., list[str]], train: Any
) -> None:
    pytest.importorskip("optuna")
    asked = [
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=5", "hydra.sweeper.pruner_startup=2",
        *small("method=delta_lora", "recipe.batch_size=22", "seed=8"),
        "method.learning_rate=1e-2,1e-5", "method.update_ratio=interval(0.5,2)",
    ]  # fmt: skip
    done = train(asked)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = Run.compose(small("method=delta_lora")).outputs
    (path,) = (outputs / "sweeps").glob("learning_rate-update_ratio-study-*/study.json")
    content = json.loads(path.read_text())
    pruned = [trial for trial in content["trials"] if trial["state"] == "pruned"]
    assert pruned, content["trials"]
    for trial in pruned:
        run_folder = outputs / trial["signature"]
        record = json.loads((run_folder / "record.json").read_text())
        assert record["pruned"] == {"step": trial["step"], "of": 6, "reason": trial["reason"]}
        assert not (run_folder / "predictions.jsonl").exists()
    best = content["trials"][content["best"]]
    assert best["test"] is not None
    before = path.read_bytes()
    again = train(asked)
    assert again.returncode == 0
    assert "workers" not in again.stdout  # none was started
    assert path.read_bytes() == before

    # What was given up can be finished, and then is a run like any other.
    values = [f"{key}={value}" for key, value in pruned[0]["values"].items()]
    run = Run.compose(small("method=delta_lora", "recipe.batch_size=22", "seed=8", *values))
    assert run.name == pruned[0]["signature"]
    assert execute(run)["training"]["steps"] == 6


@pytest.mark.long
def test_a_launcher_gives_the_same_runs_to_the_bit(
    small: Callable[..., list[str]], train: Any
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    submitit = ["hydra/launcher=submitit_local"]  # what Slurm would be given, on this machine
    same = ("method=delta_lora", "seed=5")
    runs = [Run.compose(small(*same, f"method.start_step={start}")) for start in (0, 2)]
    found = []
    for launcher in (joblib, submitit, []):
        done = train(["-m", *launcher, *small(*same, "method.start_step=0,2")])
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.splitlines()[-1] == "2 done"
        found.append([contents(run.folder) for run in runs])
        for run in runs:
            shutil.rmtree(run.folder)
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) > 3


def test_a_signature_names_what_can_change_the_result_and_nothing_else(
    small: Callable[..., list[str]], tmp_path: Path
) -> None:
    def name(*more: str) -> str:
        return Run.compose(small("method=lora", *more)).name

    for same in ("logger=wandb", f"paths.outputs={tmp_path}", "trainer.checkpoint_every_steps=3"):
        assert name(same) == name(), same
    for other in ("seed=2", "method.rank=2", "trainer.max_steps=5", "task.decoding.num_beams=3"):
        assert name(other) != name(), other
    groups = {Run.compose(small("method=lora", f"seed={seed}")).group for seed in (1, 2, 3)}
    assert len(groups) == 1
