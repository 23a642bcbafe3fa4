"""`make gpu-check` on a CPU: the small form, on a machine without the suite's packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.smoke.conftest import ROOT, environment

#: installed with the suite, absent from a bare GPU machine.
ABSENT = (
    "hydra", "omegaconf", "pooch", "datasets", "evaluate", "nltk", "sacrebleu", "rouge_score",
    "pycocoevalcap", "wandb", "scipy", "sklearn", "peft", "matplotlib",
)  # fmt: skip
# Python reads it at the start of every process, so it holds for the processes of the checks too.
HIDE = f"""
import sys
from importlib.machinery import PathFinder
class WithoutSome(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            return None
        return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutSome
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that can import none of `ABSENT`."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(HIDE)
    return {**environment(), "PYTHONPATH": str(folder)}


def run(
    *arguments: str, env: dict[str, str], timeout: float = 540
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def test_the_bare_machine_is_bare(bare: dict[str, str]) -> None:
    for module in ABSENT:
        found = subprocess.run([sys.executable, "-c", f"import {module}"], env=bare, timeout=60)
        assert found.returncode == 1, module


@pytest.mark.long
def test_a_cpu_shows_what_it_can(bare: dict[str, str], tmp_path: Path) -> None:
    committed = ROOT / "results" / "gpu"
    before = sorted(committed.glob("*")) if committed.exists() else []
    out = tmp_path / "report.json"
    done = run("--device", "cpu", "--small", "--out", str(out), env=bare)
    lines = [line for line in done.stdout.split("\n") if line[:4] in ("PASS", "FAIL", "SKIP")]
    shown = {int(line.split()[1]): line.split()[0] for line in lines}
    assert done.returncode == 0, done.stdout + done.stderr
    assert shown == {
        **dict.fromkeys((2, 3, 4, 7, 8, 9, 10, 11, 12), "PASS"),
        **dict.fromkeys((1, 5, 6, 13, 14, 15), "SKIP"),
    }
    assert all("needs a CUDA device" in line for line in lines if line.startswith("SKIP"))
    _check_report(json.loads(out.read_text()))
    after = sorted(committed.glob("*")) if committed.exists() else []
    assert after == before


def _check_report(content: dict[str, Any]) -> None:
    assert content["schema"] == 1
    assert content["device"]["type"] == "cpu"
    assert {"python", "torch", "transformers", "accelerate"} <= set(content["versions"])
    assert content["is_small"]
    assert "hours" not in content["costs"]  # small models say nothing of the paper's
    timed = {(e["model"], e["method"]) for e in content["costs"]["steps"]}
    assert ("gpt2_medium", "delta_lora_closed_form") in timed
    assert ("bart_large", "full") in timed
    assert {e["model"] for e in content["costs"]["decoding"]} == {"gpt2_medium", "bart_large"}
    assert content["costs"]["checkpoint"]["write_bytes_per_s"] > 0
    killed = next(check for check in content["checks"] if check["name"] == "killed")
    assert killed["values"]["signal"] == -9
    assert not killed["reason"]


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    env = {**environment(), "CUDA_VISIBLE_DEVICES": ""}
    done = run("--out", str(tmp_path / "report.json"), env=env, timeout=120)
    assert done.returncode == 1
    assert "can use no CUDA device" in done.stderr
    assert "--device cpu --small" in done.stderr
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu takes hours with the paper's models; add --small"),
        (["--only", "2,99"], "'2,99': use numbers from 1 to 15 with commas, such as 2,7"),
        (["--budget-s", "0"], "--budget-s 0: use a number of seconds above 0"),
    ],
)
def test_a_wrong_option_is_refused_before_any_work(arguments: list[str], message: str) -> None:
    done = run(*arguments, env=environment(), timeout=30)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_spent_budget_starts_no_further_check() -> None:
    done = run(
        "--device", "cpu", "--small", "--only", "3,9", "--budget-s", "0.001", env=environment(),
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    assert "not run for lack of time: 3, 9 (--only 3,9)" in done.stdout
    assert "PASS" not in done.stdout
