"""Pre-training of the tiny models on the embedded general corpus.

A sequence is one document, or two that belong together, with the end token behind each. Whole
sequences are packed into blocks of equal length; positions start again with each, so a model reads
them as if they stood alone (`transformers` finds the boundaries from the positions). That matters:
with blocks cut from one long stream, names of other documents stand in the way and a tiny model
does not learn to copy from its context within the same budget.

What a model learns from a block is its objective; a new one is one more function in `_OBJECTIVES`.
Nothing is predicted: the figure of merit is the validation loss.

Shapes: B blocks of T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.protocols import Batch, MetricSpec, Task
from tasks.embedded.bpe import train_tokenizer
from tasks.embedded.general import sequences

logger = logging.getLogger(__name__)

#: a label that no loss is computed for.
IGNORED = -100


#: blocks that are open at a time while packing; more fill better and keep less of the order.
NUM_OPEN_BLOCKS = 32


class Block(NamedTuple):
    """Packed sequences.

    Attributes:
        input_ids: (T,) tokens; the rest of the block is filled with the end token.
        position_ids: (T,) from 0 in each sequence, and in the rest.
        segments: (T,) number of the sequence, from 1; 0 is the rest.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor


def pack(encoded: Iterable[list[int]], *, block_size: int, fill: int) -> list[Block]:
    """Pack whole sequences into blocks, each into the first open block where it fits.

    Args:
        encoded: token ids of the sequences; what is longer than a block is cut.
        block_size: tokens of a block (T).
        fill: token of the rest of a block.

    Returns:
        The blocks; equal input gives equal blocks.
    """
    open_blocks: list[list[list[int]]] = []
    full: list[list[list[int]]] = []
    for sequence in encoded:
        cut = sequence[:block_size]
        for block in open_blocks:
            if _num_tokens(block) + len(cut) <= block_size:
                block.append(cut)
                break
        else:
            open_blocks.append([cut])
        if len(open_blocks) > NUM_OPEN_BLOCKS:
            fullest = max(open_blocks, key=_num_tokens)
            open_blocks.remove(fullest)
            full.append(fullest)
    return [_block(parts, block_size, fill) for parts in full + open_blocks]


def _num_tokens(parts: list[list[int]]) -> int:
    return sum(map(len, parts))


