"""Delta-LoRA against a float64 transcription of Algorithm 1, its closed form, known mistakes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.methods.lora import Lora
from delta_lora.projections import find_projections
from tests.contract.models import CASES, TinyMlp, adamw, inject, inputs, loss, loss_of, train

F64 = torch.float64
LR, DECAY, RATIO, RANK, ALPHA = 1e-2, 0.1, 0.5, 2, 3
SCALING = ALPHA / RANK


def delta(**values):
    defaults = {
        "rank": RANK, "alpha": ALPHA, "learning_rate": LR, "update_ratio": RATIO, "start_step": 1,
        "form": "in_place",
    }  # fmt: skip
    return DeltaLora(**(defaults | values))


def branches(model):
    """Return (name of the projection, branch) in order."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def plain_slices(weights, projections):
    """Return the (out, in) part of every projection from plain weights by layer name."""
    out = {}
    for p in projections:
        weight = weights[f"{p.layer}.weight"]
        weight = weight.T if p.is_transposed else weight
        out[p.name] = weight[p.start : p.stop].clone()
    return out


def our_slices(model, projections):
    """Return the (out, in) part of every projection of an injected model."""
    state = model.state_dict()
    weights = {n.replace(".base_layer", ""): t for n, t in state.items()}
    return plain_slices(weights, projections)


def algorithm_1(case, start_A, *, num_steps, K, ratio=RATIO, num_micro=1, update=None):
    """Run Algorithm 1 as plainly as it can be written, on a model without our code.

    The forward pass is the plain model's on ``W + s B A``, assembled by autograd, and AdamW is
    written out. Yields (W, A, B) by projection name after every step.

    Args:
        case: the model.
        start_A: initial A by projection name; B starts at zero.
        num_steps: T.
        K: the update of W runs where t > K.
        ratio: lambda.
        num_micro: micro-batches of a step.
        update: another rule (A, B, A', B', t) -> change of W, to show that it differs.
    """
    model = case.model(dtype=F64).requires_grad_(False).train(False)
    projections = find_projections(model, case.projections, exclude=case.head)
    W = plain_slices(model.state_dict(), projections)
    A = {p.name: start_A[p.name].clone() for p in projections}
    B = {p.name: torch.zeros(p.num_outputs, RANK, dtype=F64) for p in projections}
    head = {n: p for n, p in model.named_parameters() if n.startswith(case.head or ("?",))}
    values = {("A", n): t for n, t in A.items()} | {("B", n): t for n, t in B.items()}
    values |= {("head", n): t.detach().clone() for n, t in head.items()}
    m = {k: torch.zeros_like(v) for k, v in values.items()}
    v = {k: torch.zeros_like(t) for k, t in values.items()}
    for t in range(num_steps):
        for tensor in values.values():
            tensor.requires_grad_(True)
        total = 0
        batch = inputs(model, t)
        for i in range(num_micro):
            weights = {n: values["head", n] for n in head}
            for layer in {p.layer: None for p in projections}:
                own = [p for p in projections if p.layer == layer]
                whole = model.get_parameter(f"{layer}.weight")
                whole = (whole.T if own[0].is_transposed else whole).clone()
                for p in own:
                    product = values["B", p.name] @ values["A", p.name]
                    whole[p.start : p.stop] = W[p.name] + SCALING * product
                weights[f"{layer}.weight"] = whole.T if own[0].is_transposed else whole
            part = {k: x[i::num_micro].contiguous() for k, x in batch.items()}
            total = total + functional_loss(model, weights, part) / num_micro
        gradients = torch.autograd.grad(total, list(values.values()))
        old = {k: tensor.detach().clone() for k, tensor in values.items()}
        new = {}
        for (k, tensor), g in zip(old.items(), gradients, strict=True):
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.999 * v[k] + 0.001 * g * g
            m_hat, v_hat = m[k] / (1 - 0.9 ** (t + 1)), v[k] / (1 - 0.999 ** (t + 1))
            new[k] = tensor - LR * DECAY * tensor - LR * m_hat / (v_hat.sqrt() + 1e-8)
        for p in projections:
            n = p.name
            A0, B0, A1, B1 = old["A", n], old["B", n], new["A", n], new["B", n]
            if update is not None:
                W[n] = W[n] + update(A0, B0, A1, B1, t)
            elif t > K:
                W[n] = W[n] + ratio * SCALING * (B1 @ A1 - B0 @ A0)
        values = new
        yield (
            {n: w.clone() for n, w in W.items()},
            {p.name: new["A", p.name] for p in projections},
            {p.name: new["B", p.name] for p in projections},
        )


