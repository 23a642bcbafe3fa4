"""Checks 2 and 3: the device computes what a CPU computes, and packed sequences stay apart."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from delta_lora.low_rank import LowRankLinear, weight_slice
from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.protocols import Method
from delta_lora.trainer import Trainer
from scripts.checking import lengths, models, synthetic
from scripts.checking.finding import Context, Finding
from scripts.checking.steps import LAUNCHES, watch

MODELS = ("gpt2_medium", "roberta_base", "bart_large")
STEPS = 20
#: K of Delta-LoRA here, so that plain steps, the kept factors and updates all occur.
START_STEP = 5
#: At the recipes' 1e-8 Adam turns a gradient that is only rounding (of a key's bias, which softmax
#: ignores) into a full step, and two devices would differ by a learning rate.
ADAM_EPSILON = 1e-3
RATE = 2e-2
PACKED_TOKENS = 480
#: what of a kernel's or an operator's name says that it is attention.
ATTENTION_NAMES = ("attention", "fmha", "flash", "sdpa")


@dataclass
class Trained:
    """A model behind `STEPS` steps.

    Attributes:
        merged: merged weights by name, float64 on the CPU.
        moved: how far training took them, measured as a difference of two runs is.
        frozen_are_equal: whether what the method does not change kept its bits.
        telescoping: largest difference of W from ``W_0 + lambda s (B A - B_k A_k)``, relative to
            the largest entry of W; None for other methods.
        loss: of the last step, summed over its targets.
    """

    merged: dict[str, Tensor]
    moved: float
    frozen_are_equal: bool
    telescoping: float | None
    loss: float


def golden(context: Context) -> Finding:
    """Train every method on every family, in float32 on the device and in float64 on the CPU."""
    finding = Finding()
    differences: dict[str, float] = {}
    moved: dict[str, float] = {}
    telescoping: dict[str, float] = {}
    thawed: list[str] = []
    for model in MODELS:
        for name in models.METHODS:
            key = f"{model}/{name}"
            reference = _train(context, model, name, "cpu", torch.float64)
            trained = _train(context, model, name, context.device, torch.float32)
            differences[key] = _difference(trained.merged, reference.merged)
            moved[key] = trained.moved
            if trained.telescoping is not None:
                telescoping[key] = trained.telescoping
            if not trained.frozen_are_equal:
                thawed.append(key)
            context.say(
                f"{key}: difference {differences[key]:.1e}, moved {moved[key]:.1e}, loss "
                f"{trained.loss:.6f} (reference {reference.loss:.6f})"
            )
    finding.values = {
        "steps": STEPS, "reference": "float64 on the CPU", "merged_difference": differences,
        "moved": moved, "telescoping_difference": telescoping, "frozen_changed": thawed,
    }  # fmt: skip
    finding.at_most("merged_difference", max(differences.values()), 1e-4)
    finding.at_least("moved", min(moved.values()), 5e-3)  # else equal weights would say little
    finding.at_most("telescoping", max(telescoping.values()), 1e-5)
    finding.equal("frozen_changed", len(thawed), 0)
    return finding


def _train(
    context: Context, model_name: str, method_name: str, device: str, dtype: torch.dtype
) -> Trained:
    """Take `STEPS` steps without dropout; weights, batches and rates are those of every call."""
    model = models.build(
        model_name, "cpu", layers=2 if context.is_small else 4, small=True, dropout=0.0
    )
    _randomise_biases(model)
    start = _weights(model)
    model = model.to(dtype)
    method = models.make_method(
        method_name, model_name, lora_dropout=0.0, start_step=START_STEP,
        learning_rate=dict.fromkeys(("low_rank", "dylora", "adalora", "full"), RATE),
        adalora={
            "init_rank": 4, "target_rank": 2, "orth_reg_weight": 0.1, "initial_fraction": 0.1,
            "final_fraction": 0.3, "interval": 2,
        },
    )  # fmt: skip
    method.inject(model, projections=None, head=models.head(model_name), total_steps=STEPS, seed=1)
    model.to(device).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = _keep_factors(model, method)
    settings = Trainer(batch_size=1, device=device, adam_epsilon=ADAM_EPSILON)
    settings.prepare_backend()
    loss = _steps(model, method, model_name, settings.build_optimizer(model, method), device)
    changed = set(method.updated_tensors(model))
    frozen_are_equal = all(
        torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in changed
    )
    telescoping = None
    if isinstance(method, DeltaLora) and method.form == "in_place":
        telescoping, slices_only = _telescoping(model, method, before, kept)
        frozen_are_equal = frozen_are_equal and slices_only
    with torch.no_grad(), method.merged(model) as merged:
        weights = _weights(merged)
    return Trained(weights, _difference(weights, start), frozen_are_equal, telescoping, loss)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().double().clone() for name, p in model.named_parameters()}


def _steps(
    model: nn.Module, method: Method, model_name: str, optimizer: torch.optim.Optimizer, device: str
) -> float:
    """Take the steps; one batch of four examples each, a new one every time."""
    task = synthetic.task(model_name)
    loss = torch.zeros(())
    for step in range(STEPS):
        batch = task.collate([_examples(model_name, step)]).to(device)
        method.before_micro_batch(step, 0)
        loss = task.loss(model, batch) / batch.num_targets
        extra = method.extra_loss()
        (loss if extra is None else loss + extra).backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    return float(loss.detach())


def _examples(model_name: str, seed: int) -> list[Any]:
    if model_name == "gpt2_medium":
        return list(synthetic.sequences(4, 160, seed))
    if model_name == "bart_large":
        return list(synthetic.pairs(4, 24, 12, 160, seed))
    return list(synthetic.labelled(4, 20, 160, seed))


@torch.no_grad()
def _randomise_biases(model: nn.Module) -> None:
    """Zero biases would hide mistakes, and have no size to compare a difference with."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1, generator=generator)


