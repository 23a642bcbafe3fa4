"""GLUE runs of seconds on a random encoder: what a run starts from, best and last epoch, resume."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

import delta_lora
from delta_lora.models import load_tokenizer
from delta_lora.protocols import Scores
from scripts.runs.building import base_model
from scripts.runs.composition import ConfigError
from scripts.runs.execution import execute
from scripts.runs.folder import read_record
from scripts.runs.run import Run
from tasks.glue import Glue
from tasks.tiny.bpe import train_tokenizer
from tests.choices import first
from tests.faults.damage import rewrite

SIZES = "task.embedded_sizes={train:24,validation:12}"
MNLI_SIZES = "task.embedded_sizes={train:24,validation_matched:6,validation_mismatched:6}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    made = train_tokenizer(["the cook of the old inn serves a fair meal"] * 20, vocab_size=300)
    made.model_max_length = 64
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def small(tokenizer: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def overrides(task: str, *more: str) -> list[str]:
        return [
            f"experiment=glue/{task}", "logger=none",
            "model.init=random", f"model.tokenizer_path={tokenizer}", "scale=paper",
            "+model.architecture.hidden_size=16", "+model.architecture.num_hidden_layers=1",
            "+model.architecture.num_attention_heads=2", "+model.architecture.intermediate_size=16",
            "model.architecture.vocab_size=300", "model.architecture.max_position_embeddings=80",
            "task.source=embedded", "trainer.max_steps=4", "trainer.batch_size=8",
            "trainer.device=cpu", "trainer.num_threads=1", "trainer.log_every_steps=1",
            f"paths.outputs={tmp_path / 'outputs'}", *more,
        ]  # fmt: skip

    return overrides


def make_run(overrides: list[str]) -> tuple[dict[str, Any], Path]:
    run = Run.compose(overrides)
    return execute(run), run.folder


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", first(["delta_lora", "dylora", "full_query_value"]))
def test_a_run_starts_from_what_the_same_method_learned_on_mnli(
    small: Callable[..., list[str]], method: str
) -> None:
    settings = [f"method={method}", "method.learning_rate=0.01"]
    mnli, mnli_folder = make_run(small("mnli", *settings, MNLI_SIZES, "recipe.start_step=-1"))
    # The only step of this run has learning rate 0.
    record, folder = make_run(
        small("rte", *settings, SIZES, f"init_from={mnli_folder}", "trainer.max_steps=1")
    )
    assert record["init_from"] == {
        "task": "glue_mnli",
        "signature": mnli["signature"],
        "adapter_sha256": mnli["adapter_sha256"],
    }
    learned, started = adapter(mnli_folder), adapter(folder)
    changed = [name for name in learned if not name.startswith("classifier.")]
    assert changed
    for name in changed:
        assert torch.equal(learned[name], started[name]), name
    assert started["classifier.out_proj.weight"].shape == (2, 16)
    assert learned["classifier.out_proj.weight"].shape == (3, 16)
    assert not torch.equal(learned["classifier.dense.weight"], started["classifier.dense.weight"])


def test_the_run_on_mnli_is_made_first_and_shared(small: Callable[..., list[str]]) -> None:
    run = Run.compose(small("rte", "method=lora", "init_from=glue/mnli", "seed=3"))
    before = run.start
    assert (before.choices.task, before.choices.method, before.seed) == ("glue/mnli", "lora", 3)
    assert before.name == Run.compose(small("mnli", "method=lora", "seed=3")).name
    record = execute(run)
    assert before.status().state == "done"
    # Overrides that are not about the task belong to the start too.
    assert read_record(before.folder)["training"]["steps"] == 4
    assert record["init_from"]["signature"] == before.name
    assert run.status().state == "done"
    rewrite(before.folder / "record.json", lambda record: record.update(adapter_sha256="0" * 64))
    assert run.status().state == "stale"


def test_the_start_is_part_of_the_name_only_where_there_is_one(
    small: Callable[..., list[str]],
) -> None:
    plain = Run.compose(small("rte", "method=lora"))
    assert "init_from" not in plain.meaning
    started = Run.compose(small("rte", "method=lora", "init_from=glue/mnli"))
    assert plain.name != started.name
    other_seed = Run.compose(small("rte", "method=lora", "init_from=glue/mnli", "seed=2"))
    assert started.name != other_seed.name


def test_a_wrong_start_is_refused(small: Callable[..., list[str]], tmp_path: Path) -> None:
    for value, message in (
        ("glue/rte", "is the task of this run itself"),
        ("glue/mnil", "neither an experiment nor the folder of a run"),
        (str(tmp_path), "neither an experiment nor the folder of a run"),
    ):
        with pytest.raises(ConfigError, match=message):
            assert Run.compose(small("rte", "method=lora", f"init_from={value}")).name
    _, folder = make_run(small("mnli", "method=lora", "trainer.max_steps=1"))
    other = Run.compose(small("rte", "method=delta_lora", f"init_from={folder}"))
    with pytest.raises(ConfigError, match="lora on roberta_base, this one is delta_lora"):
        execute(other)


@pytest.mark.parametrize(
    "override",
    ["recipe.variant=scripts", "recipe.rank=4", "recipe.num_epochs=2", "task.max_length=64"],
)
def test_a_start_has_the_settings_of_the_run(
    small: Callable[..., list[str]], override: str
) -> None:
    started = Run.compose(small("rte", "method=lora", "init_from=glue/mnli", override))
    column = Run.compose(small("mnli", "method=lora", override))
    assert started.start.name == column.name
    assert column.name != Run.compose(small("mnli", "method=lora")).name


@pytest.mark.parametrize("setting", first(["rank", "alpha"]))
def test_a_start_of_another_scaling_is_refused(
    small: Callable[..., list[str]], setting: str
) -> None:
    _, folder = make_run(small("mnli", "method=lora", MNLI_SIZES, "trainer.max_steps=1"))
    other = small("rte", "method=lora", SIZES, f"init_from={folder}", f"method.{setting}=4")
    with pytest.raises(ConfigError, match=f"has {setting}=8, this one 4"):
        execute(Run.compose(other))


def test_best_and_last_epoch_are_recorded(small: Callable[..., list[str]]) -> None:
    record, folder = make_run(
        small("rte", "method=full", SIZES, "trainer.max_steps=12", "method.learning_rate=0.01")
    )
    history = record["training"]["validation"]
    assert [entry["step"] for entry in history] == [3, 6, 9, 12]
    values = [entry["accuracy"] for entry in history]
    metrics = record["metrics"]
    assert metrics["best_epoch/accuracy"] == max(values) == metrics["accuracy"]
    assert metrics["last_epoch/accuracy"] == values[-1]
    assert record["training"]["chosen_step"] == history[values.index(max(values))]["step"]
    assert record["training"]["checkpoint_rule"] == "best"
    assert record["num_predictions"] == 12
    assert record["resources"]["step_time_s"] < record["resources"]["train_time_s"]
    left = {path.name for path in folder.iterdir()}
    assert not {"checkpoints", "best"} & left, "the record stands, so they have served"


@pytest.mark.parametrize("form", ["in_place", "closed_form"])
def test_the_best_epoch_is_what_is_kept_everywhere(
    form: str, small: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epoch is the best and ends before W is first updated: record, adapter, `load`."""
    falling = itertools.count()
    monkeypatch.setattr(
        Glue, "_score", lambda *_: Scores({"accuracy": 1 / (1 + next(falling))}, {})
    )
    overrides = small(
        "rte", "method=delta_lora", f"method.form={form}", SIZES, "trainer.max_steps=9",
        "method.start_step=3", "method.learning_rate=0.05",
    )  # fmt: skip
    record, folder = make_run(overrides)
    assert record["training"]["chosen_step"] == 3
    assert record["training"]["method"]["num_weight_updates"] == 0
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["step"] == 3
    run = Run.compose(overrides)
    task = instantiate(run.config.task)
    task.load()
    tokenizer = load_tokenizer(run.config.model.tokenizer_path)
    model = delta_lora.load(folder, base=base_model(run, task, None)).model
    batch = task.collate(task.examples("validation", tokenizer))
    with torch.no_grad():
        loss = float(task.loss(model, batch)) / batch.num_targets
    assert loss == pytest.approx(record["training"]["validation"][0]["loss"], rel=1e-5)
    assert loss != pytest.approx(record["training"]["validation"][-1]["loss"], rel=1e-3)


