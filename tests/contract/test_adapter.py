"""The library: attach, a hand-written loop of two calls, save, load, continue."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import delta_lora
from delta_lora import export, methods
from delta_lora.adapter import attach, load
from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.methods.dylora import draw_rank
from tests.contract.models import CASES, inject, inputs, logits, loss
from tests.contract.models import train as train_method
from tests.contract.test_export import DELTA, train, trained

ROOT = Path(__file__).parents[2]
ADALORA = {
    "init_rank": 3, "target_rank": 1, "alpha": 3, "orth_reg_weight": 0.1,
    "initial_fraction": 0.1, "final_fraction": 0.3, "interval": 2,
}  # fmt: skip


def attached(name="gpt2", method="delta_lora", *, model=None, **settings):
    """Return the adapter of a method on a model of `CASES`."""
    case = CASES[name]
    model = case.model() if model is None else model
    return attach(model, method, projections=case.projections, head=case.head, **settings)


@pytest.mark.parametrize("name", CASES)
def test_two_calls_in_a_loop_train_as_the_method_does(name):
    case = CASES[name]
    model = case.model()
    adapter = attached(name, model=model, seed=3, learning_rate=1e-2, **DELTA)
    assert adapter.model is model
    train(adapter, 5)
    adapter.method.finish(5)
    method = DeltaLora(learning_rate=1e-2, **DELTA)
    other = inject(method, case.model(), case)
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    for _ in train_method(method, other, 5, optimizer=optimizer):
        pass
    for n, p in model.named_parameters():
        torch.testing.assert_close(other.get_parameter(n), p, atol=1e-6, rtol=0)
    assert adapter.method.describe()["num_weight_updates"] == 3


@pytest.mark.parametrize("name", CASES)
def test_w_of_the_user_stays_as_it_is_unless_its_writing_is_asked_for(name):
    """To the bit; and in place, which writes it, trains the same model."""
    case, models = CASES[name], {}
    start = case.model(dtype=torch.float64).state_dict()
    layers = {projection.rpartition(".")[0] for projection in case.names}
    for form in ({}, {"form": "in_place"}):
        model = case.model(dtype=torch.float64)
        adapter = attached(name, model=model, learning_rate=1e-2, **DELTA, **form)
        train(adapter, 5)
        adapter.method.finish(5)
        assert adapter.method.describe()["num_weight_updates"] == 3
        for layer in layers:
            W = model.get_submodule(layer).weight
            assert torch.equal(W, start[f"{layer}.weight"]) == (not form)
        batch = inputs(model, 99)
        models[len(form)] = [logits(model.eval(), batch).detach()] + [
            p.detach() for n, p in model.named_parameters() if "lora_" in n
        ]
    for ours, printed in zip(*models.values(), strict=True):
        torch.testing.assert_close(ours, printed, atol=1e-10, rtol=0)


def test_dylora_draws_its_ranks_by_itself():
    adapter, seen = attached(method="dylora", rank=3, alpha=3, seed=5), []
    model = adapter.model
    original = adapter.method.before_micro_batch

    def watch(step, micro_step):
        seen.append((step, micro_step))
        original(step, micro_step)

    adapter.method.before_micro_batch = watch
    optimizer = torch.optim.AdamW(adapter.param_groups())
    model.train()
    for step in range(3):
        for _ in range(2):
            loss(model, inputs(model, step)).backward()
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({draw_rank(3, 5, *key) for key in seen}) > 1
    with torch.no_grad():
        logits(model, inputs(model))
    logits(model.eval(), inputs(model))
    assert len(seen) == 6, "evaluation draws nothing"


def test_adalora_needs_the_number_of_steps():
    with pytest.raises(ValueError, match="set total_steps"):
        attached(method="adalora", **ADALORA)
    adapter = attached(method="adalora", total_steps=10, **ADALORA)
    train(adapter, 10)
    assert adapter.method.describe()["mean_rank"] == 1.0


@pytest.mark.parametrize("form", ["in_place", "closed_form"])
@pytest.mark.parametrize("name", ["gpt2", "roberta", "bart"])
def test_a_saved_adapter_loads_to_the_bit(name, form, tmp_path):
    _, folder, expected = trained(CASES[name], tmp_path, form=form, **DELTA)
    adapter = load(folder)
    model = adapter.model
    assert not model.training
    assert torch.equal(logits(model, inputs(model, 99)), expected)
    with adapter.merged() as plain:
        found = logits(plain, inputs(plain, 99))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_folder_of_base_and_adapter_can_be_moved(tmp_path):
    _, _, expected = trained(CASES["gpt2"], tmp_path / "here", **DELTA)
    (tmp_path / "here").rename(tmp_path / "there")
    model = load(tmp_path / "there" / "adapter").model
    assert torch.equal(logits(model, inputs(model, 99)), expected)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("delta_lora", DELTA),
        ("delta_lora", {**DELTA, "form": "in_place"}),
        ("dylora", {"rank": 2, "alpha": 3}),
        ("full_query_value", {}),
        ("adalora", ADALORA),
    ],
    ids=["delta_lora", "delta_lora_in_place", "dylora", "full_query_value", "adalora"],
)
def test_a_stopped_loop_continues_to_the_bit(method, settings):
    runs = []
    for stop in (None, 3):
        adapter = attached(method=method, total_steps=10, **settings)
        model = adapter.model
        optimizer = torch.optim.AdamW(adapter.param_groups())
        for step in range(6):
            if step == stop:
                state, optimizer_state = (
                    copy.deepcopy(adapter.state_dict()),
                    copy.deepcopy(optimizer.state_dict()),
                )
                adapter = attached(method=method, total_steps=10, **settings)
                model = adapter.model
                adapter.load_state_dict(state)
                optimizer = torch.optim.AdamW(adapter.param_groups())
                optimizer.load_state_dict(optimizer_state)
            model.train()
            torch.manual_seed(step)
            loss(model, inputs(model, step)).backward()
            adapter.before_step()
            optimizer.step()
            adapter.after_step()
            optimizer.zero_grad()
        runs.append(model.state_dict())
    assert all(torch.equal(tensor, runs[1][n]) for n, tensor in runs[0].items())


def test_what_a_seed_drew_and_never_trains_comes_back(tmp_path):
    """VeRA's frozen projections are in no file; the seed draws them again."""
    config = {"peft_type": "VERA", "r": 4, "save_projection": False}
    _, folder, expected = trained(CASES["roberta"], tmp_path, "peft", peft=config, seed=5)
    model = load(folder).model
    torch.testing.assert_close(logits(model, inputs(model, 99)), expected, atol=0, rtol=0)


