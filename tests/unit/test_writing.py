"""What cannot be written is one line with the path and what to do; nothing half stays."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import delta_lora
from delta_lora import checkpoint, export, writing
from delta_lora.integrations import callback_state
from delta_lora.runlog import RunLog
from delta_lora.writing import WriteError
from scripts.reporting.figures import picture
from tests.contract.models import CASES
from tests.faults.tally import Tally

pytestmark = pytest.mark.faults


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def adapter() -> Any:
    return delta_lora.attach(CASES["gpt2"].model(), method="lora", rank=2, alpha=4)


def _export_peft(folder: Path) -> None:
    export.export_peft(folder.parent / "adapter", folder / "peft", base=CASES["gpt2"].model())


def _export_merged(folder: Path) -> None:
    export.export_merged(folder.parent / "adapter", folder / "merged", base=CASES["gpt2"].model())


def _picture(folder: Path) -> None:
    with picture(folder / "picture", size=(2, 2), title="t"):
        pass


TENSORS = {"w": torch.ones(2000)}
WRITERS: dict[str, Callable[[Path], Any]] = {
    "json": lambda folder: checkpoint.write_json(folder / "a.json", {"a": 1}),
    "tensors": lambda folder: checkpoint.write_tensors(folder / "a.safetensors", TENSORS),
    "checkpoint": lambda folder: checkpoint.save(folder, 3, tensors={"weights": TENSORS}, state={}),
    "log": lambda folder: RunLog(folder / "metrics.jsonl").log(1, {"a": 1.0}, {"b": 2.0}),
    "adapter": lambda folder: adapter().save(folder),
    "text": lambda folder: writing.write_text(folder / "a.md", "text"),
    "picture": _picture,
    "PEFT": _export_peft,
    "merged": _export_merged,
    "callback": lambda folder: callback_state.write(folder, {}, TENSORS, export=None),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    name: str, tmp_path: Path, tally: Tally
) -> None:
    adapter().save(tmp_path / "adapter")
    folder = tmp_path / "place"
    folder.mkdir()
    with full_disk(), pytest.raises(WriteError) as caught:
        WRITERS[name](folder)
    message = str(caught.value)
    assert isinstance(caught.value, OSError)
    assert str(folder) in message
    assert "File too large" in message
    assert "ulimit -f" in message
    assert message.endswith("then save it again") == (name == "adapter")
    assert "\n" not in message
    left = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    assert not left
    assert not list(folder.rglob(f"{writing.UNFINISHED}*"))
    WRITERS[name](folder)
    tally.add("full disk in the library", "clear error")


def test_an_adapter_that_cannot_be_written_anew_stays_as_it_was(tmp_path: Path) -> None:
    adapter().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = adapter()
    other.model.lm_head.weight.data += 1
    with full_disk(), pytest.raises(WriteError):
        other.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"No space left on device \([\d,]+ bytes free\); free space there, then"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "Read-only file system; mount it for writing, or name another folder, then"),
        (errno.EACCES, "Permission denied; allow writing there"),
        (errno.EIO, "Input/output error; mend that, then"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_the_message_has_the_path_the_reason_and_what_to_do(
    number: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(WriteError, match=words) as caught, writing.writing(tmp_path / "new" / "x"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'new' / 'x'}: ")
    assert caught.value.errno == number


def test_what_a_killed_process_left_is_removed_and_what_lives_stays(tmp_path: Path) -> None:
    dead, alive = 2**22 + 1, os.getppid()
    for pid in (dead, alive):
        (tmp_path / f".writing-{pid}-a.md").write_text("half")
    (tmp_path / f".writing-{dead}-b.md").write_text("of another file")
    writing.write_text(tmp_path / "a.md", "text")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.md", f".writing-{alive}-a.md", f".writing-{dead}-b.md"
    }  # fmt: skip
    writing.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]


def test_a_place_that_cannot_be_named_or_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path / ("x" * 300), "shorter path"),
        (tmp_path / "file" / "in it", "file that stands where a folder belongs"),
        (tmp_path / "file", "remove what stands in its place"),
    ):
        with pytest.raises(WriteError, match=words):
            writing.make_folder(path)
    with pytest.raises(WriteError, match="cannot write"):
        adapter().save(tmp_path / "file")
    shutil.rmtree(tmp_path)
