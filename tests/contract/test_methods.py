"""The contract: every method in configs/method passes the same tests on every model."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._dynamo.testing import CompileCounter

from delta_lora.low_rank import LowRankLinear
from delta_lora.methods.adalora import AdaLora
from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.methods.dylora import DyLora
from delta_lora.methods.full import Full
from delta_lora.methods.full_frozen_embeddings import FullFrozenEmbeddings
from delta_lora.methods.full_query_value import FullQueryValue, SplitLinear
from delta_lora.methods.lora import Lora
from delta_lora.projections import token_embedding_parameters
from tests.contract.models import (
    CASES,
    CONFIGS,
    METHODS,
    RECIPE,
    adamw,
    gpt2,
    inject,
    inputs,
    logits,
    loss,
    method_from_config,
    train,
)

FULL = ("full", "full_frozen_embeddings", "full_query_value")
LOW_RANK = tuple(name for name in METHODS if name not in FULL)
every_method = pytest.mark.parametrize("name", METHODS)
every_low_rank = pytest.mark.parametrize("name", LOW_RANK)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_the_eleven_methods_are_configured():
    assert METHODS == [
        "adalora",
        "delta_lora",
        "delta_lora_dropout",
        "dylora",
        "full",
        "full_frozen_embeddings",
        "full_query_value",
        "lora",
        "lora_high_lr",
        "lora_no_dropout",
        "lora_scaled",
    ]


@every_method
def test_every_recipe_has_the_values_of_the_method(name):
    recipes = sorted((CONFIGS / "recipe").glob("*.yaml"))
    if name != "full":  # the one method that pre-trains the tiny models
        recipes = [path for path in recipes if not path.stem.startswith("pretrain_")]
    assert recipes
    for path in recipes:
        method_from_config(name, OmegaConf.load(path))


@every_method
@every_case
def test_nothing_changes_at_the_start(name, case):
    model = case.model()
    batch = inputs(model)
    before = logits(model, batch)
    inject(method_from_config(name), model, case)
    assert torch.equal(logits(model, batch), before)


def trainable_by_rule(name, case, model):
    """Names that must train, by the definition of the method."""
    plain = dict(model.named_parameters())
    head = {n for n in plain if n.startswith(tuple(f"{module}." for module in case.head))}
    if name == "full":
        return set(plain)
    if name == "full_frozen_embeddings":
        return set(plain) - set(token_embedding_parameters(model))
    layers = {n.rpartition(".")[0] for n in case.names}
    if name == "full_query_value":
        fused = "c_attn" in case.names[0]
        return head | (set(case.names) if fused else {f"{layer}.weight" for layer in layers})
    leaves = ("lora_A", "lora_B", "lora_E") if name == "adalora" else ("lora_A", "lora_B")
    return head | {f"{projection}.{leaf}" for projection in case.names for leaf in leaves}


@every_method
@every_case
def test_only_declared_weights_move(name, case):
    model = case.model()
    expected = trainable_by_rule(name, case, model)
    method = method_from_config(name)
    inject(method, model, case)
    groups = method.param_groups(model)
    assert {n for group in groups for n, _ in group["params"]} == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    changing = set(method.updated_tensors(model))
    written = changing - expected
    assert written == (
        {f"{n.rpartition('.')[0]}.base_layer.weight" for n in case.names}
        if name.startswith("delta_lora")
        else set()
    )
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    saved = model.state_dict()
    buffers = {n: b.clone() for n, b in model.named_buffers() if n in saved}
    for _ in train(method, model, 4):
        pass
    method.finish(4)
    same = {n for n, p in model.named_parameters() if torch.equal(p, start[n])}
    assert same == set(start) - changing
    assert all(torch.equal(model.get_buffer(n), b) for n, b in buffers.items())


@every_method
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_merged_equals_forward_and_restores(name, case, dtype):
    model = case.model(dtype=dtype)
    plain_names = [n for n, _ in model.named_parameters()]
    method = method_from_config(name)
    inject(method, model, case)
    for _ in train(method, model, 3, weight_decay=0.0):
        pass
    model.eval()
    batch = inputs(model, 77)
    before = logits(model, batch)
    start = copy.deepcopy(model.state_dict())
    with method.merged(model) as merged:
        assert merged is model
        assert sorted(n for n, _ in model.named_parameters()) == sorted(plain_names)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(logits(model, batch), before, atol=tolerance, rtol=tolerance)
    after = model.state_dict()
    assert list(after) == list(start)
    assert all(torch.equal(after[n], start[n]) for n in start)
    assert torch.equal(logits(model, batch), before)


@every_low_rank
def test_merged_is_undone_by_an_exception_and_keeps_the_mode(name):
    case = CASES["gpt2"]
    model = case.model()
    method = method_from_config(name)
    inject(method, model, case)
    for _ in train(method, model, 3):
        pass
    start = copy.deepcopy(model.state_dict())
    assert model.training

    def interrupted():
        with method.merged(model):
            model.eval()
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        interrupted()
    assert all(torch.equal(tensor, start[n]) for n, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    with (
        method.merged(model),
        pytest.raises(RuntimeError, match="merged already"),
        method.merged(model),
    ):
        pass


def snapshot(method, model, optimizer):
    return copy.deepcopy(
        (
            {n: t.detach() for n, t in method.updated_tensors(model).items()},
            method.state_dict(),
            optimizer.state_dict(),
        )
    )


@every_method
@every_case
def test_a_restored_run_continues_to_the_bit(name, case):
    straight, model = method_from_config(name), case.model()
    inject(straight, model, case)
    optimizer = adamw(straight, model)
    for _ in train(straight, model, 3, optimizer=optimizer):
        pass
    tensors, state, optimizer_state = snapshot(straight, model, optimizer)

    resumed, other = method_from_config(name), case.model()
    inject(resumed, other, case)
    with torch.no_grad():
        own = resumed.updated_tensors(other)
        assert list(own) == list(tensors)
        for tensor_name, tensor in own.items():
            tensor.copy_(tensors[tensor_name])
    resumed.load_state_dict(state)
    other_optimizer = adamw(resumed, other)
    other_optimizer.load_state_dict(optimizer_state)

    for _ in train(straight, model, 2, optimizer=optimizer, first_step=3):
        pass
    for _ in train(resumed, other, 2, optimizer=other_optimizer, first_step=3):
        pass
    straight.finish(5)
    resumed.finish(5)
    theirs = other.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in model.state_dict().items())
    assert straight.describe() == resumed.describe()


@every_low_rank
def test_the_seed_repeats_and_changes_the_start(name):
    case = CASES["gpt2"]

    def start(seed):
        model = inject(method_from_config(name), case.model(), case, seed=seed)
        return [p for n, p in model.named_parameters() if n.endswith("lora_A")]

    torch.manual_seed(5)
    first = start(0)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    again = start(0)
    assert torch.equal(torch.get_rng_state(), state), "inject must not draw from the global state"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, start(1), strict=True))
    assert not torch.equal(first[0], first[1])


def test_methods_of_one_seed_start_from_the_same_factors():
    case = CASES["gpt2"]
    names = [name for name in LOW_RANK if name != "adalora"]
    starts = []
    for name in names:
        model = inject(method_from_config(name), case.model(), case)
        starts.append({n: p for n, p in model.named_parameters() if "lora_" in n})
    for other in starts[1:]:
        assert list(other) == list(starts[0])
        assert all(torch.equal(p, other[n]) for n, p in starts[0].items())


def test_a_is_kaiming_and_b_is_zero():
    model = inject(
        Lora(rank=4, alpha=8, dropout=0.0, learning_rate=1.0),
        gpt2(n_embd=128),
        CASES["gpt2"],
    )
    branch = model.requires_grad_(False).transformer.h[0].attn.c_attn.query
    bound = (6 / ((1 + 5) * 128)) ** 0.5  # Kaiming uniform, a = sqrt 5, fan_in = in
    assert branch.lora_A.shape == (4, 128)
    assert branch.lora_A.abs().max() <= bound
    assert branch.lora_A.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert torch.count_nonzero(branch.lora_A) == branch.lora_A.numel(), "A and B both zero"
    assert torch.count_nonzero(branch.lora_B) == 0


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dylora"])
@pytest.mark.parametrize("case", [CASES["gpt2"], CASES["roberta"]], ids=["gpt2", "roberta"])
def test_accumulation_equals_one_batch(name, case):
    """DyLoRA is left out: it draws a rank for each micro-batch (see its own tests)."""

    def run(num_micro):
        method, model = method_from_config(name), case.model(dtype=torch.float64)
        inject(method, model, case)
        model.train = lambda mode=True: model  # dropout masks depend on the split: stay in eval
        for _ in train(method, model, 5, num_micro=num_micro):
            pass
        method.finish(5)
        return method.updated_tensors(model)

    one, four = run(1), run(4)
    for key, tensor in one.items():
        torch.testing.assert_close(four[key], tensor, atol=1e-7, rtol=1e-7)


@every_method
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing_gives_the_same_gradients(name):
    case = CASES["gpt2"]

    def gradients(with_checkpointing):
        method, model = method_from_config(name), case.model()
        inject(method, model, case)
        for _ in train(method, model, 2):
            pass
        model.zero_grad()
        if with_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        method.before_micro_batch(2, 0)
        loss(model, inputs(model)).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert any(g.abs().max() > 0 for g in plain.values())
    for key, gradient in plain.items():
        assert torch.equal(checkpointed[key], gradient), key


@every_low_rank
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(name, dtype):
    case = CASES["gpt2"]
    method, model = method_from_config(name), case.model()
    inject(method, model, case)
    for _ in train(method, model, 3):
        pass
    model.eval()
    batch = inputs(model)
    exact = logits(model, batch)
    with torch.autocast("cpu", dtype=dtype):
        fused = model.transformer.h[0].attn.c_attn
        assert fused(torch.randn(2, 3, 16)).dtype == dtype
        rounded = logits(model, batch)
        with method.merged(model):
            merged = logits(model, batch)
        total = loss(model, batch)
    total.backward()
    assert fused.query.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(rounded.float(), exact, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(merged.float(), exact, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", [n for n in LOW_RANK if not n.startswith("delta_lora")])
def test_a_bf16_base_keeps_float32_factors(name):
    case = CASES["gpt2"]
    method, model = method_from_config(name), case.model(dtype=torch.bfloat16)
    inject(method, model, case)
    fused = model.transformer.h[0].attn.c_attn
    assert fused.query.lora_A.dtype == torch.float32
    assert fused(torch.randn(2, 3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for _ in train(method, model, 3):
        pass
    assert fused.query.lora_B.abs().max() > 0
    weight = fused.weight.clone()
    with method.merged(model):
        assert model.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16
    assert torch.equal(fused.weight, weight)


@every_method
def test_compile_traces_one_graph_once(name):
    case = CASES["gpt2" if name == "full_query_value" else "mlp"]
    method, model = method_from_config(name), case.model()
    inject(method, model, case)
    if name == "full_query_value":
        module, x = model.transformer.h[0].attn.c_attn, torch.randn(2, 3, 16)
    else:
        module, x = model, inputs(model)["input_ids"]
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    module.eval()
    for step in range(6):  # DyLoRA draws several ranks in six steps
        method.before_micro_batch(step, 0)
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_frozen_embeddings_freeze_the_tied_head_only_where_it_is_tied():
    tied = inject(FullFrozenEmbeddings(learning_rate=1e-3), CASES["gpt2"].model(), CASES["gpt2"])
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert not tied.lm_head.weight.requires_grad
    untied = inject(
        FullFrozenEmbeddings(learning_rate=1e-3), CASES["llama"].model(), CASES["llama"]
    )
    assert untied.lm_head.weight.requires_grad
    assert not untied.model.embed_tokens.weight.requires_grad


class TestSplitLinear:
    def test_key_has_neither_gradient_nor_optimiser_state_nor_decay(self):
        case = CASES["gpt2"]
        model = case.model()
        whole = model.transformer.h[0].attn.c_attn.weight.detach().clone()
        method = FullQueryValue(learning_rate=1e-2)
        inject(method, model, case)
        optimizer = adamw(method, model, weight_decay=0.5)
        for _ in train(method, model, 4, optimizer=optimizer):
            pass
        layer = model.transformer.h[0].attn.c_attn
        assert isinstance(layer, SplitLinear)
        assert [n for n, _ in layer.named_parameters()] == [
            "bias", "query", "frozen_16_32", "value",
        ]  # fmt: skip
        assert torch.equal(layer.weight[:, 16:32], whole[:, 16:32])
        assert not torch.equal(layer.weight[:, :16], whole[:, :16])
        assert not torch.equal(layer.weight[:, 32:], whole[:, 32:])
        stateful = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        assert stateful == 2 * 2 * 16 * 16

    def test_it_trains_as_the_whole_layer_with_a_masked_key(self):
        """One run with slices equals one where K is put back after every step."""
        case = CASES["gpt2"]
        split, masked = case.model(dtype=torch.float64), case.model(dtype=torch.float64)
        method = FullQueryValue(learning_rate=1e-2)
        inject(method, split, case)
        masked.requires_grad_(False)
        fused = [block.attn.c_attn.weight.requires_grad_(True) for block in masked.transformer.h]
        keys = [weight[:, 16:32].detach().clone() for weight in fused]
        optimizer = torch.optim.AdamW(fused, lr=1e-2, weight_decay=0.1)
        for step in train(method, split, 5):
            masked.train()
            torch.manual_seed(100 * step)
            optimizer.zero_grad()
            loss(masked, inputs(masked, step)).backward()
            optimizer.step()
            with torch.no_grad():
                for weight, key in zip(fused, keys, strict=True):
                    weight[:, 16:32] = key
        for block, weight in zip(split.transformer.h, fused, strict=True):
            torch.testing.assert_close(block.attn.c_attn.weight, weight, atol=1e-12, rtol=0)

    def test_merged_is_a_plain_model(self):
        case = CASES["gpt2"]
        model, plain = case.model(), case.model()
        method = FullQueryValue(learning_rate=1e-2)
        inject(method, model, case)
        with method.merged(model):
            state = model.state_dict()
            assert list(state) == list(plain.state_dict())
            assert all(torch.equal(t, state[n]) for n, t in plain.state_dict().items())

    def test_a_linear_layer_splits_by_rows(self):
        model = nn.Sequential(nn.Linear(5, 6))
        whole = model[0].weight.detach().clone()
        x = torch.randn(3, 5)
        before = model(x)
        method = FullQueryValue(learning_rate=1e-2)
        method.inject(model, projections=["0@2:4"], head=(), total_steps=1, seed=0)
        assert torch.equal(model(x), before)
        assert {n: tuple(p.shape) for n, p in model[0].named_parameters()} == {
            "frozen_0_2": (2, 5),
            "output_2_4": (2, 5),
            "frozen_4_6": (2, 5),
            "bias": (6,),
        }
        assert torch.equal(model[0].weight, whole)


def test_fused_layer_is_one_base_product_and_one_down_product(monkeypatch):
    model = inject(method_from_config("lora"), CASES["gpt2"].model(), CASES["gpt2"])
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, LowRankLinear)
    shapes = []
    linear, addmm = torch.nn.functional.linear, torch.addmm
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda x, w, b=None: shapes.append(w.shape) or linear(x, w, b),
    )
    monkeypatch.setattr(torch, "addmm", lambda b, x, w: shapes.append(w.shape) or addmm(b, x, w))
    layer(torch.randn(2, 3, 16))
    assert [tuple(shape) for shape in shapes] == [(16, 48), (4, 16), (16, 2), (16, 2)]


def test_dropout_is_shared_by_query_and_value_and_acts_on_the_branch_only():
    model = inject(
        Lora(rank=2, alpha=3, dropout=0.5, learning_rate=1.0),
        CASES["gpt2"].model(dtype=torch.float64),
        CASES["gpt2"],
    )
    layer = model.transformer.h[0].attn.c_attn.train()
    with torch.no_grad():
        layer.query.lora_B.normal_()
        layer.value.lora_B.normal_()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    torch.manual_seed(0)
    out = layer(x)
    torch.manual_seed(0)
    x_dropped = torch.nn.functional.dropout(x, 0.5)
    expected = layer.base_layer(x)
    expected[..., :16] += 1.5 * x_dropped @ layer.query.lora_A.T @ layer.query.lora_B.T
    expected[..., 32:] += 1.5 * x_dropped @ layer.value.lora_A.T @ layer.value.lora_B.T
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "learning_rate": 1e-3}
DELTA = {"rank": 2, "alpha": 4, "learning_rate": 1e-3, "update_ratio": 2.0, "start_step": 5}
ADA = {
    "init_rank": 3, "target_rank": 2, "alpha": 4, "dropout": 0.0, "learning_rate": 1e-3,
    "orth_reg_weight": 0.1, "initial_fraction": 0.1, "final_fraction": 0.4, "interval": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "values", "error", "message"),
    [
        (Lora, {"rank": 0}, ValueError, "rank=0 is not allowed: it must be an integer >= 1"),
        (Lora, {"rank": 2.0}, TypeError, "rank=2.0 is a float, not an integer"),
        (Lora, {"rank": True}, TypeError, "rank=True is a bool"),
        (Lora, {"rank": "4"}, TypeError, "rank='4' is a str"),
        (Lora, {"alpha": 0}, ValueError, "alpha=0 is not allowed"),
        (Lora, {"alpha": float("inf")}, ValueError, "finite"),
        (Lora, {"dropout": 1.0}, ValueError, "dropout=1.0 .*>= 0 and < 1"),
        (Lora, {"dropout": -0.1}, ValueError, "dropout=-0.1"),
        (Lora, {"learning_rate": 0}, ValueError, "learning_rate=0 "),
        (Lora, {"learning_rate": float("nan")}, ValueError, "learning_rate=nan"),
        (Lora, {"learning_rate": "2e-4"}, TypeError, "learning_rate='2e-4' is a str"),
        (Full, {"learning_rate": -1.0}, ValueError, "learning_rate=-1.0"),
        (FullQueryValue, {"learning_rate": False}, TypeError, "learning_rate=False is a bool"),
        (FullFrozenEmbeddings, {"learning_rate": 0}, ValueError, "learning_rate=0"),
        (DeltaLora, {"update_ratio": -0.5}, ValueError, "update_ratio=-0.5 .*>= 0"),
        (DeltaLora, {"update_ratio": "2"}, TypeError, "update_ratio='2' is a str"),
        (DeltaLora, {"start_step": -2}, ValueError, "start_step=-2 .*>= -1"),
        (DeltaLora, {"start_step": 1.5}, TypeError, "start_step=1.5 is a float"),
        (DeltaLora, {"dropout": 0.1}, ValueError, "allow_dropout=true"),
        (DeltaLora, {"allow_dropout": 1}, TypeError, "allow_dropout=1 is a int, not a bool"),
        (DeltaLora, {"form": "sideways"}, ValueError, "form='sideways' is not known"),
        (DyLora, {"update": "some"}, ValueError, "choose one of 'frozen', 'all'"),
        (DyLora, {"eval_rank": 3}, ValueError, "eval_rank=3 .*<= 2"),
        (DyLora, {"eval_rank": 0}, ValueError, "eval_rank=0"),
        (AdaLora, {"target_rank": 4}, ValueError, "target_rank=4 is larger than init_rank=3"),
        (AdaLora, {"beta1": 1.0}, ValueError, "beta1=1.0"),
        (AdaLora, {"interval": 0}, ValueError, "interval=0"),
        (AdaLora, {"orth_reg_weight": -1}, ValueError, "orth_reg_weight=-1"),
        (AdaLora, {"initial_fraction": 1.0}, ValueError, "initial_fraction=1.0"),
    ],
)  # fmt: skip
def test_bad_values_are_named(method, values, error, message):
    defaults = {
        Lora: LORA,
        DeltaLora: DELTA,
        DyLora: LORA | {"update": "frozen"},
        AdaLora: ADA,
    }.get(method, {"learning_rate": 1e-3})
    method(**defaults)
    with pytest.raises(error, match=message):
        method(**(defaults | values))


@every_low_rank
def test_a_rank_larger_than_a_layer_names_it(name):
    recipe = RECIPE | {"rank": 9, "adalora": RECIPE["adalora"] | {"init_rank": 9}}
    method = method_from_config(name, recipe)
    model = CASES["llama"].model()
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"rank=9 is larger than .*v_proj.value.*rank <= 8"):
        inject(method, model, CASES["llama"])
    assert list(model.state_dict()) == list(start), "a refused model stays as it was"
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", [*LOW_RANK, "full_query_value"])
def test_a_model_is_injected_once(name):
    case = CASES["gpt2"]
    model = inject(method_from_config(name), case.model(), case)
    with pytest.raises(RuntimeError, match="freshly loaded model"):
        inject(method_from_config(name), model, case)


@every_method
def test_an_unknown_head_is_refused(name):
    model = CASES["roberta"].model()
    with pytest.raises(ValueError, match="no module 'score'"):
        method_from_config(name).inject(
            model, projections=None, head=("score",), total_steps=10, seed=0
        )


def test_the_number_of_steps_may_be_zero_where_nothing_is_planned_by_it():
    case = CASES["gpt2"]
    for name in ("lora", "dylora", "full"):
        inject(method_from_config(name), case.model(), case, total_steps=0)
    for name in ("adalora", "delta_lora"):
        with pytest.raises(ValueError, match="total_steps=0"):
            inject(method_from_config(name), case.model(), case, total_steps=0)


@pytest.mark.parametrize("name", ["full", "full_frozen_embeddings"])
def test_a_model_without_anything_to_train_is_refused(name):
    case = CASES["gpt2"]
    model = case.model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"would train with method="):
        inject(method_from_config(name), model, case)


@every_method
def test_a_foreign_state_is_refused(name):
    case = CASES["gpt2"]
    method = method_from_config(name)
    inject(method, case.model(), case)
    with pytest.raises(ValueError, match="state"):
        method.load_state_dict({"momentum": torch.zeros(1)})


def test_a_shared_layer_is_wrapped_at_every_name():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    model = Shared()
    Lora(**LORA).inject(model, projections=["first"], head=(), total_steps=1, seed=0)
    assert isinstance(model.first, LowRankLinear)
    assert model.second is model.first
