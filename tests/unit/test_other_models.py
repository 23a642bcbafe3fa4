"""A table of another model, or of a part of the test set, says so and stands alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts import reproduce, tables
from scripts.reporting.formats import to_latex, to_markdown
from scripts.reporting.page import write_page
from scripts.reporting.results import build_results, collect
from scripts.reporting.scope import check_one_model, other_model, shown
from scripts.reporting.spec import load_table, table_names
from scripts.runs.cells import Cell
from scripts.runs.run import Run
from scripts.sweeping.spec import load_sweep, sweep_names
from tests.unit import fake_runs

pytestmark = pytest.mark.usefixtures("no_pictures", "outputs")

SMALL = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of a model, as far as it is looked at before work."""
    folder = tmp_path / "place" / "SmolLM2 135M"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SMALL))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., int]:
    def call(*arguments: str, make: Callable[[list[str]], int] = reproduce.main) -> int:
        where = ["--scale", "tiny", "--seeds", "1,2", "--results", str(tmp_path / "results")]
        return make([*arguments[:1], *where, *arguments[1:]])

    return call


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.long
def test_another_model_has_its_name_its_folder_and_no_paper(
    command: Callable[..., int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results" / "tiny"
    assert command("table1", "--workers", "1") == 0
    own = files(results)
    capsys.readouterr()
    extra = f"model=causal_lm 'model.path={model}'"
    assert command("table1", "--workers", "1", "--args", extra) == 0
    said = capsys.readouterr().out
    (folder,) = (results / "models").iterdir()
    assert folder.name.startswith("smollm2-135m-")
    written = json.loads((folder / "table1.json").read_text())
    title = "E2E NLG Challenge, SmolLM2 135M (not the paper's model)"
    assert written["title"] == title
    assert written["models"] == ["SmolLM2 135M"]
    assert written["claims"] == []
    assert written["contrasts"]
    assert all(not row["paper"] and not row["paper_parameters"] for row in written["rows"])
    text = (folder / "table1.md").read_text()
    assert "↳ paper" not in text
    assert "Claims of the paper" not in text
    assert "**Another model than the paper's: SmolLM2 135M.**" in text
    for path in folder.iterdir():
        assert str(tmp_path) not in path.read_text(), path
    assert title in " ".join(said.split())
    assert "Claims of the paper" not in said
    page = (folder / "README.md").read_text()
    assert "## Verdicts" not in page
    assert "](../../../README.md)" in page
    assert "model.path=FOLDER/SmolLM2 135M" in page

    # The paper's own is untouched, and made again the same, with a link to the other.
    assert files(results) == own
    write_page(results, has_pictures=False)
    assert f"](models/{folder.name}/README.md)" in (results / "README.md").read_text()
    (results / "README.md").write_bytes(own["README.md"])
    assert command("table1", "--args", extra, make=tables.main) == 0
    assert files(results) == own
    assert json.loads((folder / "table1.json").read_text()) == written


def test_the_plan_says_it(
    command: Callable[..., int], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = f"model=causal_lm 'model.path={model}'"
    assert command("table1", "--plan", "--args", extra) == 0
    said = capsys.readouterr().out
    assert "SmolLM2 135M, not the paper's model" in said
    assert "would be refused" not in said


def test_the_plan_says_what_can_only_fail(
    command: Callable[..., int], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model.safetensors").write_bytes(b"half")
    extra = f"model=causal_lm 'model.path={model}'"
    assert command("table5", "--plan", "--args", f"{extra} recipe.rank=0") == 2
    assert "recipe.rank=0 is not allowed" in capsys.readouterr().err
    assert command("table5", "--plan", "--args", extra) == 0
    said = capsys.readouterr().out
    assert "would be refused: lora on e2e" in said
    assert "is no whole safetensors file" in said


def test_two_models_of_one_name_have_two_folders(model: Path, tmp_path: Path) -> None:
    twin = tmp_path / "elsewhere" / model.name
    twin.mkdir(parents=True)
    (twin / "config.json").write_text('{"other": 1}')
    table, found = load_table("table1"), []
    for folder in (model, twin):
        extra = ["model=causal_lm", f"model.path={folder}"]
        other = other_model(table, table.cells(scale="tiny", seeds=[1], extra=extra), "tiny", extra)
        assert other is not None
        found.append(other)
    assert found[0].name == found[1].name
    assert found[0].folder != found[1].folder


@pytest.mark.parametrize(
    ("extra", "is_other"),
    [
        (["model.dtype=bfloat16"], False),
        (["model=gpt2_medium"], False),
        (["model.init=random"], True),
        (["model=distilgpt2"], True),
        (["model.hub_id=them/it", "model.revision=c0"], True),
    ],
)
def test_a_setting_of_the_model_makes_no_other(extra: list[str], is_other: bool) -> None:
    table = load_table("table1")
    cells = table.cells(scale="paper", seeds=[1], extra=extra)
    assert (other_model(table, cells, "paper", extra) is not None) is is_other


def test_a_copy_of_the_papers_model_is_no_other(model: Path) -> None:
    table, extra = load_table("table1"), [f"model.path={model}"]
    values = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16}
    (model / "config.json").write_text(json.dumps(values))
    cells = table.cells(scale="paper", seeds=[1], extra=extra)
    assert other_model(table, cells, "paper", extra) is None
    # A name alone makes no copy.
    (model / "config.json").write_text(json.dumps({**values, "n_layer": 6}))
    named = [*extra, "model.name=gpt2_medium"]
    cells = table.cells(scale="paper", seeds=[2], extra=named)
    assert other_model(table, cells, "paper", named) is not None


def test_a_table_never_mixes_models() -> None:
    runs = [
        Run.compose(["experiment=e2e", f"method={name}", "scale=paper", f"model={model}"])
        for name, model in (("lora", "gpt2_medium"), ("delta_lora", "distilgpt2"))
    ]
    cells = [Cell(f"row{n}", "e2e", run) for n, run in enumerate(runs)]
    with pytest.raises(ValueError, match="from gpt2_medium and row row1 from distilgpt2"):
        check_one_model("table9", cells)


def test_a_part_of_the_test_set_is_not_compared_with_the_paper() -> None:
    table, extra = load_table("table1"), ["task.max_inputs=60"]
    cells = table.cells(scale="tiny", seeds=[1, 2], extra=extra)
    part = {"split": "test", "used": 60, "of": 630}
    for cell in cells:
        record = fake_runs.record(cell.run)
        record["task"]["part"] = part
        fake_runs.write(cell.run, record, fake_runs.resources(cell.run))
    content = build_results(table, "tiny", [1, 2], extra, collect(cells))
    words = "60 of 630 inputs of test, evenly spaced"
    assert content["part"] == f"e2e: {words}"
    assert content["tasks"]["e2e"]["scored"] == words
    assert content["claims"] == []
    assert not any(row["paper"] for row in content["rows"])
    assert "other_model" not in content
    assert f"**A part of the test set: e2e: {words}.**" in to_markdown(content)
    assert f"A part of the test set: e2e: {words}." in to_latex(content)


def test_titles_name_the_model_that_another_one_replaces() -> None:
    for name in table_names():
        table = load_table(name)
        assert table.model, name
        assert table.model in table.title
    for name in sweep_names():
        sweep = load_sweep(name, "tiny")
        assert sweep.model, name
        assert sweep.model in sweep.title


def test_overrides_are_shown_without_places() -> None:
    given = [
        "model.path=/home/me/SmolLM2",
        "task.data_dir=~/e2e",
        "recipe.rank=2",
        "a=x/y",
    ]
    assert shown(given) == [
        "model.path=FOLDER/SmolLM2", "task.data_dir=FOLDER/e2e", "recipe.rank=2", "a=x/y"
    ]  # fmt: skip
