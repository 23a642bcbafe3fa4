"""One cell of a table = one run: compose, check, build, fit, predict, score, write the record.

A run's folder ``outputs/<signature>/`` holds ``config.yaml``, ``metrics.jsonl``,
``predictions.jsonl``, ``record.json`` (what a repetition gives again to the bit),
``resources.json`` (seconds, memory, rates), ``checkpoints/`` and ``adapter/``. The same
configuration always has the same folder: asking again continues a killed run, or says it is done.

Planning (`compose`, `signature`, `status`) imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from delta_lora import provenance

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
GROUPS = ("task", "recipe", "model", "method", "trainer", "logger", "scale")
RECORD_SCHEMA = 1
#: what cannot change a result and is left out of the signature.
NOT_SIGNED = ("logger", "choices.logger", "paths", "trainer.checkpoint_every_steps")

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """The run cannot start as asked; the message says what to change."""


class LockedError(RuntimeError):
    """Another process works in the same run folder."""


@dataclass(frozen=True)
class CellStatus:
    """State of a cell: done, partial, missing, stale or failed, and why."""

    state: str
    reason: str = ""


def _scaled_alpha(alpha: float, update_ratio: float) -> float:
    """Return alpha x (1 + lambda): the LoRA that Delta-LoRA equals under Adam with K = -1."""
    return float(alpha) * (1.0 + float(update_ratio))


OmegaConf.register_new_resolver("scaled_alpha", _scaled_alpha, replace=True)


# ---------------------------------------------------------------------- configuration


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of one run.

    Args:
        overrides: Hydra overrides such as ``method=lora`` or ``trainer.max_steps=200``.

    Raises:
        ConfigError: an unknown group member or key (with near matches), or a bad value.
    """
    overrides = list(overrides)
    check_choices(overrides)
    try:
        with contextlib.ExitStack() as stack:
            if not GlobalHydra.instance().is_initialized():
                stack.enter_context(initialize_config_dir(str(CONFIGS), version_base="1.3"))
            cfg = hydra_compose("train", overrides, return_hydra_config=True)
        choices = {group: cfg.hydra.runtime.choices[group] for group in GROUPS}
        with open_dict(cfg):
            del cfg["hydra"]
            cfg.choices = choices
        OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    if isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise ConfigError(f"seed={cfg.seed!r} must be an integer of 0 or more")
    return cfg


def check_choices(overrides: Iterable[str]) -> None:
    """Check group members and option names of `overrides` before Hydra sees them.

    Raises:
        ConfigError: unknown member of a group; near matches and the list are named.
    """
    for override in overrides:
        group, separator, value = override.partition("=")
        if not separator or group not in GROUPS:
            continue
        known = options(group)
        for name in value.split(","):
            if name not in known:
                raise ConfigError(
                    f"unknown {group} {name!r}.{_near(name, known)} Known: {', '.join(known)}"
                )


def options(group: str) -> list[str]:
    """Return the members of a configuration group, for example all methods."""
    folder = CONFIGS / group
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def _explain(error: Exception) -> str:
    """Return a message for a composition error, with near matches for an unknown key."""
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(str(cause).strip())
        cause = cause.__cause__
    message = "; ".join(dict.fromkeys(line for text in causes for line in text.split("\n") if line))
    unknown = re.search(r"Could not override '([\w.]+)'", message)
    if unknown:
        parent, _, key = unknown.group(1).rpartition(".")
        with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
            if not GlobalHydra.instance().is_initialized():
                stack.enter_context(initialize_config_dir(str(CONFIGS), version_base="1.3"))
            node = OmegaConf.select(hydra_compose("train"), parent) if parent else None
            known = list(node) if isinstance(node, DictConfig) else list(GROUPS)
            return f"unknown key {unknown.group(1)!r}.{_near(key, known)} Known: {', '.join(known)}"
    return message


# ---------------------------------------------------------------------- identity


