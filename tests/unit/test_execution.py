"""Parts of a run that need no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scripts.runs import cell, execution
from scripts.runs.building import Plan


class Seen:
    """Keeps what a mirror is made with."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def close(self) -> None: ...


def test_a_mirror_gets_the_names_of_what_a_run_is_made_of_and_makes_nothing(
    tmp_path: Path,
) -> None:
    """A signature may name a class that is gone; the configuration is shown, never built."""
    cfg = cell.compose(["task=xsum", "model=bart_large", "recipe=xsum", "scale=tiny"])
    cfg.logger = OmegaConf.create({"_target_": f"{__name__}.Seen"})
    signed = cell.signed_config(cfg)
    signed["task"]["gone"] = {"_target_": "tasks.nowhere.Gone", "size": 3}
    plan = Plan(
        folder=tmp_path / "abc", outputs=tmp_path, group="g", signed=signed, source=None,
        start=None, pretrained_sha256=None,
    )  # fmt: skip
    (mirror,) = execution._mirrors(cfg, plan)
    assert mirror.values["run_config"] == signed
    assert mirror.values["run_config"]["task"]["gone"]["_target_"] == "tasks.nowhere.Gone"
    assert mirror.values["directory"] == tmp_path
