"""Where a result comes from."""

from pathlib import Path

import pytest
import torch

from scripts.runs import provenance


def test_the_device_is_the_one_that_was_used_whatever_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    facts = provenance.device(torch.device("cpu"))
    assert facts["type"] == "cpu"
    assert "H100" not in facts["name"]
    facts = provenance.device(torch.device("cuda", 0))
    assert (facts["type"], facts["name"], facts["count"]) == ("cuda", "NVIDIA H100", 1)


def test_a_processor_is_named_down_to_the_kind_that_decides_the_rounding() -> None:
    name = provenance.device(torch.device("cpu"))["name"]
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
