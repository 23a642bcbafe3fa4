"""What a table or figure is: `configs/table/<name>.yaml` and `results/paper/*.yaml`, checked.

Adding a table is adding one yaml; `configs/table/table1.yaml` explains the keys. A figure is a yaml
with a `kind` other than ``table``; it has series instead of columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from delta_lora.checks import near
from scripts.runs.cells import Cell, list_cells

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "configs" / "table"
PAPER = ROOT / "results" / "paper"

STATUSES = ("text", "derived", "recalled")
#: what a yaml describes: a table of scores, or the similarity of weights before and after.
KINDS = ("table", "similarity")
#: series of a figure of kind ``similarity``.
SERIES = ("query", "value")
EXPECTATIONS = ("better", "worse", "best", "comparable")
#: what a claim about a similarity says of most blocks.
SIMILARITY_EXPECTATIONS = ("highest", "lowest")
RESOURCES = (
    "peak_memory_bytes", "step_time_s", "train_time_s", "predict_time_s", "tokens_per_s"
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One score of a table.

    Attributes:
        name: key of the column in the results.
        label: its head.
        run: which of the table's runs it is read from; None for a mean of columns.
        metric: the task's name of the metric; None for a mean of columns.
        scale: factor from the stored value to the printed one (1 for a mean).
        decimals: digits behind the point.
        higher_is_better: direction in which the metric improves.
        mean_of: names of the columns that it averages, seed by seed.
    """

    name: str
    label: str
    run: str | None
    metric: str | None
    scale: float
    decimals: int
    higher_is_better: bool
    mean_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One method of a table; `is_control` marks rows that the paper does not have."""

    name: str
    label: str
    overrides: tuple[str, ...]
    is_control: bool = False


@dataclass(frozen=True)
class Part:
    """One comparison of a claim (or a contrast, where `expect` is None).

    `columns` are columns of a table, or series of a figure.
    """

    row: str
    against: tuple[str, ...]
    expect: str | None
    columns: tuple[str, ...]
    resources: tuple[str, ...]
    limit: float | None
    paper: Mapping[str, float]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the comparisons that must all hold."""

    id: str
    statement: str
    status: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class TableSpec:
    """A table or figure: what runs, what is shown, what is judged.

    `side_columns` are further scores of the same runs, shown below the table and never judged.
    `is_optional` marks what is no part of the paper and of no command but its own. `model` is what
    the title calls the model, whose place the name of another one takes.
    """

    name: str
    kind: str
    number: str
    title: str
    tuning: str
    runs: Mapping[str, tuple[str, ...]]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    contrasts: tuple[Part, ...]
    paper: Mapping[str, Any]
    side_columns: tuple[Column, ...] = ()
    is_optional: bool = False
    model: str | None = None

    def row(self, name: str) -> Row:
        """Return the row called `name`."""
        return next(row for row in self.rows if row.name == name)

    def column(self, name: str) -> Column:
        """Return the column called `name`."""
        return next(column for column in self.columns if column.name == name)

    def cells(self, *, scale: str, seeds: Sequence[int], extra: Sequence[str] = ()) -> list[Cell]:
        """Return the runs that it needs; arguments as `scripts.runs.cells.list_cells`."""
        rows = {row.name: row.overrides for row in self.rows}
        return list_cells(self.name, self.runs, rows, scale=scale, seeds=seeds, extra=extra)


def table_names() -> list[str]:
    """Return the tables and figures that have a configuration."""
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def paper_table_names() -> list[str]:
    """Return the tables and figures that are not optional."""
    return [name for name in table_names() if not load_table(name).is_optional]


