"""What must be a number: losses, norms, weights and scores, named where one is infinite or NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from delta_lora.low_rank import LowRankBranch


class NonFiniteError(RuntimeError):
    """A loss, norm, weight or score became infinite or NaN."""


class NonFiniteLossError(NonFiniteError):
    """The training loss became infinite or NaN."""


@torch.no_grad()
def check_weights(named: Iterable[tuple[str, Tensor]], what: str, advice: str) -> None:
    """Check that every weight is a number; tensors without values (meta) are passed over.

    Args:
        named: names and tensors.
        what: what they are, for the message.
        advice: what to do.

    Raises:
        NonFiniteError: one is not; the message names the tensor and counts its bad entries.
    """
    tensors = [(n, t) for n, t in named if t.is_floating_point() and not t.is_meta and t.numel()]
    by_device: dict[torch.device, list[Tensor]] = {}
    for _, tensor in tensors:  # one wait for a device, not one for a tensor
        by_device.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    if all(bool(torch.stack(flags).all()) for flags in by_device.values()):
        return
    for name, tensor in tensors:
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NonFiniteError(
                f"{name} of {what} has {bad} of {tensor.numel()} entries that are infinite or NaN; "
                f"{advice}"
            )


def check_values(values: Mapping[str, float], where: str) -> None:
    """Check that every value is a number.

    Args:
        values: by name.
        where: what they are of, for the message.

    Raises:
        NonFiniteError: one is infinite or NaN.
    """
    bad = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"{where} gave {', '.join(bad)}: the weights have left the range of the numbers; lower "
            "the learning rate or alpha, or clip gradients (trainer.max_grad_norm=1.0)"
        )


class Trained:
    """Whether training has changed what a model computes; asked once at its end.

    Args:
        model: the injected model, before its first step and before a checkpoint is restored.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = _sums(model)

    def is_unchanged(self, model: nn.Module) -> bool:
        """Return whether no branch adds anything and no other trained weight has moved."""
        branches = [m for m in model.modules() if isinstance(m, LowRankBranch)]
        if not branches and not self._before:
            return False  # nothing of it is known
        with torch.no_grad():
            if any(bool(branch.delta_weight().any()) for branch in branches):
                return False
        pairs = zip(self._before, _sums(model), strict=True)
        return all(torch.equal(before, now) for before, now in pairs)


@torch.no_grad()
def _sums(model: nn.Module) -> list[Tensor]:
    """Return sum and sum of squares, in float64, of every trained parameter outside branches."""
    inside = {
        id(p) for m in model.modules() if isinstance(m, LowRankBranch) for p in m.parameters()
    }
    own = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    return [torch.stack([p.double().sum(), p.double().square().sum()]).cpu() for p in own]
