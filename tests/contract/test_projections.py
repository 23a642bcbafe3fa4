import pytest
import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.methods.full_query_value import FullQueryValue
from delta_lora.methods.lora import Lora
from delta_lora.projections import (
    Projection,
    find_projections,
    head_parameters,
    token_embedding_parameters,
)
from tests.contract.models import CASES, TinyMlp, gpt2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_query_and_value_are_found_by_structure(case):
    found = find_projections(case.model(), case.projections, exclude=case.head)
    assert sorted(p.name for p in found) == sorted(case.names)


def test_gpt2_slices_are_outputs_of_the_fused_layer():
    first, second, *_ = find_projections(gpt2())
    layer = "transformer.h.0.attn.c_attn"
    assert first == Projection(layer, "query", 0, 16, 16, 48, True)
    assert second == Projection(layer, "value", 32, 48, 16, 48, True)


def test_gpt2_cross_attention():
    names = [(p.name, p.start, p.stop) for p in find_projections(gpt2(add_cross_attention=True))]
    block = "transformer.h.0.crossattention"
    assert (f"{block}.q_attn.query", 0, 16) in names
    assert (f"{block}.c_attn.value", 16, 32) in names
    assert len(names) == 8


def test_llama_value_has_the_width_of_the_grouped_heads():
    found = find_projections(CASES["llama"].model())
    assert {(p.role, p.num_outputs, p.in_features) for p in found} == {
        ("query", 16, 16),
        ("value", 8, 16),
    }


@pytest.mark.parametrize(
    ("model", "leaf"),
    [
        (
            tf.DistilBertModel(
                tf.DistilBertConfig(vocab_size=9, n_layers=1, dim=8, n_heads=2, hidden_dim=8)
            ),
            "q_lin",
        ),
        (
            tf.DebertaV2Model(
                tf.DebertaV2Config(
                    vocab_size=9,
                    hidden_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=8,
                )
            ),
            "query_proj",
        ),
        (
            tf.T5EncoderModel(
                tf.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            "q",
        ),
    ],
    ids=["distilbert", "deberta", "t5"],
)
def test_other_families(model, leaf):
    found = find_projections(model)
    assert [p.role for p in found if p.layer.endswith(leaf)] == ["query"]
    assert len(found) == 2


def meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def gpt2_medium():
    return meta(tf.GPT2LMHeadModel, tf.GPT2Config(n_layer=24, n_head=16, n_embd=1024))


def roberta_base():
    return meta(
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(vocab_size=50265, max_position_embeddings=514),
    )


def bart_large():
    return meta(tf.BartForConditionalGeneration, tf.BartConfig())


def num_trainable(model, head=()):
    inside = {id(p) for p in head_parameters(model, head).values()}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in inside)


@pytest.mark.parametrize(
    ("build", "head", "rank", "trainable", "updatable"),
    [
        (gpt2_medium, (), 4, 393_216, 50_331_648),
        (roberta_base, ("classifier",), 8, 294_912, 12 * 2 * 768**2),
        (bart_large, (), 4, 589_824, 36 * 2 * 1024**2),
    ],
    ids=["gpt2_medium", "roberta_base", "bart_large"],
)
def test_counts_of_the_paper(build, head, rank, trainable, updatable):
    setting = {"projections": None, "head": head, "total_steps": 1000, "seed": 0}
    model = build()
    Lora(rank=rank, alpha=16, dropout=0.0, learning_rate=1e-3).inject(model, **setting)
    assert num_trainable(model, head) == trainable

    model = build()
    method = DeltaLora(rank=rank, alpha=16, learning_rate=1e-3, form="in_place")
    method.inject(model, **setting)
    assert num_trainable(model, head) == trainable
    assert method.num_updatable_parameters == updatable

    model = build()
    FullQueryValue(learning_rate=1e-3).inject(model, **setting)
    assert num_trainable(model, head) == updatable


def test_bart_large_has_36_attention_blocks():
    assert len(find_projections(bart_large())) == 2 * 36