def functional_loss(model, weights, batch):
    """Return the loss of `model` with some weights replaced."""
    call = torch.func.functional_call
    if isinstance(model, TinyMlp):
        scores = call(model, weights, (batch["input_ids"],))
    else:
        scores = call(model, weights, (), batch).logits
    return loss_of(model, scores, batch["labels"])


def run_ours(case, method, num_steps, num_micro=1, dtype=F64):
    """Train without dropout; return (model, slices of W after every step)."""
    model = inject(method, case.model(dtype=dtype), case, total_steps=num_steps)
    projections = find_projections(case.model(), case.projections, exclude=case.head)
    model.train = lambda mode=True: model  # the models' own dropout stays off
    start = {n: b.lora_A.detach().clone() for n, b in branches(model)}
    history = []
    for _ in train(method, model, num_steps, num_micro=num_micro, weight_decay=DECAY):
        factors = {
            n: (b.lora_A.detach().clone(), b.lora_B.detach().clone()) for n, b in branches(model)
        }
        history.append((our_slices(model, projections), factors))
    method.finish(num_steps)
    return model, start, history


@pytest.mark.parametrize("name", ["gpt2", "roberta", "bart", "mlp"])
@pytest.mark.parametrize("K", [-1, 0, 1, 5])
@pytest.mark.parametrize("num_micro", [1, 2])
def test_it_is_algorithm_1(name, K, num_micro):
    case = CASES[name]
    num_steps = 8
    _, start, ours = run_ours(case, delta(start_step=K), num_steps, num_micro)
    first = plain_slices(case.model(dtype=F64).state_dict(), find(case))
    plain = algorithm_1(case, start, num_steps=num_steps, K=K, num_micro=num_micro)
    for t, ((W, factors), (W_plain, A_plain, B_plain)) in enumerate(zip(ours, plain, strict=True)):
        for n in W:
            torch.testing.assert_close(W[n], W_plain[n], atol=1e-12, rtol=0)
            torch.testing.assert_close(factors[n][0], A_plain[n], atol=1e-11, rtol=0)
            torch.testing.assert_close(factors[n][1], B_plain[n], atol=1e-11, rtol=0)
            assert torch.equal(W[n], first[n]) == (t <= K), "t > K is strict, from zero"


def find(case):
    return find_projections(case.model(), case.projections, exclude=case.head)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama"])
@pytest.mark.parametrize("K", [-1, 3])
def test_the_updates_telescope(name, K):
    """Check the closed form: W_T - W_0 = lambda s (B_T A_T - B_k A_k), of rank 2r at most."""
    case = CASES[name]
    _, start, history = run_ours(case, delta(start_step=K), 10)
    first = plain_slices(case.model(dtype=F64).state_dict(), find(case))
    W_T, factors = history[-1]
    for n, (A_T, B_T) in factors.items():
        A_k, B_k = (start[n], torch.zeros_like(B_T)) if K < 0 else history[K][1][n]
        change = W_T[n] - first[n]
        expected = RATIO * SCALING * (B_T @ A_T - B_k @ A_k)
        torch.testing.assert_close(change, expected, atol=1e-13, rtol=0)
        assert change.abs().max() > 1e-4
        assert int((torch.linalg.svdvals(change) > 1e-12).sum()) <= 2 * RANK


@pytest.mark.parametrize(
    # Adam divides GPT-2's query gradients of 1e-9 by themselves, rounding noise included.
    ("name", "tolerance"),
    [("mlp", 1e-11), ("gpt2", 1e-7)],
)
def test_under_adam_from_the_first_step_it_is_lora_with_alpha_times_1_plus_lambda(name, tolerance):
    case = CASES[name]
    ours = delta(start_step=-1)
    scaled = Lora(rank=RANK, alpha=ALPHA * (1 + RATIO), dropout=0.0, learning_rate=LR)
    merged = []
    for method in (ours, scaled):
        model = inject(method, case.model(dtype=F64), case, total_steps=20)
        model.train = lambda mode=True, model=model: model
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0, eps=1e-16
        )
        for _ in train(method, model, 20, optimizer=optimizer):
            pass
        with method.merged(model):
            merged.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*merged, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "roberta", "bart"])
def test_ratio_zero_is_lora_without_dropout_to_the_bit(name):
    case = CASES[name]
    results = []
    for method in (
        delta(update_ratio=0, start_step=-1),
        Lora(rank=RANK, alpha=ALPHA, dropout=0.0, learning_rate=LR),
    ):
        model = inject(method, case.model(), case)
        for _ in train(method, model, 6):
            pass
        method.finish(6)
        results.append((model.state_dict(), method))
    (ours, zero), (lora, _) = results
    assert list(ours) == list(lora)
    assert all(torch.equal(tensor, lora[n]) for n, tensor in ours.items())
    assert zero.num_updatable_parameters == 0
    assert zero.describe() == {"num_weight_updates": 0, "first_weight_update_step": None}


