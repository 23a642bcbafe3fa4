"""DeltaLoraCallback under transformers.Trainer and PEFT equals our own trainer's in-place run."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

from delta_lora.delta import stack
from delta_lora.draws import step_indices
from delta_lora.integrations import DeltaLoraCallback, peft_layers, trainer_callback
from delta_lora.integrations.peft_layers import LoraTarget
from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.peft_folder import write_peft_folder
from delta_lora.protocols import Batch, Task
from delta_lora.trainer import Trainer
from tests.contract.models import gpt2

F64 = torch.float64
RATIO, RANK, ALPHA, LR, DECAY, CLIP = 0.5, 2, 3, 1e-2, 0.1, 0.5
NUM_STEPS, BATCH, WARMUP, SEED = 100, 4, 10, 3
VOCABULARY, LENGTH, NUM_LABELS = 29, 6, 3
SCALING = ALPHA / RANK
#: float64 rounding: 8e-16 was measured; Adam, which divides gradients by themselves, may enlarge
#: it elsewhere.
TOLERANCE = 1e-12
both_forms = pytest.mark.parametrize("form", ["in_place", "closed_form"])


def roberta(dtype=F64, layers=2):
    """Build a RoBERTa classifier without dropout; the same weights in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.RobertaForSequenceClassification(
            tf.RobertaConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers,
                num_attention_heads=2, intermediate_size=24, max_position_embeddings=LENGTH + 4,
                num_labels=NUM_LABELS, pad_token_id=1, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, initializer_range=0.2,
            )
        )  # fmt: skip
    return model.to(dtype)


def examples(num_examples=NUM_STEPS * BATCH):
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (num_examples, LENGTH), generator=draw)
    return [{"input_ids": x, "labels": (x[0] + x[3]) % NUM_LABELS} for x in ids]


class Classification(Task):
    """The examples as a task of our own trainer."""

    name, version, metrics = "toy", 1, ()

    def load(self):
        pass

    def provenance(self):
        return {}

    def examples(self, split, tokenizer):
        return examples()

    def collate(self, rows):
        tensors = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "labels")}
        return Batch(tensors, len(rows), 1, [])

    def loss(self, model, batch, label_smoothing=0.0):
        logits = model(input_ids=batch.tensors["input_ids"]).logits
        return F.cross_entropy(logits, batch.tensors["labels"], reduction="sum")


def run_ours(folder, *, K, num_steps=NUM_STEPS, num_micro=1, ratio=RATIO):
    """Train with our trainer; return (factors at the start, final tensors by PEFT's names)."""
    model = roberta()
    method = DeltaLora(rank=RANK, alpha=ALPHA, learning_rate=LR, update_ratio=ratio, start_step=K)
    method.inject(model, projections=None, head=["classifier"], total_steps=num_steps, seed=SEED)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    Trainer(
        batch_size=BATCH, micro_batch_size=BATCH // num_micro, max_steps=num_steps,
        warmup_steps=WARMUP, weight_decay=DECAY, no_decay=("bias",), max_grad_norm=CLIP,
        evaluate_every_epochs=None, device="cpu",
    ).fit(
        model, method=method, task=Classification(), train=examples(), validation=[], seed=SEED,
        folder=folder / "ours",
    )  # fmt: skip
    with method.merged(model):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    final = {n: p.detach().clone() for n, p in model.named_parameters()}
    return start, final | weights


