"""Where a result comes from."""

from pathlib import Path

import pytest
import torch

from delta_lora import provenance


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is a GPU")
def test_a_processor_is_named_down_to_the_kind_that_decides_the_rounding() -> None:
    name = provenance.device()["name"]
    assert name.endswith(f"{torch.backends.cpu.get_cpu_capability()})")
    info = Path("/proc/cpuinfo")
    if info.exists() and "cpu family" in (text := info.read_text(errors="replace")):
        family = text.partition("cpu family")[2].split("\n")[0].strip("\t :")
        assert f"(family {family}, model " in name
