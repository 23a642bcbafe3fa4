"""Build what a run needs before its first step: data, tokenizer, model, method, trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scripts.runs import checksums
from scripts.runs.composition import ConfigError, as_config_error
from scripts.runs.folder import read_adapter
from scripts.runs.run import Run
from scripts.runs.starts import Start

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A run before its first step.

    Attributes:
        task: with its data.
        trainer: with the recipe's values.
        method: injected.
        start: the run it starts from, or None.
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

    task: Any
    trainer: Any
    method: Any
    start: Start | None
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


def build(run: Run, task: Any, start: Start | None) -> Built:
    """Encode the data, load the model and inject the method.

    Args:
        run: the run.
        task: from `load_task`.
        start: the run that it starts from, or None.

    Raises:
        ConfigError: data, weights and settings do not fit.
    """
    from hydra.utils import instantiate

    from delta_lora.analysis import similarity
    from delta_lora.models import fingerprint

    cfg = run.config
    trainer = instantiate(cfg.trainer)
    trainer.prepare_backend()
    method = instantiate(cfg.method)
    tokenizer = build_tokenizer(run, task)
    with as_config_error():
        train, validation = (task.examples(split, tokenizer) for split in ("train", "validation"))
        num_available = len(train)
        train = draw_rows(train, cfg.train_fraction, cfg.seed)
    total_steps = trainer.total_steps(len(train))
    with as_config_error():
        model = base_model(run, task, train)
        weights_sha256 = fingerprint(model)
        num_total = sum(p.numel() for p in model.parameters())
        originals = similarity.snapshot(model, cfg.model.projections, exclude=task.head)
        base = _describe_base(run, task, model)
        if cfg.predict:
            task.check_model(model, tokenizer)  # not only when the training is done
        method.inject(
            model,
            projections=cfg.model.projections,
            head=task.head,
            total_steps=total_steps,
            seed=cfg.seed,
        )
        if start is not None:
            _restore_start(model, start, head=task.head)
    return Built(
        task=task,
        trainer=trainer,
        method=method,
        start=start,
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


def build_tokenizer(run: Run, task: Any) -> Any:
    """Return the tokenizer of a run: the task's own, that of a folder, or that of the weights."""
    from delta_lora.models import load_tokenizer

    model = run.config.model
    with as_config_error():
        if model.init == "random" and (built := task.build_tokenizer()) is not None:
            return built
        if model.tokenizer_path is not None:
            return load_tokenizer(model.tokenizer_path, None)
        return load_tokenizer(*_checked_weights(run))


def base_model(run: Run, task: Any, train: Any) -> Any:
    """Return the model before any method: loaded, or with random weights."""
    from delta_lora.draws import seed_everything
    from delta_lora.models import load_model

    cfg = run.config
    seed_everything(cfg.seed)
    if cfg.model.init == "random":
        model = random_model(cfg, task)
        task.initialise(model, train)
        return model
    path, revision = _checked_weights(run)
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


def random_model(cfg: DictConfig, task: Any, architecture: Any = None) -> Any:
    """Return the model of `cfg` with random weights, built from its architecture or another one."""
    from delta_lora.models import load_model

    return load_model(
        cfg.model.family,
        architecture=cfg.model.architecture if architecture is None else architecture,
        dtype=cfg.model.dtype,
        dropout=cfg.model.dropout,
        config_overrides=_config_overrides(cfg, task),
        attention=cfg.model.attention,
    )


def describe_method(run: Run, method: Any) -> dict[str, Any]:
    """Return name and settings of the method of a run, from which `delta_lora.load` makes it again.

    Raises:
        TypeError: a setting is not one that can be given by name.
        ValueError: another method has the same name.
    """
    from delta_lora import methods

    settings: Any = OmegaConf.to_container(run.config.method, resolve=True)
    del settings["_target_"]
    methods.method_class(method.name)
    return methods.describe(type(method), settings)


def _describe_base(run: Run, task: Any, model: Any) -> dict[str, Any]:
    """Return how the model of a run is built before any method, for `delta_lora.load`."""
    from delta_lora.adapter_file import describe_base

    cfg = run.config
    is_random = cfg.model.init == "random"
    source, revision = (None, None) if is_random else weights_of(run)
    architecture: Any = OmegaConf.to_container(cfg.model.architecture) if is_random else None
    projections: Any = None
    if cfg.model.projections is not None:
        projections = OmegaConf.to_container(cfg.model.projections)
    return describe_base(
        model,
        projections=projections,
        head=task.head,
        name=run.model_facts["name"],
        family=cfg.model.family,
        source=source,
        revision=revision,
        architecture=architecture,
        dtype=cfg.model.dtype,
        attention=cfg.model.attention,
        config_overrides=_config_overrides(cfg, task),
    )


def weights_of(run: Run) -> tuple[str, str | None]:
    """Return folder or hub id, and revision, of the weights of a run.

    Raises:
        ConfigError: its model has none.
    """
    if run.weights is None:
        raise ConfigError(
            f"model={run.config.model.name} has no weights; set model.path=FOLDER, or "
            "model.hub_id=NAME and model.revision=COMMIT"
        )
    return run.weights


def _checked_weights(run: Run) -> tuple[str, str | None]:
    """Return `weights_of` a run; of a model that the suite pre-trained every file is compared.

    Raises:
        UnreadableError: one is not the file that the pre-training wrote.
    """
    if run.pretraining is not None:
        checksums.check_files(run.pretraining.folder, [checksums.MODEL])
    return weights_of(run)


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