def lora_model(start=None, model=None, **values):
    """Wrap the classifier by PEFT, with the factors of `start` (our names)."""
    defaults = {
        "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
    }  # fmt: skip
    config = peft.LoraConfig(**(defaults | values))
    model = peft.get_peft_model(roberta() if model is None else model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if start is not None and "lora_" in name:
                parameter.copy_(start[our_name(name)])
    return model


def our_name(theirs):
    layer, _, leaf = theirs.removeprefix("base_model.model.").rpartition(".lora_")
    return f"{layer}.{layer.rpartition('.')[2]}.lora_{leaf[0]}"


class Sequential(tf.Trainer):
    """Gives the examples in their order, without shuffling."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def sum_over_batch(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class Kill(tf.TrainerCallback):
    """Ends the process' training as an exception after some step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_of(
    folder,
    model,
    callback,
    *,
    num_steps=NUM_STEPS,
    num_micro=1,
    more=(),
    eval_dataset=None,
    **values,
):
    """Return a transformers.Trainer with the settings and the data order of `run_ours`."""
    rows = examples()
    order = [i for step in range(num_steps) for i in step_indices(len(rows), BATCH, SEED, step)]
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        **({
            "per_device_train_batch_size": BATCH // num_micro,
            "gradient_accumulation_steps": num_micro, "max_steps": num_steps, "learning_rate": LR,
            "weight_decay": DECAY, "warmup_steps": WARMUP, "lr_scheduler_type": "linear",
            "max_grad_norm": CLIP, "optim": "adamw_torch_fused", "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": SEED,
            "logging_strategy": "no", "remove_unused_columns": False,
        } | values),
    )  # fmt: skip
    return Sequential(
        model,
        arguments,
        train_dataset=[rows[i] for i in order],
        eval_dataset=eval_dataset,
        compute_loss_func=sum_over_batch,
        callbacks=[callback, *more],
    )


def delta(**values):
    return DeltaLoraCallback(**({"update_ratio": RATIO, "start_step": 1} | values))


def lora_layers(model):
    return {
        n.removeprefix("base_model.model."): m
        for n, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }


@torch.no_grad()
def effective_weight(layer):
    """Return the (out, in) matrix that a layer computes, whatever it is made of."""
    A = next(iter(layer.lora_A.values())).weight
    eye = torch.eye(A.shape[1], dtype=A.dtype)
    return (layer(eye) - layer(torch.zeros_like(eye))).T


def differences(model, final):
    """Return the largest absolute difference of each tensor to those of our run."""
    out = {}
    for name, layer in lora_layers(model).items():
        out[f"{name} whole"] = effective_weight(layer) - final[f"{name}.weight"]
    for name, p in model.named_parameters():
        if "lora_" in name:
            out[name] = p - final[our_name(name)]
        elif ".modules_to_save.default." in name:
            plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            out[name] = p - final[plain]
    return {name: float(tensor.detach().abs().max()) for name, tensor in out.items()}


def assert_same(model, final, tolerance=TOLERANCE):
    found = differences(model, final)
    assert len(found) == 4 * 3 + 4
    worst = max(found, key=found.__getitem__)
    assert found[worst] < tolerance, f"{worst}: {found[worst]:.1e}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Return `run_ours`, each set of values computed once."""
    done = {}

    def run(**values):
        key = tuple(sorted(values.items()))
        if key not in done:
            done[key] = run_ours(tmp_path_factory.mktemp("ours"), **values)
        return done[key]

    return run


@both_forms
@pytest.mark.parametrize("K", [-1, 0, 1, 50])
def test_it_is_our_own_run(tmp_path, reference, form, K):
    start, final = reference(K=K)
    callback, model = delta(start_step=K, form=form), lora_model(start)
    before = {n: layer.base_layer.weight.clone() for n, layer in lora_layers(model).items()}
    trainer_of(tmp_path, model, callback).train()
    assert_same(model, final)
    assert (callback.num_steps, callback.num_updates) == (NUM_STEPS, NUM_STEPS - K - 1)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.base_layer.weight, before[name]) == (form == "closed_form")


@both_forms
def test_micro_batches_are_one_step(tmp_path, reference, form):
    start, final = reference(K=3, num_steps=20, num_micro=2)
    callback, model = delta(start_step=3, form=form), lora_model(start)
    trainer_of(tmp_path, model, callback, num_steps=20, num_micro=2).train()
    assert_same(model, final)
    assert (callback.num_steps, callback.num_updates) == (20, 16)


# ---------------------------------------------------------------------- killed and resumed


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
@pytest.mark.parametrize("K", [1, 70])
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
    trainer_of(tmp_path / "straight", straight, delta()).train()
    train_and_kill(tmp_path, start, form="in_place", K=1, save_weights=True)
    model = lora_model()
    trainer_of(tmp_path, model, delta(save_weights=True)).train(resume_from_checkpoint=True)
    expected = straight.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in model.state_dict().items())


