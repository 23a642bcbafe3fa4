"""Run one cell from its configuration to its record: build, fit, predict, score, write.

What a cell is, whether it is done and what it starts from is decided in `scripts.runs.cell`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from delta_lora import processes
from scripts.runs.building import Built, Plan, build
from scripts.runs.folder import ADAPTER, RECORD, RESOURCES, load_record, predict
from scripts.runs.recording import epoch_metrics, provenance_of, settings_of, training_facts
from scripts.runs.workers import cells_on_device

logger = logging.getLogger(__name__)


def execute(cfg: DictConfig, plan: Plan, task: Any, *, is_main: bool) -> dict[str, Any]:
    """Run a cell, or continue it, and write its record; arguments and errors as `_execute`.

    The mirrors are closed however it ends: the next run of this process has its own.
    """
    mirrors: list[Any] = []
    try:
        return _execute(cfg, plan, task, mirrors, is_main=is_main)
    finally:
        for mirror in mirrors:
            with _only_warned("closing the mirror"):
                mirror.close()


@contextlib.contextmanager
def _only_warned(what: str) -> Iterator[None]:
    """Turn an error into a warning: a dashboard must not cost a run its record."""
    try:
        yield
    except Exception as error:
        logger.warning("%s failed: %s: %s", what, type(error).__name__, error)


def _execute(
    cfg: DictConfig, plan: Plan, task: Any, mirrors: list[Any], *, is_main: bool
) -> dict[str, Any]:
    """Run a cell, or continue it, and write its record.

    Args:
        cfg: from `scripts.runs.composition.compose`.
        plan: what is known about it.
        task: from `load_task`.
        mirrors: gets the loggers beside ``metrics.jsonl``.
        is_main: whether this is the main process of a distributed run, or the only one.

    Returns:
        The record; in other processes an empty dict.

    Raises:
        ConfigError: data, weights and settings do not fit.
    """
    from hydra.utils import instantiate

    from delta_lora import memory
    from delta_lora.protocols import Scores

    memory.release()  # of the run that this process made before
    trainer = instantiate(cfg.trainer)
    trainer.prepare_backend()
    method = instantiate(cfg.method)
    built = build(cfg, plan, task, trainer, method)
    _log_start(cfg, plan, built, trainer.batch_size)
    if is_main:
        OmegaConf.save(cfg, plan.folder / "config.yaml", resolve=True)
        mirrors += _mirrors(cfg, plan)

    result = trainer.fit(
        built.model,
        method=method,
        task=task,
        train=built.train,
        validation=built.validation,
        seed=cfg.seed,
        folder=plan.folder,
        mirrors=mirrors,
        identity=_identity(cfg, plan, task, built),
        score=None if task.selection_metric is None else _validation_score(task, built.tokenizer),
    )
    resources = dict(result.resources)
    began = time.monotonic()
    with method.merged(built.model) as merged:
        analysis = _similarities(built, merged) if is_main else {}
        predictions = _predict(cfg, plan, task, built, merged)
    resources["predict_time_s"] = time.monotonic() - began
    if not is_main:
        return {}
    resources["cells_on_device"] = cells_on_device()  # neighbours spoil the times
    began = time.monotonic()
    split = task.scored_split
    scores = task.score(predictions, split) if predictions else Scores({}, {})
    references = task.reference_scores(split) if cfg.score_references else {}
    resources["score_time_s"] = time.monotonic() - began

    record = {
        **settings_of(cfg, plan, task, built),
        "init_from": None if plan.start is None else plan.start.facts,
        "metrics": {**scores.values, **epoch_metrics(result.validation, task)},
        "missing_metrics": scores.missing,
        "reference_metrics": {name: found.values for name, found in references.items()},
        "cosine_similarity": analysis,
        "task_facts": task.describe(built.model, built.tokenizer),
        "training": training_facts(cfg, built, trainer.batch_size, result, method),
        "num_predictions": len(predictions),
        "adapter_sha256": _write_adapter(cfg, plan, built, method, result.chosen_step),
        "config": plan.signed,
        "provenance": provenance_of(built.model),
    }
    if cfg.save_model:
        record["model"]["saved_weights_sha256"] = _save_model(plan, built)
    _finish(plan.folder, record, resources)
    for mirror in mirrors:
        with _only_warned("mirroring the record"):
            mirror.log_record(record, plan.folder / "predictions.jsonl")
    return load_record(plan.folder)


def _identity(cfg: DictConfig, plan: Plan, task: Any, built: Built) -> dict[str, Any]:
    """Return what a checkpoint must agree on to be continued."""
    identity = {
        "base_weights_sha256": built.weights_sha256,
        "data": task.provenance(),
        "num_examples": len(built.train),
        "total_steps": built.total_steps,
    }
    if plan.start is not None:
        identity["init_from"] = plan.start.facts
    if cfg.train_fraction is not None:
        identity["train_fraction"] = cfg.train_fraction
    return identity


def _validation_score(task: Any, tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    """Return what scores a network on the validation split, each process its share of it."""

    def score(network: Any) -> dict[str, float]:
        chunks = task.predict(network, tokenizer, "validation", share=processes.share())
        own = [prediction for chunk in chunks for prediction in chunk]
        return task.score(processes.gather(own), "validation").values

    return score


def _predict(
    cfg: DictConfig, plan: Plan, task: Any, built: Built, merged: Any
) -> list[dict[str, Any]]:
    """Return the predictions of the scored split; none in processes other than the main one."""
    if not cfg.predict:
        return []
    return predict(task, merged, built.tokenizer, plan.folder, task.scored_split)


def _similarities(built: Built, merged: Any) -> Any:
    from delta_lora.analysis import similarity

    return similarity.cosine_similarities(built.originals, merged)


def _write_adapter(cfg: DictConfig, plan: Plan, built: Built, method: Any, step: int) -> str:
    """Write every parameter that the run changed; return their checksum."""
    from delta_lora import adapter_file, methods

    settings: Any = OmegaConf.to_container(cfg.method, resolve=True)
    del settings["_target_"]
    return adapter_file.write(
        (plan.folder / ADAPTER).parent,
        method.updated_tensors(built.model),
        {
            "method": methods.describe(type(method), settings),
            "seed": cfg.seed,
            "base": built.base,
            "facts": method.describe(),
            "step": step,
        },
    )


def _save_model(plan: Plan, built: Built) -> str:
    """Write the whole model with its tokenizer; return the checksum of its weights."""
    from delta_lora.models import fingerprint

    built.model.save_pretrained(plan.folder / "model")
    built.tokenizer.save_pretrained(plan.folder / "model")
    return fingerprint(built.model)


def _finish(folder: Path, record: dict[str, Any], resources: dict[str, Any]) -> None:
    """Write the record; then the checkpoints have served.

    Where a score is missing they stay, so that the run can be scored again without training.
    """
    from delta_lora import checkpoint

    checkpoint.write_json(folder / RESOURCES, resources)
    checkpoint.write_json(folder / RECORD, record)
    if not record["missing_metrics"]:
        checkpoint.remove(folder / "checkpoints")
        checkpoint.remove(folder / "best")


def _log_start(cfg: DictConfig, plan: Plan, built: Built, batch_size: int) -> None:
    parameters = built.parameters
    trainable, updatable = parameters["trainable"], parameters["updatable"]
    logger.info(
        "run %s: %s on %s, %s; trainable %s (%.3f x 2^20), updatable %s (%.3f x 2^20), base %s; "
        "%d examples, batch %d, %d steps",
        plan.folder.name, cfg.choices.method, cfg.choices.task, cfg.model.name,
        f"{trainable:,}", trainable / 2**20, f"{updatable:,}", updatable / 2**20,
        f"{parameters['total']:,}", len(built.train), batch_size, built.total_steps,
    )  # fmt: skip


def _mirrors(cfg: DictConfig, plan: Plan) -> list[Any]:
    from hydra.utils import instantiate

    if cfg.logger["_target_"] is None:
        return []
    choices = cfg.choices
    return [
        instantiate(
            cfg.logger,
            directory=plan.outputs,
            signature=plan.folder.name,
            group=plan.group,
            tags=[choices.task, choices.method, choices.scale],
            run_config=plan.signed,
            _convert_="all",
            _recursive_=False,  # what a run is made of is named in there, not to be made again
        )
    ]
