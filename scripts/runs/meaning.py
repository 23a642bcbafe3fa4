"""What a run means: all that its result depends on, and the name that is made of it.

A meaning holds task and version, method and version, checksums of weights and data, and of every
constructor's values those that differ from its default. So a spelling (``2``, ``2.0``), where a
value comes from (``recipe.start_step=5``, ``method.start_step=5``), a moved file, a renamed class
and a new option whose default is the old behaviour change no name. What does change names: another
default, or a raised ``version`` of a task, a method or the trainer.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from delta_lora.checks import expanded
from scripts.runs import provenance
from scripts.runs.composition import ConfigError, as_config_error
from scripts.runs.leaves import class_of

#: values of the root of a configuration that a result depends on, with their defaults.
ROOT_DEFAULTS: Mapping[str, Any] = {
    "predict": True,
    "train_fraction": None,
    "score_references": False,
    "save_model": False,
}
#: keys of a task that pin what is downloaded.
PIN = "release"
HASH_LENGTH = 12


def meaning_of(
    cfg: DictConfig, *, pretrained: str | None = None, start: str | None = None
) -> dict[str, Any]:
    """Return what a configuration means, as plain JSON values.

    Args:
        cfg: from `scripts.runs.composition.compose`.
        pretrained: what names the run that pre-trains its model, where the suite does.
        start: what names the run that it starts from, where it does.

    Raises:
        ConfigError: a folder does not exist, or the task's settings are not allowed.
    """
    content: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    found = {
        "seed": content["seed"],
        "task": _task(cfg, content["task"]),
        "method": _method(content["method"]),
        "model": _model(content["model"], pretrained),
        "trainer": _owner(content["trainer"]),
        "init_from": start,
        **{key: content[key] for key in ROOT_DEFAULTS},
    }
    defaults = {**ROOT_DEFAULTS, "init_from": None}
    return {
        key: value for key, value in found.items() if key not in defaults or value != defaults[key]
    }


def hash_of(meaning: Mapping[str, Any]) -> str:
    """Return the first hex digits of a hash of plain JSON values."""
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def plain(value: Any) -> Any:
    """Return a value as JSON has it, whole numbers as integers: 2, 2.0 and 2e0 are one value."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [plain(each) for each in value]
    return str(value)


# ---------------------------------------------------------------------- the parts


def _task(cfg: DictConfig, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task by name and version, its data by checksum."""
    from hydra.utils import instantiate

    kind = class_of(content["_target_"], "task._target_")
    with as_config_error():
        task = instantiate(cfg.task)
    for key, example in (
        ("name", "'my_task'"),
        ("version", "1"),
        ("metrics", "(MetricSpec('accuracy', 'Accuracy'),)"),
    ):
        if not hasattr(task, key):
            raise ConfigError(f"{_called(kind)} has no {key}; write {key} = {example} in the class")
    values = {key: value for key, value in content.items() if not key.startswith(PIN)}
    if values.get("data_dir") is not None:
        values["data_dir"] = folder_checksum("task.data_dir", values["data_dir"])
    found = _owner({**values, "name": task.name, "version": task.version})
    if content.get("source") == "hub":
        pins = [value for key, value in content.items() if key.startswith(PIN)]
        found["files"] = plain([_pinned(pin) for pin in pins])
    return found


def _pinned(pin: Mapping[str, Any]) -> Any:
    """Return the checksums of what a pin downloads; of one without any, all that it says."""
    return pin.get("files") or {key: value for key, value in pin.items() if key[0] != "_"}


def _method(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method by name and version, and its settings."""
    kind = class_of(content["_target_"], "method._target_")
    if not isinstance(vars(kind).get("name"), str):  # an inherited one is that of another method
        raise ConfigError(
            f"{_called(kind)} has no name of its own; write name = 'my_method' in the class"
        )
    return _owner(content)


def _owner(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return name, version and settings of a task, a method or the trainer."""
    kind = class_of(content["_target_"], "_target_")
    left_out = kind.not_signed
    settings = {key: value for key, value in content.items() if key not in left_out}
    own = {key: settings.pop(key, getattr(kind, key, None)) for key in ("name", "version")}
    named = {key: value for key, value in own.items() if isinstance(value, (str, int))}
    return {**named, **_differing(settings)}


def _differing(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a constructor that differ from its defaults, those of its parts too."""
    defaults = _defaults(class_of(content["_target_"], "_target_"))
    found = {}
    for key, value in content.items():
        if key.startswith("_"):  # Hydra's
            continue
        if isinstance(value, Mapping) and "_target_" in value:
            kind = class_of(value["_target_"], "_target_")
            name = getattr(kind, "name", None)
            part = _differing(value)
            found[key] = {"name": name, **part} if isinstance(name, str) else part
        elif key not in defaults or plain(value) != plain(defaults[key]):
            found[key] = plain(value)
    return found


def _model(content: Mapping[str, Any], pretrained: str | None) -> dict[str, Any]:
    """Return a model by its weights, and what is changed of it."""
    from delta_lora.models import load_model

    is_random = content["init"] == "random"
    weights: Any = None
    if pretrained is not None:
        weights = {"pretrained": pretrained}
    elif content["path"] is not None:
        weights = {"sha256": folder_checksum("model.path", content["path"])}
    elif content["hub_id"] is not None:
        weights = {"hub_id": content["hub_id"], "revision": content["revision"]}
    tokenizer = content["tokenizer_path"]
    found = {
        "family": content["family"],
        "init": "random" if is_random else None,
        "architecture": plain(content["architecture"]) if is_random else None,
        # Random weights with a tokenizer of their own read nothing else.
        "weights": None if is_random and tokenizer is not None else weights,
        "tokenizer": None
        if tokenizer is None
        else folder_checksum("model.tokenizer_path", tokenizer),
        "projections": plain(content["projections"]),
    }
    defaults = _defaults(load_model)
    for key in ("dtype", "attention", "dropout", "config_overrides"):
        value = plain(content[key])
        if value != plain(defaults[key]) and value != {}:
            found[key] = value
    return {key: value for key, value in found.items() if value is not None}


# ---------------------------------------------------------------------- reading


def _called(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.cache
def _defaults(constructor: Any) -> dict[str, Any]:
    """Return the defaults of a constructor's keywords."""
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def default_settings(target: str) -> dict[str, Any]:
    """Return the defaults of a constructor's keywords, by the dotted name of its class.

    Raises:
        ConfigError: there is no such class.
    """
    return dict(_defaults(class_of(target, "_target_")))


#: of folders as they were: path, then name, size and time of each file.
_CHECKSUMS: dict[tuple[Any, ...], str] = {}


def folder_checksum(key: str, path: str) -> str:
    """Return a checksum over the names and contents of the files in a folder.

    Args:
        key: what names the folder, for the message.
        path: the folder.

    Raises:
        ConfigError: it does not exist.
    """
    folder = expanded(path)
    if not folder.is_dir():
        raise ConfigError(
            f"{key}={path}: no such folder (looked in {folder.resolve()}); write the folder's path"
        )
    try:
        # A link to nothing is no file: whoever needs that file says so.
        paths = (p for p in sorted(folder.rglob("*")) if _is_file(p))
        files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        cache_key = (str(folder.resolve()), *files)
        if cache_key not in _CHECKSUMS:
            _CHECKSUMS[cache_key] = provenance.sha256_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"{key}={path}: {error.filename or folder} cannot be read: {error.strerror}"
        ) from error
    return _CHECKSUMS[cache_key]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a link to itself
        return False
