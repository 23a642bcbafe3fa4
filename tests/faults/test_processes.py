"""Signals, limits, streams, terminals, and two processes at once."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.runs import Bench, Straight, folder_in, outcome_of, unfinished
from tests.faults.tally import Tally
from tests.faults.warm import Command, Ended

pytestmark = pytest.mark.long

INT, TERM, HUP, QUIT, PIPE = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE
)  # fmt: skip
SIGNALS: dict[str, tuple[int, ...]] = {
    "INT": (INT,), "TERM": (TERM,), "INT INT": (INT, INT), "TERM TERM": (TERM, TERM),
    "TERM INT": (TERM, INT), "INT INT INT": (INT, INT, INT), "HUP": (HUP,), "QUIT": (QUIT,),
    "PIPE": (PIPE,),
}  # fmt: skip
MOMENTS = 4


@pytest.mark.parametrize("name", SIGNALS)
def test_signals(name: str, bench: Bench, tally: Tally) -> None:
    straight = bench.straight("delta_lora")
    draw = random.Random(name)
    for _ in range(MOMENTS):
        first = draw.uniform(0.1, 0.95) * straight.seconds
        apart = draw.choice((0.02, 0.15))
        numbers = SIGNALS[name]
        given = tuple((first if i == 0 else apart, int(n)) for i, n in enumerate(numbers))
        outputs = bench.fresh(straight)
        command = replace(bench.command(straight.overrides, outputs), signals=given)
        ended = bench.warm.run(command)
        by_default = [-number for number in numbers]
        is_ended = ended.code in (0, 130, *by_default)
        check_quiet(ended, is_ended, tally, "signals", command)
        if ended.code == 130:
            assert "the same command continues" in ended.output or "error: stop" in ended.output
        bench.finish(straight, outputs, tally, "signals", 1, str(command))


LIMITS: dict[str, dict[str, int]] = {
    **{f"open files {n}": {"RLIMIT_NOFILE": n} for n in (12, 14, 18, 24, 40)},
    **{f"file size {n}": {"RLIMIT_FSIZE": n} for n in (0, 500, 5_000, 50_000, 500_000)},
    **{f"memory +{n} MiB": {"RLIMIT_AS": -n * 2**20} for n in (1, 20, 50, 100, 400)},
    **{f"CPU {n} s": {"RLIMIT_CPU": n} for n in (1, 2)},
    "processes": {"RLIMIT_NPROC": 1},
    "core": {"RLIMIT_CORE": 0},
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str, bench: Bench, tally: Tally) -> None:
    straight = bench.straight("delta_lora")
    outputs = bench.fresh(straight)
    command = replace(bench.command(straight.overrides, outputs), limits=LIMITS[name])
    ended = bench.warm.run(command)
    check_quiet(
        ended, ended.code in (0, 1, 2, -signal.SIGXCPU, -signal.SIGKILL), tally, "limits", command
    )
    if ended.code >= 0:
        assert not unfinished(outputs)
    bench.finish(straight, outputs, tally, "limits", 1, str(command))


def check_quiet(ended: Ended, is_expected: bool, tally: Tally, part: str, command: Command) -> None:
    """Check that a command ended as it may, without a traceback."""
    if not is_expected or ended.has_traceback or ended.hung:
        tally.add(part, outcome_of(ended) if outcome_of(ended) != "clear error" else "silent")
        pytest.fail(f"code {ended.code}\n{ended.output}\nto repeat: {command}")


@pytest.mark.parametrize("number", range(8))
def test_two_processes_at_once(number: int, bench: Bench, tally: Tally) -> None:
    straight = bench.straight("delta_lora")
    outputs = bench.fresh(straight)
    command = bench.command(straight.overrides, outputs)
    count = 2 + number % 2
    bench.warm.send(*[command] * count)
    both = bench.warm.receive()
    output = "\n".join(ended.output for ended in both)
    codes = sorted(ended.code for ended in both)
    refused = [ended for ended in both if ended.code == 2]
    is_good = codes[0] == 0 and set(codes) <= {0, 2} and "Traceback" not in output
    is_good &= all("is already working in" in ended.last_line for ended in refused)
    tally.add("two processes at once", "right" if is_good else "traceback", count)
    assert is_good, f"{codes}\n{output}\nto repeat: {command}"
    bench.finish(straight, outputs, Tally(), "two processes at once", 1, str(command))


# ---------------------------------------------------------------------- terminals


def commands(straight: Straight, folder: Path) -> dict[str, Command]:
    """Return one call of every command, and what is quick of it."""
    run = folder_in(straight.outputs)
    texts = folder / "texts.txt"
    texts.write_text("The café is λ.\n", encoding="utf-8")
    tiny = ("--scale", "tiny")
    files = ("--predictions", str(texts), "--references", str(texts))
    return {
        "train": Command((*straight.overrides, f"paths.outputs={straight.outputs}")),
        "train, a mistake": Command((*straight.overrides, "method=λ")),
        "plan": Command(("table1", *tiny, "--seeds", "1", "--plan"), "scripts/reproduce.py"),
        "tables": Command(("table1", *tiny, "--results", str(folder)), "scripts/tables.py"),
        "sweep": Command(("lambda_k", *tiny, "--seeds", "1", "--plan"), "scripts/sweep.py"),
        "audit": Command((*tiny, "--seeds", "1", "--plan"), "scripts/audit.py"),
        "report": Command((*tiny, "--check"), "scripts/report.py"),
        "dashboard": Command(
            ("table1", *tiny, "--entity", "me", "--dry-run"), "scripts/dashboard.py"
        ),
        "export": Command((str(run), "--output", str(folder / "export")), "scripts/export.py"),
        "item spread": Command((str(run),), "scripts/item_spread.py"),
        "score E2E": Command(files, "tasks/metrics/e2e.py"),
        "score WebNLG": Command(files, "tasks/metrics/webnlg.py"),
        "check of a GPU": Command(("--help",), "scripts/gpu_check.py"),
        "scale": Command(("tiny",), "scripts/runs/scale.py"),
    }


TERMINALS: dict[str, Callable[[Command], Command]] = {
    "ascii": lambda c: replace(c, environment={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}),
    "latin-1": lambda c: replace(c, environment={"PYTHONIOENCODING": "latin-1"}),
    "narrow and dumb": lambda c: replace(
        c, environment={"TERM": "dumb", "COLUMNS": "20", "NO_COLOR": "1", "LANG": "xx_YY"}
    ),
    "no output": lambda c: replace(c, closed=(1,)),
    "no errors": lambda c: replace(c, closed=(2,)),
    "no streams": lambda c: replace(c, closed=(0, 1, 2)),
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_every_command_on_every_terminal(
    terminal: str, bench: Bench, tally: Tally, tmp_path: Path
) -> None:
    straight = bench.straight("lora")
    for name, command in commands(straight, tmp_path).items():
        changed = TERMINALS[terminal](command)
        ended = bench.warm.run(changed)
        is_good = ended.code in (0, 1, 2) and not ended.has_traceback
        is_good &= "UnicodeEncodeError" not in ended.output and not ended.hung
        tally.add("terminals", "right" if is_good else outcome_of(ended))
        assert is_good, f"{name}, {terminal}: {ended.output}\nto repeat: {changed}"


def test_no_locks(bench: Bench, tally: Tally) -> None:
    """Runs go on where the file system has no locks, one process at a time."""
    straight = bench.straight("delta_lora")
    for number in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        outputs = bench.fresh(straight)
        command = replace(bench.command(straight.overrides, outputs), no_locks=number)
        killed = bench.warm.run(replace(command, kill_after=0.8 * straight.seconds))
        assert killed.code == -signal.SIGKILL
        soft = folder_in(outputs) / ".lock.soft"
        assert soft.exists(), "it stands for the lock of the killed process"
        bench.warm.send(command, command)
        both = bench.warm.receive()
        output = "\n".join(ended.output for ended in both)
        codes = sorted(ended.code for ended in both)
        is_good = codes in ([0, 0], [0, 2]) and "Traceback" not in output
        tally.add("file systems without locks", "right" if is_good else "traceback", 3)
        assert is_good, f"{os.strerror(number)}: {codes}\n{output}"
        assert "has no locks" in output
        assert not soft.exists()
        bench.finish(straight, outputs, Tally(), "no locks", 1, str(command))
