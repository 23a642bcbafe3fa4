"""Export a trained adapter: as a plain LoRA that PEFT loads, or as a merged model.

Delta-LoRA's whole change of a layer is ``(1 + lambda) s B A - lambda s B_k A_k`` (the updates
of Algorithm 1 telescope), so it *is* a LoRA of rank 2r on the untouched base, with
``A = [A; A_k]`` and ``B = [(1 + lambda) s B, -lambda s B_k]``. The other low-rank methods are LoRAs
of their own rank (AdaLoRA of the ranks it kept, DyLoRA of any rank up to r).

What PEFT calls a layer is the whole layer: for a fused query-key-value layer the factors of its
slices are stacked, with zeros in B where nothing was adapted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from delta_lora import adapter_file, writing
from delta_lora.adapter import Adapter, put
from delta_lora.checks import check_integer, check_path
from delta_lora.families import FAMILIES
from delta_lora.low_rank import LowRankBranch, LowRankLinear, weight_slice
from delta_lora.peft_folder import import_peft, write_peft_folder
from delta_lora.projections import Projection, find_projections

#: what PEFT puts before the name of a layer.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Factors:
    """The change of one whole layer as a product: ``B @ A``.

    Attributes:
        A: (rank, in), float64.
        B: (out of the whole layer, rank), float64.
        error: what the product leaves out of the change, relative, by the Frobenius norm.
    """

    A: Tensor
    B: Tensor
    error: float

    @property
    def rank(self) -> int:
        """Number of columns of B."""
        return self.A.shape[0]


class _Part(NamedTuple):
    """The change of one slice, ``left @ right``, and the norm of what that leaves out."""

    projection: Projection
    left: Tensor
    right: Tensor
    lost: float


@dataclass(frozen=True)
class PeftExport:
    """What `export_peft` wrote.

    Attributes:
        folder: the adapter of PEFT.
        ranks: rank by layer.
        errors: relative error of the layer's change, by layer; 0 for an exact product.
        num_parameters: entries of all factors.
    """

    folder: Path
    ranks: dict[str, int]
    errors: dict[str, float]
    num_parameters: int


def export_peft(
    path: str | Path,
    folder: str | Path,
    *,
    base: nn.Module | str | Path | None = None,
    rank: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PeftExport:
    """Write a PEFT LoRA that gives on the untouched base what the trained model gives.

    Args:
        path: a run's folder, or the folder of an adapter.
        folder: gets ``adapter_model.safetensors`` and ``adapter_config.json`` of PEFT.
        base: the base model (left as it is), or its folder or hub id; None as in `load`.
        rank: compress every layer to this rank by SVD, the best there is; None keeps all.
        settings: settings of the method to change, such as DyLoRA's ``{"eval_rank": 2}``.

    Returns:
        Ranks and errors by layer.

    Raises:
        ImportError: PEFT is not installed.
        FileNotFoundError: no adapter stands there.
        ValueError: the change is none of low rank (full fine-tuning), or the rank is not allowed.
    """
    peft = import_peft()
    if rank is not None:
        check_integer("rank", rank, at_least=1)
    folder = check_path("folder", folder)
    source = adapter_file.find_folder(path)
    description = adapter_file.read_description(source)
    trained, plain = _trained_and_plain(source, base, settings)
    layers = changes(trained, plain, description, rank=rank)
    heads, family = description["base"]["head"], description["base"]["family"]
    config = peft.LoraConfig(
        target_modules=list(layers),
        modules_to_save=list(heads) or None,
        fan_in_fan_out=not all(isinstance(plain.get_submodule(n), nn.Linear) for n in layers),
        task_type=FAMILIES[family].peft_task if family in FAMILIES else None,
        base_model_name_or_path=getattr(getattr(plain, "config", None), "name_or_path", None),
    )
    write_peft_folder(
        folder,
        config=config,
        factors={
            f"{_PREFIX}{name}": (factors.A.float(), factors.B.float())
            for name, factors in layers.items()
        },
        others={
            f"{_PREFIX}{name}": tensor
            for name, tensor in _saved_whole(trained.model, family, heads).items()
        },
    )
    return PeftExport(
        folder=folder,
        ranks={name: factors.rank for name, factors in layers.items()},
        errors={name: factors.error for name, factors in layers.items()},
        num_parameters=sum(f.A.numel() + f.B.numel() for f in layers.values()),
    )


def export_merged(
    path: str | Path,
    folder: str | Path,
    *,
    base: nn.Module | str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model on merged weights, as `save_pretrained` does.

    Args:
        path: a run's folder, or the folder of an adapter.
        folder: gets ``config.json`` and ``model.safetensors``.
        base: as for `export_peft`.
        settings: as for `export_peft`.

    Returns:
        The folder.

    Raises:
        TypeError: the model is none of transformers and has no `save_pretrained`.
        ValueError: the weights are narrower than the change and cannot hold it, or the method
            (prompt tuning, for one) has none that could be merged.
        WriteError: a file cannot be written.
    """
    folder = check_path("folder", folder)
    source = adapter_file.find_folder(path)
    if isinstance(base, nn.Module):
        model = copy.deepcopy(base)
    else:
        model = adapter_file.load_base(adapter_file.read_description(source), source, source=base)
    names = frozenset(model.state_dict())
    adapter = put(model, source, settings=settings)
    model.eval()
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise TypeError(
            f"{type(model).__name__} has no save_pretrained; within "
            "delta_lora.load(path).merged() its state_dict is the merged one"
        )
    with adapter.merged() as merged:
        if any(isinstance(module, LowRankLinear) for module in merged.modules()):
            raise ValueError(
                "the weights of the base are narrower than float32 and would round the learned "
                "change away; export the PEFT adapter instead"
            )
        if differing := sorted(merged.state_dict().keys() ^ names):
            raise ValueError(
                f"this method cannot be merged into the weights: {differing[0]} is not in both the "
                "base and the trained model; delta_lora.load(path) gives the trained model"
            )
        with writing.filling(folder) as temporary:
            save(str(temporary), safe_serialization=True)
    return folder


