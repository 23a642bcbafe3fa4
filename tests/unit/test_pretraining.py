"""The pre-training task: blocks, loss, tokenizer, and that a model learns from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from tasks.pretraining import Pretraining

SETTINGS = {
    "objective": "causal",
    "corpus_seed": 1,
    "num_documents": 400,
    "num_validation_documents": 40,
    "block_size": 64,
    "vocab_size": 512,
    "tokenizer_documents": 300,
}


@pytest.fixture(scope="module")
def task():
    task = Pretraining(**SETTINGS)
    task.load()
    return task


@pytest.fixture(scope="module")
def tokenizer(task):
    return task.build_tokenizer()


def build_model(vocab_size: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def test_blocks_are_the_documents_in_order(task, tokenizer):
    blocks = task.examples("validation", tokenizer)
    assert all(block.shape == (64,) and block.dtype == torch.int64 for block in blocks)
    text = tokenizer.decode(torch.cat(list(blocks)))
    documents = task._texts("validation")
    expected = "".join(f"{document}<|endoftext|>" for document in documents)
    assert expected.startswith(text)
    assert len(tokenizer(expected)["input_ids"]) - 64 * len(blocks) < 64
    assert len(task.examples("train", tokenizer)) > 5 * len(blocks)


def test_splits_share_no_document(task):
    assert not set(task._texts("train")) & set(task._texts("validation"))


def test_collate_counts_targets(task, tokenizer):
    batch = task.collate(task.examples("train", tokenizer)[:3])
    assert batch.tensors["input_ids"].shape == (3, 63)
    assert torch.equal(batch.tensors["input_ids"][:, 1:], batch.tensors["labels"][:, :-1])
    assert batch.num_targets == batch.num_tokens == 3 * 63


def test_loss_is_the_sum_of_the_models_own_mean(task, tokenizer):
    model = build_model(len(tokenizer)).eval()
    blocks = task.examples("train", tokenizer)[:4]
    batch = task.collate(blocks)
    loss = task.loss(model, batch)
    ids = torch.stack(list(blocks))
    expected = model(input_ids=ids, labels=ids).loss * batch.num_targets
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_loss_sums_over_micro_batches(task, tokenizer):
    model = build_model(len(tokenizer)).eval()
    blocks = task.examples("train", tokenizer)[:4]
    whole = task.loss(model, task.collate(blocks))
    parts = sum(task.loss(model, task.collate([block])) for block in blocks)
    torch.testing.assert_close(whole, parts)


def test_label_smoothing(task, tokenizer):
    model = build_model(len(tokenizer)).eval()
    batch = task.collate(task.examples("train", tokenizer)[:2])
    log_p = F.log_softmax(model(input_ids=batch.tensors["input_ids"]).logits, dim=-1)
    right = log_p.gather(-1, batch.tensors["labels"][..., None]).sum()
    expected = -0.9 * right - 0.1 * log_p.mean(-1).sum()
    torch.testing.assert_close(task.loss(model, batch, label_smoothing=0.1), expected)


def test_a_small_model_learns(task, tokenizer):
    model = build_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    blocks = task.examples("train", tokenizer)
    losses = []
    for step in range(60):
        batch = task.collate(blocks[8 * step % 96 :][:8])
        loss = task.loss(model, batch) / batch.num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(6.2, abs=0.3)  # log 512
    assert losses[-1] < losses[0] - 1.0


def test_tokenizer_and_provenance_are_reproducible(task, tokenizer):
    again = Pretraining(**SETTINGS)
    again.load()
    vocabulary = again.build_tokenizer().get_vocab()
    assert vocabulary == tokenizer.get_vocab()
    assert len(vocabulary) == 512
    assert again.provenance() == task.provenance()
    assert task.provenance()["rows"] == {"train": 400, "validation": 40}
    other = Pretraining(**{**SETTINGS, "corpus_seed": 2})
    other.load()
    assert other.provenance()["sha256"] != task.provenance()["sha256"]


def test_nothing_is_predicted_or_scored(task):
    assert list(task.inputs("test")) == []
    assert task.score([], "test").values == {}
    assert task.metrics == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "masked"}, "objective='masked'; allowed: causal"),
        ({"block_size": 1}, "block_size=1"),
        ({"num_documents": 0}, "num_documents=0"),
        ({"num_validation_documents": 0}, "num_validation_documents=0"),
        ({"tokenizer_documents": 500}, "tokenizer_documents=500 is more than num_documents=400"),
    ],
)
def test_bad_settings_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        Pretraining(**{**SETTINGS, **change})


def test_misuse_is_an_error(task, tokenizer):
    with pytest.raises(RuntimeError, match="load"):
        Pretraining(**SETTINGS).build_tokenizer()
    with pytest.raises(ValueError, match=r"split='test'; allowed: train, validation"):
        task.examples("test", tokenizer)
    few = Pretraining(**{**SETTINGS, "vocab_size": 5000})
    few.load()
    with pytest.raises(ValueError, match="lower vocab_size"):
        few.build_tokenizer()
    long = Pretraining(**{**SETTINGS, "num_validation_documents": 1, "block_size": 512})
    long.load()
    with pytest.raises(ValueError, match="less than one block"):
        long.examples("validation", tokenizer)
