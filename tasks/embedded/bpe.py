"""A byte-level BPE tokenizer trained on embedded text."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

#: begin, end and padding token, as in GPT-2.
END_OF_TEXT = "<|endoftext|>"
#: 256 bytes and the end token.
MIN_VOCAB_SIZE = 257


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
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size}: at least {MIN_VOCAB_SIZE} are needed (all bytes and "
            f"{END_OF_TEXT})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
