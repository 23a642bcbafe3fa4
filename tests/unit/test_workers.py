"""Workers and their queue: broken devices, lack of memory, jobs that need other jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from scripts.runs import faults, workers
from scripts.runs.jobs import Job, Outcome, Queue
from scripts.runs.workers import CELLS_ON_DEVICE, Pool, cells_on_device

RUN = "tests.unit.fault_jobs:run"


def job(text: str, after: str | None = None) -> Job:
    return Job(RUN, (text,), text.partition(":")[0], after)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Outcome]]:
    """Do jobs on workers for the devices named (None: no device); return outcomes by key."""
    monkeypatch.setenv("FAULT_JOBS_LOG", str(tmp_path / "log"))

    def call(jobs: Sequence[Job], devices: Sequence[str | None]) -> dict[str, Outcome]:
        environments = [{} if d is None else {"CUDA_VISIBLE_DEVICES": d} for d in devices]
        with Pool(environments=environments, logs=tmp_path, name="x") as pool:
            found = [outcome for outcome in pool.run(jobs) if outcome is not None]
        assert len(found) == len(jobs)
        return {outcome.job.key: outcome for outcome in found}

    return call


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], list[list[str]]]:
    """Return (process, device, job) of every run that was begun."""
    return lambda: [line.split() for line in (tmp_path / "log").read_text().splitlines()]


def failed(outcomes: dict[str, Outcome]) -> set[str]:
    return {key for key, outcome in outcomes.items() if outcome.error is not None}


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize("behaviour", ["sticky", "memory"])
def test_a_poisoned_worker_takes_one_cell(
    behaviour: str, work: Callable[..., dict[str, Outcome]], log: Callable[[], list[list[str]]]
) -> None:
    jobs = [job("before:good"), job(f"a:{behaviour}"), *(job(f"good{i}:good") for i in range(6))]
    assert failed(work(jobs, ["0"])) == {"a"}
    first, second = dict.fromkeys(process for process, *_ in log())
    assert [name for process, _, name in log() if process == first] == ["before", "a"]
    assert [name for process, _, name in log() if process == second] == [
        f"good{i}" for i in range(6)
    ]


def test_lack_of_memory_says_what_to_do(work: Callable[..., dict[str, Outcome]]) -> None:
    error = work([job("a:memory")], ["0"])["a"].error
    assert error is not None
    assert "Tried to allocate 2.00 GiB" in error
    assert "WORKERS=" in error
    assert "trainer.micro_batch_size=" in error


def test_a_cell_that_failed_by_its_device_is_tried_once_more_on_another_one(
    work: Callable[..., dict[str, Outcome]], log: Callable[[], list[list[str]]]
) -> None:
    assert failed(work([job("a:sticky")], ["0", "1"])) == {"a"}
    assert [device for _, device, _ in log()] == ["0", "1"]


def test_a_lost_device_is_given_up_and_its_cells_go_to_the_others(
    work: Callable[..., dict[str, Outcome]],
    log: Callable[[], list[list[str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        outcomes = work([job(f"a{i}:sticky@0") for i in range(6)], ["0", "1"])
    assert not failed(outcomes)
    assert len([1 for _, device, _ in log() if device == "0"]) == workers.FAULTS_IN_A_ROW
    assert "no more cells for x-worker0 on device 0" in caplog.text


def test_where_every_device_is_lost_the_rest_is_reported_and_not_run(
    work: Callable[..., dict[str, Outcome]], log: Callable[[], list[list[str]]]
) -> None:
    outcomes = work([job(f"a{i}:sticky") for i in range(9)], ["0"])
    assert len(log()) == workers.FAULTS_IN_A_ROW
    rest = [outcome for outcome in outcomes.values() if not outcome.was_run]
    assert len(rest) == 9 - workers.FAULTS_IN_A_ROW
    for outcome in rest:
        assert outcome.error is not None
        assert outcome.error.startswith("no worker is left; the last one failed: AcceleratorError")


@pytest.mark.parametrize("behaviour", ["bad", "memory"])
def test_cells_at_fault_themselves_give_up_no_device(
    behaviour: str, work: Callable[..., dict[str, Outcome]]
) -> None:
    outcomes = work([*(job(f"a{i}:{behaviour}") for i in range(5)), job("good:good")], ["0"])
    assert failed(outcomes) == {f"a{i}" for i in range(5)}


def test_faults_that_took_their_time_give_up_no_device(
    work: Callable[..., dict[str, Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FAULT_WITHIN_S", 0.0)
    outcomes = work([*(job(f"a{i}:sticky") for i in range(4)), job("good:good")], ["0"])
    assert failed(outcomes) == {f"a{i}" for i in range(4)}


def test_workers_that_die_at_once_again_and_again_are_given_up(
    work: Callable[..., dict[str, Outcome]],
) -> None:
    outcomes = work([job(f"a{i}:exit") for i in range(5)], [None])
    assert [outcome.was_run for outcome in outcomes.values()] == [True] * 3 + [False] * 2


def wrapped(error: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception as cause:
            raise ValueError("cannot load the model") from cause
    except ValueError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), faults.DEVICE),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), faults.DEVICE),
        (torch.AcceleratorError("CUDA error: out of memory"), faults.MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), faults.MEMORY),
        (MemoryError(), faults.MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), faults.MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), faults.MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when"), faults.DEVICE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), faults.DEVICE),
        (RuntimeError("CUDA driver error: unknown error"), faults.DEVICE),
        (RuntimeError("Unexpected error from cudaGetDeviceCount()."), faults.DEVICE),
        (RuntimeError("No CUDA GPUs are available"), faults.DEVICE),
        (ValueError(f"scale=paper: {faults.NO_DEVICE}"), faults.DEVICE),
        (wrapped(RuntimeError("CUDA error: an illegal memory access")), faults.DEVICE),
        (ValueError("precision=fp16 needs a CUDA device"), None),
        (RuntimeError("the loss is NaN at step 3"), None),
    ],
)
def test_kinds_of_faults(error: Exception, kind: str | None) -> None:
    assert faults.kind_of(error) == kind


# ---------------------------------------------------------------------- jobs that need other jobs


def test_a_job_waits_for_the_one_it_needs_and_others_go_first(
    work: Callable[..., dict[str, Outcome]], log: Callable[[], list[list[str]]]
) -> None:
    jobs = [job("start:0.5"), job("b:good", "start"), job("c:good"), job("d:good")]
    assert not failed(work(jobs, [None, None]))
    assert [name for *_, name in log()][-1] == "b"


def test_what_needs_a_failed_job_is_not_run(
    work: Callable[..., dict[str, Outcome]], log: Callable[[], list[list[str]]]
) -> None:
    jobs = [job("start:bad"), job("b:good", "start"), job("c:good", "b"), job("d:good")]
    outcomes = work(jobs, [None])
    assert [name for *_, name in log()] == ["start", "d"]
    for key in ("b", "c"):
        assert not outcomes[key].was_run
        assert outcomes[key].error == (
            "the run that it starts from failed: ValueError: rank=0 must be 1 or more"
        )
    assert outcomes["start"].was_run


def test_a_start_that_is_no_job_is_not_waited_for(
    work: Callable[..., dict[str, Outcome]],
) -> None:
    assert not failed(work([job("b:good", "done before")], [None]))


def test_jobs_have_keys_of_their_own() -> None:
    with pytest.raises(ValueError, match="two jobs have the same key"):
        Queue([job("a:good"), job("a:bad")])


# ---------------------------------------------------------------------- environment


def test_a_worker_knows_how_many_share_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CELLS_ON_DEVICE, raising=False)
    assert cells_on_device() == 1
    monkeypatch.setenv(CELLS_ON_DEVICE, "4")
    assert cells_on_device() == 4
