"""The record of a run: what it was, on what, and what came of it."""

from __future__ import annotations

import traceback
from typing import Any

from omegaconf import DictConfig

from scripts.runs import provenance
from scripts.runs.building import Built, Plan
from scripts.runs.composition import ROOT
from scripts.runs.folder import RECORD

RECORD_SCHEMA = 1


def what(cfg: DictConfig) -> dict[str, Any]:
    """Return how a run was chosen."""
    choices = cfg.choices
    return {
        "scale": choices.scale,
        "seed": cfg.seed,
        "method": choices.method,
        "recipe": choices.recipe,
    }


def settings_of(cfg: DictConfig, plan: Plan, task: Any, built: Built) -> dict[str, Any]:
    """Return what a record says of a run before its first step."""
    return {
        "schema": RECORD_SCHEMA,
        "signature": plan.folder.name,
        "group": plan.group,
        "status": "completed",
        **what(cfg),
        "task": {"name": task.name, "version": task.version, **task.provenance()},
        "model": {
            "name": cfg.model.name,
            "init": cfg.model.init,
            "hub_id": cfg.model.hub_id,
            "revision": cfg.model.revision,
            "weights_sha256": built.weights_sha256,
            "pretrained_sha256": plan.pretrained_sha256,
        },
        "parameters": built.parameters,
    }


def training_facts(
    cfg: DictConfig, built: Built, batch_size: int, result: Any, method: Any
) -> dict[str, Any]:
    """Return what a record says of the training."""
    training = {
        "steps": result.num_steps,
        "epochs": result.num_epochs,
        "examples": len(built.train),
        "batch_size": batch_size,
        "final_train_loss": result.final_train_loss if result.num_steps else None,
        "validation": result.validation,
        "checkpoint_rule": result.checkpoint_rule,
        "chosen_step": result.chosen_step,
        "skipped_steps": result.skipped_steps,
        "method": method.describe(),
        "precision": {
            "training": cfg.trainer.precision,
            "float32_matmul": cfg.trainer.matmul_precision,
            "decoding": str(next(built.model.parameters()).dtype).removeprefix("torch."),
        },
    }
    if cfg.train_fraction is not None:
        training["subset"] = {
            "fraction": cfg.train_fraction, "of": built.num_available, "seed": cfg.seed
        }  # fmt: skip
    return training


def epoch_metrics(validation: list[dict[str, float]], task: Any) -> dict[str, float]:
    """Return ``best_epoch/<metric>`` and ``last_epoch/<metric>`` where a metric selects."""
    from delta_lora.result import best_entry

    if task.selection_metric is None or not validation:
        return {}
    named = {"best_epoch": best_entry(validation, task) or {}, "last_epoch": validation[-1]}
    return {
        f"{which}/{spec.name}": entry[spec.name]
        for which, entry in named.items()
        for spec in task.metrics
        if spec.name in entry
    }


def provenance_of(model: Any) -> dict[str, Any]:
    """Return code, packages, and the device that the model is on."""
    return {
        "git": provenance.git_state(ROOT),
        "packages": provenance.packages(),
        "device": provenance.device(next(model.parameters()).device),
    }


def write_failure(cfg: DictConfig, plan: Plan, error: Exception) -> None:
    """Write the record of a run that was stopped by `error`."""
    from delta_lora import checkpoint

    record = {
        "schema": RECORD_SCHEMA,
        "signature": plan.folder.name,
        "group": plan.group,
        "status": "failed",
        **what(cfg),
        "task": {"name": cfg.choices.task},
        "error": {
            "type": type(error).__name__,
            "message": str(error) or type(error).__name__,
            "traceback": traceback.format_exc(),
        },
        "config": plan.signed,
    }
    checkpoint.write_json(plan.folder / RECORD, record)
