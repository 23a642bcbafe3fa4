"""The measurements of the audit that are no ordinary runs: one small record each.

A measurement is named by a hash of its settings and of what it starts from (the pre-trained model,
or a finished run). Its record ``<outputs>/audit/<part>-<hash>.json`` is written whole or not at
all, and asked for again it is not repeated. `measure` is what a worker process calls.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_lora import stored
from delta_lora.writing import make_folder
from scripts.runs import provenance
from scripts.runs.building import base_model, build_tokenizer, load_task
from scripts.runs.composition import ROOT
from scripts.runs.execution import prepare
from scripts.runs.meaning import hash_of
from scripts.runs.run import Run
from scripts.runs.weights import label

RECORD_SCHEMA = 3
KNOWN_SCHEMAS = (2, RECORD_SCHEMA)
#: raised whenever a measurement can give other values from the same settings.
VERSIONS = {"rank": 1, "gradients": 1, "equivalence": 1, "precision": 1, "memory": 1}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One thing to measure.

    Attributes:
        part: a key of `VERSIONS`.
        label: how messages and pages call it.
        settings: JSON values; all that its result depends on but for the start.
        run: the run that it starts from; of one that need not be trained only model and data count.
        needs_run: whether it reads what that run has learned.
        extra: overrides given on top of the audit's, which may change any of it.
    """

    part: str
    label: str
    settings: dict[str, Any]
    run: Run
    needs_run: bool
    extra: tuple[str, ...] = ()

    @property
    def start(self) -> str:
        """What names the run that it starts from, or that run's model and data."""
        if self.needs_run:
            return self.run.name
        return hash_of({key: self.run.meaning[key] for key in ("model", "task")})

    @property
    def signature(self) -> str:
        """Name of its record."""
        signed = {
            "part": self.part,
            "version": VERSIONS[self.part],
            "settings": self.settings,
            "start": self.start,
            **({"extra": list(self.extra)} if self.extra else {}),
        }
        return f"{self.part}-{hash_of(signed)}"

    @property
    def path(self) -> Path:
        """Its record, once it is done."""
        return self.run.outputs / "audit" / f"{self.signature}.json"

    def read(self) -> dict[str, Any] | None:
        """Return the record, or None where there is none; one that is damaged is measured again."""
        advice = "measuring again"
        try:
            record = stored.read_json(self.path, advice)
            stored.check_schema(self.path, record.get("schema"), KNOWN_SCHEMAS)
            stored.check_seal(self.path, record, advice)
            if record.get("signature") != self.signature:
                raise stored.damaged(self.path, "it is of another measurement", advice)
            if not isinstance(record.get("result"), dict):
                raise stored.damaged(self.path, "it has no result", advice)
        except FileNotFoundError:
            return None
        except stored.UnreadableError as error:
            logger.warning("%s", error)
            return None
        return record


def measure(measurement: Measurement) -> dict[str, Any]:
    """Measure and write the record, or return it if it is there.

    Raises:
        ValueError: the settings are not allowed, or the run that it starts from is not finished.
    """
    from delta_lora import checkpoint

    if (known := measurement.read()) is not None:
        return known
    run = measurement.run
    if measurement.needs_run and not run.is_done:
        raise ValueError(f"{measurement.label}: the run {measurement.start} is not finished")
    if measurement.path.is_dir():
        raise ValueError(f"{measurement.path} is a folder instead of a file; remove it")
    record = stored.sealed(
        {
            "schema": RECORD_SCHEMA,
            "signature": measurement.signature,
            "status": "completed",
            "part": measurement.part,
            "label": measurement.label,
            "start": measurement.start,
            "settings": measurement.settings,
            "model": label(run.model_facts),
            "result": MEASURE[measurement.part](run, measurement.settings),
            "provenance": {
                "git": provenance.git_state(ROOT),
                "packages": provenance.packages(),
                "device": provenance.device(_device(run)),
            },
        }
    )
    make_folder(measurement.path.parent)
    checkpoint.write_json(measurement.path, record)
    return record


# ---------------------------------------------------------------------- models and tokens


