"""Every row of every table composes at every scale."""

from __future__ import annotations

import pytest

from scripts.reporting.spec import load_table, table_names
from scripts.runs import cell
from scripts.runs.composition import CONFIGS
from scripts.runs.scale import SCALES


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", table_names())
def test_every_run_of_every_table_composes_at_every_scale(name: str, scale: str) -> None:
    spec = load_table(name)
    for base in spec.runs.values():
        cfg = cell.compose([*base, *spec.rows[0].overrides, f"scale={scale}"])
        assert cfg.scale == scale
        if scale == "paper":
            assert cfg.task.source == "hub"
            assert len(cfg.model.revision) == 40
        else:
            assert cfg.model.name != cfg.choices.model
            assert cfg.trainer.max_steps is not None
        assert cfg.trainer.batch_size > 0


def test_the_batch_of_xsum_is_cut_to_what_one_gpu_holds() -> None:
    xsum = ["task=xsum", "recipe=xsum", "model=bart_large", "method=lora"]
    paper = cell.compose(xsum).trainer
    assert (paper.batch_size, paper.micro_batch_size, paper.group_by_length) == (64, 32, True)
    tiny = cell.compose([*xsum, "scale=tiny"])
    assert (tiny.trainer.micro_batch_size, tiny.trainer.group_by_length) == (None, False)
    assert not {"micro_batch_size", "group_by_length"} & set(cell.signed_config(tiny)["recipe"])
    assert cell.compose(["task=e2e", "recipe=e2e"]).trainer.micro_batch_size is None


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_a_scale_names_only_what_exists(scale: str) -> None:
    for group in ("task", "recipe", "model", "method"):
        scaled = CONFIGS / f"scaled_{group}" / scale
        for path in scaled.rglob("*.yaml"):
            assert (CONFIGS / group / path.relative_to(scaled)).is_file(), path
