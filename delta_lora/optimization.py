"""Optimisers and schedules of a run, by the names that a configuration gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "sgd", "rmsprop", "adafactor")


def schedule_factor(schedule: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the factor on the learning rate at `step` (0-based): linear warm-up, then decay.

    The first update of a warm-up has rate 0, as in the microsoft/LoRA recipe and in transformers.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def split_by_decay(
    groups: Sequence[dict[str, Any]], weight_decay: float, no_decay: Sequence[str]
) -> list[dict[str, Any]]:
    """Return parameter groups for torch, each split into what decays and what does not.

    Args:
        groups: a method's groups: ``params``, a list of (name, parameter), and their rate ``lr``.
        weight_decay: of the parameters that decay.
        no_decay: parts of the names of those that do not.

    Returns:
        Groups with ``params``, ``lr``, ``initial_lr`` and ``weight_decay``; none is empty.
    """
    split = []
    for group in groups:
        for is_exempt, decay in ((False, weight_decay), (True, 0.0)):
            params = [
                (name, parameter)
                for name, parameter in group["params"]
                if any(part in name for part in no_decay) is is_exempt
            ]
            if params:
                rate = {"lr": group["lr"], "initial_lr": group["lr"]}
                split.append({"params": params, **rate, "weight_decay": decay})
    return split


def make_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    betas: tuple[float, float],
    epsilon: float,
    momentum: float,
    has_loss_scaler: bool,
) -> torch.optim.Optimizer:
    """Return torch's optimiser over `groups`.

    Args:
        name: one of `OPTIMIZERS`.
        groups: from `split_by_decay`.
        betas: of ``adamw``.
        epsilon: of ``adamw``; the others keep torch's.
        momentum: of ``sgd`` and ``rmsprop``.
        has_loss_scaler: whether steps whose gradients overflow are skipped (fp16).
    """
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, momentum=momentum)
    if name == "adafactor":
        return torch.optim.Adafactor(groups)
    # One kernel for the whole update. Not with a loss scaler: a fused optimiser skips an
    # overflowing step inside the kernel, where nobody could tell that it was skipped.
    return torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=not has_loss_scaler)