class TestKnownMistakes:
    """Each mistake of the public re-implementations must give another W than ours."""

    @pytest.mark.parametrize(
        ("mistake", "update"),
        [
            ("product of differences", lambda A, B, A1, B1: RATIO * SCALING * (B1 - B) @ (A1 - A)),
            ("alpha / r missing", lambda A, B, A1, B1: RATIO * (B1 @ A1 - B @ A)),
            ("lambda missing", lambda A, B, A1, B1: SCALING * (B1 @ A1 - B @ A)),
            ("lambda as int", lambda A, B, A1, B1: int(RATIO) * SCALING * (B1 @ A1 - B @ A)),
            ("sign of equation 5", lambda A, B, A1, B1: -RATIO * SCALING * (B1 @ A1 - B @ A)),
        ],
    )
    def test_a_wrong_formula_differs(self, mistake, update):
        case = CASES["gpt2"]
        _, start, ours = run_ours(case, delta(start_step=-1), 3)
        wrong = algorithm_1(
            case, start, num_steps=3, K=-1, update=lambda A, B, A1, B1, t: update(A, B, A1, B1)
        )
        right = algorithm_1(case, start, num_steps=3, K=-1)
        W_ours, W_wrong, W_right = ours[-1][0], list(wrong)[-1][0], list(right)[-1][0]
        for n in W_ours:
            assert (W_ours[n] - W_right[n]).abs().max() < 1e-12
            assert (W_ours[n] - W_wrong[n]).abs().max() > 1e-4, mistake

    @pytest.mark.parametrize("K", [-1, 2])
    def test_the_first_delta_is_not_lost(self, K):
        """A snapshot that starts at the first update loses the delta of step K + 1."""
        case = CASES["gpt2"]
        _, _, history = run_ours(case, delta(start_step=K), K + 2)
        first = plain_slices(case.model(dtype=F64).state_dict(), find(case))
        for n, W in history[-1][0].items():
            assert not torch.equal(W, first[n])

    def test_k_zero_does_not_switch_the_update_off(self):
        method = delta(start_step=0)
        run_ours(CASES["gpt2"], method, 3)
        assert method.describe() == {"num_weight_updates": 2, "first_weight_update_step": 1}

    def test_a_fractional_ratio_stays_fractional(self):
        assert delta(update_ratio=0.5).update_ratio == 0.5
        assert delta(update_ratio=2).update_ratio == 2.0

    def test_dropout_is_off(self):
        model = inject(delta(), CASES["gpt2"].model(), CASES["gpt2"]).train()
        layer = model.transformer.h[0].attn.c_attn
        assert isinstance(layer.dropout, torch.nn.Identity)
        with torch.no_grad():
            layer.query.lora_B.normal_()
        x = torch.randn(3, 16)
        assert torch.equal(layer(x), layer(x))

    def test_dropout_needs_the_ablations_consent(self):
        with pytest.raises(ValueError, match=r"dropout=0\.1 is not allowed in Delta-LoRA"):
            delta(dropout=0.1)
        assert delta(dropout=0.1, allow_dropout=True).dropout == 0.1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_narrow_base_is_refused(self, dtype):
        model = CASES["gpt2"].model(dtype=dtype)
        with pytest.raises(ValueError, match=r"c_attn\.weight is torch\.\w+16.*float32"):
            inject(delta(), model, CASES["gpt2"])

    def test_the_changed_weight_is_among_what_is_saved(self):
        case = CASES["gpt2"]
        method = delta()
        model = inject(method, case.model(), case)
        saved = method.updated_tensors(model)
        name = "transformer.h.0.attn.c_attn.base_layer.weight"
        assert saved[name] is model.get_parameter(name)
        assert saved[name].shape == (16, 48)

    def test_b_starts_at_zero_and_a_does_not(self):
        model = inject(delta(), CASES["gpt2"].model(), CASES["gpt2"])
        for _, branch in branches(model):
            assert torch.count_nonzero(branch.lora_B) == 0
            assert torch.count_nonzero(branch.lora_A) > 0


def test_w_has_no_gradient_no_optimiser_state_and_no_decay():
    case = CASES["gpt2"]
    method = delta(start_step=100)
    model = inject(method, case.model(), case, total_steps=200)
    start = model.transformer.h[0].attn.c_attn.weight.clone()
    optimizer = adamw(method, model, weight_decay=0.9)
    for _ in train(method, model, 3, optimizer=optimizer):
        weight = model.transformer.h[0].attn.c_attn.weight
        assert weight.grad is None
        assert not weight.requires_grad
    assert torch.equal(weight, start)
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(weight) not in in_optimizer