def test_the_last_epoch_can_be_taken_instead(small: Callable[..., list[str]]) -> None:
    record, _ = make_run(
        small("mnli", "method=lora", MNLI_SIZES, "trainer.checkpoint_rule=last",
              "score_references=true")
    )  # fmt: skip
    assert record["metrics"]["accuracy"] == record["metrics"]["last_epoch/accuracy"]
    assert record["training"]["chosen_step"] == 4
    assert set(record["metrics"]) >= {"accuracy_matched", "accuracy_mismatched"}
    assert set(record["reference_metrics"]) == {"bag of words", "most frequent class"}
    assert record["parameters"]["head"] == 16 * 16 + 16 + 3 * 16 + 3


def test_group_by_length_keeps_the_examples_of_a_step(small: Callable[..., list[str]]) -> None:
    settings = ["method=full", "recipe.model_dropout=0.0", SIZES, "trainer.micro_batch_size=4"]
    plain, _ = make_run(small("rte", *settings))
    grouped, _ = make_run(small("rte", *settings, "trainer.group_by_length=true"))
    assert plain["signature"] != grouped["signature"]
    losses = [r["training"]["validation"][-1]["loss"] for r in (plain, grouped)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert "group_by_length" not in plain["meaning"]["trainer"]


@pytest.mark.long
def test_a_classifier_on_pre_trained_weights_is_stale_only_if_they_are_new(
    small: Callable[..., list[str]], tmp_path: Path
) -> None:
    pretraining = [
        "task=pretraining_masked", "recipe=pretrain_roberta", "model=tiny_roberta_scratch",
        "method=full", "scale=tiny", "trainer.max_steps=2", "task.num_documents=200",
        "task.num_statements=20", "task.num_validation_documents=5", "task.vocab_size=600",
        "task.num_validation_statements=5", "task.tokenizer_documents=200",
        "model.architecture.vocab_size=600",
    ]  # fmt: skip
    run = Run.compose(
        [
            "experiment=glue/rte", "method=lora", "scale=tiny",
            "logger=none", f"model.pretrain={pretraining!r}", SIZES, "trainer.max_steps=2",
            f"paths.outputs={tmp_path / 'outputs'}",
        ]
    )  # fmt: skip
    record = execute(run)
    base = run.pretraining.folder / "record.json"
    stored = json.loads(base.read_text())
    assert record["model"]["pretrained_sha256"] == stored["model"]["saved_weights_sha256"]
    assert run.status().state == "done"
    rewrite(base, lambda record: record["model"].update(saved_weights_sha256="0" * 64))
    assert run.status().state == "stale"
