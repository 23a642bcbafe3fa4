"""Any method of the `peft` package as a further row: IA3, DoRA, VeRA, prompt and prefix tuning.

Mangrulkar et al., "PEFT", https://github.com/huggingface/peft; checked with 0.21. The paper of a
method stands in its yaml in configs/method/peft, its equation in PEFT's documentation.

Two kinds, both attached to the model in place, so that every name of the model but those of
adapted layers stays:

* A tuner replaces layers (``...query`` becomes PEFT's layer, the former one its ``base_layer``).
* Prompt learning (prompt tuning, P-tuning, prefix tuning) puts virtual tokens before the input.
  PEFT wraps the model for that; here its wrapper works inside the model's own `forward` and
  `generate`, and its parameters are the model's ``prompt_encoder.default...``.

Deviations from `peft.get_peft_model`:
* Without `target_modules` the suite's W_Q and W_V are adapted (`targets: projections`), not the
  layers that PEFT has listed for the architecture (`targets: peft`). PEFT cannot adapt a slice: of
  a fused layer (GPT-2) it adapts the key too, which is logged.
* The head of the task trains as it is. PEFT would train a copy of it (`modules_to_save`).
* The initialisation is a function of the seed and touches no global random state.

State kept: the buffers that PEFT adds (VeRA's random projections, for one); none for most methods.

Details:
1. `merged` merges where the tuner can, and runs on the model as it is where it cannot (prompts;
   some tuners). PEFT's `unmerge` subtracts what it added, which rounds; the tensors of the adapted
   layers are therefore kept as clones and put back.
2. A method that rewrites the weight it adapts at the start (PiSSA, OLoRA, OSF) has that weight
   among its updated tensors, so that checkpoint and adapter are complete.
3. Prompt learning needs a model that reads padded batches: sequence classification and
   encoder-decoders. The causal tasks of the suite concatenate their sequences to one row, where a
   prompt would stand before the first sequence only; that is refused.
4. Methods that need more than a forward pass are refused by name (`REFUSED`).
5. A prompt takes positions. With prompt tuning and P-tuning RoBERTa's first virtual token stands
   where ``<s>`` stood, and its classifier reads that position, as in PEFT.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import hashlib
import logging
import re
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from delta_lora.checks import (
    OneOf,
    Range,
    UnknownHintError,
    check_mapping,
    check_value,
    check_values,
    near,
    shown,
)
from delta_lora.families import FAMILIES, family_of
from delta_lora.low_rank import replace_module
from delta_lora.method_bases import Alpha, Dropout, LearningRate, Rank
from delta_lora.peft_folder import import_peft
from delta_lora.positions import num_positions
from delta_lora.projections import find_projections, head_parameters
from delta_lora.protocols import Method

logger = logging.getLogger(__name__)

TARGETS = ("projections", "peft")
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
ADAPTER = "default"
#: methods that a run of this suite cannot train, and why.
REFUSED = {
    "ADALORA": "it must be told of every step; use method=adalora, which equals it",
    "ADAPTION_PROMPT": "it works inside the attention of Llama, Mistral and GPT-2 only",
    "CARTRIDGE": "it starts from the cache of a text, which the suite does not have",
    "CPT": "it starts from token ids of a prompt, which the suite does not have",
    "MULTITASK_PROMPT_TUNING": "it needs the number of a task with every example",
    "POLY": "it needs the number of a task with every example",
    "SHADOW": "it runs a second network beside causal models",
    "TRAINABLE_TOKENS": "it trains rows of an embedding and adapts no layer",
    "XLORA": "it mixes adapters that were trained before",
}
#: settings that the suite makes itself, and what to use instead.
RESERVED = {
    "task_type": "it follows from the model",
    "inference_mode": "a run trains",
    "modules_to_save": "the task's head trains with every method; name its modules in task.head",
    "exclude_modules": "the head is left out; name the layers in target_modules",
}


class Peft(Method):
    """A method of the `peft` package.

    Args:
        peft: the keywords of PEFT's configuration class, with ``peft_type`` (``LORA``, ``IA3``,
            ``PREFIX_TUNING``, ...), for example ``{"peft_type": "LORA", "r": 4}``.
        learning_rate: peak learning rate, above 0.
        targets: what a tuner adapts where `peft` names no ``target_modules``: ``projections``, the
            layers of W_Q and W_V (or the model's own `projections`), or ``peft``, what PEFT has
            listed for the architecture.

    Raises:
        ImportError: the package is missing.
        TypeError: a value has the wrong type.
        ValueError: an unknown or refused ``peft_type``, an unknown key, or a value that PEFT's
            configuration class refuses.
    """

    name = "peft"

    def __init__(
        self,
        *,
        peft: Mapping[str, Any],
        learning_rate: LearningRate = 2e-4,
        targets: Annotated[str, OneOf(TARGETS)] = "projections",
    ) -> None:
        if not isinstance(peft, Mapping):
            raise TypeError(f"peft={peft!r} is no mapping; write peft: {{peft_type: LORA, r: 4}}")
        check_values(Peft.__init__, locals())
        self.learning_rate = float(learning_rate)
        self.targets = targets
        self.settings: dict[str, Any] = _plain(peft)
        self.peft_type = check_settings(self.settings)
        self._model: nn.Module | None = None
        self._rewritten: tuple[str, ...] = ()
        self._buffer_names: tuple[str, ...] = ()

    def inject(
        self,
        model: nn.Module,
        *,
        projections: Sequence[str] | None,
        head: Sequence[str],
        total_steps: int,
        seed: int,
    ) -> None:
        """Freeze the model, add PEFT's layers or prompts, let them and the head train.

        Raises:
            RuntimeError: the model was injected before.
            ValueError: nothing matches, the method does not fit the model, or nothing would train.
        """
        if _tuner_layers(model) or hasattr(model, "prompt_encoder"):
            raise RuntimeError(
                f"{type(model).__name__} is adapted by PEFT already; inject into a freshly loaded "
                "model"
            )
        head_trains = head_parameters(model, head)
        buffers = {name for name, _ in model.named_buffers()}
        is_prompt = self.peft_type in PROMPTS
        before = {} if is_prompt else _checksums(model)
        config = self._config(model, projections, head)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if is_prompt:
                _attach_prompts(model, config)
            else:
                _attach_tuner(model, config, self.settings)
        adapter = [p for p in model.parameters() if p.requires_grad]
        if not adapter:
            raise ValueError(
                f"{self.peft_type} trains nothing in {type(model).__name__}: it does not adapt "
                f"layers of this kind; choose others with method.peft.target_modules"
            )
        for parameter in head_trains.values():
            parameter.requires_grad_(True)
        after = {} if is_prompt else _checksums(model)
        self._rewritten = tuple(
            name
            for name, checksum in after.items()
            if before.get(_first(name), checksum) != checksum
        )
        self._model = model
        self._buffer_names = tuple(n for n, _ in model.named_buffers() if _first(n) not in buffers)

    def _config(
        self, model: nn.Module, projections: Sequence[str] | None, head: Sequence[str]
    ) -> Any:
        """Return PEFT's configuration for `model`."""
        config_class = _config_class(self.peft_type)
        known = {field.name for field in dataclasses.fields(config_class)}
        values = copy.deepcopy(self.settings)
        del values["peft_type"]
        if self.peft_type in PROMPTS:
            values["task_type"] = _task_type(model, self.peft_type)
            return config_class(**values)
        names = values.get("target_modules")
        layers = [m for m in model.modules() if isinstance(m, Conv1D)]
        if names is None and self.targets == "projections":
            found = find_projections(model, projections, exclude=head)
            names = sorted({p.layer for p in found})
            values["target_modules"] = names
            layers = [m for m in map(model.get_submodule, names) if isinstance(m, Conv1D)]
            fused = sorted({p.layer for p in found if p.num_outputs < p.out_features})
            if fused:
                logger.info(
                    "PEFT adapts whole layers only: %s holds more than the slices that were asked "
                    "for (the key of GPT-2), and all of it is adapted (%d layers)",
                    fused[0], len(fused),
                )  # fmt: skip
        elif "exclude_modules" in known and head:  # a pattern may match within the head
            values["exclude_modules"] = rf"({'|'.join(map(re.escape, head))})(\..*)?"
        if "fan_in_fan_out" in known and "fan_in_fan_out" not in values:
            values["fan_in_fan_out"] = bool(layers)
        return config_class(**values)

    def updated_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what trains, and the weights that the method rewrote at the start."""
        return {
            name: p
            for name, p in model.named_parameters()
            if p.requires_grad or name in self._rewritten
        }

    def merged(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Run on PEFT's merged weights where the method can merge, else on the model as it is."""
        return nullcontext(model) if self.peft_type in PROMPTS else _merged(model, self.peft_type)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers that PEFT added, by their name in the model."""
        return {} if self._model is None else _buffers(self._model, self._buffer_names)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the buffers after `inject`.

        Raises:
            ValueError: the state belongs to another method or model.
        """
        own = self.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if shapes != expected:
            differing = sorted(dict(shapes.items() ^ expected.items()))
            raise ValueError(
                f"the state does not fit this {self.peft_type}: {differing[:6]} differ in name or "
                "shape; resume from a checkpoint of the same method and model"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def describe(self) -> dict[str, Any]:
        """Return PEFT's version and the number of layers it adapts (none with a prompt)."""
        layers = {} if self._model is None else _tuner_layers(self._model)
        return {"peft_version": import_peft().__version__, "num_adapted_layers": len(layers)}


# ---------------------------------------------------------------------- settings


def check_settings(settings: Mapping[str, Any]) -> str:
    """Check what goes to PEFT's configuration class.

    Args:
        settings: its keywords, with ``peft_type``.

    Returns:
        The ``peft_type`` in PEFT's spelling.

    Raises:
        ImportError: the package is missing.
        TypeError: ``peft_type`` is no text.
        ValueError: an unknown or refused ``peft_type``, or an unknown key.
    """
    mapping = import_peft().PEFT_TYPE_TO_CONFIG_MAPPING
    known = sorted(str(getattr(name, "value", name)) for name in mapping)
    allowed = ", ".join(name for name in known if name not in REFUSED)
    check_mapping("peft", settings)
    name = settings.get("peft_type")
    if not isinstance(name, str):
        raise TypeError(
            f"peft.peft_type={name!r} of peft={shown(dict(settings))} is no text; use one of "
            f"{allowed}"
        )
    peft_type = name.upper()
    if peft_type not in known:
        raise ValueError(f"unknown peft.peft_type={name!r}; {near(peft_type, known)}use {allowed}")
    if peft_type in REFUSED:
        raise ValueError(f"peft.peft_type={name} cannot be trained here: {REFUSED[peft_type]}")
    fields = [f.name for f in dataclasses.fields(_config_class(peft_type)) if f.init]
    for key in settings:
        if key in RESERVED:
            raise ValueError(f"peft.{key} is not allowed: {RESERVED[key]}")
        if key != "peft_type" and key not in fields:
            usable = [f for f in fields if f not in RESERVED]
            raise ValueError(
                f"unknown key peft.{key} of {peft_type}; {near(key, usable)}"
                f"known: {', '.join(usable)}"
            )
    values = {key: value for key, value in settings.items() if key != "peft_type"}
    _check_types(peft_type, values)
    with _refusing(peft_type, values):
        _config_class(peft_type)(**copy.deepcopy(values))
    return peft_type


@contextmanager
def _refusing(peft_type: str, values: Mapping[str, Any], model: str = "") -> Iterator[None]:
    """Say what was refused where PEFT fails, which it does in any way."""
    try:
        yield
    except Exception as error:
        what = f"does not fit {model} with" if model else "refuses"
        reason = shown(" ".join(f"{error}".split()), 400).strip("'\"")
        raise ValueError(
            f"peft: {peft_type} {what} {shown(dict(values), 300)}: {reason}; correct method.peft"
        ) from error


def _check_types(peft_type: str, values: Mapping[str, Any]) -> None:
    """Check values by the types of PEFT's fields, and numbers by what their names mean."""
    fields = dataclasses.fields(_config_class(peft_type))
    hints = typing.get_type_hints(_config_class(peft_type))
    needed = "num_virtual_tokens"
    if needed in {field.name for field in fields} and values.get(needed) is None:
        raise ValueError(
            f"peft.{needed}=None, and {peft_type} needs a number; write one, for example "
            f"method.peft.{needed}=20"
        )
    for field in fields:
        if field.name not in values or (values[field.name] is None and field.default is None):
            continue
        hint, rule = _declared(field.name, hints[field.name], field.default)
        with contextlib.suppress(UnknownHintError):
            check_value(f"peft.{field.name}", values[field.name], hint, rule)


def _declared(name: str, hint: Any, default: Any) -> tuple[Any, Any]:
    """Return type and range of a field of PEFT's, of which it declares the type at most."""
    kinds = typing.get_args(hint)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return str, OneOf(tuple(str(member.value) for member in kind))
    if any("[" in str(option) for kind in kinds for option in typing.get_args(kind)):
        return Any, None  # a pattern among the words: pissa_niter_[number of iters]
    if name.endswith("dropout"):
        return Dropout, None
    if name.endswith("alpha"):
        return Alpha, None  # declared as an integer, and a number in use
    if name == "r":
        return Rank, None
    if name == "num_virtual_tokens":
        return int, Range(at_least=1, at_most=65536)
    if hint is int:  # some have -1 as a word
        return int, Range(at_least=min(0, default or 0), at_most=2**20)
    return hint, Range(at_least=-1e6, at_most=1e6) if hint is float else None


def _config_class(peft_type: str) -> Any:
    mapping = import_peft().PEFT_TYPE_TO_CONFIG_MAPPING
    return mapping[import_peft().PeftType(peft_type)]


def _plain(value: Any) -> Any:
    """Return nested mappings and sequences as dict and list."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


# ---------------------------------------------------------------------- tuners


def _attach_tuner(model: nn.Module, config: Any, settings: Mapping[str, Any]) -> None:
    """Let PEFT replace the layers that `config` names; only what it adds trains then.

    Raises:
        ValueError: PEFT finds no such layer, or does not have the method for its kind.
    """
    tuner_class = import_peft().PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    model.requires_grad_(False)
    # The class itself: `inject_adapter_in_model` refuses tuners whose layers share tensors, because
    # it drops the tuner. The layers hold the shared tensors too, so the model is complete.
    name = type(model).__name__
    with _refusing(config.peft_type.value, settings, name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You have passed exclude_modules")
        tuner = tuner_class(model, config, ADAPTER)
    if hasattr(tuner, "_cast_adapter_dtype"):
        tuner._cast_adapter_dtype(adapter_name=ADAPTER, autocast_adapter_dtype=True)


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers in `model` by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


@contextmanager
def _merged(model: nn.Module, peft_type: str) -> Iterator[nn.Module]:
    """Within the context `model` is a plain model on merged weights, where PEFT can merge."""
    layers = _tuner_layers(model)
    if not layers:
        raise RuntimeError(
            "the model has no layer of PEFT to merge: it was never injected or is merged already"
        )
    saved: dict[str, dict[str, Tensor]] = {}
    try:
        try:
            for name, layer in layers.items():
                saved[name] = {n: p.detach().clone() for n, p in layer.named_parameters()}
                layer.merge()
            for name, layer in layers.items():
                replace_module(model, name, layer.get_base_layer())
        except NotImplementedError:
            _restore(model, layers, saved)
            saved = {}
            logger.info("%s cannot merge its weights; the model runs with its adapter", peft_type)
        yield model
    finally:
        _restore(model, layers, saved)


@torch.no_grad()
def _restore(
    model: nn.Module, layers: Mapping[str, Any], saved: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Put PEFT's layers back into `model`, with the tensors that they had."""
    for name, tensors in saved.items():
        layer = layers[name]
        is_training = layer.get_base_layer().training
        if layer.merged:
            layer.unmerge()
        parameters = dict(layer.named_parameters())
        for parameter_name, tensor in tensors.items():
            parameters[parameter_name].copy_(tensor)
        if model.get_submodule(name) is not layer:
            replace_module(model, name, layer)
            layer.train(is_training)


def _checksums(model: nn.Module) -> dict[str, str]:
    """Return a checksum of every parameter by name; none on the meta device."""
    return {
        name: hashlib.sha256(
            p.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data
        ).hexdigest()
        for name, p in model.named_parameters()
        if not p.is_meta
    }


def _buffers(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    found = dict(model.named_buffers())
    return {name: found[name] for name in names}


def _first(name: str) -> str:
    """Return the name that a tensor of an adapted layer had before."""
    return name.replace(".base_layer", "")


# ---------------------------------------------------------------------- prompts


def _task_type(model: nn.Module, peft_type: str) -> str:
    """Return PEFT's name for what `model` does.

    Raises:
        ValueError: prompt learning does not work with the batches of such a model.
    """
    family = family_of(model)
    if family in ("seq2seq_lm", "sequence_classification"):
        return str(FAMILIES[family].peft_task)
    raise ValueError(
        f"{peft_type} puts virtual tokens before every sequence, but the sequences of a batch for "
        f"{type(model).__name__} stand in one row without padding; use it with sequence "
        "classification (GLUE) or an encoder-decoder (XSum), or take a tuner such as "
        "method=peft/ia3 here"
    )


def _attach_prompts(model: nn.Module, config: Any) -> None:
    """Give `model` virtual tokens: PEFT's wrapper runs inside its `forward` and `generate`.

    PEFT's wrapper calls the model that it wraps. That is a shallow copy here, which shares all
    modules with `model` and keeps the class's `forward`, so nothing calls itself.

    Raises:
        ValueError: the model has no room or no form that PEFT can put a prompt before.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    model.requires_grad_(False)
    inner = copy.copy(model)
    wrapper = import_peft().get_peft_model(inner, config)
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's copy of a head
            replace_module(model, name, module.original_module)
    model.requires_grad_(False)
    wrapper.prompt_encoder.requires_grad_(True)
    model.add_module("prompt_encoder", wrapper.prompt_encoder)
    room = _room(model, config.num_virtual_tokens)
    if room is not None and room < 1:
        raise ValueError(
            f"method.peft.num_virtual_tokens={config.num_virtual_tokens} leaves the model no "
            f"position for a text; use at most {config.num_virtual_tokens + room - 1}"
        )
    is_prefix = str(config.peft_type.value) == "PREFIX_TUNING"

    def check_room(length: int) -> None:
        if room is not None and length > room:
            raise ValueError(
                f"{length} tokens behind {config.num_virtual_tokens} virtual ones, but the model "
                f"has room for {room}; lower the task's length or "
                "method.peft.num_virtual_tokens"
            )

    def forward(*args: Any, **kwargs: Any) -> Any:
        input_ids = args[0] if args else kwargs.get("input_ids")
        if input_ids is not None:
            check_room(input_ids.shape[1])
        if is_prefix and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            raise ValueError(
                "prefix tuning does not work with gradient checkpointing, which drops the cache "
                "that holds the prefix; set trainer.gradient_checkpointing=false"
            )
        inner.training = model.training
        return wrapper(*args, **kwargs)

    def generate(input_ids: Tensor, **kwargs: Any) -> Tensor:
        check_room(input_ids.shape[1])
        inner.training = wrapper.training = model.training
        inner.generation_config = model.generation_config
        wrapper.generation_config = model.generation_config
        return wrapper.generate(input_ids=input_ids, **kwargs)

    # In the instance's own dictionary, which the shallow copy does not share.
    vars(model).update(forward=forward, generate=generate)


def _room(model: nn.Module, num_virtual_tokens: int) -> int | None:
    """Return how many tokens fit behind the virtual ones, or None where there is no limit."""
    positions = num_positions(model.config)
    return None if positions is None else positions - num_virtual_tokens
