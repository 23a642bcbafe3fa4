"""Our LoRA and AdaLoRA equal PEFT's on models where both apply: separate query and value layers."""

import re

import peft
import pytest
import torch
from torch import nn

from delta_lora.methods.adalora import AdaLora
from delta_lora.methods.lora import Lora
from tests.contract.models import CASES, inject, inputs, logits

NUM_STEPS = 50
F64 = torch.float64
TARGETS = {
    "roberta": ["query", "value"],
    "bart": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
}
every_model = pytest.mark.parametrize("name", TARGETS)


def our_name(theirs):
    """Translate PEFT's parameter name into ours.

    ``base_model.model.bert.query.lora_A.default(.weight)`` is ``bert.query.query.lora_A`` here.
    """
    layer, leaf = re.fullmatch(
        r"(?:base_model\.model\.)?(.*)\.(lora_[ABE])\.default(?:\.weight)?", theirs
    ).groups()
    last = layer.rpartition(".")[2]
    return f"{layer}.{ {'q_proj': 'query', 'v_proj': 'value'}.get(last, last) }.{leaf}"


def pair(ours, theirs):
    """Return (ours, theirs) for every adapter parameter."""
    own = dict(ours.named_parameters())
    pairs = {
        our_name(name): (own[our_name(name)], p)
        for name, p in theirs.named_parameters()
        if "lora_" in name
    }
    assert set(pairs) == {name for name in own if "lora_" in name}
    return pairs


def copy_factors(ours, theirs, seed=0):
    """Give both models the same random factors, B (and E) included, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own, other in pair(ours, theirs).values():
            own.copy_(torch.randn(own.shape, generator=generator, dtype=F64) * 0.1)
            other.copy_(own)


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def both_lora(name, dropout=0.0):
    case = CASES[name]
    method = Lora(rank=3, alpha=5, dropout=dropout, learning_rate=1e-2)
    ours = inject(method, case.model(dtype=F64), case)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, lora_dropout=dropout, target_modules=TARGETS[name],
        modules_to_save=list(case.head) or None,
    )  # fmt: skip
    theirs = peft.get_peft_model(case.model(dtype=F64), config)
    copy_factors(ours, theirs)
    return method, ours, theirs


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@every_model
def test_lora_forward_gradients_and_merge(name):
    method, ours, theirs = both_lora(name)
    assert sum(p.numel() for p in trainable(ours)) == sum(p.numel() for p in trainable(theirs))
    batch = inputs(CASES[name].model())
    close(logits(ours, batch), theirs(**batch).logits)
    loss(ours, batch).backward()
    theirs(**batch).loss.backward()
    for own, other in pair(ours, theirs).values():
        assert own.grad.abs().max() > 0
        close(own.grad, other.grad)
    merged = theirs.merge_and_unload()
    with method.merged(ours):
        close(logits(ours, batch), logits(merged, batch))
        close(
            torch.cat([p.flatten() for p in ours.parameters()]),
            torch.cat([p.flatten() for p in merged.parameters()]),
        )


@every_model
def test_lora_dropout_draws_the_same_masks(name):
    _, ours, theirs = both_lora(name, dropout=0.3)
    batch = inputs(CASES[name].model())
    ours.train()
    theirs.train()
    torch.manual_seed(0)
    own = logits(ours, batch)
    torch.manual_seed(0)
    close(own, theirs(**batch).logits)


@every_model
def test_lora_trajectory(name):
    _, ours, theirs = both_lora(name)
    ours_step = optimiser(ours)
    theirs_step = optimiser(theirs)
    for step in range(NUM_STEPS):
        batch = inputs(CASES[name].model(), step)
        ours_step(loss(ours, batch))
        theirs_step(theirs(**batch).loss)
    start = CASES[name].model(dtype=F64).state_dict()
    for own, other in pair(ours, theirs).values():
        close(own, other, 1e-9)
    assert all(
        torch.equal(tensor, start[n.replace(".base_layer", "")])
        for n, tensor in ours.state_dict().items()
        if ".base_layer" in n
    )


def loss(model, batch):
    """Return the loss as transformers computes it, which PEFT's models return too."""
    return model(**batch).loss