def test_a_checkpoint_elsewhere_is_found_when_named(tmp_path, reference):
    start, final = reference(K=1)
    train_and_kill(tmp_path / "old", start, form="closed_form", K=1)
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "old" / "checkpoint-50", moved)
    with pytest.raises(
        RuntimeError, match=r"no delta_lora/state\.json in .*resume_from_checkpoint"
    ):
        trainer_of(tmp_path / "new", lora_model(), delta(form="closed_form")).train(
            resume_from_checkpoint=str(moved)
        )
    model = lora_model()
    callback = delta(form="closed_form", resume_from_checkpoint=moved)
    trainer_of(tmp_path / "new", model, callback).train(resume_from_checkpoint=str(moved))
    assert_same(model, final)


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
        trainer = trainer_of(run, model or lora_model(), delta(**values))
        with pytest.raises((RuntimeError, ValueError), match=message):
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-50"))

    def test_a_missing_state(self, run):
        shutil.rmtree(run / "checkpoint-50" / "delta_lora")
        self.resume(run, r"resumes at step 50, but there is no delta_lora/state\.json")

    def test_a_state_cut_short(self, run):
        (run / "checkpoint-50" / "delta_lora" / "tensors.safetensors").unlink()
        self.resume(run, r"lacks state\.json or tensors\.safetensors")

    def test_damaged_tensors(self, run):
        path = run / "checkpoint-50" / "delta_lora" / "tensors.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
        self.resume(run, "checksum differs")

    def test_damaged_json(self, run):
        (run / "checkpoint-50" / "delta_lora" / "state.json").write_text("{")
        self.resume(run, r"state\.json is damaged")

    def test_the_state_of_other_factors(self, run):
        path = run / "checkpoint-50" / "delta_lora" / "state.json"
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
            trainer_of(tmp_path, model, delta()).train()

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


# ---------------------------------------------------------------------- the two forms on one layer


def conv1d_model(dtype=F64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).to(dtype)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        return lora_model(model=model, target_modules=["c_attn", "c_fc"], modules_to_save=None)


