"""Seconds of a run: measured on this kind of device where that was done, else from FLOPs.

A measured step counts only for the same model, method, precision and number of examples, at a
length within a quarter of the planned one; its peak of memory corrects the planned one at any
length. Everything else is estimated: a step takes as long as
its multiplications at a stated share of the device's peak, but no less than its kernels times a
stated cost of each (a step of the paper's E2E batch is bound by that). configs/plan/devices.yaml
holds the assumptions. Scoring on the CPU, reading data and writing files are not in it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.planning.adaptation import Adaptation
from scripts.planning.architecture import (
    ROOT,
    Architecture,
    UnknownCostError,
    is_configured_one,
    read_plan_file,
)
from scripts.planning.forward import Batch
from scripts.planning.ledger import FLOAT, Ledger
from scripts.planning.workload import Decoding

#: measured costs, one file a device (`make gpu-check`).
MEASURED = ROOT / "results" / "gpu"
#: how far the tokens of a measured step may be from the planned ones.
NEAR = 0.25
#: kernels of a decoding step beside those of the layers: search, blocking, changing places.
SEARCH_LAUNCHES = 60
#: kernels of one block in a decoding step: products, normalisations, attention, cache.
BLOCK_LAUNCHES = {"gpt2": 18, "bart": 30}
#: further kernels of a step for each branch: Delta-LoRA's product, and its share of the copies,
#: which all branches make together; AdaLoRA's orthogonality of two factors with its gradient, and
#: its scores.
BRANCH_LAUNCHES = {"delta_lora": 1.2, "adalora": 28}
#: rows that run the same operations as a measured one.
SAME_WORK = {"lora_high_lr": "lora", "lora_scaled": "lora_no_dropout"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """What a run is planned on.

    Attributes:
        name: as the driver or devices.yaml has it.
        is_here: whether this machine has it.
        flops: peak by kind of product, per second.
        utilisation: share of the peak by kind of product.
        launch_s: seconds of one kernel, at least.
        memory_bytes_per_s: memory bandwidth.
        costs: measured ones, or empty.
    """

    name: str
    is_here: bool
    flops: Mapping[str, float]
    utilisation: Mapping[str, float]
    launch_s: float
    memory_bytes_per_s: float
    costs: Mapping[str, Any]

    @property
    def label(self) -> str:
        """How a plan calls it."""
        return self.name if self.is_here else f"{self.name} (this machine shows no CUDA device)"


@functools.cache
def planned_device() -> Device:
    """Return this machine's first CUDA device, or the assumed one where it has none.

    Raises:
        UnknownCostError: configs/plan/devices.yaml knows nothing about it.
    """
    name = cuda_device_name()
    file = read_plan_file("devices.yaml")
    wanted = file["assumed"] if name is None else name
    known = [key for key in file["devices"] if key in wanted]
    if not known:
        raise UnknownCostError(
            f"the speed of {name} is not known; add its peak to configs/plan/devices.yaml"
        )
    entry = file["devices"][known[0]]
    return Device(
        name=wanted if name else f"NVIDIA {wanted}",
        is_here=name is not None,
        flops={kind: 1e12 * value for kind, value in entry["flops"].items()},
        utilisation=file["utilisation"],
        launch_s=1e-6 * file["launch_us"],
        memory_bytes_per_s=1e12 * entry["memory_tb_s"],
        costs=measured_costs(known[0]),
    )


def cuda_device_name() -> str | None:
    """Return the name of the first CUDA device, asked of the driver; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, buffer = ctypes.c_int(0), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetName(buffer, len(buffer), device):
        return None
    return buffer.value.decode("utf-8", "replace")


def measured_costs(device: str, folder: Path | None = None) -> dict[str, Any]:
    """Return the measured costs of a device: of its files in results/gpu the last by name.

    Args:
        device: part of the device's name.
        folder: None is results/gpu.
    """
    for path in sorted((folder or MEASURED).glob("*.json"), reverse=True):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != 1:
                raise ValueError(f"schema {content['schema']}, but 1 is known")
            if device in content["device"]["name"]:
                return {**content["costs"], "file": path.name}
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s does not fit and is left out: %r", path, error)
    return {}


def product_kind(cfg: Any) -> str:
    """Return how products are computed: fp32, tf32, bf16 or fp16."""
    if cfg.trainer.precision != "fp32":
        return str(cfg.trainer.precision)
    return str(cfg.trainer.get("matmul_precision", "fp32"))


