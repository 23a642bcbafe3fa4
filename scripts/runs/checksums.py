"""What ties a run folder to its record: the record is sealed and names the sha256 of its files.

``record.json`` names the files that a repetition gives again to the bit, ``resources.json`` the
others. Whoever reads one of them for a result compares it first (`check_files`). Records of schema
2 name none but the adapter: they are read as before, and nothing else of them is verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_lora import stored

RECORD, RESOURCES = "record.json", "resources.json"
ADAPTER = "adapter/adapter_model.safetensors"
METRICS, PREDICTIONS, MODEL = "metrics.jsonl", "predictions.jsonl", "model"
ITEM_SPREAD = "item_spread.json"
#: the predictions of a run without a record, each tied to the run and to those before it.
PARTIAL = "predictions.partial.jsonl"
#: of a record; raised when an older version could not read it as it is meant.
SCHEMA = 3
KNOWN_SCHEMAS = (2, SCHEMA)
#: what a record carries of the files beside it; its seal leaves it out.
BESIDE = {"resources": RESOURCES, "item_spread": ITEM_SPREAD}
#: what else of a run is measured or made for this machine, and read again.
OTHERS = ("config.yaml", "measured.jsonl")
#: key of the files in a record and in its resources.
FILES = "files"
#: of a file beside a record: the run that it is of.
RUN = "run"

_DICTIONARIES = (
    "task", "model", "parameters", "metrics", "missing_metrics", "training", "config", "provenance",
)  # fmt: skip
_TEXTS = ("signature", "group", "scale", "method")


def advice_for(folder: Path) -> str:
    """Return what to do where a record is damaged: what removing it costs."""
    has_checkpoints = any((folder / "checkpoints").glob("step-*"))
    again = "only scores again" if has_checkpoints else "makes this run again"
    return f"remove it, and the same command {again}"


# ---------------------------------------------------------------------- records


def read_record(folder: Path, name: str | None = None, *, is_whole: bool = False) -> dict[str, Any]:
    """Return the record of a run folder, with what stands beside it: see `BESIDE`.

    Args:
        folder: of the run.
        name: of the run that it must be; None takes any.
        is_whole: whether all that a record has must be there.

    Raises:
        FileNotFoundError: there is none.
        UnreadableError: one of them is damaged, of another run, or of a newer version.
    """
    path, advice = folder / RECORD, advice_for(folder)
    record = stored.read_json(path, advice)
    check_record(path, record, advice, is_whole=is_whole)
    if name is not None and (found := record.get("signature", name)) != name:
        raise stored.damaged(path, f"it is the record of another run, {found}", advice)
    for key, file in BESIDE.items():
        if (folder / file).exists():
            content = _read_beside(folder / file, record)
            record[key] = {k: v for k, v in content.items() if k not in (FILES, RUN, stored.SEAL)}
    return record


def check_record(
    path: Path, record: Mapping[str, Any], advice: str, *, is_whole: bool = True
) -> None:
    """Refuse what is no record, or not the one that was written.

    Args:
        path: where it was read.
        record: from `stored.read_json`.
        advice: what to do.
        is_whole: whether one without a schema must have all that a record has.

    Raises:
        UnreadableError: as said.
    """
    status = record.get("status")
    if "schema" not in record and not is_whole:
        if status != "failed" and not isinstance(record.get("signature"), str):
            raise stored.damaged(path, "it names no run, so it is no record of one", advice)
    elif not isinstance(status, str):
        raise stored.damaged(path, "it has no status, so it is no record of a run", advice)
    elif "schema" in record or status == "completed":
        stored.check_schema(path, record.get("schema"), KNOWN_SCHEMAS)
    if record.get("schema") == SCHEMA and stored.SEAL not in record:
        raise stored.damaged(path, "it has no seal", advice)
    stored.check_seal(path, record, advice, beside=tuple(BESIDE))
    error = record.get("error")
    if status == "failed" and not (isinstance(error, dict) and "message" in error):
        raise stored.damaged(path, "it failed, and has no error", advice)
    if status != "completed" or not (is_whole or "schema" in record):
        return
    lacking = [key for key in _DICTIONARIES if not isinstance(record.get(key), dict)]
    lacking += [key for key in _TEXTS if not isinstance(record.get(key), str)]
    if lacking:
        raise stored.damaged(path, f"it lacks {', '.join(lacking)}", advice)


def _read_beside(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file that stands beside a record and belongs to it."""
    advice = "remove it, and what it says is unknown"
    content = stored.read_json(path, advice)
    if record.get("schema") == SCHEMA and stored.SEAL not in content:
        raise stored.damaged(path, "it has no seal", advice)
    stored.check_seal(path, content, advice)
    if content.get(RUN, record.get("signature")) != record.get("signature"):
        raise stored.damaged(path, f"it is of another run, {content[RUN]}", advice)
    for key, value in content.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if path.name == RESOURCES and not is_number and key not in (FILES, RUN, stored.SEAL):
            raise stored.damaged(path, f"{key} is {value!r}, no number", advice)
    mine = record.get(FILES, {}).get(PREDICTIONS)
    is_known = path.name == ITEM_SPREAD and mine is not None
    if is_known and content.get("predictions_sha256", mine) != mine:
        raise stored.damaged(path, f"it is of other predictions than {RECORD} names", advice)
    return content


