"""What a run does that is mirrored: its folder, its words, its end."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from delta_lora import mirror
from delta_lora.mirror import RunFacts, WandbMirror
from delta_lora.protocols import MetricSpec
from delta_lora.runlog import Guarded, RunLog
from delta_lora.wandb_file import WandbFile

NAME = "e2e--delta_lora--seed1--0123456789ab"


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
        known = {"id": "t0", "references": ["x", "y"], "scores": {"ROUGE-L": 50.0}}
        (folder / "references.jsonl").write_text(json.dumps(known) + "\n")
    guarded.close(*end)
    return time.monotonic() - began


def files(outputs: Path) -> list[Path]:
    """Return what wandb wrote offline, oldest first."""
    return sorted((outputs / "wandb").glob("offline-run-*/run-*.wandb"))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def limit_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no file of the mirror's processes grow above 2 KB, as on a full disk."""
    popen = mirror.subprocess.Popen

    def limited(*arguments: Any, **settings: Any) -> Any:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

        return popen(*arguments, **settings, preexec_fn=limit)

    monkeypatch.setattr(mirror.subprocess, "Popen", limited)


def services_of(parent: int) -> list[int]:
    """Return wandb's services below a process that are ready to be spoken to."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            is_child = f"PPid:\t{parent}\n" in (folder / "status").read_text()
            if is_child and b"wandb-core" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def logged(found: WandbFile) -> set[str]:
    """Return the keys that a file has: of rows, of the summary and, as paths, of what is in it."""
    config = {f"config.{key}" for key in _paths(found.config)}
    keys = {*_paths(found.summary), *(key for _, row in found.history for key in row)}
    return {*keys, *config, *(key.partition("/_type")[0] for key in keys)}  # media are nested


def _paths(content: Mapping[str, Any]) -> set[str]:
    found = set(content)
    for key, value in content.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}" for inner in _paths(value)}
    return found
