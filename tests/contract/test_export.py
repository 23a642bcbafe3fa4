"""What is exported gives what was trained: through PEFT on the untouched base, and merged."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import delta_lora
from delta_lora import export
from tests.contract.models import CASES, inputs, logits, loss

FAMILIES = ("gpt2", "roberta", "bart", "llama", "bert")
AUTO = {
    "gpt2": tf.AutoModelForCausalLM,
    "llama": tf.AutoModelForCausalLM,
    "bart": tf.AutoModelForSeq2SeqLM,
    "roberta": tf.AutoModelForSequenceClassification,
    "bert": tf.AutoModelForSequenceClassification,
}


def trained(case, folder, method="delta_lora", num_steps=6, name=None, **settings):
    """Save a base, train on it, save the adapter; return (base folder, adapter folder, logits)."""
    auto = AUTO[name or case_name(case)]
    model = case.model()
    model.save_pretrained(folder / "base")
    model = auto.from_pretrained(folder / "base")
    adapter = delta_lora.attach(
        model, method, projections=case.projections, head=case.head, total_steps=num_steps,
        **{"learning_rate": 2e-2, **settings},
    )  # fmt: skip
    train(adapter, num_steps)
    adapter.save(folder / "adapter")
    model.eval()
    return folder / "base", folder / "adapter", logits(model, inputs(model, 99)).detach()


def case_name(case):
    return next(name for name, other in CASES.items() if other is case)


def train(adapter, num_steps):
    model = adapter.model
    optimizer = torch.optim.AdamW(adapter.param_groups())
    model.train()
    for step in range(num_steps):
        torch.manual_seed(100 * step)  # the models' own dropout
        total = loss(model, inputs(model, step))
        extra = adapter.extra_loss()
        (total if extra is None else total + extra).backward()
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()


def through_peft(case, base, folder):
    model = AUTO[case_name(case)].from_pretrained(base)
    wrapped = peft.PeftModel.from_pretrained(model, folder).eval()
    return logits(wrapped, inputs(model, 99)).detach()


DELTA = {"rank": 2, "alpha": 3, "update_ratio": 2.0, "start_step": 1}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["in_place", "closed_form"])
def test_delta_lora_is_a_plain_lora_of_rank_2r(name, form, tmp_path):
    case = CASES[name]
    base, folder, expected = trained(case, tmp_path, form=form, **DELTA)
    done = export.export_peft(folder, tmp_path / "peft")
    slices = 2 if name == "gpt2" else 1
    assert set(done.ranks.values()) == {2 * 2 * slices}
    assert max(done.errors.values()) < 1e-5
    found = through_peft(case, base, tmp_path / "peft")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    untouched = AUTO[name].from_pretrained(base).eval()
    assert (logits(untouched, inputs(untouched, 99)) - expected).abs().max() > 1e-3
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 * slices
    size = sum(p.stat().st_size for p in (tmp_path / "peft").iterdir())
    assert size < sum(p.stat().st_size for p in base.iterdir())


@pytest.mark.parametrize("mistake", ["only the branch", "lambda missing in B_T"])
def test_leaving_out_a_part_of_the_change_differs(mistake, tmp_path):
    """The rank-r half, which a plain save of A and B would be, is not the model."""
    case = CASES["roberta"]
    base, folder, expected = trained(case, tmp_path, form="closed_form", **DELTA)
    export.export_peft(folder, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "lora_B" in name:
            if mistake == "only the branch":
                tensors[name][:, 2:] = 0
            else:
                tensors[name][:, :2] /= 3
    save_file(tensors, path, metadata={"format": "pt"})
    found = through_peft(case, base, tmp_path / "peft")
    assert (found - expected).abs().max() > 1e-4


def test_zeros_stand_where_the_key_is(tmp_path):
    _, folder, _ = trained(CASES["gpt2"], tmp_path, form="closed_form", **DELTA)
    export.export_peft(folder, tmp_path / "peft")
    for key, tensor in load_file(tmp_path / "peft" / "adapter_model.safetensors").items():
        if "lora_B" in key:
            assert tensor.shape == (48, 8)
            assert not tensor[16:32].any()
            assert tensor[:16].any()
            assert tensor[32:].any()


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_every_low_rank_method_exports(name, tmp_path):
    methods = {
        "lora": {"rank": 2, "alpha": 3},
        "dylora": {"rank": 3, "alpha": 3},
        "adalora": {
            "init_rank": 3, "target_rank": 1, "alpha": 3, "orth_reg_weight": 0.1,
            "initial_fraction": 0.1, "final_fraction": 0.3, "interval": 1,
        },
    }  # fmt: skip
    for method, settings in methods.items():
        case = CASES[name]
        base, folder, expected = trained(case, tmp_path / method, method, **settings)
        done = export.export_peft(folder, tmp_path / method / "peft")
        found = through_peft(case, base, tmp_path / method / "peft")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        if method == "adalora":
            assert min(done.ranks.values()) < 3 * (2 if name == "gpt2" else 1), "masked ones go"


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_dylora_exports_at_any_rank(rank, tmp_path):
    case = CASES["roberta"]
    base, folder, _ = trained(case, tmp_path, "dylora", num_steps=12, rank=3, alpha=3)
    done = export.export_peft(folder, tmp_path / "peft", settings={"eval_rank": rank})
    assert set(done.ranks.values()) == {rank}
    model = delta_lora.load(folder, settings={"eval_rank": rank}).model
    expected = logits(model, inputs(model, 99)).detach()
    found = through_peft(case, base, tmp_path / "peft")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_compression_is_the_best_of_its_rank_and_says_what_it_leaves_out(tmp_path):
    case = CASES["roberta"]
    base, folder, expected = trained(case, tmp_path, form="closed_form", **DELTA)
    errors = []
    for rank in (1, 2, 3, 4):
        done = export.export_peft(folder, tmp_path / f"peft{rank}", rank=rank)
        assert set(done.ranks.values()) == {rank}
        errors.append(max(done.errors.values()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-12
    found = through_peft(case, base, tmp_path / "peft4")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    model = delta_lora.load(folder).model
    layer = model.roberta.encoder.layer[0].attention.self.query
    S = torch.linalg.svdvals(layer.query.delta_weight().detach().double())
    done = export.export_peft(folder, tmp_path / "again", rank=2)
    name = "roberta.encoder.layer.0.attention.self.query"
    assert done.errors[name] == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-6)


def test_full_fine_tuning_of_w_needs_a_rank(tmp_path):
    case = CASES["roberta"]
    base, folder, expected = trained(case, tmp_path, "full_query_value")
    with pytest.raises(ValueError, match=r"no product of low rank.*rank=N.*merged model"):
        export.export_peft(folder, tmp_path / "peft")
    export.export_peft(folder, tmp_path / "peft", rank=16)
    found = through_peft(case, base, tmp_path / "peft")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_full_fine_tuning_is_refused_as_a_lora_and_exports_merged(tmp_path):
    case = CASES["gpt2"]
    _, folder, expected = trained(case, tmp_path, "full")
    with pytest.raises(ValueError, match=r"changed too, which no LoRA .* can hold"):
        export.export_peft(folder, tmp_path / "peft", rank=4)
    export.export_merged(folder, tmp_path / "merged")
    model = AUTO["gpt2"].from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(model, inputs(model, 99)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_merged_model_is_a_plain_one(name, tmp_path):
    case = CASES[name]
    _, folder, expected = trained(case, tmp_path, form="closed_form", **DELTA)
    export.export_merged(folder, tmp_path / "merged")
    model = AUTO[name].from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in n for n, _ in model.named_parameters())
    torch.testing.assert_close(logits(model, inputs(model, 99)), expected, atol=1e-5, rtol=0)


def test_the_head_goes_along(tmp_path):
    case = CASES["bert"]
    base, folder, _ = trained(case, tmp_path, form="closed_form", **DELTA)
    export.export_peft(folder, tmp_path / "peft")
    model = AUTO["bert"].from_pretrained(base)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    ours = delta_lora.load(folder).model.classifier.weight
    assert torch.equal(wrapped.base_model.model.classifier.modules_to_save["default"].weight, ours)


def test_a_frozen_head_goes_along_too(tmp_path):
    """PEFT looks for the usual heads of a classifier whether they trained or not."""
    case = CASES["roberta"]
    base, folder, expected = trained(replace(case, head=()), tmp_path, name="roberta", **DELTA)
    export.export_peft(folder, tmp_path / "peft")
    found = through_peft(case, base, tmp_path / "peft")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [None, 2])
def test_prompts_are_refused(rank, tmp_path):
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1}
    _, folder, _ = trained(CASES["roberta"], tmp_path, "peft", peft=settings)
    with pytest.raises(ValueError, match="cannot be merged into the weights"):
        export.export_merged(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match=r"no part of the base|no product of low rank"):
        export.export_peft(folder, tmp_path / "peft", rank=rank)


@pytest.mark.parametrize("settings", [{}, {"bias": "lora_only"}])
def test_what_peft_changed_beside_the_slices_is_not_dropped(settings, tmp_path):
    """In GPT-2 PEFT adapts the key too; our projections are query and value."""
    settings = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": False, **settings,
    }  # fmt: skip
    _, folder, _ = trained(CASES["gpt2"], tmp_path, "peft", peft=settings)
    with pytest.raises(ValueError, match="which no LoRA on the adapted layers can hold"):
        export.export_peft(folder, tmp_path / "peft", rank=4)


def test_a_bfloat16_base_exports_as_peft_and_not_merged(tmp_path):
    case = CASES["gpt2"]
    model = case.model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    model = AUTO["gpt2"].from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    adapter = delta_lora.attach(model, learning_rate=2e-2, **DELTA)
    train(adapter, 4)
    adapter.save(tmp_path / "adapter")
    export.export_peft(tmp_path / "adapter", tmp_path / "peft")
    with pytest.raises(ValueError, match="narrower than float32"):
        export.export_merged(tmp_path / "adapter", tmp_path / "merged")
    expected = logits(model.eval(), inputs(model, 99)).detach()
    plain = AUTO["gpt2"].from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    found = logits(wrapped, inputs(plain, 99)).detach()
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=0)


def test_a_module_of_ones_own_exports_too(tmp_path):
    case = CASES["mlp"]
    model, plain = case.model(), case.model()
    adapter = delta_lora.attach(
        model, projections=case.projections, head=case.head, learning_rate=1e-2, **DELTA
    )
    train(adapter, 5)
    adapter.save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="base=model"):
        export.export_peft(tmp_path / "adapter", tmp_path / "peft")
    export.export_peft(tmp_path / "adapter", tmp_path / "peft", base=plain)
    assert all(torch.equal(a, b) for a, b in zip(
        plain.parameters(), case.model().parameters(), strict=True))  # fmt: skip
    wrapped = peft.PeftModel.from_pretrained(case.model(), tmp_path / "peft").eval()
    batch = inputs(model, 99)
    torch.testing.assert_close(
        wrapped(batch["input_ids"]), model.eval()(batch["input_ids"]), atol=1e-5, rtol=0
    )
    assert isinstance(wrapped, nn.Module)
