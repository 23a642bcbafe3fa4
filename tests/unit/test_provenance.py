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


def test_a_folder_is_named_by_what_it_holds_and_by_the_folders_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("1")
    flat = provenance.sha256_folder(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("2")
    assert provenance.sha256_folder(tmp_path) == flat
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "train.tsv").write_text("3")
    nested = provenance.sha256_folder(tmp_path)
    (tmp_path / "rte" / "train.tsv").write_text("4")
    assert len({flat, nested, provenance.sha256_folder(tmp_path)}) == 3
