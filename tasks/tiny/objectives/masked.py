"""Masked language modelling with verdicts, for the tiny RoBERTa."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.checks import Range, check_values
from delta_lora.protocols import Batch
from tasks.language_modeling import unwrap
from tasks.tiny.bpe import PAIR_TOKENS, train_pair_tokenizer
from tasks.tiny.corpora.general import Statement
from tasks.tiny.corpora.sentences import Sentence, damage
from tasks.tiny.mimetic import initialise_encoder
from tasks.tiny.objectives.base import (
    IGNORED,
    Block,
    Group,
    Objective,
    Token,
    make_batch,
    make_blocks,
)

#: how likely a chosen word is masked, replaced or left as it is (BERT).
FATES = {"mask": 0.8, "random": 0.1, "keep": 0.1}
#: share of the sentences without a mood that are damaged.
DAMAGED_SHARE = 0.5

Rate = Annotated[float, Range(above=0, below=1)]


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

    Nor is a `Sentence` masked. At every token of an opinion the model names its mood. Of the other
    sentences one half is damaged (`sentences.damage`), and at every token, and at the first one for
    the whole sentence, the model says whether it is in place, with the same two labels as for
    statements (as ELECTRA and StructBERT ask it). Otherwise the first token of a
    single sentence, which classification reads, would look at nothing but itself.

    A block holds several sequences; a mask of (B, 1, T, T) keeps them apart.

    Args:
        mask_rate: share of the words of a single text that are predicted, in (0, 1).
        pair_mask_rate: the same for the one text of a pair that is masked.

    Raises:
        ValueError: a rate outside its range.
        TypeError: a rate is no number.
    """

    name = "masked"
    family = "masked_lm"
    uses_verdicts = True

    def __init__(self, *, mask_rate: Rate = 0.15, pair_mask_rate: Rate = 0.3) -> None:
        check_values(Masked.__init__, locals(), prefix="task.objective.")
        self.mask_rate = float(mask_rate)
        self.pair_mask_rate = float(pair_mask_rate)

    def train_tokenizer(self, texts: Iterable[str], *, vocab_size: int, block_size: int) -> Any:
        """Return a tokenizer like RoBERTa's, with a segment for each text of a pair."""
        return train_pair_tokenizer(
            texts, vocab_size=vocab_size, max_length=block_size, segments=True
        )

    def encode(
        self, groups: Sequence[Group], tokenizer: Any, *, block_size: int, seed: str
    ) -> list[Block]:
        """Return blocks of masked sequences, statements and sentences; the rest is padding."""
        rng = random.Random(f"masked-{seed}")  # noqa: S311 (not for security)
        sequences = []
        for group in groups:
            if isinstance(group, Statement):
                tokens = _judged(group, tokenizer, block_size)
            elif isinstance(group, Sentence):
                tokens = _read(group, tokenizer, block_size, rng)
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
        return make_batch(inputs, labels_BT)

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
        if base.config._attn_implementation == "eager":  # which adds its mask to the scores
            seen_B1TT = inputs["attention_mask"]
            bias_B1TT = torch.zeros_like(seen_B1TT, dtype=base.dtype)
            inputs["attention_mask"] = bias_B1TT.masked_fill(
                ~seen_B1TT, torch.finfo(base.dtype).min
            )
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
        """Give `model` the weights of `tasks.tiny.mimetic`, with the frequencies of the labels."""
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


def _read(sentence: Sentence, tokenizer: Any, block_size: int, rng: random.Random) -> list[Token]:
    """Return the tokens of a sentence with its mood, or with a verdict on each and on the whole."""
    words, wrong = sentence.text.split(), frozenset[int]()
    if sentence.mood is None and rng.random() < DAMAGED_SHARE:
        words, wrong = damage(words, rng)
    encoding = tokenizer(
        " ".join(words), truncation=True, max_length=block_size, return_offsets_mapping=True
    )
    ids = encoding["input_ids"]
    if sentence.mood is not None:
        mood = tokenizer(f" {sentence.mood}", add_special_tokens=False)["input_ids"][0]
        return _with_texts([Token(each, mood) for each in ids], encoding)
    ends = list(accumulate(len(word) + 1 for word in words))
    tokens = []
    for token, text, (_, end) in zip(
        ids, encoding.sequence_ids(0), encoding["offset_mapping"], strict=True
    ):
        label = IGNORED
        if text == 0:
            is_wrong = bisect_left(ends, end) in wrong
            label = tokenizer.unk_token_id if is_wrong else tokenizer.bos_token_id
        tokens.append(Token(token, label))
    verdict = tokenizer.unk_token_id if wrong else tokenizer.bos_token_id
    tokens[0] = Token(tokens[0].id, verdict)
    return _with_texts(tokens, encoding)


def _with_texts(tokens: Sequence[Token], encoding: Any) -> list[Token]:
    return [
        token._replace(text=text)
        for token, text in zip(tokens, encoding["token_type_ids"], strict=True)
    ]
