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
from typing import Annotated, Any

from torch import Tensor, nn

from delta_lora.checks import Range, check_values
from delta_lora.protocols import Batch, MetricSpec, Task
from tasks.data import of_split
from tasks.tiny.corpora.general import sequences, statements
from tasks.tiny.corpora.sentences import sentences
from tasks.tiny.objectives import Group, Objective

logger = logging.getLogger(__name__)

#: room for the special tokens of a pair and some words.
MIN_BLOCK_SIZE = 8

Seed = Annotated[int, Range(at_least=0, at_most=2**32 - 1)]
NumTexts = Annotated[int, Range(at_least=1, at_most=10**6, why="all are in memory at once")]
NumMore = Annotated[int, Range(at_least=0, at_most=10**6, why="all are in memory at once")]


class Pretraining(Task):
    """Language modelling on the general corpus.

    Args:
        objective: what is learned from a block.
        num_documents: training sequences (two documents that belong together count as one).
        tokenizer_documents: training sequences that the tokenizer is trained on.
        corpus_seed: seed of the corpus, apart from the seed of the run.
        num_validation_documents: sequences of the same world after those, for the validation loss.
        block_size: tokens of a block, at least 8.
        vocab_size: tokens of the tokenizer that `build_tokenizer` trains.
        num_statements: texts with a statement about each (`tasks.tiny.corpora.general.statements`)
            among the training sequences, for an objective that learns from them.
        num_validation_statements: the same in the validation split.
        num_sentences: single sentences (`tasks.tiny.corpora.sentences`) among the training
            sequences, for an objective that learns from them.
        num_validation_sentences: the same in the validation split.

    Raises:
        ValueError: a value outside its range.
        TypeError: `objective` is no `Objective`, or a number is none.
    """

    name = "pretraining"
    version = 1
    metrics: tuple[MetricSpec, ...] = ()

    def __init__(
        self,
        *,
        objective: Objective,
        num_documents: NumTexts,
        tokenizer_documents: NumTexts,
        corpus_seed: Seed = 0,
        num_validation_documents: NumTexts = 200,
        block_size: Annotated[int, Range(at_least=MIN_BLOCK_SIZE, at_most=65536)] = 128,
        vocab_size: Annotated[int, Range(at_least=300, at_most=2**20)] = 1536,
        num_statements: NumMore = 0,
        num_validation_statements: NumMore = 0,
        num_sentences: NumMore = 0,
        num_validation_sentences: NumMore = 0,
    ) -> None:
        if not isinstance(objective, Objective):
            raise TypeError(
                f"task.objective={objective!r} is a {type(objective).__name__}; give Causal(), "
                "Masked() or Denoising() of tasks.tiny.objectives"
            )
        check_values(Pretraining.__init__, locals(), prefix="task.")
        for key, value in (
            ("num_statements", num_statements),
            ("num_validation_statements", num_validation_statements),
            ("num_sentences", num_sentences),
            ("num_validation_sentences", num_validation_sentences),
        ):
            if value and not objective.uses_verdicts:
                raise ValueError(
                    f"task.{key}={value}: objective={objective.name} learns from documents only; "
                    "set it to 0"
                )
        if tokenizer_documents > num_documents:
            raise ValueError(
                f"task.tokenizer_documents={tokenizer_documents} is more than "
                f"task.num_documents={num_documents}; lower the first or raise the second"
            )
        self.objective = objective
        self.family = objective.family
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
        return of_split(self._sequences, split)

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
                f"task.vocab_size={self.vocab_size}, but the {len(texts)} texts of "
                f"task.tokenizer_documents={self.tokenizer_documents} only make {len(tokenizer)} "
                "tokens; lower the first or raise the second"
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
