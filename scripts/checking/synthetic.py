"""Tasks on random tokens: the suite's batches and losses without data, tokenizer and scores.

An example of such a task is a whole micro-batch, so that `trainer.batch_size` counts micro-batches
and one epoch sees every one of them once, whatever its order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.protocols import Batch, Scores, Task
from scripts.checking import lengths
from tasks import language_modeling, seq2seq
from tasks.language_modeling import TokenSequence
from tasks.seq2seq import Pair


class Synthetic(Task):
    """A task over groups of examples.

    Args:
        collate: makes one micro-batch of a list of examples.
        loss: the summed loss of a micro-batch.
    """

    name = "synthetic"
    version = 1
    metrics = ()

    def __init__(
        self,
        collate: Callable[[Sequence[Any]], Batch],
        loss: Callable[[nn.Module, Batch, float], Tensor],
    ) -> None:
        self._collate, self._loss = collate, loss
        self.last_loss: Tensor | None = None

    def load(self) -> None:
        """Nothing is read."""

    def provenance(self) -> dict[str, Any]:
        """Return nothing: the tokens are random."""
        return {}

    def examples(self, split: str, tokenizer: Any) -> Sequence[Any]:
        """Return nothing: the checks draw their examples themselves."""
        return ()

    def collate(self, groups: Sequence[Sequence[Any]]) -> Batch:
        """Make one micro-batch of all examples of `groups`."""
        return self._collate([example for group in groups for example in group])

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the summed loss and keep it for the check."""
        loss = self._loss(model, batch, label_smoothing)
        self.last_loss = loss.detach()
        return loss

    def score(self, predictions: Sequence[dict[str, Any]], split: str) -> Scores:
        """Return no score."""
        return Scores({}, {})


def task(model_name: str) -> Synthetic:
    """Return the task that goes with a model of `scripts.checking.models`."""
    if model_name == "gpt2_medium":
        return Synthetic(language_modeling.collate, language_modeling.causal_lm_loss)
    if model_name == "bart_large":
        return Synthetic(seq2seq.collate, seq2seq.seq2seq_loss)
    return Synthetic(_collate_labelled, _classification_loss)


def sequences(count: int, vocabulary: int, seed: int) -> list[TokenSequence]:
    """Return `count` sequences with E2E's lengths."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    return [
        TokenSequence(f"s{index}", _tokens(draw, context + target, vocabulary), context)
        for index, (context, target) in enumerate(lengths.draw(count, seed))
    ]


def pairs(count: int, source: int, target: int, vocabulary: int, seed: int) -> list[Pair]:
    """Return `count` pairs of `source` and `target` tokens."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    return [
        Pair(
            f"p{index}",
            torch.tensor(_tokens(draw, source, vocabulary), dtype=torch.int32),
            torch.tensor(_tokens(draw, target, vocabulary), dtype=torch.int32),
        )
        for index in range(count)
    ]


def labelled(count: int, length: int, vocabulary: int, seed: int) -> list[tuple[Tensor, int]]:
    """Return `count` texts of `length` tokens with one of three labels."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    return [
        (torch.tensor(_tokens(draw, length, vocabulary)), draw.randrange(3)) for _ in range(count)
    ]


def groups(examples: Sequence[Any], size: int) -> list[list[Any]]:
    """Cut `examples` into groups of `size`; the last may be shorter."""
    return [list(examples[start : start + size]) for start in range(0, len(examples), size)]


def _tokens(draw: random.Random, count: int, vocabulary: int) -> list[int]:
    # The first four are special tokens in one or the other family.
    return [draw.randrange(4, vocabulary) for _ in range(count)]


def _collate_labelled(examples: Sequence[tuple[Tensor, int]]) -> Batch:
    input_ids = torch.stack([tokens for tokens, _ in examples])
    tensors = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.tensor([label for _, label in examples]),
    }
    names = [f"t{index}" for index in range(len(examples))]
    return Batch(tensors, len(examples), input_ids.numel(), names)


def _classification_loss(model: nn.Module, batch: Batch, label_smoothing: float) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.tensors.items() if name != "labels"}
    return F.cross_entropy(
        model(**inputs).logits.float(), batch.tensors["labels"], reduction="sum",
        label_smoothing=label_smoothing,
    )  # fmt: skip
