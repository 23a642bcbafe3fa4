"""Attach a method of the suite to any model, train it in any loop, save it and load it back.

    adapter = delta_lora.attach(model, method="delta_lora", rank=8, alpha=16, start_step=500)
    optimizer = torch.optim.AdamW(adapter.param_groups())
    for batch in batches:
        loss(model, batch).backward()
        adapter.before_step()
        optimizer.step()
        adapter.after_step()
        optimizer.zero_grad()
    adapter.save("my_adapter")
    adapter = delta_lora.load("my_adapter")  # adapter.model is the trained model

A loop that leaves one of the two calls out is stopped at its next forward pass in training.
`delta_lora.adapter_file` is the folder that is written; `delta_lora.export` turns it into a plain
PEFT LoRA.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delta_lora import adapter_file, checkpoint, methods
from delta_lora.checks import check_path
from delta_lora.models import fingerprint
from delta_lora.protocols import Method
from delta_lora.step_watch import StepWatch
from delta_lora.writing import advising

#: names under which classification models keep a head that is new.
USUAL_HEADS = (
    "classifier", "score", "classification_head", "qa_outputs", "pre_classifier", "pooler",
    "sequence_summary",
)  # fmt: skip
#: more steps than any training has, for methods that only plan by them.
UNKNOWN_STEPS = 10**9
_MARK = "_has_delta_lora_adapter"

logger = logging.getLogger(__name__)


class Adapter:
    """A model with a method on it: what a training loop calls. `attach` and `load` return one.

    Args:
        model: the injected model.
        method: the method that was injected.
        description: what `save` writes beside the tensors.
        plain_names: the names of the model's tensors before the method was injected.

    Attributes:
        model: the model, the same object that was given to `attach`.
        step: number of optimiser steps that `after_step` has counted.
        is_loaded: whether it comes from `load`, which restores what was learned, not the training.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        description: dict[str, Any],
        *,
        plain_names: frozenset[str],
    ) -> None:
        self.model = model
        self.method = method
        self.description = description
        self.step = 0
        self.is_loaded = False
        self._micro_step = 0
        self._is_merged = False
        self._plain_names = plain_names
        self._watch = StepWatch(model, str(description["method"]["name"]))
        model.register_forward_pre_hook(self._before_forward)
        vars(model)[_MARK] = True
        if hasattr(model, "save_pretrained"):
            vars(model)["save_pretrained"] = self._save_pretrained

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._watch.check()
            self.method.before_micro_batch(self.step, self._micro_step)
            self._micro_step += 1

    def param_groups(self) -> list[dict[str, Any]]:
        """Return what a torch optimiser takes: the trained parameters with their learning rate.

        The rate is the method's, from ``attach(..., learning_rate=)`` or its default; torch takes a
        group's own rate before one that the optimiser is given, so such a one is refused in the
        first step where no group has it.
        """
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
            RuntimeError: the model comes from `load`, which keeps no state of the training, or the
                optimiser step before was taken without the two calls.
        """
        if self.is_loaded:
            raise RuntimeError(
                "this model was loaded for use: its method does not know where the training stood; "
                "to go on, attach the method to the base and give Adapter.load_state_dict what "
                "Adapter.state_dict returned"
            )
        self._watch.open()
        self.method.before_step(self.step)

    def after_step(self) -> None:
        """Call right after ``optimizer.step()``, before the gradients are cleared.

        Where a loss scaler skipped the step, leave this call out.

        Raises:
            RuntimeError: `before_step` was not called.
        """
        self._watch.close()
        self.method.after_step(self.step)
        self.step += 1
        self._micro_step = 0

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """Run on merged weights, a plain model, within the context; restore it afterwards."""
        with self.method.merged(self.model) as plain:
            self._is_merged = True
            try:
                yield plain
            finally:
                self._is_merged = False

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Stand in for `save_pretrained` of the model, which would write the branches as well.

        Raises:
            RuntimeError: the model is not a plain one.
        """
        if _tensor_names(self.model) != self._plain_names:
            name = self.description["method"]["name"]
            if self._is_merged:
                raise RuntimeError(
                    f"what {name!r} has learned cannot be merged into these weights, so there is "
                    "no plain model to save; write the adapter with adapter.save(folder)"
                )
            raise RuntimeError(
                f"this {type(self.model).__name__} has {name!r} attached, and save_pretrained "
                "would write what no other program reads as it was trained; write the adapter "
                "with adapter.save(folder), or the whole model with: with adapter.merged() as "
                "model: model.save_pretrained(folder)"
            )
        type(self.model).save_pretrained(self.model, *args, **kwargs)  # type: ignore[attr-defined]

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, how many more the method changes itself, and of all."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        total = sum(size for size, _ in sizes)
        trained = sum(size for size, trains in sizes if trains)
        print(  # noqa: T201 - what it is for
            f"trainable params: {trained:,d} || "
            f"updatable params: {self.method.num_updatable_parameters:,d} || "
            f"all params: {total:,d} || trainable%: {100 * trained / total:.4f}"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a continued training needs beside the optimiser's state.

        Raises:
            RuntimeError: the last optimiser step was taken without the two calls around it.
        """
        self._watch.check()
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
        self._watch.forget()

    def save(self, folder: str | Path) -> Path:
        """Write the adapter to `folder`; `load` and `delta_lora.export` read it.

        Returns:
            The folder.

        Raises:
            RuntimeError: the last optimiser step was taken without the two calls around it.
            OSError: a file cannot be written; the message has its path and what to do, and an
                adapter that stood there stays.
        """
        self._watch.check()
        folder = check_path("folder", folder)
        description = {**self.description, "facts": self.method.describe(), "step": self.step}
        with advising("save it again"):
            adapter_file.write(folder, self.method.updated_tensors(self.model), description)
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
) -> Adapter:
    """Prepare `model` in place for training with a method.

    Args:
        model: a transformers model, or any module with `nn.Linear` or `Conv1D` layers.
        method: its name, one of `delta_lora.methods` (``delta_lora``, ``lora``, ``adalora``, ...)
            or of a subclass of `Method` that was imported.
        projections: names or patterns of the layers to adapt (see `find_projections`); None finds
            W_Q and W_V of every attention block.
        head: names of new modules that train whole, such as ``["classifier"]``.
        total_steps: optimiser steps of the training; AdaLoRA plans by it, and Delta-LoRA warns
            where `start_step` lies behind it.
        seed: draws the initial factors, and what a method draws itself.
        **settings: keywords of the method's constructor (`rank`, `alpha`, `update_ratio`,
            `start_step`, `form`, ...); what is left out has the constructor's default.

    Returns:
        What the training loop calls; its `model` is the model that was given.

    Raises:
        ValueError: unknown method, a setting that is not allowed, or layers that do not exist.
        TypeError: a setting that the method does not have, or lacks.
        RuntimeError: something is attached already.
    """
    kind = methods.method_class(method)
    described = methods.describe(kind, settings)
    if left_out := [f"{k}={v!r}" for k, v in described.items() if k not in {"name", *settings}]:
        logger.info("%s: %s by default", method, ", ".join(left_out))
    instance = methods.build(described)
    if total_steps is None and instance.needs_total_steps:
        raise ValueError(f"method {method!r} plans by the length of the training; set total_steps")
    present = [name for name in USUAL_HEADS if isinstance(getattr(model, name, None), nn.Module)]
    if frozen := [name for name in present if name not in head]:
        logger.warning(
            "%s stays frozen; what is new of it must train: head=%s",
            ", ".join(frozen), [*head, *frozen],
        )  # fmt: skip
    base = adapter_file.describe_base(model, projections=projections, head=head)
    description = {"method": described, "seed": seed, "base": base}
    adapter_file.as_json(description)  # not only after the training
    return _inject(model, instance, description, total_steps)


def load(
    path: str | Path,
    *,
    base: nn.Module | str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    check_base: bool = True,
) -> Adapter:
    """Return the model that a run or `Adapter.save` left, in evaluation mode, with its adapter.

    Args:
        path: a run's folder (``outputs/<signature>``) or the folder of an adapter.
        base: the pre-trained model (used in place), or its folder or hub id; None takes what the
            adapter was trained on.
        settings: settings of the method to change, such as DyLoRA's ``{"eval_rank": 2}``.
        check_base: refuse a base whose weights are not those that were trained on.

    Returns:
        The adapter: `model` is the trained model, `merged()` gives it as a plain one.

    Raises:
        FileNotFoundError: no adapter stands there, or its base is gone.
        RuntimeError: something is attached to the base already.
        ValueError: the base is another one, the method is not known, or a file is not what was
            written: its checksum differs, a tensor is missing, not known, of another shape or not
            finite, or it is of another run than the record beside it. The message has the path.
    """
    folder = adapter_file.find_folder(path)
    description = adapter_file.read_description(folder)
    if isinstance(base, nn.Module):
        model = base
    else:
        model = adapter_file.load_base(description, folder, source=base)
    adapter = put(model, folder, settings=settings, check_base=check_base)
    model.eval()
    return adapter


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
        folder: from `adapter_file.find_folder`.
        settings: as for `load`.
        check_base: as for `load`.

    Raises:
        RuntimeError: something is attached to the model already.
        ValueError: the base is another one, a file is damaged, or the method is not known.
    """
    description = adapter_file.read_description(folder)
    base = description["base"]
    if check_base and base["sha256"] is not None:
        found = fingerprint(model, exclude=base["head"])
        if found != base["sha256"]:
            raise ValueError(
                f"the base model is not the one that {folder} was trained on (sha256 "
                f"{found[:12]}, expected {base['sha256'][:12]}); give that one with base=, or "
                "check_base=False if the weights are the same in another type"
            )
    tensors = adapter_file.read_tensors(folder, description)
    used = {**description["method"], **(settings or {})}
    with _reading(folder / adapter_file.CONFIG):
        method = methods.build(used)
    adapter = _inject(model, method, {**description, "method": used}, None)
    adapter_file.check_tensors(folder, tensors, adapter.method.updated_tensors(model))
    with torch.no_grad():
        checkpoint.restore_weights(model, tensors)
    with _reading(folder / adapter_file.CONFIG):
        adapter.method.load_facts(description["facts"])
        adapter.step, adapter.is_loaded = int(description.get("step", 0)), True
    return adapter


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the description where it, or a setting given beside it, makes no method.

    Raises:
        ValueError: for any error of the block.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} describes no method of this version: {what}") from error


def _inject(
    model: nn.Module, method: Method, description: dict[str, Any], total_steps: int | None
) -> Adapter:
    """Inject `method` as its description says; return the adapter."""
    if _MARK in vars(model):
        raise RuntimeError("the model has a method attached; attach to a freshly loaded one")
    plain_names = _tensor_names(model)
    method.inject(
        model,
        projections=description["base"]["projections"],
        head=description["base"]["head"],
        total_steps=UNKNOWN_STEPS if total_steps is None else total_steps,
        seed=description["seed"],
    )
    return Adapter(model, method, description, plain_names=plain_names)


def _tensor_names(model: nn.Module) -> frozenset[str]:
    """Return the names of all parameters and buffers."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return frozenset(name for tensors in (parameters, buffers) for name, _ in tensors)
