"""Compose the configuration of one run from configs/, with messages for whoever mistyped.

An experiment pairs task, model and recipe. What none of them pairs is refused, unless it was asked
for by name: a GLUE task with E2E's recipe is a mistake more often than a wish.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from delta_lora.checks import (
    NAME,
    NOT_EMPTY,
    Range,
    check_mapping,
    check_path,
    check_values,
    near,
    shown,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
GROUPS = ("experiment", "task", "recipe", "model", "method", "trainer", "logger", "scale")
#: what of a recipe is no value but holds some, which other values refer to.
NESTED = {"learning_rate", "dylora", "adalora", "variants"}
#: the folder of all run folders.
OUTPUTS = "paths.outputs"
#: names further folders of configurations: hydra.searchpath=[file:///home/me/configs]
SEARCH_PATH = "hydra.searchpath"


@dataclass(frozen=True, kw_only=True)
class Root:
    """The values of a configuration that belong to none of its parts, see configs/train.yaml."""

    seed: Annotated[int, Range(at_least=0, at_most=2**32 - 1)]
    predict: bool
    train_fraction: Annotated[float | None, Range(above=0, at_most=1)]
    init_from: Annotated[str | None, NOT_EMPTY]
    score_references: bool
    save_model: bool
    scale: Annotated[str, NAME]
    part_of: Sequence[Annotated[str, NOT_EMPTY]] | None


class ConfigError(ValueError):
    """The run cannot start as asked; the message says what to change."""


@contextlib.contextmanager
def as_config_error(*more: type[Exception]) -> Iterator[None]:
    """Turn what a constructor or a loader says about the user's input into a ConfigError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, TypeError, OSError, *more)):
            raise ConfigError(_in_one_line(str(error))) from error
        if type(error).__module__.startswith("hydra") and error.__cause__ is not None:
            raise ConfigError(_in_one_line(str(error.__cause__))) from error
        raise


def _in_one_line(message: str) -> str:
    return "; ".join(line.strip() for line in message.splitlines() if line.strip())


def _scaled_alpha(alpha: float, update_ratio: float) -> float:
    """Return alpha x (1 + lambda): the LoRA that Delta-LoRA equals under Adam with K = -1."""
    if not isinstance(alpha, (int, float)) or not isinstance(update_ratio, (int, float)):
        return alpha  # which is refused by its key, or the other one is
    return float(alpha) * (1.0 + float(update_ratio))


OmegaConf.register_new_resolver("scaled_alpha", _scaled_alpha, replace=True)


def _outputs_folder(chosen: str | None) -> str:
    """Return the folder of all run folders; `chosen` is ``paths.outputs``."""
    return str(ROOT / "outputs" if chosen is None else check_path(OUTPUTS, chosen).resolve())


OmegaConf.register_new_resolver("outputs_folder", _outputs_folder, replace=True)


def _times(a: float, b: float) -> float:
    """Return the product; what is no number is handed on, and refused by its key."""
    return float(a) * float(b) if isinstance(b, (int, float)) else b


