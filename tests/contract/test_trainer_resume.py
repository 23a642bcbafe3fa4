"""A training with DeltaLoraCallback that was killed continues, or says why it cannot."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers as tf

from tests.choices import first
from tests.contract.peft_trainer import (
    NUM_STEPS,
    Kill,
    Sequential,
    assert_same,
    both_forms,
    delta,
    effective_weight,
    examples,
    lora_layers,
    lora_model,
    roberta,
    trainer_of,
)


def train_and_kill(folder, start, *, form, K, save_weights=False, **values):
    """Train with a checkpoint at step 50 and die at step 60."""
    callback = delta(start_step=K, form=form, save_weights=save_weights)
    trainer = trainer_of(
        folder, lora_model(start), callback, more=[Kill(60)],
        save_strategy="steps", save_steps=50, **values,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return callback


@both_forms
@pytest.mark.parametrize("K", first([1, 70]))
def test_a_killed_run_continues(tmp_path, reference, form, K):
    start, final = reference(K=K)
    train_and_kill(tmp_path, start, form=form, K=K)
    callback, model = delta(start_step=K, form=form), lora_model()
    trainer_of(tmp_path, model, callback).train(resume_from_checkpoint=True)
    assert_same(model, final)
    assert (callback.num_steps, callback.num_updates) == (NUM_STEPS, NUM_STEPS - K - 1)


def test_with_stored_weights_the_bits_of_w_continue(tmp_path, reference):
    start, _ = reference(K=1)
    straight = lora_model(start)
    trainer_of(tmp_path / "straight", straight, delta(form="in_place")).train()
    train_and_kill(tmp_path, start, form="in_place", K=1, save_weights=True)
    model, callback = lora_model(), delta(form="in_place", save_weights=True)
    trainer_of(tmp_path, model, callback).train(resume_from_checkpoint=True)
    expected = straight.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in model.state_dict().items())


@pytest.mark.parametrize("is_added_later", [False, True])
def test_a_checkpoint_elsewhere_is_found(tmp_path, reference, is_added_later):
    start, final = reference(K=1)
    train_and_kill(tmp_path / "old", start, form="closed_form", K=1)
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "old" / "checkpoint-50", moved)
    callback, model = delta(form="closed_form"), lora_model()
    trainer = trainer_of(tmp_path / "new", model, callback)
    if is_added_later:  # the trainer's own callbacks are told of its model, this one is not
        trainer.remove_callback(callback)
        message = r"no delta_lora\.state/state\.json in .*resume_from_checkpoint"
        later = delta(form="closed_form")
        trainer.add_callback(later)
        with pytest.raises(RuntimeError, match=message):
            trainer.train(resume_from_checkpoint=str(moved))
        model = lora_model()
        trainer = trainer_of(tmp_path / "new", model, delta(resume_from_checkpoint=moved))
    trainer.train(resume_from_checkpoint=str(moved))
    assert_same(model, final)


class Elsewhere(Sequential):
    """Puts its checkpoints where a search puts those of a trial."""

    def _get_output_dir(self, trial):
        return str(super()._get_output_dir(trial)) + "/run-7"


@pytest.mark.parametrize(
    ("name", "other"),
    [("default", "delta_lora"), ("delta_lora", None), ("my_task", "delta_lora_state")],
)
def test_an_adapter_of_any_name_stays_in_its_checkpoint_wherever_that_is(tmp_path, name, other):
    def run(folder, resume=None):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0)
        model = peft.get_peft_model(roberta(torch.float32), config, adapter_name=name)
        if other is not None:
            model.add_adapter(other, config)
        model.set_adapter(name)
        callback = delta(form="closed_form")
        trainer = trainer_of(
            folder, model, callback, num_steps=8, kind=Elsewhere, save_strategy="steps",
            save_steps=4,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model, callback

    straight, _ = run(tmp_path / "run")
    checkpoint = tmp_path / "run" / "run-7" / "checkpoint-4"
    folders = [checkpoint if each == "default" else checkpoint / each for each in (name, other)
               if each is not None]  # fmt: skip
    assert all((folder / "adapter_model.safetensors").is_file() for folder in folders)
    resumed, callback = run(tmp_path / "again", resume=str(checkpoint))
    assert (callback.num_steps, callback.num_updates) == (8, 6)
    expected = straight.state_dict()
    for key, tensor in resumed.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, reference):
    folder = tmp_path_factory.mktemp("killed")
    train_and_kill(folder, reference(K=1)[0], form="in_place", K=1)
    return folder


class TestWhatCannotBeResumed:
    @pytest.fixture
    def run(self, killed, tmp_path):
        shutil.copytree(killed, tmp_path / "run")
        return tmp_path / "run"

    def resume(self, run, message, model=None, **values):
        trainer = trainer_of(run, model or lora_model(), delta(**{"form": "in_place"} | values))
        with pytest.raises((RuntimeError, ValueError), match=message):
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-50"))

    def test_a_missing_state(self, run):
        shutil.rmtree(run / "checkpoint-50" / "delta_lora.state")
        self.resume(run, r"resumes at step 50, but there is no delta_lora\.state/state\.json")

    def test_a_state_cut_short(self, run):
        (run / "checkpoint-50" / "delta_lora.state" / "tensors.safetensors").unlink()
        self.resume(run, r"lacks state\.json or tensors\.safetensors")

    def test_damaged_tensors(self, run):
        path = run / "checkpoint-50" / "delta_lora.state" / "tensors.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
        self.resume(run, "checksum differs")

    def test_damaged_json(self, run):
        (run / "checkpoint-50" / "delta_lora.state" / "state.json").write_text("{")
        self.resume(run, r"state\.json is damaged")

    def test_the_state_of_other_factors(self, run):
        path = run / "checkpoint-50" / "delta_lora.state" / "state.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"factors_digest": "0"}))
        self.resume(run, "A and B of the model are not those of")

    @pytest.mark.parametrize(
        "values", [{"update_ratio": 0.75}, {"start_step": 2}, {"form": "closed_form"}]
    )
    def test_other_settings(self, run, values):
        name = next(iter(values))
        self.resume(run, rf"other settings of Delta-LoRA \({name}: .* then, .* now\)", **values)

    def test_another_base(self, run):
        model = lora_model()
        with torch.no_grad():
            next(iter(lora_layers(model).values())).base_layer.weight.mul_(1.01)
        self.resume(run, "base weights are not those", model=model)

    def test_a_named_checkpoint_without_resuming(self, run):
        trainer = trainer_of(run, lora_model(), delta(resume_from_checkpoint=run / "checkpoint-50"))
        with pytest.raises(ValueError, match=r"Trainer\.train starts at step 0"):
            trainer.train()


@both_forms
@pytest.mark.parametrize("best", [10, 30])
def test_the_best_model_is_loaded_with_its_w(tmp_path, form, best):
    """Trainer loads A and B of the best checkpoint; what the layers compute has to be of it too."""
    seen = {}

    class Watch(tf.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, model, **kwargs):
            metrics["eval_score"] = float(state.global_step == best)
            if state.global_step == best:
                seen.update({n: effective_weight(m) for n, m in lora_layers(model).items()})

    torch.manual_seed(1)
    model, callback = lora_model(), delta(start_step=15, form=form)
    trainer = trainer_of(
        tmp_path, model, callback, num_steps=40, more=[Watch()], eval_dataset=examples(4),
        eval_strategy="steps", eval_steps=10, save_strategy="steps", save_steps=10,
        load_best_model_at_end=True, metric_for_best_model="eval_score", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == best
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(effective_weight(layer), seen[name], atol=1e-12, rtol=0)
    assert callback.num_updates == max(0, best - 16)
    loaded = peft.PeftModel.from_pretrained(roberta(), callback.export(model, tmp_path / "export"))
    for name, layer in lora_layers(loaded).items():
        torch.testing.assert_close(effective_weight(layer), seen[name], atol=1e-12, rtol=0)
