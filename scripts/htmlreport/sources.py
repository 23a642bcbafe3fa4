"""What the report of a scale is made of: the files of ``results/<scale>`` and the records of runs.

Nothing is computed here. A file that does not fit costs its section and is named on the page.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delta_lora.stored import UnreadableError
from scripts.reporting.results import read_accepted
from scripts.reporting.spec import PAPER, TableSpec, load_table, read_yaml
from scripts.runs.checksums import RECORD, read_record

Content = Mapping[str, Any]

#: the folder of the report in ``results/<scale>``, and what stands in it.
REPORT, PAGE, SAMPLES = "report", "index.html", "samples.json"


@dataclass(frozen=True)
class Sweep:
    """A sweep: its name, its pictures and its table (head first; empty where there is none)."""

    name: str
    title: str
    pictures: tuple[Path, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass
class Sources:
    """All that a report is made of.

    Attributes:
        folder: ``results/<scale>``.
        scale: its scale.
        tables: contents of ``table*.json`` by name, the paper's first.
        figures: contents of ``figure*.json`` by name.
        specs: configurations of both, where they are known.
        claims: the claims of the paper, by id.
        audit: content of ``audit.json``; None where there is none.
        records: completed records of the runs that the tables name, by signature.
        samples: by signature: curves and predictions kept from run folders.
        sweeps: those of ``sweeps/*/``.
        hashes: sha256 of each JSON file that was read, by name.
        problems: what could not be read, and why.
    """

    folder: Path
    scale: str
    tables: dict[str, Content] = field(default_factory=dict)
    figures: dict[str, Content] = field(default_factory=dict)
    specs: dict[str, TableSpec] = field(default_factory=dict)
    claims: dict[str, Content] = field(default_factory=dict)
    audit: Content | None = None
    records: dict[str, Content] = field(default_factory=dict)
    samples: dict[str, Content] = field(default_factory=dict)
    sweeps: list[Sweep] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def contents(self) -> dict[str, Content]:
        """The tables, then the figures."""
        return {**self.tables, **self.figures}

    def run_names(self) -> list[str]:
        """Return the runs of all tables and figures, each once, in the order of their rows."""
        rows = (row for content in self.contents.values() for row in content["rows"])
        return list(dict.fromkeys(name for row in rows for name in row["runs"]))

    def picture(self, name: str) -> Path | None:
        """Return the picture ``<name>.svg`` (else ``.png``) of the scale, or None."""
        paths = (self.folder / f"{name}.{suffix}" for suffix in ("svg", "png"))
        return next((path for path in paths if path.exists()), None)


def read_sources(results: Path, scale: str, outputs: Path | None) -> Sources:
    """Read what a report is made of.

    Args:
        results: the folder ``results``.
        scale: tiny, small or paper.
        outputs: folder of the run folders, for runs without an accepted record; None reads none.

    Raises:
        ValueError: there is no table or figure at this scale.
    """
    sources = Sources(results / scale, scale)
    sources.claims = read_yaml(PAPER / "claims.yaml")
    for path in sorted(sources.folder.glob("*.json"), key=_order):
        _attempt(sources, lambda path=path: _read_content(sources, path))  # type: ignore[misc]
    if not sources.contents:
        raise ValueError(
            f"{sources.folder} holds no table; make one first: make reproduce-table1 SCALE={scale}"
        )
    _attempt(sources, lambda: _read_records(sources, results, outputs))
    samples = sources.folder / REPORT / SAMPLES
    if samples.exists():
        _attempt(sources, lambda: _read_samples(sources, samples))
    for folder in sorted((sources.folder / "sweeps").glob("*/")):
        _attempt(sources, lambda folder=folder: _read_sweep(sources, folder))  # type: ignore[misc]
    return sources


def _order(path: Path) -> tuple[bool, str]:
    """The paper's tables first, what is beside them (``table4_from_base``) after."""
    return "_" in path.stem, path.stem


def _attempt(sources: Sources, read: Callable[[], None]) -> None:
    try:
        read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sources.problems.append(f"{type(error).__name__}: {error}")


def _read_content(sources: Sources, path: Path) -> None:
    content = _read_json(sources, path)
    if "table" in content:
        sources.tables[path.stem] = content
    elif "figure" in content:
        sources.figures[path.stem] = content
    elif content.get("page") == "audit":
        sources.audit = content
        return
    else:
        return
    sources.specs[path.stem] = load_table(path.stem)


def _read_json(sources: Sources, path: Path) -> Any:
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON ({error}); make it anew") from error
    name = str(path.relative_to(sources.folder))
    sources.hashes[name] = hashlib.sha256(data).hexdigest()
    return content


def _read_records(sources: Sources, results: Path, outputs: Path | None) -> None:
    accepted = read_accepted(results / "runs", sources.problems)
    for name in sources.run_names():
        record = accepted.get(name)
        if record is None and outputs is not None and (outputs / name / RECORD).exists():
            try:
                record = read_record(outputs / name, name, is_whole=True)
            except UnreadableError as error:
                sources.problems.append(str(error))
        if record is not None and record["status"] == "completed":
            sources.records[name] = record


def _read_samples(sources: Sources, path: Path) -> None:
    known = set(sources.run_names())
    content = _read_json(sources, path)
    sources.samples = {name: content[name] for name in sorted(content) if name in known}


def _read_sweep(sources: Sources, folder: Path) -> None:
    pictures = tuple(_pictures(folder))
    tables = sorted(folder.glob("*.csv"), key=lambda path: ("pivot" not in path.stem, path.stem))
    rows: tuple[tuple[str, ...], ...] = ()
    if tables:
        with tables[0].open(encoding="utf-8", newline="") as stream:
            rows = tuple(map(tuple, csv.reader(stream)))
    path = folder / "sweep.json"
    title = str(_read_json(sources, path).get("title", "")) if path.exists() else ""
    if pictures or rows:
        sources.sweeps.append(Sweep(folder.name, title, pictures, rows))


def _pictures(folder: Path) -> Iterator[Path]:
    """Yield the pictures of a folder, each once, as SVG where there is one."""
    svg = {path.stem: path for path in folder.glob("*.svg")}
    png = {path.stem: path for path in folder.glob("*.png")}
    for stem in sorted({*svg, *png}):
        yield svg.get(stem) or png[stem]
