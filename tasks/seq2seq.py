"""What encoder-decoder models share: padded batches and the loss on the target tokens.

A batch is padded on the right to its own longest source and target, never to a fixed length, and
which examples are in it is the trainer's choice alone. Padding is masked in the encoder and behind
the last target in the decoder, so it changes no loss and no gradient, whatever its token.

Shapes: B examples, S source tokens, T target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.positions import num_positions
from delta_lora.protocols import Batch
from tasks.language_modeling import unwrap

#: a label that no loss is computed for.
IGNORED = -100
#: token at padded positions; nothing ever reads it.
PADDING = 0


Tokens = np.ndarray | Tensor


@dataclass(frozen=True)
class Pair:
    """Tokens of one example, special tokens included.

    Attributes:
        id: name of the example, for messages.
        source: (S,) tokens that the encoder reads, int32 to save memory; an array or a tensor on
            the CPU.
        target: (T,) tokens that the decoder learns to write, with the end token, likewise.
    """

    id: str
    source: Tokens
    target: Tokens

    def __post_init__(self) -> None:
        if not len(self.source) or not len(self.target):
            raise ValueError(
                f"{self.id}: {len(self.source)} source and {len(self.target)} target tokens; both "
                "need at least one"
            )


def collate(pairs: Sequence[Pair]) -> Batch:
    """Make one batch, padded to its longest source and its longest target.

    Returns:
        A batch with ``input_ids`` and ``attention_mask`` (B, S) and ``labels`` (B, T), int64;
        labels are `IGNORED` at padding. Its targets and tokens count no padding.

    Raises:
        ValueError: `pairs` is empty.
    """
    if not pairs:
        raise ValueError("a batch needs at least one example")
    sources = [pair.source for pair in pairs]
    targets = [pair.target for pair in pairs]
    lengths = [len(source) for source in sources]
    tensors = {
        "input_ids": _pad(sources, PADDING),
        "attention_mask": torch.from_numpy(
            (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        ),
        "labels": _pad(targets, IGNORED),
    }
    num_targets = sum(map(len, targets))
    num_tokens = sum(lengths) + num_targets
    return Batch(tensors, num_targets, num_tokens, [pair.id for pair in pairs])


def _pad(rows: Sequence[Tokens], value: int) -> Tensor:
    """Return (rows, longest) int64, filled up with `value` on the right."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded)


def check_start(model: nn.Module) -> None:
    """Check that a model says with which token every target begins.

    Raises:
        ValueError: its configuration has no ``decoder_start_token_id``, or none of its tokens.
    """
    config: Any = model.config
    start, size = (getattr(config, n, None) for n in ("decoder_start_token_id", "vocab_size"))
    if start is None or start < 0 or (size is not None and start >= size):
        raise ValueError(
            f"decoder_start_token_id={start} of the model's configuration is none of its {size} "
            "tokens, and every target begins with it; correct it, or set "
            "model.config_overrides.decoder_start_token_id"
        )


def seq2seq_loss(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss summed over the targets of `batch`.

    The decoder reads the targets shifted right behind the model's `decoder_start_token_id`. With
    smoothing eps a target's loss is ``(1 - eps) * NLL + eps * mean over V of -log p``. The caller
    divides by the number of targets.

    Args:
        model: an encoder-decoder model of `transformers`, possibly wrapped.
        batch: made by `collate`.
        label_smoothing: eps, in [0, 1).

    Returns:
        float32 scalar, computed in float32 whatever the precision of the logits.

    Raises:
        TypeError: the model is no encoder-decoder.
        ValueError: the model names no start token, or has too few positions for the batch.
    """
    config = getattr(unwrap(model), "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{type(unwrap(model)).__name__} is no encoder-decoder model of transformers; take one "
            "with model.family=seq2seq_lm"
        )
    labels_BT = batch.tensors["labels"]
    longest = max(batch.tensors["input_ids"].shape[1], labels_BT.shape[1])
    positions = num_positions(config)
    if positions is not None and longest > positions:
        raise ValueError(
            f"a text of {longest} tokens among {batch.example_ids} but the model has "
            f"{positions} positions; lower task.max_source_length or task.max_target_length"
        )
    logits_BTV = model(
        input_ids=batch.tensors["input_ids"],
        attention_mask=batch.tensors["attention_mask"],
        decoder_input_ids=shift_right(labels_BT, getattr(config, "decoder_start_token_id", None)),
        use_cache=False,
    ).logits
    return F.cross_entropy(
        logits_BTV.flatten(0, 1).float(),
        labels_BT.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def shift_right(labels_BT: Tensor, start: int | None) -> Tensor:
    """Return (B, T) what the decoder reads: `start`, then all labels but the last.

    Raises:
        ValueError: `start` is None.
    """
    if start is None:
        raise ValueError(
            "the model's configuration has no decoder_start_token_id, with which every target "
            "begins; set model.config_overrides.decoder_start_token_id"
        )
    shifted_BT = labels_BT.roll(1, dims=1)
    shifted_BT[:, 0] = start
    return shifted_BT.masked_fill(shifted_BT == IGNORED, PADDING)
