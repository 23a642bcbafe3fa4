"""The paper's models with random weights, small ones of the same families, and the methods."""

from __future__ import annotations

from typing import Any

import torch

from delta_lora.methods.adalora import AdaLora
from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.methods.dylora import DyLora
from delta_lora.methods.full import Full
from delta_lora.methods.lora import Lora
from delta_lora.models import load_model
from delta_lora.protocols import Method
from scripts.checking import recipes

#: the methods that differ in what they compute.
METHODS = ("lora", "delta_lora", "delta_lora_closed_form", "full", "adalora", "dylora")
#: what replaces the paper's sizes: a few layers, wide enough for every mechanism.
_SMALL = {
    "gpt2_medium": {
        "n_embd": 64, "n_head": 4, "vocab_size": 160, "n_positions": 512, "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "roberta_base": {
        "vocab_size": 160, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128,
        "max_position_embeddings": 66,
    },
    "bart_large": {
        "vocab_size": 160, "d_model": 64, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "max_position_embeddings": 128,
    },
}  # fmt: skip
_LAYERS = {
    "gpt2_medium": ("n_layer",),
    "roberta_base": ("num_hidden_layers",),
    "bart_large": ("encoder_layers", "decoder_layers"),
}
_RECIPES = {"gpt2_medium": "e2e", "roberta_base": "glue/mnli", "bart_large": "xsum"}


def build(
    name: str,
    device: str,
    *,
    layers: int | None = None,
    small: bool = False,
    dropout: float | None = None,
    seed: int = 0,
    **values: Any,
) -> Any:
    """Return a model of ``configs/model/<name>.yaml`` with random weights.

    Args:
        name: ``gpt2_medium``, ``roberta_base`` or ``bart_large``.
        device: where its weights are drawn, so that a large model costs no time on the CPU.
        layers: number of layers (of encoder and decoder); None: the model's.
        small: narrow layers and a small vocabulary.
        dropout: of the whole model; None: the recipe's (0 in GPT-2, the model's own 0.1 in others).
        seed: of the weights.
        **values: further values of the architecture.
    """
    config = recipes.model(name)
    architecture = {**config["architecture"], **(_SMALL[name] if small else {}), **values}
    if layers is not None:
        architecture |= dict.fromkeys(_LAYERS[name], layers)
    overrides = dict(config["config_overrides"])
    if config["family"] == "sequence_classification":
        overrides["num_labels"] = 3
    if dropout is None:
        dropout = recipes.recipe(_RECIPES[name])["model_dropout"]
    torch.manual_seed(seed)
    with torch.device(device):
        return load_model(
            config["family"],
            architecture=architecture,
            dropout=dropout,
            config_overrides=overrides,
            attention=config["attention"],
        )


def head(name: str) -> tuple[str, ...]:
    """Return the modules that train with every method on this model."""
    return ("classifier",) if name == "roberta_base" else ()


def make_method(name: str, model: str, **values: Any) -> Method:
    """Return one of `METHODS`, or ``lora_no_dropout``, with the recipe of `model` and `values`.

    Delta-LoRA updates W from the first step on, so that what is measured is its usual step.
    """
    recipe = recipes.recipe(_RECIPES[model]) | values
    rates, ada = recipe["learning_rate"], recipe["adalora"]
    low_rank = {"rank": recipe["rank"], "alpha": recipe["alpha"]}
    dropout = recipe["lora_dropout"]
    if name == "full":
        return Full(learning_rate=rates["full"])
    if name in ("lora", "lora_no_dropout"):
        dropout = dropout if name == "lora" else 0.0
        return Lora(**low_rank, dropout=dropout, learning_rate=rates["low_rank"])
    if name == "dylora":
        return DyLora(
            **low_rank, dropout=dropout, learning_rate=rates["dylora"],
            update=recipe["dylora"]["update"],
        )  # fmt: skip
    if name == "adalora":
        return AdaLora(
            alpha=recipe["alpha"], dropout=dropout, learning_rate=rates["adalora"], **ada
        )
    if name in ("delta_lora", "delta_lora_closed_form"):
        return DeltaLora(
            **low_rank,
            learning_rate=rates["low_rank"],
            update_ratio=recipe["update_ratio"],
            start_step=values.get("start_step", -1),
            form=name.removeprefix("delta_lora_") if name != "delta_lora" else "in_place",
        )
    raise ValueError(f"method {name!r}; allowed: {', '.join(METHODS)}, lora_no_dropout")
