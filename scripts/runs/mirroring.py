"""What Weights & Biases shows of a run: its name in words, its tags, its settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delta_lora.mirror import RunFacts
from delta_lora.runlog import MetricLogger
from scripts.runs.folder import RECORD, read_record
from scripts.runs.recording import config_of
from scripts.runs.run import Run

#: values of a method that people filter by, as they are written.
SYMBOLS = {"update_ratio": "λ", "start_step": "K"}
#: overrides of values that change no result, or are in a name already.
LEFT_OUT = ("paths", "logger", "hydra", "seed", "predict", "score_references", "save_model", "fake")
#: settings of the loop that change no result.
HABITS = ("checkpoint_every_s", "checkpoint_every_steps", "log_every_steps")
#: choices of groups; task, method and scale are in a name already, the others follow.
CHOICES = ("experiment", "task", "recipe", "model", "method", "scale")


def mirror_of(run: Run, task: Any) -> MetricLogger:
    """Return the mirror that the configuration asks for, at work.

    Args:
        run: the run; ``logger._target_`` is a class with ``begin``, as
            `delta_lora.mirror.WandbMirror`.
        task: its task, for the units of its scores.
    """
    from hydra.utils import instantiate

    mirror: Any = instantiate(run.config.logger)
    mirror.begin(facts_of(run, task))
    return mirror


def facts_of(run: Run, task: Any, folder: Path | None = None) -> RunFacts:
    """Return what a mirror shows of a run.

    Args:
        run: the run.
        task: its task, for the units of its scores.
        folder: where the run was executed, if it is not where it would be now; what names it there
            is taken as it is.
    """
    choices = run.choices
    is_pretraining = str(choices.task).startswith("pretraining")
    folder, name, group = (run.folder, run.name, run.group) if folder is None else _named(folder)
    return RunFacts(
        folder=folder,
        outputs=folder.parent,
        id=name,
        name=title_of(run),
        group=group,
        job_type="pretrain" if is_pretraining else "train",
        tags=[choices.task, choices.method, choices.scale],
        config={**config_of(run), "command": " ".join(run.config.overrides)},
        metrics=task.metrics,
    )


def _named(folder: Path) -> tuple[Path, str, str]:
    """Return a run's folder, name and group by what it left there."""
    if (folder / RECORD).is_file():
        record = read_record(folder)
        return folder, record["signature"], record["group"]
    return folder, folder.name, folder.name


def write_references(task: Any, folder: Path) -> None:
    """Write what the first predictions are compared with to ``references.jsonl``, for people."""
    from delta_lora.wandb_writer import MAX_PREDICTIONS

    references = task.references(task.scored_split)
    if references:
        first = sorted(references)[:MAX_PREDICTIONS]  # predictions are in the order of their ids
        lines = [json.dumps({"id": i, "references": references[i]}) + "\n" for i in first]
        (folder / "references.jsonl").write_text("".join(lines), encoding="utf-8")


def title_of(run: Run) -> str:
    """Return a run's name in words: ``delta_lora e2e tiny seed 1 λ=2 K=500``.

    Behind the seed stands what was chosen on the command line and is not in the name already, but
    for lists, which are long.
    """
    choices = run.choices
    words = [choices.method, choices.task, choices.scale, "seed", str(run.seed)]
    method = run.config.method
    for key, symbol in SYMBOLS.items():
        if key in method:
            words.append(f"{symbol}={method[key]:g}")
    return " ".join([*words, *dict.fromkeys(_chosen(run))])


def _chosen(run: Run) -> Iterator[str]:
    """Yield the values that overrides set, without the part that they belong to."""
    for override in run.config.overrides:
        key, _, value = override.lstrip("+~").partition("=")
        first, _, rest = key.partition(".")
        name = key.rpartition(".")[2]
        if first in LEFT_OUT or name in SYMBOLS or (first in CHOICES and not rest):
            continue
        if name in HABITS or value.startswith(("[", "{")):
            continue
        yield f"{rest or key}={value}"
