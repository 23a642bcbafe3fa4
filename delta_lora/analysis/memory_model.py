"""Memory of one training step: measured by category, and computed from the shapes alone.

Categories, in bytes:

* ``weights``: all parameters of the model, adapters included, but for those that a method keeps as
  its state;
* ``gradients``: one tensor of the size of every trained parameter;
* ``optimizer``: AdamW two tensors of that size and a step counter of 4 bytes each; SGD none;
* ``method``: what a method keeps beside the model. Delta-LoRA ``in_place`` the two rank-2r buffers
  of every projection, ``closed_form`` A_k and B_k, AdaLoRA two running means of every factor;
* ``activations``: what autograd saves for the backward pass, each storage once, parameters left
  out (`torch.autograd.graph.saved_tensors_hooks`).

`measure_step` counts them on the living objects of a real step, and its peak: on a CPU the largest
sum of the tensors alive, on CUDA `torch.cuda.max_memory_allocated`. Memory that a kernel takes
inside itself is not seen on a CPU.

`expected_memory` computes them from the shapes of a GPT-2, for a pass that makes the logits of
every position. (The suite's own loop makes only those with a loss, which keeps an index and fewer
logits; ``scripts/planning`` plans that pass, of more models.) Per token, with width d, h heads, a
feed-forward layer of 4 d, V words and L blocks, autograd saves these floats:

| what | full | W_Q, W_V frozen but for a branch |
|---|---|---|
| input of the first normalisation, mean and deviation | d + 2 | d + 2, not in the first block |
| its output, which c_attn or the branch multiplies | d | d |
| query, key, value; output of attention; its log-sums | 4 d + h | 4 d + h |
| input of the second normalisation, mean and deviation | d + 2 | d + 2 |
| its output, which c_fc multiplies | d | |
| argument of GELU | 4 d | 4 d |
| GELU, which c_proj multiplies | 4 d | |
| once: input of the last normalisation, mean and deviation | d + 2 | d + 2 |
| once: its output, which the tied head multiplies | d | |
| once, for every target: log-probabilities | V | V |

and a branch ``s B A x`` (rank R per branch in the forward pass) adds R of each, A stacked (not in
the first block, which needs no gradient of x) and, with dropout, its mask (the same).

The peak is the larger of two moments, each on top of ``weights + optimizer + method``: the start of
the backward pass, with the activations, the logits (N V floats for N tokens) and one gradient of
the log-probabilities ((N - B) V for B sequences); and the end of it, with the gradients and, where
the tied token embeddings train, two more of their size, which are summed there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from delta_lora.low_rank import LowRankBranch
from delta_lora.protocols import Method

CATEGORIES = ("weights", "gradients", "optimizer", "method", "activations")
FLOAT_BYTES, INDEX_BYTES = 4, 8

# ---------------------------------------------------------------------- measured


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and freed while it is active.

    Attributes:
        live: bytes that were made since and are alive.
        peak: the largest value of `live`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and count the storages of its results that are new."""
        inputs = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return

        def freed(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def measure_step(
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    *,
    warm_up_steps: int = 1,
    micro_batches: int = 1,
) -> dict[str, int]:
    """Return the bytes of every category and the peak of one optimiser step.

    Args:
        model: after ``method.inject``, in training mode.
        method: its hooks run as in `delta_lora.trainer`.
        optimizer: over the trained parameters.
        loss: the loss of one forward pass.
        warm_up_steps: steps before the measured one, at least 1, so that all state exists.
        micro_batches: forward and backward passes of a step, at least 1; all but the first find
            the gradients of those before them.

    Returns:
        `CATEGORIES` (activations of one micro-batch) and ``peak``.

    Raises:
        ValueError: there is no step before the measured one, or no micro-batch.
    """
    if warm_up_steps < 1:
        raise ValueError(f"warm_up_steps={warm_up_steps}: the optimiser has no state before a step")
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches}: a step needs at least 1")
    for step in range(warm_up_steps):
        _step(method, optimizer, loss, step, micro_batches)
        optimizer.zero_grad()
    parameters = list(model.parameters())
    kept = kept_parameters(model)
    static = {
        "weights": _bytes([p for p in parameters if not any(p is k for k in kept)]),
        "optimizer": _bytes(
            [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        ),
        "method": _bytes([*kept, *_tensors_of(method)]),
    }
    device = parameters[0].device
    is_cuda = device.type == "cuda"
    saved: dict[int, Tensor] = {}
    own = {p.untyped_storage()._cdata for p in parameters}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = _whole_loss(method, loss, warm_up_steps, 0, is_last=True)
    static["activations"] = sum(t.untyped_storage().nbytes() for t in saved.values())
    saved.clear()
    del total
    if is_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        _step(method, optimizer, loss, warm_up_steps, micro_batches)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        with LiveBytes() as counter:
            _step(method, optimizer, loss, warm_up_steps, micro_batches)
        peak = counter.peak + static["weights"] + static["optimizer"] + static["method"]
    static["gradients"] = _bytes([p.grad for p in parameters if p.grad is not None])
    optimizer.zero_grad()
    return {**{name: static[name] for name in CATEGORIES}, "peak": peak}


def _whole_loss(
    method: Method, loss: Callable[[], Tensor], step: int, micro_step: int, *, is_last: bool
) -> Tensor:
    method.before_micro_batch(step, micro_step)
    total = loss()
    extra = method.extra_loss() if is_last else None
    return total if extra is None else total + extra


def _step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    step: int,
    micro_batches: int,
) -> None:
    for micro_step in range(micro_batches):
        is_last = micro_step == micro_batches - 1
        _whole_loss(method, loss, step, micro_step, is_last=is_last).backward()
    method.before_step(step)
    optimizer.step()
    method.after_step(step)


