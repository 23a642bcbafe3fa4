"""The low-rank branch: shapes, initialisation, forward pass, merging, in one place.

LoRA, DyLoRA, AdaLoRA and Delta-LoRA share this file, so that a comparison compares algorithms.

| paper | code | |
|---|---|---|
| lambda | `update_ratio` | share of the delta that is added to W |
| K | `start_step` | W is updated at steps t > K |
| alpha | `alpha` | |
| r | `rank` | |
| alpha / r | `scaling` | |
| the factor that is Kaiming at the start | `lora_A` | (rank, in) |
| the factor that is zero at the start | `lora_B` | (out, rank) |
| their product | `lora_B @ lora_A` | (out, in), in the order of PEFT, whatever the paper writes |

Shape suffixes: B batch and sequence, I inputs, O outputs of a slice, R rank, S sum of the ranks of
all branches of a layer.

Names: a wrapped layer keeps its own name, its former self is `base_layer`, and a branch is named by
its role: ``transformer.h.0.attn.c_attn.query.lora_A``, ``...c_attn.base_layer.weight``.

Precision: A and B are float32 where W is float32, bfloat16 or float16, and float64 where W is
float64. Without autocast the branch computes in their type; under autocast it computes in
autocast's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.projections import (
    Projection,
    find_projections,
    head_parameters,
    parameter_names,
)


class LowRankBranch(nn.Module):
    """The change of one projection: ``scaling * lora_B @ lora_A``.

    A is Kaiming uniform (a = sqrt 5), B zero, so the change is zero at the start. The draw is made
    in float32 on the CPU, so a seed gives the same numbers on every device and in every type.

    Args:
        projection: the slice that is changed.
        rank: number of rows of A.
        alpha: numerator of the scaling.
        weight: weight of the layer, for the device and type.
        generator: source of the initialisation, on the CPU.
    """

    def __init__(
        self,
        projection: Projection,
        *,
        rank: int,
        alpha: float,
        weight: Tensor,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.projection = projection
        self.rank = rank
        self.scaling = alpha / rank
        A_RI = torch.empty(rank, projection.in_features)
        nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5), generator=generator)
        B_OR = torch.zeros(projection.num_outputs, rank)
        dtype = factor_dtype(weight)
        self.lora_A = nn.Parameter(A_RI.to(weight.device, dtype))
        self.lora_B = nn.Parameter(B_OR.to(weight.device, dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (out, rank) as the forward pass uses them."""
        return self.lora_A, self.lora_B

    def delta_weight(self) -> Tensor:
        """Return the change of W, (out, in), in the type of the factors."""
        A_RI, B_OR = self.factors()
        with torch.autocast(A_RI.device.type, enabled=False):
            return (B_OR @ A_RI) * self.scaling

    def extra_repr(self) -> str:
        """Show what `print(model)` shows."""
        p = self.projection
        return f"{p.role}[{p.start}:{p.stop}], rank={self.rank}, scaling={self.scaling:g}"


class LowRankLinear(nn.Module):
    """A linear layer with low-rank branches on slices of its outputs.

    The base product stays one product. The A's of all branches are stacked into one product, which
    reads the input once; each branch then adds into its own slice. Dropout, shared by the branches,
    acts on their input only, as in microsoft/LoRA's `MergedLinear`.

    Args:
        base_layer: an `nn.Linear` or `Conv1D`; its parameters are left as they are.
        branches: at least one, on disjoint slices.
        dropout: probability in [0, 1); 0 draws no random number.
    """

    def __init__(
        self, base_layer: nn.Module, branches: Sequence[LowRankBranch], *, dropout: float
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.roles = tuple(branch.projection.role for branch in branches)
        for role, branch in zip(self.roles, branches, strict=True):
            self.add_module(role, branch)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.train(base_layer.training)

    @property
    def branches(self) -> list[LowRankBranch]:
        """The branches, in the order of their slices."""
        return [self._modules[role] for role in self.roles]  # type: ignore[misc]

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the base layer; some model code reads its type."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the base layer."""
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return the base product plus the branches.

        Args:
            x_BI: (..., in).

        Returns:
            (..., out of the whole layer), in the type of the base product.
        """
        branches = self.branches
        out_BO = self.base_layer(x_BI)
        factors = [branch.factors() for branch in branches]
        A_SI = factors[0][0] if len(factors) == 1 else torch.cat([A for A, _ in factors])
        x_BI = self.dropout(x_BI)
        if not torch.is_autocast_enabled(x_BI.device.type):
            x_BI = x_BI.to(A_SI.dtype)
        h_BS = F.linear(x_BI, A_SI)
        h_list = h_BS.split([A.shape[0] for A, _ in factors], dim=-1)
        for branch, (_, B_OR), h_BR in zip(branches, factors, h_list, strict=True):
            p = branch.projection
            # scaling the narrow factor is one small product, scaling the output a large one
            delta_BO = F.linear(h_BR * branch.scaling, B_OR)
            out_BO.narrow(-1, p.start, p.num_outputs).add_(delta_BO)
        return out_BO


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of A and B for a base weight: float64 for float64, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def inject_branches(
    model: nn.Module,
    *,
    projections: Sequence[str] | None,
    head: Sequence[str],
    rank: int,
    dropout: float,
    seed: int,
    make_branch: Callable[..., LowRankBranch],
    weight_dtypes: Sequence[torch.dtype] | None = None,
) -> dict[str, LowRankBranch]:
    """Freeze `model`, wrap its projections, let branches and head train.

    The branches are drawn one after the other, in the order of the modules, from one generator
    seeded with `seed`; the global random state is not touched. So every method with the same branch
    starts from the same numbers at the same seed.

    Args:
        model: changed in place; on any device, meta too.
        projections: patterns of `find_projections`; None finds W_Q and W_V.
        head: names of modules that train.
        rank: the rank, checked against every projection.
        dropout: probability on the input of the branches.
        seed: seed of the run.
        make_branch: builds the branch of a projection: ``make_branch(projection, weight=...,
            generator=...)``, as the constructor of `LowRankBranch` with the rest filled in.
        weight_dtypes: types of W in which the method can write it; None takes any.

    Returns:
        The branches by the name of their projection (``<layer>.<role>``).

    Raises:
        RuntimeError: the model was injected before.
        ValueError: nothing matches, the rank is larger than a layer, W has the wrong type, is
            shared with another layer, or is read by torch without a call of the layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            raise RuntimeError(
                f"{name} already has low-rank branches; inject into a freshly loaded model"
            )
    found = find_projections(model, projections, exclude=head)
    for p in found:
        if rank > p.max_rank:
            raise ValueError(
                f"rank={rank} is larger than {p.name}, a {p.num_outputs} x {p.in_features} "
                f"matrix; use rank <= {p.max_rank}"
            )
        weight = model.get_submodule(p.layer).weight
        assert isinstance(weight, Tensor)
        if weight_dtypes is not None and weight.dtype not in weight_dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in weight_dtypes)
            raise ValueError(
                f"{p.layer}.weight is {weight.dtype}, but form=in_place writes it and needs "
                f"{allowed}, because a narrower type rounds the update away; "
                "load the model in float32 (mixed precision by autocast is fine), or use "
                "form=closed_form, which never writes it"
            )
    _refuse_layers_read_elsewhere(model, found)
    head_trains = head_parameters(model, head)
    model.requires_grad_(False)
    for parameter in head_trains.values():
        parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    branches: dict[str, LowRankBranch] = {}
    for layer_name in dict.fromkeys(p.layer for p in found):
        base_layer = model.get_submodule(layer_name)
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        own = {
            p.name: make_branch(p, weight=weight, generator=generator)
            for p in found
            if p.layer == layer_name
        }
        branches.update(own)
        wrapped = LowRankLinear(base_layer, list(own.values()), dropout=dropout)
        replace_module(model, layer_name, wrapped)
    return branches


