"""Every value of a configuration, checked by its declaration before anything is made of it.

The annotations of a constructor declare its values (`delta_lora.checks`), and the constructor
checks them itself. Here the same declarations are read for a whole configuration, so that a message
has the key as it is written on the command line, and so that nothing is named, made or read before
all of it is known to be right. Values of a recipe are checked by the declarations of those that
read them, whether or not this run does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf

from delta_lora.checks import (
    NAME,
    NOT_EMPTY,
    Matches,
    OneOf,
    Range,
    check_mapping,
    check_value,
    check_values,
    hints_of,
    near,
    shown,
)
from scripts.runs import composition
from scripts.runs.composition import ConfigError, as_config_error

#: keys of Hydra beside ``_target_`` that change nothing of what is made.
HYDRA_KEYS = ("_target_", "_convert_", "_recursive_")
INITS = ("pretrained", "random")


def check_leaves(cfg: DictConfig) -> None:
    """Check every value of a configuration by type and range.

    Args:
        cfg: from `scripts.runs.composition.compose`.

    Raises:
        ConfigError: a value is not allowed; the message has its key, the value and what is.
    """
    from delta_lora.protocols import Method, Task
    from delta_lora.trainer import Trainer

    with as_config_error():
        _check_recipe(cfg)
        _check_model(cfg.model)
        for key, needed in (("trainer", Trainer), ("task", Task), ("method", Method)):
            check_part(key, cfg[key], needed)
        if cfg.logger.get("_target_", "") is not None:
            check_part("logger", cfg.logger, Mirror)
        elif len(cfg.logger) > 1:
            raise ValueError(
                f"logger._target_=null with {', '.join(sorted(cfg.logger))}: without a mirror "
                "there is nothing to set; use logger=none, or logger=wandb"
            )


class Mirror:
    """Stands for what can be a logger: any class with `begin`."""


def class_of(target: object, key: str) -> Any:
    """Return what a dotted name stands for.

    Args:
        target: the name.
        key: where it is written, for the message.

    Raises:
        ConfigError: it is no name, or cannot be imported.
    """
    if not isinstance(target, str):
        raise ConfigError(
            f"{key}={shown(target)} is a {type(target).__name__}, not a text; write the dotted "
            "name of a class, for example delta_lora.methods.lora.Lora"
        )
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
        reason = f"{module} has no {name}"
    except (ImportError, TypeError, ValueError) as error:
        found, reason = None, str(error)
    if found is None:
        raise ConfigError(
            f"{key}={target} cannot be imported: {reason}; correct it, or name the folder of your "
            "module: PYTHONPATH=FOLDER python scripts/train.py ..."
        )
    return found


def check_kind(key: str, kind: Any, needed: type) -> None:
    """Check that what a ``_target_`` names is a class of the kind that its place needs.

    Raises:
        ConfigError: it is not.
    """
    is_mirror = needed is Mirror and hasattr(kind, "begin")
    if isinstance(kind, type) and (is_mirror or issubclass(kind, needed)):
        return
    what = key.rpartition(".")[2]
    called = getattr(kind, "__qualname__", shown(kind))
    place = getattr(kind, "__module__", type(kind).__module__)
    if needed is Mirror:
        allowed = "a class with `begin`, as delta_lora.mirror.WandbMirror"
        raise ConfigError(f"{key}._target_={place}.{called} is no mirror of runs; name {allowed}")
    raise ConfigError(
        f"{key}._target_={place}.{called} is no {needed.__name__}; a {what} is a class that "
        f"inherits from {needed.__module__}.{needed.__name__}"
    )


def check_part(key: str, content: Mapping[str, Any], needed: type) -> None:
    """Check a class and its settings, those of its parts too.

    Args:
        key: where it stands, for the messages.
        content: ``_target_`` and the settings.
        needed: what the class must be.

    Raises:
        ConfigError: the class is none of these.
        TypeError: a setting is unknown, lacks or has another type.
        ValueError: a setting is outside of its range.
    """
    kind = class_of(content.get("_target_"), f"{key}._target_")
    check_kind(key, kind, needed)
    settings = {str(name): value for name, value in content.items() if name not in HYDRA_KEYS}
    _check_names(key, kind, settings)
    declaration: Any = kind if dataclasses.is_dataclass(kind) else kind.__init__
    is_ours = kind.__module__.partition(".")[0] in ("delta_lora", "tasks")
    hints = _hints(declaration, is_ours=is_ours)
    plain = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and "_target_" in value:
            classes = [each for each in _parts(hints.get(name)) if isinstance(each, type)]
            check_part(f"{key}.{name}", value, classes[0] if classes else object)
        else:
            plain[name] = value
    if hints:
        check_values(declaration, plain, prefix=f"{key}.", is_ours=is_ours)


def _hints(declaration: Callable[..., Any], *, is_ours: bool) -> Mapping[str, Any]:
    try:
        return hints_of(declaration)
    except NameError:  # of someone's class: a name that only a type checker imports
        if is_ours:
            raise
        return {}


def _parts(hint: Any) -> Sequence[Any]:
    """Return the types that an annotation allows."""
    return [part for part in get_args(hint) if part is not type(None)] or [hint]


def _check_names(key: str, kind: Any, settings: Mapping[str, Any]) -> None:
    """Check that a class has all settings, and gets all that it must have."""
    parameters = inspect.signature(kind).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in settings:
        if name not in parameters:
            raise TypeError(
                f"unknown key {key}.{name}={shown(settings[name])}: {kind.__name__} has no "
                f"setting {name!r}; {near(name, parameters)}it has {', '.join(parameters)}"
            )
    for name, parameter in parameters.items():
        if name not in settings and parameter.default is inspect.Parameter.empty:
            raise TypeError(f"{key}.{name} is missing, and {kind.__name__} needs it; write it")


# ---------------------------------------------------------------------- a model, a recipe


@dataclass(frozen=True, kw_only=True)
class Model:
    """The keys of a model, see configs/model/_base.yaml."""

    name: Annotated[str, NAME]
    init: Annotated[str, OneOf(INITS)]
    hub_id: Annotated[str | None, Matches(r"[\w.-]+(/[\w.-]+)?", "OWNER/NAME of the hub, or null")]
    revision: Annotated[str | None, Matches(r"[\w./-]+", "a commit of the hub's, or null")]
    path: str | Path | None
    tokenizer_path: str | Path | None
    pretrain: Sequence[Annotated[str, NOT_EMPTY]] | None
    projections: Sequence[Annotated[str, NOT_EMPTY]] | None


def _check_model(content: Mapping[str, Any]) -> None:
    """Check the keys of a model: those above, and those of `delta_lora.models.load_model`."""
    from delta_lora.models import check_model_type, load_model

    loaded = ("family", "architecture", "dtype", "dropout", "config_overrides", "attention")
    known = [*hints_of(Model), *loaded]
    for name in content:
        if name not in known:
            raise ValueError(
                f"unknown key model.{name}={shown(content[name])}; {near(str(name), known)}a model "
                f"has {', '.join(known)}"
            )
    check_values(Model, content, prefix="model.")
    check_values(load_model, {key: content[key] for key in loaded}, prefix="model.")
    if content["projections"] is not None and not len(content["projections"]):
        raise ValueError(
            "model.projections=[] names no layer; write names of layers, or null for W_Q and W_V"
        )
    architecture = content["architecture"]
    if architecture is None:
        return
    check_model_type(architecture)
    defaults = _configuration(architecture["model_type"])
    for name, value in architecture.items():
        if not hasattr(defaults, str(name)):
            raise ValueError(
                f"unknown key model.architecture.{name}={shown(value)}: a "
                f"{type(defaults).__name__} has no such value; "
                f"{near(str(name), defaults.to_dict())}correct it or leave it out"
            )
    _check_numbers(architecture)


def _check_numbers(architecture: Mapping[str, Any]) -> None:
    """Check the numbers of an architecture that `transformers` takes as they come."""
    vocab_size = architecture.get("vocab_size")
    for name, value in architecture.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        allowed = Range(
            at_least=0, at_most=2**20, why="models are trained from nothing at these sizes"
        )
        if name.endswith("token_id") and isinstance(vocab_size, int):
            allowed = Range(at_least=0, below=vocab_size, why="vocab_size")
        check_value(f"model.architecture.{name}", value, int, allowed)


@functools.cache
def _configuration(model_type: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type)


def _check_recipe(cfg: DictConfig) -> None:
    """Check the values of a recipe that the command line sets, whether this run reads them or not.

    Raises:
        TypeError: one has another type.
        ValueError: one is outside of its range, or nothing reads it.
    """
    readers = _readers(tuple(map(str, composition.folders(cfg.overrides))))
    for override in cfg.overrides:
        key = override.lstrip("+~").partition("=")[0]
        value = OmegaConf.select(cfg, key, default=cfg) if key.startswith("recipe.") else cfg
        if value is not cfg and not re.fullmatch(r"recipe\.variants?(\.\w+)?", key):
            _check_read(key, value, readers)


def _check_read(key: str, value: Any, readers: Mapping[str, list[Any]]) -> None:
    """Check a value by what reads it; of a mapping, each entry."""
    read = re.sub(r"\.variants\.\w+", "", key)
    parts = {r.removeprefix(f"{read}.").partition(".")[0] for r in readers if f"{read}." in r}
    if read in readers:
        for hint in readers[read]:
            check_value(key, value, hint)
    elif parts:
        for name, entry in check_mapping(key, value).items():
            _check_read(f"{key}.{name}", entry, readers)
    else:
        known = sorted(reader.removeprefix("recipe.") for reader in readers)
        raise ValueError(
            f"unknown key {key}={shown(value)}: nothing reads it; correct it or leave it out; "
            f"{near(read[7:], known)}a recipe has {', '.join(known)}"
        )


@functools.cache
def _readers(folders: Sequence[str]) -> Mapping[str, list[Any]]:
    """Return the declarations of what reads a value of a recipe, by the value's key."""
    from delta_lora.method_bases import LearningRate
    from delta_lora.models import load_model

    found: dict[str, list[Any]] = {}
    for folder in map(Path, folders):
        paths = [*folder.glob("trainer/*.yaml"), *folder.glob("method/**/*.yaml")]
        for path in sorted(paths):
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            if "_target_" not in content:
                continue
            kind = class_of(content["_target_"], f"{path}: _target_")
            declaration: Any = kind if dataclasses.is_dataclass(kind) else kind.__init__
            hints = hints_of(declaration)
            for name, value in content.items():
                read = re.match(r"\$\{(?:oc\.select:)?(recipe\.[\w.]+)[,}]", str(value))
                if read and name in hints and hints[name] not in found.get(read[1], ()):
                    found.setdefault(read[1], []).append(hints[name])
    found["recipe.model_dropout"] = [hints_of(load_model)["dropout"]]
    found["recipe.learning_rate.sgd"] = [LearningRate]  # by rows of tables
    return found
