"""Causal language modelling, for the tiny GPT-2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.protocols import Batch
from tasks.tiny.bpe import train_tokenizer
from tasks.tiny.objectives.base import (
    IGNORED,
    Block,
    Group,
    Objective,
    Token,
    make_batch,
    make_blocks,
    only_documents,
)


class Causal(Objective):
    """Every token but the first of a sequence is predicted from those before it.

    The end token stands behind each document. `transformers` finds the boundaries of a block's
    sequences from its positions, so no attention mask is needed.
    """

    name = "causal"
    family = "causal_lm"

    def train_tokenizer(self, texts: Iterable[str], *, vocab_size: int, block_size: int) -> Any:
        """Return a tokenizer like GPT-2's."""
        return train_tokenizer(texts, vocab_size=vocab_size)

    def encode(
        self, groups: Sequence[Group], tokenizer: Any, *, block_size: int, seed: str
    ) -> list[Block]:
        """Return blocks; the label of a token is the one behind it."""
        documents = only_documents(groups)
        flat = tokenizer(list(chain.from_iterable(documents)), add_special_tokens=False)[
            "input_ids"
        ]
        tokens = iter(flat)
        end = tokenizer.eos_token_id
        encoded = [
            list(chain.from_iterable([*next(tokens), end] for _ in group))[:block_size]
            for group in documents
        ]
        sequences = [list(map(Token, ids, [*ids[1:], IGNORED])) for ids in encoded]
        return make_blocks(sequences, block_size, fill=end)

    def collate(self, examples: Sequence[Block]) -> Batch:
        """Stack blocks."""
        ids_BT, positions_BT, _, labels_BT, _ = map(torch.stack, zip(*examples, strict=True))
        return make_batch({"input_ids": ids_BT, "position_ids": positions_BT}, labels_BT)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy summed over the labels.

        Args:
            model: a causal language model of transformers.
            batch: from `collate`.
            label_smoothing: in [0, 1); weight of the mean over the vocabulary of -log p.

        Returns:
            float32 scalar.
        """
        inputs = {key: value for key, value in batch.tensors.items() if key != "labels"}
        # Without a mask and without a cache transformers keeps the sequences of a block apart.
        logits_BTV = model(**inputs, use_cache=False).logits
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(),
            batch.tensors["labels"].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
