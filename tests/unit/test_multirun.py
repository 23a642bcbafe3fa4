"""A sweep of ``train.py -m``: what it reads, checks, and says at the end; on runs of no length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import train
from scripts.reporting.spec import ROOT
from scripts.runs.composition import ConfigError
from scripts.runs.folder import is_held, lock
from scripts.sweeping.multirun import Multirun, read_grid
from tests.unit import fake_runs

BASE = ["experiment=e2e", "scale=tiny", "method=delta_lora", "logger=none"]
#: lambda = 2 fails, lambda = 3 is held by another process.
LAUNCH = """
import runpy, sys
from pathlib import Path
from tests.unit import fake_runs
from scripts.runs import checks, execution
from scripts.runs.folder import LockedError
fake_runs.install()
def execute(run, *, wait=True):
    if run.config.method.get("update_ratio") == 3:
        raise LockedError(f"process 7 is already working in {run.folder}")
    checks.check(run)
    if run.config.method.get("update_ratio") == 2:
        error = {"type": "RuntimeError", "message": "loss is nan"}
        fake_runs.write(run, {**fake_runs.record(run), "status": "failed", "error": error})
        raise RuntimeError("loss is nan")
    run.outputs.mkdir(parents=True, exist_ok=True)
    return fake_runs.execute(run)
execution.execute = execute
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("scripts/train.py", run_name="__main__")
"""


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process and a working folder of its own."""
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    place = f"paths.outputs={folder / 'outputs'}"
    code = LAUNCH.replace('"scripts/train.py"', repr(str(ROOT / "scripts" / "train.py")))
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", *BASE, place, *arguments], cwd=work, capture_output=True,
        text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert not list(work.iterdir()), "a sweep leaves nothing in the working folder"
    return done


# ---------------------------------------------------------------------- what it reads


def test_every_kind_of_sweep_is_read() -> None:
    grid = read_grid(
        ["seed=1,2", "recipe.rank=choice(2,4)", "method.start_step=range(0,6,3)",
         "method=glob(lora_*)", "trainer.momentum=tag(t, interval(0.1, 0.9))", "scale=tiny"],
        has_sampler=True,
    )  # fmt: skip
    assert grid.fixed == ("scale=tiny",)
    assert grid.is_sampled
    assert grid.swept == {
        "seed": ("1", "2"), "recipe.rank": ("2", "4"), "method.start_step": ("0", "3"),
        "method": ("lora_high_lr", "lora_no_dropout", "lora_scaled"),
        "trainer.momentum": ("0.1",),
    }  # fmt: skip
    assert len(list(grid.compositions())) == 2 * 2 * 3
    with pytest.raises(ConfigError, match="cannot read"):
        read_grid(["recipe.rank=[1"])


def test_a_tagged_choice_is_a_grid_and_what_another_sweeper_samples_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_runs.install(monkeypatch.setattr)
    choice = "method.update_ratio=tag(a, choice(0.5, 1))"
    assert train.check_arguments(["-m", *BASE, choice]) is not None
    interval = "method.update_ratio=interval(0.1,4)"
    for sweep in (choice, interval):
        assert train.check_arguments(["-m", "hydra/sweeper=ax", *BASE, sweep]) is None


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("method=lora,lorra", "unknown method 'lorra'; did you mean 'lora'"),
        ("recipe.rnk=1,2", "unknown key 'recipe.rnk'; did you mean"),
        ("method.update_ratio=-1,-2", "update_ratio=-1 is not allowed"),
        ("method=glob(x*)", "no value fits"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_any_run(sweep: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train.check_arguments(["-m", "experiment=e2e", "scale=tiny", sweep])
    assert message in str(caught.value)


def test_the_name_is_of_the_runs_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs.install(monkeypatch.setattr)

    def name(*arguments: str) -> str:
        found = Multirun.check(read_grid([*BASE, *arguments]))
        assert found is not None
        return found.spec.name

    first = name("method.update_ratio=0.5,1", "seed=1,2")
    assert first.startswith("update_ratio-")
    assert name("seed=2,1", "method.update_ratio=1.0,0.5") == first
    assert name("method.update_ratio=0.5,1", "seed=1") != first


def test_methods_and_experiments_are_no_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs.install(monkeypatch.setattr)
    found = Multirun.check(read_grid(["scale=tiny", "method=lora,dylora", "recipe.rank=2,4"]))
    assert found is not None
    assert [method.name for method in found.spec.methods] == ["lora", "dylora"]
    assert [axis.label for axis in found.spec.axes] == ["rank r"]
    only = Multirun.check(read_grid(["scale=tiny", "method=lora,dylora"]))
    assert only is not None
    assert [axis.values for axis in only.spec.axes] == [("lora", "dylora")]


def test_a_folder_is_held_while_a_process_works_in_it(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "none")
    with lock(tmp_path, wait=False):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)


# ---------------------------------------------------------------------- whole commands


@pytest.mark.long
def test_refused_failed_and_held_cells_cost_themselves_only(tmp_path: Path) -> None:
    done = launch(tmp_path, "method.update_ratio=-1,1,2,3,4", "seed=1,2")
    assert done.returncode == 1, done.stderr
    errors = done.stderr.splitlines()
    assert (
        "refused: delta_lora method.update_ratio=-1 on e2e: method.update_ratio=-1 is not"
        in errors[0]
    )
    assert "skipped: process 7 is already working in" in done.stderr
    assert errors[-1] == (
        "4 done, 2 failed, 2 refused, 2 not run: delta_lora, λ = -1 on e2e, seeds 1, 2; "
        "delta_lora, λ = 2 on e2e, seeds 1, 2; delta_lora, λ = 3 on e2e, seeds 1, 2"
    )
    assert "e2e: BLEU, test split" in done.stdout
    (folder,) = [path for path in (tmp_path / "outputs" / "sweeps").iterdir() if path.is_dir()]
    assert {path.suffix for path in folder.iterdir()} == {".csv", ".json", ".md", ".png", ".svg"}
    content = json.loads((folder / "sweep.json").read_text())
    assert [row["test"]["n"] for row in content["rows"]] == [0, 2, 0, 0, 2]


@pytest.mark.long
def test_a_sweep_that_is_done_answers_with_the_same_view(tmp_path: Path) -> None:
    arguments = ("method.update_ratio=1,4", "method.start_step=0,4")
    done = launch(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4 done"
    sweeps = tmp_path / "outputs" / "sweeps"
    before = {path: path.read_bytes() for path in sweeps.rglob("sweep.*")}
    assert len(before) == 5
    again = launch(tmp_path, *arguments)
    assert again.returncode == 0
    assert {path: path.read_bytes() for path in sweeps.rglob("sweep.*")} == before