@pytest.mark.parametrize("build", [lora_model, conv1d_model], ids=["linear", "conv1d"])
def test_gradients_of_a_b_and_x_are_those_of_the_in_place_form(build):
    model = build()
    layer = next(iter(lora_layers(model).values()))
    target = LoraTarget("layer", layer, "default")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    target.first = target.copy_factors()
    with torch.no_grad():  # training went on
        layer.lora_A["default"].weight.mul_(1.3)
        layer.lora_B["default"].weight.add_(0.1)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, layer.in_features, generator=draw, dtype=F64, requires_grad=True)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def outcome():
        out = layer(x)
        return [out, *torch.autograd.grad((out * torch.arange(out.shape[-1])).sum(), leaves)]

    plain = outcome()
    target.add_forward_term(RATIO)
    closed = outcome()
    target.remove_forward_term()
    target.keep(target.first)
    target.add_to_weight(RATIO)
    in_place = outcome()
    for a, b in zip(closed, in_place, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(closed[2], plain[2])  # A and B in the term are detached
    assert (closed[0] - plain[0]).abs().max() > 1e-2
    assert (closed[1] - plain[1]).abs().max() > 1e-2


@both_forms
def test_conv1d_equals_a_transcription(tmp_path, form):
    """W is (in, out) in Conv1D: check the whole change of a GPT-2 by its factors."""
    model = conv1d_model()
    first = {n: effective_weight(m) for n, m in lora_layers(model).items()}
    A_k = {n: m.lora_A["default"].weight.detach().clone() for n, m in lora_layers(model).items()}
    callback = delta(start_step=-1, form=form)
    rows = [row | {"labels": row["input_ids"]} for row in examples(40)]
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, learning_rate=LR, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    tf.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        B_k = torch.zeros_like(B)
        whole = (1 + RATIO) * SCALING * B @ A - RATIO * SCALING * B_k @ A_k[name]
        torch.testing.assert_close(effective_weight(layer) - first[name], whole, atol=1e-12, rtol=0)
        assert whole.abs().max() > 1e-3


class FakeQuantised(nn.Linear):
    """A linear layer whose weight is int8 with one scale: what a quantised base looks like."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
        self.bias = linear.bias
        self.scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantised():
    model = roberta(torch.float32)
    for block in model.roberta.encoder.layer:
        attention = block.attention.self
        attention.query = FakeQuantised(attention.query)
        attention.value = FakeQuantised(attention.value)
    return model


@pytest.mark.parametrize(
    "build", [quantised, lambda: roberta(torch.bfloat16)], ids=["int8", "bf16"]
)
def test_the_closed_form_works_on_a_narrow_base(tmp_path, build):
    # PEFT keeps a trained head in float32, which a bfloat16 body cannot feed without autocast.
    model, callback = lora_model(model=build(), modules_to_save=None), delta(form="closed_form")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    x = torch.ones(1, 16, dtype=model.base_model.model.dtype)
    with torch.no_grad():
        start = {n: m(x) for n, m in lora_layers(model).items()}
    trainer_of(tmp_path, model, callback, num_steps=12, learning_rate=5 * LR).train()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], tensor) for n, tensor in before.items())
    assert callback.num_updates == 10
    loaded = peft.PeftModel.from_pretrained(build(), callback.export(model, tmp_path / "export"))
    # bfloat16 rounds the output after each term: two roundings of ours to one of the export.
    tolerance = 1e-5 if x.dtype == torch.float32 else 2**-7
    for name, layer in lora_layers(model).items():
        ours, theirs = layer(x), lora_layers(loaded)[name](x)
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=2 * tolerance)
        assert (ours - start[name]).abs().max() > 4 * tolerance


def test_a_quantised_base_is_refused_in_place(tmp_path):
    with pytest.raises(ValueError, match=r"torch\.int8.*closed_form"):
        trainer_of(tmp_path, lora_model(model=quantised()), delta()).train()


def trained(tmp_path, form="closed_form", dtype=torch.float32, num_steps=12, **values):
    torch.manual_seed(2)
    model = lora_model(model=roberta(dtype), **values)
    callback = delta(form=form)
    trainer_of(tmp_path / "run", model, callback, num_steps=num_steps).train()
    return model.eval(), callback


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.stack([row["input_ids"] for row in examples(8)])).logits


def test_the_hook_follows_the_adapter(tmp_path):
    """Off with the adapter, right under autocast and after a deep copy, loud on mixed batches."""
    model, _ = trained(tmp_path, dtype=F64)
    base = roberta().eval()
    with model.disable_adapter():
        for name, layer in lora_layers(model).items():
            plain = base.get_submodule(name).weight
            torch.testing.assert_close(effective_weight(layer), plain, atol=1e-14, rtol=0)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    single = copy.deepcopy(model).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (logits(single).double() - logits(model)).abs().max() < 0.05
    ids = torch.stack([row["input_ids"] for row in examples(2)])
    with pytest.raises(RuntimeError, match="adapter_names was given"):
        model(input_ids=ids, adapter_names=["default", "__base__"])


def test_a_compiled_model_sees_the_closed_form(tmp_path, reference):
    start, final = reference(K=1, num_steps=12)
    model = lora_model(start)
    trainer_of(
        tmp_path, model, delta(form="closed_form"), num_steps=12,
        torch_compile=True, torch_compile_backend="eager",
    ).train()  # fmt: skip
    assert_same(model, final)


# ---------------------------------------------------------------------- export


@both_forms
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layer.1.attention.self.query": 4}},
        {"bias": "lora_only"},
    ],
    ids=["plain", "rslora", "rank_pattern", "bias"],
)
def test_the_export_is_the_trained_model(tmp_path, form, values):
    model, callback = trained(tmp_path, form, **values)
    folder = callback.export(model, tmp_path / "export")
    loaded = peft.PeftModel.from_pretrained(roberta(torch.float32), folder)
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5
    assert (logits(loaded) - logits(roberta(torch.float32))).abs().max() > 0.1
    ranks = {n: m.r["default"] for n, m in lora_layers(loaded).items()}
    assert ranks == {n: 2 * m.r["default"] for n, m in lora_layers(model).items()}
    assert {m.scaling["default"] for m in lora_layers(loaded).values()} == {1.0}
    merged = loaded.merge_and_unload()
    assert (logits(merged) - logits(model)).abs().max() < 1e-5


def test_without_an_update_the_export_is_the_lora(tmp_path):
    torch.manual_seed(2)
    model, callback = lora_model(), delta(update_ratio=0)
    trainer_of(tmp_path, model, callback, num_steps=5).train()
    loaded = peft.PeftModel.from_pretrained(roberta(), callback.export(model, tmp_path / "export"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-12, rtol=0)


@both_forms
def test_checkpoints_hold_their_export_if_asked(tmp_path, form):
    torch.manual_seed(2)
    model = lora_model(model=roberta(torch.float32))
    callback = delta(form=form, export_checkpoints=True)
    trainer_of(tmp_path, model, callback, num_steps=12, save_strategy="steps", save_steps=6).train()
    folder = tmp_path / "checkpoint-12" / "delta_lora" / "adapter"
    loaded = peft.PeftModel.from_pretrained(roberta(torch.float32), folder)
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5
    # Trainer must not take the export for a second adapter.
    again = lora_model(model=roberta(torch.float32))
    trainer_of(tmp_path, again, delta(form=form), num_steps=12).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-6")
    )
    assert list(again.peft_config) == ["default"]
    assert (logits(again) - logits(model)).abs().max() < 1e-5


def test_export_needs_the_model_that_was_trained(tmp_path):
    with pytest.raises(RuntimeError, match="this callback did not train the PeftModel"):
        delta().export(lora_model(), tmp_path / "export")


def test_the_factors_of_the_export_are_the_closed_form():
    draw = torch.Generator().manual_seed(0)
    A, B, A_k, B_k = (torch.randn(s, generator=draw, dtype=F64) for s in 2 * [(2, 7), (5, 2)])
    A_2r, B_2r = stack((A, B), (A_k, B_k), update_ratio=RATIO, scaling=SCALING)
    assert (A_2r.shape, B_2r.shape) == ((4, 7), (5, 4))
    expected = (1 + RATIO) * SCALING * B @ A - RATIO * SCALING * B_k @ A_k
    torch.testing.assert_close(B_2r @ A_2r, expected, atol=1e-14, rtol=0)


def test_the_writer_needs_no_trained_model(tmp_path):
    """The pure function: factors of different ranks and a configuration make a PEFT folder."""
    model = lora_model(modules_to_save=None)
    draw = torch.Generator().manual_seed(0)
    factors = {
        f"base_model.model.{name}": (
            torch.randn(3 + i, 16, generator=draw, dtype=F64),
            torch.randn(16, 3 + i, generator=draw, dtype=F64),
        )
        for i, name in enumerate(lora_layers(model))
    }
    write_peft_folder(tmp_path / "out", config=model.peft_config["default"], factors=factors)
    loaded = peft.PeftModel.from_pretrained(roberta(), tmp_path / "out")
    for name, layer in lora_layers(loaded).items():
        A, B = factors[f"base_model.model.{name}"]
        change = effective_weight(layer) - layer.base_layer.weight
        torch.testing.assert_close(change, B @ A, atol=1e-12, rtol=0)


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

    def test_a_trained_base(self):
        model = lora_model()
        next(iter(lora_layers(model).values())).base_layer.weight.requires_grad_(True)
        with pytest.raises(ValueError, match="is trained itself"):
            self.begin(model)

    def test_a_shared_weight_in_place(self):
        base = roberta()
        attention = base.roberta.encoder.layer[0].attention.self
        attention.value.weight = attention.query.weight
        model = lora_model(model=base)
        with pytest.raises(ValueError, match=r"is shared .*closed_form"):
            self.begin(model)
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
    model, callback = lora_model(), delta(start_step=0)
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
