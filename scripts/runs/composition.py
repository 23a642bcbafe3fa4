"""Compose the configuration of one run from configs/, with messages for whoever mistyped.

An experiment pairs task, model and recipe. What none of them pairs is refused, unless it was asked
for by name: a GLUE task with E2E's recipe is a mistake more often than a wish.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from delta_lora.checks import near

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
GROUPS = ("experiment", "task", "recipe", "model", "method", "trainer", "logger", "scale")
#: names further folders of configurations: hydra.searchpath=[file:///home/me/configs]
SEARCH_PATH = "hydra.searchpath"


class ConfigError(ValueError):
    """The run cannot start as asked; the message says what to change."""


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


def _scaled_alpha(alpha: float, update_ratio: float) -> float:
    """Return alpha x (1 + lambda): the LoRA that Delta-LoRA equals under Adam with K = -1."""
    return float(alpha) * (1.0 + float(update_ratio))


OmegaConf.register_new_resolver("scaled_alpha", _scaled_alpha, replace=True)


def _outputs_folder(chosen: str | None) -> str:
    """Return the folder of all run folders; `chosen` is ``paths.outputs``."""
    return str(ROOT / "outputs" if chosen is None else Path(chosen).resolve())


OmegaConf.register_new_resolver("outputs_folder", _outputs_folder, replace=True)
OmegaConf.register_new_resolver("times", lambda a, b: float(a) * float(b), replace=True)


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of one run.

    Args:
        overrides: Hydra overrides such as ``method=lora`` or ``trainer.max_steps=200``.

    Raises:
        ConfigError: an unknown group member or key (with near matches), a bad value, or a task with
            a model or recipe that no experiment pairs it with and that was not named.
    """
    overrides = list(overrides)
    check_choices(overrides)
    try:
        with hydra_ready():
            cfg = hydra_compose("train", overrides, return_hydra_config=True)
        choices = {group: cfg.hydra.runtime.choices[group] for group in GROUPS}
        with open_dict(cfg):
            del cfg["hydra"]
            cfg.choices = choices
            cfg.overrides = overrides
        OmegaConf.resolve(cfg)  # finds what cannot be; and reading it is five times faster after
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    if isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise ConfigError(f"seed={cfg.seed!r} must be an integer of 0 or more")
    check_pairing(choices, overrides)
    check_files(cfg)
    return cfg


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
            content: Any = yaml.safe_load((folder / "experiment" / f"{name}.yaml").read_text())
            pair: dict[str, str] = {}
            for entry in content.get("defaults", []):
                if isinstance(entry, dict):
                    pair |= {key.rpartition("/")[2]: value for key, value in entry.items()}
            if {"task", "model", "recipe"} <= pair.keys():
                found[name] = pair
    return found


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
    keys = yaml.safe_load((CONFIGS / "model" / "_base.yaml").read_text(encoding="utf-8"))
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
        known = options(group, overrides)
        for name in value.split(","):
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
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(str(cause).strip())
        cause = cause.__cause__
    message = "; ".join(dict.fromkeys(line for text in causes for line in text.split("\n") if line))
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
