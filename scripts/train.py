"""Execute one run, or a sweep of runs with ``-m``.

Examples:
    python scripts/train.py experiment=e2e method=delta_lora seed=1
    python scripts/train.py -m experiment=e2e method.update_ratio=0.5,1,2 seed=1,2,3 scale=tiny
    python scripts/train.py --config-dir FOLDER method=mine scale=tiny   (FOLDER/method/mine.yaml)
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from scripts.runs import composition
from scripts.runs.composition import ConfigError
from scripts.runs.execution import execute
from scripts.runs.folder import RECORD, LockedError
from scripts.runs.run import Run

logger = logging.getLogger("train")


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(_: DictConfig) -> None:
    """Compose, execute and report one run."""
    if int(os.environ.get("RANK", "0")) > 0:
        logging.disable(logging.INFO)  # the main process reports
    try:
        run = Run.compose(overrides_of(HydraConfig.get()))
        if run.is_done:
            logger.info("already done: %s (delete the folder to run it again)", run.folder)
        record = execute(run, wait=False)
    except (ConfigError, LockedError) as error:
        _stop(str(error))
    except KeyboardInterrupt as stop:
        _stop(f"{stop or 'stopped'}; the same command continues", code=130)
    if not record:  # a process of a distributed run other than the main one
        return
    for name, value in record["metrics"].items():
        logger.info("test/%s = %.4f", name, value)
    for name, reason in record["missing_metrics"].items():
        logger.warning("test/%s is missing: %s", name, reason)
    logger.info("record: %s", run.folder / RECORD)


def overrides_of(hydra_config: Any) -> list[str]:
    """Return the overrides that compose a run, the one for further folders included."""
    overrides = hydra_config.overrides
    more = [o for o in overrides.hydra if o.startswith(f"{composition.SEARCH_PATH}=")]
    return [*more, *overrides.task]


def _stop(message: str, code: int = 2) -> None:
    """End the process with a message and no traceback."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def check_arguments(arguments: Sequence[str]) -> None:
    """Compose the run (of a sweep: its first one) so that mistakes get our messages, not Hydra's.

    Raises:
        ConfigError: unknown group member or key, or a value that cannot be read.
    """
    overrides = [
        a for a in arguments
        if ("=" in a or a.startswith("~")) and not a.startswith("-")
        and (not a.startswith("hydra.") or a.startswith(composition.SEARCH_PATH))
    ]  # fmt: skip
    composition.check_choices(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        firsts = [
            f"{p.get_key_element()}={next(p.sweep_string_iterator())}"
            if p.is_sweep_override()
            else str(p.input_line)
            for p in parsed
        ]
    except OverrideParseException as error:
        raise ConfigError(f"cannot read the override {error.override!r}: {error}") from error
    composition.compose(firsts)


def with_search_path(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with Hydra's ``--config-dir FOLDER`` as the override that it means."""
    found = list(arguments)
    for flag in ("--config-dir", "-cd"):
        for place, argument in enumerate(found):
            name, is_joined, value = argument.partition("=")
            if name == flag and (is_joined or place + 1 < len(found)):
                folder = Path(value if is_joined else found[place + 1]).resolve()
                taken = 1 if is_joined else 2
                found[place : place + taken] = [f"{composition.SEARCH_PATH}=[file://{folder}]"]
    return found


if __name__ == "__main__":
    sys.argv[1:] = with_search_path(sys.argv[1:])
    try:
        check_arguments(sys.argv[1:])
    except ConfigError as error:
        _stop(str(error))
    main()
