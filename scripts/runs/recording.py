"""The record of a run: what it was, on what, and what came of it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from delta_lora.result import PrunedError
from scripts.runs import provenance
from scripts.runs.building import Built
from scripts.runs.checksums import RECORD, SCHEMA
from scripts.runs.composition import ROOT
from scripts.runs.run import Run, completed

#: of a configuration what is of this machine or this call alone.
NOT_RECORDED = ("logger", "paths", "overrides", "part_of")


@dataclass(frozen=True)
class Scored:
    """What a trained model does.

    Attributes:
        scores: of the scored split.
        references: what needs no model, by name.
        item_spread: from `scripts.runs.item_spread.measure`; None without predictions.
        similarity: of every adapted projection to what it was before training.
        num_predictions: number of predictions that were scored.
        resources: seconds.
    """

    scores: Any
    references: dict[str, Any]
    item_spread: dict[str, Any] | None
    similarity: dict[str, float]
    num_predictions: int
    resources: dict[str, float]


def record_of(
    run: Run, built: Built, fitted: Any, scored: Scored, own: Sequence[dict[str, str]] = ()
) -> dict[str, Any]:
    """Return the record of a finished run, all but what it wrote.

    Args:
        run: the run.
        built: what it was made of.
        fitted: what came of the training (`delta_lora.result.FitResult`).
        scored: what the trained model does.
        own: files that it used and that are not committed, from `own_files`.
    """
    task = built.task
    return {
        **_identity(run),
        "status": "completed",
        "task": {"name": task.name, "version": task.version, **task.provenance()},
        "model": {
            **run.model_facts,
            "weights_sha256": built.weights_sha256,
            "pretrained_sha256": _pretrained_sha256(run),
        },
        "parameters": built.parameters,
        "init_from": None if built.start is None else built.start.facts,
        "metrics": {**scored.scores.values, **_epoch_metrics(fitted.validation, task)},
        "missing_metrics": scored.scores.missing,
        "reference_metrics": {name: found.values for name, found in scored.references.items()},
        "cosine_similarity": scored.similarity,
        "task_facts": task.describe(built.model, built.tokenizer),
        "training": _training_facts(run, built, fitted),
        "num_predictions": scored.num_predictions,
        "config": config_of(run),
        "provenance": _provenance_of(built.model, own),
    }


def write_failure(run: Run, error: Exception) -> None:
    """Write the record of a run that was stopped by `error`, where the disk takes it."""
    from delta_lora import checkpoint, stored

    record = {
        **_identity(run),
        "status": "failed",
        "task": {"name": run.choices.task},
        "error": {
            "type": type(error).__name__,
            "message": str(error) or type(error).__name__,
            "traceback": traceback.format_exc(),
        },
        "config": config_of(run),
    }
    with contextlib.suppress(OSError):  # which would hide the error that stopped the run
        checkpoint.write_json(run.folder / RECORD, stored.sealed(record))


def write_pruned(run: Run, stop: PrunedError) -> dict[str, Any]:
    """Write and return the record of a run that was given up at an evaluation; it may go on."""
    from delta_lora import checkpoint, stored

    start = completed(run.start.folder if isinstance(run.start, Run) else run.start)
    record = stored.sealed(
        {
            **_identity(run),
            "status": "pruned",
            "task": {"name": run.choices.task},
            "model": {"name": run.config.model.name, "pretrained_sha256": _pretrained_sha256(run)},
            "init_from": None if start is None else {"adapter_sha256": start["adapter_sha256"]},
            "pruned": {"step": stop.step, "of": stop.total_steps, "reason": stop.reason},
            "training": {"steps": stop.step, "validation": stop.result.validation},
            "config": config_of(run),
        }
    )
    checkpoint.write_json(run.folder / RECORD, record)
    return record


def config_of(run: Run) -> dict[str, Any]:
    """Return the configuration of a run as plain JSON values, all but `NOT_RECORDED`."""
    content: Any = OmegaConf.to_container(run.config, resolve=True)
    return {key: value for key, value in content.items() if key not in NOT_RECORDED}


def _identity(run: Run) -> dict[str, Any]:
    """Return which run it is, and how it was chosen."""
    choices = run.choices
    return {
        "schema": SCHEMA,
        "signature": run.name,
        "group": run.group,
        "meaning": run.meaning,
        "scale": choices.scale,
        "seed": run.seed,
        "method": choices.method,
        "recipe": choices.recipe,
    }


def _pretrained_sha256(run: Run) -> str | None:
    """Return the checksum of the weights that the suite pre-trained for a run, where it did."""
    made = None if run.pretraining is None else run.pretraining.completed()
    return None if made is None else made["model"]["saved_weights_sha256"]


def _training_facts(run: Run, built: Built, fitted: Any) -> dict[str, Any]:
    """Return what a record says of the training."""
    cfg = run.config
    training = {
        "steps": fitted.num_steps,
        "epochs": fitted.num_epochs,
        "examples": len(built.train),
        "batch_size": built.trainer.batch_size,
        "final_train_loss": fitted.final_train_loss if fitted.num_steps else None,
        "validation": fitted.validation,
        "checkpoint_rule": fitted.checkpoint_rule,
        "chosen_step": fitted.chosen_step,
        "skipped_steps": fitted.skipped_steps,
        "method": built.method.describe(),
        "precision": {
            "training": cfg.trainer.precision,
            "float32_matmul": cfg.trainer.matmul_precision,
            "decoding": str(next(built.model.parameters()).dtype).removeprefix("torch."),
        },
    }
    if fitted.is_unchanged:
        training["unchanged"] = True
    if cfg.train_fraction is not None:
        training["subset"] = {
            "fraction": cfg.train_fraction, "of": built.num_available, "seed": cfg.seed
        }  # fmt: skip
    return training


def _epoch_metrics(validation: list[dict[str, float]], task: Any) -> dict[str, float]:
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


def _provenance_of(model: Any, own: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Return code, packages, and the device that the model is on."""
    git = provenance.git_state(ROOT)
    if own:  # the commit lacks what was used
        git |= {"dirty": True, "untracked": list(own)}
    return {
        "git": git,
        "packages": provenance.packages(),
        "device": provenance.device(next(model.parameters()).device),
    }