def _keep_factors(model: nn.Module, method: Method) -> dict[str, tuple[Tensor, Tensor]]:
    """Keep A and B of every branch as they are in front of the first update of W."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def before(step: int) -> None:
        if step == START_STEP + 1:
            for name, layer in _layers(model).items():
                for branch in layer.branches:
                    key = f"{name}.{branch.projection.role}"
                    kept[key] = (branch.lora_A.detach().clone(), branch.lora_B.detach().clone())

    watch(method, before=before)
    return kept


@torch.no_grad()
def _telescoping(
    model: nn.Module,
    method: DeltaLora,
    before: dict[str, Tensor],
    kept: dict[str, tuple[Tensor, Tensor]],
) -> tuple[float, bool]:
    """Return the largest relative difference, and whether the rest of every layer kept its bits."""
    worst, slices_only = 0.0, True
    for name, layer in _layers(model).items():
        first = before[f"{name}.base_layer.weight"]
        rest = layer.weight.detach().clone()
        for branch in layer.branches:
            p = branch.projection
            A_k, B_k = (factor.double() for factor in kept[f"{name}.{p.role}"])
            delta = branch.lora_B.double() @ branch.lora_A.double() - B_k @ A_k
            delta = delta.T if p.is_transposed else delta
            W_0 = weight_slice(first, p)
            expected = W_0.double() + method.update_ratio * branch.scaling * delta
            difference = (weight_slice(layer.weight, p).double() - expected).abs().max()
            worst = max(worst, float(difference / expected.abs().max()))
            weight_slice(rest, p).copy_(W_0)
        slices_only = slices_only and torch.equal(rest, first)
    return worst, slices_only


def _layers(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


def _difference(weights: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Return the largest difference of an entry, relative to the largest entry of its tensor."""
    if weights.keys() != reference.keys():
        raise RuntimeError(f"other weights: {sorted(weights.keys() ^ reference.keys())[:5]}")
    return max(
        float((weights[name] - reference[name]).abs().max() / reference[name].abs().max())
        for name in weights
    )


def packed(context: Context) -> Finding:
    """Compare the logits of packed sequences with those of each sequence alone."""
    Trainer(batch_size=1, device=context.device).prepare_backend()
    size: dict[str, Any] = {"layers": 2, "small": True} if context.is_small else {"layers": 4}
    model = models.build("gpt2_medium", context.device, **size).eval()
    draw = random.Random(3)  # noqa: S311 - no secret
    rows = [
        [draw.randrange(model.config.vocab_size) for _ in range(length)]
        for length in lengths.fill(PACKED_TOKENS, lengths.draw(20, seed=3))
    ]
    finding = Finding(values={"lengths": [len(row) for row in rows]})
    alone, noise = _alone(model, rows, torch.float32), 0.0
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-3)):
        name = str(dtype).removeprefix("torch.")
        each = alone if dtype == torch.float32 else _alone(model, rows, dtype)
        together = _packed_logits(model, rows, dtype)
        noise = _relative(each, alone)
        difference = _relative(together, each)
        others = [rows[0], *([(t + 1) % model.config.vocab_size for t in row] for row in rows[1:])]
        first = slice(0, len(rows[0]))
        leak = float((_packed_logits(model, others, dtype)[first] - together[first]).abs().max())
        finding.values[name] = {
            "difference": difference, "difference_of_the_type": noise, "leak": leak,
            "attention": _attention_kernels(context, model, rows, dtype),
        }  # fmt: skip
        # Half precision cannot be nearer to itself than to float32, from which it differs anyway.
        finding.at_most(f"{name}_difference", difference, max(limit, 1.5 * noise))
        finding.at_most(f"{name}_leak", leak, 0.0)
    return finding


def _packed_logits(model: Any, rows: list[list[int]], dtype: torch.dtype) -> Tensor:
    """Return the logits of one packed row, (T, V), float32."""
    device = next(model.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits: Tensor = model(
            input_ids=torch.tensor([[token for row in rows for token in row]], device=device),
            position_ids=torch.tensor([_positions(rows)], device=device),
            use_cache=False,
        ).logits[0]
    return logits.float()


def _positions(rows: list[list[int]]) -> list[int]:
    """Return positions that restart with every sequence, by which they are told apart."""
    return [position for row in rows for position in range(len(row))]


def _alone(model: Any, rows: list[list[int]], dtype: torch.dtype) -> Tensor:
    return torch.cat([_packed_logits(model, [row], dtype) for row in rows])


def _relative(values: Tensor, reference: Tensor) -> float:
    return float((values - reference).norm() / reference.norm())


def _attention_kernels(
    context: Context, model: Any, rows: list[list[int]], dtype: torch.dtype
) -> list[str]:
    """Return the operators and kernels that computed attention."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * context.is_cuda
    with profile(activities=activities) as profiler:
        _packed_logits(model, rows, dtype)
    names = {event.key for event in profiler.key_averages() if not event.key.startswith(LAUNCHES)}
    return sorted(n[:120] for n in names if any(part in n.lower() for part in ATTENTION_NAMES))
