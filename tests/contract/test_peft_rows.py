"""The contract of the methods of the package peft: every yaml in configs/method/peft, and LORA."""

import copy
import importlib.util
import sys

import peft
import pytest
import torch
import transformers as tf
from peft.utils import PeftType
from torch import nn

from delta_lora.methods.lora import Lora
from delta_lora.methods.peft import PROMPTS, REFUSED, Peft
from tasks.generation import Seq2SeqBeamSearch
from tests.contract.models import (
    BATCH,
    CASES,
    CONFIGS,
    LENGTH,
    NUM_LABELS,
    VOCABULARY,
    WIDTH,
    Case,
    adamw,
    bart,
    inject,
    inputs,
    logits,
    loss,
    method_from_config,
    train,
)

ROWS = ["peft", *sorted(f"peft/{p.stem}" for p in (CONFIGS / "method" / "peft").glob("*.yaml"))]
PROMPT_ROWS = ["peft/p_tuning", "peft/prefix_tuning", "peft/prompt_tuning"]
#: rows that PEFT does not have for GPT-2's Conv1D.
LINEAR_ONLY = ["peft/beft", "peft/lokr", "peft/peanut"]
POSITIONS = 40
TOKENS = 5


def roberta():
    """Build a RoBERTa with room for virtual tokens, of two layers."""
    return tf.RobertaForSequenceClassification(
        tf.RobertaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=POSITIONS, num_labels=NUM_LABELS,
            pad_token_id=1,
        )
    )  # fmt: skip


MODELS = {
    "roberta": Case(roberta, None, ("classifier",), ()),
    "bart": Case(lambda: bart(max_position_embeddings=POSITIONS), None, (), ()),
    "gpt2": CASES["gpt2"],
}


def is_prompt(name):
    return name in PROMPT_ROWS


def row(name, **overrides):
    """Return the method of a row, its sizes fitted to the tiny models."""
    method = method_from_config(name, **overrides)
    if is_prompt(name):
        method.settings["num_virtual_tokens"] = TOKENS
    return method


COMBINATIONS = [
    pytest.param(name, model, id=f"{name.removeprefix('peft/')}-{model}")
    for name in ROWS
    for model in MODELS
    if not (model == "gpt2" and name in (*PROMPT_ROWS, *LINEAR_ONLY))
]
every_combination = pytest.mark.parametrize(("name", "model_name"), COMBINATIONS)
TUNERS = [c for c in COMBINATIONS if not is_prompt(c.values[0])]
every_tuner = pytest.mark.parametrize(("name", "model_name"), TUNERS)


def test_the_rows():
    assert [name.removeprefix("peft/") for name in ROWS] == [
        "peft", "beft", "dora", "ia3", "ln_tuning", "lokr", "p_tuning", "peanut", "prefix_tuning",
        "prompt_tuning", "rslora", "vera",
    ]  # fmt: skip
    assert {row(name).peft_type for name in PROMPT_ROWS} == set(PROMPTS)


@every_combination
def test_the_start_is_the_base_model_but_for_prompts(name, model_name):
    case = MODELS[model_name]
    model = case.model()
    batch = inputs(model)
    before = logits(model, batch)
    inject(row(name), model, case)
    after = logits(model, batch)
    assert after.shape == before.shape
    if is_prompt(name):
        assert (after - before).abs().max() > 1e-6
    else:  # DoRA divides by a norm that it computed itself: equal but for rounding
        torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


def declared(name, case, model, plain):
    """Names that must train: those the base model does not have, and the head."""
    head = {n for n in plain if n.startswith(tuple(f"{module}." for module in case.head))}
    new = {n for n, _ in model.named_parameters() if n.replace(".base_layer", "") not in plain}
    return head | new


@every_combination
def test_only_declared_weights_move_and_all_of_them(name, model_name):
    case = MODELS[model_name]
    model = case.model()
    plain = dict(model.named_parameters())
    method = row(name)
    inject(method, model, case)
    expected = declared(name, case, model, plain)
    assert {n for group in method.param_groups(model) for n, _ in group["params"]} == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert set(method.updated_tensors(model)) == expected
    assert len(expected) > len([n for n in plain if n.startswith("classifier.")])
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    for _ in train(method, model, 4):
        pass
    method.finish(4)
    same = {n for n, p in model.named_parameters() if torch.equal(p, start[n])}
    assert same == set(start) - expected
    assert all(torch.equal(model.get_buffer(n), b) for n, b in buffers.items())


