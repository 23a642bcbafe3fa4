"""The mirror to Weights & Biases: what it writes, and all the ways in which it may fail."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from delta_lora import mirror, runlog, wandb_file
from delta_lora.mirror import RunFacts, WandbMirror
from delta_lora.protocols import MetricSpec
from delta_lora.runlog import Guarded, RunLog
from scripts import dashboard
from scripts.runs.run import Run

KEY = "0123456789abcdef" * 3
NAME = "e2e--delta_lora--seed1--0123456789ab"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that mirrored nothing yet, of a user without any settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(mirror, "_process", mirror._Process())
    monkeypatch.setattr(mirror, "INIT_TIMEOUT_S", 2.0)
    monkeypatch.setattr(mirror, "FINISH_TIMEOUT_S", 2.0)
    monkeypatch.setattr(runlog, "_has_warned", False)


def facts(outputs: Path, **changes: Any) -> RunFacts:
    folder = outputs / NAME
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "folder": folder,
        "outputs": outputs,
        "id": NAME,
        "name": "delta_lora e2e tiny seed 1 λ=2 K=500",
        "group": "e2e--delta_lora--ba9876543210",
        "job_type": "train",
        "tags": ["e2e", "delta_lora", "tiny"],
        "config": {"method": {"update_ratio": 2.0}},
        "metrics": (MetricSpec("bleu", "BLEU", 100.0), MetricSpec("ter", "TER", 1.0, 2, False)),
    }
    return RunFacts(**{**values, **changes})


def work(
    outputs: Path,
    logger: Callable[[], Any] = WandbMirror,
    *,
    end: tuple[str, str] = ("completed", ""),
    meanwhile: Callable[[Guarded], None] = lambda _: None,
    position: int = 0,
    steps: range = range(1, 4),
) -> float:
    """Do what a run does; return the seconds that its mirror took."""
    began = time.monotonic()

    def make() -> Any:
        made = logger()
        made.begin(facts(outputs))
        return made

    guarded, folder = Guarded(make), outputs / NAME
    log = RunLog(folder / "metrics.jsonl", position=position, mirrors=[guarded])
    for step in steps:
        log.log(step, {"epoch": step / 3, "train/loss": 1 / step}, {"perf/step_time_s": 0.5})
    meanwhile(guarded)
    log.log(steps[-1], {"epoch": 1.0, "validation/loss": 0.5, "validation/bleu": 0.25})
    log.close()
    if end[0] == "completed":
        record = {
            "metrics": {"bleu": 0.37, "ter": 0.5},
            "parameters": {"trainable": 393216},
            "missing_metrics": {"meteor": "no Java"},
            "training": {"method": {"num_weight_updates": 2}},
        }
        (folder / "record.json").write_text(json.dumps(record))
        (folder / "resources.json").write_text(json.dumps({"train_time_s": 3.0}))
        predictions = [{"id": f"t{i}", "input": "name: Aromi", "prediction": "a"} for i in (0, 1)]
        lines = [json.dumps(row) + "\n" for row in predictions]
        (folder / "predictions.jsonl").write_text("".join(lines))
        (folder / "references.jsonl").write_text('{"id": "t0", "references": ["x", "y"]}\n')
    guarded.close(*end)
    return time.monotonic() - began


def files(outputs: Path) -> list[Path]:
    """Return what wandb wrote offline, oldest first."""
    return sorted((outputs / "wandb").glob("offline-run-*/run-*.wandb"))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


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
    assert content["columns"] == ["id", "input", "prediction", "references"]
    assert content["data"][0] == ["t0", "name: Aromi", "a", "x\ny"]
    assert content["data"][1][3] == ""


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


class Server:
    """A stand-in for the service, on this machine.

    Args:
        fails: what the answer to a request is instead of the right one, by the beginning of its
            path: a status code, or None for no answer at all.

    Attributes:
        address: its address.
        streams: what was sent of a run's files, by their names.
        uploads: whole files, by their names.
        exit_code: of the run that ended.
        views: that were saved.
    """

    def __init__(self, fails: Mapping[str, int | None]) -> None:
        self.fails, self.done = fails, threading.Event()
        self.streams: dict[str, list[str]] = {}
        self.uploads: dict[str, str] = {}
        self.exit_code: int | None = None
        self.views: list[dict[str, Any]] = []
        self.address = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            do_GET = do_PUT = do_POST  # noqa: N815 - the names are http.server's

            def log_message(self, *_: Any) -> None:
                pass

        found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        found.daemon_threads = True
        self.address = f"http://127.0.0.1:{found.server_port}"
        threading.Thread(target=found.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.done.set()
            found.shutdown()
            found.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path, content = request.path, b"{}"
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status = next((s for start, s in self.fails.items() if path.startswith(start)), 200)
        if status is None:
            self.done.wait(30)
            return
        if path == "/graphql":
            content = json.dumps({"data": self.data(json.loads(body))}).encode()
        elif path.startswith("/upload/"):
            self.uploads[path.removeprefix("/upload/")] = body.decode()
        elif path.endswith("/file_stream"):
            sent = json.loads(body)
            for name, part in sent.get("files", {}).items():
                self.streams.setdefault(name, []).extend(part["content"])
            self.exit_code = sent.get("exitcode", self.exit_code)
        request.send_response(status)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def data(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return what the service would say, as far as its client reads it."""
        query, values = asked["query"], asked.get("variables", {})
        if "upsertBucket(" in query:
            project = {"id": "P", "name": values["project"], "entity": {"id": "E", "name": "team"}}
            bucket = {"id": "R", "name": values["name"], "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createArtifact(" in query:
            made = {"id": "A", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": made}}
        if "createRunFiles(" in query:
            files = [
                {"name": n, "uploadUrl": f"{self.address}/upload/{n}"} for n in values["files"]
            ]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        if "upsertView(" in query:
            self.views.append(values)
            return {"upsertView": {"view": {"id": "V", "name": values["name"]}, "inserted": True}}
        return {"project": None, "viewer": {"entity": "team", "flags": "{}"}}


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
    assert not warnings_of(caplog)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "fails",
    [{"/": 401}, {"/": 500}, {"/": None}, {"/files": None}, "refused"],
    ids=["401", "500", "hanging", "hanging later", "refused"],
)
def test_a_server_that_does_not_serve_leaves_offline_files(
    fails: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with Server({} if fails == "refused" else fails).running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        if fails != "refused":
            assert work(tmp_path) < 20
    if fails == "refused":  # nobody listens there any more
        assert work(tmp_path) < 20
    found = wandb_file.read(files(tmp_path)[-1])
    assert found.summary["test/bleu"] == pytest.approx(37)
    assert found.exit_code == 0
    (warning,) = warnings_of(caplog)
    assert "cannot be reached" in warning
    assert KEY not in caplog.text
    assert mirror._process.best == "offline"  # the next run does not try again


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


def test_a_full_disk_costs_the_mirror_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of the child's processes may grow above 2 KB."""
    popen = mirror.subprocess.Popen

    def limited(*arguments: Any, **settings: Any) -> Any:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

        return popen(*arguments, **settings, preexec_fn=limit)

    monkeypatch.setattr(mirror.subprocess, "Popen", limited)
    assert work(tmp_path) < 21
    (warning,) = warnings_of(caplog)
    assert "gets nothing more" in warning


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_that_dies_costs_nothing_and_one_that_hangs_the_mirror_alone(
    number: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if number == signal.SIGSTOP:
        monkeypatch.setattr(mirror, "_process", mirror._Process(patience_s=4.0))
    services: list[int] = []

    def stop(guarded: Guarded) -> None:
        made: Any = guarded._mirror
        until = time.monotonic() + 30
        while not services and time.monotonic() < until:
            services.extend(_services(made._child._process.pid))
            time.sleep(0.1)
        os.kill(services[0], number)

    try:
        work(tmp_path, meanwhile=stop)
    finally:
        for pid in services:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if number == signal.SIGKILL:
        found = wandb_file.read(files(tmp_path)[-1])
        assert ([step for step, _ in found.history], found.exit_code) == ([1, 2, 3], 0)
        assert not warnings_of(caplog)
    else:
        (warning,) = warnings_of(caplog)
        assert "gets nothing more" in warning


def _services(parent: int) -> list[int]:
    """Return wandb's services below a process that are ready to be spoken to."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if f"PPid:\t{parent}\n" in (folder / "status").read_text():
                found.append(int(folder.name))
    return found


def test_without_wandb_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "stub/wandb").mkdir(parents=True)
    (tmp_path / "stub/wandb/__init__.py").write_text("raise ImportError('No module named wandb')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    work(tmp_path)
    (warning,) = warnings_of(caplog)
    assert "No module named wandb" in warning


# ---------------------------------------------------------------------- afterwards


def test_runs_are_written_again_from_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that had no mirror, in the same words and with the same rows."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = Run.compose(["experiment=e2e", "scale=tiny", "seed=2", f"paths.outputs={tmp_path}"])
    work(tmp_path)
    folder = tmp_path / NAME
    OmegaConf.save(run.config, folder / "config.yaml")
    record = json.loads((folder / "record.json").read_text())
    record |= {"status": "completed", "signature": NAME, "group": "e2e--delta_lora--1"}
    (folder / "record.json").write_text(json.dumps(record))
    for name in ("INIT_TIMEOUT_S", "FINISH_TIMEOUT_S"):  # put back what the command changes
        monkeypatch.setattr(mirror, name, getattr(mirror, name))
    command = ["sync", str(folder), "--mode", "offline", "--tags", "table1,again"]
    assert dashboard.main(command) == 0
    assert f"offline  {NAME}  (delta_lora e2e tiny seed 2 λ=2 K=3; completed)" in (
        capsys.readouterr().out
    )
    found = wandb_file.read(files(tmp_path)[0])
    assert [step for step, _ in found.history] == [1, 2, 3]
    assert found.history[-1][1]["validation/bleu"] == 25
    assert found.summary["test/bleu"] == pytest.approx(37)
    assert found.run.run_group == "e2e--delta_lora--1"
    assert list(found.run.tags) == ["e2e", "delta_lora", "tiny", "table1", "again"]
    with pytest.raises(SystemExit):
        dashboard.main(["sync", str(tmp_path)])
    assert "is no folder of a run: it has no config.yaml" in capsys.readouterr().err


def test_tables_pictures_and_verdicts_are_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("INIT_TIMEOUT_S", "FINISH_TIMEOUT_S"):  # put back what the command changes
        monkeypatch.setattr(mirror, name, getattr(mirror, name))
    (tmp_path / "tiny").mkdir()
    for path in (dashboard.ROOT / "results/tiny").glob("table1.*"):
        shutil.copy(path, tmp_path / "tiny")
    command = ["summary", "--results", str(tmp_path), "--mode", "offline"]
    assert dashboard.main(command) == 0
    assert "offline  results at tiny: table1" in capsys.readouterr().out
    (path,) = files(tmp_path)
    found = wandb_file.read(path)
    assert (found.run.job_type, found.exit_code) == ("report", 0)
    table = json.loads((tmp_path / "tiny/table1.json").read_text())
    for claim in table["claims"]:
        assert found.summary[f"verdict/{claim['id']} (table1)"] == claim["verdict"]
    media = path.parent / "files/media"
    assert len(list(media.glob("table/table1*.json"))) == 1
    assert len(list(media.glob("images/pictures/table1*.png"))) == 1
    with pytest.raises(SystemExit):
        dashboard.main([*command, "--scale", "small"])
    assert "small holds no table" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [200, 401])
def test_a_view_is_saved_or_it_is_said_why_not(
    answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ENTITY", "team")
    with Server({} if answer == 200 else {"/": answer}).running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        done = subprocess.run(
            [sys.executable, str(dashboard.ROOT / "scripts/dashboard.py"), "figure3"],
            capture_output=True,
            text=True,
            timeout=100,
        )
    if answer == 200:
        assert done.returncode == 0, done.stderr
        (view,) = server.views
        assert (view["displayName"], view["entityName"]) == ("figure3 at tiny", "team")
        assert "delta/w_change_norm" in view["spec"]
    else:
        assert done.returncode == 1
        assert "figure3 at tiny: not saved" in done.stderr
        assert "Traceback" not in done.stderr
    assert KEY not in done.stdout + done.stderr
