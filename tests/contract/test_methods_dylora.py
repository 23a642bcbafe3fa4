"""DyLoRA against a float64 transcription of its algorithm, both update rules."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from delta_lora.methods.dylora import DyLora, draw_rank
from tests.contract.models import CASES, WIDTH, inject, inputs, loss, train

F64 = torch.float64
RANK, ALPHA, LR, DECAY, SEED = 4, 6, 1e-2, 0.1, 3


def dylora(update="frozen", **values):
    defaults = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "learning_rate": LR}
    return DyLora(update=update, **(defaults | values))


class PlainDyLora(nn.Module):
    """One adapted layer, written from the algorithm: truncate, scale by alpha / b, detach."""

    def __init__(self, base, A, update):
        super().__init__()
        self.base, self.update, self.b = base, update, RANK
        self.A = nn.Parameter(A.clone())
        self.B = nn.Parameter(torch.zeros(base.out_features, RANK, dtype=F64))

    def forward(self, x):
        b = self.b
        A, B = self.A[:b], self.B[:, :b]
        if self.update == "frozen":
            A = torch.cat([A[: b - 1].detach(), A[b - 1 :]])
            B = torch.cat([B[:, : b - 1].detach(), B[:, b - 1 :]], dim=1)
        return self.base(x) + (ALPHA / b) * (x @ A.T @ B.T)


@pytest.mark.parametrize("update", ["frozen", "all"])
@pytest.mark.parametrize("num_micro", [1, 2])
def test_it_is_the_published_algorithm(update, num_micro):
    case = CASES["mlp"]
    method = dylora(update)
    ours = inject(method, case.model(dtype=F64), case, seed=SEED)
    plain = case.model(dtype=F64).requires_grad_(False)
    plain.classifier.requires_grad_(True)
    adapted = []
    for index in (0, 2):
        layer = PlainDyLora(plain.layers[index], ours.layers[index].output.lora_A, update)
        plain.layers[index] = layer
        adapted.append(layer)
    optimizer = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=LR, weight_decay=DECAY
    )
    drawn = set()
    for step in train(method, ours, 12, num_micro=num_micro, weight_decay=DECAY):
        optimizer.zero_grad()
        batch = inputs(plain, step)
        for micro_step in range(num_micro):
            for layer in adapted:
                layer.b = draw_rank(RANK, SEED, step, micro_step)
                drawn.add(layer.b)
            part = {k: v[micro_step::num_micro] for k, v in batch.items()}
            (loss(plain, part) / num_micro).backward()
        for index, layer in zip((0, 2), adapted, strict=True):
            branch = ours.layers[index].output
            torch.testing.assert_close(branch.lora_A.grad, layer.A.grad, atol=1e-13, rtol=0)
            torch.testing.assert_close(branch.lora_B.grad, layer.B.grad, atol=1e-13, rtol=0)
        optimizer.step()
        for index, layer in zip((0, 2), adapted, strict=True):
            branch = ours.layers[index].output
            torch.testing.assert_close(branch.lora_A, layer.A, atol=1e-11, rtol=0)
            torch.testing.assert_close(branch.lora_B, layer.B, atol=1e-11, rtol=0)
    assert drawn == {1, 2, 3, 4}, "the seed must exercise every rank"


@pytest.mark.parametrize(("update", "rows"), [("frozen", {2}), ("all", {0, 1, 2})])
def test_which_rows_get_a_gradient(update, rows):
    """With b = 3, frozen trains row 2 (from zero) alone, all trains rows 0 to 2."""
    case = CASES["gpt2"]
    method = dylora(update)
    model = inject(method, case.model(dtype=F64), case).train()
    branch = model.transformer.h[0].attn.c_attn.query
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_()
    step = next(s for s in range(100) if draw_rank(RANK, SEED, s, 0) == 3)
    method.before_micro_batch(step, 0)
    loss(model, inputs(model)).backward()
    assert {i for i, row in enumerate(branch.lora_A.grad) if row.abs().max() > 0} == rows
    assert {i for i, col in enumerate(branch.lora_B.grad.T) if col.abs().max() > 0} == rows


def test_every_projection_has_the_same_rank():
    case = CASES["bart"]
    method = dylora()
    model = inject(method, case.model(), case).train()
    method.before_micro_batch(1, 0)
    ranks = {
        int(torch.count_nonzero(module.factors()[0].abs().sum(dim=1)))
        for module in model.modules()
        if hasattr(module, "lora_A")
    }
    assert ranks == {draw_rank(RANK, SEED, 1, 0)}


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_scale_is_alpha_over_b(rank):
    case = CASES["gpt2"]
    method = dylora(eval_rank=rank)
    model = inject(method, case.model(dtype=F64), case)
    branch = model.transformer.h[0].attn.c_attn.query
    nn.init.normal_(branch.lora_B)
    expected = ALPHA / rank * branch.lora_B[:, :rank] @ branch.lora_A[:rank]
    torch.testing.assert_close(branch.delta_weight(), expected, atol=1e-12, rtol=0)
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(5, WIDTH, dtype=F64)
    torch.testing.assert_close(
        (layer(x) - layer.base_layer(x))[:, :WIDTH], x @ expected.T, atol=1e-12, rtol=0
    )
    assert method.describe()["eval_rank"] == rank


def test_evaluation_uses_the_evaluation_rank_whatever_was_drawn():
    case = CASES["gpt2"]
    method = dylora()
    model = inject(method, case.model(), case)
    branch = model.transformer.h[0].attn.c_attn.query
    nn.init.normal_(branch.lora_B)
    before = branch.delta_weight()
    model.train()
    for step in range(8):
        method.before_micro_batch(step, 0)
        assert torch.equal(branch.delta_weight(), before)
    model.eval()
    assert torch.equal(branch.factors()[0], branch.lora_A)


def test_the_draw_is_uniform_and_a_function_of_seed_and_position():
    draws = [draw_rank(4, 1, step, micro) for step in range(1000) for micro in range(4)]
    counts = Counter(draws)
    assert set(counts) == {1, 2, 3, 4}
    # 4000 draws at 1/4: standard deviation 27
    assert all(abs(count - 1000) < 4 * 27.4 for count in counts.values())
    assert draws == [draw_rank(4, 1, step, micro) for step in range(1000) for micro in range(4)]
    assert draws != [draw_rank(4, 2, step, micro) for step in range(1000) for micro in range(4)]
    assert draw_rank(1, 0, 0, 0) == 1


def test_the_global_random_state_is_left_alone():
    method = dylora()
    inject(method, CASES["mlp"].model(), CASES["mlp"])
    state = torch.get_rng_state()
    method.before_micro_batch(0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_micro_batch_before_inject_is_an_error():
    with pytest.raises(RuntimeError, match="inject the model first"):
        dylora().before_micro_batch(0, 0)


def test_momentum_moves_frozen_rows():
    """A frozen row has a zero gradient, not none, so Adam still moves it (released code)."""
    case = CASES["mlp"]
    method = dylora()
    model = inject(method, case.model(), case)
    branch = model.layers[0].output
    moved = 0
    before = branch.lora_A.detach().clone()
    had_gradient = torch.zeros(RANK, dtype=torch.bool)
    for _ in train(method, model, 8, weight_decay=0.0):
        has_gradient = branch.lora_A.grad.abs().sum(dim=1) > 0
        is_moved = (branch.lora_A != before).any(dim=1)
        assert is_moved[had_gradient].all()
        moved += int((is_moved & ~has_gradient).sum())
        had_gradient |= has_gradient
        before = branch.lora_A.detach().clone()
    assert moved > 0
