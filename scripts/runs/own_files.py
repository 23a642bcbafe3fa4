"""The files that a run used and no commit of this repository holds: of a user's own, by content.

A method, a task or a model of one's own is a module and a yaml anywhere (``--config-dir``,
``PYTHONPATH``), or files that were put into this checkout and not committed. A record that names
a commit alone would say nothing of them.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from scripts.runs import composition
from scripts.runs.composition import ROOT


def own_files(config: DictConfig) -> list[dict[str, str]]:
    """Return the files that a run used and that are not committed, by name.

    Args:
        config: from `scripts.runs.composition.compose`; what it names must have been imported.

    Returns:
        ``file`` (as it is found below its folder of configurations, or on the import path; never a
        place on this machine) and ``sha256`` of each.
    """
    from delta_lora.checkpoint import sha256_file

    committed = _committed()
    found = {**dict(_configurations(config)), **dict(_modules(config, committed))}
    return [
        {"file": name, "sha256": sha256_file(path)}
        for name, path in sorted(found.items())
        if not _is_committed(path, committed)
    ]


def _committed() -> frozenset[Path] | None:
    """Return the files that git knows in this repository; None where there is no git to tell."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        done = subprocess.run(  # noqa: S603
            command, check=True, capture_output=True, encoding="utf-8", errors="surrogateescape"
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return frozenset(ROOT / name for name in done.stdout.split("\0") if name)


def _is_committed(path: Path, committed: frozenset[Path] | None) -> bool:
    if committed is None:  # what stands here is the code, whatever its version
        return path.is_relative_to(ROOT)
    return path in committed


def _configurations(config: DictConfig) -> Iterator[tuple[str, Path]]:
    """Yield the yaml files that a configuration was composed of."""
    overrides = list(config.get("overrides") or ())
    with composition.hydra_ready():
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list("train", overrides, RunMode.RUN).defaults
    places = composition.folders(overrides)
    for entry in defaults:
        for place in places:
            path = (place / f"{entry.config_path}.yaml").resolve()
            if path.is_file():
                yield f"{entry.config_path}.yaml", path
                break


def _modules(config: DictConfig, committed: frozenset[Path] | None) -> Iterator[tuple[str, Path]]:
    """Yield the modules of one's own that a configuration names, and those that they import."""
    installed = tuple(Path(sysconfig.get_path(name)).resolve()
                      for name in ("stdlib", "platstdlib", "purelib", "platlib"))  # fmt: skip
    content = OmegaConf.to_container(config)
    todo = [target.rpartition(".")[0] for target in _targets(content)]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        module = sys.modules.get(name)
        if name in seen or module is None or not getattr(module, "__file__", None):
            continue
        seen.add(name)
        path = Path(str(module.__file__)).resolve()
        if any(path.is_relative_to(place) for place in installed):
            continue
        if _is_committed(path, committed):
            continue
        parts = name.split(".")
        folders = parts if path.stem == "__init__" else parts[:-1]
        yield "/".join([*folders, path.name]), path
        todo += _imported(module)


def _targets(node: Any) -> Iterator[str]:
    """Yield every ``_target_`` of a configuration."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_" and isinstance(value, str):
                yield value
            else:
                yield from _targets(value)


def _imported(module: ModuleType) -> list[str]:
    """Return the names of the modules that a module, or what it imported from them, shows."""
    found = []
    for value in vars(module).values():
        name = value.__name__ if isinstance(value, ModuleType) else None
        name = name or getattr(value, "__module__", None)
        if isinstance(name, str):
            found.append(name)
    return found
