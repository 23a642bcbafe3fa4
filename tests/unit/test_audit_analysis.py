"""The measurements of the audit against cases whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from delta_lora.analysis import equivalence, gradients, memory_model, precision, rank, similarity
from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.methods.full import Full
from delta_lora.methods.lora import Lora
from tests.contract.models import CASES, LENGTH, VOCABULARY, WIDTH, gpt2

KEYS = {"projections": None, "head": (), "total_steps": 10, "seed": 0}


def build64() -> nn.Module:
    return CASES["gpt2"].model(dtype=torch.float64)


def tokens(step: int, batch: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, VOCABULARY, (batch, LENGTH), generator=generator)


def loss(model: nn.Module, step: int) -> torch.Tensor:
    ids = tokens(step)
    logits = model(input_ids=ids, use_cache=False).logits
    return gradients.cross_entropy(logits, logits, ids)


# ---------------------------------------------------------------------- rank


@pytest.mark.parametrize("true_rank", [0, 1, 5, 20])
def test_the_rank_of_a_known_product_is_found(true_rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(20, 30, generator=generator)
    change = torch.randn(20, true_rank, generator=generator) @ torch.randn(
        true_rank, 30, generator=generator
    )
    found = rank.spectrum(W, W + change)
    assert found.rank == true_rank
    assert len(found.singular_values) == 20


def test_the_tolerance_is_that_of_the_weight_and_not_of_the_change() -> None:
    # The rounding of a large W is full rank noise; against the change alone it would count.
    generator = torch.Generator().manual_seed(0)
    W = 1000 * torch.randn(20, 20, generator=generator)
    change = torch.outer(*torch.randn(2, 20, generator=generator))
    found = rank.spectrum(W, W + change)
    assert found.rank == 1
    assert found.singular_values[1] > 20 * torch.finfo(torch.float32).eps * found.singular_values[0]


def test_bad_weights_are_refused() -> None:
    W = torch.ones(3, 4)
    with pytest.raises(ValueError, match="one shape"):
        rank.spectrum(W, W.T)
    with pytest.raises(ValueError, match="not finite"):
        rank.spectrum(W, W * float("nan"))


@pytest.mark.parametrize(("update_ratio", "bound"), [(0.0, 2), (2.0, 4)])
def test_a_trained_model_has_the_rank_of_the_algebra(update_ratio: float, bound: int) -> None:
    model = build64()
    originals = similarity.snapshot(model, None)
    method = DeltaLora(
        rank=2, alpha=4, learning_rate=0.01, update_ratio=update_ratio, start_step=1,
        form="in_place",
    )  # fmt: skip
    method.inject(model, **KEYS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(5):
        optimizer.zero_grad()
        loss(model, step).backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
    with method.merged(model) as merged:
        found = rank.spectra(originals, merged)
    assert set(found) == set(CASES["gpt2"].names)
    assert {one.rank for one in found.values()} == {bound}


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", list(gradients.LOSSES))
def test_the_gradients_agree_without_dropout_and_differ_with(name: str) -> None:
    worst = {}
    for dropout in (0.0, 0.2):
        model = build64()
        Lora(rank=3, alpha=5, dropout=dropout, learning_rate=0.1).inject(model, **KEYS)
        for n, p in model.named_parameters():
            if n.endswith("lora_B"):
                nn.init.normal_(p, std=0.1)
        model.train()
        ids = tokens(0)

        def forward(model: nn.Module = model, ids: torch.Tensor = ids) -> torch.Tensor:
            out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            return gradients.LOSSES[name](out.logits, out.hidden_states[-1], ids)

        torch.manual_seed(0)
        gaps = gradients.gradient_gaps(model, forward)
        assert list(gaps) == list(CASES["gpt2"].names)
        worst[dropout] = max(gaps.values())
        assert not any(p.grad is not None for p in model.parameters())
        assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
        forward()  # the branches run on their own factors again
    assert worst[0.0] < 1e-12
    assert worst[0.2] > 1e-2


def test_a_model_without_branches_has_no_gap() -> None:
    model = build64()
    with pytest.raises(ValueError, match="no low-rank branch"):
        gradients.gradient_gaps(model, lambda: loss(model, 0))


# ---------------------------------------------------------------------- equivalence

ADAM = {"optimizer": "adamw", "learning_rate": 1e-2, "options": {"eps": 1e-16, "weight_decay": 0.0}}
SGD = {"optimizer": "sgd", "learning_rate": 1e-1}


def compare(**changes: object) -> equivalence.Divergence:
    values = {"steps": 12, "rank": 2, "alpha": 4, "update_ratio": 2.0, "start_step": -1, **changes}
    return equivalence.compare(build64, loss, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("start_step", [-1, 0, 4])
def test_adam_makes_delta_lora_the_scaled_lora(start_step: int) -> None:
    found = compare(**ADAM, start_step=start_step)
    assert found.relative < 1e-6
    assert found.moved > 1e-3


def test_a_large_epsilon_and_sgd_tell_them_apart() -> None:
    options = {"eps": 1e-3, "weight_decay": 0.0}
    assert compare(**{**ADAM, "options": options}).relative > 1e-3
    assert compare(**SGD).relative > 1e-2


def test_sgd_at_the_divided_rate_and_lion_agree() -> None:
    assert compare(**SGD, learning_rate_factor=1 / 3).relative < 1e-6
    assert compare(optimizer="lion", learning_rate=1e-3).relative < 1e-6


def test_clipping_breaks_it_where_another_module_trains() -> None:
    found = compare(**ADAM, max_grad_norm=1e-3, head=("transformer.ln_f",))
    assert found.num_clipped == 12
    assert found.relative > 1e-4
    assert compare(**ADAM, head=("transformer.ln_f",)).relative < 1e-6


def test_lion_is_the_program_of_its_paper() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    lion = equivalence.Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    w, m = p.detach().clone(), torch.zeros(2)
    for gradient in (torch.tensor([1.0, -3.0]), torch.tensor([-0.05, 4.0])):
        p.grad = gradient
        lion.step()
        w = w - 0.1 * (torch.sign(0.9 * m + 0.1 * gradient) + 0.5 * w)
        m = 0.99 * m + 0.01 * gradient
        assert torch.allclose(p.detach(), w)


def test_bad_settings_of_a_comparison_are_named() -> None:
    with pytest.raises(ValueError, match="adamw"):
        compare(optimizer="adma", learning_rate=0.1)
    with pytest.raises(ValueError, match="steps"):
        compare(**ADAM, steps=0)
    with pytest.raises(ValueError, match="start_step"):
        compare(**ADAM, start_step=-2)


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("form", precision.FORMS)
def test_only_the_rounded_form_loses_the_update(form: str) -> None:
    errors = precision.change_errors(
        CASES["gpt2"].model,
        loss,
        form=form,
        steps=6,
        every=2,
        rank=2,
        alpha=4,
        learning_rate=1e-4,
        update_ratio=2.0,
        start_step=0,
        make_optimizer=torch.optim.AdamW,
    )
    assert [step for step, _ in errors] == [2, 4, 6]
    if form == "in_place_rounded":
        assert errors[-1][1] > 0.3
    else:
        assert errors[-1][1] < 1e-2


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form"):
        precision.change_errors(
            CASES["gpt2"].model, loss, form="bf16", steps=1, every=1, rank=1, alpha=1,
            learning_rate=1.0, update_ratio=1.0, start_step=0, make_optimizer=torch.optim.AdamW,
        )  # fmt: skip


# ---------------------------------------------------------------------- memory

LOW = {"kind": "low_rank", "rank": 2, "forward_rank": 2}
CLOSED = {**LOW, "forward_rank": 4, "kept_factors": 1}


def _delta(form: str) -> DeltaLora:
    return DeltaLora(rank=2, alpha=4, learning_rate=0.1, update_ratio=2.0, start_step=-1, form=form)


@pytest.mark.parametrize(
    ("method", "adaptation", "optimizer"),
    [
        (lambda: Full(learning_rate=0.1), {"kind": "full"}, torch.optim.AdamW),
        (lambda: Full(learning_rate=0.1), {"kind": "full", "states": 0}, torch.optim.SGD),
        (lambda: Lora(rank=2, alpha=4, dropout=0.0, learning_rate=0.1), LOW, torch.optim.AdamW),
        (
            lambda: Lora(rank=2, alpha=4, dropout=0.1, learning_rate=0.1),
            {**LOW, "dropout": True},
            torch.optim.AdamW,
        ),
        (lambda: _delta("in_place"), {**LOW, "kept_factors": 2}, torch.optim.AdamW),
        (lambda: _delta("closed_form"), CLOSED, torch.optim.AdamW),
    ],
    ids=["full", "full_sgd", "lora", "lora_dropout", "in_place", "closed_form"],
)
def test_the_formula_equals_the_count(method, adaptation, optimizer) -> None:
    torch.manual_seed(0)
    model, chosen = gpt2(activation_function="gelu_pytorch_tanh").train(), method()
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    model.config.attn_pdrop = 0.0
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.0
    chosen.inject(model, **KEYS)
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = tokens(0, batch=3)

    def forward() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return gradients.cross_entropy(logits, logits, ids)

    found = memory_model.measure_step(model, chosen, optimizer(trained, lr=0.1), forward)
    config = model.config
    shape = memory_model.Shape(
        width=WIDTH, num_layers=config.n_layer, num_heads=config.n_head, vocabulary=VOCABULARY,
        num_positions=config.n_positions, batch=3, length=LENGTH,
    )  # fmt: skip
    expected = memory_model.expected_memory(shape, memory_model.Adaptation(**adaptation))
    for category in memory_model.CATEGORIES:
        assert found[category] == expected[category], category
    assert found["peak"] > found["weights"] + found["optimizer"]


def test_living_bytes_are_those_that_are_alive() -> None:
    with memory_model.LiveBytes() as counter:
        a = torch.ones(100)
        b = a + a
        view = b.view(10, 10)
        del b
        assert counter.live == 800
        del view
        assert counter.live == 400
        a.add_(1)
        assert counter.peak == 800


def test_bad_settings_of_the_formula_are_named() -> None:
    shape = memory_model.Shape(16, 1, 2, 29, 32, 2, 4)
    with pytest.raises(ValueError, match="kind"):
        memory_model.expected_memory(shape, memory_model.Adaptation("lora"))
    model = build64()
    with pytest.raises(ValueError, match="warm_up_steps"):
        memory_model.measure_step(
            model, Full(learning_rate=1.0), torch.optim.SGD(model.parameters(), lr=1.0),
            lambda: loss(model, 0), warm_up_steps=0,
        )  # fmt: skip
