"""Run one cell from its configuration to its record: build, fit, predict, score, write.

What a cell is, whether it is done and what it starts from is decided in `scripts.runs.cell`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from delta_lora import processes, provenance
from scripts.runs.composition import ROOT, ConfigError
from scripts.runs.folder import (
    ADAPTER,
    RECORD,
    RESOURCES,
    load_record,
    predict,
    read_adapter,
)
from scripts.runs.workers import cells_on_device

RECORD_SCHEMA = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The run that another one starts from: its folder, and what the record says of it."""

    folder: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What `scripts.runs.cell` has decided about a run.

    Attributes:
        folder: its run folder; the last part is its signature.
        outputs: folder of all run folders.
        group: signature without the seed.
        signed: what the signature is a hash of.
        source: hub id or folder, and revision, of the pre-trained weights; None without any.
        start: the run it starts from, or None.
        pretrained_sha256: checksum of the weights that the suite pre-trained for it, or None.
    """

    folder: Path
    outputs: Path
    group: str
    signed: dict[str, Any]
    source: tuple[str, str | None] | None
    start: Start | None
    pretrained_sha256: str | None


@contextlib.contextmanager
def as_config_error(*more: type[Exception]) -> Iterator[None]:
    """Turn what a constructor or a loader says about the user's input into a ConfigError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, TypeError, OSError, *more)):
            raise ConfigError(str(error)) from error
        if type(error).__module__.startswith("hydra") and error.__cause__ is not None:
            raise ConfigError(str(error.__cause__)) from error
        raise


def load_task(cfg: DictConfig) -> Any:
    """Return the task of a run with its data read and checked.

    Raises:
        ConfigError: the data are not there or wrong.
    """
    from hydra.utils import instantiate

    task = instantiate(cfg.task)
    with as_config_error(RuntimeError):  # a download that fails is one
        task.load()
    return task


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


@dataclass(frozen=True)
class Built:
    """A run before its first step.

    Attributes:
        tokenizer: of the model.
        train: encoded training examples that are used.
        num_available: training examples that there are.
        validation: encoded validation examples.
        model: with the method injected.
        originals: W_Q and W_V before training.
        base: how the model is built before any method, for `delta_lora.load`.
        weights_sha256: checksum of the model before the method.
        parameters: counts: trainable, updatable, of the head, in total.
        total_steps: optimiser steps of the run.
    """

    tokenizer: Any
    train: Sequence[Any]
    num_available: int
    validation: Sequence[Any]
    model: Any
    originals: Any
    base: dict[str, Any]
    weights_sha256: str
    parameters: dict[str, int]
    total_steps: int


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
    built = _build(cfg, plan, task, trainer, method)
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
        predictions = (
            predict(task, merged, built.tokenizer, plan.folder, task.scored_split)
            if cfg.predict
            else []
        )
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
        **_settings_of(cfg, plan, task, built),
        "init_from": None if plan.start is None else plan.start.facts,
        "metrics": {**scores.values, **_epoch_metrics(result.validation, task)},
        "missing_metrics": scores.missing,
        "reference_metrics": {name: found.values for name, found in references.items()},
        "cosine_similarity": analysis,
        "task_facts": task.describe(built.model, built.tokenizer),
        "training": _training(cfg, built, trainer.batch_size, result, method),
        "num_predictions": len(predictions),
        "adapter_sha256": _write_adapter(cfg, plan, built, method, result.chosen_step),
        "config": plan.signed,
        "provenance": _provenance(built.model),
    }
    if cfg.save_model:
        record["model"]["saved_weights_sha256"] = _save_model(plan, built)
    _finish(plan.folder, record, resources)
    for mirror in mirrors:
        with _only_warned("mirroring the record"):
            mirror.log_record(record, plan.folder / "predictions.jsonl")
    return load_record(plan.folder)


