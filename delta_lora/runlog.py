"""The log of a run: ``metrics.jsonl`` first, then a progress bar, then mirrors such as wandb.

``metrics.jsonl`` holds only what a repetition of the run gives again to the bit (losses, rates,
norms). What differs between two runs of the same thing (seconds, memory, tokens per second) goes to
the progress display, to the mirrors and to ``resources.json``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from tqdm import tqdm

from delta_lora.checks import check_choice

logger = logging.getLogger(__name__)


class MetricLogger(Protocol):
    """Something that mirrors the log elsewhere."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror the values of one step."""

    def log_record(self, record: Mapping[str, Any], predictions: Path) -> None:
        """Mirror the final record and the predictions file of a run."""

    def close(self) -> None:
        """End the mirror."""


class RunLog:
    """Writes ``metrics.jsonl`` and feeds the mirrors.

    Args:
        path: the ``metrics.jsonl`` of the run.
        position: byte offset to continue at; what stands behind it (written after the last
            checkpoint of an interrupted run) is cut off and will be written again.
        mirrors: further loggers.
    """

    def __init__(
        self, path: Path, *, position: int = 0, mirrors: Sequence[MetricLogger] = ()
    ) -> None:
        self._stream = path.open("r+b" if path.exists() else "w+b")
        self._stream.truncate(position)
        self._stream.seek(position)
        self._mirrors = mirrors

    def log(
        self, step: int, values: Mapping[str, float], measured: Mapping[str, float] | None = None
    ) -> None:
        """Log the repeatable `values`, and the `measured` ones to the mirrors only.

        Args:
            step: number of applied optimiser steps.
            values: by ``split/name``; written to ``metrics.jsonl``.
            measured: seconds, memory and rates of this very session.
        """
        self._stream.write(json.dumps({"step": step, **values}).encode() + b"\n")
        self._stream.flush()
        for mirror in self._mirrors:
            mirror.log(step, {**values, **(measured or {})})

    def position(self) -> int:
        """Return the byte offset behind the last line, safely on disk."""
        os.fsync(self._stream.fileno())
        return self._stream.tell()

    def close(self) -> None:
        """Close the file; the mirrors live on until the record is written."""
        self._stream.close()


class Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere.

    Args:
        total: number of units.
        initial: units already done.
        description: what is counted, shown in front.
        unit: name of a unit.
        enabled: False silences it (processes other than the main one).
    """

    #: least time between two plain lines, in seconds.
    PLAIN_INTERVAL_S = 10.0

    def __init__(
        self, total: int, *, initial: int = 0, description: str, unit: str, enabled: bool = True
    ) -> None:
        is_terminal = sys.stderr.isatty()
        self._enabled = enabled
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit=unit,
            disable=not (enabled and is_terminal),
            dynamic_ncols=True,
        )
        self._plain = enabled and not is_terminal
        self._description, self._unit, self._note = description, unit, ""
        self._total, self._done, self._initial = total, initial, initial
        self._start = self._last = time.monotonic()

    def update(self, count: int = 1, note: str = "") -> None:
        """Advance by `count` units and show `note` behind the numbers."""
        self._done += count
        if note:
            self._note = note
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        is_last = self._done >= self._total
        if self._plain and (now - self._last >= self.PLAIN_INTERVAL_S or is_last):
            rate = (self._done - self._initial) / max(now - self._start, 1e-9)
            left = (self._total - self._done) / rate if rate else float("nan")
            logger.info(
                "%s %d/%d %s, %.2f/s, %.0f s left%s",
                self._description, self._done, self._total, self._unit, rate, left,
                f", {self._note}" if self._note else "",
            )  # fmt: skip
            self._last = now

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


class WandbMirror:
    """Mirrors a run to Weights & Biases.

    Without a key the run is written offline, without a prompt. The run's id and name are its
    signature, its group the signature without the seed, so that seeds of one configuration stand
    together.

    Args:
        project: wandb project.
        entity: wandb entity; None takes the account's default.
        mode: ``auto`` (online where a key is configured, else offline), ``online`` or ``offline``.
        directory: where offline files go.
        signature: id of the run.
        group: signature without the seed.
        tags: task, method, scale.
        run_config: resolved configuration.

    Raises:
        ValueError: unknown `mode`, or ``online`` without a key.
    """

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        mode: str,
        directory: Path,
        signature: str,
        group: str,
        tags: Sequence[str],
        run_config: Mapping[str, Any],
    ) -> None:
        import wandb

        check_choice("logger.mode", mode, ("auto", "online", "offline"))
        has_key = bool(os.environ.get("WANDB_API_KEY")) or _netrc_has_wandb()
        if mode == "online" and not has_key:
            raise ValueError(
                "logger.mode=online needs a wandb key: run `wandb login` or set WANDB_API_KEY, "
                "or use logger.mode=offline"
            )
        if mode == "auto":
            mode = "online" if has_key else "offline"
        directory.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            entity=entity,
            mode=cast(Any, mode),
            dir=str(directory),
            id=signature,
            name=signature,
            group=group,
            tags=list(tags),
            config=dict(run_config),
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror the values of one step."""
        self._run.log(dict(values), step=step)

    def log_record(self, record: Mapping[str, Any], predictions: Path) -> None:
        """Write scores and counts into the run's summary and the predictions into a table."""
        summary = {f"test/{name}": value for name, value in record.get("metrics", {}).items()}
        summary |= {f"parameters/{k}": v for k, v in record.get("parameters", {}).items()}
        self._run.summary.update(summary)
        if predictions.exists():
            # A text may hold characters at which `splitlines` would cut.
            lines = predictions.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
            if rows:
                columns = list(rows[0])
                data = [[str(row.get(column)) for column in columns] for row in rows]
                self._run.log({"predictions": self._wandb.Table(columns=columns, data=data)})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _netrc_has_wandb() -> bool:
    """Return whether `wandb login` stored a key; the key itself is never read."""
    import netrc

    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
