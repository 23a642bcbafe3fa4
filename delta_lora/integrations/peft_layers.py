"""The LoRA layers of a PEFT model that Delta-LoRA can work on, and its two forms on one layer.

Zi et al., arXiv 2309.02411, Algorithm 1. `LoraTarget.add_to_weight` is the update of W as printed;
`LoraTarget.add_forward_term` is the closed form: the updates telescope, so W stays as it is and a
forward hook adds ``update_ratio * scaling * (B @ A - B_k @ A_k) @ x``. A and B are detached in it
and x is not, so the gradients of A, B and x are those of the in-place form. The arithmetic is that
of `delta_lora.delta`.

Shape suffixes: B batch and sequence, I inputs, O outputs, R rank, S twice the rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from delta_lora import delta
from delta_lora.delta import Factors
from delta_lora.peft_folder import import_peft
from delta_lora.projections import parameter_names

#: what PEFT must leave alone at initialisation: these values of `init_lora_weights` keep the base.
_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
_MARK = "delta_lora_changed"


@dataclass
class LoraTarget:
    """One LoRA layer of PEFT and what Delta-LoRA keeps for it.

    Attributes:
        name: name of the layer in the `PeftModel`.
        layer: the `peft.tuners.lora.LoraLayer`.
        adapter: the active adapter.
        first: A_k and B_k, copies from just before the first update; None before that.
        difference: what is added to W (in place only); its `new` are A and B at the last point
            where W was brought up to date.
        handle: what removes the forward hook; None where there is none.
    """

    name: str
    layer: Any
    adapter: str
    first: Factors | None = None
    difference: delta.Difference = field(default_factory=delta.Difference)
    handle: RemovableHandle | None = None

    @property
    def factors(self) -> Factors:
        """A (rank, in) and B (out, rank), the trained ones, detached."""
        A_RI = self.layer.lora_A[self.adapter].weight.detach()
        return A_RI, self.layer.lora_B[self.adapter].weight.detach()

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return int(self.factors[0].shape[0])

    @property
    def scaling(self) -> float:
        """The scaling of the branch, alpha / rank (alpha / sqrt(rank) with `use_rslora`)."""
        return float(self.layer.scaling[self.adapter])

    @property
    def weight(self) -> Tensor:
        """W of the base layer, detached."""
        return self.layer.get_base_layer().weight.detach()

    @property
    def is_changed(self) -> bool:
        """Whether Delta-LoRA has changed what this layer computes."""
        return bool(getattr(self.layer, _MARK, False))

    def copy_factors(self) -> Factors:
        """Return copies of A and B."""
        A_RI, B_OR = self.factors
        return A_RI.clone(), B_OR.clone()

    def keep(self, old: Factors | None = None) -> None:
        """Keep A and B, those of now by default, for `add_to_weight`."""
        self.difference.keep(self.factors if old is None else old, like=self.weight)

    def add_to_weight(self, update_ratio: float, new: Factors | None = None) -> None:
        """Add ``update_ratio * scaling * (B' @ A' - B @ A)`` to W.

        Args:
            update_ratio: lambda.
            new: A' and B', those of now by default; A and B are what `keep` kept.
        """
        self.difference.add_to(
            self.weight,
            self.factors if new is None else new,
            factor=update_ratio * self.scaling,
            is_transposed=_is_transposed(self.layer.get_base_layer()),
        )
        setattr(self.layer, _MARK, True)

    def add_forward_term(self, update_ratio: float) -> None:
        """From now on add ``update_ratio * scaling * (B @ A - B_k @ A_k) @ x`` to the output."""
        assert self.first is not None
        self.handle = self.layer.register_forward_hook(
            _ForwardTerm(self.adapter, self.first, update_ratio), with_kwargs=True
        )
        setattr(self.layer, _MARK, True)

    def remove_forward_term(self) -> None:
        """Take the term of `add_forward_term` away."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        setattr(self.layer, _MARK, False)


