"""What a tiny model learns from the general corpus: the objectives of its pre-training.

* `Causal`: every token from those before it (GPT-2).
* `Masked`: masked tokens of one text or of a pair (RoBERTa).
* `Denoising`: a text from a damaged copy of it (BART).

An objective turns sequences of documents into examples of fixed size, examples into a batch, and a
batch into a summed loss. All that is random in the examples is a function of a seed and of the
position in the corpus, so every process and every session sees the same ones.

Shapes: B examples of a batch, T tokens, N tokens with a loss, V vocabulary.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.protocols import Batch
from tasks import seq2seq
from tasks.embedded.bpe import PAIR_TOKENS, train_pair_tokenizer, train_tokenizer
from tasks.embedded.general import Statement
from tasks.language_modeling import unwrap
from tasks.mimetic import initialise_encoder, initialise_encoder_decoder
from tasks.seq2seq import Pair

T = TypeVar("T")
#: what stands together in the corpus.
Group = list[str] | Statement

#: a label that no loss is computed for.
IGNORED = -100
#: a sentence: up to white space behind a full stop or question mark, or up to the end of a line;
#: that space stands in front of the next sentence, as in the tokens.
SENTENCE = re.compile(r"\s*[^\n]+?(?:(?<=[.?!])(?=\s)|(?=\n|$))|\s+")
#: how likely a chosen word is masked, replaced or left as it is (BERT).
FATES = {"mask": 0.8, "random": 0.1, "keep": 0.1}
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
    #: whether it can learn from a `Statement`.
    uses_statements = False

    @abstractmethod
    def train_tokenizer(self, texts: Iterable[str], *, vocab_size: int, block_size: int) -> Any:
        """Return a tokenizer with the special tokens of this kind of model."""

    @abstractmethod
    def encode(
        self, groups: Sequence[Group], tokenizer: Any, *, block_size: int, seed: str
    ) -> list[Any]:
        """Return the examples of a split.

        Args:
            groups: documents that belong together, and statements if `uses_statements`.
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


def _documents(groups: Iterable[Group]) -> list[list[str]]:
    documents = []
    for group in groups:
        assert not isinstance(group, Statement), "the task checks `uses_statements`"
        documents.append(group)
    return documents


class Causal(Objective):
    """Every token but the first of a sequence is predicted from those before it.

    The end token stands behind each document. `transformers` finds the boundaries of a block's
    sequences from its positions, so no attention mask is needed.
    """

    name = "causal"

    def train_tokenizer(self, texts: Iterable[str], *, vocab_size: int, block_size: int) -> Any:
        """Return a tokenizer like GPT-2's."""
        return train_tokenizer(texts, vocab_size=vocab_size)

    def encode(
        self, groups: Sequence[Group], tokenizer: Any, *, block_size: int, seed: str
    ) -> list[Block]:
        """Return blocks; the label of a token is the one behind it."""
        documents = _documents(groups)
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
        return _batch({"input_ids": ids_BT, "position_ids": positions_BT}, labels_BT)

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


def _batch(inputs: dict[str, Tensor], labels_BT: Tensor) -> Batch:
    return Batch(
        tensors={**inputs, "labels": labels_BT},
        num_targets=int((labels_BT != IGNORED).sum()),
        num_tokens=inputs["input_ids"].numel(),
    )


#: share of single sentences in which two neighbouring words change places.
DAMAGED_SHARE = 0.5


