"""`scripts/dashboard.py` against a stand-in for the service, and with all that it may do wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from delta_lora import mirror, wandb_file
from delta_lora.mirror import RunFacts, WandbMirror
from scripts import dashboard
from scripts.dashboards import panels, reports, subjects, views
from scripts.reporting.spec import load_table, table_names
from scripts.runs.execution import execute
from scripts.runs.mirroring import group_of
from scripts.runs.run import Run
from scripts.sweeping.spec import load_sweep, sweep_names
from tests.choices import first
from tests.smoke.mirrored import NAME, files, limit_files, logged, work
from tests.smoke.wandb_server import KEY, Server

pytestmark = [
    pytest.mark.usefixtures("fresh_mirror"),
    pytest.mark.filterwarnings("ignore:Pydantic V1 style"),  # of wandb-workspaces
]
SECOND = "e2e--lora--seed1--0123456789ab"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a finished run that had no mirror, as `sync` finds it."""
    monkeypatch.setattr(mirror, "be_patient", lambda: None)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    work(tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    run = Run.compose(
        ["experiment=e2e", "scale=tiny", "seed=2", f"paths.outputs={tmp_path}", "part_of=[mine]"]
    )
    folder = tmp_path / NAME
    OmegaConf.save(run.config, folder / "config.yaml")
    record = json.loads((folder / "record.json").read_text())
    record |= {"status": "completed", "signature": NAME, "group": run.group, "meaning": run.meaning}
    (folder / "record.json").write_text(json.dumps(record))

    def membership(tasks: Any, scale: str) -> dict[str, list[str]]:
        assert (set(tasks), scale) == ({"e2e"}, "tiny")
        return {group_of(run): ["table1", "table5", "mine"], "another": ["table6"]}

    monkeypatch.setattr(dashboard, "membership", membership)
    return folder


# ---------------------------------------------------------------------- runs


def test_runs_are_written_again_from_their_folders(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that had no mirror, with the same rows, tagged by all that they are part of."""
    monkeypatch.setenv("WANDB_TAGS", "again")
    assert dashboard.main(["sync", str(folder), "--mode", "offline"]) == 0
    out = capsys.readouterr().out
    assert f"offline  {NAME}  (delta_lora e2e tiny seed 2 λ=2 K=3; completed)" in out
    found = wandb_file.read(files(folder.parent)[0])
    assert [step for step, _ in found.history] == [1, 2, 3]
    assert found.history[-1][1]["validation/bleu"] == 25
    assert found.summary["test/bleu"] == pytest.approx(37)
    assert found.run.run_group.startswith("delta_lora e2e, λ 2, K 3, r 4, α 32, ")
    tags = ["e2e", "delta_lora", "tiny", "mine", "table1", "table5", "again"]
    assert list(found.run.tags) == tags
    with pytest.raises(SystemExit):
        dashboard.main(["sync", str(folder.parent)])
    assert "is no folder of a run: it has no config.yaml" in capsys.readouterr().err


def test_a_run_that_was_killed_is_written_whole_and_one_that_cannot_be_read_costs_itself(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "record.json").unlink()
    broken = folder.with_name(SECOND)
    shutil.copytree(folder, broken)
    config = OmegaConf.load(broken / "config.yaml")
    config.task._target_ = "tasks.nowhere.Gone"
    OmegaConf.save(config, broken / "config.yaml")
    command = ["sync", str(broken), str(folder), "--mode", "offline", "--tags", "x"]
    assert dashboard.main(command) == 1
    out = capsys.readouterr().out
    assert f"FAILED  {SECOND}: InstantiationException" in out
    assert "1 of 2 runs written" in out
    found = wandb_file.read(files(folder.parent)[0])
    assert [step for step, _ in found.history] == [1, 2, 3]
    assert (found.exit_code, found.summary["status"]) == (255, "stopped")


@pytest.mark.long
def test_predictions_of_a_run_without_a_mirror_get_their_references(
    small: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "membership", lambda *_: {})
    run = Run.compose(small("method=delta_lora", "seed=79"))
    execute(run)
    assert not (run.folder / "references.jsonl").exists()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert dashboard.main(["sync", str(run.folder), "--mode", "offline"]) == 0
    (table,) = files(tmp_path)[0].parent.glob("files/media/table/*.json")
    content = json.loads(table.read_text())
    assert content["columns"][:4] == ["id", "input", "prediction", "references"]
    assert all(row[3] for row in content["data"])


def test_a_service_that_serves_gets_a_run_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with Server({}).running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        assert dashboard.main(["sync", str(folder)]) == 0
    assert f"online  {NAME}" in capsys.readouterr().out
    rows = [json.loads(line) for line in server.streams["wandb-history.jsonl"]]
    assert [row["train/loss"] for row in rows] == [1, 1 / 2, 1 / 3]
    assert json.loads(server.uploads["record.json"])["signature"] == NAME
    assert server.exit_code == 0


@pytest.mark.parametrize("trouble", first(["401", "hanging", "hanging later", "refused"], 2))
def test_a_service_that_does_not_serve_leaves_offline_files(
    trouble: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fails: dict[str, Mapping[str, int | None]] = {
        "401": {"/": 401}, "hanging": {"/": None},
        "hanging later": {"/files": None}, "refused": {},
    }  # fmt: skip
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    began = time.monotonic()
    with Server(fails[trouble]).running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        if trouble != "refused":
            assert dashboard.main(["sync", str(folder)]) == 0
    if trouble == "refused":  # nobody listens there any more
        assert dashboard.main(["sync", str(folder)]) == 0
    assert time.monotonic() - began < 30
    assert f"offline  {NAME}" in capsys.readouterr().out
    assert wandb_file.read(files(folder.parent)[-1]).exit_code == 0
    assert "Weights & Biases cannot be reached" in caplog.text
    assert KEY not in caplog.text


def test_a_full_disk_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_files(monkeypatch)
    assert dashboard.main(["sync", str(folder), "--mode", "offline"]) == 1
    out = capsys.readouterr().out
    assert f"FAILED  {NAME}" in out
    assert "0 of 1 runs written" in out


# ---------------------------------------------------------------------- results


def test_tables_sweeps_pictures_and_verdicts_are_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(mirror, "be_patient", lambda: None)
    place = tmp_path / "tiny"
    (place / "sweeps/rank").mkdir(parents=True)
    for path in (dashboard.ROOT / "results/tiny").glob("table1.*"):
        shutil.copy(path, place)
    shutil.copy(place / "table1.png", place / "sweeps/rank/sweep.png")
    (place / "sweeps/rank/sweep.csv").write_text("seed,test\n1,20.5\n")
    sweep = {
        "sweep": "rank",
        "rows": [
            {"label": "LoRA, rank r = 4", "runs": [SECOND]},
            {"label": "DyLoRA, rank r = 8", "runs": []},
        ],
        "panels": [
            {"experiment": "e2e", "title": "", "chosen": [{"cell": 0}, {"cell": 1}, {"cell": None}]}
        ],
    }
    (place / "sweeps/rank/sweep.json").write_text(json.dumps(sweep))
    command = ["summary", "--results", str(tmp_path), "--mode", "offline"]
    assert dashboard.main(command) == 0
    assert "offline  results at tiny: table1, rank" in capsys.readouterr().out
    (path,) = files(tmp_path)
    found = wandb_file.read(path)
    assert (found.run.job_type, found.exit_code) == ("report", 0)
    table = json.loads((place / "table1.json").read_text())
    for claim in table["claims"]:
        assert found.summary[f"verdict/{claim['id']} (table1)"] == claim["verdict"]
    assert found.summary["chosen/rank, e2e"] == "LoRA, rank r = 4; DyLoRA, rank r = 8"
    media = path.parent / "files/media"
    assert len(list(media.glob("table/table1*.json"))) == 1
    assert len(list(media.glob("table/rank*.json"))) == 1
    for name in ("table1", "rank"):
        assert len(list(media.glob(f"images/pictures/{name}*.png"))) == 1
        # What the report of it shows of this run, is here.
        kind = {"name": name, "title": "", "scale": "tiny", "parts": ()}
        subject = subjects.Subject(**kind, is_sweep=name == "rank")  # type: ignore[arg-type]
        report = reports.report_of(subject, entity="me", project="mine", results=tmp_path)
        keys = panels.keys_of(reports.content_of(report))
        assert keys == {f"pictures/{name}"} <= logged(found)
    with pytest.raises(SystemExit):
        dashboard.main([*command, "--scale", "small"])
    assert "small holds no table" in capsys.readouterr().err


# ---------------------------------------------------------------------- views and reports


@pytest.mark.long
def test_every_key_of_every_view_and_report_is_one_that_a_run_of_its_task_has(
    small: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Curves are those of a run, made here; scores those of the committed records of the task."""
    run = Run.compose(small("method=delta_lora", "seed=79"))
    execute(run)
    records = {}
    for path in sorted((dashboard.ROOT / "results/runs/tiny").glob("*--delta_lora--seed1--*.json")):
        record = json.loads(path.read_text())
        records[record["config"]["choices"]["task"]] = record
    made = {}
    for task, record in records.items():  # all of them at the same time
        made[task] = WandbMirror(mode="offline")
        made[task].begin(facts_of_record(record, run.folder, tmp_path))
        made[task].log(0, {})
    for each in made.values():
        each.close("completed")
    has = {}
    for path in files(tmp_path):
        found = wandb_file.read(path)
        assert found.exit_code == 0
        has[found.config["choices"]["task"]] = logged(found)
    assert has.keys() == records.keys()
    for subject in small_subjects():
        made_views = views.views_of(subject, entity="me", project="mine")
        for view, part in zip(made_views, subject.parts, strict=True):
            alone = dataclasses.replace(subject, parts=(part,))
            report = reports.report_of(alone, entity="me", project="mine", results=tmp_path)
            task = next(task for task in has if task.rpartition("/")[2] == task_of(part))
            for content in (views.content_of(view), reports.content_of(report)):
                assert panels.keys_of(content) - has[task] == set(), part.title


def task_of(part: subjects.Part) -> str:
    """Return the task of a part by its groups: ``delta_lora glue_cola, λ 2, ...``."""
    return part.groups[0].partition(",")[0].rpartition(" ")[2].removeprefix("glue_")


def small_subjects() -> list[subjects.Subject]:
    """Return all tables and sweeps, each with few runs: panels do not depend on their number."""
    found = []
    for name in table_names():
        table = load_table(name)
        rows = [row for row in table.rows if row.name == "delta_lora"] or table.rows[:1]
        found.append(subjects.of_table(dataclasses.replace(table, rows=tuple(rows)), "tiny"))
    for name in sweep_names():
        sweep = load_sweep(name, "tiny")
        axes = tuple(dataclasses.replace(a, values=a.values[:1]) for a in sweep.axes)
        few = dataclasses.replace(sweep, axes=axes, methods=sweep.methods[:1], references=())
        found.append(subjects.of_sweep(few, "tiny"))
    return found


def facts_of_record(record: dict[str, Any], example: Path, outputs: Path) -> RunFacts:
    """Make a folder of a record, with the curves and predictions of another run beside it."""
    folder = outputs / record["signature"]
    folder.mkdir()
    for name in ("measured.jsonl", "predictions.jsonl"):
        shutil.copy(example / name, folder)
    lines = (example / "metrics.jsonl").read_text()
    for entry in record["training"]["validation"]:
        row = {f"validation/{k}": v for k, v in entry.items() if k not in ("step", "epoch")}
        lines += json.dumps({"step": 6, "epoch": 1.0, **row}) + "\n"
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "resources.json").write_text(json.dumps(record["resources"]))
    name = record["config"]["choices"]["task"]
    task = instantiate(Run.compose([f"experiment={name}", "scale=tiny"]).config.task)
    return RunFacts(
        folder=folder, outputs=outputs, id=record["signature"], name="name", group="group",
        job_type="train", tags=[], config=record["config"], metrics=task.metrics,
    )  # fmt: skip


def saved(server: Server, kind: str) -> list[dict[str, Any]]:
    return [view for view in server.views.values() if view["type"] == kind]


def run_command(server: Server, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Give the command in a process of its own, with little patience; return also its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(dashboard.ROOT / "scripts/dashboard.py"), *arguments],
        env={**os.environ, "WANDB_BASE_URL": server.address, "WANDB_HTTP_TIMEOUT": "2"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert KEY not in done.stdout + done.stderr
    return done, time.monotonic() - began


@pytest.mark.long
def test_a_view_and_a_report_are_saved_and_the_report_takes_the_place_of_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ENTITY", "team")
    with Server({}).running() as server:
        for _ in range(2):
            done, _ = run_command(server, "figure3")
            assert done.returncode == 0, done.stderr
    assert f"report figure3 at tiny: {server.address}/team/delta-lora/reports/" in done.stdout
    (report,) = saved(server, "runs")
    assert (report["displayName"], report["entityName"]) == ("figure3 at tiny", "team")
    spec = json.loads(report["spec"])
    grids = [block for block in spec["blocks"] if block["type"] == "panel-grid"]
    for grid in grids:
        (runs,) = grid["metadata"]["runSets"]
        assert runs["project"] == {"name": "delta-lora", "entityName": "team", "id": "P1"}
    assert "not reproduced" in report["spec"]
    assert f"{server.address}/team/delta-lora/runs/e2e--delta_lora--seed1--" in report["spec"]
    first, second = saved(server, "project-view")
    assert first["displayName"] == second["displayName"] == "figure3 at tiny"
    assert "delta/w_change_norm" in first["spec"]


@pytest.mark.parametrize("trouble", first(["401", "refused", "hanging"]))
def test_what_cannot_be_saved_is_said(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ENTITY", "team")
    fails = {"401": {"/": 401}, "hanging": {"/": None}, "refused": {}}
    server = Server(fails[trouble])
    with server.running():
        if trouble != "refused":
            done, seconds = run_command(server, "figure3")
    if trouble == "refused":
        done, seconds = run_command(server, "figure3")
    assert done.returncode == 1
    assert "view figure3 at tiny: not saved: " in done.stderr
    assert "report figure3 at tiny: not saved: " in done.stderr
    assert seconds < 90
    assert not server.views


def test_after_two_failures_the_rest_is_not_tried(capsys: pytest.CaptureFixture[str]) -> None:
    tried = []

    def job(name: str, *, works: bool) -> Callable[[], str]:
        def save() -> str:
            tried.append(name)
            if not works:
                raise OSError("gone")
            return "address"

        return save

    works = {"a": False, "b": True, "c": False, "d": False, "e": True, "f": True}
    jobs = {name: job(name, works=is_ok) for name, is_ok in works.items()}
    assert dashboard._save_all(jobs) == 1
    assert tried == ["a", "b", "c", "d"]
    assert "two failed in a row; 2 more are not tried" in capsys.readouterr().err
    assert dashboard._save_all({"b": jobs["b"], "e": jobs["e"]}) == 0