def _block(parts: list[list[int]], block_size: int, fill: int) -> Block:
    rest = block_size - _num_tokens(parts)
    lengths = [*map(len, parts), rest]
    segments = [*range(1, len(parts) + 1), 0]
    return Block(
        input_ids=torch.tensor([*chain.from_iterable(parts), *[fill] * rest]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        segments=torch.tensor(segments).repeat_interleave(torch.tensor(lengths)),
    )


def _causal(
    input_ids_BT: Tensor, position_ids_BT: Tensor, segments_BT: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Every token but the first of a sequence is predicted from those before it."""
    labels_BT = torch.full_like(input_ids_BT, IGNORED)
    follows = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] > 0)
    labels_BT[:, :-1][follows] = input_ids_BT[:, 1:][follows]
    return {"input_ids": input_ids_BT, "position_ids": position_ids_BT}, labels_BT


#: objective -> function from the fields of stacked blocks to (model inputs, labels).
_OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[dict[str, Tensor], Tensor]]] = {
    "causal": _causal
}


class Pretraining(Task):
    """Language modelling on the general corpus.

    Args:
        objective: what is learned from a block; ``causal``.
        corpus_seed: seed of the corpus, apart from the seed of the run.
        num_documents: training sequences (two documents that belong together count as one).
        num_validation_documents: sequences of the same world after those, for the validation loss.
        block_size: tokens of a block, at least 2.
        vocab_size: tokens of the tokenizer that `build_tokenizer` trains.
        tokenizer_documents: training sequences that the tokenizer is trained on.
    """

    name = "pretraining"
    version = 1
    metrics: tuple[MetricSpec, ...] = ()

    def __init__(
        self,
        *,
        objective: Literal["causal"],
        corpus_seed: int,
        num_documents: int,
        num_validation_documents: int,
        block_size: int,
        vocab_size: int,
        tokenizer_documents: int,
    ) -> None:
        if objective not in _OBJECTIVES:
            raise ValueError(f"objective={objective!r}; allowed: {', '.join(sorted(_OBJECTIVES))}")
        if block_size < 2:
            raise ValueError(f"block_size={block_size}: at least 2 tokens are needed")
        counts = {
            "num_documents": num_documents,
            "num_validation_documents": num_validation_documents,
            "tokenizer_documents": tokenizer_documents,
        }
        for key, value in counts.items():
            if value < 1:
                raise ValueError(f"{key}={value}: at least 1 is needed")
        if tokenizer_documents > num_documents:
            raise ValueError(
                f"tokenizer_documents={tokenizer_documents} is more than "
                f"num_documents={num_documents}; lower the first or raise the second"
            )
        self.objective = objective
        self.corpus_seed = corpus_seed
        self.num_documents = num_documents
        self.num_validation_documents = num_validation_documents
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.tokenizer_documents = tokenizer_documents
        self._sequences: dict[str, list[list[str]]] = {}

    def load(self) -> None:
        """Write the sequences of both splits into memory."""
        total = self.num_documents + self.num_validation_documents
        stream = sequences(self.corpus_seed, total)
        train = list(islice(stream, self.num_documents))
        self._sequences = {"train": train, "validation": list(stream)}
        logger.info("general corpus: %d sequences, seed %d", total, self.corpus_seed)

    def _texts(self, split: str) -> list[list[str]]:
        if not self._sequences:
            raise RuntimeError("the task is not loaded; call load() first")
        if split not in self._sequences:
            raise ValueError(f"split={split!r}; allowed: {', '.join(self._sequences)}")
        return self._sequences[split]

    def provenance(self) -> dict[str, Any]:
        """Return the corpus seed, a hash of all documents, and the number of each split."""
        digest = hashlib.sha256()
        for documents in chain(self._texts("train"), self._texts("validation")):
            digest.update("\0".join(documents).encode() + b"\0\0")
        return {
            "source": "embedded",
            "corpus": "general",
            "corpus_seed": self.corpus_seed,
            "objective": self.objective,
            "sha256": digest.hexdigest(),
            "rows": {split: len(texts) for split, texts in self._sequences.items()},
        }

    def build_tokenizer(self) -> Any:
        """Train and return the tokenizer of the model that is pre-trained.

        Returns:
            A byte-level BPE `PreTrainedTokenizerFast` of exactly `vocab_size` tokens.

        Raises:
            ValueError: the corpus has too few words for `vocab_size` tokens.
        """
        texts = list(chain.from_iterable(self._texts("train")[: self.tokenizer_documents]))
        tokenizer = train_tokenizer(texts, vocab_size=self.vocab_size)
        if len(tokenizer) < self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size}, but {len(texts)} documents only make "
                f"{len(tokenizer)} tokens; lower vocab_size or raise tokenizer_documents"
            )
        return tokenizer

    def examples(self, split: str, tokenizer: Any) -> Sequence[Block]:
        """Return the blocks of ``train`` or ``validation``.

        Args:
            split: which sequences.
            tokenizer: its `eos_token_id` ends every document.

        Returns:
            Blocks of `block_size` tokens.

        Raises:
            ValueError: an unknown split.
        """
        groups = self._texts(split)
        flat = tokenizer(list(chain.from_iterable(groups)), add_special_tokens=False)["input_ids"]
        documents = iter(flat)
        end = tokenizer.eos_token_id
        encoded = [
            list(chain.from_iterable([*next(documents), end] for _ in group)) for group in groups
        ]
        num_cut = sum(len(sequence) > self.block_size for sequence in encoded)
        blocks = pack(encoded, block_size=self.block_size, fill=end)
        logger.info(
            "pre-training, %s: %d tokens in %d blocks of %d; %d sequences cut to a block",
            split,
            _num_tokens(encoded),
            len(blocks),
            self.block_size,
            num_cut,
        )
        return blocks

    def collate(self, examples: Sequence[Block]) -> Batch:
        """Stack blocks into one micro-batch."""
        fields_BT = [torch.stack(column) for column in zip(*examples, strict=True)]
        inputs, labels_BT = _OBJECTIVES[self.objective](*fields_BT)
        return Batch(
            tensors={**inputs, "labels": labels_BT},
            num_targets=int((labels_BT != IGNORED).sum()),
            num_tokens=inputs["input_ids"].numel(),
        )

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy summed over the labels.

        Args:
            model: a transformers language model.
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
