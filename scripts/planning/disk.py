"""Bytes on disk: a run's folder while it works and when its record stands, and downloads.

While a run works there are two checkpoints and, for a moment, the one that is being written; the
same number of ``best`` weights where the best epoch is kept; at the end the adapter and the
predictions beside them. When the record stands, checkpoints and ``best`` are removed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import yaml

from delta_lora.checks import expanded
from scripts.planning.architecture import ROOT, read_plan_file
from scripts.planning.ledger import FLOAT, Ledger
from scripts.planning.workload import Workload

#: checkpoints that are kept, and the one that is being written.
CHECKPOINTS = 2 + 1
#: of one line of metrics.jsonl, of one prediction, of a record with its configuration.
LINE_BYTES, PREDICTION_BYTES, RECORD_BYTES = 400, 600, 200_000
#: what the pinned repositories hold.
PINS = ROOT / "configs" / "pins.yaml"
#: of a tensor's name, type and place in a safetensors file, about.
HEADER_BYTES = 120


@dataclass(frozen=True)
class Disk:
    """Bytes of a run's folder.

    Attributes:
        checkpoint: one checkpoint.
        adapter: what the run has changed, as it is kept.
        peak: while it works, at most.
        kept: when its record stands.
    """

    checkpoint: int
    adapter: int
    peak: int
    kept: int


def run_disk(cfg: Any, ledger: Ledger, workload: Workload, predictions: int) -> Disk:
    """Return the disk that a run takes.

    Args:
        cfg: its configuration.
        ledger: of a training step.
        workload: of the run.
        predictions: inputs of the scored split.
    """
    adaptation = ledger.adaptation
    tensors = ledger.trained_tensors + (ledger.num_branches if ledger.written else 0)
    # In place, whole layers are kept, though of a fused one only slices change.
    kept = ledger.adapters if adaptation.kept_factors == 1 else 0  # A_k and B_k
    beside = ledger.written if adaptation.writes_weight else kept
    adapter = (ledger.trained + beside) * FLOAT + tensors * HEADER_BYTES
    state = adaptation.states * ledger.trained * FLOAT + adaptation.states * tensors * HEADER_BYTES
    if adaptation.method == "adalora":
        state += adaptation.kept_factors * (ledger.adapters * FLOAT + tensors * HEADER_BYTES)
    checkpoint = adapter + state
    kept = adapter + RECORD_BYTES + predictions * PREDICTION_BYTES
    kept += (workload.steps // cfg.trainer.log_every_steps) * LINE_BYTES
    if cfg.save_model:
        kept += (ledger.parameters + ledger.adapters) * FLOAT
    peak = kept
    if workload.steps:
        peak += CHECKPOINTS * checkpoint
        if cfg.trainer.checkpoint_rule == "best":
            peak += CHECKPOINTS * adapter
    return Disk(checkpoint, adapter, peak, kept)


def downloads(cfg: Any) -> dict[tuple[str, str], int | None]:
    """Return what a run has to download: (repository, file) to bytes, None where not known.

    Sizes are those of configs/pins.yaml; what the caches hold is left out.
    """
    wanted: dict[tuple[str, str], int | None] = {}
    model, name = cfg.model, str(cfg.model.hub_id)
    is_loaded = model.init == "pretrained" and model.get("path") is None and model.hub_id
    if is_loaded and not _is_cached(name):
        wanted |= _pinned(name, None)
    release = cfg.task.get("release") or cfg.task.get(f"release_{cfg.task.get('protocol')}")
    if cfg.task.get("source") == "hub" and release is not None:
        folder = _data_cache(cfg) / release.repository.replace("/", "--") / release.commit
        lacking = [file for file in release.files if not (folder / file).is_file()]
        wanted |= _pinned(str(release.repository), lacking) if lacking else {}
    return wanted


def _pinned(repository: str, names: Sequence[str] | None) -> dict[tuple[str, str], int | None]:
    """Return the sizes of files of a pinned repository; `names` None takes all but small ones.

    Of the small files of a model the size is often not known.
    """
    about = read_plan_file("models.yaml")["downloads"]
    found: dict[tuple[str, str], int | None] = {}
    for entry in _pins():
        if entry["repository"] == repository:
            for file, facts in entry["files"].items():
                is_wanted = names is None or any(f"/{file}".endswith(f"/{n}") for n in names)
                if is_wanted and (names is not None or file.endswith(".safetensors")):
                    size = facts["size"]
                    found[repository, file] = about.get(repository) if size is None else size
    return found or {(repository, "?"): None}


@functools.cache
def _pins() -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = yaml.safe_load(PINS.read_text(encoding="utf-8"))
    return content


def _data_cache(cfg: Any) -> Path:
    own = cfg.task.get("cache_dir")
    return expanded(platformdirs.user_cache_dir("delta_lora") if own is None else own)


def hub_cache() -> Path:
    """Return the folder of the Hugging Face hub's downloads."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return expanded(os.environ.get("HF_HUB_CACHE", f"{home}/hub"))


def _is_cached(name: str) -> bool:
    folder = hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())
