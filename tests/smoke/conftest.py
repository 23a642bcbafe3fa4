"""Runs of seconds: a model pre-trained for three steps, a handful of test inputs, no Java."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from delta_lora import mirror, runlog
from tasks.metrics.meteor import shared_process

ROOT = Path(__file__).resolve().parents[2]
_PRETRAINING = [
    "task=pretraining", "recipe=pretrain_gpt2", "model=tiny_gpt2_scratch", "method=full",
    "scale=tiny", "trainer.max_steps=3", "task.num_documents=400", "task.block_size=64",
    "task.tokenizer_documents=400", "task.vocab_size=700", "task.num_validation_documents=20",
    "model.architecture.vocab_size=700",
]  # fmt: skip
SMALL = [
    "task=e2e", "model=gpt2_medium", "scale=tiny", "logger=none",
    f"model.pretrain={_PRETRAINING!r}",
    "task.embedded_sizes={train:12,validation:3,test:3}", "task.decoding.num_beams=2",
    "task.decoding.max_new_tokens=6", "task.decoding.batch_size=1", "trainer.max_steps=6",
    "trainer.log_every_steps=2", "trainer.checkpoint_every_steps=2",
    "recipe.start_step=1", "recipe.warmup_steps=1",
]  # fmt: skip


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs for all smoke tests, so that the model is pre-trained once."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes ten seconds to start; its own tests start it, and may have left it running."""
    monkeypatch.setenv("PATH", "/nonexistent")
    shared_process().close()


@pytest.fixture
def fresh_mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


@pytest.fixture
def small(outputs: Path) -> Callable[..., list[str]]:
    """Return the overrides of a run of seconds, with further ones."""

    def overrides(*more: str, folder: Path = outputs) -> list[str]:
        return [*SMALL, f"paths.outputs={folder}", *more]

    return overrides


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process and a working folder of its own."""

    def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(arguments),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": "/nonexistent"}
