"""What can happen to a file: one list of damages, for every kind of file and folder.

A damage takes the file and, where there is one, the same file of another run, and changes the file
in place. It raises `NotApplicableError` where it has no meaning.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_lora.stored import sealed
from scripts.runs.checksums import BESIDE

Change = Callable[[Path, Path | None], None]


class NotApplicableError(Exception):
    """A damage that a file cannot have."""


def _put(path: Path, content: bytes) -> None:
    """Write a file anew: it may be a hard link to the sound one."""
    path.unlink()
    path.write_bytes(content)


def truncate(path: Path, other: Path | None) -> None:
    """Cut the second half off."""
    content = path.read_bytes()
    if len(content) < 2:
        raise NotApplicableError
    _put(path, content[: len(content) // 2])


def empty(path: Path, other: Path | None) -> None:
    """Leave nothing in it."""
    _put(path, b"")


def flip(path: Path, other: Path | None) -> None:
    """Flip one bit behind two thirds of it."""
    content = bytearray(path.read_bytes())
    if not content:
        raise NotApplicableError
    content[len(content) * 2 // 3] ^= 1
    _put(path, bytes(content))


def flip_early(path: Path, other: Path | None) -> None:
    """Flip one bit of the first tenth: the head of a file of tensors, the first keys of JSON."""
    content = bytearray(path.read_bytes())
    if len(content) < 20:
        raise NotApplicableError
    content[len(content) // 10] ^= 2
    _put(path, bytes(content))


def swap(path: Path, other: Path | None) -> None:
    """Put the same file of another run in its place."""
    if other is None or not other.is_file() or other.read_bytes() == path.read_bytes():
        raise NotApplicableError
    _put(path, other.read_bytes())


def folder(path: Path, other: Path | None) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


def binary(path: Path, other: Path | None) -> None:
    """Put bytes in its place that are no text."""
    _put(path, bytes(range(256)) * 4)


def _text(text: str) -> Change:
    def change(path: Path, other: Path | None) -> None:
        _put(path, text.encode())

    return change


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise NotApplicableError from error


def digit(path: Path, other: Path | None) -> None:
    """Change the first number of a JSON file, as a hand would: it stays well formed."""
    content = _json(path)
    if not _change_number(content):
        raise NotApplicableError
    _put(path, json.dumps(content, indent=2).encode())


def _change_number(content: Any) -> bool:
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(pairs):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "schema":
            content[key] = value + 1
            return True
        if isinstance(value, (dict, list)) and _change_number(value):
            return True
    return False


def types(path: Path, other: Path | None) -> None:
    """Give every value of a JSON object another type."""
    content = _json(path)
    if not isinstance(content, dict):
        raise NotApplicableError
    wrong = {k: [] if isinstance(v, (dict, str)) else {"a": "b"} for k, v in content.items()}
    _put(path, json.dumps(wrong).encode())


def schema(path: Path, other: Path | None) -> None:
    """Let a newer version have written it."""
    content = _json(path)
    keys = {"schema", "format"} & content.keys() if isinstance(content, dict) else set()
    if not keys:
        raise NotApplicableError
    _put(path, json.dumps({**content, keys.pop(): 99}).encode())


def _tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    def apply(path: Path, other: Path | None) -> None:
        from safetensors.torch import load_file, save_file

        if path.suffix != ".safetensors":
            raise NotApplicableError
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        if not tensors:
            raise NotApplicableError
        changed = change(tensors)
        path.unlink()
        save_file(changed, path)

    return apply


def _nan(tensors: dict[str, Any]) -> dict[str, Any]:
    name = next((n for n, t in tensors.items() if t.is_floating_point()), None)
    if name is None:
        raise NotApplicableError
    return {**tensors, name: tensors[name] * float("nan")}


def _fewer(tensors: dict[str, Any]) -> dict[str, Any]:
    return dict(list(tensors.items())[1:])


def _reshaped(tensors: dict[str, Any]) -> dict[str, Any]:
    name, tensor = next(iter(tensors.items()))
    return {**tensors, name: tensor.reshape(-1, 1)}


#: of any file.
OF_BYTES: dict[str, Change] = {
    "truncated": truncate,
    "empty": empty,
    "bit-flip": flip,
    "early-bit-flip": flip_early,
    "of-another-run": swap,
    "folder": folder,
    "binary": binary,
    "{}": _text("{}"),
    "[]": _text("[]"),
    "null": _text("null\n"),
    "nested": _text("[" * 100_000),
}
#: of JSON.
OF_JSON: dict[str, Change] = {"digit": digit, "types": types, "schema-99": schema}
#: of safetensors.
OF_TENSORS: dict[str, Change] = {
    "nan": _tensors(_nan),
    "missing-tensor": _tensors(_fewer),
    "no-tensor": _tensors(lambda tensors: {}),
    "other-shape": _tensors(_reshaped),
}
ALL: dict[str, Change] = {**OF_BYTES, **OF_JSON, **OF_TENSORS}


@dataclass(frozen=True)
class Damage:
    """One damage to one file of a folder.

    Attributes:
        file: relative to the folder.
        kind: a key of `ALL`.
    """

    file: str
    kind: str

    def __str__(self) -> str:
        """As a test is called."""
        return f"{self.file} {self.kind}"

    def apply(self, to: Path, other: Path | None = None) -> Path:
        """Damage the file in the folder `to`; return its path.

        Args:
            to: a folder that is this test's own.
            other: the same folder of another run.

        Raises:
            NotApplicableError: the file cannot have this damage.
        """
        path = to / self.file
        ALL[self.kind](path, None if other is None else other / self.file)
        return path


def damages(folder: Path, *patterns: str) -> Iterator[Damage]:
    """Yield every damage to every file of a folder that fits one of `patterns`."""
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(files):
        for kind in ALL:
            is_json = path.suffix == ".json" or kind not in OF_JSON
            if is_json and (path.suffix == ".safetensors" or kind not in OF_TENSORS):
                yield Damage(path.relative_to(folder).as_posix(), kind)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a record with its seal, as only this project would: it is another sound record."""
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    _put(path, json.dumps(sealed(record, beside=tuple(BESIDE))).encode())


def copy(folder: Path, to: Path) -> Path:
    """Copy a folder of runs; return the copy."""
    if to.exists():
        shutil.rmtree(to)
    shutil.copytree(folder, to, symlinks=True)
    return to
