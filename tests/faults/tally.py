"""What became of the faults that tests inject: counted by part, printed at the end of the tests.

A test takes the fixture ``tally`` and says of every fault what part it is of and how it ended. The
counts travel with the test's report, so those of several processes come together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

#: how a fault can end: as if it had not been; with a message that names what was wrong and what to
#: do; with an error that a user would see as a traceback; with another result and no word; without
#: an end; with the loss of what was computed before.
OUTCOMES = ("right", "clear error", "traceback", "silent", "hang", "lost")
#: the key of the counts in a test's report.
PROPERTY = "faults"


class Tally:
    """The faults of one test."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, part: str, outcome: str, number: int = 1) -> None:
        """Count `number` faults of `part` (a few words: a line of the table) that ended alike.

        Raises:
            ValueError: `outcome` is none of `OUTCOMES`.
        """
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome={outcome!r} is not known; known: {', '.join(OUTCOMES)}")
        self.counts[part, outcome] += number


def table(tallies: Iterable[Iterable[tuple[str, str, int]]]) -> list[str]:
    """Return the lines of the table over tests; none where no test injected anything.

    Args:
        tallies: for every test its (part, outcome, number).
    """
    total: Counter[tuple[str, str]] = Counter()
    for tally in tallies:
        for part, outcome, number in tally:
            total[part, outcome] += number
    parts = sorted({part for part, _ in total})
    if not parts:
        return []
    rows = [["", "injected", *OUTCOMES]]
    for part in parts:
        counts = [total[part, outcome] for outcome in OUTCOMES]
        rows.append([part, *map(str, (sum(counts), *counts))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
