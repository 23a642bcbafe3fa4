"""The process that follows a run folder and tells wandb; started by `delta_lora.mirror`.

It reads ``metrics.jsonl`` and ``measured.jsonl`` from their beginning and goes on as they grow,
until a word from the run, or the end of the pipe (the run was killed), says how the run ended.
Where anything of wandb fails, it becomes the same process anew, in offline mode, from the beginning
of the files: a service that died costs nothing. It reports why it went offline, and why it ended
where offline mode failed twice.

Arguments: mode, number of the pipe with the run's words, and, in a process that begins anew, number
of the pipe for reports, the words that were read already, and ``tried`` where offline mode failed
once. Standard input: the specification.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_lora.runlog import MEASURED

#: seconds between two looks at the files.
POLL_S = 1.0
#: seconds until a finished file must have its end.
WHOLE_S = 3.0
#: rows of the table of predictions.
MAX_PREDICTIONS = 200
#: exit codes that wandb shows as finished, failed and killed.
EXIT_CODES = {"completed": 0, "pruned": 0, "failed": 1, "stopped": 255, "killed": 255}


def main(arguments: Sequence[str]) -> None:
    """Mirror one run; leaves the process without wandb's exit hooks, which may wait."""
    mode, words = arguments[0], int(arguments[1])
    if len(arguments) > 2:
        reports, said = int(arguments[2]), json.loads(arguments[3])
    else:
        reports, said = os.dup(1), []
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    spec = json.load(os.fdopen(os.dup(0)))
    listener = _Listener(words, said)
    try:
        Writer(spec, mode).follow(listener)
    except BaseException as error:
        signal.alarm(0)
        is_over = isinstance(error, ImportError) or (mode == "offline" and len(arguments) > 4)
        if is_over or mode == "online":
            _report(reports, "offline" if is_over else mode, error)
        if is_over:
            os._exit(1)
        tried = ["tried"] if mode == "offline" else []
        _begin_anew([str(words), str(reports), json.dumps(listener.said), *tried])
    os._exit(0)


class TooSlowError(BaseException):
    """The end takes too long; no handler of wandb's own may take it for one of its errors."""


def _give_up(*_: object) -> None:
    raise TooSlowError("the service does not answer any more")


def _report(reports: int, mode: str, error: BaseException) -> None:
    message = str(error).rstrip(".")
    if message in ("", "<no message>"):  # wandb's words for an answer of 401 or 403
        message = "no reason is given, as for a key or a project that the service refuses"
    problem = f"{type(error).__name__}: {message}"[:2000]
    os.write(reports, json.dumps({"mode": mode, "problem": problem}).encode() + b"\n")


def _begin_anew(state: Sequence[str]) -> None:
    """Become the same process in offline mode; of what wandb has in memory nothing is left."""
    os.lseek(0, 0, os.SEEK_SET)
    for number in state[:2]:
        os.set_inheritable(int(number), True)
    os.environ.pop("WANDB_SERVICE", None)  # the address of the service, which is given up too
    command = [sys.executable, "-m", "delta_lora.wandb_writer", "offline", *state]
    os.execv(sys.executable, command)  # noqa: S606


class _Listener:
    """What the run said.

    Args:
        words: number of the pipe.
        said: what was read from it already.
    """

    def __init__(self, words: int, said: Sequence[Any]) -> None:
        self._words, self._buffer = words, b""
        self.said = list(said)

    def wait(self, seconds: float) -> None:
        """Wait for the next word, but no longer than `seconds`."""
        if self.end is None and select.select([self._words], [], [], seconds)[0]:
            chunk = os.read(self._words, 65536)
            *lines, self._buffer = (self._buffer + chunk).split(b"\n")
            self.said += [json.loads(line) for line in lines]
            if not chunk:
                self.said.append({"end": {"status": "killed", "error": ""}})

    @property
    def may_read(self) -> bool:
        """Whether the files are those of this session."""
        return any(word.get("read") for word in self.said)

    @property
    def end(self) -> dict[str, str] | None:
        """How the run ended, or None."""
        return next((word["end"] for word in self.said if "end" in word), None)