def _build(cfg: DictConfig, plan: Plan, task: Any, trainer: Any, method: Any) -> Built:
    """Encode the data, load the model and inject the method."""
    from delta_lora.analysis import similarity
    from delta_lora.models import fingerprint

    tokenizer = build_tokenizer(cfg, task, plan.source)
    train, validation = (task.examples(split, tokenizer) for split in ("train", "validation"))
    num_available = len(train)
    with as_config_error():
        train = draw_rows(train, cfg.train_fraction, cfg.seed)
    total_steps = trainer.total_steps(len(train))
    with as_config_error():
        model = base_model(cfg, task, train, plan.source)
        weights_sha256 = fingerprint(model)
        num_total = sum(p.numel() for p in model.parameters())
        originals = similarity.snapshot(model, cfg.model.projections, exclude=task.head)
        base = _describe_base(cfg, plan, task, model)
        method.inject(
            model,
            projections=cfg.model.projections,
            head=task.head,
            total_steps=total_steps,
            seed=cfg.seed,
        )
        if plan.start is not None:
            _restore_start(model, plan.start, head=task.head)
    return Built(
        tokenizer=tokenizer,
        train=train,
        num_available=num_available,
        validation=validation,
        model=model,
        originals=originals,
        base=base,
        weights_sha256=weights_sha256,
        parameters=_count_parameters(model, method, task, num_total),
        total_steps=total_steps,
    )


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


def _similarities(built: Built, merged: Any) -> Any:
    from delta_lora.analysis import similarity

    return similarity.cosine_similarities(built.originals, merged)