@every_combination
def test_the_loss_falls(name, model_name):
    case = MODELS[model_name]
    model = case.model()
    method = row(name, learning_rate=0.03)
    inject(method, model, case)
    optimizer = adamw(method, model, weight_decay=0.0)
    batch, losses = inputs(model), []
    for _ in range(20):
        optimizer.zero_grad()
        total = loss(model, batch)
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0] - 1e-5, losses  # in evaluation mode, so without noise


@every_tuner
def test_merged_equals_forward_and_restores(name, model_name):
    case = MODELS[model_name]
    model = case.model()
    plain_names = [n for n, _ in model.named_parameters()]
    method = row(name)
    inject(method, model, case)
    for _ in train(method, model, 3, weight_decay=0.0):
        pass
    model.eval()
    batch = inputs(model, 77)
    before = logits(model, batch)
    start = copy.deepcopy(model.state_dict())
    with method.merged(model) as merged:
        assert merged is model
        # BEFT gives a bias to what has none, so a name may come
        assert set(plain_names) <= {n for n, _ in model.named_parameters()}
        assert not any(type(m).__module__.startswith("peft") for m in model.modules())
        torch.testing.assert_close(logits(model, batch), before, atol=2e-6, rtol=2e-6)
        with pytest.raises(RuntimeError, match="merged already"), method.merged(model):
            pass
    after = model.state_dict()
    assert list(after) == list(start)
    assert all(torch.equal(after[n], start[n]) for n in start)
    assert torch.equal(logits(model, batch), before)


def test_merged_is_undone_by_an_exception_and_keeps_the_mode():
    case = MODELS["roberta"]
    model, method = case.model(), row("peft")
    inject(method, model, case)
    for _ in train(method, model, 3):
        pass
    start = copy.deepcopy(model.state_dict())

    def interrupted():
        with method.merged(model):
            model.eval()
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        interrupted()
    assert all(torch.equal(tensor, start[n]) for n, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_a_method_that_cannot_merge_runs_as_it_is():
    case = MODELS["roberta"]
    method = Peft(peft={"peft_type": "LILY", "r": 2, "stride_A": 1, "num_B": 2}, learning_rate=1e-2)
    model = inject(method, case.model(), case)
    for _ in train(method, model, 3):
        pass
    model.eval()
    start = copy.deepcopy(model.state_dict())
    before = logits(model, inputs(model))
    with method.merged(model):
        assert torch.equal(logits(model, inputs(model)), before)
    assert all(torch.equal(tensor, start[n]) for n, tensor in model.state_dict().items())


@every_combination
def test_a_restored_run_continues_to_the_bit(name, model_name):
    case = MODELS[model_name]
    straight, model = row(name), case.model()
    inject(straight, model, case)
    optimizer = adamw(straight, model)
    for _ in train(straight, model, 3, optimizer=optimizer):
        pass
    tensors = {n: t.detach().clone() for n, t in straight.updated_tensors(model).items()}
    state = copy.deepcopy(straight.state_dict())
    optimizer_state = copy.deepcopy(optimizer.state_dict())

    resumed, other = row(name), case.model()
    torch.manual_seed(99)  # the start must not depend on the global state
    inject(resumed, other, case)
    with torch.no_grad():
        for tensor_name, tensor in resumed.updated_tensors(other).items():
            tensor.copy_(tensors[tensor_name])
        for buffer in resumed.state_dict().values():
            buffer.zero_()  # what was drawn at the start comes from the state
    resumed.load_state_dict(state)
    other_optimizer = adamw(resumed, other)
    other_optimizer.load_state_dict(optimizer_state)
    for _ in train(straight, model, 2, optimizer=optimizer, first_step=3):
        pass
    for _ in train(resumed, other, 2, optimizer=other_optimizer, first_step=3):
        pass
    theirs = other.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in model.state_dict().items())
    assert straight.describe() == resumed.describe()