def changes(
    trained: Adapter, plain: nn.Module, description: Mapping[str, Any], *, rank: int | None = None
) -> dict[str, Factors]:
    """Return what training changed in every adapted layer, as factors.

    Args:
        trained: from `load`.
        plain: the untouched base.
        description: of the adapter.
        rank: compress to this rank; None keeps the change as it is.

    Raises:
        ValueError: a change is not of low rank and no `rank` is given, or weights outside the
            adapted layers and the head changed.
    """
    base = description["base"]
    found = find_projections(plain, base["projections"], exclude=base["head"])
    with trained.merged() as merged:
        _refuse_other_changes(merged, plain, found, base["head"])
        after = {
            p.name: _weight(merged.get_submodule(p.layer), p)
            for p in found
            if not isinstance(merged.get_submodule(p.layer), LowRankLinear)
        }
    branches = {
        branch.projection.name: branch
        for module in trained.model.modules()
        if isinstance(module, LowRankLinear)
        for branch in module.branches
    }
    layers: dict[str, Factors] = {}
    for layer in dict.fromkeys(p.layer for p in found):
        parts = []
        for p in (p for p in found if p.layer == layer):
            branch = branches.get(p.name)
            base_layer = plain.get_submodule(layer)
            if branch is None:  # a weight that trained as a whole
                change = after[p.name] - _weight(base_layer, p)
                parts.append(_Part(p, *_dense(change, rank, p), lost=0.0))
                continue
            left, right = _branch_factors(branch)
            moved = _moved(trained.model.get_submodule(layer).base_layer, base_layer, p)
            lost = 0.0
            if moved is not None:
                # Written in place: W_T - W_0 is of rank 2r with B A in it, up to rounding.
                change = moved + left @ right
                left, right = _truncate(change, 2 * branch.rank)
                lost = float((change - left @ right).norm())
            parts.append(_Part(p, left, right, lost))
        layers[layer] = _whole_layer(parts, rank)
    return layers


def _trained_and_plain(
    source: Path,
    base: nn.Module | str | Path | None,
    settings: Mapping[str, Any] | None,
) -> tuple[Adapter, nn.Module]:
    """Return the trained model and the untouched base, neither of them the caller's."""
    if isinstance(base, nn.Module):
        plain, start = copy.deepcopy(base), copy.deepcopy(base)
    else:
        description = adapter_file.read_description(source)
        start = adapter_file.load_base(description, source, source=base)
        plain = copy.deepcopy(start)
    trained = put(start, source, settings=settings)
    start.eval()
    return trained, plain.eval()


