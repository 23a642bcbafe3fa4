"""Numbers that run away: a run stops and says at what step and where, or its result is sound."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from scripts.runs.composition import ConfigError
from scripts.runs.execution import execute
from scripts.runs.run import Run
from tests.faults.tally import Tally
from tests.smoke.conftest import SMALL

pytestmark = pytest.mark.long

METHODS = ("full", "lora", "delta_lora", "delta_lora method.form=closed_form", "adalora", "dylora")
#: settings that drive numbers out of their range, or nearly.
SETTINGS = [
    (method, setting)
    for method in METHODS
    for setting in (
        "method.learning_rate=1e30",
        "method.learning_rate=1e4",
        "method.alpha=1e6",
        "method.alpha=1e-30",
        "method.update_ratio=1e6",
        "method.orth_reg_weight=1e6",
        "trainer.max_grad_norm=1e-30",
        "trainer.adam_epsilon=1e30",
    )
    if not (setting.startswith("method.alpha") and method == "full")
    and ("update_ratio" not in setting or method.startswith("delta_lora"))
    and ("orth_reg" not in setting or method == "adalora")
]
PLACES = ("nan", "inf", "-inf", "overflow")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbers")


def strict(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def outcome(run: Run, *where: str) -> str:
    """Make a run; return how it ended.

    Args:
        run: with numbers that run away.
        where: words of which the message must have one.
    """
    try:
        record = execute(run)
    except ConfigError:
        return "clear error"
    except Exception as error:
        is_said = any(word in str(error) for word in where) and "\n\n" not in str(error)
        return "clear error" if is_said else f"traceback: {type(error).__name__}: {error}"
    for name in ("record.json", "metrics.jsonl", "predictions.jsonl", "resources.json"):
        for line in (run.folder / name).read_text(encoding="utf-8").splitlines():
            assert "NaN" not in line, (name, line)
            assert "Infinity" not in line, (name, line)
    json.loads((run.folder / "record.json").read_text(), parse_constant=strict)
    assert all(math.isfinite(value) for value in record["metrics"].values())
    for name, tensor in load_file(run.folder / "adapter" / "adapter_model.safetensors").items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    return "right"


@pytest.mark.parametrize(("method", "setting"), SETTINGS)
def test_settings_that_drive_numbers_out_of_range(
    method: str, setting: str, outputs: Path, tally: Tally
) -> None:
    overrides = [*SMALL, f"paths.outputs={outputs}", *f"method={method}".split(), setting]
    found = outcome(Run.compose(overrides), "step ")
    tally.add("numbers that run away", found.partition(":")[0])
    assert not found.startswith("traceback"), found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["full", "delta_lora", "adalora"])
def test_a_base_with_such_numbers_is_said_to_be_so(
    method: str, place: str, outputs: Path, tmp_path: Path, tally: Tally
) -> None:
    first = Run.compose([*SMALL, f"paths.outputs={outputs}", "method=lora"])
    execute(first)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (first.pretraining.folder / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = sorted(key for key in weights if "c_attn.weight" in key)[0]
    tensor = weights[name].clone()
    tensor.view(-1)[7] = 3e38 if place == "overflow" else float(place)
    save_file({**weights, name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})
    small = [o for o in SMALL if not o.startswith("model.pretrain=")]
    overrides = [*small, f"paths.outputs={tmp_path / 'outputs'}", f"method={method}"]
    run = Run.compose([*overrides, f"model.path={folder}"])
    words = ("step ",) if place == "overflow" else (name,)
    found = outcome(run, *words)
    assert found == "clear error"
    tally.add("numbers that run away", found)