def test_key_rows_and_biases_of_the_fused_layer_do_not_move():
    case = CASES["gpt2"]
    method = delta(start_step=-1)
    model = inject(method, case.model(), case)
    layer = model.transformer.h[0].attn.c_attn
    weight, bias = layer.weight.clone(), layer.bias.clone()
    for _ in train(method, model, 4):
        pass
    assert torch.equal(layer.weight[:, 16:32], weight[:, 16:32])
    assert not torch.equal(layer.weight[:, :16], weight[:, :16])
    assert not torch.equal(layer.weight[:, 32:], weight[:, 32:])
    assert torch.equal(layer.bias, bias)


class Allocations(TorchDispatchMode):
    """Record every tensor that an operation creates, and every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out := kwargs.get("out"), torch.Tensor):
            known.add(out.untyped_storage().data_ptr())
        result = func(*args, **kwargs)
        self.operations.append(func.name())
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if storage.data_ptr() not in known:
                self.sizes.append(storage.nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_the_update_allocates_nothing_of_the_size_of_w(name):
    """One addmm_ a projection; the largest tensor made is a factor pair, and only once."""
    case = CASES[name]
    method = delta(start_step=-1, rank=1)
    model = inject(method, case.model(), case)
    for _ in train(method, model, 1):  # makes the buffers
        pass
    with Allocations() as seen:
        method.before_step(1)
        method.after_step(1)
    num_projections = len(case.names)
    assert [op for op in seen.operations if "mm" in op] == ["aten::addmm_"] * num_projections
    assert not seen.sizes, "the buffers are kept, so a step makes no tensor at all"
    with Allocations() as first:
        fresh = delta(start_step=-1, rank=1)
        inject(fresh, case.model(), case)
        del first.sizes[:]
        fresh.before_step(0)
        fresh.after_step(0)
    assert first.sizes
    assert max(first.sizes) < 16 * 16, "W_Q has 16 x 16 entries"


def test_the_fused_slice_is_written_without_a_hidden_copy():
    """A profile of the update shows no allocation inside addmm_ into a strided slice."""
    from torch.profiler import ProfilerActivity, profile

    weight = torch.randn(256, 768)
    left, right = torch.randn(256, 8), torch.randn(8, 256)
    view = weight.narrow(1, 512, 256)
    view.addmm_(left, right, alpha=0.5)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        view.addmm_(left, right, alpha=0.5)
    assert max(abs(event.self_cpu_memory_usage) for event in run.events()) < view.numel()


def test_a_skipped_step_does_not_count_and_leaves_no_trace():
    """A step whose gradients overflowed calls before_step only and is repeated."""
    case = CASES["gpt2"]
    results = []
    for skips in (False, True):
        method = delta(start_step=1)
        model = inject(method, case.model(dtype=F64), case)
        optimizer = adamw(method, model)
        for step in range(5):
            optimizer.zero_grad()
            if skips and step in (0, 3):
                loss(model, inputs(model, 99)).backward()
                method.before_step(step)
                optimizer.zero_grad()
            loss(model, inputs(model, step)).backward()
            method.before_step(step)
            optimizer.step()
            method.after_step(step)
        method.finish(5)
        assert method.describe()["num_weight_updates"] == 3
        results.append(model.state_dict())
    assert all(torch.equal(t, results[1][n]) for n, t in results[0].items())


class TestHooks:
    def test_missing_after_step_makes_the_run_void(self):
        method = delta()
        inject(method, CASES["mlp"].model(), CASES["mlp"])
        with pytest.raises(RuntimeError, match="ran 0 times in 4 steps"):
            method.finish(4)

    def test_missing_before_step(self):
        method = delta(start_step=-1)
        inject(method, CASES["mlp"].model(), CASES["mlp"])
        with pytest.raises(RuntimeError, match=r"without before_step\(0\)"):
            method.after_step(0)

    def test_after_step_twice_for_one_step(self):
        method = delta(start_step=5)
        inject(method, CASES["mlp"].model(), CASES["mlp"])
        method.after_step(0)
        with pytest.raises(RuntimeError, match="1 steps were applied so far"):
            method.after_step(0)

    @pytest.mark.parametrize("K", [9, 10, 5000])
    def test_an_update_that_never_fires_is_warned_about(self, K, caplog):
        with caplog.at_level(logging.WARNING, logger="delta_lora"):
            inject(delta(start_step=K), CASES["mlp"].model(), CASES["mlp"], total_steps=10)
        assert "never fires" in caplog.text

    def test_no_warning_where_it_fires(self, caplog):
        with caplog.at_level(logging.WARNING, logger="delta_lora"):
            inject(delta(start_step=8), CASES["mlp"].model(), CASES["mlp"], total_steps=10)
        assert not caplog.text
