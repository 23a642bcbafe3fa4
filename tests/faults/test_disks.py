"""A disk that is full, or cannot be written, from any moment on: one line, no litter, no loss.

The disk is full from a writing event on: no file can grow. Then there is room again, and the same
command goes on to the same bits.
"""

from __future__ import annotations

import filecmp
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.runs import CASES, Bench, Straight, folder_in, outcome_of, unfinished
from tests.faults.tally import Tally
from tests.faults.warm import FULL, READ_ONLY, ROOT, Command, Ended

pytestmark = pytest.mark.long

#: every n-th writing event is a moment, by kind of run.
EVERY = {"delta_lora": 2, "lora": 5, "glue, best epoch": 3}
#: what an error must say: the path, and what to do.
LINE = re.compile(r"^(error: )?.*cannot write .*/.*: .+; .+", re.MULTILINE)


def check_refused(
    ended: Ended, place: Path, tally: Tally, part: str, how: str, fault: str = FULL
) -> None:
    """Check that a command said in a line what could not be written, and left nothing half.

    Where nothing can be written nothing can be removed: the command that goes on does that.
    """
    left = unfinished(place) if fault == FULL else []
    is_clear = ended.code in (1, 2) and LINE.search(ended.output) and outcome_of(ended) != "hang"
    outcome = "clear error" if is_clear and not ended.has_traceback else outcome_of(ended)
    tally.add(part, outcome if not left else "lost")
    assert is_clear, f"{ended.output}\nto repeat: {how}"
    assert not ended.has_traceback, f"{ended.output}\nto repeat: {how}"
    assert not left, f"{left}\nto repeat: {how}"


@pytest.mark.parametrize("fault", [FULL, READ_ONLY])
@pytest.mark.parametrize("name", EVERY)
def test_a_run_on_a_bad_disk(name: str, fault: str, bench: Bench, tally: Tally) -> None:
    straight = bench.straight(name)
    part = f"{fault} disk in a run"
    step = EVERY[name] * (1 if fault == FULL else 3)
    for number in range(1, len(straight.events) + 1, step):
        outputs = bench.fresh(straight)
        command = replace(bench.command(straight.overrides, outputs), at_event=number, fault=fault)
        ended = bench.warm.run(command)
        how = f"{fault} at writing event {number}: {straight.events[number - 1]}\n{command}"
        if ended.code == 0:  # nothing but the name of the owner was left to write
            tally.add(part, "right")
        else:
            check_refused(ended, outputs, tally, part, how, fault)
        bench.finish(straight, outputs, Tally(), part, 1, how)


@pytest.mark.parametrize("fault", [FULL, READ_ONLY])
def test_a_pre_training_on_a_bad_disk(
    fault: str, bench: Bench, tally: Tally, tmp_path: Path
) -> None:
    straight = bench.straight("lora")
    part = f"{fault} disk in a pre-training"
    events = pretraining_events(bench, straight, tmp_path / "count")
    for number in range(1, len(events) + 1, 4 if fault == FULL else 12):
        outputs = tmp_path / f"at-{number}"
        command = replace(bench.command(straight.overrides, outputs), at_event=number, fault=fault)
        how = f"{fault} at writing event {number}: {events[number - 1]}\n{command}"
        ended = bench.warm.run(command)
        check_refused(ended, outputs, tally, part, how, fault)
    # the last of them goes on: its model and its run are those of the straight one
    bench.finish(straight, outputs, Tally(), part, 1, how)


def pretraining_events(bench: Bench, straight: Straight, outputs: Path) -> list[str]:
    """Return the writing events of the pre-training alone."""
    ended = bench.run(straight.overrides, outputs)
    assert ended.code == 0, ended.output
    return [event for event in ended.events if "/pretraining" in event]


# ---------------------------------------------------------------------- what is made of runs


def _tables(results: Path, _: Path) -> Command:
    return Command(
        ("table1", "figure3", "--scale", "tiny", "--results", str(results)), "scripts/tables.py"
    )


def _report(results: Path, outputs: Path) -> Command:
    return Command(
        ("--scale", "tiny", "--results", str(results), "--outputs", str(outputs)),
        "scripts/report.py",
    )


def _export(results: Path, outputs: Path) -> Command:
    return Command(
        (str(folder_in(outputs)), "--output", str(results / "export")), "scripts/export.py"
    )


def _item_spread(results: Path, outputs: Path) -> Command:
    run = shutil.copytree(folder_in(outputs), results / folder_in(outputs).name)
    (run / "item_spread.json").unlink()
    return Command((str(run),), "scripts/item_spread.py")


def _dashboard(results: Path, _: Path) -> Command:
    arguments = ("table1", "--scale", "tiny", "--results", str(results), "--entity", "me")
    return Command(
        (*arguments, "--dry-run", str(results / "dashboard.json")), "scripts/dashboard.py"
    )


MADE: dict[str, Callable[[Path, Path], Command]] = {
    "tables": _tables,
    "report": _report,
    "export": _export,
    "item spread": _item_spread,
    "dashboard": _dashboard,
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_runs_on_a_bad_disk(
    name: str, bench: Bench, tally: Tally, tmp_path: Path
) -> None:
    straight = bench.straight("lora")
    results, part = tmp_path / "results", f"full disk in {name}"
    start(results)
    command = replace(MADE[name](results, straight.outputs), watch=str(tmp_path))
    good = bench.warm.run(command)
    assert good.code in (0, 1), good.output
    shutil.copytree(results, tmp_path / "good", symlinks=True)
    count = len(good.events)
    assert count
    for fault, numbers in ((FULL, spread(count, 5)), (READ_ONLY, spread(count, 2))):
        for number in numbers:
            shutil.rmtree(results)
            start(results)
            faulty = replace(
                MADE[name](results, straight.outputs),
                watch=str(tmp_path), at_event=number, fault=fault,
            )  # fmt: skip
            ended = bench.warm.run(faulty)
            how = f"{fault} at writing event {number}: {good.events[number - 1]}\n{faulty}"
            if ended.code == good.code and files_of(results) == files_of(tmp_path / "good"):
                tally.add(part, "right")  # a rename, behind which nothing is written
            else:
                check_refused(ended, results, tally, part, how, fault)
            again = bench.warm.run(command)
            assert again.code == good.code, f"{again.output}\nto repeat: {how}"
            names = files_of(tmp_path / "good")
            assert files_of(results) == names
            differing = filecmp.cmpfiles(results, tmp_path / "good", names, shallow=False)[1:]
            assert differing == ([], []), how


def start(results: Path) -> None:
    """Put what is committed of scale tiny into a folder of results."""
    shutil.copytree(ROOT / "results" / "tiny", results / "tiny")
    (results / "runs").symlink_to(ROOT / "results" / "runs")


def spread(count: int, number: int) -> Sequence[int]:
    """Return at most so many numbers from 1 to `count`, evenly."""
    return sorted({1 + round(i * (count - 1) / max(1, number - 1)) for i in range(number)})


def files_of(folder: Path) -> list[str]:
    """Return the files of a folder, by name, but for that of the process that holds it."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".owner")
    return sorted(path.relative_to(folder).as_posix() for path in found)


def test_every_kind_of_run_is_here() -> None:
    assert set(EVERY) <= set(CASES)
