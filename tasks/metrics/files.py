"""The plain-text files that the scorers' programs read: outputs, one a line, and references.

References are one a line as well, and an empty line ends the group of an instance. Plain or gzip,
in UTF-8; every mistake is named with file and line, before anything is scored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from delta_lora.protocols import Scores
from tasks.data import Document, read_document, read_lines, shorten


def read_pair(predictions: Path, references: Path) -> tuple[list[str], list[list[str]]]:
    """Return the outputs and the references of as many instances.

    Blank lines at the end of the outputs are outputs only where there are instances for them.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is not of its form, or the two are not of equally many instances.
    """
    if predictions.is_file() and references.is_file() and predictions.samefile(references):
        raise ValueError(
            f"{predictions} is given for the outputs and for the references; name a file of each"
        )
    outputs, groups = read_predictions(predictions), read_references(references)
    while len(outputs) > len(groups) and not outputs[-1]:
        outputs.pop()
    if len(outputs) != len(groups):
        raise ValueError(
            f"{predictions} has {len(outputs)} outputs, but {references} has {len(groups)} "
            f"instances (groups of references, each ended by an empty line; without any empty line "
            "every line is one); give one output a line for each, an empty line for an empty one"
        )
    return outputs, groups


def read_predictions(path: Path) -> list[str]:
    """Return the outputs of an official file: one a line, empty lines are empty outputs.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty, no text in UTF-8, or JSON.
    """
    document = _read(path, blank=True)
    lines = [line.strip() for _, line in read_lines(document)]
    # Blank lines at the end are left out there, and are outputs here.
    content = document.data.removesuffix(b"\n")
    lines += [""] * (content.count(b"\n") + 1 - len(lines))
    _refuse_json(document, lines)
    return lines


def read_references(path: Path) -> list[list[str]]:
    """Return the references of an official file: one a line, groups end at an empty line.

    A file without an empty line between texts has one reference an instance.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty, no text in UTF-8, JSON, or has two empty lines in a row.
    """
    document = _read(path)
    groups: list[list[str]] = [[]]
    for number, line in read_lines(document):
        text = line.strip()
        if text:
            groups[-1].append(text)
        elif groups[-1]:
            groups.append([])
        else:
            raise ValueError(
                f"{path}, line {number}: a group without references; "
                "separate the groups by exactly one empty line"
            )
    _refuse_json(document, [text for group in groups for text in group])
    return [[text] for text in groups[0]] if len(groups) == 1 else groups


def _read(path: Path, *, blank: bool = False) -> Document:
    if not path.exists():
        target = f" (a link to {path.readlink()})" if path.is_symlink() else ""
        raise FileNotFoundError(f"{path}{target} does not exist; give a file with one text a line")
    return read_document(path, blank=blank)


def _refuse_json(document: Document, lines: Sequence[str]) -> None:
    """Refuse objects or lists of JSON, which would be scored as the texts that they are not."""
    first = next((line for line in lines if line), "")
    if first[:1] not in ("{", "["):
        return
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return
    if isinstance(value, (dict, list)) and value:
        raise ValueError(
            f"{document.path}, line 1: JSON ({shorten(first)}), and needed is plain text, one a "
            "line; of predictions.jsonl take the texts alone: jq -r .prediction"
        )


def refuse(error: Exception) -> int:
    """Print what is wrong with a file; return the exit code."""
    sys.stderr.write(f"error: {error}\n")
    return 2


def show(scores: Scores, *, as_json: bool) -> int:
    """Print scores, and on stderr what is missing; return the exit code, 1 where one is."""
    if as_json:
        sys.stdout.write(json.dumps({**scores.values, "missing": scores.missing}) + "\n")
    else:
        for name, value in scores.values.items():
            sys.stdout.write(f"{name}: {value:.4f}\n")
    for name, reason in scores.missing.items():
        sys.stderr.write(f"{name}: missing: {reason}\n")
    return 1 if scores.missing else 0