def test_the_state_of_another_method_is_refused():
    state = attached(method="lora", rank=2, alpha=3).state_dict()
    with pytest.raises(ValueError, match="not one of this model and method"):
        attached(**DELTA).load_state_dict(state)


def test_settings_given_to_load_are_kept_by_save(tmp_path):
    _, folder, _ = trained(CASES["gpt2"], tmp_path, "dylora", rank=3, alpha=3)
    load(folder, settings={"eval_rank": 1}).save(tmp_path / "again")
    assert load(tmp_path / "again").method.describe()["eval_rank"] == 1


def test_a_failed_save_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    _, folder, expected = trained(CASES["gpt2"], tmp_path, **DELTA)
    adapter = load(folder)

    def fail(path, tensors):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("delta_lora.checkpoint.write_tensors", fail)
        with pytest.raises(OSError, match="No space"):
            adapter.save(folder)
    assert not list(folder.glob(".*")), "no half of a file stays"
    model = load(folder).model
    torch.testing.assert_close(logits(model, inputs(model, 99)), expected)


def test_a_base_is_found_through_links_and_a_hub_id_is_no_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep" / "down", target_is_directory=True)
    (tmp_path / "disk" / "deep" / "down").mkdir(parents=True)
    model = CASES["gpt2"].model()
    model.save_pretrained(tmp_path / "base")
    adapter = attached(model=type(model).from_pretrained(tmp_path / "base"), **DELTA)
    adapter.save(tmp_path / "link" / "run")
    assert load(tmp_path / "link" / "run") is not None

    adapter = attached(**DELTA)
    adapter.description["base"]["source"] = str(tmp_path / "gpt2")  # as a hub id would read
    adapter.save(tmp_path / "gpt2" / "run")
    written = json.loads((tmp_path / "gpt2" / "run" / "adapter_config.json").read_text())
    assert written["base"]["source"] == str(tmp_path / "gpt2")


def test_adalora_s_averages_follow_the_model_when_they_no_longer_change():
    adapter = attached(method="adalora", total_steps=10, **ADALORA)
    method = adapter.method
    adapter.model.to("meta")
    method._num_steps = 9  # as in a run that continues in its last phase
    method.after_step(9)
    averages = [*method._sensitivity.values(), *method._uncertainty.values()]
    assert {average.device.type for average in averages} == {"meta"}


def test_another_base_is_refused(tmp_path):
    _, folder, _ = trained(CASES["gpt2"], tmp_path, **DELTA)
    with pytest.raises(ValueError, match="base model is not the one"):
        load(folder, base=CASES["gpt2"].model(seed=1))
    other = load(folder, base=CASES["gpt2"].model(seed=1), check_base=False)
    assert other.method.describe()["num_weight_updates"] == 4


