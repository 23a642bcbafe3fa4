"""Run one cell, or a sweep of cells with ``-m``.

Examples:
    python scripts/train.py experiment=e2e method=delta_lora seed=1
    python scripts/train.py -m method=delta_lora method.update_ratio=0.5,1,2 seed=1,2,3 scale=tiny
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from scripts.runs import cell

logger = logging.getLogger("train")


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(_: DictConfig) -> None:
    """Compose, run and report one cell."""
    overrides = list(HydraConfig.get().overrides.task)
    if int(os.environ.get("RANK", "0")) > 0:
        logging.disable(logging.INFO)  # the main process reports
    try:
        cfg = cell.compose(overrides)
        folder = cell.run_dir(cfg)
        if cell.status(cfg).state == "done":
            logger.info("already done: %s (delete the folder to run it again)", folder)
        record = cell.run(cfg, wait=False)
    except (cell.ConfigError, cell.LockedError) as error:
        _stop(str(error))
    except KeyboardInterrupt as stop:
        _stop(f"{stop or 'stopped'}; the same command continues", code=130)
    if not record:  # a process of a distributed run other than the main one
        return
    for name, value in record["metrics"].items():
        logger.info("test/%s = %.4f", name, value)
    for name, reason in record["missing_metrics"].items():
        logger.warning("test/%s is missing: %s", name, reason)
    logger.info("record: %s", folder / "record.json")


def _stop(message: str, code: int = 2) -> None:
    """End the process with a message and no traceback."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def check_arguments(arguments: Sequence[str]) -> None:
    """Compose the run (of a sweep: its first one) so that mistakes get our messages, not Hydra's.

    Raises:
        cell.ConfigError: unknown group member or key, or a value that cannot be read.
    """
    overrides = [
        a for a in arguments
        if ("=" in a or a.startswith("~")) and not a.startswith(("-", "hydra."))
    ]  # fmt: skip
    cell.check_choices(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        firsts = [
            f"{p.get_key_element()}={next(p.sweep_string_iterator())}"
            if p.is_sweep_override()
            else str(p.input_line)
            for p in parsed
        ]
    except OverrideParseException as error:
        raise cell.ConfigError(f"cannot read the override {error.override!r}: {error}") from error
    cell.compose(firsts)


if __name__ == "__main__":
    try:
        check_arguments(sys.argv[1:])
    except cell.ConfigError as error:
        _stop(str(error))
    main()
