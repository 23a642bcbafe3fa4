"""Tests use no network, no hub and no tracker."""

from __future__ import annotations

import gc
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults import tally as faults

# `evaluate` imports metric modules from this folder, which it looks for only once in a process: one
# folder for the process, and no other process that writes to it at the same time.
_modules = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = _modules.name

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What `make test PYTHON=... ARGS=...` was given is not for the make that a test runs.
for _name in (
    "ARGS", "LAUNCHER", "LAUNCHER_ARGS", "PYTHON", "PYTHON3", "SCALE", "SEEDS", "SWEEP",
    "TEST_WORKERS", "VALUES", "WORKERS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS",
):  # fmt: skip
    os.environ.pop(_name, None)

_connect = socket.socket.connect


def pytest_collection_finish() -> None:
    """Let the collector pass over what was imported: that took a fifth of the time of all tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test connect to this machine only."""

    def connect(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to connect to {address}")
        _connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether the long tests run too: `make faults` tries all faults, `make test` some of them."""
    return "not long" not in request.config.option.markexpr


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[faults.Tally]:
    """Count the faults that a test injects: see `tests.faults.tally`."""
    counted = faults.Tally()
    yield counted
    counts = [(*key, number) for key, number in counted.counts.items()]
    request.node.user_properties.append((faults.PROPERTY, counts))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what became of all faults."""
    reports = [r for found in terminalreporter.stats.values() for r in found]
    ends = [report for report in reports if getattr(report, "when", "") == "teardown"]
    counts = [value for r in ends for name, value in r.user_properties if name == faults.PROPERTY]
    if lines := faults.table(counts):
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.line(line)
