"""Positions of a model: how many tokens it can number, and from where it counts."""

from __future__ import annotations

from typing import Any

#: models whose positions start behind that of the padding token.
_OFFSET_TYPES = (
    "bertweet", "camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


def starts_behind_padding(config: Any) -> bool:
    """Return whether a model numbers its first token behind the padding token, as RoBERTa does."""
    return getattr(config, "model_type", None) in _OFFSET_TYPES


def num_positions(config: Any) -> int | None:
    """Return how many tokens a model can number; None where its configuration does not say."""
    count = getattr(config, "max_position_embeddings", None)
    if not isinstance(count, int) or isinstance(count, bool):
        return None
    if starts_behind_padding(config):
        return count - (config.pad_token_id or 0) - 1
    return count
