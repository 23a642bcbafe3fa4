"""What several modules of tests compute once."""

from __future__ import annotations

import pytest

from tests.contract.peft_trainer import run_ours


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Return `run_ours`, each set of values computed once."""
    done = {}

    def run(**values):
        key = tuple(sorted(values.items()))
        if key not in done:
            done[key] = run_ours(tmp_path_factory.mktemp("ours"), **values)
        return done[key]

    return run
