"""Pre-training of the tiny models on the embedded general corpus.

Documents are tokenised, joined with the end token between them and cut into blocks of equal length
(no padding; a block may start inside a document). What a model learns from a block is its
objective; a new one is one more function in `_OBJECTIVES`. Nothing is predicted: the figure of
merit is the validation loss.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.protocols import Batch, MetricSpec, Task
from tasks.embedded.bpe import train_tokenizer
from tasks.embedded.general import documents

logger = logging.getLogger(__name__)

#: a label that no loss is computed for.
IGNORED = -100


def _causal(blocks_BT: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Every token is predicted from those before it; the first of a block is not predicted."""
    inputs_BT = blocks_BT[:, :-1].contiguous()
    # All ones: the model then knows that the end tokens between documents are no padding.
    mask_BT = torch.ones_like(inputs_BT)
    return {"input_ids": inputs_BT, "attention_mask": mask_BT}, blocks_BT[:, 1:].contiguous()


#: objective -> function from blocks (batch, block_size) to (model inputs, labels).
_OBJECTIVES: dict[str, Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]] = {"causal": _causal}


class Pretraining(Task):
    """Language modelling on the general corpus.

    Args:
        objective: what is learned from a block; ``causal``.
        corpus_seed: seed of the corpus, apart from the seed of the run.
        num_documents: training documents.
        num_validation_documents: documents of the same world after those, for the validation loss.
        block_size: tokens of a block, at least 2; a model sees one less.
        vocab_size: tokens of the tokenizer that `build_tokenizer` trains.
        tokenizer_documents: training documents that the tokenizer is trained on.
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
        self._documents: dict[str, list[str]] = {}

    def load(self) -> None:
        """Write the documents of both splits into memory."""
        total = self.num_documents + self.num_validation_documents
        stream = documents(self.corpus_seed, total)
        train = list(islice(stream, self.num_documents))
        self._documents = {"train": train, "validation": list(stream)}
        logger.info("general corpus: %d documents, seed %d", total, self.corpus_seed)

    def _texts(self, split: str) -> list[str]:
        if not self._documents:
            raise RuntimeError("the task is not loaded; call load() first")
        if split not in self._documents:
            raise ValueError(f"split={split!r}; allowed: {', '.join(self._documents)}")
        return self._documents[split]

    def provenance(self) -> dict[str, Any]:
        """Return the corpus seed, a hash of all documents, and the number of each split."""
        digest = hashlib.sha256()
        for text in chain(self._texts("train"), self._texts("validation")):
            digest.update(text.encode() + b"\0")
        return {
            "source": "embedded",
            "corpus": "general",
            "corpus_seed": self.corpus_seed,
            "objective": self.objective,
            "sha256": digest.hexdigest(),
            "rows": {split: len(texts) for split, texts in self._documents.items()},
        }

    def build_tokenizer(self) -> Any:
        """Train and return the tokenizer of the model that is pre-trained.

        Returns:
            A byte-level BPE `PreTrainedTokenizerFast` of exactly `vocab_size` tokens.

        Raises:
            ValueError: the corpus has too few words for `vocab_size` tokens.
        """
        texts = self._texts("train")[: self.tokenizer_documents]
        tokenizer = train_tokenizer(texts, vocab_size=self.vocab_size)
        if len(tokenizer) < self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size}, but {len(texts)} documents only make "
                f"{len(tokenizer)} tokens; lower vocab_size or raise tokenizer_documents"
            )
        return tokenizer

    def examples(self, split: str, tokenizer: Any) -> Sequence[Tensor]:
        """Return the blocks of ``train`` or ``validation``.

        Args:
            split: which documents.
            tokenizer: its `eos_token_id` ends every document.

        Returns:
            Blocks of shape (block_size,), int64.

        Raises:
            ValueError: an unknown split, or documents that do not fill one block.
        """
        encoded = tokenizer(self._texts(split), add_special_tokens=False)["input_ids"]
        ids = list(chain.from_iterable([*text, tokenizer.eos_token_id] for text in encoded))
        num_blocks = len(ids) // self.block_size
        if num_blocks == 0:
            raise ValueError(
                f"the {split} documents have {len(ids)} tokens, less than one block of "
                f"{self.block_size}; lower block_size or raise the number of documents"
            )
        blocks_NT = torch.tensor(ids[: num_blocks * self.block_size]).view(-1, self.block_size)
        return list(blocks_NT)

    def collate(self, examples: Sequence[Tensor]) -> Batch:
        """Stack blocks into one micro-batch."""
        inputs, labels_BT = _OBJECTIVES[self.objective](torch.stack(list(examples)))
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
        logits_BTV = model(**inputs, use_cache=False).logits
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(),
            batch.tensors["labels"].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
