"""Parts of a run that need no model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from scripts.runs import execution
from scripts.runs.run import Run


class Seen:
    """Keeps what a mirror is made with."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_a_mirror_gets_the_names_of_what_a_run_is_made_of_and_makes_nothing(
    tmp_path: Path,
) -> None:
    """A signature may name a class that is gone; the configuration is shown, never built."""
    run = Run.compose(["experiment=xsum", "scale=tiny", f"paths.outputs={tmp_path}"])
    with open_dict(run.config):
        run.config.logger = {"_target_": f"{__name__}.Seen"}
        run.config.task.gone = {"_target_": "tasks.nowhere.Gone", "size": 3}
    run.meaning = {"task": {"name": "xsum"}, "method": {"name": "lora"}}
    with contextlib.ExitStack() as stack:
        (mirror,) = execution._mirrors(run, stack)
        assert mirror.values["run_config"]["task"]["gone"]["_target_"] == "tasks.nowhere.Gone"
        assert mirror.values["directory"] == tmp_path
        assert mirror.values["signature"] == run.name
        assert not mirror.is_closed
    assert mirror.is_closed
