"""A method, a task and a model of a user's own: a file and a yaml each, in a folder of their own.

CONTRIBUTING promises that nothing else is needed; `tests/smoke/toys` is such a folder.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import delta_lora
from scripts.runs.composition import ConfigError
from scripts.runs.execution import execute
from scripts.runs.run import Run
from tests.choices import first
from tests.smoke.conftest import command, environment

TOYS = Path(__file__).with_name("toys")
SETTINGS = ["scale=tiny", "logger=none", "paths.outputs=outputs", "trainer.max_steps=3"]
BY_NAME = ["task=toy", "model=toy", "recipe=e2e", "method=toy", *SETTINGS]

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder, with the model that its file writes."""
    folder = tmp_path_factory.mktemp("user") / "mine"
    shutil.copytree(TOYS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    run(folder, [sys.executable, "toy_model.py"])
    return folder


@pytest.fixture
def mine(whole: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    shutil.copytree(whole, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "mine"


@pytest.fixture
def here(mine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, as the working folder of this process, which can import its modules."""
    monkeypatch.syspath_prepend(str(mine))
    monkeypatch.chdir(mine)
    yield mine
    for module in ("toy_method", "toy_task"):
        sys.modules.pop(module, None)


def run(folder: Path, arguments: list[str]) -> Done:
    return subprocess.run(
        arguments, cwd=folder, env={**environment(), "PYTHONPATH": str(folder)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def train(folder: Path, *overrides: str) -> Done:
    """Call the command line as a user does who stands in the folder."""
    return run(folder, command(["--config-dir", str(folder), *overrides]))


def refusal(done: Done) -> str:
    """Return the message of a command that was refused; a traceback is none."""
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.removeprefix("error: ").strip()


def record_of(done: Done, folder: Path) -> Path:
    """Return the record that a command has written or found."""
    assert done.returncode == 0, done.stderr[-3000:]
    (name,) = re.findall(r"record: (\S+record\.json)", done.stderr)
    return folder / name


@pytest.mark.long
def test_they_run_and_load(here: Path) -> None:
    path = record_of(train(here, *BY_NAME), here)
    record = json.loads(path.read_text())
    assert path.parent.name.startswith("toy--toy--seed1--")
    assert record["status"] == "completed"
    assert record["training"]["steps"] == 3
    assert 0 <= record["metrics"]["accuracy"] <= 1
    assert record["num_predictions"] == 10
    biases = (3 + 1 + 4 + 1) * 16 + 3 * 16  # of the layers, and of the norms
    assert record["parameters"]["trainable"] == biases

    again = run(here, command([f"--config-dir={here}", *BY_NAME]))
    assert "already done" in again.stderr
    assert record_of(again, here) == path

    # The same run, its parts chosen by the experiment.
    chosen = train(here, "experiment=toy", "method=toy", *SETTINGS)
    assert "already done" in chosen.stderr
    assert record_of(chosen, here) == path

    import toy_method  # type: ignore[import-not-found]

    adapter = delta_lora.load(path.parent)
    assert isinstance(adapter.method, toy_method.ToyMethod)
    ids = torch.arange(8)[None]
    base = type(adapter.model).from_pretrained("toy_model").eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        assert not torch.equal(adapter.model(ids).logits, base(ids).logits)


@pytest.mark.long
def test_what_no_experiment_pairs_must_be_named(mine: Path) -> None:
    shutil.rmtree(mine / "experiment")
    said = refusal(train(mine, "task=toy", "model=toy", "method=toy", *SETTINGS))
    assert "no experiment has task=toy" in said
    assert "name one (recipe=...)" in said
    assert str(mine / "experiment" / "toy.yaml") in said


@pytest.mark.long
def test_a_model_is_named_or_comes_with_the_experiment(mine: Path) -> None:
    said = refusal(train(mine, "task=toy", "recipe=e2e", "method=toy", *SETTINGS))
    assert "model=gpt2_medium is not made for task=toy, which goes with model=toy" in said
    assert "Use experiment=toy" in said
    made = train(
        mine, *BY_NAME, "model.init=random", "model.path=null", "model.tokenizer_path=toy_model",
        "+model.architecture={model_type: gpt2, vocab_size: 13, n_positions: 16, n_embd: 16, "
        "n_layer: 1, n_head: 2}",
    )  # fmt: skip
    assert json.loads(record_of(made, mine).read_text())["model"]["init"] == "random"


#: file of the toys -> (text, what stands there instead, what the message says).
MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "a method without a name": (
        "toy_method.py", '    name = "toy"\n', "",
        r"toy_method\.ToyMethod has no name of its own; write name = 'my_method' in the class",
    ),
    "a method with the name of another": (
        "toy_method.py", 'name = "toy"', 'name = "lora"', "two methods are called 'lora'",
    ),
    "a method that is none": (
        "toy_method.py", "(WeightsMethod)", "(nn.Module)",
        r"_target_=toy_method\.ToyMethod is no Method; .* delta_lora\.protocols\.Method",
    ),
    "a method whose settings have no names": (
        "toy_method.py", "    def choose(\n",
        "    def __init__(self, learning_rate):\n        self.learning_rate = learning_rate\n\n"
        "    def choose(\n",
        r"ToyMethod takes learning_rate by place, .*__init__\(self, \*, learning_rate\)",
    ),
    "a method in no module": (
        "method/toy.yaml", "toy_method", "toymethod",
        r"_target_=toymethod\.ToyMethod cannot be imported.* PYTHONPATH=FOLDER",
    ),
    "a method in no class": (
        "method/toy.yaml", "ToyMethod", "ToyMethd", r"_target_=toy_method\.ToyMethd cannot",
    ),
    "a method's unknown setting": (
        "method/toy.yaml", "learning_rate:", "learning_rat: 1\nlearning_rate:", "'learning_rat'",
    ),
    "a task without a version": (
        "toy_task.py", 'name, version = "toy", 1', 'name = "toy"',
        r"toy_task\.ToyTask has no version; write version = 1 in the class",
    ),
    "a task without a name": (
        "toy_task.py", 'name, version = "toy", 1', "version = 1",
        r"toy_task\.ToyTask has no name; write name = 'my_task' in the class",
    ),
    "a task without metrics": (
        "toy_task.py", "    metrics = ", "    numbers = ",
        r"toy_task\.ToyTask has no metrics; write metrics = \(MetricSpec",
    ),
    "a task that lacks a function": (
        "toy_task.py", "def collate(", "def colate(", "ToyTask .*collate",
    ),
    "a task's yaml without a class": (
        "task/toy.yaml", "_target_: toy_task.ToyTask\n", "",
        r"task=toy has no _target_; its yaml names a class, such as _target_: my_module\.MyTask",
    ),
    "a task's value that is not allowed": (
        "task/toy.yaml", "num_train: 40", "num_train: 0", r"task\.num_train=0 .*>= 1",
    ),
    "a model of a wrong family": (
        "model/toy.yaml", "causal_lm", "seq2seq_lm",
        r"model=toy is of the family seq2seq_lm, but task=toy is learned by a causal_lm; .*"
        r"family: causal_lm",
    ),
    "a model of no family": (
        "model/toy.yaml", "causal_lm", "causal", r"model\.family='causal' .*'causal_lm'",
    ),
    "a model whose family is left out": (
        "model/toy.yaml", "family: causal_lm\n", "", r"model=toy lacks family; its yaml",
    ),
    "a model without the base": (
        "model/toy.yaml", "defaults: [/model/_base@_here_, _self_]\n", "",
        r"model=toy lacks init, .*; its yaml begins with defaults: \[/model/_base@_here_, _self_\]",
    ),
    "a model in no folder": (
        "model/toy.yaml", "path: toy_model", "path: toy_modell", r"model\.path=toy_modell: no such",
    ),
}  # fmt: skip


def spoil(file: Path, text: str, instead: str) -> None:
    content = file.read_text()
    assert content.count(text) == 1
    file.write_text(content.replace(text, instead))


#: in a process of their own: a class that takes the name of another would be met by later tests.
APART = ("a task without a version", "a method with the name of another")


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if name not in APART])
def test_a_mistake_is_said_with_what_to_do(mistake: str, here: Path) -> None:
    file, text, instead, message = MISTAKES[mistake]
    spoil(here / file, text, instead)
    with pytest.raises(ConfigError, match=f"(?s){message}") as caught:
        execute(Run.compose([f"hydra.searchpath=[file://{here}]", *BY_NAME]))
    assert len(str(caught.value)) < 500
    assert not (here / "outputs").exists()


@pytest.mark.parametrize("mistake", first(APART))
def test_it_is_said_without_a_traceback(mistake: str, mine: Path) -> None:
    file, text, instead, message = MISTAKES[mistake]
    spoil(mine / file, text, instead)
    assert re.search(message, refusal(train(mine, *BY_NAME)))