def kept_parameters(model: nn.Module) -> list[Tensor]:
    """Return the frozen parameters of branches: state of a method (A_k, B_k), not weights."""
    branches = (m for m in model.modules() if isinstance(m, LowRankBranch))
    return [p for branch in branches for p in branch.parameters() if not p.requires_grad]


def _tensors_of(method: Method) -> list[Tensor]:
    """Return the tensors that a method's own objects hold, modules and parameters left out."""
    found: dict[int, Tensor] = {}
    visited: set[int] = set()
    stack: list[Any] = [vars(method)]
    while stack:
        item = stack.pop()
        if id(item) in visited or isinstance(item, nn.Module | nn.Parameter):
            continue
        visited.add(id(item))
        if isinstance(item, Tensor):
            found[item.untyped_storage()._cdata] = item
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
        elif type(item).__module__.startswith("delta_lora.") and hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return list(found.values())


def _bytes(tensors: list[Any]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


# ---------------------------------------------------------------------- computed


@dataclass(frozen=True)
class Shape:
    """A GPT-2 (tied head, no dropout of its own, fused attention kernel) and a batch.

    Attributes:
        width: d.
        num_layers: L.
        num_heads: h.
        vocabulary: V.
        num_positions: rows of the position table.
        batch: sequences.
        length: tokens of each.
    """

    width: int
    num_layers: int
    num_heads: int
    vocabulary: int
    num_positions: int
    batch: int
    length: int

    @property
    def num_parameters(self) -> int:
        """Parameters of the model without adapters."""
        d = self.width
        block = 12 * d * d + 13 * d  # four layers with biases, two normalisations
        return (self.vocabulary + self.num_positions) * d + self.num_layers * block + 2 * d


@dataclass(frozen=True)
class Adaptation:
    """What the formula must know of a method.

    Attributes:
        kind: ``full``, ``full_query_value`` or ``low_rank``.
        rank: r, of the low-rank methods.
        forward_rank: rank of the branch in the forward pass: 2 r in the closed form, else r.
        extra_per_branch: further trained numbers of a branch (AdaLoRA's singular values: r).
        kept_factors: copies of A and B that the method keeps: 2 for Delta-LoRA ``in_place`` (its
            rank-2r buffers) and AdaLoRA, 1 for ``closed_form``.
        dropout: whether there is dropout in the branch.
        states: optimiser tensors per trained one: AdamW 2, SGD 0.
        mask_bytes: bytes of an entry of the dropout mask: 4 on a CPU, 1 on CUDA.
    """

    kind: str
    rank: int = 0
    forward_rank: int = 0
    extra_per_branch: int = 0
    kept_factors: int = 0
    dropout: bool = False
    states: int = 2
    mask_bytes: int = 4


def expected_memory(shape: Shape, adaptation: Adaptation) -> dict[str, int]:
    """Return the bytes of every category and the peak from the shapes alone.

    Args:
        shape: model and batch.
        adaptation: method and optimiser.

    Returns:
        `CATEGORIES` and ``peak``, float32.

    Raises:
        ValueError: unknown kind.
    """
    if adaptation.kind not in ("full", "full_query_value", "low_rank"):
        raise ValueError(f"kind={adaptation.kind!r}; allowed: full, full_query_value, low_rank")
    d, num_branches = shape.width, 2 * shape.num_layers
    base = shape.num_parameters
    factors = num_branches * (2 * adaptation.rank * d + adaptation.extra_per_branch)
    trained, num_tensors, adapters = {
        "full": (base, 4 + 12 * shape.num_layers, 0),
        "full_query_value": (num_branches * d * d, num_branches, 0),
        "low_rank": (
            factors,
            num_branches * (2 + (adaptation.extra_per_branch > 0)),
            factors,
        ),
    }[adaptation.kind]
    counters = num_tensors if adaptation.states else 0
    sizes = {
        "weights": (base + adapters) * FLOAT_BYTES,
        "gradients": trained * FLOAT_BYTES,
        "optimizer": (adaptation.states * trained + counters) * FLOAT_BYTES,
        "method": adaptation.kept_factors * factors * FLOAT_BYTES,
        "activations": _activation_bytes(shape, adaptation),
    }
    static = sizes["weights"] + sizes["optimizer"] + sizes["method"]
    logits = (2 * shape.length - 1) * shape.batch * shape.vocabulary * FLOAT_BYTES
    tied = 2 * shape.vocabulary * d * FLOAT_BYTES if adaptation.kind == "full" else 0
    sizes["peak"] = static + max(sizes["activations"] + logits, sizes["gradients"] + tied)
    return sizes


def _activation_bytes(shape: Shape, adaptation: Adaptation) -> int:
    d, L = shape.width, shape.num_layers
    N = shape.batch * shape.length
    num_targets = N - shape.batch  # the last token of a sequence predicts nothing
    per_token = L * ((d + 2) + 4 * d + shape.num_heads + 4 * d) + (d + 2)
    at_once = 0
    if adaptation.kind == "full":
        per_token += L * ((d + 2) + d + d + 4 * d) + d
        indices = N + shape.length
    else:
        per_token += (L - 1) * (d + 2) + L * d
        indices = 0
        if adaptation.kind == "full_query_value":
            at_once = (L - 1) * 3 * d * d  # the weight put together from its slices
        else:
            R = adaptation.forward_rank
            per_token += L * 2 * R
            at_once = (L - 1) * 2 * R * d  # A of both branches, stacked
            if adaptation.rank < R:
                at_once += L * 2 * R * d  # [(1 + lambda) B, -lambda B_k]
    floats = N * per_token + num_targets * shape.vocabulary + at_once + 1
    mask = (L - 1) * N * d * adaptation.mask_bytes if adaptation.dropout else 0
    return floats * FLOAT_BYTES + (indices + num_targets) * INDEX_BYTES + mask
