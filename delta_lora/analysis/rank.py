"""Rank of what training added to each projection: the singular values of ``W* - W_0``.

W* is the merged weight. With s = alpha / rank the change of a layer is

* LoRA (arXiv 2106.09685): ``s B A``, rank at most r;
* Delta-LoRA (arXiv 2309.02411, Algorithm 1, whose updates telescope):
  ``(1 + lambda) s B_T A_T - lambda s B_k A_k``, rank at most 2 r;
* fine-tuning of W itself: any rank.

A change is computed as a difference of two stored weights, so its entries carry rounding errors of
the size of ``eps * |W|``, not of ``eps * |change|``. The tolerance of the numerical rank is
therefore relative to W: ``max(out, in) * eps * largest singular value of W_0``, numpy's and
torch's rule for a matrix that is known to `eps`, applied to the weight that was rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from delta_lora.analysis.similarity import Original, projection_weight


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the change of one projection.

    Attributes:
        singular_values: in falling order.
        tolerance: values above it count; absolute.
        rank: how many do.
    """

    singular_values: tuple[float, ...]
    tolerance: float
    rank: int


def spectrum(before: Tensor, after: Tensor, *, eps: float | None = None) -> Spectrum:
    """Return the singular values of ``after - before`` and their numerical rank.

    Args:
        before: W_0, (out, in) or (in, out), floating point.
        after: W*, of the same shape.
        eps: relative error of the entries; None takes that of `before`'s type.

    Returns:
        The spectrum, computed in float64.

    Raises:
        ValueError: the shapes differ or are not those of a matrix, or a value is not finite.
    """
    if before.shape != after.shape or before.dim() != 2:
        raise ValueError(
            f"a change needs two matrices of one shape, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}"
        )
    eps = torch.finfo(before.dtype).eps if eps is None else eps
    first = before.detach().to("cpu", torch.float64)
    change = after.detach().to("cpu", torch.float64) - first
    if not bool(torch.isfinite(change).all()):
        raise ValueError("a weight is not finite; its change has no singular values")
    values = torch.linalg.svdvals(change)
    largest = float(torch.linalg.matrix_norm(first, ord=2))
    tolerance = max(before.shape) * eps * largest
    return Spectrum(tuple(values.tolist()), tolerance, int((values > tolerance).sum()))


def spectra(originals: Sequence[Original], model: nn.Module) -> dict[str, Spectrum]:
    """Return the spectrum of the change of every projection.

    Args:
        originals: from `delta_lora.analysis.similarity.snapshot`, taken before training.
        model: the same model on merged weights.

    Returns:
        By the projection's name, in the order of the model.
    """
    return {p.name: spectrum(before, projection_weight(model, p)) for p, before in originals}
