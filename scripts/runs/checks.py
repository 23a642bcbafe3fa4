"""Checks of a run before any work: its settings, its device, and what it loads.

Nothing of size is read, and what a check finds is a message that says what to change.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from delta_lora import fitting, stored
from delta_lora.checks import expanded, shown
from scripts.runs import devices
from scripts.runs.building import describe_method, random_model, weights_of
from scripts.runs.composition import ConfigError, as_config_error
from scripts.runs.faults import NO_DEVICE
from scripts.runs.meaning import hash_of, plain
from scripts.runs.run import Run
from scripts.runs.space import gib
from scripts.runs.workers import CELLS_ON_DEVICE


def check(run: Run) -> None:
    """Check everything about a run that needs no data and no weights, and that it can run here.

    Raises:
        ConfigError: a value is not allowed; the message says which and what is. Or the run needs a
            device that this process has not.
    """
    fitted = _check_settings(run)
    _check_device(run)
    if fitted is not None:
        _check_memory(run, fitted.model)
        _check_weights(fitted)


def check_settings(run: Run) -> None:
    """Check the same of a run that will be made on another machine: all but the device.

    Raises:
        ConfigError: a value is not allowed; the message says which and what is.
    """
    fitted = _check_settings(run)
    if fitted is not None:
        _check_weights(fitted)


@dataclass(frozen=True)
class _Fitted:
    """A model without storage, in which the method was injected.

    Attributes:
        model: it.
        shapes: of its parameters before that, see `fitting.shapes`.
        described: the ``config.json`` that it was built from, if it was and has weights beside it.
    """

    model: Any
    shapes: dict[str, tuple[int, ...]]
    described: Path | None


def _check_settings(run: Run) -> _Fitted | None:
    """Check settings; return the model without storage, or None where that is not known yet."""
    from hydra.utils import instantiate

    cfg = run.config
    folder = run.outputs
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"cannot write to the output folder {folder}; choose another with paths.outputs=FOLDER"
        )
    parts = {}
    for part in ("trainer", "task", "method", "logger"):
        if cfg[part]["_target_"] is not None:  # of the logger; making one begins nothing
            with as_config_error():
                parts[part] = instantiate(cfg[part])
    with as_config_error():
        describe_method(run, parts["method"])  # else a finished run could not be loaded
    family = parts["task"].family
    if family not in (None, cfg.model.family):
        raise ConfigError(
            f"model={run.choices.model} is of the family {cfg.model.family}, but "
            f"task={run.choices.task} is learned by a {family}; use "
            f"experiment={run.choices.task}, or model={family} model.path=FOLDER, or, if it is "
            f"one, write family: {family} in the model's yaml"
        )
    if cfg.init_from is not None and getattr(parts["method"], "form", None) == "closed_form":
        raise ConfigError(
            f"init_from={cfg.init_from} with method.form=closed_form: what the earlier run added "
            "to W would have to be written into it; use method.form=in_place"
        )
    if cfg.model.init != "random":
        weights_of(run)
    architecture, described = _architecture(run)
    if architecture is None:
        return None
    try:
        return _check_fits(run, architecture, described)
    except ConfigError as error:
        if described is None:
            raise
        message = str(error).replace("model.architecture.", f"{described}: ")
        message = message.replace("model.architecture", str(described))
        is_named = str(described.parent) in message
        raise ConfigError(
            message if is_named else f"{message} (of the model that {described} describes)"
        ) from error


def _architecture(run: Run) -> tuple[Any, Path | None]:
    """Return what a model is built from, where that is known before its weights are, and its file.

    Raises:
        ConfigError: the file in ``model.path`` is damaged.
    """
    model = run.config.model
    if run.pretraining is not None:
        return run.pretraining.config.model.architecture, None
    if model.path is None:
        return model.architecture, None
    described = expanded(model.path) / "config.json"
    if not described.is_file():
        return None, None  # `check_sources` says what the folder lacks
    with as_config_error():
        content = stored.read_json(described, "copy the model's folder again")
    if "model_type" not in content:
        raise ConfigError(
            f"{described} has no model_type, so that it describes no model of transformers; copy "
            "it again, or write the type (gpt2, roberta, bart, ...)"
        )
    return content, described


def _check_device(run: Run) -> None:
    """Check that a run which is made for a GPU, or whose worker was given one, can use one.

    Raises:
        ConfigError: torch sees none; the run would end up on the CPU, where it may take weeks.
    """
    cfg = run.config
    is_given = CELLS_ON_DEVICE in os.environ and os.environ.get("CUDA_VISIBLE_DEVICES")
    reasons = {
        "scale=paper": cfg.scale == "paper",
        "trainer.device=cuda": cfg.trainer.device == "cuda",
        "this worker's place on a GPU": is_given,
    }
    wanted = [reason for reason, holds in reasons.items() if holds]
    if cfg.trainer.device == "cpu" or not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        why = devices.cuda().problem or "this process sees none"
        raise ConfigError(
            f"{wanted[0]} needs a CUDA device, and {NO_DEVICE}: {why}. Use scale=tiny, or "
            "trainer.device=cpu to train on the CPU (the paper's models: weeks)"
        )


def _check_fits(run: Run, architecture: Any, described: Path | None) -> _Fitted:
    """Inject the method into a model without storage: finds ranks and names that do not fit."""
    import torch
    from hydra.utils import instantiate

    cfg = run.config
    with as_config_error(), torch.device("meta"):
        task = instantiate(cfg.task)
        model = random_model(cfg, task, architecture)
        shapes = fitting.shapes(model)
        if cfg.predict:
            task.check_model(model)
        method, most = instantiate(cfg.method), cfg.trainer.max_steps
        is_short = most is not None and (most == 0 or method.needs_total_steps)
        method.inject(
            model,
            projections=cfg.model.projections,
            head=task.head,
            total_steps=most if is_short else 10**9,
            seed=cfg.seed,
        )
    return _Fitted(model, shapes, None if cfg.model.init == "random" else described)


def _check_weights(fitted: _Fitted) -> None:
    """Compare the headers of a folder's weights with the ``config.json`` beside them.

    Raises:
        ConfigError: a parameter has another shape or is no real number, or a file is damaged.
    """
    if fitted.described is not None:
        # `check_sources` says what is missing.
        with as_config_error(), contextlib.suppress(FileNotFoundError):
            fitting.check_weights_fit(fitted.described.parent, fitted.shapes)


def _check_memory(run: Run, model: Any) -> None:
    """Check that a model, which has no storage yet, fits into this machine with its gradients.

    Raises:
        ConfigError: they do not.
    """
    import torch

    numel = sum(parameter.numel() for parameter in model.parameters())
    need = sum(p.numel() * p.element_size() * (1 + p.requires_grad) for p in model.parameters())
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        devices_have = (
            torch.cuda.get_device_properties(i).total_memory
            for i in range(torch.cuda.device_count())
        )
        have = max(have, *devices_have)
    if need > have:
        cfg = run.config.model
        key = "architecture" if cfg.path is None else "path"
        if run.pretraining is not None:
            key = "pretrain"
        raise ConfigError(
            f"model.{key}={shown(plain(cfg[key]), 300)} makes a model of {numel:.3g} parameters, "
            f"whose weights and gradients take {gib(need)}, and this machine has {gib(have)} of "
            "memory; use a smaller model or another machine"
        )


def check_sources(run: Run, seen: set[str]) -> None:
    """Check that weights, tokenizer and data of a run are there or can be downloaded.

    Files are looked at, not read at length; the network is asked only for what the caches lack. The
    run that this one starts from (``init_from``) is checked too.

    Args:
        run: the run.
        seen: what was found before is not looked for again; what is found now is added.

    Raises:
        ConfigError: something is missing; the message says what, and what to do.
    """
    from hydra.utils import instantiate

    from delta_lora.sources import check_source

    for source, revision, needs in _model_sources(run):
        key = f"{source}@{revision} {sorted(needs.items())}"
        if key not in seen:
            with as_config_error():
                check_source(source, revision, **needs)
            seen.add(key)
    key = hash_of({"task": OmegaConf.to_container(run.config.task, resolve=True)})
    if key not in seen:
        with as_config_error(RuntimeError):  # a download that cannot be had is one
            instantiate(run.config.task).check_source()
        seen.add(key)
    if run.start_run is not None:
        check_sources(run.start_run, seen)


def check_local_sources(run: Run, seen: set[str]) -> None:
    """Check as `check_sources`, but only what is in folders of this machine; no network is asked.

    Raises:
        ConfigError: a folder lacks something.
    """
    from hydra.utils import instantiate

    from delta_lora.sources import check_source, looks_local

    for source, revision, needs in _model_sources(run):
        key = f"{source} {sorted(needs.items())}"
        if looks_local(source) and key not in seen:
            with as_config_error():
                check_source(source, revision, **needs)
            seen.add(key)
    if run.config.task.get("source") == "files":
        key = hash_of({"task": OmegaConf.to_container(run.config.task, resolve=True)})
        if key not in seen:
            with as_config_error():
                instantiate(run.config.task).check_source()
            seen.add(key)


def _model_sources(run: Run) -> Iterator[tuple[str, str | None, dict[str, bool]]]:
    """Yield what a run loads: folder or hub id, revision, and what of it is needed."""
    if run.pretraining is not None:  # made by the suite itself, later
        return
    cfg = run.config
    has_tokenizer = cfg.model.tokenizer_path is not None
    if has_tokenizer:
        yield str(cfg.model.tokenizer_path), None, {"model": False, "tokenizer": True}
    source = run.weights
    if source is None or (cfg.model.init == "random" and has_tokenizer):
        return
    is_loaded = cfg.model.init != "random"
    yield *source, {"model": is_loaded, "tokenizer": not has_tokenizer}
