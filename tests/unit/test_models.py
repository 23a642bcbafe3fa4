"""Loading weights: what may be new, what must be there, and how little is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from delta_lora.models import load_model, load_tokenizer

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


# The layouts of the files on the hub, with small sizes


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write a model as it lies on the hub: plain JSON, and tensors under the names of the time."""
    (folder / "config.json").write_text(json.dumps(config))
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bart_large_in_half_precision_and_without_prefix(tmp_path: Path, dtype: str) -> None:
    sizes = {
        "vocab_size": 40, "d_model": 16, "max_position_embeddings": 32,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    stored = {
        name: t.half() for name, t in tf.BartModel(tf.BartConfig(**sizes)).state_dict().items()
    }
    assert "encoder.embed_tokens.weight" in stored  # twice with shared.weight, as on the hub
    write_checkpoint(
        tmp_path,
        {
            **sizes, "model_type": "bart", "architectures": ["BartModel"], "torch_dtype": "float32",
            "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1,
            "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
            "forced_bos_token_id": 0, "forced_eos_token_id": 2,
            "early_stopping": True, "no_repeat_ngram_size": 3, "num_beams": 4,
        },
        stored,
    )  # fmt: skip
    model = load_model("seq2seq_lm", source=tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    for name, tensor in stored.items():
        assert torch.equal(model.get_parameter(f"model.{name}"), tensor.to(model.dtype)), name
    assert model.lm_head.weight is model.model.shared.weight
    assert model.model.encoder.embed_tokens.weight is model.model.shared.weight
    assert not model.final_logits_bias.any()
    assert (model.config.dropout, model.config.attention_dropout) == (0.1, 0.1)
    decoding = model.generation_config
    assert (decoding.no_repeat_ngram_size, decoding.early_stopping) == (3, True)
    assert (decoding.forced_bos_token_id, decoding.forced_eos_token_id) == (0, 2)


def test_gpt2_with_the_masks_that_were_once_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    stored = tf.GPT2Model(tf.GPT2Config(**sizes)).state_dict()
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(2)}
    write_checkpoint(
        tmp_path,
        {
            **sizes, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 32,
            "activation_function": "gelu_new", "bos_token_id": 39, "eos_token_id": 39,
            "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1,
        },
        {**stored, **masks},
    )  # fmt: skip
    caplog.clear()
    model = load_model(
        "causal_lm",
        source=tmp_path,
        dropout=0.0,
        config_overrides={"activation_function": "gelu_pytorch_tanh"},
    )
    for name, tensor in stored.items():
        assert torch.equal(model.get_parameter(f"transformer.{name}"), tensor), name
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_roberta_as_a_masked_language_model_with_pooler_and_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored = tf.RobertaForMaskedLM(tf.RobertaConfig(**SIZES)).state_dict()
    for name in ("lm_head.decoder.weight", "lm_head.decoder.bias"):  # tied, so not on the hub
        del stored[name]
    stored["roberta.embeddings.position_ids"] = torch.arange(20)[None]
    stored["roberta.pooler.dense.weight"] = torch.zeros(16, 16)
    stored["roberta.pooler.dense.bias"] = torch.zeros(16)
    config = {**SIZES, "model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}
    write_checkpoint(tmp_path, config, stored)
    model = load_model(
        "sequence_classification",
        source=tmp_path,
        new_modules=("classifier",),
        config_overrides={"num_labels": 2},
    )
    encoder = {n: t for n, t in stored.items() if n.startswith("roberta.") and "pooler" not in n}
    del encoder["roberta.embeddings.position_ids"]
    assert len(encoder) == 21
    for name, tensor in encoder.items():
        assert torch.equal(model.get_parameter(name), tensor), name
    assert model.classifier.out_proj.weight.shape == (2, 16)


def test_a_folder_without_safetensors_is_refused_by_the_loader_too(encoder: Path) -> None:
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors .*is never loaded"):
        load_model("masked_lm", source=encoder)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json nor another tokenizer"):
        load_tokenizer(encoder)