def test_the_random_projections_of_vera_are_state():
    case = MODELS["roberta"]
    method = row("peft/vera")
    inject(method, case.model(), case)
    state = method.state_dict()
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in state} == {"vera_A", "vera_B"}
    with pytest.raises(ValueError, match="the state does not fit this VERA"):
        method.load_state_dict({n: t[:1] for n, t in state.items()})


@every_combination
def test_the_seed_repeats_and_leaves_the_global_state(name, model_name):
    case = MODELS[model_name]

    def start(seed):
        model = inject(row(name), case.model(), case, seed=seed)
        return model.state_dict()

    first = start(0)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    again = start(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, again[n]) for n, t in first.items())
    if name in ("peft", "peft/dora", "peft/rslora", *PROMPT_ROWS):
        other = start(1)
        assert any(not torch.equal(t, other[n]) for n, t in first.items())


@every_combination
def test_an_injected_model_is_refused(name, model_name):
    case = MODELS[model_name]
    model = inject(row(name), case.model(), case)
    with pytest.raises(RuntimeError, match="freshly loaded model"):
        inject(row(name), model, case)


@every_combination
def test_a_model_without_storage_can_be_checked(name, model_name):
    with torch.device("meta"):
        model = MODELS[model_name].build()
        inject(row(name), model, MODELS[model_name])


# ---------------------------------------------------------------------- against peft and ours


def test_lora_equals_ours_on_separate_layers():
    case = CASES["roberta"]
    ours = Lora(rank=3, alpha=5, dropout=0.0, learning_rate=1e-2)
    theirs = Peft(
        peft={"peft_type": "LORA", "r": 3, "lora_alpha": 5, "lora_dropout": 0.0},
        learning_rate=1e-2,
    )
    own = inject(ours, case.model(dtype=torch.float64), case)
    other = inject(theirs, case.model(dtype=torch.float64), case)
    pairs = []
    for name, p in own.named_parameters():
        if "lora_" in name:
            layer, role, leaf = name.rsplit(".", 2)
            assert role in layer
            twin = other.get_parameter(f"{layer}.{leaf}.default.weight")
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
                twin.copy_(p)
            pairs.append((p, twin))
    pairs += [(own.get_parameter(n), other.get_parameter(n)) for n, p in own.named_parameters()
              if n.startswith("classifier.")]  # fmt: skip
    trainable = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (own, other)]
    assert trainable[0] == trainable[1]
    start = [p.detach().clone() for p, _ in pairs]
    for _ in zip(train(ours, own, 10), train(theirs, other, 10), strict=True):
        for p, twin in pairs:
            torch.testing.assert_close(p, twin, atol=1e-9, rtol=1e-9)
    assert not any(torch.equal(p, before) for (p, _), before in zip(pairs, start, strict=True))
    own.eval()
    other.eval()
    with ours.merged(own), theirs.merged(other):
        names = [n for n, _ in own.named_parameters()]
        assert names == [n for n, _ in other.named_parameters()]
        for n in names:
            torch.testing.assert_close(own.get_parameter(n), other.get_parameter(n))


def attention_mask():
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 4:] = 0
    return mask


@pytest.mark.parametrize("name", PROMPT_ROWS)
@pytest.mark.parametrize("model_name", ["roberta", "bart"])
def test_prompts_compute_what_pefts_own_wrapper_does(name, model_name):
    case = MODELS[model_name]
    method = row(name)
    model = inject(method, case.model(), case)
    config = peft.get_peft_config(
        method.settings
        | {"peft_type": method.peft_type}
        | {"task_type": {"roberta": "SEQ_CLS", "bart": "SEQ_2_SEQ_LM"}[model_name]}
    )
    wrapper = peft.get_peft_model(case.model(), config).eval()
    source, target = model.prompt_encoder, wrapper.prompt_encoder
    target.load_state_dict(source.state_dict())
    batch = inputs(model) | {"attention_mask": attention_mask()}
    torch.testing.assert_close(model(**batch).logits, wrapper(**batch).logits, atol=0, rtol=0)
    if model_name == "bart":
        settings = {
            "attention_mask": batch["attention_mask"], "num_beams": 3, "max_length": 7,
            "do_sample": False, "return_dict_in_generate": True, "output_scores": True,
        }  # fmt: skip
        own = model.generate(batch["input_ids"], **settings)
        theirs = wrapper.generate(input_ids=batch["input_ids"], **settings)
        assert torch.equal(own.sequences, theirs.sequences)
        assert torch.equal(own.sequences_scores, theirs.sequences_scores)
        plain = case.model().generate(batch["input_ids"], **settings)
        assert not torch.equal(own.sequences_scores, plain.sequences_scores)