def measured_steps(cfg: Any, sequences: int, device: Device) -> list[Mapping[str, Any]]:
    """Return the measured steps of the same model, method, precision and number of examples.

    Args:
        cfg: the run.
        sequences: examples of a micro-batch.
        device: where it was measured.
    """
    method, found = str(cfg.choices.method), []
    for entry in _entries(device, "steps"):
        try:
            fits = (
                entry["model"] == cfg.choices.model == cfg.model.name
                and is_configured_one(cfg)
                and entry["method"] in (method, SAME_WORK.get(method))
                and entry["precision"] == cfg.trainer.precision
                and entry["matmul_precision"] == cfg.trainer.get("matmul_precision", "fp32")
                and entry["batch_size"] == sequences
            )
            if fits and min(entry["batch_tokens"], entry["ms_per_step"], entry["peak_bytes"]) > 0:
                found.append(entry)
        except (KeyError, TypeError) as error:
            logger.warning("%s: a step does not fit: %r", device.costs.get("file"), error)
    return found


def measured_step(cfg: Any, batch: Batch, device: Device) -> tuple[float, str] | None:
    """Return the measured seconds of one micro-batch's step with their basis, if there is one."""
    tokens = batch.length * (1 if batch.is_packed else batch.sequences)
    for entry in measured_steps(cfg, batch.sequences, device):
        if abs(entry["batch_tokens"] - tokens) <= NEAR * tokens:
            return entry["ms_per_step"] / 1000, f"steps measured on {device.name}"
    return None


def measured_decoding(cfg: Any, decoding: Decoding, device: Device) -> tuple[float, str] | None:
    """Return the measured seconds of one chunk with their basis, if there is one."""
    for entry in _entries(device, "decoding"):
        try:
            fits = (
                entry["model"] == cfg.choices.model == cfg.model.name
                and is_configured_one(cfg)
                and entry["batch_size"] == decoding.inputs
                and entry["num_beams"] == decoding.num_beams
                and abs(entry["new_tokens"] - decoding.new_tokens) <= 1
            )
            if fits:
                return float(entry["seconds"]), f"decoding measured on {device.name}"
        except (KeyError, TypeError) as error:
            logger.warning("%s: a decoding does not fit: %r", device.costs.get("file"), error)
    return None


def _entries(device: Device, name: str) -> Iterator[Mapping[str, Any]]:
    found = device.costs.get(name, [])
    if not isinstance(found, list):
        logger.warning("%s: costs.%s is no list and is left out", device.costs.get("file"), name)
        return
    yield from found


def step_seconds(ledger: Ledger, device: Device, kind: str) -> float:
    """Return the estimated seconds of one micro-batch, forward and backward, with the update."""
    flops = ledger.forward_flops + ledger.backward_flops
    extra = BRANCH_LAUNCHES.get(ledger.adaptation.method, 0) * ledger.num_branches
    launches = ledger.forward_launches + ledger.backward_launches + extra
    return _seconds(flops, launches, device, kind)


def forward_seconds(ledger: Ledger, device: Device, kind: str) -> float:
    """Return the estimated seconds of one forward pass."""
    return _seconds(ledger.forward_flops, ledger.forward_launches, device, kind)


def _seconds(flops: float, launches: float, device: Device, kind: str) -> float:
    return max(flops / (device.flops[kind] * device.utilisation[kind]), launches * device.launch_s)


def chunk_seconds(
    shape: Architecture, adaptation: Adaptation, ledger: Ledger, decoding: Decoding, device: Device
) -> float:
    """Return the estimated seconds of a beam search over one chunk, all its steps run.

    A step reads the weights and the cache once, multiplies every beam by the weights, and launches
    its kernels; the longest of these counts.
    """
    layers = shape.num_decoder_layers or shape.num_layers
    beams = decoding.inputs * decoding.num_beams
    per_token = 2 * layers * shape.width * FLOAT
    cached = decoding.mean_length + (
        decoding.new_tokens / 2 if shape.num_decoder_layers else decoding.new_tokens
    )
    weights = ledger.parameters * (layers / (layers + shape.num_layers)
                                   if shape.num_decoder_layers else 1)  # fmt: skip
    flops = 2 * weights * beams
    read = weights * FLOAT + 2 * beams * cached * per_token  # the cache is copied as beams move
    launches = layers * BLOCK_LAUNCHES[shape.family] + SEARCH_LAUNCHES
    step = max(
        flops / (device.flops["fp32"] * device.utilisation["fp32"]),
        read / device.memory_bytes_per_s,
        launches * device.launch_s,
    )
    return decoding.new_tokens * step
