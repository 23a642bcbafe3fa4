"""How many workers a command has, on which devices, with which environment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from scripts.runs import allotment, devices
from scripts.runs.allotment import Allotment, allot, largest_need, parse_workers
from scripts.runs.devices import Cuda, Device
from scripts.runs.workers import CELLS_ON_DEVICE

GIB = 2**30


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 cores without a GPU."""
    monkeypatch.setattr(allotment, "_count_cores", lambda: 16)
    monkeypatch.setattr(allotment, "_free_memory", lambda: 2**40)
    monkeypatch.setattr(devices, "cuda", lambda: Cuda((), "no CUDA device is seen"))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the machine GPUs of so many free GiB each."""

    def give(*free_gib: int) -> None:
        found = tuple(
            Device(str(i), "NVIDIA H100", gib * GIB, 80 * GIB) for i, gib in enumerate(free_gib)
        )
        monkeypatch.setattr(devices, "cuda", lambda: Cuda(found))

    return give


def places(chosen: Allotment) -> list[tuple[str, str]]:
    """Return device and number of sharers of each worker."""
    return [(e["CUDA_VISIBLE_DEVICES"], e[CELLS_ON_DEVICE]) for e in chosen.environments]


def test_scale_tiny_takes_the_cores_within_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(allot("auto", "tiny", [], 33).environments) == 16
    assert len(allot("auto", "tiny", [], 3).environments) == 3
    monkeypatch.setattr(allotment, "_free_memory", lambda: 5 * GIB)
    chosen = allot("auto", "tiny", [], 33)
    assert chosen.text == "2 workers on the CPU"
    assert places(chosen) == [("", "1"), ("", "1")], "each has a core of its own"
    assert places(allot("33", "tiny", [], 33)) == [("", "3")] * 33, "of 16 cores"
    assert chosen.environments[0]["OMP_NUM_THREADS"] == "1"
    assert chosen.environments[0]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_on_a_cpu_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = allot("auto", "small", [], 33)
    assert alone.text == "1 worker on the CPU"
    assert "OMP_NUM_THREADS" not in alone.environments[0]
    assert allot("4", "small", [], 33).environments[3]["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert allot("4", "small", [], 33).environments[3]["OMP_NUM_THREADS"] == "2"


def test_a_gpu_takes_as_many_cells_as_its_memory_allows(gpus: Any) -> None:
    gpus(79)
    chosen = allot("auto", "paper", [], 33, lambda: int(7.1 * GIB))
    assert chosen.text == (
        "4 workers on 1 device (4 cells a device: planned 7.1 GiB each of 79.0 GiB free)"
    )
    assert places(chosen) == [("0", "4")] * 4
    assert {e["OMP_NUM_THREADS"] for e in chosen.environments} == {"4"}
    assert len(allot("auto", "paper", [], 33, lambda: 30 * GIB).environments) == 2
    assert len(allot("auto", "paper", [], 33, lambda: 100 * GIB).environments) == 1


def test_an_unknown_need_is_one_cell_a_device(gpus: Any) -> None:
    gpus(79, 79)
    chosen = allot("auto", "paper", [], 33)
    assert places(chosen) == [("0", "1"), ("1", "1")]
    assert chosen.text == (
        "2 workers on 2 devices (1 cell a device: the memory that a cell needs is not known)"
    )


def test_every_device_gets_its_share_of_few_cells(gpus: Any) -> None:
    gpus(79, 20)
    assert places(allot("auto", "paper", [], 33, lambda: 8 * GIB)) == [
        ("0", "4"), ("1", "2"), ("0", "4"), ("1", "2"), ("0", "4"), ("0", "4"),
    ]  # fmt: skip
    assert places(allot("auto", "paper", [], 3, lambda: 8 * GIB)) == [
        ("0", "2"), ("1", "1"), ("0", "2"),
    ]  # fmt: skip
    assert len(allot("auto", "paper", [], 0).environments) == 1


def test_a_worker_has_two_cores_but_every_device_a_worker(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(79, 79)
    monkeypatch.setattr(allotment, "_count_cores", lambda: 6)
    assert len(allot("auto", "paper", [], 33, lambda: GIB).environments) == 3
    monkeypatch.setattr(allotment, "_count_cores", lambda: 1)
    chosen = allot("auto", "paper", [], 33, lambda: GIB)
    assert places(chosen) == [("0", "1"), ("1", "1")]
    assert chosen.environments[0]["OMP_NUM_THREADS"] == "1"


def test_a_number_is_spread_over_the_devices(gpus: Any) -> None:
    gpus(40, 40)
    chosen = allot("3", "paper", [], 33, lambda: 30 * GIB)
    assert places(chosen) == [("0", "2"), ("1", "1"), ("0", "2")]
    assert chosen.text == (
        "3 workers on 2 devices (1 to 2 cells a device: planned 30.0 GiB each of 40.0 GiB free, "
        "which may not suffice)"
    )


def test_runs_that_train_on_the_cpu_see_no_gpu(gpus: Any) -> None:
    gpus(79, 79)
    for scale, overrides in (("tiny", []), ("paper", ["trainer.device=cpu"])):
        assert {device for device, _ in places(allot("2", scale, overrides, 9))} == {""}
    assert places(allot("auto", "tiny", ["trainer.device=auto"], 9)) == [("0", "1"), ("1", "1")]


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "1.5"])
def test_a_wrong_number_of_workers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="use auto or a number of 1 or more"):
        parse_workers(text)


def test_the_largest_cell_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allotment, "device_bytes", lambda config: config)

    def cells(*needs: int | None) -> Any:
        return [
            SimpleNamespace(row=str(i), on="e2e", run=SimpleNamespace(config=need))
            for i, need in enumerate(needs)
        ]

    assert largest_need(cells(3, 7, 5)) == 7
    assert largest_need(cells(3, None)) is None
    assert largest_need([]) is None


def test_memory_and_cores_are_read_from_this_machine() -> None:
    assert allotment._count_cores() >= 1
    assert allotment._free_memory() > 2**20
