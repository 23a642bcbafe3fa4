"""Several processes end, and give the run of one: batches, evaluation, best epoch, decoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.choices import first
from tests.contract.distributed import CASES_OF_RUNS, NUM_PREDICTED, run

ROOT = Path(__file__).resolve().parents[2]
#: a rank that waits for one that never comes would wait for ever.
TIMEOUT_S = 240


def launch(num_processes: int, *arguments: str, script: str = "") -> None:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
        str(num_processes), "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0",
        script or str(ROOT / "tests" / "contract" / "distributed.py"), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-5000:]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: (run(name, folder / name), folder / name) for name in CASES_OF_RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", first([2, 3, 4]))
def test_several_processes_give_the_run_of_one(
    num_processes: int, tmp_path: Path, alone: dict[str, Any]
) -> None:
    """Also with no, one or fewer validation batches than processes, and an uneven batch."""
    launch(num_processes, str(tmp_path))
    for number, (name, ((model, result, predictions), own)) in enumerate(alone.items()):
        folder = tmp_path / str(number)
        for rank in range(num_processes):
            found = load_file(folder / f"rank{rank}.safetensors")
            for key, parameter in model.named_parameters():
                torch.testing.assert_close(
                    found[key], parameter.detach(), rtol=1e-9, atol=1e-10,
                    msg=lambda text, place=f"{name}, rank {rank}, {key}": f"{place}: {text}",
                )  # fmt: skip
        mine, theirs = lines(own / "metrics.jsonl"), lines(folder / "metrics.jsonl")
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert b == pytest.approx(a, rel=1e-6), name  # the loss is summed in float32
        assert lines(folder / "predictions.jsonl") == predictions
        assert len(predictions) == NUM_PREDICTED
        assert not list(folder.glob(".writing-*"))
        if CASES_OF_RUNS[name][3] == "best":
            assert result.chosen_step in {entry["step"] for entry in result.validation}


@pytest.mark.long
def test_a_loss_that_is_not_finite_on_one_process_stops_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import math, sys\n"
        "from pathlib import Path\n"
        "from delta_lora import processes\n"
        "from delta_lora.finite import NonFiniteLossError\n"
        "from tests.toy import ToyTask\n"
        "from tests.unit.test_trainer import fit\n"
        "class Broken(ToyTask):\n"
        "    def load(self):\n"
        "        super().load()\n"
        "        if processes.share()[0] == 1:\n"
        "            self.y[:] = math.nan\n"
        "try:\n"
        "    fit(Path(sys.argv[1]), task=Broken(), log_every_steps=1000)\n"
        "except NonFiniteLossError as error:\n"
        "    rank = processes.share()[0]\n"
        "    Path(sys.argv[1], str(rank)).write_text(str(error))\n"
        "else:\n"
        "    raise AssertionError('it went on')\n"
    )
    launch(2, str(tmp_path), script=str(script))
    assert (
        "the loss of step 0 is not finite, before any update; the batch was another process's"
        in (tmp_path / "0").read_text()
    )
    assert (
        "the loss of step 0 is nan, before any update; its batch was toy-"
        in (tmp_path / "1").read_text()
    )
