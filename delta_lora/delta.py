"""The arithmetic of Delta-LoRA, for the method of the suite, the callback and the export.

Zi et al., "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices",
arXiv 2309.02411, Algorithm 1. With A, B before and A', B' after the optimiser step t, if t > K,

``W += update_ratio * scaling * (B' @ A' - B @ A)``.

In place this is one product of rank 2r, ``[B' B] @ [A'; -A]`` (`Difference`). The updates
telescope, so with A_k and B_k as they stood before the first one the whole change of a layer is

``(1 + update_ratio) * scaling * B @ A - update_ratio * scaling * B_k @ A_k``,

which is one product of rank 2r on the untouched W (`stack`).

Factors are pairs (A, B). Shape suffixes: I inputs, O outputs, R rank, S twice the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]

#: devices on which the factors of many layers are first copied into memory without gaps, which one
#: kernel does; from there they go to their places. Elsewhere a copy more costs more than it saves.
STAGED = ("cuda",)

#: lambda and K of the paper's E2E runs.
UPDATE_RATIO = 2.0
START_STEP = 500
#: write W as printed, or leave it alone and carry its update in the branch.
FORMS = ("in_place", "closed_form")
#: W belongs to whoever built the model; the suite, which prints the paper's tables, asks for the
#: other one.
FORM = "closed_form"
#: types in which W can be written in place; a narrower one rounds the update away.
WRITABLE = (torch.float32, torch.float64)
#: logged with K, the number of steps, and the largest K that has an effect.
NEVER_UPDATES = (
    "start_step=%d with %d steps in all: W is updated at steps above start_step, counted from 0, "
    "so the update never fires and the run is LoRA; choose start_step <= %d"
)


def updates_at(step: int, update_ratio: float, start_step: int) -> bool:
    """Return whether W is updated at `step`, the number of steps that were applied before it."""
    return update_ratio > 0 and step > start_step


def never_updates(total_steps: int, update_ratio: float, start_step: int) -> bool:
    """Return whether W should be updated (lambda is above 0) and no step of a training does it."""
    return update_ratio > 0 and not updates_at(total_steps - 1, update_ratio, start_step)


def difference(new: Factors, old: Factors) -> Factors:
    """Return A (2 rank, in) and B (out, 2 rank) of ``B' @ A' - B @ A``: ``[A'; A]``, ``[B' -B]``.

    Args:
        new: A' and B'.
        old: A and B; brought to the type and device of the new ones.
    """
    (A_new_RI, B_new_OR), (A_old_RI, B_old_OR) = new, old
    A_SI = torch.cat([A_new_RI, A_old_RI.to(A_new_RI)])
    B_OS = torch.cat([B_new_OR, -B_old_OR.to(B_new_OR)], dim=1)
    return A_SI, B_OS


def stack(now: Factors, first: Factors, *, update_ratio: float, scaling: float = 1.0) -> Factors:
    """Return A (2 rank, in) and B (out, 2 rank) whose product is the whole change of a layer.

    ``A = [A_T; A_k]`` and ``B = [(1 + update_ratio) * scaling * B_T, -update_ratio * scaling *
    B_k]``, so with the scaling of the trained branch that of the new one is 1.

    Args:
        now: A_T (rank, in) and B_T (out, rank), the trained factors.
        first: A_k and B_k, the factors just before the first update of W; where W was never
            updated, the trained factors, which gives ``scaling * B_T @ A_T``.
        update_ratio: lambda.
        scaling: alpha / rank of the trained branch; 1 leaves it to the caller.

    Returns:
        The factors, in the type of the trained ones.
    """
    (A_RI, B_OR), (A_first_RI, B_first_OR) = now, first
    A_SI = torch.cat([A_RI, A_first_RI.to(A_RI)])
    B_OS = torch.cat(
        [
            (1 + update_ratio) * scaling * B_OR,
            -update_ratio * scaling * B_first_OR.to(B_OR),
        ],
        dim=1,
    )
    return A_SI, B_OS


def norm(factors: Sequence[Factors], scalings: Sequence[float]) -> float:
    """Return the Frobenius norm of all ``scaling * B @ A`` together, without making a product.

    ``|B A|^2`` is the sum of ``(B^T B) * (A A^T)``, in which rounding may leave a little below 0.
    """
    squares = [
        scaling**2 * ((B_OR.T.float() @ B_OR.float()) * (A_RI.float() @ A_RI.float().T)).sum()
        for (A_RI, B_OR), scaling in zip(factors, scalings, strict=True)
    ]
    return float(torch.stack(squares).sum().clamp(min=0).sqrt())


class Difference:
    """``B' @ A' - B @ A`` of one layer, added to W as one product: ``[B' B] @ [A'; -A]``.

    `keep` is called before the optimiser step and `add_to` after it. The two buffers, (out, 2 rank)
    and (2 rank, in) in the type of W, are twice the factors; nothing of W's size is allocated.
    """

    def __init__(self) -> None:
        self._left: Tensor | None = None
        self._right: Tensor | None = None

    @property
    def new(self) -> Factors:
        """A' and B' of the last `add_to`, as views."""
        assert self._left is not None
        assert self._right is not None
        rank = self._left.shape[1] // 2
        return self._right[:rank], self._left[:, :rank]

    @torch.no_grad()
    def keep(self, old: Factors, *, like: Tensor) -> None:
        """Keep A (rank, in) and B (out, rank) as they are now; `like` is W, for device and type."""
        A_RI, B_OR = old
        rank = A_RI.shape[0]
        if (
            self._left is None
            or self._right is None
            or (self._left.device, self._left.dtype) != (like.device, like.dtype)
        ):
            self._left = like.new_empty(B_OR.shape[0], 2 * rank)
            self._right = like.new_empty(2 * rank, A_RI.shape[1])
        self._left[:, rank:].copy_(B_OR)
        torch.neg(A_RI.to(like.dtype), out=self._right[rank:])

    @torch.no_grad()
    def add_to(
        self, W: Tensor, new: Factors, *, factor: float, is_transposed: bool = False
    ) -> None:
        """Add ``factor * (B' @ A' - B @ A)`` to `W`.

        Args:
            W: (out, in), or (in, out) where `is_transposed`; changed in place.
            new: A' and B'.
            factor: lambda times the scaling of the branch.
            is_transposed: whether W is stored (in, out).
        """
        assert self._left is not None
        assert self._right is not None
        A_RI, B_OR = new
        rank = A_RI.shape[0]
        self._left[:, :rank].copy_(B_OR)
        self._right[:rank].copy_(A_RI)
        left, right = self._left, self._right
        if is_transposed:
            left, right = right.T, left.T
        W.addmm_(left, right, alpha=factor)


class Differences:
    """The `Difference` of many layers, copied together where their shapes agree.

    A step of a small batch is bound by how many kernels the host starts. Layers of one shape share
    their buffers, (layers, out, 2 rank) and (layers, 2 rank, in), and one of their factors, so that
    the copies of all of them are a handful, and one product a layer is left. The numbers are those
    of `Difference`.
    """

    def __init__(self) -> None:
        self._groups: list[_Group] = []
        self._made_for: list[tuple[Any, ...]] = []

    @torch.no_grad()
    def keep(self, old: Sequence[Factors], *, like: Sequence[Tensor]) -> None:
        """Keep A (rank, in) and B (out, rank) of every layer as they are now.

        Args:
            old: the factors of each layer.
            like: W of each layer, for device and type.
        """
        kinds = [
            (A.shape, B.shape, A.dtype, W.device, W.dtype)
            for (A, B), W in zip(old, like, strict=True)
        ]
        if kinds != self._made_for:
            members: dict[tuple[Any, ...], list[int]] = {}
            for index, kind in enumerate(kinds):
                members.setdefault(kind, []).append(index)
            self._groups = [_Group(each, old[each[0]], like[each[0]]) for each in members.values()]
            self._made_for = kinds
        for group in self._groups:
            group.write_old(old)

    @torch.no_grad()
    def add_to(
        self,
        weights: Sequence[Tensor],
        new: Sequence[Factors],
        *,
        factors: Sequence[float],
        are_transposed: Sequence[bool],
    ) -> None:
        """Add ``factor * (B' @ A' - B @ A)`` to the W of every layer.

        Args:
            weights: W of each layer, (out, in), or (in, out) where it is transposed; changed in
                place.
            new: A' and B' of each layer.
            factors: lambda times the scaling of the branch.
            are_transposed: whether a W is stored (in, out).
        """
        for group in self._groups:
            group.write_new(new)
            for index, left, right in zip(group.members, group.left, group.right, strict=True):
                if are_transposed[index]:
                    left, right = right.T, left.T
                weights[index].addmm_(left, right, alpha=factors[index])


class _Group:
    """Layers with factors of one shape and a W of one device and type.

    Attributes:
        members: their numbers.
        left: ``[B' B]`` of each, (layers, out, 2 rank).
        right: ``[A'; -A]`` of each, (layers, 2 rank, in).
    """

    def __init__(self, members: Sequence[int], factors: Factors, like: Tensor) -> None:
        A_RI, B_OR = factors
        self.members = list(members)
        self._rank = rank = A_RI.shape[0]
        self.left = like.new_empty(len(members), B_OR.shape[0], 2 * rank)
        self.right = like.new_empty(len(members), 2 * rank, A_RI.shape[1])
        self._staged: Factors | None = None
        if like.device.type in STAGED:
            number = len(members)
            self._staged = (
                A_RI.new_empty(number, *A_RI.shape), B_OR.new_empty(number, *B_OR.shape)
            )  # fmt: skip

    def write_old(self, factors: Sequence[Factors]) -> None:
        old = slice(self._rank, None)
        self._write(self.left[:, :, old], self.right[:, old], factors)
        self.right[:, old].neg_()

    def write_new(self, factors: Sequence[Factors]) -> None:
        new = slice(self._rank)
        self._write(self.left[:, :, new], self.right[:, new], factors)

    def _write(self, left: Tensor, right: Tensor, factors: Sequence[Factors]) -> None:
        own = [factors[index] for index in self.members]
        if self._staged is None:
            for to_left, to_right, (A_RI, B_OR) in zip(left, right, own, strict=True):
                to_left.copy_(B_OR)
                to_right.copy_(A_RI)
            return
        A, B = self._staged
        torch.stack([A_RI.detach() for A_RI, _ in own], out=A)
        torch.stack([B_OR.detach() for _, B_OR in own], out=B)
        left.copy_(B)
        right.copy_(A)
