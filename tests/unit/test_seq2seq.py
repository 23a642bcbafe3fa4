"""Padded batches of encoder-decoders: the loss equals the definition, padding changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from delta_lora.protocols import Batch
from tasks.seq2seq import IGNORED, Pair, collate, seq2seq_loss, shift_right

VOCABULARY = 30


def make_model(**settings: object) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    values: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 24,
        "init_std": 0.3,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }
    return BartForConditionalGeneration(BartConfig(**{**values, **settings}))


def pair(name: str, source: list[int], target: list[int]) -> Pair:
    return Pair(
        name, torch.tensor(source, dtype=torch.int32), torch.tensor(target, dtype=torch.int32)
    )


PAIRS = [
    pair("a", [0, 5, 6, 7, 8, 2], [0, 9, 2]),
    pair("b", [0, 3, 2], [0, 4, 5, 6, 2]),
    pair("c", [0, 11, 12, 13, 14, 15, 16, 2], [0, 2]),
]


def test_a_batch_is_padded_to_its_own_longest() -> None:
    batch = collate(PAIRS[:2])
    assert {name: tensor.tolist() for name, tensor in batch.tensors.items()} == {
        "input_ids": [[0, 5, 6, 7, 8, 2], [0, 3, 2, 0, 0, 0]],
        "attention_mask": [[1] * 6, [1, 1, 1, 0, 0, 0]],
        "labels": [[0, 9, 2, IGNORED, IGNORED], [0, 4, 5, 6, 2]],
    }
    assert {tensor.dtype for tensor in batch.tensors.values()} == {torch.int64}
    assert (batch.num_targets, batch.num_tokens, batch.example_ids) == (8, 17, ["a", "b"])
    with pytest.raises(ValueError, match="at least one example"):
        collate([])
    with pytest.raises(ValueError, match="x: 0 source and 1 target tokens"):
        pair("x", [], [2])


def test_the_decoder_reads_the_targets_shifted_right() -> None:
    labels = collate(PAIRS[:2]).tensors["labels"]
    before = labels.clone()
    assert shift_right(labels, 2).tolist() == [[2, 0, 9, 2, 0], [2, 0, 4, 5, 6]]
    assert torch.equal(labels, before)
    with pytest.raises(ValueError, match="no decoder_start_token_id"):
        shift_right(labels, None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_equals_one_by_one_and_the_definition(attention: str, smoothing: float) -> None:
    model = make_model(attn_implementation=attention)
    together = seq2seq_loss(model, collate(PAIRS), smoothing)
    together.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = sum(seq2seq_loss(model, collate([one]), smoothing) for one in PAIRS)
    alone.backward()
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)

    expected = torch.zeros((), dtype=torch.float64)
    for one in PAIRS:
        # The plain forward pass, with the shift of transformers.
        target = one.target.long()[None]
        log_p = model(input_ids=one.source.long()[None], labels=target).logits.double()
        for row, token in zip(log_p.log_softmax(-1)[0], target[0], strict=True):
            expected += (1 - smoothing) * -row[token] + smoothing * (-row).mean()
    torch.testing.assert_close(together.double(), expected, rtol=1e-5, atol=0)


def test_the_mean_is_the_loss_of_transformers() -> None:
    model, batch = make_model(), collate(PAIRS)
    theirs = model(**batch.tensors).loss
    torch.testing.assert_close(seq2seq_loss(model, batch) / batch.num_targets, theirs)


def test_padding_is_never_read() -> None:
    model, batch = make_model(), collate(PAIRS)
    expected = seq2seq_loss(model, batch)
    masked = batch.tensors["attention_mask"] == 0
    other = batch.tensors["input_ids"].masked_fill(masked, 17)
    changed = Batch({**batch.tensors, "input_ids": other}, batch.num_targets, batch.num_tokens)
    torch.testing.assert_close(seq2seq_loss(model, changed), expected, rtol=1e-6, atol=0)


def test_wrapped_models_and_precision() -> None:
    model, batch = make_model(), collate(PAIRS)
    expected = seq2seq_loss(model, batch)
    torch.testing.assert_close(seq2seq_loss(torch.nn.DataParallel(model), batch), expected)
    assert seq2seq_loss(model.to(torch.bfloat16), batch).dtype == torch.float32


def test_other_encoder_decoders_work() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    model, batch = T5ForConditionalGeneration(config), collate(PAIRS)
    theirs = model(**batch.tensors).loss
    torch.testing.assert_close(seq2seq_loss(model, batch) / batch.num_targets, theirs)


def test_unfit_models_are_errors() -> None:
    batch = collate(PAIRS)
    with pytest.raises(ValueError, match=r"8 tokens among \['a', 'b', 'c'\].* 7 positions"):
        seq2seq_loss(make_model(max_position_embeddings=7), batch)
    with pytest.raises(TypeError, match="Linear is no encoder-decoder"):
        seq2seq_loss(torch.nn.Linear(2, 2), batch)
    model = make_model()
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="no decoder_start_token_id"):
        seq2seq_loss(model, batch)
