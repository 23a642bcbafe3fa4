"""The names of runs: what means the same keeps its name, from version to version.

A name that changes here orphans every record and run folder that has it. Where that is meant (a
default or the meaning of a value changed, and the version of its owner with it) write it again:

    python -m tests.golden.test_names
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.reporting.results import RESULTS
from scripts.runs.run import Run

GOLDEN = Path(__file__).with_name("names.json")
METHODS = (
    "full", "full_frozen_embeddings", "full_query_value", "lora", "dylora", "adalora", "delta_lora",
    "lora_no_dropout", "lora_scaled", "delta_lora_dropout", "lora_high_lr",
)  # fmt: skip
RUNS = (
    *(f"experiment=e2e method={method} scale=tiny" for method in METHODS),
    *(f"experiment=e2e method={method} scale=paper" for method in ("lora", "delta_lora")),
    "experiment=e2e method=delta_lora scale=small",
    "experiment=e2e method=delta_lora scale=paper method.form=closed_form",
    "experiment=e2e method=lora scale=tiny train_fraction=0.05",
    "experiment=webnlg method=delta_lora scale=tiny",
    "experiment=webnlg method=delta_lora scale=paper",
    "experiment=xsum method=delta_lora scale=tiny",
    "experiment=xsum method=delta_lora scale=paper",
    "experiment=glue/rte method=delta_lora scale=tiny init_from=glue/mnli seed=3",
    "experiment=glue/cola method=adalora scale=tiny",
    "experiment=glue/stsb method=delta_lora scale=paper",
    "experiment=glue/mrpc method=peft/dora scale=tiny",
    "experiment=glue/mrpc method=full trainer.optimizer=sgd scale=tiny",
    "experiment=pretraining method=full scale=tiny save_model=true predict=false",
    "experiment=pretraining_masked method=full scale=tiny save_model=true predict=false",
    "experiment=pretraining_denoising method=full scale=tiny save_model=true predict=false",
)


@pytest.fixture(scope="module")
def golden() -> dict[str, str]:
    content: dict[str, str] = json.loads(GOLDEN.read_text())
    assert content.keys() == set(RUNS)
    return content


@pytest.mark.parametrize("overrides", RUNS)
def test_a_run_keeps_its_name(overrides: str, golden: dict[str, str]) -> None:
    assert Run.compose(overrides.split()).name == golden[overrides]


def test_the_committed_records_have_these_names(golden: dict[str, str]) -> None:
    known = {path.stem for path in (RESULTS / "runs" / "tiny").glob("*.json")}
    tiny = {golden[f"experiment=e2e method={method} scale=tiny"] for method in METHODS}
    assert tiny <= known


if __name__ == "__main__":
    names = {overrides: Run.compose(overrides.split()).name for overrides in RUNS}
    GOLDEN.write_text(json.dumps(names, indent=1) + "\n")
