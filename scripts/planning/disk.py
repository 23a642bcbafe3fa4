"""Bytes on disk: a run's folder while it works and when its record stands, and downloads.

While a run works there are two checkpoints and, for a moment, the one that is being written; the
same number of ``best`` weights where the best epoch is kept; at the end the adapter and the
predictions beside them. When the record stands, checkpoints and ``best`` are removed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.planning.architecture import read_plan_file
from scripts.planning.ledger import FLOAT, Ledger
from scripts.planning.workload import Workload

#: checkpoints that are kept, and the one that is being written.
CHECKPOINTS = 2 + 1
#: of one line of metrics.jsonl, of one prediction, of a record with its configuration.
LINE_BYTES, PREDICTION_BYTES, RECORD_BYTES = 400, 600, 200_000
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
    beside = ledger.written if adaptation.writes_weight else ledger.updatable
    adapter = (ledger.trained + beside) * FLOAT + tensors * HEADER_BYTES
    state = adaptation.states * ledger.trained * FLOAT + adaptation.states * tensors * HEADER_BYTES
    if adaptation.method == "AdaLora":
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


def downloads(cfg: Any) -> dict[str, int | None]:
    """Return what a run has to download: repository to bytes, None where they are not known."""
    known = read_plan_file("models.yaml")["downloads"]
    wanted = []
    if cfg.model.init == "pretrained" and cfg.model.get("path") is None and cfg.model.hub_id:
        wanted.append(("models", str(cfg.model.hub_id)))
    if cfg.task.get("source") == "hub" and cfg.task.get("hub") is not None:
        wanted.append(("datasets", str(cfg.task.hub.repository)))
    return {name: known.get(name) for kind, name in wanted if not _is_cached(kind, name)}


def hub_cache() -> Path:
    """Return the folder of the Hugging Face hub's downloads."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()


def _is_cached(kind: str, name: str) -> bool:
    folder = hub_cache() / f"{kind}--{name.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())
