"""A command and the stream that it prints to: any encoding, closed, broken, full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from delta_lora import console

ROOT = Path(__file__).resolve().parents[2]
WORK = (
    "import sys; sys.path.insert(0, {root!r}); from delta_lora import console\n"
    "def work():\n    {body}\n"
    "console.run(work)"
)


def shell(body: str, tail: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell, with what follows it there."""
    text = WORK.format(root=str(ROOT), body=body)
    return subprocess.run(
        ["/bin/bash", "-c", f'set -o pipefail; "$0" -c "$1" {tail}', sys.executable, text],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=60,
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "de_DE.ISO-8859-1"},
        {"LANG": "xx_YY"},
        {"TERM": "dumb", "COLUMNS": "20", "NO_COLOR": "1"},
    ],
)
def test_every_encoding_takes_what_is_printed(environment: dict[str, str]) -> None:
    done = shell(r"print('\u03bb = 2 \u00b1 1 \u2014 ok'); return 3", **environment)
    assert done.returncode == 3
    assert "Error" not in done.stderr
    assert done.stdout.endswith("ok\n")


@pytest.mark.faults
@pytest.mark.parametrize("tail", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream_takes_what_is_printed(tail: str) -> None:
    body = "print('a'); sys.stderr.write('b'); open('/dev/null').close(); return 0"
    done = shell(body, tail)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("lines", [2, 100_000])
def test_who_reads_a_part_only_ends_the_command_without_a_word(lines: int) -> None:
    body = (
        "import time\n    print('line 0', flush=True); time.sleep(0.5)\n"
        f"    for i in range({lines}): print('line', i)"
    )
    done = shell(body, "2>&1 | head -1")
    assert done.stdout == "line 0\n"
    assert done.returncode == console.BROKEN_PIPE


@pytest.mark.faults
def test_an_output_that_cannot_be_written_is_one_line() -> None:
    done = shell("print('a' * 100_000)", "> /dev/full")
    assert done.returncode == console.UNWRITTEN
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_the_code_of_the_work_is_the_code_of_the_process() -> None:
    assert [shell(f"return {code}").returncode for code in (0, 1, 2, None)] == [0, 1, 2, 0]
    done = shell("raise SystemExit('no such table')")
    assert (done.returncode, done.stderr) == (1, "no such table\n")
    done = shell("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "error: stopped\n")


def test_an_error_of_another_pipe_is_said() -> None:
    done = shell("raise BrokenPipeError('the other end is gone')")
    assert (done.returncode, done.stderr) == (2, "error: the other end is gone\n")
