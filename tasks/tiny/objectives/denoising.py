"""Denoising, for the tiny BART."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from delta_lora.checks import Range, check_values
from delta_lora.protocols import Batch
from tasks import seq2seq
from tasks.seq2seq import Pair
from tasks.tiny.bpe import train_pair_tokenizer
from tasks.tiny.mimetic import initialise_encoder_decoder
from tasks.tiny.objectives.base import Group, Objective, only_documents, pack

#: a sentence: up to white space behind a full stop or question mark, or up to the end of a line;
#: that space stands in front of the next sentence, as in the tokens.
SENTENCE = re.compile(r"\s*[^\n]+?(?:(?<=[.?!])(?=\s)|(?=\n|$))|\s+")


class Denoising(Objective):
    """A text from a damaged copy of it: text infilling and sentence permutation, as in BART.

    A text is several documents in a row, a line each or more, so that the positions behind the
    first documents are trained too. Spans of tokens are replaced by one mask token each, and the
    sentences stand in another order.

    Args:
        mask_rate: share of the tokens that are masked, in (0, 1).
        mean_span: mean length of a span, in tokens (Poisson); spans of no token only insert a mask.
        permuted_share: share of the texts whose sentences are permuted, in [0, 1].
        max_length: the tokenizer's `model_max_length`; at most the model's positions.

    Raises:
        ValueError: a value outside its range.
        TypeError: a value is no number.
    """

    name = "denoising"
    family = "seq2seq_lm"

    def __init__(
        self,
        *,
        mask_rate: Annotated[float, Range(above=0, below=1)] = 0.3,
        mean_span: Annotated[float, Range(above=0, at_most=1000)] = 3.0,
        permuted_share: Annotated[float, Range(at_least=0, at_most=1)] = 1.0,
        max_length: Annotated[int, Range(at_least=3, at_most=2**20)] = 512,
    ) -> None:
        check_values(Denoising.__init__, locals(), prefix="task.objective.")
        self.mask_rate = float(mask_rate)
        self.mean_span = float(mean_span)
        self.permuted_share = float(permuted_share)
        self.max_length = max_length

    def train_tokenizer(self, texts: Iterable[str], *, vocab_size: int, block_size: int) -> Any:
        """Return a tokenizer like BART's."""
        return train_pair_tokenizer(
            texts, vocab_size=vocab_size, max_length=self.max_length, segments=False
        )

    def encode(
        self, groups: Sequence[Group], tokenizer: Any, *, block_size: int, seed: str
    ) -> list[Pair]:
        """Return pairs of a damaged text and the text, both between begin and end token."""
        rng = np.random.default_rng([*f"denoising-{seed}".encode()])
        texts = ["\n".join(documents) + "\n" for documents in only_documents(groups)]
        sentences = [SENTENCE.findall(text) for text in texts]
        flat = iter(tokenizer(list(chain(*sentences)), add_special_tokens=False)["input_ids"])
        # (token, whether a sentence starts here)
        encoded = [
            [(token, at == 0) for ids in islice(flat, len(parts)) for at, token in enumerate(ids)]
            for parts in sentences
        ]
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        pairs = []
        for number, documents in enumerate(pack(encoded, block_size - 2)):
            target = [token for document in documents for token, _ in document]
            permuted = chain.from_iterable(self._permute(document, rng) for document in documents)
            source = self._infill([*permuted], tokenizer.mask_token_id, rng)[: block_size - 2]
            pairs.append(
                Pair(
                    id=str(number),
                    source=torch.tensor([begin, *source, end], dtype=torch.int32),
                    target=torch.tensor([begin, *target, end], dtype=torch.int32),
                )
            )
        return pairs

    def _permute(
        self, document: Sequence[tuple[int, bool]], rng: np.random.Generator
    ) -> Iterator[int]:
        """Yield the tokens of a document with its sentences in another order."""
        sentences: list[list[int]] = []
        for token, is_first in document:
            if is_first:
                sentences.append([])
            sentences[-1].append(token)
        order = [*range(len(sentences))]
        if rng.random() < self.permuted_share:
            order = rng.permutation(len(sentences)).tolist()
        return chain.from_iterable(sentences[i] for i in order)

    def _infill(self, tokens: Sequence[int], mask: int, rng: np.random.Generator) -> list[int]:
        """Return the tokens with spans masked."""
        # A span begins at a token that is kept with this probability, so that on average the
        # wanted share of all tokens lies in spans.
        rate = self.mask_rate / (1 - self.mask_rate) / self.mean_span
        damaged: list[int] = []
        at = 0
        while at < len(tokens):
            if rng.random() < rate:
                damaged.append(mask)
                at += int(rng.poisson(self.mean_span))
            damaged += tokens[at : at + 1]
            at += 1
        return damaged

    def collate(self, examples: Sequence[Pair]) -> Batch:
        """Pad pairs to the longest source and target."""
        return seq2seq.collate(examples)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy summed over the tokens of the texts.

        Args:
            model: an encoder-decoder model of transformers, possibly wrapped.
            batch: from `collate`.
            label_smoothing: in [0, 1); weight of the mean over the vocabulary of -log p.

        Returns:
            float32 scalar.
        """
        return seq2seq.seq2seq_loss(model, batch, label_smoothing)

    def initialise(self, model: Any, examples: Sequence[Pair]) -> None:
        """Give `model` the weights of `tasks.tiny.mimetic`, with the frequencies of the texts."""
        tokens = torch.cat([torch.as_tensor(pair.target) for pair in examples])
        counts_V = torch.bincount(tokens, minlength=model.config.vocab_size)
        initialise_encoder_decoder(model, counts_V)
