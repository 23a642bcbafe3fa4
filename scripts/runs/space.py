"""Disk that runs need, and whether it is there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.planning.disk import downloads, hub_cache
from scripts.runs.cells import Cell
from scripts.runs.costs import estimate

GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Disk of some runs.

    Attributes:
        kept: bytes when all records stand.
        peak: bytes at most while they are made, with so many workers.
        unknown: runs whose disk is not known.
        downloads: repository to bytes that are not yet there; None where their number is not known.
    """

    kept: int
    peak: int
    unknown: int
    downloads: dict[str, int | None]


def disk_need(todo: Sequence[Cell], num_workers: int) -> Need:
    """Return the disk that runs need: what all keep, and what the largest use on top at once.

    Args:
        todo: the runs.
        num_workers: runs that work at the same time.
    """
    costs = [estimate(item.run.config) for item in todo]
    known = [(c.disk_bytes, c.disk_peak_bytes) for c in costs if c.disk_bytes is not None]
    kept = sum(stays for stays, _ in known)
    extra = sorted(((peak or stays) - stays for stays, peak in known), reverse=True)
    files: dict[tuple[str, str], int | None] = {}
    for item, cost in zip(todo, costs, strict=True):
        if cost.disk_bytes is not None:
            files |= downloads(item.run.config)
    wanted: dict[str, int | None] = {}
    for (repository, _), size in files.items():
        before = wanted.get(repository, 0)
        wanted[repository] = None if size is None or before is None else before + size
    return Need(kept, kept + sum(extra[:num_workers]), len(costs) - len(known), wanted)


def check_disk_space(todo: Sequence[Cell], num_workers: int) -> None:
    """Check that the disk holds what the runs will write.

    Args:
        todo: the runs, all in one folder of outputs.
        num_workers: runs that work at the same time.

    Raises:
        OSError: it does not; the message names the folder, the need and what is free.
    """
    if not todo:
        return
    folder = todo[0].run.outputs
    place = _existing(folder)
    need = disk_need(todo, num_workers)
    total, parts = need.peak, [f"{gib(need.kept)} stay, the rest while {num_workers} work(s)"]
    fetched = sum(size for size in need.downloads.values() if size is not None)
    cache = _existing(hub_cache())
    if fetched and cache.stat().st_dev == place.stat().st_dev:
        total += fetched
        parts.append(f"{gib(fetched)} are downloads to {hub_cache()}")
    free = shutil.disk_usage(place).free
    if total > free:
        raise OSError(
            f"the {len(todo)} open runs need {gib(total)} in {folder} ({'; '.join(parts)}), but "
            f"{gib(free)} are free there; name a folder on a larger disk with "
            "ARGS='paths.outputs=FOLDER', make fewer at once with WORKERS=1, or make room"
        )


def gib(size: int) -> str:
    """Return bytes as people say them: ``9 MiB``, ``0.2 GiB``, ``135 GiB``."""
    value = size / GIB
    if value < 0.1:
        return f"{size / 2**20:.0f} MiB"
    return f"{value:.0f} GiB" if value >= 100 else f"{value:.1f} GiB"


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.resolve().parents) if p.exists())
