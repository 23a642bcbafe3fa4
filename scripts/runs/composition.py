"""Compose the configuration of one run from configs/, with messages for whoever mistyped.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
GROUPS = ("task", "recipe", "model", "method", "trainer", "logger", "scale")


class ConfigError(ValueError):
    """The run cannot start as asked; the message says what to change."""


def _scaled_alpha(alpha: float, update_ratio: float) -> float:
    """Return alpha x (1 + lambda): the LoRA that Delta-LoRA equals under Adam with K = -1."""
    return float(alpha) * (1.0 + float(update_ratio))


OmegaConf.register_new_resolver("scaled_alpha", _scaled_alpha, replace=True)
OmegaConf.register_new_resolver("times", lambda a, b: float(a) * float(b), replace=True)


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
            cfg.overrides = overrides
        OmegaConf.resolve(cfg)  # finds what cannot be; and reading it is five times faster after
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
    """Return the members of a configuration group; files with a leading ``_`` are none."""
    folder = CONFIGS / group
    names = (p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.rpartition("/")[2].startswith("_"))


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