def _device(run: Run) -> Any:
    """Return the device of a measurement: that of the runs beside it."""
    import torch

    on_cuda = run.config.trainer.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_cuda else "cpu")


class _Base:
    """Model, tokens and projections of a run before any method.

    Args:
        run: what it is of.
        dtype: torch type of the weights.
    """

    def __init__(self, run: Run, dtype: Any = None) -> None:
        from hydra.utils import instantiate

        instantiate(run.config.trainer).prepare_backend()
        prepare([run])
        self.task = load_task(run.config)
        tokenizer = build_tokenizer(run, self.task)
        self._examples = self.task.examples("train", tokenizer)
        model = base_model(run, self.task, self._examples)
        self._model = model if dtype is None else model.to(dtype)
        self._device = _device(run)
        self.projections = run.config.model.projections

    def build(self) -> Any:
        """Return the model anew."""
        return copy.deepcopy(self._model).to(self._device)

    def tokens(self, step: int, batch: int, length: int) -> Any:
        """Return a batch of the training text, cut to windows: (batch, length), by step."""
        import torch

        stream: list[int] = []
        while len(stream) < (step + 1) * batch * length:
            stream += [token for example in self._examples for token in example.tokens]
        window = stream[step * batch * length : (step + 1) * batch * length]
        return torch.tensor(window, device=self._device).view(batch, length)


_BASES: dict[tuple[str, str], _Base] = {}


def _base_of(run: Run, dtype: Any = None) -> _Base:
    """Return the base of a run; one process reads the same one once."""
    key = (hash_of(run.meaning["model"]) + hash_of(run.meaning["task"]), str(dtype))
    if key not in _BASES:
        _BASES[key] = _Base(run, dtype)
    return _BASES[key]


def _next_token_loss(batch: int, length: int, base: _Base) -> Callable[[Any, int], Any]:
    from delta_lora.analysis import gradients

    batches: dict[int, Any] = {}

    def loss(model: Any, step: int) -> Any:
        if step not in batches:
            batches[step] = base.tokens(step, batch, length)
        tokens = batches[step]
        logits = model(input_ids=tokens, use_cache=False).logits
        return gradients.cross_entropy(logits, logits, tokens)

    return loss


def _trained(run: Run, base: _Base, **changes: Any) -> tuple[Any, Any]:
    """Return method and model with what the finished run has learned."""
    from hydra.utils import instantiate

    from delta_lora import checkpoint
    from scripts.runs.folder import read_adapter

    method, model = instantiate(run.config.method, **changes), base.build()
    method.inject(
        model,
        projections=run.config.model.projections,
        head=base.task.head,
        total_steps=max(1, run.record()["training"]["steps"]),
        seed=run.config.seed,
    )
    dtype = next(model.parameters()).dtype
    learned = {name: t.to(dtype) for name, t in read_adapter(run.folder).items()}
    checkpoint.restore_weights(model, learned)
    return method, model


# ---------------------------------------------------------------------- what is measured


