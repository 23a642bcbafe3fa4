"""The two forms of DeltaLoraCallback on one layer, and the export of what was trained."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

from delta_lora.delta import stack
from delta_lora.integrations.peft_layers import LoraTarget
from delta_lora.peft_folder import write_peft_folder
from tests.contract.models import gpt2
from tests.contract.peft_trainer import (
    F64,
    LR,
    RATIO,
    SCALING,
    assert_same,
    both_forms,
    delta,
    effective_weight,
    examples,
    lora_layers,
    lora_model,
    roberta,
    trained,
    trainer_of,
)

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
def test_the_default_works_on_a_narrow_base(tmp_path, build):
    # PEFT keeps a trained head in float32, which a bfloat16 body cannot feed without autocast.
    model, callback = lora_model(model=build(), modules_to_save=None), delta()
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
        trainer_of(tmp_path, lora_model(model=quantised()), delta(form="in_place")).train()


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


@pytest.mark.long
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
    folder = tmp_path / "checkpoint-12" / "delta_lora.state" / "adapter"
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


@pytest.mark.parametrize("pattern", ["LayerNorm", "position_embeddings"])
def test_what_trains_outside_every_adapter_is_said_before_and_not_exported(
    tmp_path, caplog, pattern
):
    model, callback = lora_model_with(pattern), delta()
    trainer_of(tmp_path / "run", model, callback, num_steps=4).train()
    said = [r.message for r in caplog.records if "train beside the LoRA" in r.message]
    assert len(said) == 1
    assert pattern in said[0]
    assert "modules_to_save" in said[0]
    with pytest.raises(ValueError, match="train beside the LoRA"):
        callback.export(model, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    with pytest.raises(ValueError, match="train beside the LoRA"):
        trainer_of(tmp_path / "b", lora_model_with(pattern), delta(export_checkpoints=True)).train()


def lora_model_with(pattern):
    model = lora_model(model=roberta(torch.float32))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or pattern in name)
    return model


@pytest.mark.parametrize(
    "values",
    [
        {"bias": "all"},
        {"trainable_token_indices": [5, 6]},
        {"modules_to_save": ["word_embeddings"]},
    ],
)
def test_what_an_adapter_holds_beside_the_lora_is_no_reason_to_refuse(tmp_path, caplog, values):
    model, callback = trained(tmp_path, num_steps=3, **values)
    callback.export(model, tmp_path / "export")
    assert "train beside" not in caplog.text
