"""A loop that leaves one of the two calls around a step out is stopped; others are left alone."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import delta_lora
from delta_lora.step_watch import _listeners
from tests.contract.models import CASES, inputs, loss

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "sgd": lambda groups: torch.optim.SGD(groups),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def attached(name="gpt2", method="delta_lora", **settings):
    case = CASES[name]
    values = {"rank": 2, "start_step": 1} if method == "delta_lora" else {}
    return delta_lora.attach(
        case.model().train(), method, projections=case.projections, head=case.head,
        **{"total_steps": 20, **values, **settings},
    )  # fmt: skip


def backward(adapter, step=0):
    loss(adapter.model, inputs(adapter.model, step)).backward()


def one_step(adapter, optimizer, step=0):
    backward(adapter, step)
    adapter.before_step()
    optimizer.step()
    adapter.after_step()
    optimizer.zero_grad()


@every_optimizer
@pytest.mark.parametrize("num_good", [0, 3])
def test_both_calls_forgotten(make, num_good):
    adapter = attached()
    optimizer = make(adapter.param_groups())
    for step in range(num_good):
        one_step(adapter, optimizer, step)
    backward(adapter)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"without adapter\.before_step\(\).*'delta_lora'; in"):
        backward(adapter)
    with pytest.raises(RuntimeError, match="right before optimizer"):
        adapter.before_step()
    with pytest.raises(RuntimeError, match="right after it"):
        adapter.state_dict()


@every_optimizer
def test_after_step_forgotten(make, tmp_path):
    adapter = attached()
    optimizer = make(adapter.param_groups())
    backward(adapter)
    adapter.before_step()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"adapter\.after_step\(\) was not called"):
        backward(adapter)
    with pytest.raises(RuntimeError, match="was not called"):
        adapter.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_before_step_forgotten():
    adapter = attached()
    optimizer = torch.optim.AdamW(adapter.param_groups())
    backward(adapter)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"without adapter\.before_step\(\)"):
        adapter.after_step()


def test_both_calls_behind_the_step():
    adapter = attached()
    optimizer = torch.optim.AdamW(adapter.param_groups())
    backward(adapter)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"without adapter\.before_step\(\)"):
        adapter.before_step()


@pytest.mark.parametrize("method", ["lora", "dylora", "full"])
def test_it_holds_for_every_method(method):
    adapter = attached(method=method)
    optimizer = torch.optim.AdamW(adapter.param_groups())
    one_step(adapter, optimizer)
    backward(adapter)
    optimizer.step()
    with pytest.raises(RuntimeError, match=f"'{method}'"):
        backward(adapter)


def test_a_loaded_adapter_is_not_trained_on_by_mistake(tmp_path):
    attached().save(tmp_path)
    adapter = delta_lora.load(tmp_path, base=CASES["gpt2"].model())
    adapter.model.train()
    optimizer = torch.optim.AdamW(adapter.param_groups())
    backward(adapter)
    optimizer.step()
    with pytest.raises(RuntimeError, match="without adapter"):
        backward(adapter)


# ---------------------------------------------------------------------- left alone


def test_gradient_accumulation():
    adapter = attached()
    optimizer = torch.optim.AdamW(adapter.param_groups())
    for step in range(4):
        for micro in range(3):
            backward(adapter, 10 * step + micro)
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
    assert adapter.step == 4


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_loss_scaler_skips(fused):
    adapter = attached()
    optimizer = torch.optim.AdamW(adapter.param_groups(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    trained = next(p for p in adapter.model.parameters() if p.requires_grad)
    for step in range(6):
        scaler.scale(loss(adapter.model, inputs(adapter.model, step))).backward()
        if step in (0, 1, 4):
            trained.grad.fill_(float("inf"))
        before = scaler.get_scale()
        adapter.before_step()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            adapter.after_step()
        optimizer.zero_grad()
    assert adapter.step == 3
    assert not trained.isnan().any()
    scaler.scale(loss(adapter.model, inputs(adapter.model))).backward()
    adapter.before_step()
    scaler.step(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match="was not called"):
        backward(adapter)


def test_loading_moving_evaluating_and_writing_by_hand():
    adapter = attached("roberta")
    model, optimizer = adapter.model, torch.optim.AdamW(adapter.param_groups())
    one_step(adapter, optimizer)
    kept = copy.deepcopy(model.state_dict())
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    one_step(adapter, optimizer)
    model.load_state_dict(kept)
    backward(adapter)
    adapter.load_state_dict(state)
    backward(adapter)
    model.eval()
    with torch.no_grad():
        loss(model, inputs(model))
    with adapter.merged() as plain:
        loss(plain, inputs(plain))
    model.train()
    backward(adapter)
    model.zero_grad()
    backward(adapter)
    model.to(torch.float64).to(torch.float32)
    model.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0)  # an average of the weights that is put in and out, say
    one_step(adapter, optimizer)


def test_loading_a_state_ends_the_suspicion():
    adapter = attached()
    optimizer = torch.optim.AdamW(adapter.param_groups())
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    backward(adapter)
    optimizer.step()
    adapter.load_state_dict(state)
    optimizer = torch.optim.AdamW(adapter.param_groups())
    one_step(adapter, optimizer)


def test_other_optimisers_and_steps_without_gradients():
    adapter, other = attached(), CASES["mlp"].model().train()
    optimizer = torch.optim.AdamW(adapter.param_groups())
    optimizer.step()  # schedules ask for it
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    loss(other, inputs(other)).backward()
    elsewhere.step()
    backward(adapter)


def test_an_optimiser_of_two_models_that_trains_the_other():
    adapter, other = attached(), CASES["mlp"].model().train()
    optimizer = torch.optim.AdamW([*adapter.param_groups(), {"params": list(other.parameters())}])
    loss(other, inputs(other)).backward()
    optimizer.step()
    one_step(adapter, optimizer)
    loss(other, inputs(other)).backward()
    optimizer.step()
    one_step(adapter, optimizer)


def test_two_optimisers_in_one_step():
    adapter = attached("roberta")
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in (parameters[:2], parameters[2:])]
    for step in range(3):
        backward(adapter, step)
        adapter.before_step()
        for optimizer in optimizers:
            optimizer.step()
        adapter.after_step()
    assert adapter.step == 3


def test_an_optimiser_that_calls_the_model_itself():
    adapter = attached("mlp")
    optimizer = torch.optim.LBFGS(adapter.param_groups()[0]["params"], max_iter=3)

    def closure():
        optimizer.zero_grad()
        total = loss(adapter.model, inputs(adapter.model))
        total.backward()
        return total

    for _ in range(2):
        closure()
        adapter.before_step()
        optimizer.step(closure)
        adapter.after_step()


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models_are_compiled_once_and_watched(in_place):
    torch._dynamo.reset()
    adapter, counter = attached("roberta"), CompileCounter()
    model = adapter.model
    if in_place:
        model.compile(backend=counter)
    run = model if in_place else torch.compile(model, backend=counter)
    optimizer = torch.optim.AdamW(adapter.param_groups())
    frames = []
    for step in range(6):
        run(**inputs(model, step)).loss.backward()
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
        frames.append(counter.frame_count)
    assert frames[-1] == frames[3], "the first update, at step 2, changes what the branch computes"
    run(**inputs(model)).loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="without adapter"):
        run(**inputs(model))
    torch._dynamo.reset()


def test_gradient_checkpointing():
    adapter = attached("roberta")
    adapter.model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(adapter.param_groups())
    for step in range(3):
        one_step(adapter, optimizer, step)
    assert adapter.step == 3


def test_a_copy_is_watched_on_its_own():
    adapter = attached()
    optimizer = torch.optim.AdamW(adapter.param_groups())
    one_step(adapter, optimizer)
    twin = copy.deepcopy(adapter)
    backward(adapter)
    optimizer.step()
    backward(twin)
    own = torch.optim.AdamW(twin.param_groups())
    own.step()
    with pytest.raises(RuntimeError, match="without adapter"):
        backward(twin)


def test_what_is_no_longer_used_is_forgotten():
    adapter = attached("mlp")
    one_step(adapter, torch.optim.AdamW(adapter.param_groups()))
    model = weakref.ref(adapter.model)
    num_watched = len(_listeners)
    del adapter
    gc.collect()
    assert model() is None
    assert len(_listeners) < num_watched
