"""What the commands for many runs have in common: their arguments, and how they end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from delta_lora.console import as_path, complain
from scripts.runs import launchers
from scripts.runs.batch import PreparationError
from scripts.runs.scale import CHOICES


def add_arguments(parser: argparse.ArgumentParser, results: Path) -> None:
    """Add the arguments that say which runs, how many at a time and what to do with them.

    Args:
        parser: of the command.
        results: where its results go by default.
    """
    parser.add_argument("--scale", choices=CHOICES, default="auto")
    parser.add_argument("--seeds", default="1,2,3", help="default: 1,2,3")
    parser.add_argument(
        "--workers", default="auto", help="runs at a time, over all GPUs; default: by the machine"
    )
    parser.add_argument(
        "--launcher", default=launchers.LOCAL, metavar="|".join(launchers.names()),
        help="where the runs work; default: on this machine",
    )  # fmt: skip
    parser.add_argument(
        "--launcher-args", default="", metavar="OPTIONS",
        help="in place of those of configs/launcher, such as 'partition=gpu time=12:00:00'",
    )  # fmt: skip
    parser.add_argument(
        "--args", default="", metavar="OVERRIDES", dest="overrides", help="of every run, for Hydra"
    )
    parser.add_argument("--plan", action="store_true", help="show what is missing and stop")
    parser.add_argument("--results", type=as_path, default=results, help=argparse.SUPPRESS)


def exit_code(work: Callable[[], int]) -> int:
    """Do the work of a command; return its exit code.

    Bad input and a folder that cannot be written are 2, models that cannot be made 1, Ctrl-C and
    SIGTERM 130; each with one message and no traceback.
    """
    try:
        with stop_in_order():
            return work()
    except (ValueError, OSError) as error:
        return complain(error)
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        return 130


@contextmanager
def stop_in_order() -> Iterator[None]:
    """Let SIGTERM stop the block as Ctrl-C does, so that workers write their checkpoints."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