OmegaConf.register_new_resolver("times", _times, replace=True)


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of one run.

    Args:
        overrides: Hydra overrides such as ``method=lora`` or ``trainer.max_steps=200``.

    Raises:
        ConfigError: an unknown group member or key (with near matches), a bad value, or a task with
            a model or recipe that no experiment pairs it with and that was not named.
    """
    overrides = list(overrides)
    parsed = _check_single(overrides)
    check_choices(overrides)
    try:
        cfg, choices = _read(parsed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    with open_dict(cfg):
        cfg.choices = choices
        cfg.overrides = overrides
    return checked(cfg)


def _read(overrides: Sequence[Override]) -> tuple[DictConfig, dict[str, str]]:
    """Return what Hydra makes of overrides, its references as they are, and the chosen groups.

    It takes a fifth of a second for the files that the groups choose, and little for the values
    behind them: the files are read once.
    """
    if _are_of_hydra(overrides):
        return _read_files([str(override.input_line) for override in overrides])
    cfg, choices = _read_once(_chosen(overrides), _version_of(CONFIGS))
    cfg = cfg.copy()
    # The very step that Hydra takes behind its files.
    ConfigLoaderImpl._apply_overrides_to_config([o for o in overrides if not _is_group(o)], cfg)
    return cfg, dict(choices)


def follows_seed(overrides: Sequence[str]) -> bool:
    """Return whether a value may refer to the seed, in an override or in the files they choose."""
    parsed = [parse(override) for override in overrides]
    if any("${" in override for override in overrides) or _are_of_hydra(parsed):
        return True
    return _files_follow_seed(_chosen(parsed), _version_of(CONFIGS))


@functools.lru_cache(maxsize=1024)
def _files_follow_seed(chosen: tuple[str, ...], version: object) -> bool:
    cfg, _ = _read_once(chosen, version)
    return re.search(r"\$\{[^}]*\bseed\b", OmegaConf.to_yaml(cfg)) is not None


def _are_of_hydra(overrides: Sequence[Override]) -> bool:
    """Return whether one of them is of Hydra's own settings, such as further folders of files."""
    return any(override.key_or_group.partition(".")[0] == "hydra" for override in overrides)


def _chosen(overrides: Sequence[Override]) -> tuple[str, ...]:
    """Return the overrides that choose a file."""
    return tuple(str(override.input_line) for override in overrides if _is_group(override))


def _is_group(override: Override) -> bool:
    """Return whether an override chooses a file, by Hydra's own rule."""
    is_folder = (CONFIGS / override.key_or_group).is_dir()
    return is_folder and not isinstance(override.value(), dict)


def _read_files(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    with hydra_ready():
        cfg = hydra_compose("train", list(overrides), return_hydra_config=True)
    choices = {group: cfg.hydra.runtime.choices[group] for group in GROUPS}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


@functools.lru_cache(maxsize=1024)
def _read_once(chosen: tuple[str, ...], version: object) -> tuple[DictConfig, dict[str, str]]:
    """Return the same for a version of the files; its results are not to be changed."""
    return _read_files(chosen)


def _version_of(folder: Path) -> tuple[tuple[str, int], ...]:
    """Return what changes where a configuration file of a folder does."""
    files = sorted(folder.rglob("*.yaml"))
    return tuple((str(path), path.stat().st_mtime_ns) for path in files)


def checked(cfg: DictConfig) -> DictConfig:
    """Return a configuration with its references resolved and its outermost values checked.

    Raises:
        ConfigError: see `compose`.
    """
    with as_config_error():
        for group in ("task", "recipe", "model", "method", "trainer", "logger", "paths"):
            check_mapping(group, cfg[group])
        for key in NESTED & set(cfg.recipe):
            for name, value in check_mapping(f"recipe.{key}", cfg.recipe[key]).items():
                if key == "variants":
                    check_mapping(f"recipe.variants.{name}", value)
        if "variants" in cfg.recipe:
            names = tuple(cfg.recipe.variants)
            if cfg.recipe.variant not in names:
                raise ValueError(
                    f"recipe.variant={shown(cfg.recipe.variant)} is none of recipe.variants="
                    f"{shown(OmegaConf.to_container(cfg.recipe.variants))}; choose one of "
                    f"{', '.join(map(repr, names)) or 'them'}"
                )
    try:
        OmegaConf.resolve(cfg)  # finds what cannot be; and reading it is five times faster after
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{_blamed(error, cfg)}: {str(error).splitlines()[0]}; ${{KEY}} takes the value of "
            "another key, and ${oc.env:NAME} that of a variable: write one that there is, or a "
            "plain value"
        ) from error
    with as_config_error():
        check_values(Root, cfg)
        if set(cfg.paths) != {"outputs"}:
            raise ValueError(
                f"paths={shown(OmegaConf.to_container(cfg.paths))}: it has outputs and nothing "
                "else; write paths.outputs=FOLDER"
            )
        if cfg.paths.outputs is not None:
            check_path(OUTPUTS, cfg.paths.outputs)
    check_pairing(cfg.choices, cfg.overrides)
    check_files(cfg)
    return cfg


