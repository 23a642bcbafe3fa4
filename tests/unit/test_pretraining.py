"""The pre-training task: blocks, loss, tokenizer, and that a model learns from it."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from scripts.runs.run import Run
from tasks.tiny.objectives import Causal
from tasks.tiny.objectives.base import IGNORED, Token, make_blocks
from tasks.tiny.pretraining import Pretraining

SETTINGS = {
    "objective": Causal(),
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


def build_model(vocab_size: int, attention: str = "sdpa") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = attention
    return GPT2LMHeadModel(config)


def test_pack_keeps_every_sequence_whole():
    rng = random.Random(4)
    encoded = [[rng.randrange(1, 99) for _ in range(rng.randint(1, 20))] for _ in range(300)]
    blocks = make_blocks([list(map(Token, ids)) for ids in encoded], 16, fill=0)
    found = []
    for ids, positions, segments, _, _ in blocks:
        assert ids.shape == positions.shape == segments.shape == (16,)
        for segment in range(1, int(segments.max()) + 1):
            inside = segments == segment
            found.append(ids[inside].tolist())
            assert positions[inside].tolist() == list(range(int(inside.sum())))
        assert set(ids[segments == 0].tolist()) <= {0}
    assert sorted(found) == sorted(sequence[:16] for sequence in encoded)
    assert sum(len(sequence) for sequence in found) > 0.9 * 16 * len(blocks)


def test_blocks_hold_the_documents(task, tokenizer):
    blocks = task.examples("validation", tokenizer)
    found = {
        tokenizer.decode(ids[segments == segment])
        for ids, _, segments, *_ in blocks
        for segment in range(1, int(segments.max()) + 1)
    }
    for documents in task._groups("validation"):
        text = "".join(f"{document}<|endoftext|>" for document in documents)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids[:64]) in found


def test_splits_share_no_sequence(task):
    train, validation = (
        {tuple(group) for group in task._groups(s)} for s in ("train", "validation")
    )
    assert not train & validation
    assert {len(group) for group in train} == {1, 2}


def test_collate_predicts_within_sequences_only(task):
    sequences = [[Token(5, 6), Token(6, 7), Token(7)], [Token(8, 9), Token(9)]]
    block = make_blocks(sequences, 7, fill=0)[0]
    batch = task.collate([block])
    ignored = IGNORED
    assert batch.tensors["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert batch.tensors["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    expected = [[6, 7, ignored, 9, ignored, ignored, ignored]]
    assert batch.tensors["labels"].tolist() == expected
    assert (batch.num_targets, batch.num_tokens) == (3, 7)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_equals_the_sequences_one_by_one(task, tokenizer, attention):
    model = build_model(len(tokenizer), attention).eval()
    blocks = task.examples("train", tokenizer)[:4]
    batch = task.collate(blocks)
    expected = torch.zeros(())
    num_targets = 0
    for ids, _, segments, *_ in blocks:
        for segment in range(1, int(segments.max()) + 1):
            alone = ids[segments == segment][None]
            logits = model(input_ids=alone[:, :-1]).logits[0]
            expected = expected + F.cross_entropy(logits, alone[0, 1:], reduction="sum")
            num_targets += alone.shape[1] - 1
    loss = task.loss(model, batch)
    assert loss.dtype == torch.float32
    assert batch.num_targets == num_targets
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)


def test_loss_sums_over_micro_batches(task, tokenizer):
    model = build_model(len(tokenizer)).eval()
    blocks = task.examples("train", tokenizer)[:4]
    whole = task.loss(model, task.collate(blocks))
    parts = sum(task.loss(model, task.collate([block])) for block in blocks)
    torch.testing.assert_close(whole, parts)


def test_label_smoothing(task, tokenizer):
    model = build_model(len(tokenizer)).eval()
    batch = task.collate(task.examples("train", tokenizer)[:2])
    inputs = {key: batch.tensors[key] for key in ("input_ids", "position_ids")}
    labels = batch.tensors["labels"]
    log_p = F.log_softmax(model(**inputs, use_cache=False).logits[labels != IGNORED], dim=-1)
    right = log_p.gather(-1, labels[labels != IGNORED][:, None]).sum()
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
        ({"num_statements": 5}, "num_statements=5: objective=causal learns from documents only"),
        ({"num_validation_statements": -1}, "num_validation_statements=-1"),
        ({"block_size": 7}, "block_size=7 .*>= 8"),
        ({"num_documents": 0}, "num_documents=0"),
        ({"num_validation_documents": 0}, "num_validation_documents=0"),
        (
            {"tokenizer_documents": 500},
            "tokenizer_documents=500 is more than .*=400",
        ),
    ],
)
def test_bad_settings_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        Pretraining(**{**SETTINGS, **change})


def test_an_objective_of_another_type_is_an_error():
    with pytest.raises(TypeError, match=r"objective='causal' is a str; give Causal\(\)"):
        Pretraining(**{**SETTINGS, "objective": "causal"})


def test_the_last_token_of_a_cut_sequence_has_no_label(task, tokenizer):
    blocks = task.examples("train", tokenizer)
    full = [block for block in blocks if (block.segments == 1).all()]
    assert full
    assert all(block.labels[-1] == IGNORED for block in full)


def test_the_gpt2_is_pretrained_as_its_records_say():
    """The values that make the identity of the tiny GPT-2; every E2E record contains their hash."""
    cfg = Run.compose(["model=tiny_gpt2", "scale=tiny", "logger=none"])
    assert cfg.pretraining.meaning == {
        "seed": 1,
        "predict": False,
        "save_model": True,
        "task": {
            "name": "pretraining",
            "version": 1,
            "objective": {"name": "causal"},
            "num_documents": 15500,
            "tokenizer_documents": 5000,
        },
        "method": {"name": "full", "version": 1, "learning_rate": 5e-3},
        "trainer": {
            "version": 1,
            "batch_size": 8,
            "max_steps": 700,
            "warmup_steps": 60,
            "weight_decay": 0.01,
            "adam_beta2": 0.98,
            "max_grad_norm": 1,
            "device": "cpu",
            "num_threads": 2,
        },
        "model": {
            "family": "causal_lm",
            "init": "random",
            "architecture": {
                "model_type": "gpt2",
                "vocab_size": 1536,
                "n_embd": 128,
                "n_layer": 3,
                "n_head": 4,
                "n_positions": 512,
                "initializer_range": 0.06,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": 0,
            },
            "config_overrides": {"activation_function": "gelu_pytorch_tanh"},
            "dropout": 0,
        },
    }


def test_misuse_is_an_error(task, tokenizer):
    with pytest.raises(RuntimeError, match="load"):
        Pretraining(**SETTINGS).build_tokenizer()
    with pytest.raises(ValueError, match=r"split='test'; allowed: train, validation"):
        task.examples("test", tokenizer)
    few = Pretraining(**{**SETTINGS, "vocab_size": 5000})
    few.load()
    with pytest.raises(ValueError, match="lower the first"):
        few.build_tokenizer()
