"""The closed form of Delta-LoRA: the values and gradients of `in_place`, and W never written."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from delta_lora.analysis import similarity
from delta_lora.low_rank import LowRankLinear
from delta_lora.methods.delta_lora import ClosedFormBranch, DeltaLora
from delta_lora.methods.lora import Lora
from tests.choices import first, firsts
from tests.contract.models import CASES, inject, inputs, logits, loss, train

F64 = torch.float64
ROOT = Path(__file__).parents[2]
FAMILIES = ("roberta", "gpt2", "bart", "llama", "vit")


def delta(form, **values):
    defaults = {
        "rank": 2, "alpha": 3, "learning_rate": 1e-2, "update_ratio": 2.0, "start_step": 1,
    }  # fmt: skip
    return DeltaLora(form=form, **(defaults | values))


def fit(method, model, num_steps, *, num_micro=2):
    """Train with accumulation, weight decay, clipping and a schedule; return the losses."""
    optimizer = torch.optim.AdamW(
        [p for group in method.param_groups(model) for _, p in group["params"]],
        lr=method.learning_rate,
        weight_decay=0.1,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / 10, 1 - t / (num_steps + 1))
    )
    losses = []
    for step in range(num_steps):
        batch = inputs(model, step)
        for i in range(num_micro):
            part = {name: x[i::num_micro].contiguous() for name, x in batch.items()}
            total = loss(model, part) / num_micro
            total.backward()
            losses.append(float(total.detach()))
        trained = [p for p in model.parameters() if p.requires_grad]
        nn.utils.clip_grad_norm_(trained, 0.5)
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        schedule.step()
        optimizer.zero_grad()
    method.finish(num_steps)
    return losses


def merged_weights(method, model):
    with method.merged(model):
        return {n: p.detach().clone() for n, p in model.named_parameters()}


def random_factors(model, seed=0):
    """Give every B values, so that no product is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32))


@pytest.mark.parametrize(
    ("name", "K"),
    firsts(
        [("roberta", 0), ("gpt2", 1), ("bart", 50), ("vit", 0)]
        + [(name, K) for name in FAMILIES for K in (-1, 50) if (name, K) != ("bart", 50)],
        4,
    ),
)
def test_it_equals_in_place_over_200_steps(name, K):
    case = CASES[name]
    runs = []
    for form in ("in_place", "closed_form"):
        method = delta(form, start_step=K)
        model = inject(method, case.model(dtype=F64), case, total_steps=200)
        losses = fit(method, model, 200, num_micro=1 + (K > 0))
        runs.append((losses, merged_weights(method, model)))
    (losses, weights), (closed_losses, closed_weights) = runs
    assert losses == pytest.approx(closed_losses, abs=1e-10, rel=0)
    assert list(weights) == list(closed_weights)
    for n, weight in weights.items():
        torch.testing.assert_close(closed_weights[n], weight, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_w_is_never_written(name):
    case = CASES[name]
    method = delta("closed_form", start_step=-1)
    model = inject(method, case.model(), case)
    start = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    assert start
    fit(method, model, 4)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in start.items())
    assert not any("base_layer" in n for n in method.updated_tensors(model))


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_values_and_every_gradient_equal_those_of_in_place(name):
    """A, B, x, through several layers, where no factor is zero."""
    case = CASES[name]
    gradients = []
    for form in ("in_place", "closed_form"):
        method = delta(form, start_step=-1)
        model = inject(method, case.model(dtype=F64), case)
        random_factors(model)
        fit(method, model, 3)
        embeddings = model.get_input_embeddings().weight.requires_grad_(True)
        loss(model, inputs(model, 9)).backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append((logits(model, inputs(model, 9)).detach(), embeddings.grad, named))
    (values, x_grad, named), (closed_values, closed_x_grad, closed_named) = gradients
    torch.testing.assert_close(closed_values, values, atol=1e-12, rtol=0)
    torch.testing.assert_close(closed_x_grad, x_grad, atol=1e-12, rtol=0)
    assert list(named) == list(closed_named)
    for n, gradient in named.items():
        torch.testing.assert_close(closed_named[n], gradient, atol=1e-12, rtol=0)


