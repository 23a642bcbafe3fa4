"""A record tells of every file that its run used and that no commit holds."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.runs import own_files
from scripts.runs.own_files import own_files as found_for
from scripts.runs.recording import _provenance_of
from scripts.runs.run import Run
from tests.smoke.test_plugins import TOYS

OURS = ["experiment=e2e", "method=lora", "scale=tiny"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with a method, a task and a model of their own, on the import path."""
    folder = tmp_path / "mine"
    shutil.copytree(TOYS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "helper_of_mine.py").write_text("FACTOR = 2\n")
    module = folder / "toy_method.py"
    module.write_text(f"{module.read_text()}\n\nimport helper_of_mine  # noqa: E402\n")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("toy_method", "toy_task", "helper_of_mine"):
        sys.modules.pop(name, None)


def composed(folder: Path) -> Run:
    (folder / "toy_model").mkdir(exist_ok=True)
    path = f"model.path={folder / 'toy_model'}"
    overrides = ["task=toy", "model=toy", "recipe=e2e", "method=toy", "scale=tiny", path]
    run = Run.compose([f"hydra.searchpath=[file://{folder}]", *overrides])
    assert run.name  # imports what it names
    return run


def test_files_of_ones_own_are_told_by_name_and_content(mine: Path) -> None:
    told = {entry["file"]: entry["sha256"] for entry in found_for(composed(mine).config)}
    names = {"method/toy.yaml", "task/toy.yaml", "model/toy.yaml", "toy_method.py", "toy_task.py"}
    assert told.keys() == {*names, "helper_of_mine.py"}
    for name, digest in told.items():
        assert digest == hashlib.sha256((mine / name).read_bytes()).hexdigest()
    (mine / "toy_method.py").write_text("# another")
    again = {entry["file"]: entry["sha256"] for entry in found_for(composed(mine).config)}
    assert {name for name in told if told[name] != again[name]} == {"toy_method.py"}


def test_a_run_of_what_is_committed_has_none() -> None:
    run = Run.compose(OURS)
    assert run.name
    assert found_for(run.config) == []


def test_a_file_in_the_checkout_counts_until_it_is_committed(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(mine), *name, *arguments], check=True, capture_output=True)

    run = composed(mine)
    monkeypatch.setattr(own_files, "ROOT", mine.resolve())
    git("init", "-q")
    git("add", "toy_task.py", "task", "model", "helper_of_mine.py")
    git("commit", "-qm", "some")
    told = {entry["file"] for entry in found_for(run.config)}
    assert {"method/toy.yaml", "toy_method.py"} <= told
    assert not told & {"toy_task.py", "task/toy.yaml", "model/toy.yaml", "helper_of_mine.py"}
    shutil.rmtree(mine / ".git")  # without git nothing here can be told apart
    assert not {entry["file"] for entry in found_for(run.config)} & {"toy_method.py"}


def test_a_record_with_such_files_is_no_record_of_a_commit() -> None:
    import torch

    own = [{"file": "toy_method.py", "sha256": "0"}]
    git = _provenance_of(torch.nn.Linear(1, 1), own)["git"]
    assert git["dirty"] is True
    assert git["untracked"] == own
    assert "untracked" not in _provenance_of(torch.nn.Linear(1, 1), [])["git"]
    assert json.dumps(git)
