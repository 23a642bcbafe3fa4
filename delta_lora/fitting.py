"""Whether the parts of a model fit one another: configuration, weights, tokenizer.

All of it is found from names, shapes and numbers, before any weight is read and any text encoded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_lora.positions import num_positions
from delta_lora.sources import CONFIG, INDEX, WEIGHTS, shards

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

#: types of weights that are read as they are.
_FLOATS = ("F64", "F32", "F16", "BF16")
_NUM_SHOWN = 3


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where it stands, its type as safetensors calls it, and its shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model's folder by name; only headers are read.

    Raises:
        ValueError: a file is damaged, or the index and the files differ.
        FileNotFoundError: a file is missing.
    """
    from safetensors import SafetensorError, safe_open

    is_indexed = not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file()
    names = shards(folder / INDEX) if is_indexed else [WEIGHTS]
    found: dict[str, StoredTensor] = {}
    for path in (folder / name for name in names):
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = StoredTensor(path, part.get_dtype(), tuple(part.get_shape()))
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is no whole safetensors file: {error}; copy it again"
            ) from error
    return found


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters, by their names with and without its prefix.

    Weights of a model without a head have names without the prefix of those with one.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    bare = {n.removeprefix(prefix): s for n, s in own.items() if n.startswith(prefix)}
    return {**{f"{prefix}{name}": shape for name, shape in own.items()}, **bare, **own}


def check_weights_fit(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the headers of a folder's weights with the model that its configuration describes.

    Args:
        folder: of a model, with all of its files.
        expected: from `shapes`.

    Raises:
        ValueError: a parameter has another shape, or is stored as something else than real numbers.
    """
    wrong = []
    for name, stored in stored_tensors(folder).items():
        if name not in expected:
            continue
        if stored.dtype not in _FLOATS:
            raise ValueError(
                f"{stored.path}: {name} is stored as {stored.dtype}, and needed are real numbers "
                f"({', '.join(_FLOATS)}); take weights that are not quantised, or convert them"
            )
        if stored.shape != expected[name]:
            wrong.append((stored, name, expected[name]))
    if wrong:
        path = wrong[0][0].path
        listed = "; ".join(
            f"{n} is {s.shape} and not {shape}" for s, n, shape in wrong[:_NUM_SHOWN]
        )
        raise ValueError(
            f"{path} does not hold the model that {folder / CONFIG} describes: {listed}"
            f"{f' (and {len(wrong) - _NUM_SHOWN} more)' if len(wrong) > _NUM_SHOWN else ''}; copy "
            "both from one place, and take a model whose head is new or has as many outputs as the "
            "task has labels"
        )


def fit_tokenizer(tokenizer: Any, config: Any, place: str, model_place: str) -> None:
    """Compare a tokenizer with the configuration of its model, and lower its length to the model's.

    Args:
        tokenizer: of `transformers`; its ``model_max_length`` becomes the model's positions where
            it is larger.
        config: of the model.
        place: where the tokenizer was read.
        model_place: where the model is.

    Raises:
        ValueError: its length is no number, or it has numbers of tokens that the model has not, or
            one number for two.
    """
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
        raise ValueError(
            f"{place}: model_max_length={longest!r} of the tokenizer is no length; write a whole "
            "number of tokens of 1 or more in tokenizer_config.json, or leave it out"
        )
    size = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(size, int):
        word, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if number >= size:
            raise ValueError(
                f"{place}: the tokenizer numbers {word!r} {number}, but the model of {model_place} "
                f"has {size} tokens (vocab_size in {CONFIG}); take the tokenizer that belongs to "
                "it (model.tokenizer_path=FOLDER)"
            )
    if twice := _numbered_alike(tokenizer):
        first, second, number = twice
        raise ValueError(
            f"{place}: the tokenizer numbers both {first!r} and {second!r} {number}, so that either"
            " may be decoded; take a tokenizer.json that gives every word a number of its own"
        )
    for name, ours, theirs in _special(tokenizer, config):
        logger.warning(
            "%s: %s is %d of the tokenizer and %s of %s: is it the tokenizer of another model?",
            place, name, ours, theirs, model_place,
        )  # fmt: skip
    if (limit := num_positions(config)) is not None and limit < longest:
        tokenizer.model_max_length = limit


def _numbered_alike(tokenizer: Any) -> tuple[str, str, int] | None:
    """Return two words of a vocabulary that have one number, and that; None where none have.

    A token that was added may take the number of a word: many models rename reserved ones so.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    numbers = {} if backend is None else backend.get_vocab(with_added_tokens=False)
    words: dict[int, str] = {}
    for word, number in numbers.items():
        if number in words:
            first, second = sorted((words[number], word))
            return first, second, number
        words[number] = word
    return None


def _special(tokenizer: Any, config: Any) -> Iterator[tuple[str, int, object]]:
    """Yield the special tokens that have another number in a model's configuration."""
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(tokenizer, name, None), getattr(config, name, None)
        known = theirs if isinstance(theirs, list) else [theirs]
        if ours is not None and theirs is not None and ours not in known:
            yield name, ours, theirs
