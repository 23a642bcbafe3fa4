"""Build the model and the tokenizer of a run, from the hub, a local folder or a configuration."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from delta_lora.checks import OneOf, Range, check_integer, check_real, check_values, near, shown
from delta_lora.families import FAMILIES
from delta_lora.finite import NonFiniteError, check_weights
from delta_lora.sources import CONFIG, HubError, check_source, located, looks_local
from delta_lora.stored import UnreadableError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
#: the largest size in a model's configuration, and the largest number of layers.
MAX_SIZE, MAX_LAYERS = 2**24, 1024
#: configuration keys of dropout probabilities, over the supported model types.
DROPOUT_KEYS = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout",
    "attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout",
    "dropout", "attention_dropout", "activation_dropout", "classif_dropout",
)  # fmt: skip


def load_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """Return the fast tokenizer of a hub id or a local folder.

    A folder with OpenAI's original file names ``encoder.json`` and ``vocab.bpe`` is read as GPT-2's
    tokenizer. A tokenizer without a padding token pads with its end-of-text token (which is always
    masked).

    Raises:
        FileNotFoundError: the folder does not exist or holds no tokenizer.
        ValueError: a file of it is damaged.
    """
    with _reading(f"{source}: its tokenizer cannot be read"):
        return _load_tokenizer(source, revision)


def _load_tokenizer(source: str | Path, revision: str | None) -> Any:
    from transformers import AutoTokenizer, GPT2Tokenizer

    source = located(source)
    folder = Path(source)
    if folder.is_dir() and (folder / "encoder.json").exists():
        merges = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()
        pairs: Any = [
            tuple(line.split()) for line in merges if line and not line.startswith("#version")
        ]
        vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        tokenizer: Any = GPT2Tokenizer(vocab=vocabulary, merges=pairs, model_max_length=1024)
    else:
        if looks_local(source):
            check_source(source, model=False)
        tokenizer = AutoTokenizer.from_pretrained(
            str(source), revision=revision, trust_remote_code=False
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    family: Annotated[str, OneOf(tuple(FAMILIES))],
    *,
    source: str | Path | None = None,
    revision: str | None = None,
    architecture: Mapping[str, Any] | None = None,
    dtype: Annotated[str, OneOf(tuple(DTYPES))] = "float32",
    dropout: Annotated[float | None, Range(at_least=0, below=1)] = None,
    config_overrides: Mapping[str, Any] | None = None,
    attention: Annotated[str, OneOf(ATTENTION)] = "sdpa",
    new_modules: Sequence[str] = (),
) -> nn.Module:
    """Return a model with pre-trained weights, or with random ones built from a configuration.

    Args:
        family: which head: one of `families.FAMILIES`.
        source: hub id or local folder of pre-trained weights (safetensors only); None builds the
            model of `architecture` with random weights, drawn from torch's global generator.
        revision: commit of the hub repository.
        architecture: ``{"model_type": "gpt2", "n_layer": 24, ...}``; used without `source`.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of the weights.
        dropout: sets every dropout probability of the model; None keeps the checkpoint's.
        config_overrides: further configuration values, for example ``num_labels``.
        attention: transformers' ``attn_implementation``.
        new_modules: modules that pre-trained weights need not have (a task's head); they start
            from random weights.

    Raises:
        ValueError: unknown family, dtype or configuration value, neither of source and
            architecture, weights that lack a parameter outside `new_modules`, or a damaged file of
            weights in a folder.
        FileNotFoundError: the folder does not exist, or has no configuration or no safetensors.
        OSError: the hub cannot be reached, or knows no such model.
    """
    import transformers

    check_values(load_model, dict(locals()), prefix="model.")
    if source is None and architecture is None:
        raise ValueError(
            "the model has neither weights nor an architecture; set model.path, model.hub_id "
            "or model.architecture"
        )
    auto_class: Any = getattr(transformers, FAMILIES[family].auto_class)
    overrides = dict(config_overrides or {})
    if source is None:
        assert architecture is not None
        config = _config_of(architecture)
        _override(config, overrides)
        _set_dropout(config, dropout)
        with _building(
            f"model.architecture={shown(dict(architecture), 600)} with "
            f"config_overrides={shown(overrides)}"
        ):
            return auto_class.from_config(
                config, dtype=DTYPES[dtype], attn_implementation=attention
            )
    source = located(source)
    if looks_local(source):
        check_source(source, tokenizer=False)
    config = load_config(source, revision)
    _override(config, overrides)
    _set_dropout(config, dropout)
    with _reading(f"{source}: its files make no model"), _quiet_loading():
        # No keyword of the caller reaches the loader: one of them would run code from the folder.
        model, report = auto_class.from_pretrained(
            str(source),
            revision=revision,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    _check_loaded(source, report, new_modules)
    _check_values(source, model)
    if family == "sequence_classification":
        _warn_of_untrained_pooler(source, model, new_modules)
    return model


def load_config(source: str | Path, revision: str | None = None) -> Any:
    """Return the configuration of a hub id or a local folder.

    Raises:
        ValueError: it is none that `transformers` knows.
        OSError: it cannot be read.
    """
    from transformers import AutoConfig

    with _reading(f"{source}: its {CONFIG} describes no model"):
        return AutoConfig.from_pretrained(str(source), revision=revision, trust_remote_code=False)


def _check_values(source: str | Path, model: nn.Module) -> None:
    """Refuse weights that are no numbers, and a head that is not the embedding it is said to be."""
    try:
        check_weights(model.named_parameters(), f"the weights of {source}", "copy them again")
    except NonFiniteError as error:
        raise ValueError(str(error)) from error
    config: Any = model.config
    is_tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    read: Any = model
    try:
        output, embedding = read.get_output_embeddings(), read.get_input_embeddings()
    except NotImplementedError:  # a model that has none
        return
    if not is_tied or output is None or embedding is None or output.weight is embedding.weight:
        return
    if output.weight.shape == embedding.weight.shape and not output.weight.equal(embedding.weight):
        raise ValueError(
            f"the weights of {source} hold a head that is not the embedding, which by {CONFIG} it "
            "is (tie_word_embeddings): one of the two is wrong; set it to false there, or save the "
            "model again"
        )


def _config_of(architecture: Mapping[str, Any]) -> Any:
    """Return the configuration of ``{"model_type": "gpt2", "n_layer": 24, ...}``.

    Raises:
        ValueError: there is no such type of models, or a value is none that it can have.
    """
    from transformers import AutoConfig

    check_model_type(architecture)
    values = {key: value for key, value in architecture.items() if key != "model_type"}
    _check_sizes("model.architecture", values)
    with _building(f"model.architecture={shown(dict(architecture))}"):
        return AutoConfig.for_model(architecture["model_type"], **values)


def check_model_type(architecture: Mapping[str, Any]) -> None:
    """Check the ``model_type`` of an architecture.

    Raises:
        ValueError: `transformers` knows no such models.
    """
    from transformers import CONFIG_MAPPING

    model_type = architecture.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        hint = near(str(model_type), CONFIG_MAPPING)
        raise ValueError(
            f"model.architecture.model_type={shown(model_type)} is not known (of "
            f"{shown(dict(architecture))}); {hint}use a type of transformers, for example gpt2, "
            "roberta or bart"
        )


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Say which folder cannot be read where `transformers` fails, which it does in any way."""
    try:
        yield
    except (UnreadableError, FileNotFoundError, ConnectionError, HubError):
        raise  # these say it
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, UnicodeError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{what}: {shown(reason, 400)}; copy its files again, all from one place"
        ) from error


