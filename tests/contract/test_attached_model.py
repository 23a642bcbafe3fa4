"""What an attached model does: say its size, refuse to be saved half; methods of one's own."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import delta_lora
from delta_lora import methods
from delta_lora.method_bases import LowRankMethod
from delta_lora.protocols import Method
from tests.contract.models import CASES, inputs, logits
from tests.contract.test_export import DELTA, train


class HalfLora(LowRankMethod):
    """A method that is no file of delta_lora/methods."""

    name = "half_lora"

    def __init__(self, *, rank: int = 2, learning_rate: float = 1e-2) -> None:
        super().__init__(rank=rank, alpha=rank / 2, learning_rate=learning_rate)


def attached(name="gpt2", method="delta_lora", **settings):
    case = CASES[name]
    return delta_lora.attach(
        case.model(), method, projections=case.projections, head=case.head, total_steps=10,
        **(settings or (DELTA if method == "delta_lora" else {})),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["delta_lora", "lora", "adalora", "dylora", "full_query_value"])
def test_save_pretrained_says_what_to_call_and_works_on_merged_weights(method, tmp_path):
    adapter = attached(method=method)
    train(adapter, 4)
    model = adapter.model.eval()
    with pytest.raises(RuntimeError, match=r"adapter\.save\(folder\).*with adapter\.merged\(\) as"):
        model.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    with adapter.merged() as plain:
        plain.save_pretrained(tmp_path / "whole")
        expected = logits(plain, inputs(plain))
    with pytest.raises(RuntimeError, match=r"adapter\.save\(folder\)"):
        model.save_pretrained(tmp_path / "half")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(again, inputs(again)), expected, atol=0, rtol=0)


def test_a_model_that_nothing_was_added_to_is_saved_as_it_is(tmp_path):
    attached(method="full").model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_what_cannot_be_merged_is_not_saved_as_a_whole(tmp_path):
    model = CASES["gpt2"].model(dtype=torch.bfloat16)
    adapter = delta_lora.attach(model, **DELTA)
    with (
        adapter.merged() as same,
        pytest.raises(RuntimeError, match=r"cannot be merged .* adapter\.save\(folder\)"),
    ):
        same.save_pretrained(tmp_path / "half")


def test_the_sizes_are_printed_as_peft_prints_them(capsys):
    attached(form="in_place", **DELTA).print_trainable_parameters()
    model = CASES["gpt2"].model()
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_proj"]))
    theirs.print_trainable_parameters()
    ours, theirs = capsys.readouterr().out.splitlines()
    layout = [part.split(":")[0] for part in theirs.split(" || ")]
    assert [p.split(":")[0] for p in ours.split(" || ")] == [
        layout[0],
        "updatable params",
        *layout[1:],
    ]
    total = sum(p.numel() for p in CASES["gpt2"].model().parameters())
    factors = 2 * 2 * 2 * (16 + 16)  # blocks, query and value, rank
    assert ours == (
        f"trainable params: {factors:,d} || updatable params: {2 * 2 * 16 * 16:,d} || "
        f"all params: {total + factors:,d} || trainable%: {100 * factors / (total + factors):.4f}"
    )


# ---------------------------------------------------------------------- methods of one's own


def test_a_method_of_ones_own_is_attached_saved_and_loaded_by_its_name(tmp_path):
    adapter = attached(method="half_lora", rank=3)
    train(adapter, 3)
    expected = logits(adapter.model.eval(), inputs(adapter.model))
    adapter.save(tmp_path)
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    assert description["method"] == {"name": "half_lora", "rank": 3, "learning_rate": 1e-2}
    again = delta_lora.load(tmp_path, base=CASES["gpt2"].model())
    assert isinstance(again.method, HalfLora)
    assert torch.equal(logits(again.model, inputs(again.model)), expected)


def test_near_names_know_them_too():
    with pytest.raises(ValueError, match=r"did you mean 'half_lora'.*once the module that defines"):
        attached(method="half_lor")


def test_a_class_that_is_defined_again_takes_the_place_of_the_former(monkeypatch):
    def define():
        class Again(HalfLora):
            name = "again"

        return Again

    first, second = define(), define()
    assert first is not second
    assert methods.method_class("again") is second


def test_two_methods_of_one_name_are_refused():
    class Lora(HalfLora):
        name = "twice"

    class Other(HalfLora):
        name = "twice"

    assert Lora is not Other
    with pytest.raises(ValueError, match=r"two methods are called 'twice': .*Lora.*Other"):
        methods.method_class("twice")


def test_a_setting_cannot_be_called_name():
    class Named(HalfLora):
        name = "named"

        def __init__(self, *, name: str = "x") -> None:
            super().__init__()

    assert issubclass(Named, Method)
    with pytest.raises(TypeError, match="has a setting 'name'"):
        attached(method="named")


# ---------------------------------------------------------------------- files


def saved(folder):
    attached().save(folder)
    return folder


def test_tensors_of_another_adapter_are_refused(tmp_path):
    one, other = saved(tmp_path / "one"), attached()
    train(other, 3)
    other.save(tmp_path / "other")
    (tmp_path / "other" / "adapter_model.safetensors").replace(one / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="checksum is not the one in adapter_config"):
        delta_lora.load(one, base=CASES["gpt2"].model())


@pytest.mark.parametrize(("found", "age"), [(99, "a newer"), (None, "an older")])
def test_a_file_of_another_format_is_refused(found, age, tmp_path):
    path = saved(tmp_path) / "adapter_config.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "format": found}))
    with pytest.raises(ValueError, match=f"written by {age} version"):
        delta_lora.load(tmp_path, base=CASES["gpt2"].model())


def test_a_base_that_has_an_adapter_is_refused(tmp_path):
    saved(tmp_path)
    base = attached(method="full").model
    assert isinstance(base, nn.Module)
    with pytest.raises(RuntimeError, match="has a method attached"):
        delta_lora.load(tmp_path, base=base, check_base=False)
