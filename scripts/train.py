r"""Execute one run, or a sweep of runs with ``-m``.

A sweep is checked before its first run. A run that is refused, fails, or is held by another process
costs itself only, and the last line names it; what came of all of them is in
``outputs/sweeps/<axes and a hash of the runs>/sweep.{json,csv,md,svg,png}``. Exit code: 0 done,
1 a run failed or some of a sweep are not done, 2 bad input, 130 stopped.

With ``hydra/sweeper=optuna`` the runs of a sweep are chosen one after the other, and what is
hopeless is given up (`scripts.sweeping.study`; settings: `scripts.sweeping.search.Settings`).

Examples:
    python scripts/train.py experiment=e2e method=delta_lora seed=1
    python scripts/train.py -m experiment=e2e method.update_ratio=0.5,1,2 seed=1,2,3 scale=tiny
    python scripts/train.py -m hydra/sweeper=optuna hydra.sweeper.n_trials=20 experiment=e2e \
        scale=tiny 'method.update_ratio=interval(0.1,4)'
    python scripts/train.py --config-dir FOLDER method=mine scale=tiny   (FOLDER/method/mine.yaml)
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from delta_lora import console
from delta_lora.stored import UnreadableError
from scripts.runs import composition, faults
from scripts.runs.command import exit_code
from scripts.runs.composition import ConfigError
from scripts.runs.execution import execute
from scripts.runs.folder import RECORD, LockedError
from scripts.runs.run import Run
from scripts.sweeping.content import selection_name, validation_value
from scripts.sweeping.multirun import Multirun, read_grid
from scripts.sweeping.study import MULTIRUN, asks_for_study, read_study

logger = logging.getLogger("train")


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(_: DictConfig) -> float | None:
    """Compose, execute and report one run.

    Returns:
        What a sweeper of Hydra optimises: the score of the validation split that the task is
        selected by, else the loss there, as stored (of the loss, less is better). None where there
        is none, in other processes than the main one, and where another process holds the run.
    """
    hydra_config = HydraConfig.get()
    return carry_out(
        lambda: Run.compose(overrides_of(hydra_config)),
        is_sweep=hydra_config.mode == RunMode.MULTIRUN,
    )


def carry_out(make: Callable[[], Run], *, is_sweep: bool) -> float | None:
    """Execute a run and report it; what went wrong ends the process with one line.

    Args:
        make: composes the run.
        is_sweep: whether it is one of many, so that its error is for Hydra to note.

    Returns:
        As `main`.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        logging.disable(logging.INFO)  # the main process reports
    try:
        run = make()
        if run.is_done:
            logger.info("already done: %s (delete the folder to run it again)", run.folder)
        record = execute(run, wait=False)
    except LockedError as error:
        if not is_sweep:
            _stop(str(error))
        logger.warning("skipped: %s", error)
        return None
    except (ConfigError, UnreadableError, OSError) as error:
        if is_sweep:  # Hydra notes it and goes on
            raise
        _stop(str(error))
    except KeyboardInterrupt as stop:
        _stop(f"{str(stop) or 'stopped'}; the same command continues", code=130)
    except BaseException as error:  # a panic of a tokenizer is no Exception
        if is_sweep or faults.kind_of(error) is None:
            raise
        _stop(faults.reason_of(error), code=1)
    if not record:  # a process of a distributed run other than the main one
        return None
    for name, value in record["metrics"].items():
        logger.info("test/%s = %.4f", name, value)
    for name, reason in record["missing_metrics"].items():
        logger.warning("test/%s is missing: %s", name, reason)
    logger.info("record: %s", run.folder / RECORD)
    return validation_value(record, selection_name(run.config))


def overrides_of(hydra_config: Any) -> list[str]:
    """Return the overrides that compose a run, the one for further folders included."""
    overrides = hydra_config.overrides
    more = [o for o in overrides.hydra if o.startswith(f"{composition.SEARCH_PATH}=")]
    return [*more, *overrides.task]


def _stop(message: str, code: int = 2) -> None:
    """End the process with a message and no traceback."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write(f"error: {' '.join(message.splitlines())}\n")
    sys.exit(code)


def check_arguments(arguments: Sequence[str]) -> Multirun | None:
    """Compose all that is asked for, so that mistakes get our messages, not Hydra's.

    Returns:
        The sweep, where it is one and its runs can be listed.

    Raises:
        ConfigError: unknown group member or key, or a value that cannot be read.
    """
    overrides = [
        a for a in arguments
        if ("=" in a or a.startswith("~")) and not a.startswith("-")
        and (not a.startswith(("hydra.", "hydra/")) or a.startswith(composition.SEARCH_PATH))
    ]  # fmt: skip
    launch = ("hydra.launcher", "hydra/launcher", "hydra.mode")
    composition.check_launch([a for a in arguments if a.startswith(launch) and "=" in a])
    sweepers = [a for a in arguments if a.startswith("hydra/sweeper=")]
    grid = read_grid(overrides, has_sampler=bool(sweepers) and sweepers != ["hydra/sweeper=basic"])
    is_sweep = set(MULTIRUN) & set(arguments)
    if is_sweep and not _is_asking(arguments):
        return Multirun.check(grid)
    composition.compose(grid.firsts if is_sweep else overrides)
    return None


def _is_asking(arguments: Sequence[str]) -> bool:
    """Return whether Hydra is asked to show something instead of running."""
    asking = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help")
    return any(argument.startswith(asking) for argument in arguments)


def with_search_path(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with Hydra's ``--config-dir FOLDER`` as the override that it means."""
    found = list(arguments)
    for flag in ("--config-dir", "-cd"):
        for place, argument in enumerate(found):
            name, is_joined, value = argument.partition("=")
            if name == flag and (is_joined or place + 1 < len(found)):
                folder = Path(value if is_joined else found[place + 1]).resolve()
                taken = 1 if is_joined else 2
                quoted = str(folder).replace('"', '\\"')
                found[place : place + taken] = [f'{composition.SEARCH_PATH}=["file://{quoted}"]']
    return found


def command(arguments: Sequence[str]) -> int:
    """Run the command; return the exit code.

    Raises:
        KeyboardInterrupt: before there is anything to continue.
    """
    sys.argv[1:] = with_search_path(arguments)
    if asks_for_study(sys.argv[1:]):
        return exit_code(lambda: read_study(sys.argv[1:]).run())
    try:
        sweep = check_arguments(sys.argv[1:])
    except ConfigError as error:
        _stop(str(error))
    if sweep is not None:
        for (row, on), reason in sweep.refused.items():
            sys.stderr.write(f"refused: {row} on {on}: {reason}\n")
        if not any(argument.startswith("part_of=") for argument in sys.argv[1:]):
            sys.argv.append(f"part_of=['{sweep.spec.name}']")
    code = 0
    try:
        main()
    except SystemExit as stop:  # how Hydra ends where a run has failed
        code = stop.code if isinstance(stop.code, int) else 1
    is_main = int(os.environ.get("RANK", "0")) == 0
    if sweep is not None and code in (0, 1) and is_main:
        return max(code, sweep.finish())
    return code


if __name__ == "__main__":
    # The processes that a launcher starts import this repository too.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    console.run(lambda: command(sys.argv[1:]))
