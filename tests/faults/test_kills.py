"""A run that is killed at any moment, also again and again, continues to the same bits.

Bits: adapter, its description, log, predictions, record, spread over items; and the same files in
the folder, so nothing is left over. The moments are drawn with fixed seeds.
"""

from __future__ import annotations

import random
import signal

import pytest

from tests.faults.runs import CASES, Bench, Straight
from tests.faults.tally import Tally
from tests.faults.warm import KILL

pytestmark = pytest.mark.long

#: chains of kills at random moments by kind of run, and kills in a chain.
CHAINS = {"delta_lora": 8, "closed_form": 4, "lora": 4, "adalora": 4, "dylora": 4}
CHAINS["glue, best epoch"] = 5
KILLS = 3
#: writing events by kind of run: every n-th is a moment to kill at.
EVERY = {"delta_lora": 1, "adalora": 6, "closed_form": 6, "glue, best epoch": 2}


@pytest.mark.parametrize("name", CASES)
def test_kills_at_random_moments(name: str, bench: Bench, tally: Tally) -> None:
    straight = bench.straight(name)
    draw = random.Random(list(CASES).index(name))
    for _ in range(CHAINS[name]):
        outputs, killed, how = bench.fresh(straight), 0, []
        for _ in range(KILLS):
            after = draw.uniform(0.05, 0.95) * straight.seconds
            ended = bench.run(straight.overrides, outputs, kill_after=after)
            killed += ended.code == -signal.SIGKILL
            how.append(f"kill -9 after {after:.3f} s of {straight.seconds:.3f}")
        _finish(bench, straight, outputs, tally, "kills at random moments", killed, how)


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", EVERY)
def test_kills_at_events_of_the_file_system(
    name: str, part: int, bench: Bench, tally: Tally
) -> None:
    straight = bench.straight(name)
    for number in list(range(1, len(straight.events) + 1, EVERY[name]))[part::4]:
        outputs, killed, how = bench.fresh(straight), 0, []
        second = random.Random(number).randint(1, len(straight.events))
        for at in (number, second):  # the second one is of the run that continues
            ended = bench.run(straight.overrides, outputs, at_event=at, fault=KILL)
            killed += ended.code == -signal.SIGKILL
            how.append(f"kill -9 at writing event {at}: {(ended.events or [''])[-1]}")
        _finish(bench, straight, outputs, tally, "kills at file-system events", killed, how)


def _finish(
    bench: Bench,
    straight: Straight,
    outputs: object,
    tally: Tally,
    part: str,
    killed: int,
    how: list[str],
) -> None:
    bench.finish(straight, outputs, tally, part, killed, "\n".join(how))  # type: ignore[arg-type]
