"""Jobs of a worker pool: one breaks the CUDA context, one shows whether it is whole."""

from __future__ import annotations

POISON, MULTIPLY = (f"{__name__}:{name}" for name in ("poison", "multiply"))


def poison() -> None:
    """Break the CUDA context of this process.

    Raises:
        RuntimeError: always, of CUDA.
    """
    import torch

    # An index out of range fails inside the kernel (a list of them: a single one is read and
    # refused on the host), and with it all that this process asks of the device from then on.
    torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")].sum().item()


def multiply() -> None:
    """Multiply twice on the device.

    Raises:
        RuntimeError: two equal products differ.
    """
    import torch

    from delta_lora.trainer import Trainer

    Trainer(batch_size=1, device="cuda", deterministic=True).prepare_backend()
    torch.manual_seed(0)
    left, right = torch.randn(2, 512, 512, device="cuda")
    if not torch.equal(left @ right, left @ right):
        raise RuntimeError("two equal deterministic products differ")