@contextlib.contextmanager
def _building(what: str) -> Iterator[None]:
    """Say what a model was built from where `transformers` fails, which it does in any way."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{what} makes no model: {shown(reason, 300)}; use values that a model of this type "
            "can have"
        ) from error


def _check_sizes(name: str, values: Mapping[str, Any]) -> None:
    """Check that no size is beyond what can be built, which would take hours to find out."""
    for key, value in values.items():
        if isinstance(value, int) and not isinstance(value, bool):
            most = MAX_LAYERS if "layer" in key and "_id" not in key else MAX_SIZE
            is_count = key.endswith(("n_head", "_heads", "n_layer", "_layers"))
            check_integer(f"{name}.{key}", value, at_least=1 if is_count else None, at_most=most)
        elif isinstance(value, float):
            check_real(f"{name}.{key}", value, above=0 if "_eps" in key else None)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hold back transformers' own table and bar; `_check_loaded` says what matters."""
    from transformers.utils import logging as hf_logging

    level, has_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if has_bar:
            hf_logging.enable_progress_bar()


def _check_loaded(
    source: str | Path, report: Mapping[str, Any], new_modules: Sequence[str]
) -> None:
    """Refuse weights that leave a parameter random which is not meant to be new."""
    missing = sorted(report["missing_keys"])
    prefixes = tuple(f"{module}." for module in new_modules)
    lacking = [name for name in missing if not name.startswith(prefixes or ("\0",))]
    if lacking:
        raise ValueError(
            f"the weights of {source} lack {len(lacking)} parameters of this model "
            f"({', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}), which would stay "
            "random; take weights of this architecture, or name new modules in task.head="
            f"{list(new_modules)}"
        )
    if missing or report["unexpected_keys"]:
        logger.info(
            "%s: new: %s; not used: %s",
            source, ", ".join(missing) or "nothing",
            ", ".join(sorted(report["unexpected_keys"])) or "nothing",
        )  # fmt: skip