class TestPatterns:
    def test_full_name_and_dotted_end(self):
        model = CASES["roberta"].model()
        full = find_projections(model, ["roberta.encoder.layer.0.attention.self.query"])
        assert [p.name for p in full] == ["roberta.encoder.layer.0.attention.self.query.query"]
        assert len(find_projections(model, ["self.query"])) == 1
        assert len(find_projections(model, ["query", "key", "value"])) == 3

    def test_a_dotted_end_matches_whole_parts_only(self):
        model = CASES["bart"].model()
        with pytest.raises(ValueError, match="'proj' matched no linear layer"):
            find_projections(model, ["proj"])

    def test_regular_expression(self):
        found = find_projections(CASES["bert"].model(), [r".*layer\.0\..*(query|key)"])
        assert [p.role for p in found] == ["query", "key"]

    def test_whole_fused_layer_and_a_slice_of_it(self):
        model = gpt2()
        whole = find_projections(model, ["c_attn"])
        assert [(p.role, p.start, p.stop) for p in whole] == [("output", 0, 48)] * 2
        slices = find_projections(model, ["c_attn@0:16", "c_attn@32:48"])
        assert [p.role for p in slices] == ["output_0_16", "output_32_48"] * 2

    def test_a_layer_named_twice_is_taken_once(self):
        assert len(find_projections(TinyMlp(), ["layers.0", r"layers\.\d+"])) == 2

    @pytest.mark.parametrize(
        ("patterns", "message"),
        [
            (["qurey"], "'qurey' matched no linear layer of Roberta.*did you mean 'query'"),
            (["query", "valeu"], "'valeu' matched no linear layer .* did you mean 'value'"),
            (["query@0:99"], "slice 0:99 .* is not within its 16 outputs"),
            (["query@a"], "no slice start:stop"),
            (["query@0:8", "query@4:12"], "overlap 0:8"),
            (["*query"], "neither a layer name nor a regular expression"),
            ([], "adapts nothing"),
        ],
    )
    def test_errors(self, patterns, message):
        with pytest.raises(ValueError, match=message):
            find_projections(CASES["roberta"].model(), patterns)

    def test_a_bare_string_is_refused(self):
        with pytest.raises(TypeError, match="write a list"):
            find_projections(CASES["roberta"].model(), "query")

    def test_the_message_counts_the_candidates(self):
        with pytest.raises(ValueError, match=r"\(3 linear layers, named 0, 2, classifier\)"):
            find_projections(TinyMlp(), ["nothing_like_it"])

    def test_no_attention_is_an_error(self):
        with pytest.raises(ValueError, match="name the layers explicitly"):
            find_projections(TinyMlp())

    def test_unknown_role(self):
        with pytest.raises(ValueError, match="allowed are query, key, value"):
            find_projections(gpt2(), which=("queries",))

    def test_the_head_is_not_adapted(self):
        found = find_projections(TinyMlp(), [r".*"], exclude=("classifier",))
        assert [p.layer for p in found] == ["layers.0", "layers.2"]

    def test_a_fused_width_that_does_not_divide(self):
        model = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": Conv1D(10, 4)})})
        with pytest.raises(ValueError, match="do not divide"):
            find_projections(model)


def test_head_errors():
    with pytest.raises(ValueError, match="has no module 'clasifier'; did you mean 'classifier'"):
        head_parameters(TinyMlp(), ["clasifier"])
    with pytest.raises(ValueError, match="has no parameter to train"):
        head_parameters(TinyMlp(), ["layers.1"])
    with pytest.raises(TypeError, match="write a list"):
        head_parameters(TinyMlp(), "classifier")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {"embed.weight"}),
        ("gpt2", {"transformer.wte.weight"}),
        ("llama", {"model.embed_tokens.weight"}),
        ("bart", {"model.shared.weight"}),
        ("roberta", {"roberta.embeddings.word_embeddings.weight"}),
        ("bert", {"bert.embeddings.word_embeddings.weight"}),
        (
            "vit",
            {
                "vit.embeddings.patch_embeddings.projection.weight",
                "vit.embeddings.patch_embeddings.projection.bias",
            },
        ),
    ],
)
def test_token_embeddings_are_found(name, expected):
    assert set(token_embedding_parameters(CASES[name].model())) == expected


def test_no_embedding_is_an_error():
    with pytest.raises(ValueError, match="no token embedding"):
        token_embedding_parameters(nn.Linear(2, 2))
