"""What a narrow type of W does to Delta-LoRA: how much of the change of W is lost in rounding.

W should change by ``lambda s (B_t A_t - B_k A_k)`` (the updates telescope, see
`delta_lora.methods.delta_lora`, detail 6). The error of a form is the distance of the change that W
really made, or that the closed form carries, from this one, computed in float64 from the same
factors, divided by its norm.

``in_place`` refuses a bfloat16 W. `round_weights` emulates its storage: after every step W is
rounded to bfloat16, which is what writing the sum into such a W does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from delta_lora.checks import check_choice, check_integer
from delta_lora.low_rank import LowRankBranch, LowRankLinear, weight_slice
from delta_lora.methods.delta_lora import ClosedFormBranch, DeltaLora

#: in_place: W float32; in_place_rounded: W rounded to bfloat16 after every step; closed_form: W
#: bfloat16 and never written.
FORMS = ("in_place", "in_place_rounded", "closed_form")


def round_weights(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Round the weight of every adapted layer to `dtype`, kept in its own type.

    Args:
        model: with low-rank branches; changed in place.
        dtype: the narrower type.
    """
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, LowRankLinear)):
            layer.weight.copy_(layer.weight.to(dtype))


def change_errors(
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module, int], Tensor],
    *,
    form: str,
    steps: int,
    every: int,
    rank: int,
    alpha: float,
    learning_rate: float,
    update_ratio: float,
    start_step: int,
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    projections: list[str] | None = None,
    head: tuple[str, ...] = (),
    seed: int = 0,
) -> list[tuple[int, float]]:
    """Train Delta-LoRA in one form and return the error of the change of W over the steps.

    Args:
        build: returns the model anew, in float32; its weights are rounded to bfloat16 first, so
            that all forms start from one W_0.
        loss: the training loss at a step.
        form: one of `FORMS`.
        steps: optimiser steps, at least 1.
        every: steps between two values; the last step always has one.
        rank: r.
        alpha: numerator of the scaling.
        learning_rate: constant.
        update_ratio: lambda, above 0.
        start_step: K.
        make_optimizer: makes the optimiser of groups of parameters.
        projections: as for `Method.inject`.
        head: as for `Method.inject`.
        seed: of the factors.

    Returns:
        (number of steps, relative error over all projections), from the first step that W follows.

    Raises:
        ValueError: a setting is not allowed.
    """
    check_choice("form", form, FORMS)
    check_integer("steps", steps, at_least=1)
    check_integer("every", every, at_least=1)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    if form == "closed_form":
        model = model.to(torch.bfloat16)
    method = DeltaLora(
        rank=rank, alpha=alpha, learning_rate=learning_rate, update_ratio=update_ratio,
        start_step=start_step, form="closed_form" if form == "closed_form" else "in_place",
    )  # fmt: skip
    method.inject(model, projections=projections, head=head, total_steps=steps, seed=seed)
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    initial = [_slice(layer, b) for layer in layers for b in layer.branches]
    kept: list[Tensor] = []
    groups = [
        {"params": [p for _, p in group["params"]], "lr": group["lr"]}
        for group in method.param_groups(model)
    ]
    optimizer = make_optimizer(groups)
    errors = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        method.before_step(step)
        if step == start_step + 1:
            kept = [_product(b) for layer in layers for b in layer.branches]
        optimizer.step()
        method.after_step(step)
        if form == "in_place_rounded":
            round_weights(model)
        if kept and ((step + 1) % every == 0 or step + 1 == steps):
            wanted, missed = [], []
            branches = [(layer, b) for layer in layers for b in layer.branches]
            for (layer, branch), W_0, before in zip(branches, initial, kept, strict=True):
                ideal = update_ratio * (_product(branch) - before)
                found = _carried(branch) if form == "closed_form" else _slice(layer, branch) - W_0
                wanted.append(ideal)
                missed.append(found - ideal)
            errors.append((step + 1, _norm(missed) / _norm(wanted)))
    return errors


def _slice(layer: LowRankLinear, branch: LowRankBranch) -> Tensor:
    """Return W of the branch as (out, in) in float64, a copy."""
    W_slice = weight_slice(layer.weight, branch.projection)
    return (W_slice.T if branch.projection.is_transposed else W_slice).to(torch.float64, copy=True)


def _product(branch: LowRankBranch) -> Tensor:
    """Return ``s B A`` in float64."""
    B_OR, A_RI = branch.lora_B.detach().double(), branch.lora_A.detach().double()
    return branch.scaling * (B_OR @ A_RI)


def _carried(branch: LowRankBranch) -> Tensor:
    """Return what the closed form adds to W for its update, in float64."""
    assert isinstance(branch, ClosedFormBranch)
    return branch.delta_weight().detach().double() - _product(branch)


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.square().sum() for t in tensors]).sum().sqrt())
