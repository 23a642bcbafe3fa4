"""Which devices and scale a command takes, and what it says where a GPU cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from scripts.reporting.spec import ROOT
from scripts.runs import devices, scale
from scripts.runs.checks import check
from scripts.runs.composition import ConfigError
from scripts.runs.devices import Cuda, Device
from scripts.runs.execution import execute
from scripts.runs.run import Run
from scripts.runs.workers import CELLS_ON_DEVICE

#: the cached function; tests replace it.
ASKED = devices.cuda
#: a package `torch` that answers as the real one does on the machine that is described.
TORCH = """
import warnings

__version__ = "2.13.0"


class version:
    cuda = {cuda!r}


class _Ones:
    def __init__(self, device):
        if device in {broken!r}:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    def add(self, value):
        return self

    def item(self):
        return 2


def ones(number, device):
    return _Ones(device)


class cuda:
    def is_available():
        if {warning!r}:
            warnings.warn({warning!r})
        return {number} > 0

    def device_count():
        return {number}

    def get_device_name(index):
        return "NVIDIA H100"

    def mem_get_info(index):
        return 70 * 2**30, 80 * 2**30
"""


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    ASKED.cache_clear()
    yield
    ASKED.cache_clear()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set up what the driver shows and what a torch of that machine would answer."""

    def build(
        seen: int,
        number: int = 0,
        *,
        cuda: str | None = "13.0",
        warning: str = "",
        broken: tuple[str, ...] = (),
        text: str | None = None,
    ) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(devices, "count_driver_devices", lambda: seen)
        values = {"number": number, "cuda": cuda, "warning": warning, "broken": broken}
        (tmp_path / "torch.py").write_text(text or TORCH.format(**values))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return build


def test_without_a_device_torch_is_not_asked(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(0, text="raise SystemExit('imported')")
    assert scale.resolve_scale("auto") == ("tiny", "auto: no CUDA device is seen")
    ASKED.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.cuda().problem == "no CUDA device is seen (CUDA_VISIBLE_DEVICES='')"


def test_usable_devices_give_scale_paper(machine: Callable[..., None]) -> None:
    machine(2, 2)
    expected = ("paper", "auto: 2 CUDA devices (NVIDIA H100)")
    assert scale.resolve_scale("auto") == expected
    assert devices.cuda().devices[1] == Device("1", "NVIDIA H100", 70 * 2**30, 80 * 2**30)
    assert scale.resolve_scale("small") == ("small", "as asked")
    with pytest.raises(ValueError, match="use one of auto, tiny, small, paper"):
        scale.resolve_scale("huge")


def test_devices_have_the_names_that_the_user_gave_them(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3a, 5")
    assert [device.name for device in devices.cuda().devices] == ["GPU-8f3a", "5"]


def test_a_driver_that_is_too_old_gives_tiny_with_torchs_own_words(
    machine: Callable[..., None],
) -> None:
    words = "The NVIDIA driver on your system is too old (found version 12040)."
    machine(1, 0, warning=words)
    chosen, reason = scale.resolve_scale("auto")
    assert chosen == "tiny"
    assert f"PyTorch 2.13.0 (CUDA 13.0) cannot use it: {words}; update the driver" in reason


def test_a_torch_without_cuda_gives_tiny(machine: Callable[..., None]) -> None:
    machine(1, 0, cuda=None)
    chosen, reason = scale.resolve_scale("auto")
    assert chosen == "tiny"
    assert "the installed PyTorch 2.13.0 is built without CUDA; install a build" in reason


def test_a_broken_device_is_left_out_and_named(machine: Callable[..., None]) -> None:
    machine(2, 2, broken=("cuda:0",))
    found = devices.cuda()
    assert [device.name for device in found.devices] == ["1"]
    assert found.problem.startswith("device 0: RuntimeError: CUDA error: uncorrectable ECC")
    assert "not usable: device 0" in scale.resolve_scale("auto")[1]
    ASKED.cache_clear()
    machine(1, 1, broken=("cuda:0",))
    assert scale.resolve_scale("auto")[0] == "tiny"


def test_a_torch_that_cannot_be_imported_or_answers_too_late(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1, text="raise ImportError('libcudnn.so.9: cannot open shared object file')")
    assert "asking PyTorch for it failed: ImportError: libcudnn.so.9" in devices.cuda().problem
    ASKED.cache_clear()
    machine(1, text="import time; time.sleep(60)")
    monkeypatch.setattr(devices, "PROBE_TIMEOUT_S", 0.2)
    assert "timed out" in devices.cuda().problem


def test_the_driver_shows_at_least_what_torch_can_use() -> None:
    assert (devices.count_driver_devices() > 0) >= torch.cuda.is_available()


def test_the_script_prints_the_scale_alone() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "runs" / "scale.py"), "small"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "small\n"
    assert done.stderr == "scale: small (as asked)\n"


# ---------------------------------------------------------------------- what must have a GPU


@pytest.mark.parametrize(
    ("name", "overrides", "is_refused"),
    [
        ("paper", [], True),
        ("paper", ["trainer.device=cpu"], False),
        ("paper", ["trainer.device=cpu", "++trainer.device=auto"], True),
        ("small", [], False),
        ("tiny", [], False),
    ],
)
def test_scale_paper_needs_a_device(
    name: str, overrides: list[str], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cuda", lambda: Cuda((), "the driver is too old"))
    refusal = scale.missing_device(name, overrides)
    assert (refusal is not None) == is_refused
    monkeypatch.setattr(devices, "cuda", lambda: Cuda((Device("0", "H100", 1, 1),)))
    assert scale.missing_device(name, overrides) is None


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "cuda", lambda: Cuda((), "the driver is too old"))


#: a small model, so that it is built in no time.
RUN = ["experiment=e2e", "method=lora", "logger=none"]


@pytest.mark.usefixtures("no_gpu")
def test_a_run_of_scale_paper_never_ends_up_on_the_cpu_unasked(tmp_path: Path) -> None:
    run = [*RUN, f"paths.outputs={tmp_path}"]
    with pytest.raises(ConfigError, match="scale=paper needs a CUDA device") as caught:
        execute(Run.compose(run))
    for words in ("the driver is too old", "scale=tiny", "trainer.device=cpu"):
        assert words in str(caught.value)
    assert not list(tmp_path.iterdir())
    check(Run.compose([*run, "trainer.device=cpu"]))
    check(Run.compose([*run, "scale=small"]))


@pytest.mark.usefixtures("no_gpu")
def test_a_worker_that_was_given_a_device_must_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = Run.compose([*RUN, f"paths.outputs={tmp_path}", "scale=small"])
    monkeypatch.setenv(CELLS_ON_DEVICE, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check(cfg)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ConfigError, match="this worker's place on a GPU needs a CUDA device"):
        check(cfg)


def test_the_probe_is_answered_by_the_real_torch() -> None:
    facts = devices._ask_torch()
    assert facts["torch"] == torch.__version__
    assert len(facts["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert json.dumps(facts)
