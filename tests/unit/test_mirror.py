"""What the mirror to Weights & Biases is told, and that it decides nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from delta_lora import mirror, runlog
from delta_lora.mirror import RunFacts, WandbMirror
from delta_lora.runlog import Guarded, RunLog

KEY = "0123456789abcdef" * 3


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that mirrored nothing yet, of a user without any settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(mirror, "_process", mirror._Process())
    monkeypatch.setattr(runlog, "_has_warned", False)


def work(folder: Path, logger: Callable[[], Any]) -> None:
    """Log what a run logs."""

    def make() -> Any:
        made = logger()
        made.begin(facts(folder))
        return made

    guarded = Guarded(make)
    log = RunLog(folder / "metrics.jsonl", mirrors=[guarded])
    for step in (1, 2):
        log.log(step, {"train/loss": 1 / step}, {"perf/step_time_s": 0.5})
    log.close()
    guarded.close("completed")


def facts(folder: Path) -> RunFacts:
    return RunFacts(
        folder=folder, outputs=folder, id="id", name="name", group="group", job_type="train",
        tags=[], config={},
    )  # fmt: skip


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("variables", "settings", "expected"),
    [
        ({}, {}, "auto"),
        ({"WANDB_MODE": "offline"}, {}, "offline"),
        ({"WANDB_MODE": "dryrun"}, {}, "offline"),
        ({"WANDB_MODE": "disabled"}, {}, "disabled"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, {}, "disabled"),
        ({"WANDB_DISABLED": "false"}, {}, "auto"),
        ({"WANDB_MODE": "disabled"}, {"mode": "offline"}, "offline"),
        ({"WANDB_DISABLED": "true"}, {"mode": "auto"}, "auto"),
    ],
)
def test_the_mode_is_what_was_said_last(
    variables: dict[str, str],
    settings: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert WandbMirror(**settings)._mode == expected  # type: ignore[arg-type]


def test_the_command_line_wins_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_TAGS", "theirs")
    made = WandbMirror(project="other", tags=["ours"])
    assert (made._project, made._tags) == ("other", ["ours"])


@pytest.mark.parametrize(
    ("settings", "variables", "message"),
    [
        ({"mode": "onlin"}, {}, r"logger.mode='onlin' is not known; choose one of 'auto'"),
        (
            {"mode": "online"},
            {},
            r"logger.mode=online, but no key is configured; run `wandb",
        ),
        ({"mode": "online"}, {"WANDB_API_KEY": "short"}, r"the key has 5 characters"),
        ({"project": 3}, {}, r"logger.project=3 is a int, not a text"),
        ({"tags": "table1"}, {}, r"logger.tags='table1' is a str, not a list"),
        ({}, {"WANDB_MODE": "onlin"}, r"WANDB_MODE='onlin' is not known"),
    ],
)
def test_mistakes_of_the_user_are_refused(
    settings: dict[str, Any],
    variables: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, TypeError), match=message):
        WandbMirror(**settings)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (KEY, None),
        (f"local-{KEY}", None),
        ("aGVhZGVy.cGF5bG9hZA.c2lnbmF0dXJl", None),
        ("short", "5 characters"),
        (KEY[:-1] + "%", "characters that no key has"),
    ],
)
def test_the_form_of_a_key_is_checked_without_a_network(key: str, problem: str | None) -> None:
    found = mirror.key_problem({"WANDB_API_KEY": key})
    assert (found is None) if problem is None else (problem in str(found))


def test_a_key_of_wandb_login_is_found(tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    path.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    path.chmod(0o600)
    assert mirror.key_problem({"NETRC": str(path)}) is None
    assert mirror.key_problem({"NETRC": str(tmp_path / "none")}) == mirror.NO_KEY


# ---------------------------------------------------------------------- what may fail


def test_disabled_by_the_environment_no_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(mirror, "_Child", None)
    work(tmp_path, WandbMirror)
    assert not (tmp_path / "wandb").exists()
    assert not warnings_of(caplog)


class Broken:
    """A mirror that breaks where it is told to."""

    def __init__(self, where: str) -> None:
        self.where = where
        if where == "init":
            raise OSError("broken in init")

    def begin(self, run: RunFacts) -> None:
        if self.where == "begin":
            raise OSError("broken in begin")

    def log(self, step: int, values: Any) -> None:
        if self.where == "log":
            raise OSError("broken in log")

    def close(self, status: str, error: str = "") -> None:
        if self.where == "close":
            raise OSError("broken in close")


@pytest.mark.parametrize("where", ["init", "begin", "log", "close"])
def test_any_mirror_may_break_anywhere_and_warns_once(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work(tmp_path, lambda: Broken(where))
    work(tmp_path, lambda: Broken(where))
    (warning,) = warnings_of(caplog)
    assert f"broken in {where}" in warning
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------------- the files it is made of


def test_what_is_measured_stands_apart_and_is_cut_off_with_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = RunLog(path)
    for step in (2, 4):
        log.log(step, {"train/loss": 1.0}, {"perf/step_time_s": step / 8})
    position = log.position()
    log.log(4, {"validation/loss": 2.0})
    log.log(6, {"train/loss": 1.0}, {"perf/step_time_s": 1.0})
    log.close()
    with (tmp_path / runlog.MEASURED).open("a") as stream:
        stream.write('{"step": 8, "perf')  # a kill
    log = RunLog(path, position=position)
    log.log(6, {"train/loss": 3.0}, {"perf/step_time_s": 0.5})
    log.close()
    assert path.read_text() == (
        '{"step": 2, "train/loss": 1.0}\n{"step": 4, "train/loss": 1.0}\n'
        '{"step": 6, "train/loss": 3.0}\n'
    )
    assert (tmp_path / runlog.MEASURED).read_text() == (
        '{"step": 2, "perf/step_time_s": 0.25}\n{"step": 4, "perf/step_time_s": 0.5}\n'
        '{"step": 6, "perf/step_time_s": 0.5}\n'
    )
