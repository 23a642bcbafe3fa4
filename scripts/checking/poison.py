"""Jobs of a worker pool that break the CUDA context, and ones that show whether it is whole.

The interface is that of `scripts.runs.cell` as `scripts.runs.workers` calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

POISON, MULTIPLY = "poison", "multiply"


def compose(overrides: Sequence[str]) -> str:
    """Return which job: `POISON` or `MULTIPLY`."""
    (job,) = overrides
    return job


def prepare(configs: Sequence[str]) -> None:
    """Nothing is prepared."""


def run(job: str) -> None:
    """Do one job.

    Raises:
        RuntimeError: always for `POISON` (of CUDA), and for `MULTIPLY` where two equal products
            differ.
    """
    import torch

    from delta_lora.trainer import Trainer

    if job == POISON:
        # An index out of range fails inside the kernel (a list of them: a single one is read and
        # refused on the host), and with it all that this process asks of the device from then on.
        torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")].sum().item()
        return
    Trainer(batch_size=1, device="cuda", deterministic=True).prepare_backend()
    torch.manual_seed(0)
    left, right = torch.randn(2, 512, 512, device="cuda")
    if not torch.equal(left @ right, left @ right):
        raise RuntimeError("two equal deterministic products differ")
