"""One further process of a check: ``python -m scripts.checking.child KIND ARGUMENTS ANSWER``.

`scripts.checking.children` starts it. The answer is written at the very end, so a file that is
there is whole.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(kind: str, arguments: str, answer: str) -> None:
    """Call one of the functions below with keywords from JSON and write what it returns."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    result = _functions()[kind](**json.loads(arguments))
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


def _functions() -> dict[str, Callable[..., dict[str, Any]]]:
    from scripts.checking import explore, processes, resume, speed

    return {
        "count_steps": speed.count_steps,
        "straight_runs": resume.straight_runs,
        "run_to_kill": resume.run_to_kill,
        "train_on_rank": processes.train_on_rank,
        "compiled": explore.compiled,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
