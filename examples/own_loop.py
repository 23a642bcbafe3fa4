"""Delta-LoRA in a training loop of your own: attach, two calls a step, save, load, export.

    python examples/own_loop.py                     # no download, seconds
    python examples/own_loop.py --method adalora    # another method, the same loop

The model is a plain `nn.Module` that has learned sin(x) and is adapted to sin(x + 1). For a model
of transformers leave `projections` out: W_Q and W_V of every attention block are found.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import delta_lora
from delta_lora import export


def batch(step: int, shift: float) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (128, 1) each; the same for the same `step`."""
    draw = torch.Generator().manual_seed(step)
    x = (2 * torch.rand(128, 1, generator=draw) - 1) * math.pi
    return x, torch.sin(x + shift)


def make_base() -> nn.Module:
    """Return a network that has learned sin(x)."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(400):
        x, y = batch(step, shift=0.0)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def error(model: nn.Module) -> float:
    """Return the mean squared error on new inputs."""
    x, y = batch(10**6, shift=1.0)
    return float(F.mse_loss(model(x), y))


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="delta_lora", help="any of delta_lora/methods but peft")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("outputs/own_loop"))
    args = parser.parse_args()

    base = make_base()
    model = copy.deepcopy(base)
    print(f"error before: {error(model):.6f}")

    # What is left out has a default; only Delta-LoRA's fit longer trainings than this one. W is not
    # written; with form="in_place" Delta-LoRA writes it as the paper prints, in float32.
    is_delta = args.method == "delta_lora"
    settings = {"rank": 4, "alpha": 8, "update_ratio": 0.5, "start_step": 20} if is_delta else {}
    adapter = delta_lora.attach(
        model,
        method=args.method,
        projections=["2"],
        total_steps=args.steps,
        learning_rate=1e-2,
        **settings,
    )
    adapter.print_trainable_parameters()
    optimizer = torch.optim.AdamW(adapter.param_groups())

    model.train()
    for step in range(args.steps):
        x, y = batch(step, shift=1.0)
        loss = F.mse_loss(model(x), y)
        if (extra := adapter.extra_loss()) is not None:  # AdaLoRA's; None with the others
            loss = loss + extra
        loss.backward()
        adapter.before_step()  # gradients are there, the optimiser has not run
        optimizer.step()
        adapter.after_step()  # Delta-LoRA's branch takes the update of W here
        optimizer.zero_grad()
    model.eval()
    print(f"error after:  {error(model):.6f} ({adapter.method.describe()})")

    # A folder with everything that changed. A model of transformers is found again by itself; any
    # other module is built by you and given as base.
    folder = adapter.save(args.output / "adapter")
    loaded = delta_lora.load(folder, base=copy.deepcopy(base))
    print(f"error of the saved adapter, loaded again: {error(loaded.model):.6f}")

    try:
        done = export.export_peft(folder, args.output / "peft", base=base)
    except (ImportError, ValueError) as reason:  # no PEFT here; full fine-tuning is no LoRA
        print(reason)
    else:
        print(f"a plain LoRA for PEFT, ranks {sorted(set(done.ranks.values()))}: {done.folder}")


if __name__ == "__main__":
    main()