def _settings_of(cfg: DictConfig, plan: Plan, task: Any, built: Built) -> dict[str, Any]:
    """Return what a record says of a run before its first step."""
    return {
        "schema": RECORD_SCHEMA,
        "signature": plan.folder.name,
        "group": plan.group,
        "status": "completed",
        **_what(cfg),
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


def _training(
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


def _provenance(model: Any) -> dict[str, Any]:
    return {
        "git": provenance.git_state(ROOT),
        "packages": provenance.packages(),
        "device": provenance.device(next(model.parameters()).device),
    }


def _write_adapter(cfg: DictConfig, plan: Plan, built: Built, method: Any, step: int) -> str:
    """Write every parameter that the run changed; return their checksum."""
    from delta_lora import adapter

    return adapter.write(
        (plan.folder / ADAPTER).parent,
        method.updated_tensors(built.model),
        {
            "method": OmegaConf.to_container(cfg.method, resolve=True),
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


def draw_rows(examples: Sequence[Any], fraction: float | None, seed: int) -> Sequence[Any]:
    """Return a random share of `examples`, in their order; None returns all.

    Args:
        examples: encoded training examples.
        fraction: share that is kept, above 0 and at most 1; rounded up, so at least one row.
        seed: of the draw; with one seed a smaller share lies within a larger one.

    Raises:
        ValueError: the fraction is not allowed.
    """
    import torch

    from delta_lora.checks import check_real

    if fraction is None:
        return examples
    check_real("train_fraction", fraction, above=0, at_most=1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    kept = sorted(order[: max(1, math.ceil(fraction * len(examples) - 1e-9))])
    return [examples[i] for i in kept]


def build_tokenizer(cfg: DictConfig, task: Any, source: tuple[str, str | None] | None) -> Any:
    """Return the tokenizer of a run: the task's own, that of a folder, or that of the weights."""
    from delta_lora.models import load_tokenizer

    if cfg.model.init == "random" and (built := task.build_tokenizer()) is not None:
        return built
    if cfg.model.tokenizer_path is not None:
        source = cfg.model.tokenizer_path, None
    with as_config_error():
        return load_tokenizer(*_known(cfg, source))


def base_model(
    cfg: DictConfig, task: Any, train: Any, source: tuple[str, str | None] | None
) -> Any:
    """Return the model before any method: loaded, or with random weights."""
    from delta_lora.draws import seed_everything
    from delta_lora.models import load_model

    seed_everything(cfg.seed)
    if cfg.model.init == "random":
        model = random_model(cfg, task)
        task.initialise(model, train)
        return model
    path, revision = _known(cfg, source)
    return load_model(
        cfg.model.family,
        source=path,
        revision=revision,
        dtype=cfg.model.dtype,
        dropout=cfg.model.dropout,
        config_overrides=_config_overrides(cfg, task),
        attention=cfg.model.attention,
        new_modules=task.head,
    )


def _describe_base(cfg: DictConfig, plan: Plan, task: Any, model: Any) -> dict[str, Any]:
    """Return how the model of a run is built before any method, for `delta_lora.load`."""
    from delta_lora.adapter import describe_base

    is_random = cfg.model.init == "random"
    source, revision = (None, None) if is_random else _known(cfg, plan.source)
    architecture: Any = OmegaConf.to_container(cfg.model.architecture) if is_random else None
    projections: Any = None
    if cfg.model.projections is not None:
        projections = OmegaConf.to_container(cfg.model.projections)
    return describe_base(
        model,
        projections=projections,
        head=task.head,
        family=cfg.model.family,
        source=source,
        revision=revision,
        architecture=architecture,
        dtype=cfg.model.dtype,
        attention=cfg.model.attention,
        config_overrides=_config_overrides(cfg, task),
    )


def _known(cfg: DictConfig, source: tuple[str, str | None] | None) -> tuple[str, str | None]:
    if source is None:
        raise ConfigError(f"model={cfg.model.name} has no weights; set model.path=FOLDER")
    return source


def random_model(cfg: DictConfig, task: Any) -> Any:
    """Return the model of `cfg` built from its architecture, with random weights."""
    from delta_lora.models import load_model

    return load_model(
        cfg.model.family,
        architecture=cfg.model.architecture,
        dtype=cfg.model.dtype,
        dropout=cfg.model.dropout,
        config_overrides=_config_overrides(cfg, task),
        attention=cfg.model.attention,
    )


def _config_overrides(cfg: DictConfig, task: Any) -> dict[str, Any]:
    """Return the configuration values of the model, and those that the task's head needs."""
    overrides: Any = OmegaConf.to_container(cfg.model.config_overrides)
    return {**overrides, **task.model_config}


def _count_parameters(model: Any, method: Any, task: Any, num_total: int) -> dict[str, int]:
    from delta_lora.projections import head_parameters

    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "updatable": method.num_updatable_parameters,
        "head": sum(p.numel() for p in head_parameters(model, task.head).values()),
        "total": num_total,
    }


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
        )
    ]


def _what(cfg: DictConfig) -> dict[str, Any]:
    choices = cfg.choices
    return {
        "scale": choices.scale,
        "seed": cfg.seed,
        "method": choices.method,
        "recipe": choices.recipe,
    }


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


def _restore_start(model: Any, before: Start, *, head: tuple[str, ...]) -> None:
    """Load what the earlier run changed, but for its head, which belongs to its own task.

    microsoft/LoRA's scripts for MRPC, RTE and STS-B do so with an adapter trained on MNLI.
    """
    from delta_lora import checkpoint

    tensors = {
        name: tensor
        for name, tensor in read_adapter(before.folder).items()
        if not any(name.startswith(f"{module}.") for module in head)
    }
    try:
        checkpoint.restore_weights(model, tensors)
    except RuntimeError as error:
        raise ConfigError(f"init_from: {before.folder} does not fit this run: {error}") from error
    logger.info(
        "starting from run %s (%s): %d tensors, head left out",
        before.folder.name, before.facts["task"], len(tensors),
    )  # fmt: skip


def write_failure(cfg: DictConfig, plan: Plan, error: Exception) -> None:
    """Write the record of a run that was stopped by `error`."""
    from delta_lora import checkpoint

    record = {
        "schema": RECORD_SCHEMA,
        "signature": plan.folder.name,
        "group": plan.group,
        "status": "failed",
        **_what(cfg),
        "task": {"name": cfg.choices.task},
        "error": {
            "type": type(error).__name__,
            "message": str(error) or type(error).__name__,
            "traceback": traceback.format_exc(),
        },
        "config": plan.signed,
    }
    checkpoint.write_json(plan.folder / RECORD, record)
