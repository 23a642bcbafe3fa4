"""One warm process and one set of straight runs for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.runs import Bench
from tests.faults.warm import Warm


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Return what runs commands in forked processes."""
    with Warm() as warm:
        yield Bench(warm, tmp_path_factory.mktemp("bench"))
