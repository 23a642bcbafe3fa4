"""Overrides for all runs of a table (``ARGS``) that would undo what one of its rows is.

They are applied last, so ``trainer.max_steps=60`` would train the row "No fine-tuning", and
``method.dropout=0.2`` make "LoRA without dropout" a second LoRA. Both are refused. What rows read
from the recipe stays free there: ``recipe.max_steps``, ``recipe.lora_dropout``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scripts.runs.composition import CONFIGS, GROUPS
from scripts.runs.weights import key_of

#: a value that is read from the recipe.
_OF_RECIPE = re.compile(r"^\$\{(?:oc\.select:)?(recipe\.[\w.]+)(?:,[^}]*)?\}$")
Rows = Mapping[str, Sequence[str]]


def check_extra(extra: Sequence[str], groups: Sequence[Rows]) -> None:
    """Check that no override of all runs sets what a row, or what it is trained on, sets itself.

    Args:
        extra: overrides of all runs.
        groups: rows, what they are trained on, axes: each a name to its overrides.

    Raises:
        ValueError: one does; the row, the key and what to use instead are named.
    """
    for override in extra:
        for rows in groups:
            for name, own in rows.items():
                for mine in own:
                    if meet(key_of(override), key_of(mine)):
                        raise ValueError(
                            f"{override!r} would undo {mine!r}, which makes {name!r} what it is; "
                            f"{_instead(key_of(override), own)}"
                        )


def check_methods(
    extra: Sequence[str], rows: Rows, compose: Callable[[Sequence[str]], DictConfig]
) -> None:
    """Check that no override of ``method.X`` makes rows alike that differ in X alone.

    Args:
        extra: overrides of all runs.
        rows: name to overrides.
        compose: returns the configuration of a row's overrides, without `extra`.

    Raises:
        ValueError: one does; the rows, the key and what to use instead are named.
    """
    for override in extra:
        group, _, key = key_of(override).partition(".")
        if group != "method" or not key or len(rows) < 2:
            continue
        first: dict[str, tuple[str, Any]] = {}  # by the class of the method: a row, its value
        for name, own in rows.items():
            method = compose(own).method
            value = OmegaConf.select(method, key)
            other, known = first.setdefault(method["_target_"], (name, value))
            if known != value:
                raise ValueError(
                    f"{override!r} would give {other!r} (where it is {known}) and {name!r} (where "
                    f"it is {value}) one value; {_instead(key_of(override), rows[other])}"
                )


def meet(one: str, other: str) -> bool:
    """Return whether one key is the other, or holds it; a choice of a group holds nothing."""
    if one == other:
        return True
    short, long = sorted((one, other), key=len)
    return short not in GROUPS and long.startswith(f"{short}.")


def _instead(key: str, own: Sequence[str]) -> str:
    """Return what to do instead of setting `key`, in words."""
    group, _, rest = key.partition(".")
    groups = {key_of(each): each.partition("=")[2] for each in own if key_of(each) in GROUPS}
    chosen = {"trainer": "default", **groups}
    if group in ("trainer", "method") and rest and group in chosen:
        path = CONFIGS / group / f"{chosen[group]}.yaml"
        values: Any = OmegaConf.load(path) if path.is_file() else {}
        content: Any = OmegaConf.to_container(values) if values else {}
        found = _OF_RECIPE.match(str(content.get(rest, "")))
        if found:
            return f"set {found[1]}, which the rows that say nothing of it read"
    return "leave it out, or write a file of your own in configs"


def without_methods(extra: Sequence[str]) -> list[str]:
    """Return the overrides that do not set a value of a method."""
    return [override for override in extra if not key_of(override).startswith("method.")]
