"""What a table stands for: the paper's model or another one, the whole test set or a part of it.

The paper's numbers and claims are about its models on whole test sets. A table of another model
carries that model's name, has a folder of its own, and stands alone: no rows of the paper, no
verdicts on its claims. A table of a part of a test set stands alone too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from delta_lora.checks import expanded
from scripts.reporting.spec import TableSpec
from scripts.runs.cells import Cell
from scripts.runs.composition import SEARCH_PATH
from scripts.runs.meaning import hash_of
from scripts.runs.run import Run
from scripts.runs.weights import has_architecture, key_of, label

#: folder below ``results/<scale>`` of what was made with other models than the paper's.
MODELS = "models"
#: overrides that say which model a table has, where it is one of the command line.
_CHOICES = (SEARCH_PATH, "experiment", "task", "recipe")
#: what makes weights what they are, of the meaning of a run.
_OF_WEIGHTS = ("weights", "init", "architecture")


@dataclass(frozen=True)
class Other:
    """Another model than the one that a table is of.

    Attributes:
        name: as people are told of it.
        folder: of its results, below ``results/<scale>``; weights of one name differ there.
    """

    name: str
    folder: str


def check_one_model(name: str, cells: Sequence[Cell]) -> None:
    """Check that all rows of a table start from one model; its tasks may have different ones.

    Raises:
        ValueError: two rows do not.
    """
    first: dict[str, tuple[Cell, Any]] = {}
    for cell in cells:
        facts = cell.run.model_facts
        known, its = first.setdefault(cell.on, (cell, facts))
        if facts != its:
            raise ValueError(
                f"{name}: row {known.row} starts from {label(its)} and row {cell.row} from "
                f"{label(facts)}; a table never mixes models: make one for each"
            )


def other_model(
    spec: TableSpec, cells: Sequence[Cell], scale: str, extra: Sequence[str]
) -> Other | None:
    """Return the model of a table's runs where it is not the one that the table has at that scale.

    Args:
        spec: the table.
        cells: its runs.
        scale: tiny, small or paper.
        extra: overrides of every run; without one of the model nothing is another.
    """
    if not any(key_of(override).partition(".")[0] == "model" for override in extra):
        return None
    more = [override for override in extra if key_of(override) in _CHOICES]
    runs = {cell.on: cell.run for cell in cells}
    for on, run in runs.items():
        own = Run.compose(list(dict.fromkeys((*more, *spec.runs[on], f"scale={scale}"))))
        if not _is_same(run, own):
            return Other(label(run.model_facts), f"{MODELS}/{_slug(run)}")
    return None


def _is_same(run: Run, own: Run) -> bool:
    """Return whether a run starts from the model of another one, or from a copy of it."""
    mine, theirs = run.model_facts, own.model_facts
    if any(mine[key] != theirs[key] for key in ("name", "init")):
        return False
    path, architecture = run.config.model.path, own.config.model.architecture
    if path is None or architecture is None:
        return True
    if "same_as" in mine and mine["same_as"]["hub_id"] == own.config.model.hub_id:
        return True
    return has_architecture(expanded(path), architecture)


def _slug(run: Run) -> str:
    """Return a name of a folder for the model of a run: its own name, and which weights."""
    meaning = run.meaning["model"]
    own = hash_of({key: meaning[key] for key in _OF_WEIGHTS if key in meaning})[:6]
    name = re.sub(r"[^a-z0-9._]+", "-", label(run.model_facts).lower()).strip("-.")
    return f"{name or 'model'}-{own}"


# ---------------------------------------------------------------------- what is shown


def as_shown(
    spec: TableSpec,
    scale: str,
    extra: Sequence[str],
    cells: Sequence[Cell],
    records: Sequence[Mapping[str, Any]],
) -> tuple[TableSpec, dict[str, Any]]:
    """Return a table as its runs allow it to be shown, and the facts that its content holds.

    Args:
        spec: the table.
        scale: of its runs.
        extra: overrides of every run.
        cells: its runs.
        records: those that are there.

    Returns:
        The table, without the paper's numbers and claims where they are about something else; and
        ``other_model`` and ``part``, each where it is so.
    """
    facts: dict[str, Any] = {}
    other = other_model(spec, cells, scale, extra)
    if other is not None:
        facts["other_model"] = {"name": other.name, "folder": other.folder}
        spec = replace(spec, title=_title(spec, other.name))
    parts = dict(_parts(extra, records))
    if parts:
        facts["part"] = "; ".join(f"{name}: {words}" for name, words in sorted(parts.items()))
    if facts:
        spec = replace(spec, paper={"title": spec.title, "rows": {}}, claims=())
    return spec, facts


def _parts(extra: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield tasks of which only a part of the scored split was used, and which part, in words."""
    are_rows_chosen = any(key_of(each).startswith("task.max_rows") for each in extra)
    for record in records:
        task = record["task"]
        if "part" in task:
            yield task["name"], words_of_part(task["part"])
        elif are_rows_chosen and "test" in task.get("max_rows", {}):
            yield task["name"], f"the first {task['max_rows']['test']:,} rows of test"


def _title(spec: TableSpec, name: str) -> str:
    told = f"{name} (not the paper's model)"
    if spec.model is not None:
        return spec.title.replace(spec.model, told)
    return f"{spec.title}, {told}"


def folder_of(results: Path, content: Mapping[str, Any]) -> Path:
    """Return where a table is written.

    Args:
        results: ``results/<scale>``.
        content: of the table.
    """
    other = content.get("other_model")
    return results if other is None else results / other["folder"]


def words_of_part(part: Mapping[str, Any]) -> str:
    """Return what part of a split was scored: ``60 of 630 inputs of test, evenly spaced``."""
    return f"{part['used']:,} of {part['of']:,} inputs of {part['split']}, evenly spaced"


def shown(overrides: Sequence[str]) -> list[str]:
    """Return overrides as results show them: folders by their own names, no place on a machine."""
    found = []
    for override in overrides:
        key, separator, value = override.partition("=")
        is_place = value.startswith(("/", "~"))
        found.append(f"{key}{separator}FOLDER/{Path(value).name}" if is_place else override)
    return found