@pytest.mark.parametrize("name", PROMPT_ROWS)
def test_the_tasks_search_hides_the_defaults_of_the_checkpoint(name, monkeypatch):
    """Generation runs in PEFT's wrapper, which must see the settings that the task has set."""
    case = MODELS["bart"]
    model = inject(row(name), case.model(), case)
    model.generation_config.min_length = 8
    generate, seen = type(model).generate, []

    def watched(self, **arguments):
        seen.append(self.generation_config.min_length)
        return generate(self, **arguments)

    monkeypatch.setattr(type(model), "generate", watched)
    search = Seq2SeqBeamSearch(num_beams=2, max_length=8)
    assert len(search.generate(model, [torch.arange(3, 9), torch.arange(4, 8)])) == 2
    assert seen == [tf.GenerationConfig().min_length]
    assert model.generation_config.min_length == 8


@pytest.mark.parametrize("name", PROMPT_ROWS)
@pytest.mark.parametrize("model_name", ["roberta", "bart"])
def test_prompts_ignore_padding(name, model_name):
    case = MODELS[model_name]
    model = inject(row(name), case.model(), case)
    batch = inputs(model)
    mask = attention_mask()
    labels = {"decoder_input_ids": batch["input_ids"][:, :3]} if model_name == "bart" else {}
    padded = model(input_ids=batch["input_ids"], attention_mask=mask, **labels).logits[1]
    short = {name: tensor[1:2] for name, tensor in labels.items()}
    alone = model(
        input_ids=batch["input_ids"][1:2, :4], attention_mask=mask[1:2, :4], **short
    ).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", PROMPT_ROWS)
def test_prompts_without_room_are_refused(name):
    case = MODELS["roberta"]
    method = row(name)
    method.settings["num_virtual_tokens"] = POSITIONS - LENGTH - 1  # RoBERTa counts from 2
    model = inject(method, case.model(), case)
    with pytest.raises(ValueError, match=r"6 tokens behind 33 virtual ones, but .* room for 5"):
        logits(model, inputs(model))


@pytest.mark.parametrize("name", PROMPT_ROWS)
def test_prompts_are_refused_where_batches_have_no_padding(name):
    model = MODELS["gpt2"].model()
    with pytest.raises(ValueError, match=r"stand in one row without padding.*GLUE"):
        inject(row(name), model, MODELS["gpt2"])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_a_prefix_is_refused_under_gradient_checkpointing():
    case = MODELS["bart"]
    model = inject(row("peft/prefix_tuning"), case.model(), case).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        logits(model, inputs(model))


# ---------------------------------------------------------------------- what is adapted


