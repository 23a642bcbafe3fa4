"""Attach a method of the suite to any model, train it in any loop, save it and load it back.

    model = delta_lora.attach(model, method="delta_lora", rank=8, alpha=16, start_step=500)
    adapter = delta_lora.adapter_of(model)
    optimizer = torch.optim.AdamW(adapter.param_groups())
    for batch in batches:
        loss(model, batch).backward()
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
    adapter.save("my_adapter")
    model = delta_lora.load("my_adapter")

A folder holds ``adapter_model.safetensors`` (every parameter that training changed) and
``adapter_config.json`` (method, base model, facts); a run of the suite writes the same into
``outputs/<signature>/adapter``. `delta_lora.export` turns either into a plain PEFT LoRA.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
import os
import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from delta_lora import checkpoint, methods
from delta_lora.models import DTYPES, fingerprint, load_model
from delta_lora.protocols import Method

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: settings that a method requires and the caller may leave out. Learning rate, lambda and K are
#: those of the paper's E2E runs; rank and alpha are ours.
DEFAULTS: Mapping[str, Any] = {
    "rank": 8,
    "alpha": 16,
    "learning_rate": 2e-4,
    "dropout": 0.0,
    "update_ratio": 2.0,
    "start_step": 500,
    "update": "frozen",
}
#: names under which classification models keep a head that is new.
USUAL_HEADS = (
    "classifier", "score", "classification_head", "qa_outputs", "pre_classifier", "pooler",
    "sequence_summary",
)  # fmt: skip
#: more steps than any training has, for methods that only plan by them.
UNKNOWN_STEPS = 10**9
_ATTRIBUTE = "_delta_lora_adapter"
_FAMILIES = {
    "LMHeadModel": "causal_lm",
    "ForCausalLM": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForConditionalGeneration": "seq2seq_lm",
    "ForSequenceClassification": "sequence_classification",
}

logger = logging.getLogger(__name__)


class Adapter:
    """A model with a method on it: what a training loop calls.

    Args:
        model: the injected model.
        method: the method that was injected.
        description: what `save` writes beside the tensors.

    Attributes:
        step: number of optimiser steps that `after_step` has counted.
        is_loaded: whether it comes from `load`, which restores what was learned, not the training.
    """

    def __init__(self, model: nn.Module, method: Method, description: dict[str, Any]) -> None:
        self.model = model
        self.method = method
        self.description = description
        self.step = 0
        self.is_loaded = False
        self._micro_step = 0
        model.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.method.before_micro_batch(self.step, self._micro_step)
            self._micro_step += 1

    def param_groups(self) -> list[dict[str, Any]]:
        """Return what a torch optimiser takes: the trained parameters with their learning rate."""
        return [
            {**group, "params": [parameter for _, parameter in group["params"]]}
            for group in self.method.param_groups(self.model)
        ]

    def extra_loss(self) -> Tensor | None:
        """Return a term to add to the loss once per optimiser step (AdaLoRA's), or None."""
        return self.method.extra_loss()

    def before_step(self) -> None:
        """Call when the gradients are complete, right before ``optimizer.step()``.

        Raises:
            RuntimeError: the model comes from `load`, which keeps no state of the training.
        """
        if self.is_loaded:
            raise RuntimeError(
                "this model was loaded for use: its method does not know where the training stood; "
                "to go on, attach the method to the base and give Adapter.load_state_dict what "
                "Adapter.state_dict returned"
            )
        self.method.before_step(self.step)

    def after_step(self) -> None:
        """Call right after ``optimizer.step()``, before the gradients are cleared.

        Where a loss scaler skipped the step, leave this call out.

        Raises:
            RuntimeError: `before_step` was not called.
        """
        self.method.after_step(self.step)
        self.step += 1
        self._micro_step = 0

    def merged(self) -> AbstractContextManager[nn.Module]:
        """Run on merged weights, a plain model, within the context; restore it afterwards."""
        return self.method.merged(self.model)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a continued training needs beside the optimiser's state."""
        weights = self.method.updated_tensors(self.model)
        state = {f"weights.{name}": tensor.detach() for name, tensor in weights.items()}
        state |= {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}
        return state | {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, on a model with the same method attached.

        Raises:
            RuntimeError: a tensor does not fit the model.
            ValueError: the state is one of another method.
        """
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "method": {}}
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            if part in parts and rest:
                parts[part][rest] = tensor
        own = self.method.updated_tensors(self.model)
        if own.keys() != parts["weights"].keys() or "step" not in state:
            differing = sorted(own.keys() ^ parts["weights"].keys())
            raise ValueError(
                f"the state is not one of this model and method: {differing[:4] or 'no step'}; "
                "attach the same method with the same settings before loading"
            )
        checkpoint.restore_weights(self.model, parts["weights"])
        self.method.load_state_dict(parts["method"])
        self.step, self._micro_step = int(state["step"]), 0

    def save(self, folder: str | Path) -> Path:
        """Write the adapter to `folder`; `load` and `delta_lora.export` read it.

        Returns:
            The folder.
        """
        folder = Path(folder)
        description = {**self.description, "facts": self.method.describe(), "step": self.step}
        write(folder, self.method.updated_tensors(self.model), description)
        return folder


def attach(
    model: nn.Module,
    method: str = "delta_lora",
    *,
    projections: Sequence[str] | None = None,
    head: Sequence[str] = (),
    total_steps: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> nn.Module:
    """Prepare `model` in place for training with a method of the suite.

    Args:
        model: a transformers model, or any module with `nn.Linear` or `Conv1D` layers.
        method: a module of `delta_lora.methods`: ``delta_lora``, ``lora``, ``adalora``, ...
        projections: names or patterns of the layers to adapt (see `find_projections`); None finds
            W_Q and W_V of every attention block.
        head: names of new modules that train whole, such as ``["classifier"]``.
        total_steps: optimiser steps of the training; AdaLoRA plans by it, and Delta-LoRA warns
            where `start_step` lies behind it.
        seed: draws the initial factors, and what a method draws itself.
        **settings: keywords of the method's constructor (`rank`, `alpha`, `update_ratio`,
            `start_step`, `form`, ...). Required ones that are left out come from `DEFAULTS`.

    Returns:
        The same model.

    Raises:
        ValueError: unknown method, a setting that is not allowed, or layers that do not exist.
        TypeError: a setting that the method does not have, or lacks.
        RuntimeError: something is attached already.
    """
    if hasattr(model, _ATTRIBUTE):
        raise RuntimeError("the model has a method attached; attach to a freshly loaded one")
    kind = method_class(method)
    settings = _complete(kind, method, settings)
    instance = kind(**settings)
    if total_steps is None and instance.needs_total_steps:
        raise ValueError(f"method {method!r} plans by the length of the training; set total_steps")
    present = [name for name in USUAL_HEADS if isinstance(getattr(model, name, None), nn.Module)]
    if frozen := [name for name in present if name not in head]:
        logger.warning(
            "%s stays frozen; what is new of it must train: head=%s",
            ", ".join(frozen), [*head, *frozen],
        )  # fmt: skip
    base = describe_base(model, projections=projections, head=head)
    target = f"{kind.__module__}.{kind.__qualname__}"
    method_config = {"_target_": target, **settings}
    _as_json({"method": method_config, "seed": seed, "base": base})  # not only after the training
    instance.inject(
        model,
        projections=projections,
        head=head,
        total_steps=UNKNOWN_STEPS if total_steps is None else total_steps,
        seed=seed,
    )
    _remember(model, instance, {"method": method_config, "seed": seed, "base": base})
    return model


def adapter_of(model: nn.Module) -> Adapter:
    """Return the adapter of a model from `attach` or `load`.

    Raises:
        RuntimeError: nothing is attached to the model.
    """
    adapter = getattr(model, _ATTRIBUTE, None)
    if not isinstance(adapter, Adapter):
        raise RuntimeError(
            f"nothing is attached to this {type(model).__name__}; "
            "use model = delta_lora.attach(model, ...) first"
        )
    return adapter


def load(
    path: str | Path,
    *,
    base: nn.Module | str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    check_base: bool = True,
) -> nn.Module:
    """Return the model that a run or `Adapter.save` left, in evaluation mode.

    Args:
        path: a run's folder (``outputs/<signature>``) or the folder of an adapter.
        base: the pre-trained model (used in place), or its folder or hub id; None takes what the
            adapter was trained on.
        settings: settings of the method to change, such as DyLoRA's ``{"eval_rank": 2}``.
        check_base: refuse a base whose weights are not those that were trained on.

    Returns:
        The model with the adapter on it; `adapter_of(model).merged()` gives the plain one.

    Raises:
        FileNotFoundError: no adapter stands there, or its base is gone.
        ValueError: the base is another one, or the description is damaged.
    """
    folder = find_folder(path)
    description = read_description(folder)
    model = base if isinstance(base, nn.Module) else load_base(description, folder, source=base)
    put(model, folder, settings=settings, check_base=check_base)
    return model.eval()


def put(
    model: nn.Module,
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    check_base: bool = True,
) -> Adapter:
    """Inject the method of a saved adapter into its base model and restore what it learned.

    Args:
        model: the base model; changed in place.
        folder: from `find_folder`.
        settings: as for `load`.
        check_base: as for `load`.

    Raises:
        ValueError: the base is another one.
    """
    description = read_description(folder)
    base = description["base"]
    if check_base and base["sha256"] is not None:
        found = fingerprint(model, exclude=base["head"])
        if found != base["sha256"]:
            raise ValueError(
                f"the base model is not the one that {folder} was trained on (sha256 "
                f"{found[:12]}, expected {base['sha256'][:12]}); give that one with base=, or "
                "check_base=False if the weights are the same in another type"
            )
    method = build_method({**description["method"], **(settings or {})})
    method.inject(
        model,
        projections=base["projections"],
        head=base["head"],
        total_steps=UNKNOWN_STEPS,
        seed=description["seed"],
    )
    with torch.no_grad():
        checkpoint.restore_weights(model, load_file(folder / TENSORS))
    method.load_facts(description["facts"])
    used = {**description["method"], **(settings or {})}
    adapter = _remember(model, method, {**description, "method": used})
    adapter.step, adapter.is_loaded = int(description.get("step", 0)), True
    return adapter


def method_class(name: str) -> type[Method]:
    """Return the class of a method by the name of its module in `delta_lora.methods`.

    Raises:
        ValueError: there is no such method; near matches are named.
    """
    known = sorted(module.name for module in pkgutil.iter_modules(methods.__path__))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"unknown method {name!r}; {hint}known: {', '.join(known)}")
    module = importlib.import_module(f"{methods.__name__}.{name}")
    (kind,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    )
    return kind


def build_method(config: Mapping[str, Any]) -> Method:
    """Return the method of a description: ``{"_target_": "delta_lora.methods....", ...}``.

    Raises:
        ValueError: the target is no method of this library (nothing else is ever imported).
    """
    target, keywords = str(config.get("_target_")), {**config}
    keywords.pop("_target_", None)
    package, _, rest = target.partition(f"{methods.__name__}.")
    name, _, class_name = rest.partition(".")
    kind = None if package or not name else method_class(name)
    if kind is None or kind.__name__ != class_name:
        raise ValueError(f"{target!r} is no method of {methods.__name__}")
    return kind(**_complete(kind, name, keywords, fill=False))


def _complete(
    kind: type[Method], name: str, settings: Mapping[str, Any], *, fill: bool = True
) -> dict[str, Any]:
    """Check the names of `settings`, and add defaults for required ones."""
    parameters = {
        key: value
        for key, value in inspect.signature(kind).parameters.items()
        if value.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for key in settings:
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, n=2)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise TypeError(
                f"method {name!r} has no setting {key!r}; {hint}it has {', '.join(parameters)}"
            )
    complete = dict(settings)
    for key, parameter in parameters.items():
        if key in complete or parameter.default is not inspect.Parameter.empty:
            continue
        if not fill or key not in DEFAULTS:
            raise TypeError(f"method {name!r} needs {key}=...; it has {', '.join(parameters)}")
        complete[key] = DEFAULTS[key]
        logger.info("%s: %s=%r by default", name, key, DEFAULTS[key])
    return complete


def _remember(model: nn.Module, method: Method, description: dict[str, Any]) -> Adapter:
    adapter = Adapter(model, method, description)
    object.__setattr__(model, _ATTRIBUTE, adapter)
    return adapter


# ---------------------------------------------------------------------- files


def write(folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Write an adapter: tensors first, so that a folder with a description is whole.

    Args:
        folder: made where it does not exist.
        tensors: every parameter that training changed, by name.
        description: ``method``, ``seed`` (some methods draw what never trains), ``base`` (from
            `describe_base`) and ``facts``; JSON values.

    Returns:
        The sha256 of the file of tensors.
    """
    base = dict(description["base"])
    if base["source"] is not None and (Path(base["source"]) / "config.json").is_file():
        # Relative, so that a folder of runs can be moved as a whole.
        base["source"] = os.path.relpath(base["source"], folder)
        if not base["source"].startswith("."):
            base["source"] = f"./{base['source']}"
    content = _as_json({**description, "base": base})
    folder.mkdir(parents=True, exist_ok=True)
    # Until the new tensors are whole, the old adapter stays.
    temporary = folder / f".{TENSORS}.{os.getpid()}"
    try:
        checkpoint.write_tensors(temporary, tensors)
    except BaseException:
        temporary.unlink(missing_ok=True)  # half a file would fill the disk further
        raise
    (folder / CONFIG).unlink(missing_ok=True)
    temporary.replace(folder / TENSORS)
    checkpoint.write_json(folder / CONFIG, content)
    return checkpoint.sha256_file(folder / TENSORS)


def _as_json(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description as it is read back.

    Raises:
        TypeError: a value is none of JSON.
    """
    for part, values in description.items():
        for key, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            try:
                json.dumps(value)
            except TypeError as error:
                name = f"{part}.{key}" if key else part
                raise TypeError(
                    f"{name}={value!r} ({type(value).__name__}) cannot be saved as JSON; give "
                    "plain numbers, texts, lists and dictionaries"
                ) from error
    return dict(description)


def describe_base(
    model: nn.Module,
    *,
    projections: Sequence[str] | None,
    head: Sequence[str],
    **known: Any,
) -> dict[str, Any]:
    """Return what `load_base` needs to build the untouched base model again.

    Args:
        model: the base model before any method.
        projections: as for `attach`.
        head: as for `attach`.
        **known: what is known better than the model tells: ``family``, ``source``, ``revision``,
            ``architecture``, ``dtype``, ``attention``, ``config_overrides``.
    """
    config = getattr(model, "config", None)
    name = type(model).__name__
    family = next((f for suffix, f in _FAMILIES.items() if name.endswith(suffix)), None)
    overrides = {}
    if family == "sequence_classification" and config is not None:
        overrides = {"num_labels": config.num_labels, "problem_type": config.problem_type}
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtypes = {value: key for key, value in DTYPES.items()}
    return {
        "family": family,
        "source": getattr(config, "name_or_path", None) or None,
        "revision": None,
        "architecture": None,
        "dtype": dtypes.get(first.dtype, "float32") if first is not None else "float32",
        "attention": getattr(config, "_attn_implementation", None) or "sdpa",
        "config_overrides": overrides,
        **known,
        "projections": None if projections is None else list(projections),
        "head": list(head),
        "sha256": None if _is_on_meta(model) else fingerprint(model, exclude=head),
    }


def _is_on_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def find_folder(path: str | Path) -> Path:
    """Return the folder of an adapter: `path` itself, or ``adapter`` in it.

    Raises:
        FileNotFoundError: neither holds one.
    """
    path = Path(path).expanduser()
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file() and (folder / TENSORS).is_file():
            return folder
    raise FileNotFoundError(
        f"{path} holds no adapter ({CONFIG} and {TENSORS}); give the folder of a finished run "
        "(outputs/<signature>) or one that Adapter.save wrote"
    )


def read_description(folder: Path) -> dict[str, Any]:
    """Return the description of the adapter in `folder`.

    Raises:
        ValueError: it is damaged, or one of PEFT's.
    """
    path = folder / CONFIG
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if "peft_type" in description:
        raise ValueError(
            f"{folder} holds an adapter of PEFT; load it with peft.PeftModel.from_pretrained"
        )
    lacking = [key for key in ("method", "seed", "base", "facts") if key not in description]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}; it was written by an older version")
    return description


def base_source(
    description: Mapping[str, Any], folder: Path, given: str | Path | None = None
) -> tuple[str | None, str | None]:
    """Return where the base model is (folder, hub id or None), and its commit on the hub.

    Args:
        description: from `read_description`; it names a local base relative to `folder`.
        folder: where it stands.
        given: what a caller names instead: as it is, without the commit of another repository.
    """
    base = description["base"]
    if given is not None:
        same = str(given) == base["source"]
        return str(given), base["revision"] if same else None
    source = base["source"]
    if source is not None and source.startswith("."):
        # As it was written, by names; through links a folder's ".." is another one.
        by_name = os.path.normpath(os.path.join(os.path.abspath(folder), source))
        source = by_name if Path(by_name).is_dir() else str(folder / source)
    return source, base["revision"]


def load_base(
    description: Mapping[str, Any], folder: Path, *, source: str | Path | None = None
) -> nn.Module:
    """Return the untouched base model of an adapter.

    Args:
        description: from `read_description`.
        folder: where it stands; a local base is named relative to it.
        source: folder or hub id to take instead.

    Raises:
        FileNotFoundError: the base's folder does not exist.
        ValueError: the description does not say how to build it.
    """
    base = description["base"]
    source, revision = base_source(description, folder, source)
    if base["family"] is None or (source is None and base["architecture"] is None):
        raise ValueError(
            f"{folder} does not say how its base model is built; "
            "build it yourself and give it with base=model"
        )
    return load_model(
        base["family"],
        source=source,
        revision=revision,
        architecture=base["architecture"],
        dtype=base["dtype"],
        config_overrides=base["config_overrides"],
        attention=base["attention"],
        new_modules=base["head"],
    )
