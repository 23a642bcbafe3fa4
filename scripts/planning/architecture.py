"""The shape of a model, read from its configuration; no weights, no torch.

Three families are known: GPT-2, RoBERTa with a classification head, BART. Values that a
configuration leaves out are the defaults of transformers' configuration classes; dropout
probabilities that it leaves out are those of the published checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
from delta_lora.checks import expanded

#: how each family calls what is planned with: name here -> (key, default of transformers).
KEYS: dict[str, dict[str, tuple[str, Any]]] = {
    "gpt2": {
        "width": ("n_embd", 768),
        "num_layers": ("n_layer", 12),
        "num_heads": ("n_head", 12),
        "inner": ("n_inner", None),
        "vocabulary": ("vocab_size", 50257),
        "num_positions": ("n_positions", 1024),
        "dropout": ("resid_pdrop", 0.1),
        "attention_dropout": ("attn_pdrop", 0.1),
    },
    "roberta": {
        "width": ("hidden_size", 768),
        "num_layers": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "inner": ("intermediate_size", 3072),
        "vocabulary": ("vocab_size", 50265),
        "num_positions": ("max_position_embeddings", 512),
        "num_types": ("type_vocab_size", 2),
        "dropout": ("hidden_dropout_prob", 0.1),
        "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    },
    # Published BART-large and BART-base have dropout 0.1 in all three places; the defaults of
    # transformers' class for a model with random weights are 0.1, 0 and 0.
    "bart": {
        "width": ("d_model", 1024),
        "num_layers": ("encoder_layers", 12),
        "num_decoder_layers": ("decoder_layers", 12),
        "num_heads": ("encoder_attention_heads", 16),
        "inner": ("encoder_ffn_dim", 4096),
        "vocabulary": ("vocab_size", 50265),
        "num_positions": ("max_position_embeddings", 1024),
        "dropout": ("dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.1),
        "activation_dropout": ("activation_dropout", 0.1),
    },
}
#: what transformers' class gives where a model is built with random weights.
RANDOM_DEFAULTS = {"bart": {"attention_dropout": 0.0, "activation_dropout": 0.0}}


class UnknownCostError(Exception):
    """A cost cannot be planned; the message says which part of the configuration is not known."""


@dataclass(frozen=True)
class Architecture:
    """The shape of a model.

    Attributes:
        family: ``gpt2``, ``roberta`` or ``bart``.
        width: d, size of the residual stream.
        num_layers: blocks (BART: of the encoder).
        num_heads: attention heads of a block.
        inner: width of the feed-forward layer.
        vocabulary: rows of the token table.
        num_positions: rows of a position table, without BART's two further ones.
        dropout: probability on the residual stream.
        attention_dropout: probability on the attention weights.
        activation_dropout: probability behind the activation (BART).
        num_decoder_layers: blocks of the decoder; 0 without one.
        num_types: rows of the token type table.
        num_labels: outputs of the classification head; 0 without one.
    """

    family: str
    width: int
    num_layers: int
    num_heads: int
    inner: int
    vocabulary: int
    num_positions: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    num_decoder_layers: int = 0
    num_types: int = 0
    num_labels: int = 0


def read_architecture(cfg: Any) -> Architecture:
    """Return the shape of the model of a run.

    It stands in ``model.path``/config.json, in ``model.architecture`` (of a tiny model: of the run
    that pre-trains it), or for hub models without one in configs/plan/models.yaml.

    Args:
        cfg: a composed configuration.

    Raises:
        UnknownCostError: the shape stands nowhere, or belongs to another family.
    """
    values = {**_raw(cfg), **_plain(cfg.model.get("config_overrides"))}
    family = str(values.get("model_type"))
    if family not in KEYS:
        raise UnknownCostError(
            f"the model type {family!r} of model={cfg.model.name} is not planned; planned are "
            f"{', '.join(KEYS)}"
        )
    defaults = RANDOM_DEFAULTS.get(family, {}) if cfg.model.init == "random" else {}
    shape: dict[str, Any] = {
        name: values.get(key) if values.get(key) is not None else defaults.get(name, default)
        for name, (key, default) in KEYS[family].items()
    }
    if shape["inner"] is None:
        shape["inner"] = 4 * shape["width"]
    if cfg.model.dropout is not None:
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if name in shape:
                shape[name] = cfg.model.dropout
    if family == "roberta":
        labels = cfg.task.get("labels")
        shape["num_labels"] = len(labels) if labels else 1
    return Architecture(family=family, **shape)


def _raw(cfg: Any) -> dict[str, Any]:
    model = cfg.model
    if model.get("path") is not None:
        path = expanded(model.path) / "config.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UnknownCostError(f"cannot read {path}: {error}") from error
    if model.get("architecture") is not None:
        return _plain(model.architecture)
    if model.get("pretrain") is not None:
        for name in _trained_by(model.pretrain):
            other = _read_yaml(ROOT / "configs" / "model" / f"{name}.yaml")
            if other.get("architecture"):
                return dict(other["architecture"])
    known = read_plan_file("models.yaml")["architectures"].get(model.get("hub_id"))
    if known is None:
        raise UnknownCostError(
            f"the shape of model={model.name} is not known before it is loaded; name it in "
            "configs/plan/models.yaml"
        )
    return dict(known)


def is_configured_one(cfg: Any) -> bool:
    """Return whether the model of a run is the one that its file describes, and no other one.

    A folder (``model.path``) may hold a copy of it, which has its architecture, or anything else.
    """
    if cfg.model.get("path") is None:
        return True
    wanted = _plain(cfg.model.get("architecture"))
    try:
        found = _raw(cfg)
    except UnknownCostError:
        return False
    return bool(wanted) and all(found.get(key) == value for key, value in wanted.items())


def _trained_by(overrides: Iterable[str]) -> Iterator[str]:
    """Yield the model that a run of these overrides trains, named or by its experiment."""
    chosen = {key: value for key, _, value in (each.partition("=") for each in overrides)}
    if "model" in chosen:
        yield chosen["model"]
    elif "experiment" in chosen:
        path = ROOT / "configs" / "experiment" / f"{chosen['experiment']}.yaml"
        for entry in _read_yaml(path)["defaults"]:
            yield from (name for key, name in entry.items() if key == "override /model")


def read_plan_file(name: str) -> dict[str, Any]:
    """Return the content of a file in configs/plan."""
    return _read_yaml(ROOT / "configs" / "plan" / name)


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _plain(node: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if node is None else {str(key): node[key] for key in node}
