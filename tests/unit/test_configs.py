"""Every row of every table composes at every scale."""

from __future__ import annotations

import re

import hydra
import pytest
from omegaconf import OmegaConf

from delta_lora.models import FAMILIES
from scripts.reporting.spec import load_table, table_names
from scripts.runs.composition import CONFIGS, ConfigError, compose, hydra_ready, options
from scripts.runs.run import Run
from scripts.runs.scale import SCALES
from tests.choices import first


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", first(table_names(), 4))
def test_every_run_of_every_table_composes_at_every_scale(name: str, scale: str) -> None:
    spec = load_table(name)
    for base in spec.runs.values():
        cfg = compose([*base, *spec.rows[0].overrides, f"scale={scale}"])
        assert cfg.scale == scale
        if scale == "paper":
            assert cfg.task.source == "hub"
            assert len(cfg.model.revision) == 40
        else:
            assert cfg.model.name != cfg.choices.model
            assert cfg.trainer.max_steps is not None
        assert cfg.trainer.batch_size > 0


def test_the_batch_of_xsum_is_cut_to_what_one_gpu_holds() -> None:
    xsum = ["experiment=xsum", "method=lora"]
    paper = compose(xsum).trainer
    assert (paper.batch_size, paper.micro_batch_size, paper.group_by_length) == (64, 32, True)
    tiny = Run.compose([*xsum, "scale=tiny"])
    trainer = tiny.config.trainer
    assert (trainer.micro_batch_size, trainer.group_by_length) == (None, False)
    assert not {"micro_batch_size", "group_by_length"} & set(tiny.meaning["trainer"])
    assert compose(["task=e2e", "recipe=e2e"]).trainer.micro_batch_size is None


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_a_scale_names_only_what_exists(scale: str) -> None:
    for group in ("task", "recipe", "model", "method"):
        scaled = CONFIGS / "scale" / scale / group
        for path in scaled.rglob("*.yaml"):
            assert (CONFIGS / group / path.relative_to(scaled)).is_file(), path


TASKS = [name for name in options("task") if not name.startswith("pretraining")]


@pytest.mark.parametrize("task", TASKS)
def test_an_experiment_is_one_word(task: str) -> None:
    cfg = compose([f"experiment={task}"])
    assert (cfg.choices.task, cfg.choices.recipe) == (task, task)
    by_hand = compose([f"experiment={task}", f"model={cfg.choices.model}"])
    for part in ("task", "recipe", "model", "method", "trainer"):
        assert cfg[part] == by_hand[part], part


def test_the_command_line_wins_over_the_experiment() -> None:
    cfg = compose(["experiment=glue/mrpc", "model=bart_large", "recipe.rank=4"])
    assert (cfg.model.name, cfg.method.rank, cfg.choices.task) == ("bart_large", 4, "glue/mrpc")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("task=glue/mnli model=roberta_base", "recipe=e2e is not made for task=glue/mnli"),
        ("task=xsum recipe=xsum", "model=gpt2_medium is not made for task=xsum"),
        ("task=glue/rte scale=tiny", "Use experiment=glue/rte, or write recipe=e2e"),
        ("experiment=e2e task=webnlg", "recipe=e2e is not made for task=webnlg"),
        ("experiment=glue/rt", "did you mean 'glue/rte'"),
        ("model=gpt2_medim", "did you mean 'gpt2_medium'"),
        ("recipe.rnk=3", "did you mean 'rank'"),
    ],
)
def test_what_does_not_belong_together_is_refused(overrides: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        compose(overrides.split())


@pytest.mark.parametrize("overrides", ["task=glue/mnli recipe=e2e model=roberta_base",
                                       "experiment=xsum model=gpt2_medium"])  # fmt: skip
def test_what_is_asked_for_by_name_is_composed(overrides: str) -> None:
    compose(overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "experiment=e2e method=delta_lora scale=tiny seed=3 method.update_ratio=0.5",
        "recipe.rank=4 experiment=e2e method=lora scale=tiny",
        "experiment=glue/mnli scale=tiny +model.architecture.x=3 ~task.max_length",
        "experiment=xsum logger=wandb trainer.max_steps=3 ++task.max_inputs=5",
        "experiment=e2e task.embedded_sizes={train:12,validation:3} paths.outputs=/x",
        "experiment=e2e trainer.max_steps=${seed} method=peft/ia3",
    ],
)
def test_it_is_what_hydra_composes(overrides: str) -> None:
    asked = overrides.split()
    for _ in range(2):  # from the files, and from what was read before
        ours = OmegaConf.to_container(compose(asked))
        assert isinstance(ours, dict)
        del ours["overrides"], ours["choices"]
        with hydra_ready():
            assert ours == OmegaConf.to_container(hydra.compose("train", asked), resolve=True)


@pytest.mark.parametrize("override", ["choices.method=lora", "overrides=[a]"])
def test_what_is_no_value_of_a_run_is_not_set(override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(override.partition("=")[0])):
        compose(["experiment=e2e", override])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_generic_model_without_keys_of_one_architecture(family: str) -> None:
    model = compose(["experiment=e2e", f"model={family}"]).model
    assert (model.family, model.architecture, model.config_overrides) == (family, None, {})
