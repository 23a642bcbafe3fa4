"""Loading weights: what may be new, what must be there, and how little is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from delta_lora.models import load_model

SIZES = {
    "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 20, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tf.RobertaForMaskedLM(tf.RobertaConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def test_a_head_is_new_and_said_so_in_one_line(
    encoder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = load_model(
        "sequence_classification",
        source=encoder,
        config_overrides={"num_labels": 3},
        new_modules=["classifier"],
    )
    assert model.classifier.out_proj.weight.shape == (3, 16)
    stored = load_file(encoder / "model.safetensors")
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(model.get_parameter(name), stored[name])
    (line,) = [r.getMessage() for r in caplog.records if r.name == "delta_lora.models"]
    assert "new: classifier.dense.bias, " in line
    assert "not used: lm_head." in line
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_head_that_nobody_calls_new_is_refused(encoder: Path) -> None:
    with pytest.raises(ValueError, match=r"lack 4 parameters .*classifier\.dense\.bias"):
        load_model("sequence_classification", source=encoder)


def test_weights_that_lack_a_layer_are_refused(encoder: Path) -> None:
    path = encoder / "model.safetensors"
    tensors = load_file(path)
    del tensors["roberta.encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 parameters .*self\.query\.weight"):
        load_model("masked_lm", source=encoder)


def test_a_pooler_that_was_never_trained_is_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZES))
    model.save_pretrained(tmp_path / "untrained")
    torch.nn.init.normal_(model.bert.pooler.dense.bias)
    model.save_pretrained(tmp_path / "trained")

    def warnings(folder: str, *head: str) -> list[str]:
        caplog.clear()
        load_model("sequence_classification", source=tmp_path / folder, new_modules=head)
        return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    (message,) = warnings("untrained", "classifier")
    assert "bert.pooler was never trained" in message
    assert "task.head=[classifier,bert.pooler]" in message
    assert not warnings("untrained", "classifier", "bert.pooler")
    assert not warnings("trained", "classifier")


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_tied_weights_are_not_missing(family: str, tmp_path: Path) -> None:
    if family == "gpt2":
        config = tf.GPT2Config(vocab_size=29, n_embd=16, n_layer=1, n_head=2, n_positions=20)
        tf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
        model = load_model("causal_lm", source=tmp_path)
        assert model.lm_head.weight is model.transformer.wte.weight
    else:
        layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        config = tf.BartConfig(vocab_size=29, encoder_ffn_dim=16, decoder_ffn_dim=16,
                               max_position_embeddings=20, **layers, **heads)  # fmt: skip
        tf.BartForConditionalGeneration(config).save_pretrained(tmp_path)
        model = load_model("seq2seq_lm", source=tmp_path)
        assert model.lm_head.weight is model.model.shared.weight