class Writer:
    """One wandb run, made of the files of a run folder.

    Args:
        spec: from `delta_lora.mirror`.
        mode: ``online`` or ``offline``.
    """

    def __init__(self, spec: Mapping[str, Any], mode: str) -> None:
        import wandb

        self._wandb, self._spec, self._mode = wandb, spec, mode
        self._folder = Path(spec["folder"])
        self._metrics = _Lines(self._folder / "metrics.jsonl")
        self._measured = _Lines(self._folder / MEASURED)
        self._waiting: list[dict[str, Any]] = []
        place = Path(spec["init"]["dir"])
        if mode == "offline":  # else wandb would choose a temporary folder
            (place / "wandb").mkdir(parents=True, exist_ok=True)
            if not os.access(place / "wandb", os.W_OK):
                raise PermissionError(f"cannot write to {place / 'wandb'}")
        self._run = wandb.init(
            **{**spec["init"], "mode": mode},
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=spec["init_timeout_s"],
                finish_timeout=spec["finish_timeout_s"],
                finish_timeout_raises=True,
                x_stats_pid=spec["parent"],
            ),
        )
        self._define()

    def _define(self) -> None:
        """Say what curves are drawn over, and which value of each stands for the run."""
        run = self._run
        run.define_metric("step", hidden=True)
        run.define_metric("epoch", step_metric="step", hidden=True)
        for family in ("train", "perf", "delta"):
            run.define_metric(f"{family}/*", step_metric="step")
        run.define_metric("validation/loss", step_metric="step", summary="min,last")
        for name, is_higher_better in self._spec["best"].items():
            best = "max" if is_higher_better else "min"
            run.define_metric(f"validation/{name}", step_metric="step", summary=f"{best},last")

    def follow(self, listener: _Listener) -> None:
        """Copy what the files have, as they grow, until the run ends; then end too."""
        while listener.end is None:
            listener.wait(POLL_S)
            if listener.may_read:
                self._copy()
        if listener.may_read:
            self._copy()
        self._end(**listener.end)

    def _copy(self) -> None:
        """Log the new rows, those of one step together."""
        rows = self._metrics.read()  # first: what is measured of a step is written before
        self._waiting += self._measured.read()
        for row in rows:
            step = row["step"]
            while self._waiting and self._waiting[0]["step"] <= step:
                measured = self._waiting.pop(0)
                self._run.log(measured, step=measured["step"])
            self._run.log({key: self._shown(key, value) for key, value in row.items()}, step=step)

    def _shown(self, name: str, value: Any) -> Any:
        """Return a score in the unit of the tables; anything else as it is."""
        split, _, metric = name.partition("/")
        scale = self._spec["scales"].get(metric.rpartition("/")[2] or metric)
        is_score = split in ("validation", "test") and scale is not None
        return value * scale if is_score and isinstance(value, (int, float)) else value

    # ------------------------------------------------------------------ the end

    def _end(self, status: str, error: str) -> None:
        """Write what the run came to, and finish."""
        if self._mode == "online":  # some of what follows asks the service, and waits as it likes
            signal.signal(signal.SIGALRM, _give_up)
            signal.alarm(math.ceil(self._spec["finish_timeout_s"]) + 1)
        said = {"status": status, **({"error": error} if error else {})}
        self._run.summary.update({**self._spec["summary"], **said})
        if status == "completed":
            self._copy_record()
            self._copy_predictions()
            self._copy_media()
        place = Path(self._run.dir).parent
        self._run.finish(exit_code=EXIT_CODES[status])
        if self._mode == "offline":
            self._check_is_whole(place)

    def _copy_record(self) -> None:
        """Write scores, counts and costs into the summary."""
        record = _read_json(self._folder / "record.json")
        values = {f"test/{name}": v for name, v in record.get("metrics", {}).items()}
        summary = {name: self._shown(name, value) for name, value in values.items()}
        summary |= {f"parameters/{k}": v for k, v in record.get("parameters", {}).items()}
        measured = _read_json(self._folder / "resources.json")
        summary |= {f"cost/{k}": v for k, v in measured.items() if isinstance(v, (int, float))}
        missing = record.get("missing_metrics", {})
        summary |= {f"missing/test/{name}": reason for name, reason in missing.items()}
        facts = record.get("training", {}).get("method", {})
        summary |= {f"method/{k}": v for k, v in facts.items() if isinstance(v, (int, float, str))}
        self._run.summary.update(summary)
        if record:  # the truth behind it, in the run's files
            self._run.save(
                str(self._folder / "record.json"), base_path=str(self._folder), policy="now"
            )

    def _copy_predictions(self) -> None:
        """Show the first predictions beside references and scores, where the task has some."""
        rows = _Lines(self._folder / "predictions.jsonl").read()[:MAX_PREDICTIONS]
        if not rows:
            return
        columns = list(rows[0])
        known = {row["id"]: row for row in _Lines(self._folder / "references.jsonl").read()}
        scores = list(
            dict.fromkeys(name for row in known.values() for name in row.get("scores", {}))
        )
        data = []
        for row in rows:
            own = known.get(row["id"], {})
            texts = [str(row.get(column)) for column in columns]
            if known:
                texts.append("\n".join(own.get("references", [])))
            data.append([*texts, *(own.get("scores", {}).get(name) for name in scores)])
        if known:
            columns = [*columns, "references", *scores]
        self._run.log({"predictions": self._wandb.Table(columns=[*columns], data=data)})

    def _copy_media(self) -> None:
        """Show pictures and tables."""
        for name, path in self._spec["media"].items():
            if path.endswith(".csv"):
                with open(path, newline="", encoding="utf-8") as stream:
                    head, *rows = csv.reader(stream)
                shown: Any = self._wandb.Table(columns=[*head], data=rows)
            else:
                shown = self._wandb.Image(path)
            self._run.log({name: shown})

    def _check_is_whole(self, place: Path) -> None:
        """Read the file again: a full disk is no error to wandb.

        Raises:
            OSError: it does not reach to the end of the run.
        """
        from delta_lora import wandb_file

        path = place / f"run-{self._run.id}.wandb"
        until = time.monotonic() + WHOLE_S  # the last records come a moment behind `finish`
        while not path.is_file() or wandb_file.read(path).exit_code is None:
            if time.monotonic() > until:
                raise OSError(f"{path} was not written to its end; is the disk full?")
            time.sleep(0.1)


class _Lines:
    """The JSON objects of a file that grows line by line; one that is not there has none."""

    def __init__(self, path: Path) -> None:
        self._path, self._place = path, 0

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines since the last call."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._place)
                content = stream.read()
        except FileNotFoundError:
            return []
        content = content[: content.rfind(b"\n") + 1]
        self._place += len(content)
        return [json.loads(line) for line in content.split(b"\n") if line]


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    return {}


if __name__ == "__main__":
    main(sys.argv[1:])
