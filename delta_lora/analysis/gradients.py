"""Does the gradient of W equal that of the product B A? What Delta-LoRA's argument rests on.

With ``h = W x + s B A x`` and s = alpha / rank, both gradients are sums of ``dL/dh x^T``:
``dL/dW = dL/d(B A) / s``, whatever the loss (Delta-LoRA, arXiv 2309.02411, section 3; the paper has
s = 1 there). With dropout D on the input of the branch, ``h = W x + s B A D x``, the right side is
a sum of ``dL/dh (D x)^T`` and the two differ.

The product is made a variable of its own by running the branch's own forward pass on the factors
``A := B A`` and ``B := I``, so what is measured is the code that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.low_rank import LowRankBranch, LowRankLinear, weight_slice

#: a loss of (logits (batch, seq, vocabulary), hidden states (batch, seq, width), tokens
#: (batch, seq)).
SequenceLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def gradient_gaps(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Return how far dL/dW is from dL/d(B A) / s, for every branch of `model`.

    Args:
        model: with low-rank branches (LoRA or Delta-LoRA), in the mode (training or evaluation)
            that is to be measured; its gradients and `requires_grad` are left as they were.
        loss: computes the loss by one forward pass of `model`.

    Returns:
        By the projection's name, ``|dL/dW - dL/d(B A) / s| / |dL/dW|`` (Frobenius norms). A gap of
        0 between zero gradients is 0.

    Raises:
        ValueError: the model has no branch.
        RuntimeError: the loss does not depend on a layer.
    """
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    if not layers:
        raise ValueError("the model has no low-rank branch; inject a method first")
    with ExitStack() as stack:
        products = {
            branch: stack.enter_context(_as_product(branch))
            for layer in layers
            for branch in layer.branches
        }
        for layer in layers:
            stack.enter_context(_with_gradient(layer.weight))
        wanted = [*(layer.weight for layer in layers), *products.values()]
        gradients = torch.autograd.grad(loss(), wanted)
        of_W = dict(zip(layers, gradients, strict=False))
        of_product = dict(zip(products, gradients[len(layers) :], strict=True))
    gaps = {}
    for layer in layers:
        for branch in layer.branches:
            p = branch.projection
            g_W = weight_slice(of_W[layer], p)
            g_W = g_W.T if p.is_transposed else g_W
            difference = (g_W - of_product[branch] / branch.scaling).norm()
            norm = g_W.norm()
            gaps[p.name] = float(difference / norm) if norm > 0 else float(difference)
    return gaps


@contextmanager
def _as_product(branch: LowRankBranch) -> Iterator[Tensor]:
    """Let the branch run on one leaf, the product of its factors."""
    A_RI, B_OR = branch.factors()
    product = (B_OR @ A_RI).detach().requires_grad_()
    identity = torch.eye(product.shape[0], dtype=product.dtype, device=product.device)
    branch.factors = lambda: (product, identity)  # type: ignore[method-assign]
    try:
        yield product
    finally:
        del branch.factors  # the method of the class again


@contextmanager
def _with_gradient(weight: nn.Parameter) -> Iterator[None]:
    before = weight.requires_grad
    weight.requires_grad_(True)
    try:
        yield
    finally:
        weight.requires_grad_(before)


# ---------------------------------------------------------------------- five losses


def cross_entropy(logits: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def label_smoothing(logits: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token with label smoothing 0.1."""
    scores = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(scores, tokens[:, 1:].flatten(), label_smoothing=0.1)


def mean_squared_error(logits: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the squared error of the mean-pooled state against a target read from the tokens."""
    target = (tokens.to(hidden.dtype).mean(dim=1, keepdim=True) / logits.shape[-1]) - 0.5
    return F.mse_loss(hidden.mean(dim=1), target.expand(-1, hidden.shape[-1]))


def policy_gradient(logits: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the REINFORCE loss with a mean baseline (Williams, 1992).

    One action a position is sampled from the model (fixed seed), the reward of a sequence is the
    share of its actions that are even token numbers, and the loss is
    ``-mean((reward - mean reward) * sum(log p(action)))``.
    """
    log_p = F.log_softmax(logits, dim=-1)
    generator = torch.Generator().manual_seed(0)
    p = log_p.detach().exp().flatten(0, 1).cpu()
    actions = torch.multinomial(p, 1, generator=generator).view(tokens.shape).to(tokens.device)
    reward = (actions % 2 == 0).to(logits.dtype).mean(dim=1)
    score = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(dim=1)
    return -((reward - reward.mean()) * score).mean()


def contrastive(logits: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return InfoNCE (arXiv 1807.03748) at temperature 0.1.

    The two views of a sequence are the mean states of its first and of its second half; the other
    sequences of the batch are the negatives.
    """
    half = hidden.shape[1] // 2
    first = F.normalize(hidden[:, :half].mean(dim=1), dim=-1)
    second = F.normalize(hidden[:, half:].mean(dim=1), dim=-1)
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(first), device=first.device))


LOSSES: dict[str, SequenceLoss] = {
    "cross_entropy": cross_entropy,
    "label_smoothing": label_smoothing,
    "mean_squared_error": mean_squared_error,
    "policy_gradient": policy_gradient,
    "contrastive": contrastive,
}
