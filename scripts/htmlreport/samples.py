"""What is kept of run folders for the report: the curve of the loss, and a few predictions.

Run folders are not committed. So what the report shows of them is copied, cut short, to
``results/<scale>/report/samples.json``, and the page is made of that file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_lora.stored import UnreadableError
from scripts.htmlreport.runs import on_of, overrides_of
from scripts.htmlreport.sources import Sources
from scripts.reporting.results import device_of
from scripts.runs import checksums
from scripts.runs.folder import read_lines

#: most points of a curve; predictions of a run; letters of a text; references of a prediction.
NUM_POINTS, NUM_PREDICTIONS, NUM_LETTERS, NUM_REFERENCES = 40, 4, 280, 2

logger = logging.getLogger(__name__)


def collect(sources: Sources, outputs: Path) -> dict[str, dict[str, Any]]:
    """Return the samples of all runs of the tables, by signature.

    A run that has a folder is read anew, what is known of the others is kept. The folder may hold a
    repetition that ended elsewhere (another processor rounds otherwise): then ``repeated`` says on
    what and with which scores, and it takes no other's place. Predictions are kept of the first
    seed only.

    Args:
        sources: what the report is made of; its `samples` are those of the last time.
        outputs: folder of the run folders.
    """
    found = dict(sources.samples)
    readers: dict[tuple[str, str], _References] = {}
    for name, content in sources.contents.items():
        for row in content["rows"]:
            for run in row["runs"]:
                record = sources.records.get(run)
                own = _completed(outputs / run, sources.problems)
                if record is None or own is None:
                    continue
                repeated = _repetition(own, record)
                if repeated and run in found and found[run]["repeated"] is None:
                    continue
                on = on_of(content, record)
                sample: dict[str, Any] = {"repeated": repeated, "loss": _loss(outputs / run)}
                if on is not None and record["seed"] == min(content["seeds"]):
                    overrides = overrides_of(
                        sources.specs.get(name), content, row, on, record["seed"]
                    )
                    reader = readers.setdefault((name, on), _References(_references_of))
                    sample["predictions"] = _predictions(outputs / run, reader, overrides)
                if sample["loss"] or sample.get("predictions"):
                    found[run] = sample
    return {name: dict(found[name]) for name in sorted(found)}


def _completed(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """Return the record of a finished run folder, else None.

    Args:
        folder: of the run; the files that are read of it must be those that it wrote.
        problems: gets what is damaged.
    """
    try:
        names = [checksums.METRICS, checksums.PREDICTIONS]
        checksums.read_record(folder, is_whole=True)
        record = checksums.check_files(folder, names)
    except FileNotFoundError:
        return None
    except UnreadableError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None
    is_done = record["status"] == "completed" and record["signature"] == folder.name
    return record if is_done else None


def _repetition(own: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return None where a folder holds the result of `record`, else what it holds instead."""
    if own["metrics"] == record["metrics"]:
        return None
    scores = {name: float(f"{value:.4g}") for name, value in own["metrics"].items()}
    return {"device": device_of(own), "scores": scores}


def to_text(samples: Mapping[str, Any]) -> str:
    """Return the samples as JSON, one run a line."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(samples[name], ensure_ascii=False)}" for name in samples
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _loss(folder: Path) -> list[list[float]]:
    """Return step and training loss of at most `NUM_POINTS` steps, the last one always."""
    points = [
        [line["step"], float(f"{line['train/loss']:.4g}")]
        for line in read_lines(folder / "metrics.jsonl")
        if line.get("train/loss") is not None
    ]
    stride = -(-len(points) // NUM_POINTS) or 1
    return points[::-1][::stride][::-1]


def _predictions(
    folder: Path, reader: _References, overrides: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Return the first predictions with their references, where these can be read."""
    lines = read_lines(folder / "predictions.jsonl")[:NUM_PREDICTIONS]
    known = reader.read(overrides) if lines else {}
    return [
        {
            "input": _short(line.get("input")),
            "prediction": _short(line.get("prediction")),
            "references": [_short(text) for text in known.get(line["id"], ())],
        }
        for line in lines
    ]


class _References:
    """The references of a task, read once; none where the task cannot be loaded."""

    def __init__(self, load: Callable[[Sequence[str]], dict[str, tuple[Any, ...]]]) -> None:
        self._load = load
        self._known: dict[str, tuple[Any, ...]] | None = None

    def read(self, overrides: Sequence[str] | None) -> dict[str, tuple[Any, ...]]:
        """Return by id the references of the task that `overrides` choose."""
        if self._known is None:
            self._known = {}
            try:
                self._known = self._load(overrides or ())
            except Exception as error:  # a report does without
                logger.warning("no references in the report: %s", error)
        return self._known


def _references_of(overrides: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    from hydra.utils import instantiate

    from scripts.runs.run import Run

    task = instantiate(Run.compose(overrides).config.task)
    task.load()
    return {item.id: _texts(item) for item in task.inputs(task.scored_split)}


def _texts(item: Any) -> tuple[Any, ...]:
    """Return the references of an input: texts, a summary or a label."""
    if hasattr(item, "references"):
        return tuple(item.references[:NUM_REFERENCES])
    for name in ("summary", "label"):
        value = getattr(item, name, None)
        if value is not None:
            return (value,)
    return ()


def _short(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if len(text) <= NUM_LETTERS else text[: NUM_LETTERS - 1] + "…"