class TestBadInput:
    def test_an_unknown_method(self):
        with pytest.raises(ValueError, match=r"unknown method 'delta_lor'; did you mean 'delta_lo"):
            attached(method="delta_lor")

    def test_an_unknown_setting(self):
        with pytest.raises(TypeError, match=r"no setting 'ranks'; did you mean 'rank'"):
            attached(ranks=4)

    def test_a_missing_setting(self):
        with pytest.raises(TypeError, match=r"method 'peft' needs peft="):
            attached(method="peft")

    def test_a_value_that_is_not_allowed(self):
        with pytest.raises(ValueError, match="rank=0"):
            attached(rank=0)

    def test_attaching_twice(self):
        with pytest.raises(RuntimeError, match="has a method attached"):
            attach(attached(**DELTA).model)

    def test_no_adapter_in_a_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no adapter"):
            load(tmp_path)

    @pytest.mark.parametrize("folder", [None, 3, "", " "])
    def test_what_is_no_folder_is_neither_read_nor_written(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        adapter = attached(**DELTA)
        whole = adapter.save("adapter")
        uses = (
            adapter.save, load, lambda each: export.export_peft(whole, each),
            lambda each: export.export_peft(each, "x"),
            lambda each: export.export_merged(whole, each),
        )  # fmt: skip
        for use in uses:
            with pytest.raises((TypeError, ValueError), match=r"(folder|path)=.*write"):
                use(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    def test_an_adapter_is_no_folder(self, tmp_path):
        adapter = attached(**DELTA)
        for use in (load, lambda each: export.export_peft(each, tmp_path)):
            with pytest.raises(TypeError, match=r"not the Adapter itself; write it with .save"):
                use(adapter)
        with pytest.raises(TypeError, match="3 is a int, neither a folder nor a hub id"):
            load(adapter.save(tmp_path / "adapter"), base=3)

    def test_an_adapter_of_peft(self, tmp_path):
        import peft

        model = peft.get_peft_model(
            CASES["gpt2"].model(), peft.LoraConfig(target_modules="all-linear")
        )
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="PeftModel"):
            load(tmp_path)

    def test_a_damaged_description(self, tmp_path):
        _, folder, _ = trained(CASES["gpt2"], tmp_path, **DELTA)
        (folder / "adapter_config.json").write_text('{"method": ')
        with pytest.raises(ValueError, match="is damaged"):
            load(folder)

    @pytest.mark.parametrize("name", ["os.system", "antigravity", "..trainer", "lora.Lora", None])
    def test_a_description_imports_methods_and_nothing_else(self, name):
        before = set(sys.modules)
        with pytest.raises(ValueError, match="unknown method"):
            methods.build({"name": name, "rank": 2})
        assert set(sys.modules) == before

    def test_a_classification_head_left_frozen_is_said(self, caplog):
        with caplog.at_level(logging.WARNING, logger="delta_lora"):
            attach(CASES["roberta"].model(), **DELTA)
        assert "classifier stays frozen" in caplog.text

    def test_a_setting_that_cannot_be_saved_is_refused_before_the_training(self):
        with pytest.raises(TypeError, match=r"method\.rank=.*int64.* cannot be saved as JSON"):
            attached(**{**DELTA, "rank": np.int64(2)})

    def test_training_goes_on_from_a_state_not_from_a_loaded_adapter(self, tmp_path):
        _, folder, _ = trained(CASES["gpt2"], tmp_path, **DELTA)
        adapter = load(folder)
        assert adapter.step == 6
        with pytest.raises(RuntimeError, match=r"loaded for use.*load_state_dict"):
            train(adapter, 1)

    def test_a_weight_that_two_layers_share(self):
        model = CASES["gpt2"].model()
        assert model.lm_head.weight is model.transformer.wte.weight
        with pytest.raises(ValueError, match=r"lm_head cannot be adapted: its weight is shared"):
            attach(model, "lora", projections=["lm_head"], rank=2)

    def test_layers_whose_weights_torch_reads_itself(self):
        block = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
        for name in ("linear1", "out_proj"):
            with pytest.raises(ValueError, match="would have no effect"):
                attach(block, "lora", projections=[name], rank=2)

    def test_a_description_runs_no_code_of_the_base(self, tmp_path):
        base, folder, _ = trained(CASES["gpt2"], tmp_path, **DELTA)
        config = json.loads((base / "config.json").read_text())
        (base / "evil.py").write_text("raise SystemExit('this ran')")
        config["auto_map"] = {"AutoConfig": "evil.Config"}
        (base / "config.json").write_text(json.dumps(config))
        description = json.loads((folder / "adapter_config.json").read_text())
        description["base"]["config_overrides"] = {"trust_remote_code": True}
        del description["sha256"]  # the seal, which who means harm leaves out
        (folder / "adapter_config.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match="config_overrides has 'trust_remote_code'"):
            load(folder)

    def test_layers_that_do_not_exist(self):
        with pytest.raises(ValueError, match=r"'qurey' matched no linear layer"):
            attach(CASES["roberta"].model(), projections=["qurey"], **DELTA)


def test_defaults_are_the_paper_s_and_said(caplog):
    with caplog.at_level(logging.INFO, logger="delta_lora"):
        method = attach(CASES["gpt2"].model()).method
    assert isinstance(method, DeltaLora)
    assert (method.update_ratio, method.start_step, method.learning_rate) == (2.0, 500, 2e-4)
    assert method.form == "closed_form"
    assert re.search(r"delta_lora: rank=8, .*update_ratio=2\.0, .* by default", caplog.text)


def test_every_method_has_a_class_with_its_name_a_version_and_typed_defaults():
    assert methods.method_class("delta_lora") is DeltaLora
    names = [path.stem for path in (ROOT / "delta_lora" / "methods").glob("[a-z]*.py")]
    kinds = {name: methods.method_class(name) for name in names}
    assert {name: kind.name for name, kind in kinds.items()} == {name: name for name in names}
    for name, kind in kinds.items():
        assert kind.version >= 1
        types = typing.get_type_hints(kind.__init__)
        for key, parameter in inspect.signature(kind).parameters.items():
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            if (name, key) == ("peft", "peft"):
                continue
            assert isinstance(parameter.default, types[key]), (name, key)


def test_importing_the_library_is_quick_and_without_warnings():
    """`-W error` turns every warning of ours into a failure; torch comes with first use only."""
    code = (
        "import sys, delta_lora\n"
        "assert 'torch' not in sys.modules\n"
        "assert {'attach', 'load', 'Adapter'} <= set(dir(delta_lora))\n"
        "delta_lora.attach, delta_lora.load\n"
        "import delta_lora.export\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_state_of_the_adapter_is_plain_tensors(tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = attached(**DELTA)
    state = {n: t.clone() for n, t in adapter.state_dict().items()}
    save_file(state, tmp_path / "state.safetensors")
    adapter.load_state_dict(load_file(tmp_path / "state.safetensors"))


def test_a_model_with_an_adapter_can_be_copied():
    adapter = attached(**DELTA)
    twin = copy.deepcopy(adapter)
    assert twin.model is not adapter.model
    assert twin.method is not adapter.method
    train(twin, 3)
    assert (twin.step, adapter.step) == (3, 0)
    train(adapter, 3)
    for name, p in adapter.model.named_parameters():
        assert torch.equal(twin.model.get_parameter(name), p)


def test_what_is_written_is_json_and_safetensors(tmp_path):
    _, folder, _ = trained(CASES["gpt2"], tmp_path, **DELTA)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["base"]["source"] == "../base"
    assert description["base"]["family"] == "causal_lm"
    assert description["step"] == 6
    assert description["method"]["name"] == "delta_lora"
    assert description["method"]["form"] == "closed_form", "defaults stand in the file"
    assert isinstance(load(folder).model, tf.GPT2LMHeadModel)
    assert delta_lora.__version__


def test_a_rate_that_the_optimiser_would_not_use_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    adapter = delta_lora.attach(model, method="lora", rank=2, projections=["0"])
    x = torch.randn(3, 4)

    def step(optimizer):
        model(x).sum().backward()
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()

    with pytest.raises(
        RuntimeError, match=r"AdamW was given lr=0\.01 and trains with 0\.0002.*attach"
    ):
        step(torch.optim.AdamW(adapter.param_groups(), lr=1e-2))
    adapter._watch.forget()  # the refused step was the loop's end
    step(torch.optim.AdamW(adapter.param_groups()))
    step(torch.optim.AdamW(adapter.param_groups(), lr=2e-4))
    more = torch.nn.Parameter(torch.zeros(1))
    step(torch.optim.SGD([*adapter.param_groups(), {"params": [more]}], lr=0.5))
    scheduled = torch.optim.AdamW(adapter.param_groups())
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda _: 0.0)
    step(scheduled)
    assert adapter.step == 4


def test_a_base_from_a_relative_folder_is_found_from_another_working_folder(tmp_path, monkeypatch):
    case = CASES["gpt2"]
    case.model().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = type(case.model()).from_pretrained("base")
    adapter = delta_lora.attach(model, method="lora", rank=2)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    adapter.save("saved")
    assert delta_lora.load("saved").model.config.name_or_path


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapter = delta_lora.attach(copy.deepcopy(base), method="lora", rank=2, projections=["0"])
    adapter.save("~/adapter")
    export.export_peft("~/adapter", "~/peft", base=base)
    assert (tmp_path / "adapter").is_dir()
    assert (tmp_path / "peft").is_dir()
    assert not (tmp_path / "~").exists()
