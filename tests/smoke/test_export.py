"""Exporting runs of the suite from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf

import delta_lora
from scripts import export
from scripts.runs.checks import check
from scripts.runs.composition import ConfigError
from scripts.runs.execution import execute
from scripts.runs.run import Run


def test_a_run_loads_and_exports(
    small: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.compose(small("method=delta_lora"))
    record = execute(run)
    folder = run.folder
    model = delta_lora.load(folder).model
    assert isinstance(model, tf.GPT2LMHeadModel)
    (tmp_path / "of_somebody_else").mkdir()
    assert export.main([str(folder), "--output", str(tmp_path)]) == 0
    assert not list((tmp_path / "of_somebody_else").iterdir())
    said = capsys.readouterr().out
    assert "rank 16 in 3 layers" in said  # 2 r of query and of value in one fused layer
    assert "outputs differ by at most" in said
    base = run.pretraining.folder / "model"
    ids = torch.arange(20)[None]
    served = peft.PeftModel.from_pretrained(
        tf.AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft"
    ).eval()
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = model(ids).logits
        for other in (served, merged):
            torch.testing.assert_close(other(ids).logits, expected, atol=1e-5, rtol=0)
    card = (tmp_path / "peft" / "README.md").read_text()
    assert f"| bleu | {record['metrics']['bleu']:.4f} |" in card
    assert "**not reproduced**" in card, "the verdicts at the scale of the run"
    assert str(tmp_path) not in card
    assert (tmp_path / "peft" / "tokenizer.json").is_file()


def test_compressing_says_what_it_costs(
    small: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.compose(small("method=lora"))
    execute(run)
    folder = run.folder
    arguments = [str(folder), "--output", str(tmp_path), "--rank", "2", "--no-merged"]
    assert export.main(arguments) == 0
    said = capsys.readouterr().out
    assert "rank 2 in 3 layers" in said
    assert not (tmp_path / "merged").exists()


def test_full_fine_tuning_exports_merged_and_says_why_not_as_a_lora(
    small: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.compose(small("method=full"))
    execute(run)
    assert export.main([str(run.folder), "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "no PEFT LoRA:" in said
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "holds no adapter"),
        (["nowhere", "--rank", "0"], "rank=0"),
        (["nowhere", "--eval-rank", "-1"], "eval_rank=-1"),
    ],
)
def test_wrong_input_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_closed_form_runs_over_a_bfloat16_base_and_loads(
    small: Callable[..., list[str]],
) -> None:
    run = Run.compose(small("method=delta_lora", "method.form=closed_form", "model.dtype=bfloat16"))
    record = execute(run)
    assert record["training"]["method"]["num_weight_updates"] == 4
    assert record["parameters"]["updatable"] > record["parameters"]["trainable"]  # the W that move
    model = delta_lora.load(run.folder).model
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight.dtype == torch.bfloat16
    assert layer.query.is_active
    assert layer.query.kept_A.any()


def test_writing_in_place_into_bfloat16_is_refused_before_anything_starts(
    small: Callable[..., list[str]],
) -> None:
    run = Run.compose(small("method=delta_lora", "model.dtype=bfloat16"))
    with pytest.raises(ConfigError, match="form=closed_form"):
        execute(run)


def test_a_closed_form_does_not_start_from_another_run(small: Callable[..., list[str]]) -> None:
    run = Run.compose(small("method=delta_lora", "method.form=closed_form", "init_from=glue/mnli"))
    with pytest.raises(ConfigError, match=r"use method\.form=in_place"):
        check(run)
