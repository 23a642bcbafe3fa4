"""A task and two methods of a few lines, for tests of the loop alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.protocols import Batch, Method, Task


class ToyTask(Task):
    """Regression on fixed random data; every example has its own number of targets."""

    name, version, metrics = "toy", 1, ()

    def load(self) -> None:
        draw = torch.Generator().manual_seed(7)
        self.x = torch.randn(40, 6, generator=draw)
        self.y = torch.randn(40, 3, generator=draw)

    def provenance(self) -> dict[str, Any]:
        return {"source": "toy"}

    def examples(self, split: str, tokenizer: Any = None) -> Sequence[int]:
        return list(range(32)) if split == "train" else list(range(32, 40))

    def collate(self, examples: Sequence[int]) -> Batch:
        weights = torch.tensor([1 + i % 3 for i in examples])
        tensors = {"x": self.x[list(examples)], "y": self.y[list(examples)], "w": weights}
        ids = [f"toy-{i}" for i in examples]
        return Batch(tensors, int(weights.sum()), 6 * len(examples), ids)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        t = batch.tensors
        error = F.mse_loss(model(t["x"]).float(), t["y"], reduction="none").sum(1)
        return (error * t["w"]).sum()


class ToyMethod(Method):
    """Trains everything and counts its hooks; the count is state that a checkpoint must keep."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.num_after = 0

    def inject(self, model: nn.Module, **_: Any) -> None:
        model.requires_grad_(True)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(model.named_parameters()), "lr": 0.02}]

    def before_micro_batch(self, step: int, micro_step: int) -> None:
        self.calls.append(("micro", step))

    def before_step(self, step: int) -> None:
        self.calls.append(("before", step))

    def after_step(self, step: int) -> None:
        self.calls.append(("after", step))
        self.num_after += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"num_after": torch.tensor(self.num_after)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.num_after = int(state["num_after"])


def toy_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 3))