class _ForwardTerm:
    """Forward hook of the closed form; it reads A and B of the layer that it is called on.

    The two products are one of rank 2 rank. It is computed in the type of the factors (under
    autocast in autocast's) and rounded once to the type of the output.
    """

    def __init__(self, adapter: str, first: Factors, update_ratio: float) -> None:
        self.adapter = adapter
        self.first = first
        self.update_ratio = update_ratio

    def __call__(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise RuntimeError(
                "adapter_names was given, but the closed form of Delta-LoRA works on one adapter "
                "for the whole batch; export the model and load the exported adapter instead"
            )
        if layer.disable_adapters or self.adapter not in layer.active_adapters:
            return output
        x_BI = args[0] if args else kwargs["x"]
        now = (
            layer.lora_A[self.adapter].weight.detach(),
            layer.lora_B[self.adapter].weight.detach(),
        )
        A_SI, B_OS = delta.difference(now, self.first)
        if not torch.is_autocast_enabled(x_BI.device.type):
            x_BI = x_BI.to(A_SI.dtype)
        h_BS = F.linear(x_BI, A_SI) * (self.update_ratio * layer.scaling[self.adapter])
        return (output + F.linear(h_BS, B_OS)).to(output.dtype)


def find_targets(model: nn.Module, *, in_place: bool) -> list[LoraTarget]:
    """Return the LoRA layers of the active adapter of a PEFT model.

    Args:
        model: the `PeftModel`.
        in_place: whether W is going to be written.

    Returns:
        The layers, in the order of the modules.

    Raises:
        ImportError: `peft` is not installed.
        TypeError: the model is no `PeftModel`.
        ValueError: a layer or the adapter's configuration does not fit Delta-LoRA.
    """
    peft = import_peft()
    if not isinstance(model, peft.PeftModel):
        raise TypeError(
            f"the model is a {type(model).__name__}, but DeltaLoraCallback needs a PeftModel with "
            "a LoRA; wrap it with peft.get_peft_model(model, LoraConfig(...)) before the Trainer"
        )
    adapter = _check_adapter(model, peft)
    targets = [
        LoraTarget(name, module, adapter)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and _has_adapter(module, adapter)
    ]
    if not targets:
        raise ValueError(
            f"no layer of the model has a LoRA of the active adapter {adapter!r}; check "
            "target_modules of the LoraConfig"
        )
    for target in targets:
        _check_layer(target, peft)
        if in_place:
            _check_weight(target, peft)
    if in_place:
        _check_not_shared(model, targets)
    return targets


def check_can_train(targets: list[LoraTarget]) -> None:
    """Check that no layer stands at A = B = 0, where both gradients are zero for ever.

    Raises:
        ValueError: a layer does.
    """
    for target in targets:
        A_RI, B_OR = target.factors
        if not A_RI.any() and not B_OR.any():
            raise ValueError(
                f"A and B of {target.name} are both zero, so their gradients are zero and the "
                "layer can never train; start one of them at random (A Kaiming, B zero is "
                "LoraConfig(init_lora_weights=True))"
            )


def unsaved(model: nn.Module, adapter: str) -> list[str]:
    """Return the parameters that train and are in no file that PEFT writes for an adapter.

    Args:
        model: the `PeftModel`.
        adapter: name of the adapter.
    """
    saved = import_peft().get_peft_model_state_dict(model, adapter_name=adapter).values()
    places = {tensor.data_ptr() for tensor in saved}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.numel() and parameter.data_ptr() not in places
    ]


def _check_adapter(model: Any, peft: Any) -> str:
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(
            f"{len(active)} adapters are active ({', '.join(active) or 'none'}), but W can follow "
            "only one; activate one with model.set_adapter(name)"
        )
    config = model.peft_config[active[0]]
    if config.peft_type != peft.PeftType.LORA:
        raise ValueError(
            f"the active adapter {active[0]!r} is a {config.peft_type.value}, not a LORA; "
            "Delta-LoRA is defined for LoRA only, so use peft.LoraConfig"
        )
    init = config.init_lora_weights
    if init not in _INITS_THAT_KEEP_THE_BASE:
        raise ValueError(
            f"init_lora_weights={init!r} changes the base weights, so the trained model could not "
            "be exported as an adapter of the base; use init_lora_weights=True"
        )
    if getattr(config, "target_parameters", None):
        raise ValueError(
            f"target_parameters={config.target_parameters} is not supported; adapt whole layers "
            "with target_modules"
        )
    return str(active[0])


