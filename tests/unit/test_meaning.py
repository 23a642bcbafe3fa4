"""What a run is called: by what its result depends on, and by nothing else."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import DictConfig, open_dict

from delta_lora.methods.lora import Lora
from delta_lora.trainer import Trainer
from scripts.runs import composition
from scripts.runs.composition import ConfigError
from scripts.runs.meaning import hash_of, plain
from scripts.runs.run import Run
from tasks.e2e import E2E

METHODS = [
    "full", "full_frozen_embeddings", "full_query_value", "lora", "dylora", "adalora", "delta_lora",
    "peft",
]  # fmt: skip


@functools.cache
def _config(overrides: tuple[str, ...]) -> DictConfig:
    return Run.compose(overrides).config


def run_of(*overrides: str, experiment: str = "e2e", **values: Any) -> Run:
    """Return the run of overrides; `values` are put into its configuration afterwards."""
    config = _config((f"experiment={experiment}", *overrides)).copy()
    with open_dict(config):
        for part, changed in values.items():
            config[part] = {**config[part], **changed} if isinstance(changed, Mapping) else changed
    return Run(config)


def name(*overrides: str, **values: Any) -> str:
    return run_of(*overrides, **values).name


# ---------------------------------------------------------------------- one run, said in two ways


@pytest.mark.parametrize("spelling", ["2", "2.0", "2e0"])
def test_a_number_is_one_however_it_is_spelt(spelling: str) -> None:
    assert name("method=delta_lora", f"method.update_ratio={spelling}") == name(
        "method=delta_lora", method={"update_ratio": 2}
    )


def test_plain_values_are_those_of_json() -> None:
    for value in (2, 2.0, 2e0):
        assert json.dumps(plain({"a": (value,)})) == '{"a": [2]}'
    assert plain([True, None, "2", 0.5]) == [True, None, "2", 0.5]
    assert plain(True) is True
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1}) != hash_of({"a": "1", "b": 2})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            ["method=delta_lora", "recipe.start_step=5"],
            ["method=delta_lora", "method.start_step=5"],
        ),
        (["method=lora_no_dropout"], ["method=lora", "method.dropout=0"]),
        (["recipe.rank=3"], ["method.rank=3"]),
    ],
)
def test_where_a_value_comes_from_is_no_part_of_a_run(one: list[str], other: list[str]) -> None:
    assert name(*one) == name(*other)
    assert name(*one) not in (name(), name("method=lora"))


@pytest.mark.parametrize(
    "override",
    [
        "logger=none",
        "paths.outputs=/elsewhere",
        "task.cache_dir=/elsewhere",
        "trainer.checkpoint_every_s=7",
        "trainer.checkpoint_every_steps=3",
        "model.name=another",
    ],
)
def test_what_changes_no_result_changes_no_name(override: str) -> None:
    assert name("method=lora", override) == name("method=lora")


def test_a_setting_that_is_left_out_is_its_default() -> None:
    left_out = run_of("method=delta_lora")
    form = inspect.signature(get_class(left_out.config.method["_target_"])).parameters["form"]
    with open_dict(left_out.config):
        left_out.config.method.pop("form", None)
    assert left_out.name == name("method=delta_lora", method={"form": form.default})


# ---------------------------------------------------------------------- code that moves on


def module_with(monkeypatch: pytest.MonkeyPatch, kind: type) -> str:
    """Put a class into a new module; return the path that a configuration calls it by."""
    module = ModuleType("moved")
    kind.__module__ = module.__name__
    setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return f"{module.__name__}.{kind.__name__}"


@pytest.mark.parametrize(("part", "kind"), [("method", Lora), ("trainer", Trainer), ("task", E2E)])
def test_a_class_that_is_moved_or_renamed_changes_no_name(
    part: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = type("Renamed", (kind,), {})
    if part == "method":  # its own, until the test is over: no two methods may have one name
        monkeypatch.setattr(renamed, "name", "lora", raising=False)
    moved = {"_target_": module_with(monkeypatch, renamed)}
    assert name("method=lora", **{part: moved}) == name("method=lora")


def test_a_new_option_changes_no_name_until_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(Lora):
        def __init__(
            self, *, rank: int, alpha: float, learning_rate: float, dropout: float = 0.0,
            warm_up: int = 0,
        ) -> None:  # fmt: skip
            super().__init__(rank=rank, alpha=alpha, learning_rate=learning_rate, dropout=dropout)

    monkeypatch.setattr(Newer, "name", "lora", raising=False)
    newer = {"_target_": module_with(monkeypatch, Newer)}
    all_given = {"rank": 3, "alpha": 5.0, "learning_rate": 0.1}
    before = name("method=lora", method=all_given)
    assert name("method=lora", method={**all_given, **newer}) == before
    assert name("method=lora", method={**all_given, **newer, "warm_up": 0}) == before
    assert name("method=lora", method={**all_given, **newer, "warm_up": 1}) != before


@pytest.mark.parametrize("kind", [E2E, Lora, Trainer])
def test_a_raised_version_renames(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_of("method=lora").name
    monkeypatch.setattr(kind, "version", 99, raising=False)
    assert run_of("method=lora").name != before


def test_a_class_without_a_name_is_no_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nameless(Lora):
        """Would share the runs of LoRA."""

    target = module_with(monkeypatch, Nameless)
    with pytest.raises(ConfigError, match=r"Nameless has no name of its own; write name ="):
        name("method=lora", method={"_target_": target})


# ---------------------------------------------------------------------- what makes another run


def another(value: Any) -> Any:
    """Return a value of the same kind that is not `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, Mapping):
        return {**value, "further": 1}
    if isinstance(value, (list, tuple)):
        return [*value, "further"]
    return f"{value}, further"


#: other values of settings that have few, or a narrow range.
ALLOWED = {
    "dropout": 0.25,
    "targets": "peft",
    "form": "closed_form",
    "eval_rank": 2,
    "update": "all",
} | dict.fromkeys(("initial_fraction", "final_fraction", "beta1", "beta2"), 0.25)


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_a_method_makes_another_run(method: str) -> None:
    run = run_of(f"method={method}")
    parameters = inspect.signature(get_class(run.config.method["_target_"])).parameters
    names = {run.name}
    for key, parameter in parameters.items():
        value = run.config.method.get(key, parameter.default)
        given = ALLOWED.get(key, another(value))
        names.add(name(f"method={method}", method={key: given}))
    assert len(names) == len(parameters) + 1


@pytest.mark.parametrize(
    "values",
    [
        {"trainer": {"batch_size": 3}},
        {"trainer": {"max_steps": 7}},
        {"task": {"max_length": 300}},
        {"task": {"protocol": "challenge"}},
        {"model": {"revision": "another"}},
        {"model": {"init": "random"}},
        {"model": {"dtype": "bfloat16"}},
        {"model": {"projections": ["c_proj"]}},
        {"train_fraction": 0.5},
        {"predict": False},
        {"save_model": True},
    ],
)
def test_what_can_change_a_result_makes_another_run(values: dict[str, Any]) -> None:
    assert name("method=lora", **values) != name("method=lora")


def test_a_part_of_a_task_is_looked_into() -> None:
    assert name("method=lora", "task.decoding.num_beams=3") != name("method=lora")


# ---------------------------------------------------------------------- seeds


def test_a_seed_is_in_the_name_and_not_in_the_group() -> None:
    runs = [run_of("method=lora", f"seed={seed}") for seed in (1, 2)]
    assert [run.name.split("--")[:3] for run in runs] == [
        ["e2e", "lora", "seed1"], ["e2e", "lora", "seed2"],
    ]  # fmt: skip
    assert runs[0].group == runs[1].group
    assert runs[0].name != runs[1].name
    assert runs[0].with_seed(2).name == runs[1].name
    assert run_of("method=full").group != runs[0].group


def test_a_value_that_follows_the_seed_follows_every_seed() -> None:
    run = Run.compose(["experiment=e2e", "scale=tiny", "task.embedded_seed=${seed}", "seed=1"])
    other = run.with_seed(3)
    assert (run.config.task.embedded_seed, other.config.task.embedded_seed) == (1, 3)
    assert other.seed == 3
    asked = ["experiment=e2e", "scale=tiny", "task.embedded_seed=3", "seed=3"]
    assert other.name == Run.compose(asked).name
    part = run.as_part_of(["table1"]).with_seed(3)
    assert (part.name, part.part_of, part.config.part_of) == (other.name, ["table1"], ["table1"])


def test_a_value_of_a_file_that_follows_the_seed_does_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(composition.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(composition, "CONFIGS", tmp_path / "configs")
    assert not composition.follows_seed(["experiment=e2e", "method=lora"])
    path = tmp_path / "configs" / "task" / "e2e.yaml"
    path.write_text(path.read_text().replace("embedded_seed: 0", "embedded_seed: ${seed}"))
    assert composition.follows_seed(["experiment=e2e", "method=lora"])


def test_a_seed_that_was_not_composed_is_the_same_for_a_run_with_a_start() -> None:
    rte = ("method=lora", "init_from=glue/mnli")
    first, second = (run_of(*rte, f"seed={seed}", experiment="glue/rte") for seed in (1, 2))
    assert first.with_seed(2).name == second.name
    assert first.with_seed(2).start_run is not None
    assert first.with_seed(2).start_run.seed == 2


# ---------------------------------------------------------------------- what a run starts from


def test_a_run_that_starts_from_another_is_named_by_that_one(tmp_path: Path) -> None:
    plainly = run_of("method=lora", experiment="glue/rte")
    run = run_of("method=lora", "init_from=glue/mnli", experiment="glue/rte")
    mnli = run_of("method=lora", experiment="glue/mnli")
    assert run.meaning == {**plainly.meaning, "init_from": mnli.name}
    (tmp_path / "record.json").write_text(json.dumps({"signature": mnli.name}))
    by_folder = run_of("method=lora", f"init_from={tmp_path}", experiment="glue/rte")
    assert by_folder.name == run.name != plainly.name


def test_a_folder_of_weights_takes_the_place_of_a_pre_trained_model(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "mine"))
    run = run_of("method=lora", "scale=tiny", model={"path": folder})
    assert run.pretraining is None
    assert run.weights == (folder, None)
    assert run.name != name("method=lora", "scale=tiny")


def test_a_run_on_a_pre_trained_model_is_named_by_how_that_is_made() -> None:
    run = run_of("method=lora", "scale=tiny")
    assert run.pretraining is not None
    assert run.meaning["model"]["weights"] == {"pretrained": hash_of(run.pretraining.meaning)}
    assert run_of("method=lora", "scale=tiny", "paths.outputs=/elsewhere").name == run.name


def write_folder(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("part", "key", "more"),
    [
        ("model", "path", {}),
        ("model", "tokenizer_path", {}),
        ("task", "data_dir", {"source": "files"}),
    ],
)
def test_a_folder_is_named_by_what_is_in_it(
    part: str, key: str, more: dict[str, Any], tmp_path: Path
) -> None:
    def named(folder: Path) -> str:
        return name("method=lora", **{part: {key: str(folder), **more}})

    one, other = write_folder(tmp_path / "one"), write_folder(tmp_path / "b", b"weightz")
    copied = Path(shutil.copytree(one, tmp_path / "far" / "away"))
    assert named(one) == named(copied) != named(other)
    (copied / "config.json").rename(copied / "config.txt")
    assert named(one) != named(copied)


@pytest.mark.parametrize(
    ("key", "more"),
    [("model.path", []), ("model.tokenizer_path", []), ("task.data_dir", ["task.source=files"])],
)
def test_a_folder_that_is_not_there_is_named_before_work(
    key: str, more: list[str], tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    overrides = ["method=lora", *more, f"{key}={tmp_path / 'gone'}"]
    run = run_of(*overrides, paths={"outputs": str(outputs)})
    with pytest.raises(ConfigError, match=rf"{key}=.*gone: no such folder"):
        _ = run.folder
    assert not outputs.exists()


def test_seeds_that_start_from_their_own_runs_share_a_group() -> None:
    starts = [run_of("method=lora", "init_from=glue/mnli", f"seed={seed}", experiment="glue/rte")
              for seed in (1, 2)]  # fmt: skip
    assert starts[0].group == starts[1].group
    assert starts[0].name.rpartition("--")[2] != starts[1].name.rpartition("--")[2]
    plain_run = run_of("method=lora", experiment="glue/rte")
    other = run_of("method=lora", "init_from=glue/mnli", "recipe.rank=4", experiment="glue/rte")
    assert len({starts[0].group, plain_run.group, other.group}) == 3
