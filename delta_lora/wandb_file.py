"""Read the files that wandb writes offline, with wandb's own description of their records.

A ``.wandb`` file is a log in the manner of LevelDB: 7 bytes of header, then blocks of 32 KiB. In
them pieces of records follow each other, each behind its checksum, length and kind (whole, first,
middle, last). Less than 7 bytes at the end of a block are filled up.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER, PIECE = 32768, 7, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbFile:
    """What a file holds.

    Attributes:
        run: wandb's record of the run: its name, group, tags and so on; None in an empty file.
        config: by key.
        history: step and values of every logged row.
        summary: by key.
        metrics: what was defined of each metric, by its name or pattern.
        exit_code: None where the run did not end.
    """

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def read(path: Path) -> WandbFile:
    """Return what stands in a ``.wandb`` file, up to where it was cut off, if it was."""
    from wandb.proto import wandb_internal_pb2

    found = WandbFile()
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= _values(record.run.config.update)
        elif kind == "config":
            found.config |= _values(record.config.update)
        elif kind == "history":
            found.history.append((record.history.step.num, _values(record.history.item)))
        elif kind == "summary":
            found.summary |= _values(record.summary.update)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    place, parts = HEADER, b""
    while place + PIECE.size <= len(content):
        left = BLOCK - place % BLOCK
        if left < PIECE.size:
            place += left
            continue
        _, length, kind = PIECE.unpack_from(content, place)
        place += PIECE.size
        piece = content[place : place + length]
        place += length
        if len(piece) < length or kind not in (WHOLE, FIRST, MIDDLE, LAST):
            return
        parts = piece if kind in (WHOLE, FIRST) else parts + piece
        if kind in (WHOLE, LAST):
            yield parts