def signed_config(cfg: DictConfig) -> dict[str, Any]:
    """Return what a run's result depends on, as plain JSON values.

    Paths are replaced by checksums of what stands there, and a model that the suite pre-trains by
    the signature of that run; so a signature is the same on every machine.

    Raises:
        ConfigError: a folder named in the configuration does not exist.
    """
    content: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    for key in NOT_SIGNED:
        node, *rest = key.split(".")
        target = content if not rest else content[node]
        target.pop(rest[0] if rest else node, None)
    if cfg.task.get("data_dir") is not None:
        content["task"]["data_dir"] = _folder_checksum("task.data_dir", cfg.task.data_dir)
    for key in ("path", "tokenizer_path"):
        if cfg.model.get(key) is not None:
            content["model"][key] = _folder_checksum(f"model.{key}", cfg.model[key])
    if cfg.model.pretrain is not None:
        content["model"]["pretrain"] = signature(pretraining(cfg))
    return content


def signature(cfg: DictConfig) -> str:
    """Return the name of a run: 12 hex digits."""
    return provenance.signature(signed_config(cfg))


def group(cfg: DictConfig) -> str:
    """Return the signature without the seed: what the runs of one table cell share."""
    return provenance.signature({**signed_config(cfg), "seed": None})


def run_dir(cfg: DictConfig) -> Path:
    """Return the folder of a run."""
    return outputs(cfg) / signature(cfg)


def outputs(cfg: DictConfig) -> Path:
    """Return the folder of all run folders."""
    return ROOT / "outputs" if cfg.paths.outputs is None else Path(cfg.paths.outputs)


def pretraining(cfg: DictConfig) -> DictConfig:
    """Return the configuration of the run that pre-trains the model of `cfg`."""
    other = _pretraining(tuple(cfg.model.pretrain)).copy()
    other.paths = cfg.paths
    return other


@functools.cache
def _pretraining(overrides: tuple[str, ...]) -> DictConfig:
    return compose([*overrides, "save_model=true", "predict=false", "logger=none"])


_CHECKSUMS: dict[tuple[str, float], str] = {}


def _folder_checksum(key: str, path: str) -> str:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{key}={path}: no such folder (looked in {folder.resolve()})")
    newest = max((p.stat().st_mtime for p in folder.iterdir()), default=0.0)
    cache_key = (str(folder.resolve()), newest)
    if cache_key not in _CHECKSUMS:
        _CHECKSUMS[cache_key] = provenance.sha256_folder(folder)
    return f"sha256:{_CHECKSUMS[cache_key]}"


# ---------------------------------------------------------------------- state


def status(cfg: DictConfig) -> CellStatus:
    """Return whether the run of `cfg` is done, partial, missing, stale or failed."""
    folder = run_dir(cfg)
    record_file = folder / "record.json"
    if not record_file.exists():
        started = (folder / "checkpoints").is_dir() or (folder / "config.yaml").exists()
        return CellStatus("partial", "started, not finished") if started else CellStatus("missing")
    record = json.loads(record_file.read_text(encoding="utf-8"))
    if record["status"] == "failed":
        return CellStatus("failed", record["error"]["message"])
    if cfg.model.pretrain is not None:
        base = run_dir(pretraining(cfg)) / "record.json"
        if base.exists():
            weights = json.loads(base.read_text(encoding="utf-8"))["model"]["saved_weights_sha256"]
            if weights != record["model"]["weights_sha256"]:
                return CellStatus("stale", "the pre-trained model was made anew since")
    return CellStatus("done")


def load_record(folder: Path) -> dict[str, Any]:
    """Return a run's record with its resources under ``resources``."""
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    resources = folder / "resources.json"
    if resources.exists():
        record["resources"] = json.loads(resources.read_text(encoding="utf-8"))
    return record