def write(
    folder: Path,
    record: Mapping[str, Any],
    resources: Mapping[str, Any],
    item_spread: Mapping[str, Any] | None,
) -> None:
    """Write the record of a completed run, and before it what stands beside it.

    Args:
        folder: of the run; all other files are written.
        record: from `scripts.runs.recording.record_of`.
        resources: seconds, bytes, rates.
        item_spread: from `scripts.runs.item_spread.measure`; None where nothing was predicted.
    """
    from delta_lora import checkpoint

    others = _checksums(folder, (folder / name for name in OTHERS))
    beside = {**resources, RUN: record["signature"], FILES: others}
    results = [folder / name for name in (METRICS, PREDICTIONS, ADAPTER)]
    files = _checksums(folder, [*results, *_model_files(folder)])
    checkpoint.write_json(folder / RESOURCES, stored.sealed(beside))
    if item_spread is not None:
        write_item_spread(folder, record, item_spread)
    whole = stored.sealed({**record, FILES: files}, beside=tuple(BESIDE))
    checkpoint.write_json(folder / RECORD, whole)


def write_item_spread(
    folder: Path, record: Mapping[str, Any], item_spread: Mapping[str, Any]
) -> None:
    """Write how much the scores of a run spread over test items, tied to its record."""
    from delta_lora import checkpoint

    content = stored.sealed({**item_spread, RUN: record["signature"]})
    checkpoint.write_json(folder / ITEM_SPREAD, content)


def _checksums(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): stored.checksum(path, "run it again")
        for path in paths
        if path.is_file()
    }


def _model_files(folder: Path) -> list[Path]:
    """Return the files of a saved model and its tokenizer; hidden ones are not of it."""
    found = (folder / MODEL).rglob("*")
    return sorted(path for path in found if path.is_file() and path.name[0] != ".")


# ---------------------------------------------------------------------- files


def check_files(folder: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare files of a completed run with what its record says of them.

    Args:
        folder: of the run.
        names: of files, or `MODEL` for all of that folder; None compares all.

    Returns:
        The record, from `read_record`.

    Raises:
        FileNotFoundError: there is no record.
        UnreadableError: a file is missing, changed, or none that the run has written.
    """
    record = read_record(folder)
    known: dict[str, tuple[str, str]] = {}
    if isinstance(record.get("adapter_sha256"), str):  # said by records of schema 2 too
        known[ADAPTER] = (record["adapter_sha256"], RECORD)
    known |= {name: (value, RECORD) for name, value in record.get(FILES, {}).items()}
    if (folder / RESOURCES).exists():
        others = stored.read_json(folder / RESOURCES, "remove it").get(FILES, {})
        known |= {name: (value, RESOURCES) for name, value in others.items()}
    advice = (
        f"copy it again, or remove the folder {folder}, and the same command makes this run again"
    )
    for name, (value, said_by) in known.items():
        if names is None or name in names or name.partition("/")[0] in names:
            stored.check_checksum(folder / name, value, said_by, advice)
    has_model = any(name.startswith(f"{MODEL}/") for name in known)
    if has_model and (names is None or MODEL in names):
        for path in _model_files(folder):
            if path.relative_to(folder).as_posix() not in known:
                problem = f"the run has not written it: {RECORD} does not name it"
                raise stored.damaged(path, problem, "remove it")
    return record


def check_places(folder: Path) -> None:
    """Refuse a run folder in which a folder stands where a file belongs, or the other way round.

    Raises:
        UnreadableError: the message has the path.
    """
    for name in (METRICS, PREDICTIONS, PARTIAL, RECORD, *BESIDE.values(), ADAPTER, *OTHERS):
        if (folder / name).is_dir():
            raise stored.damaged(folder / name, "a folder instead of a file", "remove it")
    for name in ("checkpoints", "best", "adapter", MODEL):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise stored.damaged(folder / name, "a file instead of a folder", "remove it")
