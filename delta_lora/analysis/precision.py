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
#: every branch with its layer.
Branches = list[tuple[LowRankLinear, LowRankBranch]]


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
    model = _start(build(), form)
    method = DeltaLora(
        rank=rank, alpha=alpha, learning_rate=learning_rate, update_ratio=update_ratio,
        start_step=start_step, form="closed_form" if form == "closed_form" else "in_place",
    )  # fmt: skip
    method.inject(model, projections=projections, head=head, total_steps=steps, seed=seed)
    branches = _branches(model)
    initial = [_slice(layer, branch) for layer, branch in branches]
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
            kept = [_product(branch) for _, branch in branches]
        optimizer.step()
        method.after_step(step)
        if form == "in_place_rounded":
            round_weights(model)
        if kept and ((step + 1) % every == 0 or step + 1 == steps):
            ideal = [
                update_ratio * (_product(branch) - before)
                for (_, branch), before in zip(branches, kept, strict=True)
            ]
            found = _changes(branches, initial, form)
            missed = [a - b for a, b in zip(found, ideal, strict=True)]
            errors.append((step + 1, _norm(missed) / _norm(ideal)))
    return errors


@torch.no_grad()
def _start(model: nn.Module, form: str) -> nn.Module:
    """Round all weights to bfloat16; return the model in the type that the form trains in."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    return model.to(torch.bfloat16) if form == "closed_form" else model


def _branches(model: nn.Module) -> Branches:
    layers = (m for m in model.modules() if isinstance(m, LowRankLinear))
    return [(layer, branch) for layer in layers for branch in layer.branches]


def _changes(branches: Branches, initial: list[Tensor], form: str) -> list[Tensor]:
    """Return the change that each W made, or that the closed form carries, in float64."""
    if form == "closed_form":
        return [_carried(branch) for _, branch in branches]
    pairs = zip(branches, initial, strict=True)
    return [_slice(layer, branch) - W_0 for (layer, branch), W_0 in pairs]


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
