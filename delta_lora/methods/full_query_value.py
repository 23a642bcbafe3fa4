"""Fine-tuning of W_Q and W_V only, the double dagger rows of the paper's tables.

Zi et al., arXiv 2309.02411, Tables 1 to 4. The paper describes the row once as W_Q, W_V and
once as "query and key"; the count (48 x 2^20 for GPT2-Medium) fits both, and W_Q and W_V are what
the other methods adapt.

Update: ``W_Q, W_V <- AdamW(W_Q, W_V)``. Biases of the projections stay.

State kept: none beyond the optimiser's, two tensors of the size of W_Q and W_V (2 x 192 MiB for
GPT2-Medium in float32).

Details:
1. A separate layer (RoBERTa, BART, Llama, ViT) trains its weight as it is, under its own name.
2. A fused layer (GPT-2's c_attn) becomes a `SplitLinear`: the trained slices are parameters of
   their own (``c_attn.query``, ``c_attn.value``), the rest are frozen ones
   (``c_attn.frozen_<start>_<stop>``), and the forward pass concatenates them, so that the product
   stays one. W_K therefore has no gradient, no optimiser state and no weight decay.
3. Within `merged` the model has its first layout again, the fused weight written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.low_rank import replace_module
from delta_lora.method_bases import WeightsMethod
from delta_lora.projections import Projection, find_projections, head_parameters


class SplitLinear(nn.Module):
    """A linear layer whose weight is held in slices of its outputs, of which some train.

    Args:
        base_layer: an `nn.Linear` or `Conv1D`; its weight moves into this module.
        projections: the trained slices of this layer, disjoint and in order.
    """

    bias: nn.Parameter | None

    def __init__(self, base_layer: nn.Module, projections: Sequence[Projection]) -> None:
        super().__init__()
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        self.output_dim = 1 if projections[0].is_transposed else 0
        bias = base_layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias)
        trained = {(p.start, p.stop): p.role for p in projections}
        cuts = sorted({0, weight.shape[self.output_dim]}.union(*trained))
        names = []
        for start, stop in pairwise(cuts):
            role = trained.get((start, stop))
            names.append(role or f"frozen_{start}_{stop}")
            part = weight.detach().narrow(self.output_dim, start, stop - start).clone()
            self.register_parameter(names[-1], nn.Parameter(part, requires_grad=role is not None))
        self.slice_names = tuple(names)
        # The layer of the first layout, kept outside the module tree; it lends its class and has
        # no weight of its own except within `assembled`.
        self._plain = [base_layer]
        base_layer.weight = nn.Parameter(weight.detach().to("meta"), requires_grad=False)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The whole weight in the layout of the base layer."""
        return torch.cat([getattr(self, name) for name in self.slice_names], dim=self.output_dim)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return the fused product, (..., out), of an input (..., in)."""
        weight = self.weight
        return F.linear(x_BI, weight.T if self.output_dim == 1 else weight, self.bias)

    @contextmanager
    def assembled(self) -> Iterator[nn.Module]:
        """Within the context, yield a layer of the first class that holds the whole weight."""
        plain = self._plain[0]
        empty = plain.weight
        plain.weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        plain.register_parameter("bias", self.bias)
        plain.train(self.training)
        try:
            yield plain
        finally:
            plain.weight = empty
            self.train(plain.training)


class FullQueryValue(WeightsMethod):
    """Fine-tuning of W_Q and W_V (double dagger).

    Args:
        learning_rate: peak learning rate, above 0.
    """

    name = "full_query_value"

    def choose(
        self, model: nn.Module, projections: Sequence[str] | None, head: Sequence[str]
    ) -> None:
        """Let the weights of the projections and the head train; split fused layers.

        Raises:
            RuntimeError: the model was injected before.
            ValueError: a pattern matches nothing, or there is no such head.
        """
        for name, module in model.named_modules():
            if isinstance(module, SplitLinear):
                raise RuntimeError(f"{name} is split already; inject into a freshly loaded model")
        found = find_projections(model, projections, exclude=head)
        head_trains = head_parameters(model, head)
        model.requires_grad_(False)
        for parameter in head_trains.values():
            parameter.requires_grad_(True)
        for layer_name in dict.fromkeys(p.layer for p in found):
            layer = model.get_submodule(layer_name)
            own = [p for p in found if p.layer == layer_name]
            if own[0].num_outputs == own[0].out_features:
                assert isinstance(layer.weight, Tensor)
                layer.weight.requires_grad_(True)
            else:
                replace_module(model, layer_name, SplitLinear(layer, own))

    def merged(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Put the fused weights back into the first layout for the time of the context."""
        return _first_layout(model)


@contextmanager
def _first_layout(model: nn.Module) -> Iterator[nn.Module]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SplitLinear)}
    with ExitStack() as stack:
        for name, layer in layers.items():
            plain = stack.enter_context(layer.assembled())
            replace_module(model, name, plain)
            stack.callback(replace_module, model, name, layer)
        yield model
