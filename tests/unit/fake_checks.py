"""Checks that go wrong in every way that a check can, for the worker that runs them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from scripts.checking.finding import Context, Finding


def fine(context: Context) -> Finding:
    finding = Finding(values={"pid": os.getpid()})
    finding.equal("answer", 42, 42)
    return finding


def wrong(context: Context) -> Finding:
    finding = Finding()
    finding.at_most("ratio", 1.5, 1.15)
    return finding


def nothing(context: Context) -> Finding:
    return Finding()


def raising(context: Context) -> Finding:
    raise ValueError("a broken\ncheck")


def crashing(context: Context) -> Finding:
    os._exit(3)


def hanging(context: Context) -> Finding:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    (context.folder / "sleeper").write_text(str(sleeper.pid))
    time.sleep(300)
    return Finding()