def _branch_factors(branch: LowRankBranch) -> tuple[Tensor, Tensor]:
    """Return scaled B and A of a branch in float64, without the rows that are zero."""
    with torch.no_grad():
        A_RI, B_OR = (factor.detach().double().cpu() for factor in branch.factors())
    is_used = (A_RI != 0).any(dim=1) & (B_OR != 0).any(dim=0)
    return branch.scaling * B_OR[:, is_used], A_RI[is_used]


def _moved(written: Any, base_layer: nn.Module, p: Projection) -> Tensor | None:
    """Return how far W was written in place, or None where it was not."""
    before = base_layer.weight
    assert isinstance(before, Tensor)
    if torch.equal(written.weight.cpu(), before.cpu()):
        return None
    return _weight(written, p) - _weight(base_layer, p)


def _weight(layer: Any, p: Projection) -> Tensor:
    """Return the slice of a layer's weight, (out, in), in float64 on the CPU."""
    W_slice = weight_slice(layer.weight, p).double().cpu()
    return W_slice.T if p.is_transposed else W_slice


def _dense(change: Tensor, rank: int | None, p: Projection) -> tuple[Tensor, Tensor]:
    if rank is None:
        raise ValueError(
            f"the change of {p.name} is no product of low rank that is known (its weight trained "
            "as a whole, or the run is one of PEFT's methods); "
            f"compress it with rank=N, at most {p.max_rank}, or export the merged model"
        )
    return _truncate(change, p.max_rank)


def _truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best product of `rank`: left (out, rank) and right (rank, in)."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, S.numel())
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def _whole_layer(parts: list[_Part], rank: int | None) -> Factors:
    """Return the factors of a whole layer from those of its slices."""
    rows = []
    for part in parts:
        p = part.projection
        whole = torch.zeros(p.out_features, part.left.shape[1], dtype=part.left.dtype)
        whole[p.start : p.stop] = part.left
        rows.append(whole)
    A, B = torch.cat([part.right for part in parts]), torch.cat(rows, dim=1)
    if A.shape[0] == 0:  # nothing was learned: PEFT needs a rank of one at least
        return Factors(A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1), 0.0)
    change = B @ A
    lost = math.hypot(*(part.lost for part in parts))
    if rank is not None and rank < A.shape[0]:
        B, A = _truncate(change, rank)
        lost = math.hypot(lost, float((change - B @ A).norm()))
    norm = float(change.norm())
    return Factors(A, B, lost / norm if norm > 0 else 0.0)


def _refuse_other_changes(
    merged: nn.Module, plain: nn.Module, found: Sequence[Projection], head: Sequence[str]
) -> None:
    """Raise where training changed more than the slices `found` and the head."""
    in_head = tuple(f"{name}." for name in head) or ("\0",)
    before = dict(plain.named_parameters())
    for name, parameter in merged.named_parameters():
        owner = merged.get_submodule(name.rpartition(".")[0])
        is_wrapped = isinstance(owner, LowRankBranch) or ".base_layer." in name
        if name.startswith(in_head) or is_wrapped:
            continue
        if name not in before:
            if parameter.requires_grad:
                raise ValueError(
                    f"{name} was trained and is no part of the base, so no LoRA on the adapted "
                    "layers can hold it; delta_lora.load(path) gives the trained model"
                )
            continue
        now = parameter.detach().cpu().clone()
        old = before[name].detach().cpu()
        for p in found:
            if name == f"{p.layer}.weight":
                weight_slice(now, p).copy_(weight_slice(old, p))
        if not torch.equal(now, old):
            what = (
                "outside the adapted slices"
                if any(name == f"{p.layer}.weight" for p in found)
                else "too"
            )
            raise ValueError(
                f"{name} changed {what}, which no LoRA on the adapted layers can hold; "
                "export the merged model"
            )


def _saved_whole(model: nn.Module, family: str | None, head: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of every module that PEFT saves and loads as a whole.

    For a classifier PEFT adds the usual names of heads to `modules_to_save`, and it takes every
    module whose name ends with one of them.
    """
    ends = (*head, *(("classifier", "score") if family == "sequence_classification" else ()))
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if ends and name.endswith(ends):
            found |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return found