def load_table(name: str) -> TableSpec:
    """Read and check a table's configuration, its claims and the paper's numbers.

    Args:
        name: ``table1`` or ``1``.

    Raises:
        ValueError: the table is unknown or one of the files is inconsistent; the message names the
            file, the key and what is allowed.
    """
    known = table_names()
    name = f"table{name}" if f"table{name}" in known else name
    if name not in known:
        raise ValueError(f"unknown table {name!r}; {near(name, known)}known: {', '.join(known)}")
    path = TABLES / f"{name}.yaml"
    try:
        return _build_table(name, read_yaml(path))
    except ValueError as error:
        raise ValueError(f"{path.relative_to(ROOT)}: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a yaml file's mapping; duplicate keys and other contents raise ValueError."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read {path.name}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold a mapping, got {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _build_table(name: str, raw: dict[str, Any]) -> TableSpec:
    kind = raw.get("kind", "table")
    check_names([kind], KINDS, "kind")
    keys: tuple[str, ...] = ("number", "title", "tuning", "runs", "rows")
    if kind == "table":
        keys += ("paper", "columns")
    optional = ("kind", "claims", "contrasts", "optional", "side_columns", "model")
    check_keys(raw, "the table", required=keys, optional=optional)
    check_names([raw.get("optional", False)], (True, False), "optional")
    if raw.get("model", "") not in raw["title"]:
        raise ValueError(f"the title {raw['title']!r} does not name model: {raw['model']}")
    runs = {str(run): tuple(overrides) for run, overrides in raw["runs"].items()}
    columns = _build_columns(raw["columns"], tuple(runs)) if kind == "table" else ()
    side_columns = _build_columns(raw.get("side_columns", []), tuple(runs))
    rows = tuple(_build_row(item) for item in raw["rows"])
    series = tuple(c.name for c in columns) if kind == "table" else SERIES
    all_columns = [*series, *(c.name for c in side_columns)]
    for what, names in (("row", [r.name for r in rows]), ("column", all_columns)):
        if not names:
            raise ValueError(f"a table needs at least one {what}")
        if len(set(names)) < len(names):
            raise ValueError(f"two {what}s have the same name: {names}")
    if raw.get("paper") is None:
        paper: dict[str, Any] = {"title": raw["title"], "rows": {}}
    else:
        paper = read_yaml(PAPER / raw["paper"])
        _check_paper(paper, raw["paper"])
    spec = TableSpec(
        name=name,
        kind=kind,
        number=str(raw["number"]),
        title=str(raw["title"]),
        tuning=str(raw["tuning"]),
        runs=runs,
        columns=columns,
        rows=rows,
        claims=_load_claims(raw.get("claims", []), rows, series),
        contrasts=tuple(
            _build_part(item, "a contrast", rows, series, is_contrast=True)
            for item in raw.get("contrasts", [])
        ),
        paper=paper,
        side_columns=side_columns,
        is_optional=raw.get("optional", False),
        model=raw.get("model"),
    )
    strangers = sorted(paper["rows"].keys() - {row.name for row in rows})
    if strangers:
        raise ValueError(f"rows of {raw['paper']} are missing from the table: {strangers}")
    for row_name, row in paper["rows"].items():
        strangers = sorted(row.get("metrics", {}).keys() - {column.name for column in columns})
        if strangers:
            raise ValueError(f"{raw['paper']} has unknown columns in {row_name}: {strangers}")
    return spec


def _build_columns(items: Sequence[Mapping[str, Any]], runs: tuple[str, ...]) -> tuple[Column, ...]:
    columns: list[Column] = []
    for item in items:
        what = f"column {item.get('name')!r}"
        is_mean = "mean_of" in item
        source = ("mean_of",) if is_mean else ("metric", "scale")
        keys = ("name", "label", "decimals", "better", *source)
        check_keys(item, what, required=keys, optional=() if is_mean else ("run",))
        if item["better"] not in ("higher", "lower"):
            raise ValueError(f"{what}: better={item['better']!r}; use higher or lower")
        run = None
        if not is_mean:
            run = str(item.get("run", runs[0] if len(runs) == 1 else ""))
            check_names([run], runs, f"{what}: run")
        mean_of = tuple(item.get("mean_of", ()))
        check_names(mean_of, [c.name for c in columns if not c.mean_of], f"{what}: mean_of")
        columns.append(
            Column(
                name=str(item["name"]),
                label=str(item["label"]),
                run=run,
                metric=item.get("metric"),
                scale=float(item.get("scale", 1.0)),
                decimals=int(item["decimals"]),
                higher_is_better=item["better"] == "higher",
                mean_of=mean_of,
            )
        )
    return tuple(columns)


def _build_row(item: Mapping[str, Any]) -> Row:
    what = f"row {item.get('name')!r}"
    check_keys(item, what, required=("name", "label", "overrides"), optional=("control",))
    overrides = tuple(map(str, item["overrides"]))
    return Row(str(item["name"]), str(item["label"]), overrides, bool(item.get("control", False)))


def _load_claims(
    ids: Sequence[str], rows: tuple[Row, ...], series: tuple[str, ...]
) -> tuple[Claim, ...]:
    known = read_yaml(PAPER / "claims.yaml")
    check_names(ids, list(known), "claims")
    claims = []
    for claim_id in ids:
        raw, what = known[claim_id], f"claims.yaml, {claim_id}"
        required, optional = (
            ("short", "statement", "status", "parts"),
            ("table", "figure", "source"),
        )
        check_keys(raw, what, required=required, optional=optional)
        check_names([raw["status"]], STATUSES, f"{what}: status")
        parts = tuple(_build_part(item, what, rows, series) for item in raw["parts"])
        claims.append(Claim(claim_id, raw["statement"], raw["status"], parts))
    return tuple(claims)


def _build_part(
    raw: Mapping[str, Any],
    what: str,
    rows: tuple[Row, ...],
    series: tuple[str, ...],
    *,
    is_contrast: bool = False,
) -> Part:
    expect = None if is_contrast else raw.get("expect")
    if is_contrast:
        check_keys(raw, what, required=("row", "against"), optional=("columns",))
    elif expect == "comparable":
        check_keys(raw, what, required=("row", "against", "expect", "resources", "limit"))
    elif expect == "best":
        check_keys(raw, what, required=("row", "expect", "columns"))
    else:
        allowed = SIMILARITY_EXPECTATIONS if series == SERIES else EXPECTATIONS
        check_names([expect], allowed, f"{what}: expect")
        check_keys(raw, what, required=("row", "against", "expect", "columns"), optional=("paper",))
    against = tuple(raw.get("against", ()))
    if expect == "best":
        against = tuple(r.name for r in rows if not r.is_control and r.name != raw["row"])
    check_names([raw["row"], *against], [row.name for row in rows], f"{what}: rows")
    known = series
    wanted = () if expect == "comparable" else raw.get("columns", "all")
    chosen = known if wanted == "all" else tuple(wanted)
    paper = {str(key): float(value) for key, value in raw.get("paper", {}).items()}
    check_names([*chosen, *paper], known, f"{what}: columns")
    resources = tuple(raw.get("resources", ()))
    check_names(resources, RESOURCES, f"{what}: resources")
    limit = float(raw["limit"]) if expect == "comparable" else None
    return Part(raw["row"], against, expect, chosen, resources, limit, paper)


def _check_paper(paper: Mapping[str, Any], name: str) -> None:
    """Check that every number of the paper carries its status."""
    check_keys(paper, name, required=("title", "rows"))
    for row_name, row in paper["rows"].items():
        what = f"{name}, {row_name}"
        check_keys(row, what, required=(), optional=("trainable", "updatable", "metrics", "note"))
        for key, value in row.get("metrics", {}).items():
            check_keys(value, f"{what}, {key}", required=("value", "status"))
            check_names([value["status"]], STATUSES, f"{what}, {key}: status")
        for key in row.keys() & {"trainable", "updatable"}:
            value = row[key]
            check_keys(value, f"{what}, {key}", required=("printed", "status"), optional=("count",))
            check_names([value["status"]], STATUSES, f"{what}, {key}: status")


def check_keys(
    raw: Any, what: str, *, required: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """Check the keys of a mapping that a yaml file holds.

    Raises:
        ValueError: one lacks or is unknown; the message says which are allowed.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{what} must be a mapping of {', '.join(required)}, got {raw!r}")
    missing = [key for key in required if key not in raw]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; it needs {', '.join(required)}")
    strangers = sorted(map(str, raw.keys() - {*required, *optional}))
    if strangers:
        allowed = ", ".join([*required, *optional])
        raise ValueError(f"{what} has unknown keys {strangers}; allowed: {allowed}")


def check_names(names: Sequence[Any], known: Sequence[Any], what: str) -> None:
    """Check that all `names` are `known`.

    Raises:
        ValueError: one is not; the message says which are allowed.
    """
    strangers = [name for name in names if name not in known]
    if strangers:
        raise ValueError(f"{what}: unknown {strangers}; allowed: {', '.join(map(str, known))}")
