"""Damaged data files of every task in every form, and of the scorers.

What must hold: nothing that a user would see as a traceback, nothing that hangs, and no other
examples without a word. See `tests.faults.data_files`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.damage import NotApplicableError
from tests.faults.data_changes import CHANGES
from tests.faults.data_files import BITS, Sound, Verdict, edit, files, judge, sound, verdict
from tests.faults.data_layouts import LAYOUTS, TEXTUAL, Layout
from tests.faults.tally import Tally

#: damaged files of the short form, and random edits of one layout in the long one.
SHORT, EDITS = 150, 60
GOOD = ("right", "clear error")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Sound]:
    found: dict[str, Sound] = {}

    def of(layout: Layout) -> Sound:
        if layout.name not in found:
            found[layout.name] = sound(layout, tmp_path_factory.mktemp("sound") / "data")
        return found[layout.name]

    return of


def part(layout: Layout) -> str:
    return "scorers' files" if layout.name.startswith("scorer") else "data files"


def wrong(where: object, outcome: Verdict) -> list[str]:
    return [] if outcome.outcome in GOOD else [f"{where}: {outcome}"]


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_damage_to_every_file(
    layout: Layout, sounds: Callable[[Layout], Sound], tmp_path: Path, tally: Tally
) -> None:
    found, failures = sounds(layout), []
    for file in files(found):
        for name, change in CHANGES.items():
            if layout.kind not in change.kinds:
                continue
            try:
                outcome = judge(found, file, change, tmp_path / "data")
            except NotApplicableError:
                continue
            tally.add(part(layout), outcome.outcome)
            failures += wrong(f"{file}, {name}", outcome)
    assert failures == []


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each.kind in TEXTUAL], ids=str)
def test_random_edits_change_their_own_rows_or_are_refused(
    layout: Layout, sounds: Callable[[Layout], Sound], tmp_path: Path, tally: Tally
) -> None:
    found = sounds(layout)

    @settings(
        max_examples=EDITS, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def check(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(files(found)))
        content = (found.folder / file).read_bytes()
        at = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.sampled_from((0, 0, 1, 1, 2, 7, 40)))
        put = data.draw(st.one_of(st.sampled_from(BITS), st.binary(max_size=6)))
        changed, most = edit(content, at, length, put, layout.kind)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        for each in found.folder.rglob("*"):
            if each.is_file():
                to = tmp_path / each.relative_to(found.folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(each.read_bytes())
        (tmp_path / file).write_bytes(changed)
        outcome = verdict(found, tmp_path, file, legal=True, most=most)
        tally.add(f"{part(layout)}, random edits", outcome.outcome)
        assert wrong(f"{file}: {put!r} for {length} bytes at {at}", outcome) == []

    check()


@pytest.mark.faults
def test_some_damages(sounds: Callable[[Layout], Sound], tmp_path: Path, tally: Tally) -> None:
    draws, failures, count = random.Random(15), [], 0
    while count < SHORT:
        layout = draws.choice(LAYOUTS)
        found = sounds(layout)
        file = draws.choice(files(found))
        names = [name for name, change in CHANGES.items() if layout.kind in change.kinds]
        name = draws.choice(names)
        try:
            outcome = judge(found, file, CHANGES[name], tmp_path / "data")
        except NotApplicableError:
            continue
        count += 1
        tally.add(part(layout), outcome.outcome)
        failures += wrong(f"{layout}: {file}, {name}", outcome)
    assert failures == []


def test_the_judge_sees_what_is_silent_and_what_is_vague(tmp_path: Path) -> None:
    layout = next(each for each in LAYOUTS if each.name == "e2e/lora")
    found = sound(layout, tmp_path / "sound")
    file = Path("train.txt")
    folder = tmp_path / "data"
    folder.mkdir()
    for path in found.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert verdict(found, folder, file, legal=False).outcome == "right"
    lines = (folder / file).read_text().splitlines(keepends=True)
    (folder / file).write_text("".join(lines[1:]))
    assert verdict(found, folder, file, legal=False).outcome == "silent"
    assert verdict(found, folder, file, legal=True).outcome == "right"
    (folder / file).write_text("".join(lines[3:]))
    assert verdict(found, folder, file, legal=True, most=2).outcome == "silent"
    (folder / file).write_text("".join(lines[:-1]) + lines[-1][:-4])
    assert verdict(found, folder, file, legal=False).outcome == "clear error"
    for error, outcome in (
        (ValueError("wrong; copy it again"), "traceback"),
        (ValueError(f"{folder / file} is wrong"), "traceback"),
        (ValueError(f"{folder / file} is wrong; copy it again"), "clear error"),
        (KeyError("train"), "traceback"),
    ):

        def fail(_: Path, error: Exception = error) -> list[tuple[object, ...]]:
            raise error

        failing = Sound(Layout("x", layout.write, fail, "lines"), found.folder, found.examples)
        assert verdict(failing, folder, file, legal=False).outcome == outcome