def test_gradients_of_a_and_b_carry_no_lambda_and_that_of_x_does():
    """One layer by hand: the wrong formulas (lambda in all, lambda in none) differ."""
    layer, x = _active_layer()
    branch = layer.branches[0]
    A, B, A_k, B_k = (t.detach() for t in (branch.lora_A, branch.lora_B, branch.kept_A,
                                           branch.kept_B))  # fmt: skip
    s, ratio, W = branch.scaling, branch.update_ratio, layer.weight.detach()
    x = x.requires_grad_(True)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    W_now = W + ratio * s * (B @ A - B_k @ A_k)
    torch.testing.assert_close(y.detach(), F.linear(x, W_now + s * B @ A, layer.bias).detach())
    torch.testing.assert_close(x.grad, g @ (W_now + s * B @ A))
    torch.testing.assert_close(branch.lora_A.grad, s * (g @ B).T @ x.detach())
    torch.testing.assert_close(branch.lora_B.grad, s * g.T @ (x.detach() @ A.T))
    assert branch.kept_A.grad is None
    assert branch.kept_B.grad is None


def _active_layer():
    method = delta("closed_form", start_step=-1)
    case = CASES["mlp"]
    model = inject(method, case.model(dtype=F64), case)
    random_factors(model)
    fit(method, model, 2)
    layer = model.layers[0]
    assert layer.branches[0].is_active
    model.zero_grad()
    return layer, torch.randn(5, 16, dtype=F64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_restored_run_continues_to_the_bit(name, stop):
    """Before and after the first update, which is at step 2."""
    case = CASES[name]
    straight = delta("closed_form")
    model = inject(straight, case.model(), case)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    states = {}
    for step in train(straight, model, 6, optimizer=optimizer):
        if step + 1 == stop:
            tensors = {n: t.detach().clone() for n, t in straight.updated_tensors(model).items()}
            states = (tensors, straight.state_dict(), copy.deepcopy(optimizer.state_dict()))
    resumed = delta("closed_form")
    other = inject(resumed, case.model(), case)
    with torch.no_grad():
        for n, tensor in resumed.updated_tensors(other).items():
            tensor.copy_(states[0][n])
    resumed.load_state_dict(states[1])
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    optimizer.load_state_dict(states[2])
    for _ in train(resumed, other, 6 - stop, optimizer=optimizer, first_step=stop):
        pass
    resumed.finish(6)
    for n, p in model.named_parameters():
        assert torch.equal(other.get_parameter(n), p), n


@pytest.mark.parametrize("ratio_or_start", [{"update_ratio": 0}, {"start_step": 50}])
def test_without_an_update_it_is_lora_to_the_bit(ratio_or_start):
    case = CASES["gpt2"]
    lora = Lora(rank=2, alpha=3, dropout=0.0, learning_rate=1e-2)
    results = []
    for method in (delta("closed_form", **ratio_or_start), lora):
        model = inject(method, case.model(), case, total_steps=100)
        for _ in train(method, model, 5):
            pass
        results.append({n: p for n, p in model.named_parameters() if "kept" not in n})
    ours, plain = results
    assert list(ours) == list(plain)
    assert all(torch.equal(p, plain[n]) for n, p in ours.items())


@torch.no_grad()
def _change(form, base_dtype, *, rounds=False):
    """Return the change of the first layer after 30 steps from a base of bfloat16 values.

    `rounds` stores W as bfloat16 would after every update in place.
    """
    case = CASES["mlp"]
    base = case.model().to(torch.bfloat16)
    model = copy.deepcopy(base).to(base_dtype)
    method = delta(form, start_step=0, learning_rate=2e-5)
    inject(method, model, case, total_steps=30)
    layer = model.layers[0]
    with torch.enable_grad():
        for _ in train(method, model, 30, weight_decay=0.0):
            if rounds:
                layer.weight.data.copy_(layer.weight.data.bfloat16())
    change = layer.branches[0].delta_weight().float()
    return change + layer.weight.float() - base.layers[0].weight.float()


def test_over_a_bfloat16_base_it_follows_the_float32_trajectory():
    """Where W written in place loses most of the update (paper: learning rate 2e-5, lambda 2)."""
    reference = _change("in_place", torch.float32)

    def error(change):
        return float((change - reference).norm() / reference.norm())

    assert error(_change("closed_form", torch.bfloat16)) < 0.05
    assert error(_change("in_place", torch.float32, rounds=True)) > 0.3
    with pytest.raises(ValueError, match="form=closed_form"):
        _change("in_place", torch.bfloat16)


class FakeQuantisedLinear(nn.Linear):
    """A linear layer with an int8 weight and a scale per output; has a forward and nothing else."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        scale = plain.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        del self.weight
        self.register_buffer("scale", scale)
        self.register_buffer("weight", torch.round(plain.weight.detach() / scale).to(torch.int8))
        self.bias = plain.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_a_quantised_base_needs_only_a_forward_pass():
    """The run equals `in_place` on the weights that the quantised ones stand for."""
    case = CASES["mlp"]
    quantised, plain = case.model(), case.model()
    for index in (0, 2):
        layer = FakeQuantisedLinear(quantised.layers[index])
        quantised.layers[index] = layer
        plain.layers[index].weight.data = layer.weight * layer.scale
    losses = []
    for form, model in (("in_place", plain), ("closed_form", quantised)):
        method = delta(form)
        inject(method, model, case)
        losses.append(fit(method, model, 10))
        assert similarity.snapshot(case.model(), case.projections)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    with method.merged(quantised) as same:
        assert isinstance(same.layers[0], LowRankLinear), "runs with its branches"
    assert quantised.layers[0].base_layer.weight.dtype == torch.int8
    fresh = CASES["mlp"].model()
    fresh.layers[0] = FakeQuantisedLinear(fresh.layers[0])
    assert similarity.snapshot(fresh, ["layers.0"]) == []


def test_a_4_bit_base_of_bitsandbytes():
    """The run equals `in_place` on the weights that the 4-bit ones stand for."""
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    quantised, plain = (
        nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in "ab"
    )
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(quantised[2].state_dict())
    quantised[2] = layer.to("cpu")
    plain.load_state_dict({n: p for n, p in quantised.state_dict().items() if n[0] == "0"}, False)
    plain[2].bias = copy.deepcopy(layer.bias)
    plain[2].weight.data = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    x, y = torch.randn(32, 16), torch.randn(32, 64)
    results = []
    for form, model in (("in_place", plain), ("closed_form", quantised)):
        method = delta(form)
        method.inject(model, projections=["2"], head=(), total_steps=10, seed=0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(10):
            total = F.mse_loss(model(x), y)
            total.backward()
            losses.append(float(total.detach()))
            method.before_step(step)
            optimizer.step()
            method.after_step(step)
            optimizer.zero_grad()
        results.append(losses)
    assert results[0] == pytest.approx(results[1], abs=1e-4)
    assert results[0][-1] < results[0][0]
    assert layer.weight.dtype == torch.uint8


def test_similarity_of_a_model_that_is_not_merged_counts_the_branch():
    case = CASES["gpt2"]
    model = case.model(dtype=torch.bfloat16)
    before = similarity.snapshot(model, None)
    method = delta("closed_form", start_step=-1)
    inject(method, model, case)
    random_factors(model)
    fit(method, model, 3)
    with method.merged(model) as same:
        found = similarity.cosine_similarities(before, same)
    for original in before:
        layer = model.get_submodule(original.projection.layer)
        branch = next(b for b in layer.branches if b.projection == original.projection)
        after = original.weight.float() + branch.delta_weight().detach().T
        expected = F.cosine_similarity(original.weight.float().flatten(), after.flatten(), dim=0)
        assert found[original.projection.name] == pytest.approx(float(expected), abs=1e-5)
        assert found[original.projection.name] < 0.9999


def test_gradient_checkpointing_changes_nothing():
    results = []
    for use in (False, True):
        case = CASES["llama"]
        model = case.model(dtype=F64)
        if use:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        method = delta("closed_form", start_step=0)
        inject(method, model, case)
        model.train()
        results.append((fit(method, model, 4), merged_weights(method, model)))
    (losses, weights), (other_losses, other_weights) = results
    assert losses == pytest.approx(other_losses, abs=1e-12)
    assert all(torch.allclose(other_weights[n], p, atol=1e-12) for n, p in weights.items())


def test_compiled_it_gives_the_same_and_compiles_twice():
    """Once as LoRA, once more when the update begins; not in every step."""
    case = CASES["roberta"]
    losses = []
    counter = CompileCounter()
    for is_compiled in (False, True):
        method = delta("closed_form", start_step=1)
        model = inject(method, case.model(dtype=F64), case)
        layer_path = "roberta.encoder.layer.0.attention.self.query"
        if is_compiled:
            layer = model.get_submodule(layer_path)
            layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
        losses.append(fit(method, model, 8))
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert counter.frame_count == 2


def test_under_autocast_to_bfloat16_it_stays_near_in_place():
    case = CASES["roberta"]
    results = []
    for form in ("in_place", "closed_form"):
        method = delta(form, start_step=0, learning_rate=1e-3)
        model = inject(method, case.model(), case)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(fit(method, model, 5))
    assert results[0] == pytest.approx(results[1], abs=2e-2)


@pytest.mark.parametrize("engine", first(["ddp", "fsdp"], 0))
@pytest.mark.slow
def test_two_processes_give_the_run_of_one(engine, tmp_path):
    """DDP and FSDP2 (A, B and the kept factors sharded) over gloo."""
    script = ROOT / "tests" / "contract" / "closed_form_two_processes.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"WORLD_SIZE": "2"}
    command = [sys.executable, str(script), engine, str(tmp_path / "out.safetensors")]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:  # one that waits for another that has failed
            process.kill()
    case = CASES["llama"]
    method = delta("closed_form", start_step=1)
    model = inject(method, case.model(dtype=F64), case)
    fit(method, model, 6)
    found = load_file(tmp_path / "out.safetensors")
    names = [n for n, p in model.named_parameters() if "kept" in n or p.requires_grad]
    assert sorted(names) == sorted(found)
    for n in names:
        torch.testing.assert_close(found[n], model.get_parameter(n).detach(), atol=1e-10, rtol=0)


def test_in_place_over_a_sharded_weight_is_refused():
    case = CASES["mlp"]
    method = delta("in_place", start_step=-1)
    model = inject(method, case.model(), case)
    model.layers[0].base_layer.weight = nn.Parameter(torch.zeros(7), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"sharded.*form=closed_form"):
        method.before_step(0)


def test_dropout_is_refused_even_with_consent():
    with pytest.raises(ValueError, match=r"form=closed_form with dropout=0\.1"):
        delta("closed_form", dropout=0.1, allow_dropout=True)


def test_what_is_saved_is_a_few_times_the_factors():
    case = CASES["gpt2"]
    method = delta("closed_form")
    model = inject(method, case.model(), case)
    names = {n.rpartition(".")[2] for n in method.updated_tensors(model)}
    assert names == {"lora_A", "lora_B", "kept_A", "kept_B"}
    branch = model.transformer.h[0].attn.c_attn.query
    assert isinstance(branch, ClosedFormBranch)


@pytest.mark.parametrize("name", CASES)
def test_both_forms_count_the_same_weights_as_updatable(name):
    case, counts = CASES[name], []
    for form in ("in_place", "closed_form"):
        method = delta(form)
        inject(method, case.model(), case)
        counts.append(method.num_updatable_parameters)
    assert counts[0] == counts[1] > 0
