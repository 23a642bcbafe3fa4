"""What a run costs before it starts: seconds, device memory, disk, each with its basis.

Nothing here imports torch, so that a table is planned in seconds. How the numbers come about stands
in `scripts.planning`; what they are worth is measured by scripts/dry_run.py. Memory is planned in
float32, without gradient checkpointing: an upper bound for half precision and for recomputed
activations.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scripts.planning import disk, memory, speed
from scripts.planning.adaptation import Adaptation, read_adaptation
from scripts.planning.architecture import Architecture, UnknownCostError, read_architecture
from scripts.planning.forward import Batch, write_down
from scripts.planning.ledger import CPU, CUDA, FLOAT, Ledger
from scripts.planning.lengths import TaskLengths, read_lengths
from scripts.planning.workload import Workload, read_decoding, read_workload

#: device memory beside tensors: CUDA's context and cuBLAS's workspaces.
CONTEXT_BYTES = 700 * 2**20
#: what the allocator holds and does not use, as a share of the tensors.
FRAGMENTATION = 0.1


@dataclass(frozen=True)
class Cost:
    """What a run costs; None where it is not known.

    Attributes:
        seconds: training, evaluation and decoding on `device`.
        device_bytes: peak of the tensors in device memory.
        device_peak: which part of the run has that peak: ``training`` or ``decoding``.
        disk_bytes: the run's folder when its record stands.
        disk_peak_bytes: the run's folder while it works, at most.
        device: what the seconds are of.
        basis: where the seconds come from, or why something is not known.
    """

    seconds: float | None = None
    device_bytes: int | None = None
    device_peak: str = ""
    disk_bytes: int | None = None
    disk_peak_bytes: int | None = None
    device: str = ""
    basis: str = ""


def estimate(cfg: DictConfig) -> Cost:
    """Return the cost of the run of `cfg`.

    Args:
        cfg: from `scripts.runs.composition.compose`.
    """
    # Seeds, names and folders cost nothing; a table asks for the same row once a seed.
    content: Any = OmegaConf.to_container(cfg)
    for key in ("seed", "overrides", "paths", "logger"):
        content.pop(key, None)
    return _estimate(json.dumps(content, sort_keys=True, default=str))


@functools.lru_cache(maxsize=4096)
def _estimate(content: str) -> Cost:
    cfg = OmegaConf.create(json.loads(content))
    try:
        return _of_known_model(cfg, read_architecture(cfg), read_adaptation(cfg))
    except UnknownCostError as error:
        return Cost(basis=str(error))
    except (TypeError, ValueError, ArithmeticError) as error:
        # A value of the wrong type or range; the check before work says which and what is allowed.
        return Cost(basis=f"the settings cannot be planned with: {error}")


def _of_known_model(cfg: Any, shape: Architecture, adaptation: Adaptation) -> Cost:
    if cfg.trainer.device == "cpu":
        return _of_disk_alone(cfg, shape, adaptation, "the time of a CPU is not planned")
    try:
        lengths = read_lengths(cfg)
    except UnknownCostError as error:
        return _of_disk_alone(cfg, shape, adaptation, str(error))
    workload = read_workload(cfg, shape, lengths)
    ledger = write_down(shape, adaptation, workload.largest, CUDA)
    space = disk.run_disk(cfg, ledger, workload, lengths.rows["scored"])
    device, problem = _device()
    peak, part = _device_bytes(cfg, shape, adaptation, ledger, workload, lengths, device)
    known = Cost(
        device_bytes=peak,
        device_peak=part,
        disk_bytes=space.kept,
        disk_peak_bytes=space.peak,
        basis=problem,
    )
    if device is None:
        return known
    seconds, basis = _seconds(cfg, shape, adaptation, workload, lengths, device)
    return replace(known, seconds=seconds, device=device.label, basis=basis)


def _device() -> tuple[speed.Device | None, str]:
    """Return the device that is planned for, or why there is none."""
    try:
        return speed.planned_device(), ""
    except UnknownCostError as error:
        return None, str(error)


def device_bytes(cfg: Any) -> int | None:
    """Return the device memory to reserve for the run of `cfg`, None where it is not known.

    The planned peak, a tenth for what the allocator holds unused, and CUDA's own.
    """
    planned = estimate(cfg).device_bytes
    return None if planned is None else round(planned * (1 + FRAGMENTATION)) + CONTEXT_BYTES


def _of_disk_alone(cfg: Any, shape: Architecture, adaptation: Adaptation, reason: str) -> Cost:
    """Return what needs no knowledge of device or data: the disk, which the model decides."""
    batch = Batch(1, 2, shape.family == "gpt2", targets=1)
    steps = UNKNOWN_STEPS if cfg.trainer.max_steps is None else cfg.trainer.max_steps
    workload = Workload(steps, 1, batch, batch, 0, batch)
    ledger = write_down(shape, adaptation, batch, CPU)
    space = disk.run_disk(cfg, ledger, workload, UNKNOWN_ROWS)
    return Cost(disk_bytes=space.kept, disk_peak_bytes=space.peak, basis=reason)


#: inputs of a scored split, and steps of a run, of which the number is not known.
UNKNOWN_ROWS, UNKNOWN_STEPS = 2_000, 100_000


def _device_bytes(
    cfg: Any,
    shape: Architecture,
    adaptation: Adaptation,
    ledger: Ledger,
    workload: Workload,
    lengths: TaskLengths,
    device: speed.Device | None,
) -> tuple[int, str]:
    """Return the larger peak of training and decoding, and which of them it is."""
    training = 0
    if workload.steps:
        sizes = memory.step_bytes(ledger, accumulates=workload.micro_batches > 1)
        training = round(sizes["peak"] * _correction(cfg, shape, adaptation, workload, device))
        if cfg.trainer.precision != "fp32":
            training += ledger.parameters * FLOAT // 2  # autocast keeps casts of the weights
    decoding = read_decoding(cfg, lengths)
    if decoding is None:
        return training or (ledger.parameters + ledger.adapters) * FLOAT, "training"
    peak = memory.decoding_bytes(
        shape,
        adaptation,
        ledger,
        inputs=decoding.inputs,
        num_beams=decoding.num_beams,
        input_length=decoding.longest,
        new_tokens=decoding.new_tokens,
    )
    return (training, "training") if training >= peak else (peak, "decoding")


def _correction(
    cfg: Any,
    shape: Architecture,
    adaptation: Adaptation,
    workload: Workload,
    device: speed.Device | None,
) -> float:
    """Return measured over planned peak of a step that was measured on the device, else 1."""
    if device is None:
        return 1.0
    mean = workload.mean
    for entry in speed.measured_steps(cfg, mean.sequences, device):
        length = entry["batch_tokens"]
        if not mean.is_packed:
            length = -(-length // mean.sequences)
        ledger = write_down(shape, adaptation, replace(mean, length=length), CUDA)
        planned = memory.step_bytes(ledger, accumulates=False)["peak"]
        return float(entry["peak_bytes"] / planned)
    return 1.0


def _seconds(
    cfg: Any,
    shape: Architecture,
    adaptation: Adaptation,
    workload: Workload,
    lengths: TaskLengths,
    device: speed.Device,
) -> tuple[float, str]:
    """Return the seconds of training, evaluation and decoding, and where they come from."""
    kind = speed.product_kind(cfg)
    total, bases = 0.0, []
    estimated = estimate_basis(device, kind)
    if workload.steps:
        ledger = write_down(shape, adaptation, workload.mean, CUDA)
        measured = speed.measured_step(cfg, workload.mean, device)
        step, basis = measured or (speed.step_seconds(ledger, device, kind), estimated)
        total += workload.steps * workload.micro_batches * step
        bases.append(basis)
    evaluation = write_down(shape, adaptation, workload.evaluation, CUDA)
    total += workload.evaluated * speed.forward_seconds(evaluation, device, kind)
    decoding = read_decoding(cfg, lengths)
    if decoding is not None:
        ledger = write_down(shape, adaptation, workload.mean, CUDA)
        measured = speed.measured_decoding(cfg, decoding, device)
        chunk, basis = measured or (
            speed.chunk_seconds(shape, adaptation, ledger, decoding, device),
            estimated,
        )
        total += decoding.chunks * chunk
        bases.append(basis)
    return total, "; ".join(dict.fromkeys(bases)) or estimated


def estimate_basis(device: speed.Device, kind: str) -> str:
    """Return how an estimate comes about, in words."""
    share, peak = device.utilisation[kind], device.flops[kind] / 1e12
    return (
        f"FLOPs at {share:.0%} of {peak:g} TFLOP/s ({kind}), at least {1e6 * device.launch_s:g} us "
        "a kernel"
    )