def optimiser(model):
    """Return a function that backpropagates a loss and steps AdamW (lr 1e-2, decay 0.1)."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)

    def step(total, after=lambda: None):
        total.backward()
        optimizer.step()
        after()
        optimizer.zero_grad()

    return step


TOTAL, T_INIT, T_FINAL, INTERVAL = NUM_STEPS, 5, 10, 4
BETA1, BETA2 = 0.85, 0.75


def both_adalora(name):
    case = CASES[name]
    method = AdaLora(
        init_rank=4, target_rank=2, alpha=6, dropout=0.0, learning_rate=1e-2,
        orth_reg_weight=0.3, initial_fraction=T_INIT / TOTAL, final_fraction=T_FINAL / TOTAL,
        interval=INTERVAL, beta1=BETA1, beta2=BETA2,
    )  # fmt: skip
    ours = inject(method, case.model(dtype=F64), case, total_steps=TOTAL)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, lora_dropout=0.0, orth_reg_weight=0.3,
        tinit=T_INIT, tfinal=T_FINAL, deltaT=INTERVAL, beta1=BETA1, beta2=BETA2,
        total_step=TOTAL, target_modules=TARGETS[name], modules_to_save=list(case.head) or None,
    )  # fmt: skip
    theirs = peft.get_peft_model(case.model(dtype=F64), config)
    for parameter_name, parameter in theirs.named_parameters():
        if ".ranknum." in parameter_name:  # a constant of the method that PEFT leaves trainable
            parameter.requires_grad_(False)
    copy_factors(ours, theirs)
    return method, ours, theirs


@every_model
def test_adalora_forward_gradients_and_regulariser(name):
    method, ours, theirs = both_adalora(name)
    batch = inputs(CASES[name].model())
    close(logits(ours, batch), theirs(**batch).logits)
    own = loss(ours, batch) + method.extra_loss()
    other = theirs.base_model(**batch).loss  # PEFT adds the regulariser in this forward
    # Llama's loss is float32 in a float64 model, and PEFT adds in place
    close(own.to(other.dtype), other, 1e-11 if other.dtype == F64 else 1e-6)
    assert method.extra_loss() > 0.1
    own.backward()
    other.backward()
    for own_p, other_p in pair(ours, theirs).values():
        assert own_p.grad.abs().max() > 0
        close(own_p.grad, other_p.grad)


@every_model
def test_adalora_trajectory_masks_and_ranks(name):
    """Equal in all steps: T - t_final is a multiple of the interval, where PEFT does not depart."""
    method, ours, theirs = both_adalora(name)
    ours_step, theirs_step = optimiser(ours), optimiser(theirs)
    num_masks, is_uneven = 0, False
    for step in range(TOTAL):
        batch = inputs(CASES[name].model(), step)
        ours_step(loss(ours, batch) + method.extra_loss(), lambda s=step: method.after_step(s))
        theirs_step(
            theirs.base_model(**batch).loss,
            lambda s=step: theirs.base_model.update_and_allocate(s),
        )
        for key, (own, other) in pair(ours, theirs).items():
            close(own, other, 1e-9)
            if key.endswith("lora_E"):
                assert torch.equal(own == 0, other == 0)
        if method.budget(step) is not None:
            num_masks += 1
            ranks = method.describe()["rank_pattern"]
            pattern = theirs.peft_config["default"].rank_pattern
            assert ranks == {
                our_name(key).removesuffix(".lora_E"): sum(mask) for key, mask in pattern.items()
            }
            assert sum(ranks.values()) == method.budget(step)
            is_uneven |= len(set(ranks.values())) > 1
        if step == TOTAL - T_FINAL - 1:  # PEFT forgets its importances one step later
            compare_importance(method, theirs.base_model.rankallocator)
    assert num_masks == len(range(8, TOTAL - T_FINAL + 1, INTERVAL)) + T_FINAL - 1
    assert is_uneven, "the allocation is global, so projections differ in rank"


def compare_importance(method, allocator):
    state = method.state_dict()
    assert len(state) == 2 * len(allocator.exp_avg_ipt) + 1
    for kind, averages in (
        ("sensitivity", allocator.exp_avg_ipt),
        ("uncertainty", allocator.exp_avg_unc),
    ):
        for key, expected in averages.items():
            close(state[f"{kind}.{our_name(key)}"], expected, 1e-9)


def plain_final_mask(factors, sensitivity, uncertainty, target_rank):
    """Transcribe the final phase of the released code: mask to the target by frozen importance."""
    projections = sorted({name.rpartition(".")[0] for name in factors})
    scores = {}
    for projection in projections:
        A, B, E = (
            sensitivity[f"{projection}.{leaf}"] * uncertainty[f"{projection}.{leaf}"]
            for leaf in ("lora_A", "lora_B", "lora_E")
        )
        scores[projection] = [
            float(E[i, 0] + A[i].mean() + B[:, i].mean()) for i in range(A.shape[0])
        ]
    flat = sorted(score for row in scores.values() for score in row)
    threshold = flat[len(flat) - target_rank * len(projections) - 1]
    return {name: [score > threshold for score in row] for name, row in scores.items()}


def test_adalora_final_phase_is_the_released_codes():
    """After T - t_final the importance is frozen and the target budget is applied every step."""
    name = "roberta"
    method, ours, _ = both_adalora(name)
    step_once = optimiser(ours)
    for step in range(TOTAL):
        batch = inputs(CASES[name].model(), step)
        if step == TOTAL - T_FINAL:
            frozen = {key: tensor.clone() for key, tensor in method.state_dict().items()}
            assert step % INTERVAL == 0
        step_once(loss(ours, batch) + method.extra_loss(), lambda s=step: method.after_step(s))
        factors = {n: p for n, p in ours.named_parameters() if "lora_" in n}
        if step >= TOTAL - T_FINAL:
            state = method.state_dict()
            assert all(torch.equal(state[key], frozen[key]) for key in frozen if key != "num_steps")
            expected = plain_final_mask(
                factors,
                {n: frozen[f"sensitivity.{n}"] for n in factors},
                {n: frozen[f"uncertainty.{n}"] for n in factors},
                target_rank=2,
            )
            for projection, kept in expected.items():
                assert (factors[f"{projection}.lora_E"][:, 0] != 0).tolist() == kept
    assert method.describe()["mean_rank"] == 2
    method.finish(TOTAL)


def test_adalora_at_t_final_off_the_interval_waits_one_step():
    """PEFT masks at T - t_final in any case, the released code only where the interval says so."""
    method = AdaLora(
        init_rank=4, target_rank=2, alpha=6, dropout=0.0, learning_rate=1e-2,
        orth_reg_weight=0.0, initial_fraction=0.1, final_fraction=0.2, interval=7,
    )  # fmt: skip
    inject(method, CASES["roberta"].model(), CASES["roberta"], total_steps=50)
    assert method.budget(40) is None
    assert method.budget(41) == 2 * 2
    assert [step for step in range(50) if method.budget(step) is not None] == [
        7, 14, 21, 28, 35, *range(41, 50),
    ]  # fmt: skip


def test_adalora_budget_is_cubic_and_truncated():
    method, _, _ = both_adalora("llama")
    start, target = 2 * 4, 2 * 2
    assert method.budget(0) is None
    assert method.budget(T_INIT) is None
    for step in range(8, TOTAL - T_FINAL + 1, INTERVAL):
        share = 1 - (step - 5) / (50 - 10 - 5)
        assert method.budget(step) == int(target + (start - target) * share**3)
    assert method.budget(TOTAL - T_FINAL) == target


def test_adalora_scale_is_the_initial_ranks_for_ever():
    _, ours, _ = both_adalora("roberta")
    branch = ours.roberta.encoder.layer[0].attention.self.query.query
    assert branch.scaling == 6 / (4 + 1e-5)
    assert branch.lora_E.shape == (4, 1)


def test_adalora_starts_at_zero_from_normal_factors():
    method = AdaLora(
        init_rank=8, target_rank=4, alpha=6, dropout=0.0, learning_rate=1e-2,
        orth_reg_weight=0.1, initial_fraction=0.1, final_fraction=0.2, interval=1,
    )  # fmt: skip
    layer = nn.Sequential(nn.Linear(400, 300))
    method.inject(layer, projections=["0"], head=(), total_steps=10, seed=0)
    branch = layer[0].requires_grad_(False).output
    assert torch.count_nonzero(branch.lora_E) == 0
    assert branch.lora_A.std() == pytest.approx(0.02, rel=0.05)
    assert branch.lora_B.std() == pytest.approx(0.02, rel=0.05)


def test_adalora_without_a_weight_has_no_regulariser():
    method = AdaLora(
        init_rank=2, target_rank=1, alpha=6, dropout=0.0, learning_rate=1e-2,
        orth_reg_weight=0, initial_fraction=0.1, final_fraction=0.2, interval=1,
    )  # fmt: skip
    inject(method, CASES["mlp"].model(), CASES["mlp"])
    assert method.extra_loss() is None


def test_adalora_equal_budgets_mask_nothing():
    method = AdaLora(
        init_rank=2, target_rank=2, alpha=6, dropout=0.0, learning_rate=1e-2,
        orth_reg_weight=0.1, initial_fraction=0, final_fraction=0.2, interval=1,
    )  # fmt: skip
    case = CASES["roberta"]
    model = inject(method, case.model(), case)
    step_once = optimiser(model)
    for step in range(10):
        step_once(loss(model, inputs(model, step)), lambda s=step: method.after_step(s))
    assert set(method.describe()["rank_pattern"].values()) == {2}


@pytest.mark.parametrize(("initial", "final"), [(0.5, 0.5), (0.0, 0.96), (0.9, 0.2)])
def test_adalora_schedule_that_leaves_no_step(initial, final):
    method = AdaLora(
        init_rank=2, target_rank=1, alpha=6, dropout=0.0, learning_rate=1e-2,
        orth_reg_weight=0.1, initial_fraction=initial, final_fraction=final, interval=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="must be below the number of steps"):
        inject(method, CASES["mlp"].model(), CASES["mlp"], total_steps=10)


def test_adalora_hook_order_and_number():
    method, _, _ = both_adalora("roberta")
    with pytest.raises(RuntimeError, match=r"after_step\(3\) but 0 steps"):
        method.after_step(3)
    with pytest.raises(RuntimeError, match="ran 0 times in 5 steps"):
        method.finish(5)
