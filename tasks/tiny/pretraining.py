"""Pre-training of the tiny models on the embedded general corpus.

A sequence is one document, or two that belong together. Whole sequences are packed into blocks of
equal length; positions start again with each, so a model reads them as if they stood alone. That
matters: with blocks cut from one long stream, names of other documents stand in the way and a tiny
model does not learn to copy from its context within the same budget.

What a model learns from a block is its objective (`tasks.tiny.objectives`). Nothing is predicted:
the figure of merit is the validation loss.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from torch import Tensor, nn

from delta_lora.protocols import Batch, MetricSpec, Task
from tasks.tiny.corpora.general import sequences, statements
from tasks.tiny.corpora.sentences import sentences
from tasks.tiny.objectives import Causal, Denoising, Group, Masked, Objective

logger = logging.getLogger(__name__)

#: room for the special tokens of a pair and some words.
MIN_BLOCK_SIZE = 8
#: name -> objective with its default settings.
_OBJECTIVES: dict[str, type[Objective]] = {each.name: each for each in (Causal, Masked, Denoising)}


class Pretraining(Task):
    """Language modelling on the general corpus.

    Args:
        objective: what is learned from a block; ``causal``, ``masked`` or ``denoising``, or an
            `Objective` with other settings than its defaults.
        corpus_seed: seed of the corpus, apart from the seed of the run.
        num_documents: training sequences (two documents that belong together count as one).
        num_validation_documents: sequences of the same world after those, for the validation loss.
        block_size: tokens of a block, at least 8.
        vocab_size: tokens of the tokenizer that `build_tokenizer` trains.
        tokenizer_documents: training sequences that the tokenizer is trained on.
        num_statements: texts with a statement about each (`tasks.tiny.corpora.general.statements`)
            among the training sequences, for an objective that learns from them.
        num_validation_statements: the same in the validation split.
        num_sentences: single sentences (`tasks.tiny.corpora.sentences`) among the training
            sequences, for an objective that learns from them.
        num_validation_sentences: the same in the validation split.

    Raises:
        ValueError: a value outside its range.
        TypeError: `objective` is neither a name nor an `Objective`.
    """

    name = "pretraining"
    version = 1
    metrics: tuple[MetricSpec, ...] = ()

    def __init__(
        self,
        *,
        objective: str | Objective,
        corpus_seed: int,
        num_documents: int,
        num_validation_documents: int,
        block_size: int,
        vocab_size: int,
        tokenizer_documents: int,
        num_statements: int = 0,
        num_validation_statements: int = 0,
        num_sentences: int = 0,
        num_validation_sentences: int = 0,
    ) -> None:
        if isinstance(objective, str):
            if objective not in _OBJECTIVES:
                raise ValueError(f"objective={objective!r}; allowed: {', '.join(_OBJECTIVES)}")
            objective = _OBJECTIVES[objective]()
        elif not isinstance(objective, Objective):
            raise TypeError(
                f"objective={objective!r} is a {type(objective).__name__}; give one of "
                f"{', '.join(_OBJECTIVES)}, or an object of tasks.tiny.objectives"
            )
        if block_size < MIN_BLOCK_SIZE:
            raise ValueError(f"block_size={block_size}: at least {MIN_BLOCK_SIZE} are needed")
        counts = {
            "num_documents": num_documents,
            "num_validation_documents": num_validation_documents,
            "tokenizer_documents": tokenizer_documents,
        }
        for key, value in counts.items():
            if value < 1:
                raise ValueError(f"{key}={value}: at least 1 is needed")
        more = {
            "num_statements": num_statements,
            "num_validation_statements": num_validation_statements,
            "num_sentences": num_sentences,
            "num_validation_sentences": num_validation_sentences,
        }
        for key, value in more.items():
            if value < 0 or (value and not objective.uses_verdicts):
                allowed = "0 or more is" if objective.uses_verdicts else "0 is"
                raise ValueError(f"{key}={value}: {allowed} allowed for objective={objective.name}")
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
        self.num_statements = num_statements
        self.num_validation_statements = num_validation_statements
        self.num_sentences = num_sentences
        self.num_validation_sentences = num_validation_sentences
        self._sequences: dict[str, list[Group]] = {}

    def load(self) -> None:
        """Write the sequences of both splits into memory."""
        total = self.num_documents + self.num_validation_documents
        stream = sequences(self.corpus_seed, total)
        train: list[Group] = [*islice(stream, self.num_documents)]
        validation: list[Group] = [*stream]
        num_statements = (self.num_statements, self.num_validation_statements)
        num_sentences = (self.num_sentences, self.num_validation_sentences)
        judged = statements(self.corpus_seed, sum(num_statements))
        single = sentences(self.corpus_seed, sum(num_sentences))
        for split, *counts in zip((train, validation), num_statements, num_sentences, strict=True):
            if any(counts):
                split += chain(islice(judged, counts[0]), islice(single, counts[1]))
                # not for security
                random.Random(f"mixture-{self.corpus_seed}").shuffle(split)  # noqa: S311
        self._sequences = {"train": train, "validation": validation}
        logger.info(
            "general corpus: %d sequences, %d statements and %d sentences, seed %d",
            total, sum(num_statements), sum(num_sentences), self.corpus_seed,
        )  # fmt: skip

    def _groups(self, split: str) -> list[Group]:
        if not self._sequences:
            raise RuntimeError("the task is not loaded; call load() first")
        if split not in self._sequences:
            raise ValueError(f"split={split!r}; allowed: {', '.join(self._sequences)}")
        return self._sequences[split]

    def provenance(self) -> dict[str, Any]:
        """Return the corpus seed, a hash of all documents, and the number of each split."""
        digest = hashlib.sha256()
        for group in chain(self._groups("train"), self._groups("validation")):
            digest.update("\0".join(map(str, group)).encode() + b"\0\0")
        return {
            "source": "embedded",
            "corpus": "general",
            "corpus_seed": self.corpus_seed,
            "objective": self.objective.name,
            "sha256": digest.hexdigest(),
            "rows": {split: len(groups) for split, groups in self._sequences.items()},
        }

    def build_tokenizer(self) -> Any:
        """Train and return the tokenizer of the model that is pre-trained.

        Returns:
            A byte-level BPE `PreTrainedTokenizerFast` of exactly `vocab_size` tokens, with the
            special tokens that the objective needs.

        Raises:
            ValueError: the corpus has too few words for `vocab_size` tokens.
        """
        groups = [group for group in self._groups("train") if isinstance(group, list)]
        texts = list(chain.from_iterable(groups[: self.tokenizer_documents]))
        tokenizer = self.objective.train_tokenizer(
            texts, vocab_size=self.vocab_size, block_size=self.block_size
        )
        if len(tokenizer) < self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size}, but {len(texts)} documents only make "
                f"{len(tokenizer)} tokens; lower vocab_size or raise tokenizer_documents"
            )
        return tokenizer

    def initialise(self, model: nn.Module, examples: Sequence[Any]) -> None:
        """Change the random weights of `model` as its objective wants them.

        Args:
            model: with random weights.
            examples: the training examples.

        Raises:
            ValueError: the objective does not fit the model.
        """
        self.objective.initialise(model, examples)

    def examples(self, split: str, tokenizer: Any) -> Sequence[Any]:
        """Return the examples of ``train`` or ``validation``.

        Args:
            split: which sequences.
            tokenizer: of `build_tokenizer`.

        Returns:
            Examples of at most `block_size` tokens.

        Raises:
            ValueError: an unknown split.
        """
        examples = self.objective.encode(
            self._groups(split),
            tokenizer,
            block_size=self.block_size,
            seed=f"{self.corpus_seed}-{split}",
        )
        logger.info(
            "pre-training, %s: %d examples of at most %d tokens",
            split, len(examples), self.block_size,
        )  # fmt: skip
        return examples

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Make one micro-batch."""
        return self.objective.collate(examples)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy summed over the targets of `batch` (float32 scalar)."""
        return self.objective.loss(model, batch, label_smoothing)
