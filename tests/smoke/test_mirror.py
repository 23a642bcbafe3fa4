"""The mirror to Weights & Biases: what it writes, and all the ways in which it may fail."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from delta_lora import wandb_file
from delta_lora.mirror import WandbMirror
from delta_lora.runlog import Guarded
from tests.smoke.mirrored import NAME, files, warnings_of, work
from tests.smoke.wandb_server import KEY, Server

pytestmark = pytest.mark.usefixtures("fresh_mirror")

# ---------------------------------------------------------------------- what is written


def test_a_run_stands_in_the_file_by_words_that_people_filter_by(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work(tmp_path, lambda: WandbMirror(tags=["table1"]))
    (path,) = files(tmp_path)
    found = wandb_file.read(path)
    assert found.run.display_name == "delta_lora e2e tiny seed 1 λ=2 K=500"
    assert found.run.run_id == NAME
    assert found.run.run_group == "e2e--delta_lora--ba9876543210"
    assert found.run.job_type == "train"
    assert list(found.run.tags) == ["e2e", "delta_lora", "tiny", "table1"]
    assert found.run.project == "delta-lora"
    assert found.config["method"] == {"update_ratio": 2.0}
    assert found.exit_code == 0
    assert found.summary["status"] == "completed"
    assert not warnings_of(caplog)


def test_curves_scores_and_costs_are_there_in_the_units_of_the_tables(tmp_path: Path) -> None:
    work(tmp_path)
    found = wandb_file.read(files(tmp_path)[0])
    rows = dict(found.history)
    assert [step for step, _ in found.history] == [1, 2, 3]
    assert rows[2]["train/loss"] == 0.5
    assert rows[2]["perf/step_time_s"] == 0.5
    assert rows[3]["validation/bleu"] == 25
    assert found.summary["test/bleu"] == pytest.approx(37)
    assert found.summary["test/ter"] == 0.5
    assert found.summary["missing/test/meteor"] == "no Java"
    assert found.summary["parameters/trainable"] == 393216
    assert found.summary["cost/train_time_s"] == 3.0
    assert found.summary["method/num_weight_updates"] == 2
    assert found.summary["validation/bleu"] == {"max": 25, "last": 25}
    assert {"train/*", "perf/*", "delta/*", "validation/loss"} <= found.metrics.keys()
    assert found.metrics["train/*"].step_metric == "step"
    (table,) = (files(tmp_path)[0].parent / "files/media/table").glob("*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["id", "input", "prediction", "references", "ROUGE-L"]
    assert content["data"][0] == ["t0", "name: Aromi", "a", "x\ny", 50.0]
    assert content["data"][1][3:] == ["", None]


@pytest.mark.parametrize(
    ("end", "code"), [(("failed", "NonFiniteLossError: loss is nan"), 1), (("stopped", ""), 255)]
)
def test_a_run_ends_in_the_file_as_it_ended(
    end: tuple[str, str], code: int, tmp_path: Path
) -> None:
    work(tmp_path, end=end)
    found = wandb_file.read(files(tmp_path)[0])
    assert found.exit_code == code
    assert found.summary["status"] == end[0]
    assert found.summary.get("error", "") == end[1]


def test_a_continued_run_is_mirrored_whole(tmp_path: Path) -> None:
    """What was written behind the last checkpoint is gone, and the rest comes again."""
    work(tmp_path, end=("stopped", ""), steps=range(1, 6))
    kept = (tmp_path / NAME / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:3]
    work(tmp_path, position=len(b"".join(kept)), steps=range(4, 8))
    found = wandb_file.read(files(tmp_path)[-1])
    assert [step for step, _ in found.history] == [1, 2, 3, 4, 5, 6, 7]
    assert [values["perf/step_time_s"] for _, values in found.history] == [0.5] * 7
    assert found.exit_code == 0


def test_a_killed_run_ends_its_mirror(tmp_path: Path) -> None:
    """The child reads the end of the pipe and does not outlive the run by much."""
    child: list[int] = []

    def kill(guarded: Guarded) -> None:
        process: Any = guarded._mirror
        child.append(process._child._process.pid)
        os.close(process._child._words)  # all that the child sees of a kill
        process._child._process.wait(timeout=20)
        process._child = None

    work(tmp_path, meanwhile=kill)
    found = wandb_file.read(files(tmp_path)[0])
    assert found.summary["status"] == "killed"
    assert found.exit_code == 255
    assert [step for step, _ in found.history] == [1, 2, 3]


def test_variables_of_wandb_mean_what_they_mean_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    variables = {
        "WANDB_PROJECT": "mine", "WANDB_ENTITY": "team", "WANDB_TAGS": "table1, rerun",
        "WANDB_RUN_GROUP": "nightly", "WANDB_DIR": str(elsewhere), "WANDB_NAME": "a name",
        "WANDB_JOB_TYPE": "rerun", "WANDB_NOTES": "a note", "WANDB_RUN_ID": "not-this-one",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    work(tmp_path)
    assert not files(tmp_path)
    run = wandb_file.read(files(elsewhere)[0]).run
    assert (run.project, run.entity, run.run_group) == ("mine", "team", "nightly")
    assert (run.display_name, run.job_type, run.notes) == ("a name", "rerun", "a note")
    assert list(run.tags) == ["e2e", "delta_lora", "tiny", "table1", "rerun"]
    assert run.run_id == NAME


# ---------------------------------------------------------------------- what may fail


def test_a_server_that_serves_gets_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with Server({}).running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        work(tmp_path, end=("failed", "OSError: gone"))
        assert server.exit_code == 1
        assert json.loads(server.streams["wandb-summary.json"][-1])["error"] == "OSError: gone"
        server.streams.clear()
        work(tmp_path)
    rows = [json.loads(line) for line in server.streams["wandb-history.jsonl"]]
    assert [row["train/loss"] for row in rows] == [1, 1 / 2, 1 / 3]
    summary = json.loads(server.uploads["wandb-summary.json"])
    assert summary["test/bleu"] == pytest.approx(37)
    assert server.exit_code == 0
    assert any(name.startswith("media/table/predictions") for name in server.uploads)
    assert json.loads(server.uploads["record.json"])["metrics"]["bleu"] == 0.37
    assert not warnings_of(caplog)
    assert not files(tmp_path)


def test_a_key_that_cannot_be_one_is_not_tried_nor_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "no-key-at-all")
    work(tmp_path)
    assert wandb_file.read(files(tmp_path)[0]).exit_code == 0
    (warning,) = warnings_of(caplog)
    assert "written offline: the key has" in warning
    assert "no-key-at-all" not in caplog.text


def test_a_folder_that_cannot_be_written_costs_the_mirror_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb").write_text("a file where a folder should be")
    assert work(tmp_path) < 20
    (warning,) = warnings_of(caplog)
    assert "gets nothing more" in warning
    caplog.clear()
    assert work(tmp_path) < 0.5  # not tried again
    assert not warnings_of(caplog)
