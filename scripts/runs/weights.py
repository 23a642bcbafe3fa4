"""Which model a run starts from: said once, for records, cards, tables and dashboards.

What is loaded counts, and not what the configuration would load: where ``model.path`` names a
folder, or the weights are random, the hub's name in the model's file is of weights that no one
read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from delta_lora.checks import expanded
from delta_lora.families import FAMILIES
from delta_lora.sources import CONFIG, WEIGHTS
from scripts.runs.composition import CONFIGS

RANDOM = "random"


def model_facts(config: DictConfig, *, is_made_here: bool) -> dict[str, Any]:
    """Return which model a run starts from, as its record says it.

    Args:
        config: from `scripts.runs.composition.compose`.
        is_made_here: whether the suite pre-trains the weights itself.

    Returns:
        ``name``, ``init``, and ``hub_id`` with ``revision`` where the hub's weights are loaded,
        else nulls. Of a folder also ``folder``, its own name and never its place, and ``same_as``
        (``hub_id`` and ``revision``) where its file of weights is one that is pinned.
    """
    model = config.model
    facts: dict[str, Any] = {
        "name": model.name, "init": model.init, "hub_id": None, "revision": None
    }  # fmt: skip
    if model.init == RANDOM or is_made_here:
        return facts
    keys = {key_of(override) for override in config.get("overrides") or ()}
    if model.path is not None:
        folder = expanded(model.path).absolute()
        same = pinned(folder / WEIGHTS)
        if not _is_called_so(config, folder, keys, same):
            facts["name"] = folder.name
        facts["folder"] = folder.name
        return facts if same is None else {**facts, "same_as": same}
    if model.hub_id is not None:
        facts |= {"hub_id": model.hub_id, "revision": model.revision}
        is_another = model.name in FAMILIES or "model.hub_id" in keys
        if is_another and "model.name" not in keys:
            facts["name"] = model.hub_id
    return facts


def label(facts: Mapping[str, Any]) -> str:
    """Return how people are told of a model; `facts` are those of `model_facts`."""
    return f"{facts['name']} with random weights" if facts["init"] == RANDOM else str(facts["name"])


def facts_of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return which model a finished run started from, as `model_facts` says it.

    Records that were written before a folder was named there hold the hub's name of the
    configuration, also where a folder was read; these facts do not.
    """
    facts = dict(record["model"])
    path = record["config"]["model"].get("path")
    if path is not None and facts["init"] != RANDOM and "folder" not in facts:
        name = expanded(path).absolute().name
        facts |= {"name": name, "folder": name, "hub_id": None, "revision": None}
    return facts


def hub_weights(facts: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return hub id and revision of the weights that were read, from there or as a pinned copy.

    Args:
        facts: from `model_facts`, or of a record.
    """
    found = facts.get("same_as") or facts
    return found.get("hub_id"), found.get("revision")


def key_of(override: str) -> str:
    """Return what an override sets: ``model.path`` of ``+model.path=FOLDER``."""
    return override.partition("=")[0].lstrip("+~")


def has_architecture(folder: Path, architecture: Any) -> bool:
    """Return whether a folder's ``config.json`` has every value of a model's architecture.

    Args:
        folder: of a model.
        architecture: ``{"model_type": "gpt2", "n_layer": 24, ...}``, or None, which none has.
    """
    if architecture is None:
        return False
    wanted: Any = architecture
    if isinstance(architecture, DictConfig):
        wanted = OmegaConf.to_container(architecture)
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the check of sources says what is wrong with it
        return False
    if not isinstance(content, dict):
        return False
    return all(key in content and content[key] == value for key, value in wanted.items())


def _is_called_so(
    config: DictConfig, folder: Path, keys: Iterable[str], same: Mapping[str, str] | None
) -> bool:
    """Return whether the configured name is that of the weights in a folder."""
    model = config.model
    if "model.name" in keys:
        return True
    if model.name in FAMILIES:  # that of a generic model
        return False
    if same is not None and same["hub_id"] == model.hub_id:
        return True
    if model.architecture is not None:
        return has_architecture(folder, model.architecture)
    # A file of your own names its folder; or it leaves that open, and names no other weights.
    names_others = model.hub_id is not None or model.pretrain is not None
    return "model.path" not in keys or not names_others


# ---------------------------------------------------------------------- pinned weights


def pinned(weights: Path) -> dict[str, str] | None:
    """Return ``hub_id`` and ``revision`` of the pinned weights that a file holds, or None.

    A file is read only where one of its size may be pinned.
    """
    if not weights.is_file():
        return None
    state = weights.stat()
    candidates = [pin for pin in _pins() if pin["size"] in (None, state.st_size)]
    if not candidates:
        return None
    digest = _sha256(str(weights), state.st_size, state.st_mtime_ns)
    for pin in candidates:
        if pin["sha256"] == digest:
            return {"hub_id": pin["hub_id"], "revision": pin["revision"]}
    return None


@functools.cache
def _pins() -> list[dict[str, Any]]:
    """Return hub id, revision, size and checksum of the weights of configs/pins.yaml."""
    content = yaml.safe_load((CONFIGS / "pins.yaml").read_text(encoding="utf-8"))
    return [
        {"hub_id": entry["repository"], "revision": entry["revision"], **entry["files"][WEIGHTS]}
        for entry in content
        if entry["kind"] == "model" and entry["files"].get(WEIGHTS, {}).get("sha256")
    ]


@functools.cache
def _sha256(path: str, size: int, changed: int) -> str:
    from delta_lora.checkpoint import sha256_file

    return sha256_file(Path(path))
