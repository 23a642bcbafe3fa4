"""DeltaLoraCallback under transformers.Trainer and PEFT equals our own trainer's in-place run."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers as tf

from delta_lora.integrations import DeltaLoraCallback, peft_layers, trainer_callback
from delta_lora.integrations.peft_layers import LoraTarget
from tests.choices import first
from tests.contract.peft_trainer import (
    NUM_STEPS,
    RATIO,
    SCALING,
    assert_same,
    both_forms,
    delta,
    effective_weight,
    lora_layers,
    lora_model,
    roberta,
    trained,
    trainer_of,
)


@both_forms
@pytest.mark.parametrize("K", first([1, -1, 0, 50]))
def test_it_is_our_own_run(tmp_path, reference, form, K):
    start, final = reference(K=K)
    callback, model = delta(start_step=K, form=form), lora_model(start)
    before = {n: layer.base_layer.weight.clone() for n, layer in lora_layers(model).items()}
    trainer_of(tmp_path, model, callback).train()
    assert_same(model, final)
    assert (callback.num_steps, callback.num_updates) == (NUM_STEPS, NUM_STEPS - K - 1)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.base_layer.weight, before[name]) == (form == "closed_form")


def test_w_of_the_user_stays_as_it_is_unless_its_writing_is_asked_for(tmp_path, reference):
    start, final = reference(K=1, num_steps=12)
    for form in ({}, {"form": "in_place"}):
        callback = DeltaLoraCallback(update_ratio=RATIO, start_step=1, **form)
        model = lora_model(start)
        before = {n: layer.base_layer.weight.clone() for n, layer in lora_layers(model).items()}
        trainer_of(tmp_path, model, callback, num_steps=12).train()
        assert_same(model, final)
        for name, layer in lora_layers(model).items():
            assert torch.equal(layer.base_layer.weight, before[name]) == (not form)


@both_forms
def test_micro_batches_are_one_step(tmp_path, reference, form):
    start, final = reference(K=3, num_steps=20, num_micro=2)
    callback, model = delta(start_step=3, form=form), lora_model(start)
    trainer_of(tmp_path, model, callback, num_steps=20, num_micro=2).train()
    assert_same(model, final)
    assert (callback.num_steps, callback.num_updates) == (20, 16)


# ---------------------------------------------------------------------- public mistakes


class TestKnownMistakes:
    """Each mistake of public implementations, put into the callback, must be seen by our tests."""

    def short_run(self, tmp_path, start, form="in_place", K=1, **values):
        callback, model = delta(start_step=K, form=form, **values), lora_model(start)
        trainer_of(tmp_path, model, callback, num_steps=12).train()
        return model

    @pytest.mark.parametrize(
        ("mistake", "change"),
        [
            ("product of differences", lambda A1, B1, A, B: RATIO * SCALING * (B1 - B) @ (A1 - A)),
            ("alpha / r missing", lambda A1, B1, A, B: RATIO * (B1 @ A1 - B @ A)),
            ("lambda missing", lambda A1, B1, A, B: SCALING * (B1 @ A1 - B @ A)),
            ("lambda as int", lambda A1, B1, A, B: int(RATIO) * SCALING * (B1 @ A1 - B @ A)),
            ("sign", lambda A1, B1, A, B: -RATIO * SCALING * (B1 @ A1 - B @ A)),
        ],
    )
    def test_a_wrong_formula_is_seen(self, tmp_path, reference, monkeypatch, mistake, change):
        start, final = reference(K=1, num_steps=12)
        assert_same(self.short_run(tmp_path, start), final)
        monkeypatch.setattr(
            LoraTarget, "keep", lambda self: setattr(self, "old", self.copy_factors())
        )
        monkeypatch.setattr(
            LoraTarget,
            "add_to_weight",
            lambda self, ratio: self.weight.add_(change(*self.factors, *self.old)),
        )
        with pytest.raises(AssertionError, match=r"query|value"):
            assert_same(self.short_run(tmp_path, start), final, 1e-6)

    @both_forms
    @pytest.mark.parametrize("shift", [1, -1])
    def test_a_lost_first_delta_is_seen(self, tmp_path, reference, form, shift):
        start, final = reference(K=1, num_steps=12)
        with pytest.raises(AssertionError):
            assert_same(self.short_run(tmp_path, start, form, K=1 + shift), final, 1e-6)

    @both_forms
    def test_k_zero_does_not_switch_the_update_off(self, tmp_path, reference, form):
        start, _ = reference(K=1, num_steps=12)
        callback = delta(start_step=0, form=form)
        trainer_of(tmp_path, lora_model(start), callback, num_steps=12).train()
        assert callback.num_updates == 11

    def test_a_fractional_ratio_stays_fractional(self):
        assert delta(update_ratio=0.5).update_ratio == 0.5
        assert delta(update_ratio=2).update_ratio == 2.0

    @both_forms
    def test_dropout_is_refused(self, tmp_path, form):
        model = lora_model(lora_dropout=0.1)
        with pytest.raises(ValueError, match=r"lora_dropout=0\.1 .*because dL/dW = dL/d\(BA\)"):
            trainer_of(tmp_path, model, delta(form=form)).train()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_narrow_base_is_refused_in_place(self, tmp_path, dtype):
        model = lora_model(model=roberta(dtype))
        with pytest.raises(ValueError, match=r"torch\.\w+16, but form=\"in_place\".*closed_form"):
            trainer_of(tmp_path, model, delta(form="in_place")).train()

    @both_forms
    def test_the_adapter_alone_is_not_the_trained_model_and_that_is_said(
        self, tmp_path, reference, form, caplog
    ):
        start, _ = reference(K=1, num_steps=12)
        with caplog.at_level(logging.WARNING):
            model = self.short_run(tmp_path, start, form)
        told = [r.getMessage() for r in caplog.records if "NOT the trained model" in r.getMessage()]
        assert len(told) == 1
        assert "DeltaLoraCallback.export(model, folder)" in told[0]
        model.save_pretrained(tmp_path / "adapter")
        alone = peft.PeftModel.from_pretrained(roberta(), tmp_path / "adapter")
        name, layer = next(iter(lora_layers(model).items()))
        lost = effective_weight(layer) - effective_weight(lora_layers(alone)[name])
        assert lost.abs().max() > 1e-4

    @both_forms
    def test_a_and_b_both_zero_are_refused(self, tmp_path, form):
        model = lora_model()
        with torch.no_grad():
            lora_layers(model).popitem()[1].lora_A["default"].weight.zero_()
        with pytest.raises(ValueError, match=r"are both zero.*can never train"):
            trainer_of(tmp_path, model, delta(form=form)).train()


# ---------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "variant of it .*DoRA"),
        ({"lora_bias": True}, "lora_bias=True in .* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"target_modules": ["word_embeddings"]}, "LoRA on Embedding, which is not supported"),
    ],
)
def test_a_lora_of_another_kind_is_refused(tmp_path, values, message):
    model = lora_model(model=roberta(torch.float32), **values)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, model, delta(form="closed_form")).train()


class TestModelsThatDoNotFit:
    def begin(self, model, callback=None, **values):
        (callback or delta()).on_train_begin(
            SimpleNamespace(**({"deepspeed": None, "fsdp": []} | values)),
            SimpleNamespace(global_step=0, max_steps=10),
            None,
            model=model,
        )

    def test_no_peft_model(self):
        with pytest.raises(TypeError, match=r"needs a PeftModel.*get_peft_model"):
            self.begin(roberta())

    def test_several_active_adapters(self):
        model = lora_model()
        model.add_adapter("other", peft.LoraConfig(target_modules=["query"]))
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match=r"2 adapters are active \(default, other\)"):
            self.begin(model)

    def test_no_layer_of_the_active_adapter(self):
        model = lora_model()
        for layer in lora_layers(model).values():
            layer.delete_adapter("default")
        with pytest.raises(ValueError, match="no layer of the model has a LoRA of the active"):
            self.begin(model)

    def test_another_method(self):
        config = peft.IA3Config(
            target_modules=["query", "value"], feedforward_modules=[], task_type="SEQ_CLS"
        )
        with pytest.raises(ValueError, match="is a IA3, not a LORA"):
            self.begin(peft.get_peft_model(roberta(), config))

    def test_merged_layers(self):
        model = lora_model()
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged into W, so it cannot train"):
            self.begin(model)

    @both_forms
    def test_a_trained_base(self, form):
        model = lora_model()
        next(iter(lora_layers(model).values())).base_layer.weight.requires_grad_(True)
        with pytest.raises(ValueError, match="is trained itself"):
            self.begin(model, delta(form=form))

    def test_a_shared_weight_in_place(self):
        base = roberta()
        attention = base.roberta.encoder.layer[0].attention.self
        attention.value.weight = attention.query.weight
        model = lora_model(model=base)
        with pytest.raises(ValueError, match=r"is shared .*closed_form"):
            self.begin(model, delta(form="in_place"))
        self.begin(model, delta(form="closed_form"))

    @both_forms
    def test_a_model_that_was_trained_before(self, tmp_path, form):
        model, callback = trained(tmp_path, form)
        for again in (callback, delta(form=form)):
            with pytest.raises(ValueError, match="was trained by a DeltaLoraCallback before"):
                self.begin(model, again)

    @both_forms
    @pytest.mark.parametrize("values", [{"deepspeed": {"zero": 2}}, {"fsdp": ["full_shard"]}])
    def test_sharding(self, form, values):
        with pytest.raises(RuntimeError, match=r"not supported.*closed_form"):
            self.begin(lora_model(), delta(form=form), **values)

    def test_an_update_that_never_fires_is_warned_of(self, caplog):
        with caplog.at_level(logging.WARNING):
            self.begin(lora_model(), delta(start_step=8))
            assert not caplog.records
            self.begin(lora_model(), delta(start_step=9))
        assert "the update never fires and the run is LoRA; choose start_step <= 8" in caplog.text


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"update_ratio": -1}, ValueError, "update_ratio=-1 is not allowed"),
        ({"update_ratio": "2"}, TypeError, "update_ratio='2' is a str"),
        ({"start_step": -2}, ValueError, "start_step=-2 is not allowed"),
        ({"start_step": 1.0}, TypeError, "start_step=1.0 is a float"),
        ({"form": "inplace"}, ValueError, "form='inplace' is not known"),
        ({"save_weights": True, "form": "closed_form"}, ValueError, "never writes W"),
        ({"export_checkpoints": 1}, TypeError, "not a bool"),
    ],
)
def test_arguments_are_checked(values, error, message):
    with pytest.raises(error, match=message):
        DeltaLoraCallback(**values)


# ---------------------------------------------------------------------- which steps count


class Stepper:
    """Calls the callback as the loop of Trainer does, on one model, with any optimizer."""

    def __init__(self, callback, model):
        self.callback, self.model = callback, model
        self.state = SimpleNamespace(global_step=0, max_steps=10)
        self.args = SimpleNamespace(deepspeed=None, fsdp=[])
        self.call("on_train_begin")

    def call(self, event, **kwargs):
        getattr(self.callback, event)(self.args, self.state, None, model=self.model, **kwargs)

    def step(self, optimizer, change):
        self.call("on_pre_optimizer_step", optimizer=optimizer)
        change(optimizer)
        self.call("on_optimizer_step", optimizer=optimizer)
        self.state.global_step += 1
        self.call("on_step_end")


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_step_that_the_loss_scaler_skipped_does_not_count(is_fused):
    model, callback = lora_model(), delta(start_step=0, form="in_place")
    stepper = Stepper(callback, model)
    scale = [1024.0]
    optimizer = SimpleNamespace(
        scaler=SimpleNamespace(get_scale=lambda: scale[0]), step_was_skipped=False
    )

    def overflow(optimizer):
        scale[0] /= 2
        optimizer.step_was_skipped = not is_fused

    def apply(optimizer):
        optimizer.step_was_skipped = False
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B["default"].weight.add_(1)

    for change in (overflow, apply, overflow, apply, apply):
        stepper.step(optimizer, change)
    assert (callback.num_steps, callback.num_updates) == (3, 2)
    layer = next(iter(lora_layers(model).values()))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    change = (
        layer.base_layer.weight - roberta().roberta.encoder.layer[0].attention.self.query.weight
    )
    torch.testing.assert_close(change, RATIO * SCALING * (B - (B - 2)) @ A, atol=1e-13, rtol=0)


@pytest.mark.parametrize("silent", ["on_pre_optimizer_step", "on_optimizer_step"])
def test_a_trainer_that_does_not_call_a_hook_is_an_error(tmp_path, monkeypatch, silent):
    trainer = trainer_of(tmp_path, lora_model(), delta(), num_steps=3)
    handler = trainer.callback_handler
    monkeypatch.setattr(handler, silent, lambda args, state, control, **kwargs: control)
    with pytest.raises(RuntimeError, match="on_pre_optimizer_step"):
        trainer.train()


def test_a_run_without_any_hook_is_void_at_its_end():
    stepper = Stepper(delta(), lora_model())
    stepper.state.global_step = 7
    stepper.args.load_best_model_at_end = False
    with pytest.raises(RuntimeError, match=r"7 optimizer|7 optimiser steps, but .* 0 and"):
        stepper.call("on_train_end")


# ---------------------------------------------------------------------- importing


def test_a_callback_that_no_trainer_was_given_is_said_when_something_trains(tmp_path, caplog):
    callback, other = delta(), delta()
    model = lora_model()
    trainer = trainer_of(tmp_path, model, other, num_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [r for r in caplog.records if "no Trainer was given" in r.getMessage()]
    assert len(said) == 1, "once, and not for the one that it has"
    with pytest.raises(RuntimeError, match="did not train"):
        callback.export(model, tmp_path / "export")
    del callback
    caplog.clear()
    trainer_of(tmp_path, lora_model(), tf.TrainerCallback(), num_steps=1).train()
    assert "no Trainer was given" not in caplog.text


def test_a_callback_that_comes_when_training_has_begun_is_refused(tmp_path):
    class Late(tf.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                trainer.add_callback(delta())

    trainer = trainer_of(tmp_path, lora_model(), Late(), num_steps=3)
    with pytest.raises(RuntimeError, match=r"added when the training had begun.*before"):
        trainer.train()


def test_importing_is_quick_and_quiet():
    code = (
        "import sys, delta_lora.integrations as i; assert 'DeltaLoraCallback' in i.__all__; "
        "assert not {'transformers', 'peft', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    code = "from delta_lora.integrations import DeltaLoraCallback; DeltaLoraCallback()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install \"delta-lora\[peft\]\""):
        peft_layers.import_peft()


def test_an_unknown_name():
    import delta_lora.integrations as integrations

    with pytest.raises(AttributeError, match="no attribute 'Delta'"):
        _ = integrations.Delta
    assert trainer_callback.DeltaLoraCallback is integrations.DeltaLoraCallback
