"""One cell of a table = one run: its identity, its state, what it starts from.

A run's folder ``outputs/<signature>/`` holds ``config.yaml``, ``metrics.jsonl``,
``predictions.jsonl``, ``record.json`` (what a repetition gives again to the bit),
``resources.json`` (seconds, memory, rates), ``checkpoints/`` and ``adapter/``. The same
configuration always has the same folder: asking again continues a killed run, or says it is done.

A run may start from another one: from the model that it pre-trained (``model.pretrain``), or from
what it trained on another task (``init_from``). Such runs are made first where they do not exist.

Planning (`compose`, `signature`, `status`) imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from delta_lora import processes
from scripts.runs import devices, provenance
from scripts.runs.building import Plan, Start, as_config_error, load_task, random_model
from scripts.runs.composition import ConfigError, check_choices, compose
from scripts.runs.execution import execute
from scripts.runs.faults import NO_DEVICE
from scripts.runs.folder import RECORD, LockedError, clear, load_record, lock
from scripts.runs.identity import (
    group,
    outputs,
    pretraining,
    run_dir,
    signature,
    signed_config,
    start,
    starts_from,
)
from scripts.runs.recording import write_failure
from scripts.runs.workers import CELLS_ON_DEVICE, COMMAND_BEGAN

__all__ = [
    "ConfigError", "LockedError", "check", "check_choices", "check_sources", "compose", "group",
    "load_record", "lock", "outputs", "prepare", "pretraining", "run", "run_dir", "signature",
    "start", "starts_from", "status", "unprepared",
]  # fmt: skip

#: settings of a method without which the weights of a run mean something else.
SHARED_WITH_START = ("rank", "alpha")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CellStatus:
    """State of a cell: done, partial, missing, stale or failed, and why."""

    state: str
    reason: str = ""


# ---------------------------------------------------------------------- state


def status(cfg: DictConfig) -> CellStatus:
    """Return whether the run of `cfg` is done, partial, missing, stale or failed."""
    folder = run_dir(cfg)
    if not (folder / RECORD).exists():
        started = (folder / "checkpoints").is_dir() or (folder / "config.yaml").exists()
        return CellStatus("partial", "started, not finished") if started else CellStatus("missing")
    record = load_record(folder)
    if record["status"] == "failed":
        return CellStatus("failed", record["error"]["message"])
    if cfg.model.pretrain is not None:
        other = pretraining(cfg)
        base = _finished(run_dir(other))
        started_from = record["model"].get("pretrained_sha256")
        if started_from is None and other.model.family == cfg.model.family:
            started_from = record["model"]["weights_sha256"]  # the same model, nothing new in it
        if base and started_from not in (None, base["model"]["saved_weights_sha256"]):
            return CellStatus("stale", "the pre-trained model was made anew since")
    if cfg.init_from is not None:
        before = start(cfg)
        base = _finished(before if isinstance(before, Path) else run_dir(before))
        if base and base["adapter_sha256"] != record["init_from"]["adapter_sha256"]:
            return CellStatus("stale", "the run that it starts from was made anew since")
    return CellStatus("done")


def _finished(folder: Path) -> dict[str, Any] | None:
    """Return the record of a completed run, or None."""
    if not (folder / RECORD).exists():
        return None
    record = load_record(folder)
    return record if record["status"] == "completed" else None


# ---------------------------------------------------------------------- one run


def check(cfg: DictConfig) -> None:
    """Check everything about `cfg` that needs no data and no weights.

    Raises:
        ConfigError: a value is not allowed; the message says which and what is.
    """
    from hydra.utils import instantiate

    folder = outputs(cfg)
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"cannot write to the output folder {folder}; choose another with paths.outputs=FOLDER"
        )
    if cfg.task.get("source") == "files" and cfg.task.get("data_dir") is None:
        raise ConfigError("task.source=files needs task.data_dir=FOLDER")
    for part in ("trainer", "task", "method"):
        with as_config_error():
            instantiate(cfg[part])
    if cfg.init_from is not None and cfg.method.get("form") == "closed_form":
        raise ConfigError(
            f"init_from={cfg.init_from} with method.form=closed_form: what the earlier run added "
            "to W would have to be written into it; use method.form=in_place"
        )
    if cfg.model.architecture is not None and cfg.model.path is None:
        _check_fits(cfg)
    _check_device(cfg)


def _check_device(cfg: DictConfig) -> None:
    """Check that a run which is made for a GPU, or whose worker was given one, can use one.

    Raises:
        ConfigError: torch sees none; the run would end up on the CPU, where it may take weeks.
    """
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


def _check_fits(cfg: DictConfig) -> None:
    """Inject the method into a model without storage: finds ranks and names that do not fit."""
    import torch
    from hydra.utils import instantiate

    with as_config_error(), torch.device("meta"):
        task = instantiate(cfg.task)
        model = random_model(cfg, task)
        instantiate(cfg.method).inject(
            model,
            projections=cfg.model.projections,
            head=task.head,
            total_steps=10**9,
            seed=cfg.seed,
        )


def check_sources(cfg: DictConfig, seen: set[str]) -> None:
    """Check that weights, tokenizer and data of a run are there or can be downloaded.

    Files are looked at, not read at length; the network is asked only for what the caches lack. The
    run that this one starts from (``init_from``) is checked too.

    Args:
        cfg: from `compose`.
        seen: what was found before is not looked for again; what is found now is added.

    Raises:
        ConfigError: something is missing; the message says what, and what to do.
    """
    from hydra.utils import instantiate

    from delta_lora.sources import check_source

    for source, revision, needs in _model_sources(cfg):
        key = f"{source}@{revision} {sorted(needs.items())}"
        if key not in seen:
            with as_config_error():
                check_source(source, revision, **needs)
            seen.add(key)
    key = provenance.signature(OmegaConf.to_container(cfg.task, resolve=True))  # type: ignore[arg-type]
    if key not in seen:
        with as_config_error(RuntimeError):  # a download that cannot be had is one
            instantiate(cfg.task).check_source()
        seen.add(key)
    if cfg.init_from is not None and isinstance(before := start(cfg), DictConfig):
        check_sources(before, seen)


def _model_sources(cfg: DictConfig) -> Iterator[tuple[str, str | None, dict[str, bool]]]:
    """Yield what a run loads: folder or hub id, revision, and what of it is needed."""
    if cfg.model.pretrain is not None:  # made by the suite itself, later
        return
    has_tokenizer = cfg.model.tokenizer_path is not None
    if has_tokenizer:
        yield str(cfg.model.tokenizer_path), None, {"model": False, "tokenizer": True}
    source = weights_source(cfg)
    if source is None or (cfg.model.init == "random" and has_tokenizer):
        return
    is_loaded = cfg.model.init != "random"
    yield *source, {"model": is_loaded, "tokenizer": not has_tokenizer}


def unprepared(cfgs: Iterable[DictConfig]) -> list[str]:
    """Return the names of the models that `prepare` would pre-train."""
    names = [
        cfg.model.name
        for cfg in cfgs
        if cfg.model.pretrain is not None and status(pretraining(cfg)).state != "done"
    ]
    return list(dict.fromkeys(names))


def prepare(cfgs: Iterable[DictConfig]) -> None:
    """Pre-train, once, the models that the runs need and that do not exist yet."""
    done = set()
    for cfg in cfgs:
        if cfg.model.pretrain is None:
            continue
        other = pretraining(cfg)
        name = signature(other)
        if name not in done:
            _ensure(other, f"pre-training {cfg.model.name} (once; kept in {run_dir(other)})")
            done.add(name)


def _ensure(cfg: DictConfig, message: str) -> None:
    """Run `cfg` unless it is done.

    Raises:
        RuntimeError: it failed earlier in the same command, which does not try it again.
    """
    now = status(cfg)
    if now.state == "done":
        return
    began = float(os.environ.get(COMMAND_BEGAN, "inf"))
    if now.state == "failed" and (run_dir(cfg) / RECORD).stat().st_mtime >= began:
        raise RuntimeError(f"the run that this one starts from failed: {now.reason}")
    logger.info(message)
    run(cfg)
    while not processes.is_main() and status(cfg).state != "done":
        time.sleep(0.2)  # the main process is still writing


def run(cfg: DictConfig, *, wait: bool = True) -> dict[str, Any]:
    """Run one cell, or continue it, or return its record if it is done.

    Args:
        cfg: from `compose`.
        wait: wait for another process in the same folder instead of failing.

    Returns:
        The record (in processes of a distributed run other than the main one: an empty dict).

    Raises:
        ConfigError: the input is wrong; nothing was written.
        LockedError: another process works in the run folder.
        Exception: whatever stopped the run; the record then says ``failed`` and why.
    """
    if status(cfg).state == "done":
        return load_record(run_dir(cfg))
    check(cfg)
    check_sources(cfg, set())  # before data are read and tokens made
    folder = run_dir(cfg)
    is_main = processes.is_main()
    with lock(folder, wait=wait) if is_main else contextlib.nullcontext():
        if status(cfg).state == "done":  # another process finished it while this one waited
            return load_record(folder)
        if status(cfg).state == "stale":
            clear(folder)
        (folder / RECORD).unlink(missing_ok=True)  # of an attempt that failed
        try:
            task = load_task(cfg)  # before anything expensive
            return execute(cfg, _plan(cfg, folder), task, is_main=is_main)
        except ConfigError:
            raise
        except Exception as error:
            if is_main:
                write_failure(cfg, _facts(cfg, folder), error)
            raise


def _plan(cfg: DictConfig, folder: Path) -> Plan:
    """Make what the run of `cfg` needs, and return what `execute` must know."""
    prepare([cfg])
    return replace(_facts(cfg, folder), start=_prepare_start(cfg))


def _facts(cfg: DictConfig, folder: Path) -> Plan:
    return Plan(
        folder=folder,
        outputs=outputs(cfg),
        group=group(cfg),
        signed=signed_config(cfg),
        source=weights_source(cfg),
        start=None,
        pretrained_sha256=_pretrained_sha256(cfg),
    )


def _pretrained_sha256(cfg: DictConfig) -> str | None:
    """Return the checksum of the weights that the suite pre-trained for `cfg`, where it did."""
    base = None if cfg.model.pretrain is None else _finished(run_dir(pretraining(cfg)))
    return None if base is None else base["model"]["saved_weights_sha256"]


def weights_source(cfg: DictConfig) -> tuple[str, str | None] | None:
    """Return folder or hub id, and revision, of the pre-trained weights; None without any."""
    if cfg.model.pretrain is not None:
        return str(run_dir(pretraining(cfg)) / "model"), None
    if cfg.model.path is not None:
        return str(Path(cfg.model.path).expanduser()), None
    return None if cfg.model.hub_id is None else (cfg.model.hub_id, cfg.model.revision)


# ---------------------------------------------------------------------- starting from another run


def _prepare_start(cfg: DictConfig) -> Start | None:
    """Make the run that `cfg` starts from if it does not exist, and check that it fits.

    Raises:
        ConfigError: it is a run of another method or model, or of another rank or alpha.
    """
    if cfg.init_from is None:
        return None
    before = start(cfg)
    if isinstance(before, DictConfig):
        _ensure(before, f"first the run that this one starts from: {run_dir(before)}")
        before = run_dir(before)
    record = _finished(before)
    if record is None:
        raise ConfigError(f"init_from: the run in {before} is not finished")
    mine = (cfg.choices.method, cfg.model.name)
    theirs = (record["method"], record["model"]["name"])
    if mine != theirs:
        raise ConfigError(
            f"init_from: the run in {before} is {' on '.join(theirs)}, this one is "
            f"{' on '.join(mine)}; a run starts from a run of the same method and model"
        )
    for key in SHARED_WITH_START:
        here, there = cfg.method.get(key), record["config"]["method"].get(key)
        if here != there:
            raise ConfigError(
                f"init_from: the run in {before} has {key}={there}, this one {here}: what it "
                f"learned would be another function here; use method.{key}={there}, or init_from="
                "TASK, which makes a start with the settings of this run"
            )
    facts = {
        "task": record["task"]["name"],
        "signature": record["signature"],
        "adapter_sha256": record["adapter_sha256"],
    }
    return Start(before, facts)
