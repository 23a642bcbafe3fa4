"""The values of `configs/` that the checks take, read without Hydra.

Only plain values are read; what a configuration computes (``${...}``) is resolved here in words.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: training examples of the complete data sets; GLUE's stand in configs/task/glue.
TRAINING_EXAMPLES = {
    "e2e": 42_061,  # microsoft/LoRA train.txt
    "webnlg": 18_025,  # WebNLG 2017, as microsoft/LoRA converts it
    "xsum": 204_045,  # the official split
}
GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")


def read(path: str) -> dict[str, Any]:
    """Return ``configs/<path>.yaml``."""
    content: dict[str, Any] = yaml.safe_load((CONFIGS / f"{path}.yaml").read_text(encoding="utf-8"))
    return content


def model(name: str) -> dict[str, Any]:
    """Return ``configs/model/<name>.yaml`` with what all models share."""
    return read("model/_base") | read(f"model/{name}")


def recipe(task: str) -> dict[str, Any]:
    """Return the recipe of ``e2e``, ``webnlg``, ``xsum`` or ``glue/<task>`` with its batch size."""
    values = read(f"recipe/{task}")
    if task.startswith("glue/"):
        base = read("recipe/glue/_base")
        variant = base["variant"]
        values = base | values
        values["batch_size"] = values["variants"][variant]["batch_size"]
        values["alpha"] = base["variants"][variant]["alpha"]
        values["learning_rate"] = base["learning_rate"] | values["learning_rate"]
        values["adalora"] = base["adalora"] | values["adalora"]
        for name, rate in values["learning_rate"].items():
            if rate == "${.low_rank}":
                values["learning_rate"][name] = values["learning_rate"]["low_rank"]
    return values


def total_steps(task: str) -> int:
    """Return the optimiser steps of one run on the complete data."""
    values = recipe(task)
    if task.startswith("glue/"):
        examples = read(f"task/{task}")["num_rows"]["train"]
    else:
        examples = TRAINING_EXAMPLES[task]
    per_epoch = math.ceil(examples / values["batch_size"])
    return math.ceil(values["num_epochs"] * per_epoch)
