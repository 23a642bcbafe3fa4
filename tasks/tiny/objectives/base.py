"""What the objectives share: packed blocks of whole sequences, and the interface.

Shapes: B examples of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from delta_lora.protocols import Batch
from tasks.tiny.corpora.general import Statement
from tasks.tiny.corpora.sentences import Sentence

T = TypeVar("T")
#: what stands together in the corpus.
Group = list[str] | Statement | Sentence

#: a label that no loss is computed for.
IGNORED = -100
#: bins that are open at a time while packing; more fill better and keep less of the order.
NUM_OPEN_BINS = 32


def pack(sequences: Iterable[Sequence[T]], size: int) -> list[list[Sequence[T]]]:
    """Put whole sequences into bins, each into the first open bin where it fits.

    Args:
        sequences: of tokens; what is longer than a bin is cut.
        size: tokens that a bin holds.

    Returns:
        The sequences of each bin; equal input gives equal bins.
    """
    open_bins: list[list[Sequence[T]]] = []
    full: list[list[Sequence[T]]] = []
    for sequence in sequences:
        cut = sequence[:size]
        for found in open_bins:
            if num_tokens(found) + len(cut) <= size:
                found.append(cut)
                break
        else:
            open_bins.append([cut])
        if len(open_bins) > NUM_OPEN_BINS:
            fullest = max(open_bins, key=num_tokens)
            open_bins.remove(fullest)
            full.append(fullest)
    return full + open_bins


def num_tokens(sequences: Iterable[Sequence[Any]]) -> int:
    """Return the tokens of all `sequences` together."""
    return sum(map(len, sequences))


class Objective(ABC):
    """How examples are made and what is predicted in them."""

    #: key in records.
    name: str
    #: family of models that learn from it, see `Task.family`.
    family: str
    #: whether it can learn from a `Statement` and a `Sentence`.
    uses_verdicts = False

    @abstractmethod
    def train_tokenizer(self, texts: Iterable[str], *, vocab_size: int, block_size: int) -> Any:
        """Return a tokenizer with the special tokens of this kind of model."""

    @abstractmethod
    def encode(
        self, groups: Sequence[Group], tokenizer: Any, *, block_size: int, seed: str
    ) -> list[Any]:
        """Return the examples of a split.

        Args:
            groups: documents that belong together; statements and sentences if `uses_verdicts`.
            tokenizer: of `train_tokenizer`.
            block_size: tokens of an example (T).
            seed: of whatever is drawn; other splits have others.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Make one micro-batch."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy summed over the targets (float32 scalar)."""

    def initialise(self, model: Any, examples: Sequence[Any]) -> None:  # noqa: B027 - a hook
        """Change the random weights of `model` in place before training; default: nothing."""


class Block(NamedTuple):
    """Packed sequences.

    Attributes:
        input_ids: (T,) tokens; the rest of the block is filled.
        position_ids: (T,) from 0 in each sequence, and in the rest.
        segments: (T,) number of the sequence, from 1; 0 is the rest.
        labels: (T,) tokens to predict, or `IGNORED`.
        texts: (T,) 1 in the second text of a pair, 0 elsewhere.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    labels: Tensor
    texts: Tensor


class Token(NamedTuple):
    """One token of a sequence: its id, what is predicted there, and 1 in a second text."""

    id: int
    label: int = IGNORED
    text: int = 0


def make_blocks(sequences: Iterable[list[Token]], block_size: int, *, fill: int) -> list[Block]:
    """Pack `sequences` into blocks; `fill` is the token of the rest of a block."""
    return [_block(parts, block_size, fill) for parts in pack(sequences, block_size)]


def _block(parts: Sequence[Sequence[Token]], block_size: int, fill: int) -> Block:
    rest = block_size - num_tokens(parts)
    lengths = torch.tensor([*map(len, parts), rest])
    segments = torch.tensor([*range(1, len(parts) + 1), 0])
    ids, labels, texts = torch.tensor([*chain.from_iterable(parts), *[Token(fill)] * rest]).T
    return Block(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths.tolist()]),
        segments=segments.repeat_interleave(lengths),
        labels=labels,
        texts=texts,
    )


def only_documents(groups: Iterable[Group]) -> list[list[str]]:
    """Return `groups`, which hold documents only."""
    documents = []
    for group in groups:
        assert isinstance(group, list), "the task checks `uses_verdicts`"
        documents.append(group)
    return documents


def make_batch(inputs: dict[str, Tensor], labels_BT: Tensor) -> Batch:
    """Return a micro-batch with its numbers of targets and tokens."""
    return Batch(
        tensors={**inputs, "labels": labels_BT},
        num_targets=int((labels_BT != IGNORED).sum()),
        num_tokens=inputs["input_ids"].numel(),
    )