def check_launch(overrides: Sequence[str]) -> None:
    """Check overrides of Hydra's own settings, such as those of a launcher.

    Raises:
        ConfigError: one cannot be read, is unknown, or has another type than the launcher's.
    """
    overrides = [override for override in overrides if not parse(override).is_sweep_override()]
    if not overrides:
        return
    try:
        with hydra_ready():
            cfg = hydra_compose("train", overrides, return_hydra_config=True)
        launcher = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{'; '.join(overrides)}: {'; '.join(_causes(error))}; `--cfg hydra` shows what can be "
            "set, and values of the right type"
        ) from error
    if isinstance(launcher, dict) and launcher.get("n_jobs") == 0:
        raise ConfigError(
            "hydra.launcher.n_jobs=0 starts nothing; write the number of runs at a time, or -1 for "
            "one on every core"
        )


def _blamed(error: Exception, cfg: DictConfig) -> str:
    """Return the overrides that an error about a reference is about, or all."""
    found, overrides = [], cast(list[str], OmegaConf.to_container(cfg.overrides, resolve=False))
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if "${" in value or key in str(error) or key.partition(".")[2] in str(error) != "":
            found.append(override)
    return "; ".join(found or overrides)


def parse(override: str) -> Override:
    """Return an override as Hydra reads it.

    Raises:
        ConfigError: it cannot; the message says how a value with special characters is written.
    """
    try:
        [parsed] = OverridesParser.create().parse_overrides([override])
    except HydraException as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot read the override {override!r}: {reason}; {_quoted(override)}"
        ) from error
    return parsed


def _check_single(overrides: Iterable[str]) -> list[Override]:
    """Return overrides as Hydra reads them, each of one value.

    Raises:
        ConfigError: one is not.
    """
    found = []
    for override in overrides:
        found.append(parse(override))
        if found[-1].is_sweep_override():
            raise ConfigError(
                f"the override {override!r} has several values, which only a sweep may have (-m); "
                f"{_quoted(override)}"
            )
    return found


def _quoted(override: str) -> str:
    """Return how a value with special characters is written, for a message."""
    key, _, value = override.partition("=")
    inner = value.strip("'\"").replace('"', '\\"')
    return (
        "a text with any of # ( ) [ ] { } , = : ' \" or letters beyond ASCII stands in quotes, for "
        f"the shell and for Hydra: {key}='\"{inner}\"'"
    )


@contextlib.contextmanager
def hydra_ready() -> Iterator[None]:
    """Let Hydra read our configurations within the block, where it does not yet."""
    with contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():
            stack.enter_context(initialize_config_dir(str(CONFIGS), version_base="1.3"))
        yield


# ---------------------------------------------------------------------- what goes together


def check_pairing(choices: Mapping[str, str], overrides: Sequence[str]) -> None:
    """Check that model and recipe are made for the task, or were asked for by name.

    Args:
        choices: the chosen member of each group.
        overrides: those that the run was composed from.

    Raises:
        ConfigError: a model or recipe that no experiment pairs with the task and no override names.
    """
    named = {override.partition("=")[0] for override in overrides}
    pairs = [each for each in experiments(overrides).values() if each["task"] == choices["task"]]
    for group in ("recipe", "model"):
        made_for = sorted({each[group] for each in pairs})
        if choices[group] in made_for or group in named:
            continue
        if not pairs:
            raise ConfigError(
                f"no experiment has task={choices['task']}, so nothing says which {group} it goes "
                f"with; name one ({group}=...), or write "
                f"{folders(overrides)[-1] / 'experiment' / choices['task']}.yaml"
            )
        raise ConfigError(
            f"{group}={choices[group]} is not made for task={choices['task']}, which goes with "
            f"{group}={' or '.join(made_for)}. Use experiment={choices['task']}, or write "
            f"{group}={choices[group]} to take it all the same"
        )


