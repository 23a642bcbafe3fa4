"""What a user can get wrong: each answered before any work, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import train as command_line
from scripts.runs.composition import ConfigError
from scripts.runs.execution import execute
from scripts.runs.run import Run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=lorra", r"unknown method 'lorra'; did you mean 'lora'"),
        ("task=e3e", r"unknown task 'e3e'; did you mean 'e2e'"),
        ("model=gpt2_med", r"unknown model 'gpt2_med'; did you mean 'gpt2_medium'"),
        ("trainer.max_step=3", r"unknown key 'trainer.max_step'; did you mean 'max_steps'"),
        ("methd=lora", r"unknown key 'methd'; did you mean 'method'"),
        ("trainer.max_steps=[1", r"cannot read the override"),
        ("seed=-1", r"seed=-1 is not allowed: it must be an integer >= 0"),
        ("seed=abc", r"seed='abc' is a str, not an integer"),
        ("~seeed", r"seeed"),
    ],
)
def test_mistyped_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command_line.check_arguments(["scale=tiny", override])


def test_keys_can_be_taken_away() -> None:
    base = ["scale=tiny", "experiment=glue/mrpc", "method=peft"]
    taken = ["~method.peft.r", "~method.peft.lora_alpha", "~method.peft.lora_dropout"]
    command_line.check_arguments([*base, *taken, "method.peft.peft_type=HRA", "+method.peft.r=8"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lora", "method.rank=0"], r"rank=0 .*>= 1"),
        (["method=lora", "method.rank=2000"], r"rank=2000 is larger than .* use rank <= 1024"),
        (["method=delta_lora", "method.update_ratio=-1"], r"update_ratio=-1 .*>= 0"),
        (["method=delta_lora", "method.dropout=0.1"], r"dropout=0\.1 is not allowed in Delta-LoRA"),
        (["method=delta_lora", "method.start_step=-2"], r"start_step=-2"),
        (["method=lora", "method.learning_rate=fast"], r"learning_rate='fast'"),
        (["method=lora", "trainer.batch_size=0"], r"trainer\.batch_size=0 .* >= 1"),
        (["method=lora", "task.protocol=raw"], r"task.protocol='raw'.* 'lora', 'challenge'"),
        (["method=lora", "task.source=files"], r"task.source=files needs task.data_dir"),
        (["method=lora", "task.source=cloud"], r"task.source='cloud'.* 'hub', 'files'"),
        (
            ["method=lora", "trainer.precision=fp8"],
            r"precision='fp8' is not known; choose one of 'fp32', 'bf16', 'fp16'",
        ),
        (["method=lora", "model.projections=[c_atn]"], r"c_atn.*c_attn"),
    ],
)
def test_bad_values_are_found_before_data_or_weights_are_read(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    run = Run.compose([*overrides, f"paths.outputs={tmp_path}", "logger=none"])
    with pytest.raises(ConfigError, match=message):
        execute(run)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = Run.compose(["scale=tiny", f"paths.outputs={tmp_path / 'file' / 'runs'}"])
    with pytest.raises(ConfigError, match="cannot write to the output folder"):
        execute(run)


def test_a_data_folder_that_does_not_exist(tmp_path: Path) -> None:
    run = Run.compose(["task.source=files", f"task.data_dir={tmp_path / 'none'}"])
    with pytest.raises(ConfigError, match="no such folder"):
        execute(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainset.csv", "", r"trainset\.csv is empty"),
        (
            "trainset.csv",
            "meaning,text\na,b\n",
            r"trainset\.csv, line 1: columns .* expected \['mr', 'ref'\]",
        ),
        ("trainset.csv", 'mr,ref\n"name[A]","cut', r"trainset\.csv, line"),
    ],
)
def test_broken_files_are_named(
    name: str, content: str, message: str, tmp_path: Path, small: Callable[..., list[str]]
) -> None:
    good = 'mr,ref\n"name[A], near[B]",A is near B.\n'
    data = tmp_path / "data"
    data.mkdir()
    for file in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        (data / file).write_text(good)
    (data / name).write_text(content)
    run = Run.compose(
        small("task.source=files", "task.protocol=challenge", f"task.data_dir={data}")
    )
    with pytest.raises(ConfigError, match=message):
        execute(run)
    assert not (run.folder / "config.yaml").exists()


def test_an_update_that_never_fires_is_a_warning(
    small: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    record = execute(Run.compose(small("method=delta_lora", "method.start_step=6", "seed=3")))
    assert "the update never fires" in caplog.text
    assert record["training"]["method"]["num_weight_updates"] == 0


def test_messages_reach_the_terminal_without_a_traceback(train: Any) -> None:
    done = train(["method=lorra"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown method 'lorra'")
    assert "Traceback" not in done.stderr
