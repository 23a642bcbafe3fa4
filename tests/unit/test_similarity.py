"""Cosine similarity of W_Q and W_V before and after."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from delta_lora.analysis.similarity import cosine_similarities, snapshot
from delta_lora.methods.lora import Lora
from tests.contract.models import CASES


@pytest.mark.parametrize("name", ["gpt2", "roberta", "bart"])
def test_similarity_is_that_of_the_merged_weights(name: str) -> None:
    model = CASES[name].model()
    before = snapshot(model, None)
    weights = [w.clone() for _, w in before]
    method = Lora(rank=2, alpha=3, learning_rate=1e-2, dropout=0.0)
    method.inject(model, projections=None, head=(), total_steps=5, seed=1)
    with method.merged(model) as merged:
        unchanged = cosine_similarities(before, merged)
    assert list(unchanged.values()) == pytest.approx([1.0] * len(before), abs=1e-12)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("lora_B"):
            nn.init.normal_(parameter)
    with method.merged(model) as merged:
        after = cosine_similarities(before, merged)
        now = [w.clone() for _, w in snapshot_of(merged, before)]
    assert list(after) == [p.name for p, _ in before]
    for value, old, new in zip(after.values(), weights, now, strict=True):
        a, b = old.double().flatten(), new.double().flatten()
        assert value == pytest.approx(float(a @ b) / math.sqrt(a @ a) / math.sqrt(b @ b), abs=1e-12)
        assert value < 0.999


def snapshot_of(model: nn.Module, before: list) -> list:
    from delta_lora.low_rank import weight_slice

    return [(p, weight_slice(model.get_submodule(p.layer).weight, p)) for p, _ in before]


def test_a_model_without_attention_has_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = nn.Sequential(nn.Linear(3, 3))
    assert snapshot(model, None) == []
    assert "no similarity of weights is recorded" in caplog.text
    assert cosine_similarities([], model) == {}


def test_named_layers_and_a_zero_weight() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    before = snapshot(model, ["0"])
    with torch.no_grad():
        model[0].weight.neg_()
    assert cosine_similarities(before, model)["0.output"] == pytest.approx(-1.0)
    with torch.no_grad():
        model[0].weight.zero_()
    assert cosine_similarities(before, model)["0.output"] == 1.0
