"""How far training turned each W_Q and W_V: the cosine of the angle between before and after.

Delta-LoRA paper (arXiv 2309.02411), figure 3: per attention block the cosine similarity of W_0 and
the final W*, both read as one long vector. W* is the merged weight, so the low-rank branch counts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from delta_lora.low_rank import LowRankLinear, weight_slice
from delta_lora.projections import Projection, find_projections

logger = logging.getLogger(__name__)


class Original(NamedTuple):
    """A projection and a copy of its weight from before training, on the CPU."""

    projection: Projection
    weight: Tensor


def snapshot(
    model: nn.Module, projections: Sequence[str] | None, exclude: Sequence[str] = ()
) -> list[Original]:
    """Return a copy of the weights that `cosine_similarities` compares with later.

    Args:
        model: before any method was injected.
        projections: as for `find_projections`.
        exclude: modules that are not searched (the task head).

    Returns:
        One entry per projection, in the order of the model; empty, which is logged, where the
        model has no attention that is found by structure, or a quantised one.
    """
    try:
        found = find_projections(model, projections, exclude=exclude)
    except ValueError as error:
        logger.info("no similarity of weights is recorded: %s", error)
        return []
    weights: list[Any] = [model.get_submodule(p.layer).weight for p in found]
    if not all(weight.is_floating_point() for weight in weights):
        logger.info("no similarity of weights is recorded: the weights are quantised")
        return []
    return [Original(p, projection_weight(model, p).to("cpu", copy=True)) for p in found]


def cosine_similarities(originals: Sequence[Original], model: nn.Module) -> dict[str, float]:
    """Return the cosine similarity of each projection's weight before and after.

    Args:
        originals: from `snapshot`.
        model: the same model on merged weights, or with its branches where it cannot be merged.

    Returns:
        By the projection's name, in [-1, 1]; computed in float64. A weight of zeros gives 1.
    """
    return {p.name: _cosine(before, projection_weight(model, p)) for p, before in originals}


@torch.no_grad()
def _cosine(before: Tensor, after: Tensor) -> float:
    a, b = before.double().flatten(), after.to("cpu", torch.float64).flatten()
    norms = a.norm() * b.norm()
    return float((a @ b) / norms) if norms > 0 else 1.0


def projection_weight(model: nn.Module, projection: Projection) -> Tensor:
    """Return the weight of a projection in the layout of its layer, branches included.

    Args:
        model: on merged weights, or with branches.
        projection: the slice.

    Returns:
        Detached; a view where the layer has no branch.
    """
    layer = model.get_submodule(projection.layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    W_slice = weight_slice(weight, projection)
    if not isinstance(layer, LowRankLinear):
        return W_slice
    # A model that cannot be merged: its weight is narrower than the change.
    branch = next(b for b in layer.branches if b.projection == projection)
    delta = branch.delta_weight().detach()
    return W_slice.to(delta.dtype) + (delta.T if projection.is_transposed else delta)
