"""What Weights & Biases shows of a run: its name in words, its tags, its settings."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from delta_lora.mirror import RunFacts
from delta_lora.runlog import MetricLogger
from delta_lora.writing import write_text
from scripts.runs.composition import ConfigError
from scripts.runs.folder import RECORD, read_record
from scripts.runs.meaning import default_settings
from scripts.runs.recording import config_of
from scripts.runs.run import Run
from scripts.runs.weights import label

#: values of a method that people filter by, as they are written.
SYMBOLS = {"update_ratio": "λ", "start_step": "K"}
#: settings of a method that tell the groups of a table or sweep apart, as they are written.
GROUP_SYMBOLS = {
    **SYMBOLS, "rank": "r", "alpha": "α", "dropout": "dropout", "learning_rate": "lr",
}  # fmt: skip
#: overrides of values that change no result, or are in a name already.
LEFT_OUT = (
    "paths",
    "logger",
    "hydra",
    "part_of",
    "seed",
    "predict",
    "score_references",
    "save_model",
    "fake",
)
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
    overrides = [o for o in run.config.overrides if not o.startswith("part_of=")]
    named = (run.folder, run.name, group_of(run)) if folder is None else _named(run, folder)
    folder, name, group = named
    return RunFacts(
        folder=folder,
        outputs=folder.parent,
        id=name,
        name=title_of(run),
        group=group,
        job_type="pretrain" if is_pretraining else "train",
        tags=[choices.task, choices.method, choices.scale, *run.part_of],
        config={
            **config_of(run),
            "base_model": label(run.model_facts),
            "command": " ".join(overrides),
        },
        metrics=task.metrics,
    )


def group_of(run: Run) -> str:
    """Return what a run's group is called: that of all seeds of one configuration."""
    return group_title(run.group, run.meaning, str(run.config.method["_target_"]))


def group_title(group: str, meaning: Mapping[str, Any], method: str) -> str:
    """Return a group in words: ``delta_lora e2e, λ 2, K 500, r 4, α 32, lr 0.005, 0123456789ab``.

    Made from the meaning alone, so that a group has one title however its runs were asked for; and
    without ``=``, which filters of Weights & Biases take for an operator.

    Args:
        group: its name, ``task--method--hash``.
        meaning: of any of its runs (`scripts.runs.meaning.meaning_of`).
        method: dotted name of the method's class.
    """
    task, name, checksum = group.rsplit("--", 2)
    told = {key: v for key, v in default_settings(method).items() if key in SYMBOLS}
    settings = {**told, **meaning["method"]}
    words = [f"{name} {task}"]
    if "peft_type" in settings.get("peft", {}):
        words.append(settings["peft"]["peft_type"])
    for key, symbol in GROUP_SYMBOLS.items():
        if isinstance(settings.get(key), (int, float)):
            words.append(f"{symbol} {settings[key]:g}")
    return ", ".join([*words, checksum])


def _named(run: Run, folder: Path) -> tuple[Path, str, str]:
    """Return a run's folder, name and group by what it left there."""
    if (folder / RECORD).is_file():
        record = read_record(folder)
        group = record["group"]
        if "meaning" in record:
            group = group_title(group, record["meaning"], str(run.config.method["_target_"]))
        return folder, record["signature"], group
    with contextlib.suppress(ConfigError):  # of a folder or file that is gone
        if run.name == folder.name:
            return folder, folder.name, group_of(run)
    return folder, folder.name, folder.name


def write_references(task: Any, folder: Path) -> None:
    """Write what the first predictions are compared with, and what each of them scores by itself.

    That is ``references.jsonl``, for people. Where the task has neither, no file is written.
    """
    from delta_lora.wandb_writer import MAX_PREDICTIONS

    path = folder / "predictions.jsonl"
    if not path.is_file():  # nothing is predicted in pre-training
        return
    with path.open(encoding="utf-8") as stream:
        first = [json.loads(line) for line in itertools.islice(stream, MAX_PREDICTIONS)]
    references = task.references(task.scored_split)
    scores = task.scores_of_items(first, task.scored_split)
    rows = [
        {
            "id": p["id"],
            "references": references.get(p["id"], []),
            "scores": scores.get(p["id"], {}),
        }
        for p in first
    ]
    if references or scores:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(folder / "references.jsonl", "".join(lines))


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
        # A folder by its own name: its place is nothing to show.
        shown = Path(value).name if value.startswith(("/", "~")) else value
        yield f"{rest or key}={shown}"
