"""Delta-LoRA as a callback: a PEFT LoRA under `transformers.Trainer` becomes Delta-LoRA.

Zi et al., "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices",
arXiv 2309.02411, Algorithm 1: after the optimiser step t, if t > K,
``W += update_ratio * scaling * (B' @ A' - B @ A)``, with A, B before and A', B' after the step.

Two forms with equal gradients and equal results:

* ``closed_form``, the default, leaves W alone. The updates telescope, so the change of W is
  ``update_ratio * scaling * (B @ A - B_k @ A_k)`` with A_k and B_k as they stood before the first
  update; a forward hook on each LoRA layer adds it. It never reads W, so the base may be narrow or
  quantised (tested: bfloat16, int8), and `disable_adapter()` gives it (DPO's reference, a KL term).
* ``in_place`` writes W as printed. W must be float32 or float64, and `disable_adapter()` no longer
  gives the base.

Details:
1. Steps are applied optimiser steps, counted from 0, and the inequality is strict: the first update
   is at step K + 1, K = -1 updates from the first step on. Gradient accumulation makes one step of
   many micro-batches; a step that the fp16 loss scaler skipped does not count (`Trainer` counts it
   in `global_step`).
2. PEFT's checkpoint holds A and B only. The rest goes into ``checkpoint-N/delta_lora.state/``: A_k,
   B_k, the counters, and digests of what they belong to. On resuming, in place, W is rebuilt as
   ``W_0 + update_ratio * scaling * (B @ A - B_k @ A_k)``, equal to rounding, or read with
   `save_weights`.
3. A callback is not told where `Trainer` writes a checkpoint and which one it resumes from; the
   model is, and tells (`places`). Where it was loaded before the callback came, the folder given as
   `resume_from_checkpoint` is read (the callback's own, then that of the `TrainingArguments`), then
   ``output_dir/checkpoint-<global_step>``. Only a state is accepted whose digest is that of the
   factors which the model has just loaded. Anything else is an error.
4. After training the model in memory computes what was trained: in place W holds it, in closed form
   the hooks stay. `model.save_pretrained` and `model.merge_and_unload` know nothing of the hooks;
   `DeltaLoraCallback.export` writes the trained model for every PEFT reader.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from delta_lora import delta, step_watch
from delta_lora.checks import (
    check_bool,
    check_choice,
    check_integer,
    check_path,
    check_real,
    expanded,
)
from delta_lora.integrations import callback_state
from delta_lora.integrations.callback_state import FOLDER, STATE
from delta_lora.integrations.peft_layers import (
    LoraTarget,
    check_can_train,
    find_targets,
    forget_compiled_code,
    sample_weights,
    unsaved,
)
from delta_lora.integrations.places import Places
from delta_lora.peft_folder import import_peft, write_peft_folder

logger = logging.getLogger(__name__)


class _Unused:
    """Says once that something is trained while the callback is in no `Trainer`."""

    def __init__(self) -> None:
        self._is_said = False
        step_watch.listen(self)

    def see(self, optimizer: torch.optim.Optimizer) -> None:
        """Take notice of an optimiser step of this process."""
        if not self._is_said:
            self._is_said = True
            logger.warning(
                "an optimiser trains, and no Trainer was given the DeltaLoraCallback that was "
                "made; without it a LoRA stays a plain LoRA: use Trainer(..., "
                "callbacks=[callback])"
            )


class DeltaLoraCallback(TrainerCallback):
    """Turns the PEFT LoRA of a `transformers.Trainer` into Delta-LoRA.

    Args:
        update_ratio: lambda, at least 0 (paper: 2 on E2E and WebNLG, 0.5 on XSum and GLUE).
        start_step: K, at least -1; W is updated at the steps above it (paper: 500 on E2E).
        form: ``closed_form``, which leaves W alone, or ``in_place``, which writes it as printed.
        save_weights: in place, also store every adapted W in a checkpoint, so that a resumed run
            has the bits of W and not only its value to rounding.
        export_checkpoints: also write the export (see `export`) into every checkpoint, as
            ``checkpoint-N/delta_lora.state/adapter``.
        resume_from_checkpoint: the folder given to `Trainer.train`; needed only where the callback
            came to the `Trainer` by `add_callback` and that is not ``output_dir/checkpoint-N``.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        *,
        update_ratio: float = delta.UPDATE_RATIO,
        start_step: int = delta.START_STEP,
        form: str = delta.FORM,
        save_weights: bool = False,
        export_checkpoints: bool = False,
        resume_from_checkpoint: str | Path | None = None,
    ) -> None:
        self.update_ratio = check_real("update_ratio", update_ratio, at_least=0)
        self.start_step = check_integer("start_step", start_step, at_least=-1)
        self.form = check_choice("form", form, delta.FORMS)
        self.save_weights = check_bool("save_weights", save_weights)
        self.export_checkpoints = check_bool("export_checkpoints", export_checkpoints)
        if self.save_weights and self.form != "in_place":
            raise ValueError(
                f"save_weights=True with form={form!r}: that form never writes W; use "
                'save_weights=False, or form="in_place"'
            )
        self.resume_from_checkpoint = resume_from_checkpoint
        self._targets: list[LoraTarget] = []
        self._unused: _Unused | None = _Unused()
        self._places: Places | None = None
        self._unsaved: list[str] = []
        self._reset()

    @property
    def num_steps(self) -> int:
        """Number of applied optimiser steps so far, over all sessions of the run."""
        return self._num_steps

    @property
    def num_updates(self) -> int:
        """Number of updates of W so far, over all sessions of the run."""
        return self._num_updates

    def _reset(self) -> None:
        self._num_steps = 0
        self._num_updates = 0
        self._first_global_step = 0
        self._num_before = 0
        self._num_after = 0
        self._loss_scale: float | None = None
        self._base_digest: str | None = None

    # ------------------------------------------------------------------ the loop of Trainer

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notice that a `Trainer` has the callback, and follow its model."""
        self._unused = None
        self._follow(kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find and check the layers; restore the state of the checkpoint that is resumed.

        Raises:
            RuntimeError: the training is resumed and the state of the checkpoint is missing, is
                damaged or belongs to another run, adapter or base; or the model is sharded.
            TypeError: the model is no `PeftModel`.
            ValueError: a layer or a setting does not fit Delta-LoRA.
        """
        self._unused = None
        _check_not_sharded(args)
        self._follow(kwargs["model"])
        self._targets = find_targets(kwargs["model"], in_place=self.form == "in_place")
        self._reset()
        if self.form == "in_place":
            self._base_digest = callback_state.digest(sample_weights(self._targets))
        self._first_global_step = state.global_step
        if state.global_step > 0:
            self._resume(args, state)
        elif self.resume_from_checkpoint is not None:
            raise ValueError(
                f"resume_from_checkpoint={str(self.resume_from_checkpoint)!r} was given to the "
                "callback, but Trainer.train starts at step 0; give it to Trainer.train as well"
            )
        check_can_train(self._targets)
        self._unsaved = unsaved(kwargs["model"], self._targets[0].adapter)
        if self._unsaved and self.export_checkpoints:
            raise ValueError(_cannot_export(self._unsaved))
        if self._unsaved:
            logger.warning("%s", _cannot_export(self._unsaved))
        steps = state.max_steps
        if delta.never_updates(steps, self.update_ratio, self.start_step):
            logger.warning(delta.NEVER_UPDATES, self.start_step, steps, steps - 2)

    def _follow(self, model: Any) -> None:
        """Let `model` tell where it is saved to and loaded from."""
        if isinstance(model, nn.Module) and (self._places is None or not self._places.is_of(model)):
            self._places = Places(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep A and B as they are before the optimiser step.

        Raises:
            RuntimeError: the callback came to the `Trainer` when it was training already.
        """
        if not self._targets:
            raise RuntimeError(
                "the callback was added when the training had begun, so it knows no layer; give it "
                "to the Trainer (callbacks=[callback], or add_callback) before trainer.train()"
            )
        self._num_before += 1
        self._loss_scale = _loss_scale(kwargs.get("optimizer"))
        if not self._updates_now():
            return
        for target in self._targets:
            if self._num_updates == 0:
                target.first = target.copy_factors()
            if self.form == "in_place":
                target.keep()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the delta of this step to W if the step is above `start_step`.

        Raises:
            RuntimeError: `on_pre_optimizer_step` was not called for this step.
        """
        self._num_after += 1
        if self._num_after != self._num_before:
            raise RuntimeError(
                f"on_optimizer_step was called {self._num_after} times and on_pre_optimizer_step "
                f"{self._num_before} times; Delta-LoRA needs A and B from before every optimiser "
                "step, so use a Trainer that calls both around optimizer.step()"
            )
        if _was_skipped(kwargs.get("optimizer"), self._loss_scale):
            return
        if self._updates_now():
            for target in self._targets:
                if self.form == "in_place":
                    target.add_to_weight(self.update_ratio)
                elif self._num_updates == 0:
                    target.add_forward_term(self.update_ratio)
            if self.form == "closed_form" and self._num_updates == 0:
                forget_compiled_code()
            self._num_updates += 1
        self._num_steps += 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the two hooks around the optimiser step were called.

        Raises:
            RuntimeError: they were not.
        """
        self._check_hooks(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the state into the checkpoint that `Trainer` has just written.

        Raises:
            RuntimeError: the model was not saved.
        """
        if not args.should_save:
            return
        self._follow(kwargs["model"])
        assert self._places is not None
        checkpoint = self._places.take_saved()
        if checkpoint is None or not checkpoint.is_dir():
            raise RuntimeError(
                f"Trainer says that it has saved step {state.global_step}, but did not ask the "
                "model to save itself, so the state of Delta-LoRA would lie beside no checkpoint; "
                "use a Trainer that calls model.save_pretrained for its checkpoints, or "
                'save_strategy="no"'
            )
        self._save(checkpoint, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the run, follow `load_best_model_at_end`, and say how the model is saved.

        Raises:
            RuntimeError: the hooks around the optimiser step were not called in every step, or the
                state of the best checkpoint is missing or damaged.
        """
        self._check_hooks(state)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # Trainer has loaded A and B of that checkpoint; W has to follow.
            self._restore(Path(state.best_model_checkpoint))
        if self._num_updates > 0:
            logger.warning(
                "Delta-LoRA: %d updates of W in %d steps. model.save_pretrained and the adapter in "
                "a checkpoint hold A and B only%s and are NOT the trained model; save it with "
                "DeltaLoraCallback.export(model, folder), a plain LoRA of twice the rank",
                self._num_updates,
                self._num_steps,
                ", model.merge_and_unload gives no more," if self.form == "closed_form" else "",
            )

    def _updates_now(self) -> bool:
        return delta.updates_at(self._num_steps, self.update_ratio, self.start_step)

    def _check_hooks(self, state: TrainerState) -> None:
        num_steps = state.global_step - self._first_global_step
        if not self._num_before == self._num_after == num_steps:
            raise RuntimeError(
                f"{num_steps} optimiser steps, but on_pre_optimizer_step was called "
                f"{self._num_before} and on_optimizer_step {self._num_after} times; Delta-LoRA "
                "needs both around every step, so this run is void; use a Trainer that calls them"
            )

    # ------------------------------------------------------------------ export

    def export(self, model: nn.Module, folder: str | Path) -> Path:
        """Write the trained model as a plain PEFT LoRA of rank 2r on the untouched base.

        ``A = [A_T; A_k]``, ``B = [(1 + lambda) * s * B_T, -lambda * s * B_k]``, scaling 1. Trained
        modules beside the LoRA (``modules_to_save``) are kept. `peft.PeftModel.from_pretrained` on
        a freshly loaded base gives the trained model.

        Args:
            model: the trained `PeftModel`.
            folder: made if it is missing.

        Returns:
            The folder.

        Raises:
            RuntimeError: this callback has not trained `model`.
            ValueError: weights were trained that no adapter of PEFT holds.
        """
        folder = check_path("folder", folder)
        layers = dict(model.named_modules())
        if not self._targets or any(layers.get(t.name) is not t.layer for t in self._targets):
            raise RuntimeError(
                f"this callback did not train the {type(model).__name__} it was given; call "
                "export(trainer.model, folder) on the callback that was in trainer.train()"
            )
        if self._unsaved:
            raise ValueError(_cannot_export(self._unsaved))
        peft = import_peft()
        adapter = self._targets[0].adapter
        factors = {
            t.name: delta.stack(
                t.factors,
                t.first if t.first is not None else t.factors,
                update_ratio=self.update_ratio,
                scaling=t.scaling,
            )
            for t in self._targets
        }
        replaced = {f"{name}.lora_{leaf}.weight" for name in factors for leaf in "AB"}
        saved = peft.get_peft_model_state_dict(model, adapter_name=adapter)
        missing = replaced - set(saved)
        if missing:
            raise RuntimeError(
                f"PEFT does not save {sorted(missing)[:2]} under these names; this version of peft "
                f"({peft.__version__}) is not supported"
            )
        write_peft_folder(
            folder,
            config=model.peft_config[adapter],  # type: ignore[index]
            factors=factors,
            others={name: t for name, t in saved.items() if name not in replaced},
        )
        return folder

    # ------------------------------------------------------------------ checkpoints

    def _settings(self) -> dict[str, Any]:
        """Return what a resumed run must share with the run that wrote the checkpoint."""
        return {
            "update_ratio": self.update_ratio,
            "start_step": self.start_step,
            "form": self.form,
            "scaling": {target.name: target.scaling for target in self._targets},
            "base_digest": self._base_digest,
        }

    def _save(self, checkpoint: Path, model: nn.Module) -> None:
        tensors: dict[str, Tensor] = {}
        for target in self._targets:
            if self._num_updates > 0:
                assert target.first is not None
                tensors[f"{target.name}.lora_A"], tensors[f"{target.name}.lora_B"] = target.first
            if self.save_weights:
                tensors[f"{target.name}.weight"] = target.weight
        content = {
            "settings": self._settings(),
            "num_steps": self._num_steps,
            "num_updates": self._num_updates,
            "factors_digest": self._factors_digest(),
        }
        export = partial(self.export, model) if self.export_checkpoints else None
        callback_state.write(checkpoint, content, tensors, export=export)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Restore the state from the checkpoint that `Trainer` has loaded the adapter from."""
        loaded = None if self._places is None else self._places.loaded
        if self.resume_from_checkpoint is not None:
            guesses = [expanded(self.resume_from_checkpoint)]
        elif loaded is not None:  # a named adapter lies in a folder of the checkpoint
            guesses = [loaded, loaded.parent]
        else:
            guesses = [Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"]
            if args.resume_from_checkpoint:
                guesses.insert(0, Path(args.resume_from_checkpoint))
        guesses = list(dict.fromkeys(guesses))
        found = [guess for guess in guesses if (guess / FOLDER / STATE).is_file()]
        if not found:
            raise RuntimeError(
                f"training resumes at step {state.global_step}, but there is no {FOLDER}/{STATE} "
                f"in {', '.join(map(str, guesses))}; without A and B from before the first update "
                "W cannot be restored. If the checkpoint lies elsewhere, give its folder to the "
                "callback (resume_from_checkpoint=...); if it was written without the callback or "
                "cut short, resume from another one"
            )
        self._restore(found[0])
        if self._num_steps > state.global_step:
            raise RuntimeError(
                f"{found[0]} has {self._num_steps} steps of Delta-LoRA, but training resumes at "
                f"step {state.global_step}; resume from the checkpoint that belongs to it"
            )

    def _restore(self, checkpoint: Path) -> None:
        """Bring counters, A_k, B_k and W to `checkpoint`, whose A and B the model holds already."""
        content, tensors = callback_state.read(checkpoint)
        settings = json.loads(json.dumps(self._settings()))
        theirs = content["settings"]
        differing = [k for k in {**theirs, **settings} if theirs.get(k) != settings.get(k)]
        if differing == ["base_digest"]:
            raise RuntimeError(
                f"the base weights are not those that the run in {checkpoint} started from; load "
                "the base model afresh (a model that was trained in place has changed weights)"
            )
        if differing:
            changes = "; ".join(
                f"{k}: {theirs.get(k)} then, {settings.get(k)} now"
                for k in differing
                if k != "base_digest"
            )
            raise RuntimeError(
                f"{checkpoint} was written with other settings of Delta-LoRA ({changes}); use the "
                "same settings, or start a new run"
            )
        if content["factors_digest"] != self._factors_digest():
            raise RuntimeError(
                f"A and B of the model are not those of {checkpoint}; give the folder that "
                "Trainer.train resumes from to the callback (resume_from_checkpoint=...)"
            )
        old = [(target, target.first, target.difference) for target in self._targets]
        had_updates = self._num_updates > 0
        self._num_steps = content["num_steps"]
        self._num_updates = content["num_updates"]
        for target, old_first, old_difference in old:
            target.first, target.difference = None, delta.Difference()
            if self._num_updates > 0:
                A_RI, B_OR = target.factors
                first = tensors[f"{target.name}.lora_A"], tensors[f"{target.name}.lora_B"]
                target.first = first[0].to(A_RI), first[1].to(B_OR)
            if self.form == "closed_form":
                target.remove_forward_term()
                if target.first is not None:
                    target.add_forward_term(self.update_ratio)
                continue
            # W = W_0 + lambda s (B A - B_k A_k), from where W stands now
            if had_updates:
                assert old_first is not None
                target.keep(old_difference.new)
                target.add_to_weight(self.update_ratio, old_first)
            if target.first is not None:
                target.keep(target.first)
                target.add_to_weight(self.update_ratio)
            if f"{target.name}.weight" in tensors:
                with torch.no_grad():
                    target.weight.copy_(tensors[f"{target.name}.weight"])
        if self.form == "closed_form":
            forget_compiled_code()

    def _factors_digest(self) -> str:
        return callback_state.digest(
            tensor for target in self._targets for tensor in target.factors
        )


def _cannot_export(names: list[str]) -> str:
    """Return what is wrong with weights that train and that no adapter of PEFT holds."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more} train beside the LoRA, but PEFT saves them in no adapter: "
        "neither a checkpoint nor DeltaLoraCallback.export can hold what they learn; name their "
        "modules in LoraConfig(modules_to_save=[...]), or freeze them: requires_grad_(False)"
    )


def _loss_scale(optimizer: Any) -> float | None:
    """Return the scale of the fp16 loss scaler, or None where there is none."""
    scaler = getattr(optimizer, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def _was_skipped(optimizer: Any, scale_before: float | None) -> bool:
    """Return whether the loss scaler skipped the step.

    A fused optimiser skips inside its kernel, where accelerate's `step_was_skipped` does not see
    it; the scale, which every overflow lowers, tells.
    """
    if getattr(optimizer, "step_was_skipped", False):
        return True
    scale = _loss_scale(optimizer)
    return scale is not None and scale_before is not None and scale < scale_before


def _check_not_sharded(args: TrainingArguments) -> None:
    """Refuse DeepSpeed and FSDP.

    Raises:
        RuntimeError: the training runs under one of them.
    """
    from accelerate.state import AcceleratorState

    shared = AcceleratorState._shared_state
    running = str(getattr(shared.get("distributed_type"), "value", "")).upper()
    for name, is_used in (
        ("DeepSpeed", bool(args.deepspeed) or running == "DEEPSPEED"),
        ("FSDP", bool(args.fsdp) or running == "FSDP"),
    ):
        if is_used:
            raise RuntimeError(
                f"training runs under {name}, which is not supported in either form: it shards A "
                "and B or updates them before on_pre_optimizer_step, so A and B from before the "
                "step are not at hand; train on one device or with DDP (torchrun); where the model "
                'is too large for that, form="closed_form" takes a quantised base'
            )
