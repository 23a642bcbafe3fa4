"""The forward passes of the planned models, written down in a `Ledger`.

The order and the places of dropout are those of transformers' GPT2LMHeadModel,
RobertaForSequenceClassification and BartForConditionalGeneration with ``attention=sdpa``.
"""

from __future__ import annotations

from dataclasses import dataclass

from scripts.planning.adaptation import Adaptation
from scripts.planning.architecture import Architecture
from scripts.planning.ledger import Kernels, Ledger, Value


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        sequences: examples.
        length: tokens of the longest one; of a padding-free row all tokens together.
        is_packed: whether the examples stand one behind the other in one row.
        targets: positions with a loss (GPT-2), tokens of the longest target (BART).
        has_padding: whether any example is shorter than the longest.
    """

    sequences: int
    length: int
    is_packed: bool = False
    targets: int = 0
    has_padding: bool = True


def write_down(
    shape: Architecture,
    adaptation: Adaptation,
    batch: Batch,
    kernels: Kernels,
) -> Ledger:
    """Return the ledger of one forward pass in training.

    Args:
        shape: the model.
        adaptation: the method.
        batch: one micro-batch.
        kernels: of the device.
    """
    ledger = Ledger(adaptation, kernels)
    programs = {"gpt2": _gpt2, "roberta": _roberta, "bart": _bart}
    programs[shape.family](ledger, shape, batch)
    return ledger


def _feed_forward(ledger: Ledger, x: Value, shape: Architecture) -> Value:
    h = ledger.linear(x, shape.width, shape.inner)
    h = ledger.dropout(ledger.activation(h), shape.activation_dropout)
    return ledger.dropout(ledger.linear(h, shape.inner, shape.width), shape.dropout)


def _gpt2(ledger: Ledger, shape: Architecture, batch: Batch) -> None:
    d = shape.width
    rows = 1 if batch.is_packed else batch.sequences
    tokens = rows * batch.length
    words = ledger.table(shape.vocabulary, d, tokens, "token_table", is_tied=True)
    positions = ledger.table(shape.num_positions, d, tokens, "positions")
    x = ledger.dropout(ledger.add(words, positions), shape.dropout)
    for _ in range(shape.num_layers):
        h = ledger.normalise(x, d)
        qkv = ledger.fused_query_key_value(h, d)
        h = ledger.attention(
            qkv, qkv, qkv, batch=rows, num_heads=shape.num_heads, length=batch.length,
            keys=batch.length, width=d, probability=shape.attention_dropout,
            has_mask=batch.is_packed,
        )  # fmt: skip
        x = ledger.add(x, ledger.dropout(ledger.linear(h, d, d), shape.dropout))
        x = ledger.add(x, _feed_forward(ledger, ledger.normalise(x, d), shape))
    x = ledger.normalise(x, d)
    chosen = ledger.choose(x, d, batch.targets)  # the positions with a loss
    ledger.tied_head(chosen, shape.vocabulary, d)
    ledger.loss(batch.targets, shape.vocabulary)


def _roberta(ledger: Ledger, shape: Architecture, batch: Batch) -> None:
    d, tokens = shape.width, batch.sequences * batch.length
    words = ledger.table(shape.vocabulary, d, tokens, "token_table")
    types = ledger.table(shape.num_types, d, tokens, "types")
    positions = ledger.table(shape.num_positions, d, tokens, "positions")
    x = ledger.normalise(ledger.add(words, types, positions), d)
    x = ledger.dropout(x, shape.dropout)
    for _ in range(shape.num_layers):
        h = _separate_attention(
            ledger, x, x, shape, batch, length=batch.length, keys=batch.length,
            has_mask=batch.has_padding,
        )  # fmt: skip
        x = ledger.normalise(ledger.add(x, h), d)
        x = ledger.normalise(ledger.add(x, _feed_forward(ledger, x, shape)), d)
    first = ledger.value(batch.sequences * d, x.needs_grad)
    h = ledger.tanh(ledger.linear(ledger.dropout(first, shape.dropout), d, d, "head"))
    h = ledger.linear(ledger.dropout(h, shape.dropout), d, shape.num_labels, "head")
    ledger.loss(batch.sequences, shape.num_labels)


def _separate_attention(
    ledger: Ledger, x: Value, memory: Value, shape: Architecture, batch: Batch, *, length: int,
    keys: int, has_mask: bool,
) -> Value:  # fmt: skip
    """Attention with a layer each for query, key, value and output, and dropout behind it."""
    d = shape.width
    query = ledger.linear(x, d, d, "query")
    key = ledger.linear(memory, d, d)
    value = ledger.linear(memory, d, d, "value")
    h = ledger.attention(
        query, key, value, batch=batch.sequences, num_heads=shape.num_heads, length=length,
        keys=keys, width=d, probability=shape.attention_dropout, has_mask=has_mask,
        masks=batch.sequences,
    )  # fmt: skip
    return ledger.dropout(ledger.linear(h, d, d), shape.dropout)


def _bart(ledger: Ledger, shape: Architecture, batch: Batch) -> None:
    d, sources = shape.width, batch.sequences * batch.length
    targets = batch.sequences * batch.targets
    words = ledger.table(shape.vocabulary, d, sources, "token_table", is_tied=True)
    positions = ledger.table(shape.num_positions + 2, d, sources, "positions")
    x = ledger.normalise(ledger.add(words, positions), d)
    x = ledger.dropout(x, shape.dropout)
    for _ in range(shape.num_layers):
        h = _separate_attention(
            ledger, x, x, shape, batch, length=batch.length, keys=batch.length,
            has_mask=batch.has_padding,
        )  # fmt: skip
        x = ledger.normalise(ledger.add(x, h), d)
        x = ledger.normalise(ledger.add(x, _feed_forward(ledger, x, shape)), d)
    y = ledger.look_up(shape.vocabulary, d, targets)
    positions = ledger.table(shape.num_positions + 2, d, targets, "positions")
    y = ledger.normalise(ledger.add(y, positions), d)
    y = ledger.dropout(y, shape.dropout)
    for _ in range(shape.num_decoder_layers):
        h = _separate_attention(
            ledger, y, y, shape, batch, length=batch.targets, keys=batch.targets, has_mask=False
        )
        y = ledger.normalise(ledger.add(y, h), d)
        h = _separate_attention(
            ledger, y, x, shape, batch, length=batch.targets, keys=batch.length,
            has_mask=batch.has_padding,
        )  # fmt: skip
        y = ledger.normalise(ledger.add(y, h), d)
        y = ledger.normalise(ledger.add(y, _feed_forward(ledger, y, shape)), d)
    ledger.tied_head(y, shape.vocabulary, d)
    ledger.loss(targets, shape.vocabulary)