def _refuse_layers_read_elsewhere(model: nn.Module, found: Sequence[Projection]) -> None:
    """Raise where a branch would be passed by, or its change would reach another layer too."""
    owners = parameter_names(model)
    for layer in dict.fromkeys(p.layer for p in found):
        parent_name, _, leaf = layer.rpartition(".")
        parent = model.get_submodule(parent_name)
        is_read = isinstance(parent, nn.MultiheadAttention) or (
            isinstance(parent, nn.TransformerEncoderLayer) and leaf in ("linear1", "linear2")
        )
        if is_read:
            raise ValueError(
                f"{layer} cannot be adapted: torch's {type(parent).__name__} reads its weight "
                "without calling the layer, so that a branch on it would have no effect; choose "
                "other projections"
            )
        names = owners.get(id(model.get_submodule(layer).weight), [])  # none: a quantised buffer
        if len(names) > 1:
            raise ValueError(
                f"{layer} cannot be adapted: its weight is shared ({', '.join(names)}), and a "
                "change of it would change the other layer too; choose other projections, or untie "
                "the weights"
            )


@contextmanager
def merged_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context `model` is a plain model: merged weights, no branches, its first names.

    Every `LowRankLinear` is replaced by its base layer, whose weight holds ``W + delta`` (delta in
    the type of the factors, then rounded once to the type of W). Afterwards the wrappers are back
    and W is what it was bit by bit: the slices are kept as clones in the meantime, so the context
    costs the size of the adapted slices.

    Args:
        model: an injected model.

    Yields:
        The same model.

    Raises:
        RuntimeError: the model has no branch (never injected, or merged already).
        TypeError: a weight is quantised.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    if not layers:
        raise RuntimeError(
            "the model has no low-rank branch to merge: it was never injected or is merged already"
        )
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_merged_layer(model, name, layer))
        yield model


@contextmanager
def _merged_layer(model: nn.Module, name: str, layer: LowRankLinear) -> Iterator[None]:
    if not layer.weight.is_floating_point():
        raise TypeError(
            f"{name}.weight is {layer.weight.dtype}; only a floating point weight can be merged, "
            "so evaluate a quantised model with its branches"
        )
    slices = [weight_slice(layer.weight, branch.projection) for branch in layer.branches]
    saved = [W_slice.clone() for W_slice in slices]
    try:
        with torch.no_grad():
            for W_slice, branch in zip(slices, layer.branches, strict=True):
                delta = branch.delta_weight()
                if branch.projection.is_transposed:
                    delta = delta.T
                W_slice.copy_(W_slice.to(delta.dtype) + delta)
        replace_module(model, name, layer.base_layer)
        yield
    finally:
        with torch.no_grad():
            for W_slice, original in zip(slices, saved, strict=True):
                W_slice.copy_(original)
        replace_module(model, name, layer)
        layer.train(layer.base_layer.training)


def weight_slice(weight: Tensor, projection: Projection) -> Tensor:
    """Return the detached view of a projection's part of a layer's weight.

    Args:
        weight: the whole weight, (out, in), or (in, out) if the projection is transposed.
        projection: the slice.

    Returns:
        A view in the layout of the weight.
    """
    dim = 1 if projection.is_transposed else 0
    return weight.detach().narrow(dim, projection.start, projection.num_outputs)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` wherever the module called `name` stands in `model` (a shared one has more names).

    Args:
        model: changed in place.
        name: a name of the module that goes.
        new: the module that comes.
    """
    old = model.get_submodule(name)
    for other, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