@contextlib.contextmanager
def lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the run folder for this process.

    Raises:
        LockedError: another process holds it and `wait` is False.
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(
            f"cannot write to the output folder {folder}: {error.strerror}; "
            "choose another with paths.outputs=FOLDER"
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            if not wait:
                raise LockedError(
                    f"process {owner} is already working in {folder}; wait for it, or stop it"
                ) from None
            logger.info("waiting for process %s, which works in %s", owner, folder)
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        stream.truncate()
        stream.write(str(os.getpid()))
        stream.flush()
        yield


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
        with _as_config_error():
            instantiate(cfg[part])
    if cfg.model.architecture is not None and cfg.model.path is None:
        _check_fits(cfg)


def _check_fits(cfg: DictConfig) -> None:
    """Inject the method into a model without storage: finds ranks and names that do not fit."""
    import torch
    from hydra.utils import instantiate

    with _as_config_error(), torch.device("meta"):
        model = _random_model(cfg)
        instantiate(cfg.method).inject(
            model, projections=cfg.model.projections, head=(), total_steps=10**9, seed=cfg.seed
        )


@contextlib.contextmanager
def _as_config_error(*more: type[Exception]) -> Iterator[None]:
    """Turn what a constructor or a loader says about the user's input into a ConfigError."""
    try:
        yield
    except (ValueError, TypeError, OSError, *more) as error:
        raise ConfigError(str(error)) from error
    except Exception as error:
        if type(error).__module__.startswith("hydra") and error.__cause__ is not None:
            raise ConfigError(str(error.__cause__)) from error
        raise


def prepare(cfgs: Iterable[DictConfig]) -> None:
    """Pre-train, once, the models that the runs need and that do not exist yet."""
    done = set()
    for cfg in cfgs:
        if cfg.model.pretrain is None:
            continue
        other = pretraining(cfg)
        name = signature(other)
        if name not in done:
            if status(other).state != "done":
                logger.info("pre-training %s (once; kept in %s)", cfg.model.name, run_dir(other))
                run(other, wait=True)
                while not _is_main() and status(other).state != "done":
                    time.sleep(0.2)  # the main process is still writing the weights
            done.add(name)


def run(cfg: DictConfig, *, wait: bool = False) -> dict[str, Any]:
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
    folder = run_dir(cfg)
    is_main = _is_main()
    with lock(folder, wait=wait) if is_main else contextlib.nullcontext():
        if status(cfg).state == "done":  # another process finished it while this one waited
            return load_record(folder)
        if status(cfg).state == "stale":
            _clear(folder)
        (folder / "record.json").unlink(missing_ok=True)  # of an attempt that failed
        try:
            return _run(cfg, folder, is_main)
        except ConfigError:
            raise
        except Exception as error:
            if is_main:
                _write_failure(cfg, folder, error)
            raise


def _is_main() -> bool:
    """Return whether this is the main process of a distributed run, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def _run(cfg: DictConfig, folder: Path, is_main: bool) -> dict[str, Any]:
    from hydra.utils import instantiate

    from delta_lora import checkpoint
    from delta_lora import trainer as training
    from delta_lora.models import fingerprint

    trainer = instantiate(cfg.trainer)
    trainer.prepare_backend()
    task, method = instantiate(cfg.task), instantiate(cfg.method)
    with _as_config_error(RuntimeError):  # a download that fails is one
        task.load()
    prepare([cfg])
    tokenizer = _tokenizer(cfg, task)
    train, validation = (task.examples(split, tokenizer) for split in ("train", "validation"))
    total_steps = trainer.total_steps(len(train))
    training.seed_everything(cfg.seed)
    with _as_config_error():
        model = _model(cfg, task)
        weights_sha256 = fingerprint(model)
        num_total = sum(p.numel() for p in model.parameters())
        method.inject(
            model,
            projections=cfg.model.projections,
            head=task.head,
            total_steps=total_steps,
            seed=cfg.seed,
        )
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = {
        "trainable": num_trainable,
        "updatable": method.num_updatable_parameters,
        "total": num_total,
    }
    logger.info(
        "run %s: %s on %s, %s; trainable %s (%.3f x 2^20), updatable %s (%.3f x 2^20), base %s; "
        "%d examples, batch %d, %d steps",
        folder.name, cfg.choices.method, cfg.choices.task, cfg.model.name,
        f"{num_trainable:,}", num_trainable / 2**20,
        f"{method.num_updatable_parameters:,}", method.num_updatable_parameters / 2**20,
        f"{num_total:,}", len(train), trainer.batch_size, total_steps,
    )  # fmt: skip
    if is_main:
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    mirrors = _mirrors(cfg, folder) if is_main else []
    identity = {
        "base_weights_sha256": weights_sha256,
        "data": task.provenance(),
        "num_examples": len(train),
        "total_steps": total_steps,
    }
    result = trainer.fit(
        model,
        method=method,
        task=task,
        train=train,
        validation=validation,
        seed=cfg.seed,
        folder=folder,
        mirrors=mirrors,
        identity=identity,
    )
    if not is_main:
        return {}
    resources = dict(result.resources)

    start = time.monotonic()
    with method.merged(model) as merged:
        predictions = _predict(task, merged, tokenizer, folder) if cfg.predict else []
    resources["predict_time_s"] = time.monotonic() - start
    start = time.monotonic()
    scores = task.score(predictions, "test") if predictions else None
    references = task.reference_scores("test") if cfg.score_references else None
    resources["score_time_s"] = time.monotonic() - start

    changed = method.updated_tensors(model)
    _write_adapter(cfg, folder, changed, method.describe())
    record = {
        "schema": RECORD_SCHEMA,
        "signature": folder.name,
        "group": group(cfg),
        "status": "completed",
        **_what(cfg),
        "task": {"name": task.name, "version": task.version, **task.provenance()},
        "model": {
            "name": cfg.model.name,
            "init": cfg.model.init,
            "hub_id": cfg.model.hub_id,
            "revision": cfg.model.revision,
            "weights_sha256": weights_sha256,
        },
        "parameters": parameters,
        "metrics": scores.values if scores else {},
        "missing_metrics": scores.missing if scores else {},
        "reference_metrics": references.values if references else {},
        "training": {
            "steps": result.num_steps,
            "epochs": result.num_epochs,
            "examples": len(train),
            "batch_size": trainer.batch_size,
            "final_train_loss": result.final_train_loss if result.num_steps else None,
            "validation": result.validation,
            "checkpoint_rule": result.checkpoint_rule,
            "chosen_step": result.chosen_step,
            "skipped_steps": result.skipped_steps,
            "method": method.describe(),
        },
        "num_predictions": len(predictions),
        "config": signed_config(cfg),
        "provenance": {
            "git": provenance.git_state(ROOT),
            "packages": provenance.packages(),
            "device": provenance.device(),
        },
    }
    if cfg.save_model:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        record["model"]["saved_weights_sha256"] = fingerprint(model)
    checkpoint.write_json(folder / "resources.json", resources)
    checkpoint.write_json(folder / "record.json", record)
    for mirror in mirrors:
        mirror.log_record(record, folder / "predictions.jsonl")
        mirror.close()
    return load_record(folder)


def _tokenizer(cfg: DictConfig, task: Any) -> Any:
    from delta_lora.models import load_tokenizer

    if hasattr(task, "build_tokenizer") and cfg.model.init == "random":
        return task.build_tokenizer()
    source, revision = _source(cfg)
    if cfg.model.tokenizer_path is not None:
        source, revision = cfg.model.tokenizer_path, None
    with _as_config_error():
        return load_tokenizer(source, revision)


def _model(cfg: DictConfig, task: Any) -> Any:
    from delta_lora.models import load_model

    if cfg.model.init == "random":
        return _random_model(cfg)
    source, revision = _source(cfg)
    return load_model(
        cfg.model.family,
        source=source,
        revision=revision,
        dtype=cfg.model.dtype,
        dropout=cfg.model.dropout,
        config_overrides=OmegaConf.to_container(cfg.model.config_overrides),
        attention=cfg.model.attention,
    )


def _random_model(cfg: DictConfig) -> Any:
    from delta_lora.models import load_model

    return load_model(
        cfg.model.family,
        architecture=cfg.model.architecture,
        dtype=cfg.model.dtype,
        dropout=cfg.model.dropout,
        config_overrides=OmegaConf.to_container(cfg.model.config_overrides),
        attention=cfg.model.attention,
    )


def _source(cfg: DictConfig) -> tuple[str, str | None]:
    """Return folder or hub id, and revision, of the pre-trained weights."""
    if cfg.model.pretrain is not None:
        return str(run_dir(pretraining(cfg)) / "model"), None
    if cfg.model.path is not None:
        return str(Path(cfg.model.path).expanduser()), None
    if cfg.model.hub_id is None:
        raise ConfigError(f"model={cfg.model.name} has no weights; set model.path=FOLDER")
    return cfg.model.hub_id, cfg.model.revision


def _mirrors(cfg: DictConfig, folder: Path) -> list[Any]:
    from hydra.utils import instantiate

    if cfg.logger["_target_"] is None:
        return []
    choices = cfg.choices
    return [
        instantiate(
            cfg.logger,
            directory=outputs(cfg),
            signature=folder.name,
            group=group(cfg),
            tags=[choices.task, choices.method, choices.scale],
            run_config=signed_config(cfg),
            _convert_="all",
        )
    ]


def _predict(task: Any, model: Any, tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    """Predict the test set into ``predictions.jsonl``, continuing what an earlier session wrote."""
    from delta_lora.runlog import Progress

    final, partial = folder / "predictions.jsonl", folder / "predictions.partial.jsonl"
    if final.exists():
        return _read_lines(final)
    inputs = task.inputs("test")
    if not len(inputs):
        return []
    predictions = _read_lines(partial)
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(_line(p) for p in predictions)
        progress = Progress(
            len(inputs), initial=len(predictions), description="decode", unit="input"
        )
        with contextlib.closing(progress):
            for chunk in task.predict(model, tokenizer, "test", tuple(predictions)):
                predictions += chunk
                stream.writelines(_line(p) for p in chunk)
                stream.flush()
                progress.update(len(chunk))
    order = {p["id"]: p for p in predictions}
    predictions = [order[key] for key in sorted(order)]
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(_line(p) for p in predictions)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(final)
    return predictions


def _line(prediction: dict[str, Any]) -> str:
    return json.dumps(prediction, ensure_ascii=False) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file; a last line cut off by a kill is dropped."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1].decode("utf-8")
    return [json.loads(line) for line in whole.split("\n") if line]


def _write_adapter(
    cfg: DictConfig, folder: Path, tensors: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write every parameter that the run changed, with what is needed to use it again."""
    from delta_lora import checkpoint

    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    checkpoint.write_tensors(adapter / "adapter_model.safetensors", tensors)
    description = {
        "method": OmegaConf.to_container(cfg.method, resolve=True),
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "facts": facts,
    }
    checkpoint.write_json(adapter / "adapter_config.json", description)


def _what(cfg: DictConfig) -> dict[str, Any]:
    choices = cfg.choices
    return {
        "scale": choices.scale,
        "seed": cfg.seed,
        "method": choices.method,
        "recipe": choices.recipe,
    }


def _write_failure(cfg: DictConfig, folder: Path, error: Exception) -> None:
    from delta_lora import checkpoint

    record = {
        "schema": RECORD_SCHEMA,
        "signature": folder.name,
        "group": group(cfg),
        "status": "failed",
        **_what(cfg),
        "task": {"name": cfg.choices.task},
        "error": {
            "type": type(error).__name__,
            "message": str(error) or type(error).__name__,
            "traceback": traceback.format_exc(),
        },
        "config": signed_config(cfg),
    }
    checkpoint.write_json(folder / "record.json", record)


def _clear(folder: Path) -> None:
    """Remove the results of a stale run; its folder and lock stay."""
    import shutil

    logger.info("run %s is stale: starting it again", folder.name)
    for path in folder.iterdir():
        if path.name == ".lock":
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
