"""What causal language models share: padding-free batches and the loss on chosen tokens.

A batch is one row: its sequences stand one behind the other and `position_ids` start again at 0 for
each. Without an attention mask and without a cache `transformers` reads the boundaries from the
positions and keeps the sequences apart, in every attention implementation. No token is computed
that is only padding, and logits exist only where there is a loss.

Shapes: T tokens of a batch, N positions with a loss, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.positions import num_positions, starts_behind_padding
from delta_lora.protocols import Batch


@dataclass(frozen=True)
class TokenSequence:
    """Tokens of one example.

    Attributes:
        id: name of the example, for messages.
        tokens: token ids.
        num_context: number of leading tokens that are only input; all others are targets (1 for a
            plain text, whose first token has nothing before it).
    """

    id: str
    tokens: Sequence[int]
    num_context: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_context < len(self.tokens):
            raise ValueError(
                f"{self.id}: {self.num_context} context tokens of {len(self.tokens)}; at least one "
                "token must be input and at least one a target"
            )


def truncate(sequence: TokenSequence, limit: int) -> TokenSequence:
    """Return a sequence cut to its first `limit` tokens.

    Raises:
        ValueError: the context alone fills `limit`, so that no target would be left.
    """
    if len(sequence.tokens) <= limit:
        return sequence
    if sequence.num_context >= limit:
        raise ValueError(
            f"{sequence.id}: its context has {sequence.num_context} tokens, so a length of "
            f"{limit} leaves no target; raise max_length (or take a model with more positions) "
            "or remove the example"
        )
    return TokenSequence(sequence.id, sequence.tokens[:limit], sequence.num_context)


def collate(sequences: Sequence[TokenSequence]) -> Batch:
    """Make one padding-free batch.

    Returns:
        A batch with ``input_ids`` and ``position_ids`` (1, T), ``loss_positions`` (N,) into T and
        ``targets`` (N,), all int64. The last token of a sequence is a target only, so it is not
        among the T.

    Raises:
        ValueError: `sequences` is empty.
    """
    if not sequences:
        raise ValueError("a batch needs at least one sequence")
    tokens = [np.asarray(sequence.tokens, dtype=np.int64) for sequence in sequences]
    contexts = [sequence.num_context for sequence in sequences]
    lengths = [len(part) - 1 for part in tokens]  # of what the model reads
    starts = np.cumsum([0, *lengths[:-1]])
    input_ids = np.concatenate([part[:-1] for part in tokens])
    targets = np.concatenate([part[n:] for part, n in zip(tokens, contexts, strict=True)])
    position_ids = np.concatenate([np.arange(length) for length in lengths])
    loss_positions = np.concatenate(
        [
            np.arange(start + num_context - 1, start + length)
            for start, num_context, length in zip(starts, contexts, lengths, strict=True)
        ]
    )
    tensors = {
        "input_ids": torch.from_numpy(input_ids[None]),
        "position_ids": torch.from_numpy(position_ids[None]),
        "loss_positions": torch.from_numpy(loss_positions),
        "targets": torch.from_numpy(targets),
    }
    return Batch(tensors, len(targets), len(input_ids), [sequence.id for sequence in sequences])


def causal_lm_loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss summed over the targets of `batch`.

    With smoothing eps a target's loss is ``(1 - eps) * NLL + eps * mean over V of -log p``
    (microsoft/LoRA, examples/NLG). The caller divides by the number of targets.

    Args:
        model: a causal language model of `transformers`, possibly wrapped.
        batch: made by `collate`.
        label_smoothing: eps, in [0, 1).

    Returns:
        float32 scalar, computed in float32 whatever the precision of the logits.

    Raises:
        TypeError: the model takes no positions, so its sequences would see one another.
        ValueError: a sequence has more tokens than the model has positions.
    """
    base = unwrap(model)
    if starts_behind_padding(getattr(base, "config", None)):
        raise TypeError(
            f"{type(base).__name__} numbers its positions from behind the padding token's, and "
            "padding-free batches from 0; take a decoder such as GPT-2 or Llama"
        )
    accepted = inspect.signature(type(base).forward).parameters
    if missing := [name for name in ("position_ids", "logits_to_keep") if name not in accepted]:
        raise TypeError(
            f"{type(base).__name__}.forward takes no {' and no '.join(missing)}, which "
            "padding-free batches need; take a causal model of transformers with absolute or "
            "rotary positions"
        )
    position_ids = batch.tensors["position_ids"]
    positions = num_positions(base.config)
    # The first test needs no value from the device; only a batch that may be too long needs one.
    if positions is not None and position_ids.shape[1] > positions:
        longest = int(position_ids.max()) + 1
        if longest > positions:
            raise ValueError(
                f"a sequence of {longest} tokens among {batch.example_ids} but the model has "
                f"{positions} positions; lower task.max_length"
            )
    logits_1NV = model(
        input_ids=batch.tensors["input_ids"],
        position_ids=position_ids,
        logits_to_keep=batch.tensors["loss_positions"],
        use_cache=False,  # with a cache transformers would not look for boundaries
    ).logits
    return F.cross_entropy(
        logits_1NV[0].float(),
        batch.tensors["targets"],
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the `transformers` model inside DDP, torch.compile or PEFT wrappers."""
    while (inner := getattr(model, "module", getattr(model, "_orig_mod", None))) is not None:
        model = inner
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