def _rank(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    from delta_lora.analysis import rank, similarity

    base = _base_of(run)
    originals = similarity.snapshot(
        base.build(), run.config.model.projections, exclude=base.task.head
    )
    method, model = _trained(run, base)
    with method.merged(model) as merged:
        found = rank.spectra(originals, merged)
    return {
        "method_rank": run.config.recipe.get("rank"),
        "projections": {
            name: {
                "rank": one.rank,
                "tolerance": one.tolerance,
                "singular_values": list(one.singular_values),
            }
            for name, one in found.items()
        },
    }


def _gradients(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from delta_lora.analysis import gradients

    base = _base_of(run, torch.float64)
    tokens = base.tokens(0, settings["batch"], settings["length"])
    loss = gradients.LOSSES[settings["loss"]]
    result = {}
    for dropout in settings["dropouts"]:
        _, model = _trained(run, base, dropout=dropout)
        model.train()

        def forward(model: Any = model) -> Any:
            out = model(input_ids=tokens, use_cache=False, output_hidden_states=True)
            return loss(out.logits, out.hidden_states[-1], tokens)

        masks = []
        for mask in range(settings["num_masks"] if dropout > 0 else 1):
            torch.manual_seed(mask)
            gaps = gradients.gradient_gaps(model, forward)
            masks.append({"mean": sum(gaps.values()) / len(gaps), "max": max(gaps.values())})
        result[f"{dropout:g}"] = masks
    return {"gaps": result}


def _equivalence(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from delta_lora.analysis import equivalence

    base = _base_of(run, torch.float64)
    keys = (
        "steps", "rank", "alpha", "update_ratio", "start_step", "optimizer", "learning_rate",
        "options", "learning_rate_factor", "max_grad_norm",
    )  # fmt: skip
    found = equivalence.compare(
        base.build,
        _next_token_loss(settings["batch"], settings["length"], base),
        projections=base.projections,
        head=tuple(settings["head"]),
        seed=settings["seed"],
        **{key: settings[key] for key in keys},
    )
    return dict(vars(found))


def _precision(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from delta_lora.analysis import precision

    base = _base_of(run)
    keys = (
        "form", "steps", "every", "rank", "alpha", "learning_rate", "update_ratio", "start_step"
    )  # fmt: skip
    errors = precision.change_errors(
        base.build,
        _next_token_loss(settings["batch"], settings["length"], base),
        make_optimizer=lambda groups: torch.optim.AdamW(
            groups,
            betas=(run.config.trainer.adam_beta1, run.config.trainer.adam_beta2),
            eps=run.config.trainer.adam_epsilon,
            weight_decay=run.config.trainer.weight_decay,
        ),
        projections=base.projections,
        seed=settings["seed"],
        **{key: settings[key] for key in keys},
    )
    weights = [w for n, w in base.build().named_parameters() if "attn" in n and w.dim() == 2]
    size = torch.cat([w.detach().flatten() for w in weights]).square().mean().sqrt()
    return {"errors": [list(pair) for pair in errors], "weight_rms": float(size)}


def _memory(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    from hydra.utils import instantiate

    from delta_lora.analysis import memory_model

    base = _base_of(run)
    rank = settings["rank"]
    grid = []
    for batch in settings["batches"]:
        for length in settings["lengths"]:
            model, method = base.build(), instantiate(run.config.method)
            method.inject(model, projections=base.projections, head=(), total_steps=10, seed=1)
            model.train()
            tokens = base.tokens(0, batch, length)
            parameters = [p for p in model.parameters() if p.requires_grad]
            if settings["optimizer"] == "sgd":
                optimizer: Any = torch.optim.SGD(parameters, lr=1e-3)
            else:
                optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
            measured = memory_model.measure_step(
                model, method, optimizer, _memory_loss(model, tokens)
            )
            architecture = model.config
            shape = memory_model.Shape(
                width=architecture.n_embd,
                num_layers=architecture.n_layer,
                num_heads=architecture.n_head,
                vocabulary=architecture.vocab_size,
                num_positions=architecture.n_positions,
                batch=batch,
                length=length,
            )
            is_low_rank = settings["kind"] == "low_rank"
            adaptation = memory_model.Adaptation(
                kind=settings["kind"],
                rank=rank if is_low_rank else 0,
                forward_rank=rank * settings["forward_rank"] if is_low_rank else 0,
                extra_per_branch=rank * settings["extra_per_branch"],
                kept_factors=settings["kept_factors"],
                dropout=settings["dropout"],
                states=0 if settings["optimizer"] == "sgd" else 2,
                mask_bytes=1 if tokens.is_cuda else 4,
            )
            expected = memory_model.expected_memory(shape, adaptation)
            grid.append(
                {"batch": batch, "length": length, "measured": measured, "expected": expected}
            )
    return {"grid": grid}


def _memory_loss(model: Any, tokens: Any) -> Callable[[], Any]:
    from delta_lora.analysis import gradients

    def loss() -> Any:
        logits = model(input_ids=tokens, use_cache=False).logits
        return gradients.cross_entropy(logits, logits, tokens)

    return loss


MEASURE: dict[str, Callable[[Run, Mapping[str, Any]], dict[str, Any]]] = {
    "rank": _rank,
    "gradients": _gradients,
    "equivalence": _equivalence,
    "precision": _precision,
    "memory": _memory,
}
