"""Byte-level BPE tokenizers trained on embedded text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

#: begin, end and padding token, as in GPT-2.
END_OF_TEXT = "<|endoftext|>"
#: begin, padding, end, unknown and mask token, with RoBERTa's and BART's first four ids.
PAIR_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a GPT-2-like tokenizer; it encodes any text, since all 256 bytes are tokens.

    Args:
        texts: the training corpus.
        vocab_size: tokens in all, at least 257; fewer if the corpus has fewer merges.

    Returns:
        The tokenizer; equal texts give equal tokenizers. `save_pretrained` writes `tokenizer.json`.

    Raises:
        ValueError: `vocab_size` is below 257.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=_train(texts, vocab_size, [END_OF_TEXT]),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def train_pair_tokenizer(
    texts: Iterable[str], *, vocab_size: int, max_length: int, segments: bool
) -> PreTrainedTokenizerFast:
    """Train a tokenizer like RoBERTa's and BART's: one text or two, and a mask token.

    A text becomes ``<s> A </s>``, a pair ``<s> A </s></s> B </s>``.

    Args:
        texts: the training corpus.
        vocab_size: tokens in all, at least 261; fewer if the corpus has fewer merges.
        max_length: the tokenizer's `model_max_length`, in tokens with the special ones.
        segments: for an encoder that compares texts: `token_type_ids` are 1 in the second text, and
            the first word of a text is the same token as elsewhere (its space is added, so decoding
            gives a space in front).

    Returns:
        The tokenizer, with the ids of `PAIR_TOKENS` from 0; equal texts give equal tokenizers.

    Raises:
        ValueError: `vocab_size` is below 261.
    """
    tokenizer = _train(texts, vocab_size, PAIR_TOKENS, add_prefix_space=segments)
    begin, pad, end, unknown, mask = PAIR_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} {end}:1 $B:1 {end}:1",
        special_tokens=[(token, PAIR_TOKENS.index(token)) for token in (begin, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        cls_token=begin,
        eos_token=end,
        sep_token=end,
        pad_token=pad,
        unk_token=unknown,
        mask_token=mask,
        model_max_length=max_length,
        model_input_names=["input_ids", *["token_type_ids"] * segments, "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _train(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str],
    add_prefix_space: bool = False,
) -> Tokenizer:
    least = NUM_BYTES + len(special_tokens)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size}: at least {least} are needed (all bytes and "
            f"{' '.join(special_tokens)})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