def experiments(overrides: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """Return task, model and recipe of every experiment, by its name.

    Args:
        overrides: may name further folders of configurations (`SEARCH_PATH`).
    """
    found: dict[str, dict[str, str]] = {}
    for folder in folders(overrides):
        for name in _members(folder / "experiment"):
            content: Any = _content(folder / "experiment" / f"{name}.yaml")
            pair: dict[str, str] = {}
            for entry in content.get("defaults", []):
                if isinstance(entry, dict):
                    pair |= {key.rpartition("/")[2]: value for key, value in entry.items()}
            if {"task", "model", "recipe"} <= pair.keys():
                found[name] = pair
    return found


def _content(path: Path) -> Any:
    """Return what a YAML file holds; not to be changed."""
    return _content_of(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _content_of(path: Path, version: int) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def check_files(cfg: DictConfig) -> None:
    """Check that the chosen files say what every task, method and model must.

    Raises:
        ConfigError: a task or method names no class, or a model lacks a key.
    """
    for group in ("task", "method"):
        if "_target_" not in cfg[group]:
            raise ConfigError(
                f"{group}={cfg.choices[group]} has no _target_; its yaml names a class, such as "
                f"_target_: my_module.My{group.capitalize()}"
            )
    keys = _content(CONFIGS / "model" / "_base.yaml")
    lacking = [key for key in keys if key not in cfg.model or OmegaConf.is_missing(cfg.model, key)]
    if lacking:
        raise ConfigError(
            f"model={cfg.choices.model} lacks {', '.join(lacking)}; its yaml begins with "
            "defaults: [/model/_base@_here_, _self_] and says name and family"
        )


# ---------------------------------------------------------------------- what there is


def folders(overrides: Iterable[str] = ()) -> list[Path]:
    """Return the folders of configurations: ours, and those that overrides add."""
    found = [CONFIGS]
    for override in overrides:
        key, _, value = override.partition("=")
        if key == SEARCH_PATH:
            entries = value.strip("[]").split(",")
            found += [Path(e.strip(" '\"").removeprefix("file://")) for e in entries if e]
    return found


def check_choices(overrides: Sequence[str]) -> None:
    """Check group members and option names of `overrides` before Hydra sees them.

    Raises:
        ConfigError: unknown member of a group; near matches and the list are named. Or a folder of
            configurations that does not exist.
    """
    for folder in folders(overrides):
        if not folder.is_dir():
            raise ConfigError(f"{SEARCH_PATH}: there is no folder {folder}")
    for override in overrides:
        group, separator, value = override.partition("=")
        if not separator or group not in GROUPS:
            continue
        known, name = options(group, overrides), value.strip("'\"")
        if name not in known:
            raise ConfigError(
                f"unknown {group} {name!r}; {near(name, known)}known: {', '.join(known)}"
            )


def options(group: str, overrides: Iterable[str] = ()) -> list[str]:
    """Return the members of a configuration group; files with a leading ``_`` are none."""
    return sorted({name for folder in folders(overrides) for name in _members(folder / group)})


def _members(folder: Path) -> list[str]:
    # Below a scale's file lies what it changes, which is no scale.
    paths = folder.glob("*.yaml") if folder.name == "scale" else folder.rglob("*.yaml")
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in paths)
    return sorted(name for name in names if not name.rpartition("/")[2].startswith("_"))


def _explain(error: Exception) -> str:
    """Return a message for a composition error, with near matches for an unknown key."""
    message = "; ".join(_causes(error))
    unknown = re.search(r"Could not override '([\w.]+)'", message)
    if unknown:
        parent, _, key = unknown.group(1).rpartition(".")
        with contextlib.suppress(Exception), hydra_ready():
            node = OmegaConf.select(hydra_compose("train"), parent) if parent else None
            known = list(node) if isinstance(node, DictConfig) else list(GROUPS)
            if key not in known:  # else it is the file that is wrong, not the name
                return (
                    f"unknown key {unknown.group(1)!r}; {near(key, known)}known: {', '.join(known)}"
                )
    return message


def _causes(error: BaseException) -> list[str]:
    """Return the lines of an error and of what caused it, each once."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
        cause = cause.__cause__
    return list(dict.fromkeys(lines))
