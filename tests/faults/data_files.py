"""What can be wrong with a data file, for every task and every form of its files, and for scorers.

`LAYOUTS` writes a small sound folder in each form and reads it as a run would: the source is
checked, the task loads, and a tokenizer takes every text. `CHANGES` damages a file; `judge` says
what became of it:

- ``right``: the same examples as of the sound file, texts compared without the white space round
  them. Or the change is a *legal* one, which makes other data and no damage: a whole row less,
  twice, or elsewhere; a text that is longer or that has other characters; a file cut exactly at the
  end of a line, of which only the number of rows tells (it is compared where it is known).
- ``clear error``: an error that a user sees in one to three lines, with the path of the file (or of
  its folder where the file is not there) and with what to do; or the right reading with a warning
  that names the file and that the sound file does not give.
- ``traceback``: any other error, and one without the path or without advice.
- ``silent``: other examples without a word.
- ``hang``: no answer within the time.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.configurations import HangError, limited
from tests.faults.data_changes import Change
from tests.faults.data_layouts import Example, Layout

ADVICE = re.compile(
    r"\b(allowed|must|write|choose|use|known|correct|set|give|take|name|needs?|needed|copy|mend|"
    r"remove|convert|unpack|put|make|save|leave|expected|download|brings|separate|add|retrain)\b"
)
LIMIT_S = 20


@dataclass
class Sound:
    """A layout's sound folder, read once.

    Attributes:
        layout: of it.
        folder: its files; never changed.
        examples: of it.
        said: warnings that it gives, without paths.
    """

    layout: Layout
    folder: Path
    examples: list[Example] = field(default_factory=list)
    said: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Verdict:
    """What became of a file, and the message."""

    outcome: str
    message: str = ""


def sound(layout: Layout, folder: Path) -> Sound:
    """Write and read the sound folder of a layout."""
    layout.write(folder)
    with heard() as records:
        examples = layout.read(folder)
    assert examples
    return Sound(layout, folder, examples, {_said(record) for record in records})


def files(found: Sound) -> list[Path]:
    """Return the files of a sound folder, relative to it."""
    paths = [path.relative_to(found.folder) for path in found.folder.rglob("*") if path.is_file()]
    return sorted(
        p
        for p in paths
        if (p.name != "dataset_info.json" and "test" not in p.name)
        or found.layout.name in ("e2e/lora", "e2e/challenge", "webnlg/json", "webnlg/jsonl", "xsum")
    )


def judge(found: Sound, file: Path, change: Change, folder: Path) -> Verdict:
    """Damage a copy of a file of a sound folder; return what becomes of it.

    Raises:
        NotApplicableError: the file cannot have this damage.
    """
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(found.folder, folder)
    change.apply(folder / file)
    return verdict(found, folder, file, legal=change.legal)


def verdict(
    found: Sound, folder: Path, file: Path, *, legal: bool, most: int | None = None
) -> Verdict:
    """Return what becomes of a changed copy of a sound folder.

    Args:
        found: the sound folder.
        folder: the changed one.
        file: that was changed, relative to it.
        legal: whether other data are no damage.
        most: examples that a legal change may change; None: any number.
    """
    named = (file.name, str(folder), file.parent.name or str(folder))
    with heard() as records:
        try:
            with limited(LIMIT_S):
                examples = found.layout.read(folder)
        except HangError:
            return Verdict("hang")
        except (ValueError, OSError) as error:
            message = str(error)
            is_clear = (
                any(name in message for name in named)
                and message.count("\n") < 3
                and ADVICE.search(message)
                and len(message) < 1500
            )
            return Verdict(
                "clear error" if is_clear else "traceback", f"{type(error).__name__}: {message}"
            )
        except Exception as error:
            return Verdict("traceback", f"{type(error).__name__}: {error}")
    changed = _different(found.examples, examples)
    if not changed or (legal and (most is None or changed <= most)):
        return Verdict("right")
    news = [record for record in records if _said(record) not in found.said]
    if any(file.name in record.getMessage() for record in news):
        return Verdict("clear error", "; ".join(record.getMessage() for record in news))
    return Verdict("silent", f"{changed} examples differ")


def _different(before: list[Example], after: list[Example]) -> int:
    """Return how many examples are not in both."""
    sides: list[dict[Example, int]] = [{}, {}]
    for side, examples in zip(sides, (before, after), strict=True):
        for row in examples:
            key = tuple(p.strip().strip("\ufeff") if isinstance(p, str) else p for p in row)
            side[key] = side.get(key, 0) + 1
    return sum(abs(sides[0].get(k, 0) - sides[1].get(k, 0)) for k in {**sides[0], **sides[1]})


def _said(record: logging.LogRecord) -> str:
    return (
        str(record.msg)
        if "not comparable" in str(record.msg) or "no GLUE" in str(record.msg)
        else record.getMessage()
    )


@contextlib.contextmanager
def heard(*names: str) -> Iterator[list[logging.LogRecord]]:
    """Collect what packages log for people; without names, what the tasks do."""
    records: list[logging.LogRecord] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    listener, before = Listener(logging.INFO), []
    for name in names or ("tasks",):
        logger = logging.getLogger(name)
        before.append((logger, logger.propagate, logger.level))
        logger.propagate, logger.level = False, logging.INFO
        logger.addHandler(listener)
    try:
        yield records
    finally:
        for logger, propagate, level in before:
            logger.removeHandler(listener)
            logger.propagate, logger.level = propagate, level


#: what a stroke of a key, an editor or a disk leaves in a text.
BITS = (
    b"", b"\n", b"\r", b"\t", b'"', b"'", b"||", b",", b"\\", b"{", b"}", b"]", b":", b"\0",
    b"\xff", b"\xc3", b"\xe2\x80\xa8", b"\xed\xb0\x80", b"null", b"x", b" ", b"-", b"1",
    b"9" * 400, b"\n\n", b'"\n"', b"\\ud800",
)  # fmt: skip


def edit(data: bytes, at: int, length: int, put: bytes, kind: str) -> tuple[bytes, int]:
    """Put some bytes in the place of others; return the file, and how many examples that may touch.

    Args:
        data: the file.
        at: where, within it.
        length: bytes that go.
        put: bytes that come.
        kind: of the file, see `Layout`.
    """
    lines = 2 + data[at : at + length].count(b"\n") + put.count(b"\n")
    # Of a line of objects every text is an example, and of a group of references; what changes is
    # there before and after.
    of_a_line = {"json": 8, "jsonl": 8, "texts": 5}.get(kind, 1)
    return data[:at] + put + data[at + length :], 2 * lines * of_a_line
