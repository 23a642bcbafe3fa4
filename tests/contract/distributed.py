"""A fit and its decoding in one of several processes; `accelerate launch` starts this file.

Argument: the folder to write to. `CASES_OF_RUNS` says what is run, in one process and in several;
test_distributed.py compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from delta_lora import processes
from delta_lora.protocols import Batch, MetricSpec, Scores, Task
from delta_lora.result import FitResult
from delta_lora.trainer import Trainer
from scripts.runs.folder import predict
from tests.contract.models import CASES, LENGTH, NUM_LABELS, VOCABULARY, inject, method_from_config

#: name -> method, its settings, validation examples (8 a batch), rule of the checkpoint.
CASES_OF_RUNS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "full, no validation": ("full", {}, 0, "last"),
    "LoRA, five batches": ("lora_no_dropout", {}, 37, "best"),
    "DyLoRA, one batch": ("dylora", {"dropout": 0.0}, 8, "best"),
    "AdaLoRA, five batches": ("adalora", {"dropout": 0.0}, 37, "best"),
    "Delta-LoRA in place, one batch": ("delta_lora", {}, 5, "best"),
    "Delta-LoRA in closed form, two batches": ("delta_lora", {"form": "closed_form"}, 9, "best"),
}
NUM_PREDICTED = 11


class Sentences(Task):
    """Sequences of one length with a class each; RoBERTa has buffers, which processes may share."""

    name, version = "sentences", 1
    metrics = (MetricSpec("accuracy", "Accuracy"),)
    head = ("classifier",)
    selection_metric = "accuracy"

    def __init__(self, num_validation: int) -> None:
        self.sizes = {"train": 30, "validation": num_validation, "test": NUM_PREDICTED}

    def load(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.rows = {
            split: [
                (torch.randint(3, VOCABULARY, (LENGTH,), generator=draw), i % NUM_LABELS)
                for i in range(size)
            ]
            for split, size in self.sizes.items()
        }

    def provenance(self) -> dict[str, Any]:
        return {}

    def examples(self, split: str, tokenizer: Any = None) -> Sequence[Any]:
        return self.rows[split]

    def collate(self, examples: Sequence[Any]) -> Batch:
        tensors = {
            "input_ids": torch.stack([ids for ids, _ in examples]),
            "labels": torch.tensor([label for _, label in examples]),
        }
        return Batch(tensors, len(examples), LENGTH * len(examples), ["row"] * len(examples))

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        logits = model(input_ids=batch.tensors["input_ids"]).logits
        return F.cross_entropy(logits, batch.tensors["labels"], reduction="sum")

    def inputs(self, split: str = "test") -> Sequence[Any]:
        return self.rows[split]

    @torch.no_grad()
    def predict(
        self,
        model: nn.Module,
        tokenizer: Any,
        split: str = "test",
        done: Iterable[dict[str, Any]] = (),
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[list[dict[str, Any]]]:
        rows, finished = self.rows[split], {p["id"] for p in done}
        for i in range(share[0], len(rows), share[1]):  # a chunk a row
            if f"{i:03d}" not in finished:
                logits = model(input_ids=rows[i][0][None]).logits
                yield [{"id": f"{i:03d}", "prediction": int(logits.argmax())}]

    def score(self, predictions: Sequence[dict[str, Any]], split: str = "test") -> Scores:
        order = sorted(predictions, key=lambda p: p["id"])
        assert len(order) == len(self.rows[split]), "every row once"
        right = [
            p["prediction"] == label for p, (_, label) in zip(order, self.rows[split], strict=True)
        ]
        return Scores({"accuracy": sum(right) / len(right)})


def run(name: str, folder: Path) -> tuple[nn.Module, FitResult, list[dict[str, Any]]]:
    """Make one run of `CASES_OF_RUNS` in `folder`; return model, result and predictions."""
    which, settings, num_validation, rule = CASES_OF_RUNS[name]
    task, case = Sentences(num_validation), CASES["roberta"]
    task.load()
    model = case.model(dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # drawn by every process for itself
    method = method_from_config(which, **settings)
    inject(method, model, case, total_steps=20)

    def score(network: nn.Module) -> dict[str, float]:
        chunks = task.predict(network, None, "validation", share=processes.share())
        own = [prediction for chunk in chunks for prediction in chunk]
        return task.score(processes.gather(own), "validation").values

    result = Trainer(
        batch_size=7, num_epochs=4, weight_decay=0.1, max_grad_norm=0.5, device="cpu",
        num_threads=1, log_every_steps=3, checkpoint_rule=rule, checkpoint_every_steps=4,
    ).fit(
        model, method=method, task=task, train=task.examples("train"),
        validation=task.examples("validation"), seed=1, folder=folder,
        score=score if num_validation else None,
    )  # fmt: skip
    with method.merged(model) as merged:
        predictions = predict(task, merged, None, folder, "test", origin={"run": "toy"})
    return model, result, predictions


def main(out: Path) -> None:
    for number, name in enumerate(CASES_OF_RUNS):
        folder = out / str(number)
        model, result, predictions = run(name, folder)
        assert bool(predictions) == processes.is_main()
        assert result.num_steps == 20
        rank, _ = processes.share()
        tensors = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=True)}
        save_file(tensors, folder / f"rank{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