def adapted(model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def test_targets_are_the_projections_or_what_the_config_names(caplog):
    caplog.set_level("INFO")
    case = MODELS["gpt2"]
    model = inject(row("peft"), case.model(), case)
    assert adapted(model) == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    assert "holds more than the slices" in caplog.text
    settings = {"peft_type": "LORA", "r": 2}
    chosen = Peft(peft=settings | {"target_modules": ["c_fc"]}, learning_rate=1e-3)
    model = inject(chosen, case.model(), case)
    assert adapted(model) == [f"transformer.h.{i}.mlp.c_fc" for i in range(2)]
    model = MODELS["bart"].model()
    explicit = Peft(peft=settings, learning_rate=1e-3)
    explicit.inject(model, projections=["fc1"], head=(), total_steps=1, seed=0)
    assert adapted(model) == ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"]
    listed = Peft(peft=settings, learning_rate=1e-3, targets="peft")
    model = inject(listed, MODELS["bart"].model(), MODELS["bart"])
    assert all(n.endswith(("q_proj", "v_proj")) for n in adapted(model))


def test_the_head_is_never_adapted():
    case = MODELS["roberta"]
    everything = Peft(
        peft={"peft_type": "LORA", "r": 2, "target_modules": ["dense", "out_proj"]},
        learning_rate=1e-3,
    )
    model = inject(everything, case.model(), case)
    assert adapted(model)
    assert not any(n.startswith("classifier") for n in adapted(model))
    assert model.classifier.dense.weight.requires_grad


def test_a_rewritten_weight_belongs_to_what_the_run_changes():
    """PiSSA takes the largest directions out of W when it starts."""
    case = MODELS["roberta"]
    method = Peft(
        peft={"peft_type": "LORA", "r": 2, "init_lora_weights": "pissa"}, learning_rate=1e-3
    )
    model = inject(method, case.model(), case)
    weights = {n for n in method.updated_tensors(model) if n.endswith(".base_layer.weight")}
    assert len(weights) == 2 * len(model.roberta.encoder.layer)
    assert not any(model.get_parameter(n).requires_grad for n in weights)


@pytest.mark.parametrize("name", LINEAR_ONLY)
def test_a_method_that_peft_lacks_for_conv1d_says_so(name):
    with pytest.raises(ValueError, match=r"does not fit GPT2LMHeadModel with .*Conv1D"):
        inject(row(name), MODELS["gpt2"].model(), MODELS["gpt2"])


def test_a_method_that_trains_nothing_is_refused():
    method = Peft(peft={"peft_type": "OSF"}, learning_rate=1e-3)
    with pytest.raises(ValueError, match="OSF trains nothing in GPT2LMHeadModel"):
        inject(method, MODELS["gpt2"].model(), MODELS["gpt2"])


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"peft_type": "LORRA"}, ValueError, r"unknown peft.peft_type='LORRA'; did you mean 'LO"),
        ({}, TypeError, "peft.peft_type=None of .* is no text; use one of ADAMSS, BEFT"),
        ({"peft_type": "LORA", "rank": 4}, ValueError, "unknown key peft.rank of LORA.*known: "),
        ({"peft_type": "IA3", "target_module": []}, ValueError, "did you mean 'target_modules'"),
        ({"peft_type": "adalora"}, ValueError, "cannot be trained here: .*method=adalora"),
        ({"peft_type": "LORA", "modules_to_save": ["x"]}, ValueError, "task.head"),
        ({"peft_type": "LORA", "task_type": "SEQ_CLS"}, ValueError, "follows from the model"),
        (
            {"peft_type": "LORA", "layers_pattern": "layers"},
            ValueError,
            "peft: LORA refuses .*layers_to_transform",
        ),
        ({"peft_type": 3}, TypeError, "peft.peft_type=3 of .* is no text"),
        ("LORA", TypeError, "is no mapping"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        Peft(peft=settings, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"learning_rate": 0}, ValueError, "learning_rate=0"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate='1e-3' is a str"),
        ({"targets": "all"}, ValueError, "targets='all' is not known; choose one of 'projections'"),
    ],
)
def test_bad_values_are_named(values, error, message):
    with pytest.raises(error, match=message):
        Peft(**({"peft": {"peft_type": "LORA"}, "learning_rate": 1e-3} | values))


def test_what_is_refused_exists():
    assert set(REFUSED) <= {str(kind.value) for kind in PeftType}


def test_a_missing_package_names_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install .*delta-lora\[peft\]"):
        Peft(peft={"peft_type": "LORA"}, learning_rate=1e-3)
    assert importlib.util.find_spec("delta_lora.methods.peft") is not None


def test_an_unknown_head_is_refused():
    model = MODELS["roberta"].model()
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match="no module 'score'"):
        row("peft").inject(model, projections=None, head=("score",), total_steps=1, seed=0)
    assert [n for n, _ in model.named_modules()] == before
    assert isinstance(model, nn.Module)