def _warn_of_untrained_pooler(
    source: str | Path, model: nn.Module, new_modules: Sequence[str]
) -> None:
    """Warn of a pooler that no training has touched: its bias is still 0.

    Sentence encoders (MiniLM, for one) carry such a BERT pooler without using it. Where an adapter
    leaves it frozen, the classifier behind it gets hardly any signal.
    """
    for name, module in model.named_modules():
        if not name.endswith("pooler.dense") or not isinstance(module, nn.Linear):
            continue
        pooler = name.removesuffix(".dense")
        is_new = any(f"{pooler}.".startswith(f"{each}.") for each in new_modules)
        if not is_new and module.bias is not None and not module.bias.any():
            head = ",".join([*new_modules, pooler])
            logger.warning(
                "%s: %s was never trained (its bias is 0), and low-rank methods leave it as it is; "
                "train it with the head: task.head=[%s]",
                source, pooler, head,
            )  # fmt: skip


def _override(config: Any, values: Mapping[str, Any]) -> None:
    """Set values of a model's configuration, which must have them."""
    _check_sizes("model.config_overrides", values)
    for key, value in values.items():
        if not hasattr(config, key):
            raise ValueError(
                f"model.config_overrides has {key!r}, but a {type(config).__name__} has no such "
                "value; correct it or leave it out (model.config_overrides={} leaves out all; the "
                "generic models model=causal_lm, seq2seq_lm, ... bring none)"
            )
        with _building(f"model.config_overrides.{key}={shown(value)}"):
            setattr(config, key, value)


def _set_dropout(config: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    for key in DROPOUT_KEYS:
        if getattr(config, key, None) is not None:
            setattr(config, key, dropout)


def fingerprint(model: nn.Module, exclude: Sequence[str] = ()) -> str:
    """Return one sha256 over names, types and bytes of all parameters (tied ones once).

    Args:
        model: on any device but meta.
        exclude: names of modules whose parameters do not count.
    """
    digest = hashlib.sha256()
    prefixes = tuple(f"{module}." for module in exclude)
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes or ("\0",)):
            continue
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\0".encode())
        data = parameter.detach().contiguous().cpu().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()
