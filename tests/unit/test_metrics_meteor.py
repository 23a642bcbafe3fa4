"""The METEOR process: protocol, restart, time limit. A small program stands in for the jar."""

import os
import shutil
import sys

import pytest

from tasks.metrics.java import MetricUnavailableError
from tasks.metrics.meteor import MeteorProcess

# Answers a SCORE line by the number of its parts, an EVAL line by those numbers and their sum.
SERVER = """
import os, sys, time
for line in sys.stdin:
    parts = line.rstrip("\\n").split(" ||| ")
    if "{word}" in parts[-1] and not os.path.exists("{marker}"):
        open("{marker}", "w").close()
        {action}
    if parts[0] == "SCORE":
        print(len(parts), flush=True)
    else:
        print(*parts[1:], sum(map(float, parts[1:])), sep="\\n", flush=True)
"""


@pytest.fixture
def make_process(monkeypatch, tmp_path):
    made = []

    def make(action="pass", timeout_s=30.0):
        code = SERVER.format(word="trap", marker=tmp_path / "marker", action=action)
        process = MeteorProcess(timeout_s=timeout_s)
        monkeypatch.setattr(process, "command", lambda: [sys.executable, "-c", code])
        made.append(process)
        return process

    yield make
    for process in made:
        process.close()


def test_requests_follow_the_protocol(make_process):
    assert make_process().score(["café", ""], [["one", "two"], ["three"]]) == 4 + 3


def test_output_cannot_forge_a_reference(make_process):
    assert make_process().score(["a ||| b ||| c"], [["one"]]) == 3


def test_process_that_was_killed_between_scores_is_started_again(make_process):
    process = make_process()
    assert process.score(["a"], [["b"]]) == 3
    first = process._process
    first.kill()
    first.wait()
    assert process.score(["a"], [["b"]]) == 3
    assert process._process.pid != first.pid


def test_process_that_dies_in_the_middle_is_started_again(make_process, caplog):
    process = make_process("sys.exit('out of memory')")
    assert process.score(["a", "trap", "c"], [["x"], ["y"], ["z"]]) == 9
    assert "ended unexpectedly" in caplog.text
    assert "out of memory" in caplog.text


def test_process_that_dies_always_is_an_error(make_process):
    process = make_process()
    process.command = lambda: [sys.executable, "-c", "import sys; sys.exit('broken')"]
    with pytest.raises(MetricUnavailableError, match=r"ended unexpectedly.*broken"):
        process.score(["a"], [["b"]])


def test_nonsense_for_an_answer_is_an_error(make_process):
    process = make_process()
    code = "while True: print('x' if input().startswith('SCORE') else 'x\\nx', flush=True)"
    process.command = lambda: [sys.executable, "-c", code]
    with pytest.raises(MetricUnavailableError, match="'x' instead of a score"):
        process.score(["a"], [["b"]])


def test_hanging_process_is_ended_in_time_and_not_tried_again(make_process):
    process = make_process("time.sleep(600)", timeout_s=1.0)
    with pytest.raises(MetricUnavailableError, match="no answer within 1 s"):
        process.score(["trap"], [["b"]])
    assert process._process is None
    assert process.score(["a"], [["b"]]) == 3


def test_process_that_reads_nothing_is_ended_in_time(make_process):
    process = make_process(timeout_s=1.0)
    process.command = lambda: [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(MetricUnavailableError, match="no answer within"):
        process.score(["a " * 1_000_000], [["b"]])  # more than a pipe holds


def test_forked_process_leaves_the_pipes_to_its_parent(make_process):
    process = make_process()
    process.score(["a"], [["b"]])
    parent_pid = process._process.pid
    process._owner = os.getpid() + 1  # what a fork finds
    theirs = process._process
    process.start()
    assert process._process.pid != parent_pid
    assert theirs.poll() is None
    theirs.kill()
    theirs.wait()
    theirs.stdin.close()
    theirs.stdout.close()


@pytest.mark.long
@pytest.mark.java
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java on PATH")
def test_real_jar():
    process = MeteorProcess()
    try:
        assert process.score(["the blue café"], [["a pub", "the blue café"]]) == 1.0
        assert process.score([""], [["a pub"]]) == 0.0
        mixed = process.score(["the blue café", ""], [["the blue café"], ["a pub"]])
        assert 0.5 < mixed < 1.0
    finally:
        process.close()