class Masked(Objective):
    """Masked tokens of a text or of a pair, and whether a statement agrees with its text.

    Documents that belong together, and the first line of a document and its rest, are a pair: only
    one of the two texts is masked, and what is missing can mostly be copied from the other. As in
    BERT, 80 % of the chosen words are replaced by the mask token, 10 % by random tokens and 10 %
    stay; whole words are chosen.

    A `Statement` is not masked. At the first token and at every token of its second text the model
    says whether it agrees with the first text (label: the begin token) or not (label: the unknown
    token). Masking alone does not teach a tiny model to compare texts within a minute, and what no
    sentence-pair task could be adapted from would make every method look alike.

    Of some documents one sentence is taken, and in one half of these two neighbouring words change
    places: at every token, and at the first one for the whole sentence, the model says whether it
    is in place, with the same two labels (as ELECTRA and StructBERT ask it). Otherwise the first
    token of a single sentence, which classification reads, would look at nothing but itself.

    A block holds several sequences; a mask of (B, 1, T, T) keeps them apart.

    Args:
        mask_rate: share of the words of a single text that are predicted, in (0, 1).
        pair_mask_rate: the same for the one text of a pair that is masked.
        sentence_share: share of the documents of which one sentence is taken, in [0, 1).

    Raises:
        ValueError: a rate or share outside its range.
    """

    name = "masked"
    uses_statements = True

    def __init__(
        self,
        *,
        mask_rate: float = 0.15,
        pair_mask_rate: float = 0.3,
        sentence_share: float = 0.0,
    ) -> None:
        for key, rate in (("mask_rate", mask_rate), ("pair_mask_rate", pair_mask_rate)):
            if not 0 < rate < 1:
                raise ValueError(f"{key}={rate}: must be greater than 0 and less than 1")
        if not 0 <= sentence_share < 1:
            raise ValueError(f"sentence_share={sentence_share}: must be in [0, 1)")
        self.mask_rate = mask_rate
        self.pair_mask_rate = pair_mask_rate
        self.sentence_share = sentence_share

    def train_tokenizer(self, texts: Iterable[str], *, vocab_size: int, block_size: int) -> Any:
        """Return a tokenizer like RoBERTa's, with a segment for each text of a pair."""
        return train_pair_tokenizer(
            texts, vocab_size=vocab_size, max_length=block_size, segments=True
        )

    def encode(
        self, groups: Sequence[Group], tokenizer: Any, *, block_size: int, seed: str
    ) -> list[Block]:
        """Return blocks of masked sequences and of statements; the rest is padding."""
        rng = random.Random(f"masked-{seed}")  # noqa: S311 (not for security)
        sequences = []
        for group in groups:
            if isinstance(group, Statement):
                tokens = _judged(group, tokenizer, block_size)
            elif self.sentence_share and rng.random() < self.sentence_share:
                tokens = _read(_sentence(group, rng), tokenizer, block_size, rng)
            else:
                tokens = self._masked(_as_pair(group), tokenizer, block_size, rng)
            sequences.append(tokens)
        return make_blocks(sequences, block_size, fill=tokenizer.pad_token_id)

    def _masked(
        self, texts: Sequence[str], tokenizer: Any, block_size: int, rng: random.Random
    ) -> list[Token]:
        encoding = tokenizer(*texts, truncation=True, max_length=block_size)
        chosen_text = rng.randrange(len(texts))
        rate = self.mask_rate if len(texts) == 1 else self.pair_mask_rate
        fates: dict[int, str | None] = {}
        tokens = []
        for token, text, word in zip(
            encoding["input_ids"], encoding.sequence_ids(0), encoding.word_ids(0), strict=True
        ):
            if text == chosen_text and word not in fates and rng.random() < rate:
                fates[word] = rng.choices(tuple(FATES), tuple(FATES.values()))[0]
            fate = fates.setdefault(word, None) if text == chosen_text else None
            shown = token
            if fate == "mask":
                shown = tokenizer.mask_token_id
            elif fate == "random":
                shown = rng.randrange(len(PAIR_TOKENS), len(tokenizer))
            tokens.append(Token(shown, token if fate else IGNORED))
        return _with_texts(tokens, encoding)

    def collate(self, examples: Sequence[Block]) -> Batch:
        """Stack blocks."""
        ids_BT, positions_BT, segments_BT, labels_BT, texts_BT = map(
            torch.stack, zip(*examples, strict=True)
        )
        inputs = {
            "input_ids": ids_BT,
            "token_type_ids": texts_BT,
            "position_ids": positions_BT,
            "attention_mask": (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None],
        }
        return _batch(inputs, labels_BT)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy summed over the labels; other positions get no logits.

        Args:
            model: a RoBERTa with a language-modelling head, possibly wrapped.
            batch: from `collate`.
            label_smoothing: in [0, 1); weight of the mean over the vocabulary of -log p.

        Returns:
            float32 scalar.
        """
        inputs = {key: value for key, value in batch.tensors.items() if key != "labels"}
        base: Any = unwrap(model)
        # A RoBERTa starts to count positions behind its padding token.
        inputs["position_ids"] = inputs["position_ids"] + base.config.pad_token_id + 1
        labels_BT = batch.tensors["labels"]
        has_label_BT = labels_BT != IGNORED
        handle = base.lm_head.register_forward_pre_hook(lambda _, args: (args[0][has_label_BT],))
        try:
            logits_NV = model(**inputs).logits
        finally:
            handle.remove()
        return F.cross_entropy(
            logits_NV.float(),
            labels_BT[has_label_BT],
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    def initialise(self, model: Any, examples: Sequence[Block]) -> None:
        """Give `model` the weights of `tasks.mimetic`, with the frequencies of the labels."""
        labels = torch.cat([block.labels for block in examples])
        counts_V = torch.bincount(labels[labels != IGNORED], minlength=model.config.vocab_size)
        initialise_encoder(model, counts_V)


def _as_pair(documents: Sequence[str]) -> Sequence[str]:
    """Return two documents, or the first line of one and its rest, or its only line."""
    if len(documents) > 1:
        return documents
    first, _, rest = documents[0].partition("\n")
    return [first, rest] if rest else [first]


def _judged(statement: Statement, tokenizer: Any, block_size: int) -> list[Token]:
    """Return the tokens of a statement with their verdicts."""
    encoding = tokenizer(
        statement.first,
        statement.second,
        truncation=True,
        max_length=block_size,
        return_offsets_mapping=True,
    )
    changed = statement.changed
    spans = [m.span() for m in re.finditer(re.escape(changed), statement.second)] if changed else []
    tokens = []
    for token, text, (start, end) in zip(
        encoding["input_ids"], encoding.sequence_ids(0), encoding["offset_mapping"], strict=True
    ):
        label = IGNORED
        if text == 1:
            is_changed = any(start < last and end > first for first, last in spans)
            label = tokenizer.unk_token_id if is_changed else tokenizer.bos_token_id
        tokens.append(Token(token, label))
    verdict = tokenizer.unk_token_id if changed else tokenizer.bos_token_id
    tokens[0] = Token(tokens[0].id, verdict)
    return _with_texts(tokens, encoding)


def _sentence(documents: Sequence[str], rng: random.Random) -> list[str]:
    """Return the words of a random sentence."""
    line = rng.choice(rng.choice(documents).split("\n"))
    return rng.choice(re.split(r"(?<=[.!?]) +", line)).split()


def _read(words: Sequence[str], tokenizer: Any, block_size: int, rng: random.Random) -> list[Token]:
    """Return the tokens of a sentence with a verdict on each, and on the whole at the first."""
    words = list(words)
    moved: set[int] = set()
    if rng.random() < DAMAGED_SHARE and len(words) > 2:
        at = rng.randrange(len(words) - 1)
        if words[at] != words[at + 1]:
            words[at : at + 2] = words[at + 1], words[at]
            moved = {at, at + 1}
    encoding = tokenizer(
        " ".join(words), truncation=True, max_length=block_size, return_offsets_mapping=True
    )
    ends = list(accumulate(len(word) + 1 for word in words))
    tokens = []
    for token, text, (_, end) in zip(
        encoding["input_ids"], encoding.sequence_ids(0), encoding["offset_mapping"], strict=True
    ):
        label = IGNORED
        if text == 0:
            is_moved = bisect_left(ends, end) in moved
            label = tokenizer.unk_token_id if is_moved else tokenizer.bos_token_id
        tokens.append(Token(token, label))
    verdict = tokenizer.unk_token_id if moved else tokenizer.bos_token_id
    tokens[0] = Token(tokens[0].id, verdict)
    return _with_texts(tokens, encoding)


def _with_texts(tokens: Sequence[Token], encoding: Any) -> list[Token]:
    return [
        token._replace(text=text)
        for token, text in zip(tokens, encoding["token_type_ids"], strict=True)
    ]


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
    """

    name = "denoising"

    def __init__(
        self,
        *,
        mask_rate: float = 0.3,
        mean_span: float = 3.0,
        permuted_share: float = 1.0,
        max_length: int = 512,
    ) -> None:
        if not 0 < mask_rate < 1:
            raise ValueError(f"mask_rate={mask_rate}: must be greater than 0 and less than 1")
        if not mean_span > 0:
            raise ValueError(f"mean_span={mean_span}: must be greater than 0")
        if not 0 <= permuted_share <= 1:
            raise ValueError(f"permuted_share={permuted_share}: must be from 0 to 1")
        self.mask_rate = mask_rate
        self.mean_span = mean_span
        self.permuted_share = permuted_share
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
        texts = ["\n".join(documents) + "\n" for documents in _documents(groups)]
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
        """Give `model` the weights of `tasks.mimetic`, with the frequencies of the texts."""
        tokens = torch.cat([pair.target for pair in examples])
        counts_V = torch.bincount(tokens, minlength=model.config.vocab_size)
        initialise_encoder_decoder(model, counts_V)