def _has_adapter(layer: Any, adapter: str) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _check_layer(target: LoraTarget, peft: Any) -> None:
    name, layer, adapter = target.name, target.layer, target.adapter
    lora = peft.tuners.lora.layer
    special = tuple(
        getattr(lora, kind)
        for kind in ("MultiheadAttention", "ParamWrapper")
        if hasattr(lora, kind)
    )
    is_linear = adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)
    if not is_linear or isinstance(layer, special):
        raise ValueError(
            f"{name} is a LoRA on {type(layer.get_base_layer()).__name__}, which is not supported; "
            "Delta-LoRA adapts linear layers (nn.Linear, Conv1D), so take it out of target_modules"
        )
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)
    if dropout > 0:
        raise ValueError(
            f"lora_dropout={dropout:g} in {name} is not allowed in Delta-LoRA: W may follow B @ A "
            "only because dL/dW = dL/d(BA), and dropout in the branch breaks that; use "
            "LoraConfig(lora_dropout=0.0)"
        )
    if adapter in getattr(layer, "lora_variant", {}) or layer.use_dora.get(adapter):
        variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
        raise ValueError(
            f"{name} is not a plain LoRA but a variant of it ({variant}: DoRA and the like); the "
            "product B @ A alone is not its change of W, so use LoraConfig without use_dora and "
            "without other variants"
        )
    if layer.lora_bias.get(adapter):
        raise ValueError(
            f"lora_bias=True in {name} is not supported: the bias is no part of the product B @ A; "
            "use LoraConfig(lora_bias=False)"
        )
    if layer.merged or layer.disable_adapters:
        state = "merged into W" if layer.merged else "disabled"
        raise ValueError(
            f"the adapter of {name} is {state}, so it cannot train; call "
            "model.unmerge_adapter() or model.enable_adapter_layers() first"
        )
    weight = getattr(layer.get_base_layer(), "weight", None)  # quantised, it may have another name
    if weight is not None and weight.requires_grad:
        raise ValueError(
            f"the weight of {name} is trained itself; Delta-LoRA needs it frozen, so call "
            "requires_grad_(False) on the base weights"
        )
    if target.is_changed:
        raise ValueError(
            f"{name} was trained by a DeltaLoraCallback before and is no plain LoRA on the base "
            "any more; load base model and adapter afresh, and start or resume from there"
        )


def _check_weight(target: LoraTarget, peft: Any) -> None:
    from transformers.pytorch_utils import Conv1D

    base, advice = target.layer.get_base_layer(), 'use DeltaLoraCallback(form="closed_form")'
    if not isinstance(target.layer, peft.tuners.lora.Linear) or not isinstance(
        base, nn.Linear | Conv1D
    ):
        raise ValueError(
            f'form="in_place" cannot write the weight of {target.name}, a {type(base).__name__}; '
            f"it writes nn.Linear and Conv1D; {advice}, which leaves W alone"
        )
    weight = base.weight
    if weight.dtype not in delta.WRITABLE or type(weight.data) is not Tensor:
        kind = f"{type(weight.data).__name__} of " if type(weight.data) is not Tensor else ""
        raise ValueError(
            f'the weight of {target.name} is a {kind}{weight.dtype}, but form="in_place" needs '
            "torch.float32 or torch.float64 (a narrower type rounds the update away); load the "
            f"model in float32, or {advice}, which leaves W alone"
        )


def _check_not_shared(model: nn.Module, targets: list[LoraTarget]) -> None:
    names = parameter_names(model, each_name=True)
    for target in targets:
        owners = names[id(target.layer.get_base_layer().weight)]
        if len(owners) > 1:
            raise ValueError(
                f"the weight of {target.name} is shared ({', '.join(owners)}), so writing it would "
                'change the other layer as well; use DeltaLoraCallback(form="closed_form")'
            )


def _is_transposed(base: nn.Module) -> bool:
    """Return whether the weight is (in, out): Conv1D, `fan_in_fan_out` in PEFT."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(base, Conv1D)


def forget_compiled_code() -> None:
    """Make compiled models compile again: their code does not look for hooks that came later."""
    if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled
        torch.compiler.reset()


def sample_weights(targets: list[LoraTarget], *, per_layer: int = 4096) -> Iterator[Tensor]:
    """Yield evenly spaced entries of every W, enough to tell whether W is the one it should be."""
    for target in targets:
        flat = target.weight.reshape(-1)
        yield flat[:: max(1, flat.numel() // per_layer)]
