"""Files of this project that are read again: what does not fit is named, and never used.

A JSON file can be sealed: its last key then holds the sha256 of all the others. Files that were
written before there were seals have none; they are read, and nothing of them is verified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: key of a seal.
SEAL = "sha256"


class UnreadableError(ValueError):
    """A file is damaged, of another run, or of a newer version; the message has its path."""


def damaged(path: Path, problem: str, advice: str) -> UnreadableError:
    """Return the error for a file that is not what was written.

    Args:
        path: the file.
        problem: what is wrong with it.
        advice: what to do.
    """
    return UnreadableError(f"{path} is damaged ({problem}); {advice}")


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        advice: what to do where it is damaged.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}", advice) from error
    except (ValueError, RecursionError) as error:
        what = "it is empty" if _is_empty(path) else f"no JSON: {error}"
        raise damaged(path, what, advice) from error
    if not isinstance(content, dict):
        raise damaged(path, f"a {type(content).__name__} instead of a JSON object", advice)
    return content


def _is_empty(path: Path) -> bool:
    return path.stat().st_size == 0


def sealed(content: Mapping[str, Any], *, beside: Collection[str] = ()) -> dict[str, Any]:
    """Return JSON values with their seal behind them.

    Args:
        content: what is written.
        beside: keys that the seal leaves out.
    """
    plain = json.loads(json.dumps({key: v for key, v in content.items() if key != SEAL}))
    return {**plain, SEAL: _digest(plain, beside)}


def check_seal(
    path: Path, content: Mapping[str, Any], advice: str, *, beside: Collection[str] = ()
) -> None:
    """Compare a content with its seal; one without a seal is taken as it is.

    Args:
        path: where it was read.
        content: from `read_json`.
        advice: what to do where they differ.
        beside: as for `sealed`.

    Raises:
        UnreadableError: it was changed after it was written.
    """
    if SEAL in content and content[SEAL] != _digest(content, beside):
        raise damaged(path, "it was changed after it was written: its seal does not fit", advice)


def _digest(content: Mapping[str, Any], beside: Collection[str]) -> str:
    kept = {key: value for key, value in content.items() if key != SEAL and key not in beside}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_schema(path: Path, found: Any, known: Collection[int], what: str = "schema") -> None:
    """Refuse a file of a form that is not known.

    Raises:
        UnreadableError: the message has its number and those that are known.
    """
    if isinstance(found, int) and not isinstance(found, bool) and found in known:
        return
    numbers = " and ".join(map(str, sorted(known)))
    is_newer = isinstance(found, int) and found > max(known)
    why = "a newer version wrote it; use that one" if is_newer else "it is damaged or too old"
    raise UnreadableError(
        f"{path} has {what} {found!r}, and this version reads {what} {numbers}: {why}, or remove it"
    )


def checksum(path: Path, advice: str) -> str:
    """Return the hex sha256 of a file.

    Raises:
        UnreadableError: it is missing, no file, or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except FileNotFoundError as error:
        raise UnreadableError(f"{path} is missing; {advice}") from error
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror}", advice) from error
    return digest.hexdigest()


def check_checksum(path: Path, expected: str, said_by: str, advice: str) -> None:
    """Refuse a file whose bytes are not those that were written.

    Args:
        path: the file.
        expected: hex sha256.
        said_by: what says so, for the message.
        advice: what to do where they differ.

    Raises:
        UnreadableError: they differ, or there is no such file.
    """
    if checksum(path, advice) != expected:
        raise damaged(path, f"its checksum is not the one in {said_by}", advice)


def read_tensors(path: Path, advice: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        UnreadableError: it is missing, or no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        problem = "a folder instead of a file" if path.is_dir() else "missing"
        raise damaged(path, problem, advice)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"no safetensors: {error}", advice) from error
