"""Add two digits, modulo ten: the last token of `3+9=2` is what is learned."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from delta_lora.checks import check_integer
from delta_lora.protocols import Batch, MetricSpec, Scores, Task
from tasks.language_modeling import TokenSequence, causal_lm_loss, collate
from tasks.predictions import align, own_chunks


class ToyTask(Task):
    """Sums of two digits.

    Args:
        num_train: training sums, at least 1.
    """

    name, version = "toy", 1
    metrics = (MetricSpec("accuracy", "Accuracy", scale=100.0),)
    family = "causal_lm"

    def __init__(self, *, num_train: int = 60) -> None:
        self.num_train = check_integer("task.num_train", num_train, at_least=1)

    def load(self) -> None:
        draw = random.Random(1)
        sizes = {"train": self.num_train, "validation": 10, "test": 10}
        self.sums = {
            split: [(f"{split}-{i}", draw.randrange(10), draw.randrange(10)) for i in range(size)]
            for split, size in sizes.items()
        }

    def provenance(self) -> dict[str, Any]:
        return {"rows": {split: len(sums) for split, sums in self.sums.items()}}

    def examples(self, split: str, tokenizer: Any) -> Sequence[TokenSequence]:
        return [
            TokenSequence(name, tokenizer.encode(f"{a}+{b}={(a + b) % 10}"), num_context=4)
            for name, a, b in self.sums[split]
        ]

    def collate(self, examples: Sequence[TokenSequence]) -> Batch:
        return collate(examples)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        return causal_lm_loss(model, batch, label_smoothing)

    def inputs(self, split: str) -> Sequence[Any]:
        return self.sums[split]

    def predict(
        self,
        model: nn.Module,
        tokenizer: Any,
        split: str,
        done: Iterable[dict[str, Any]] = (),
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[list[dict[str, Any]]]:
        known = {prediction["id"] for prediction in done}
        for name, a, b in own_chunks(self.sums[split], share):
            if name not in known:
                ids = torch.tensor([tokenizer.encode(f"{a}+{b}=")])
                with torch.no_grad():
                    best = model(ids.to(next(model.parameters()).device)).logits[0, -1].argmax()
                yield [{"id": name, "prediction": tokenizer.decode(best)}]

    def score(self, predictions: Sequence[dict[str, Any]], split: str) -> Scores:
        found = align(predictions, [name for name, *_ in self.sums[split]], split)
        right = [
            prediction["prediction"] == str((a + b) % 10)
            for prediction, (_, a, b) in zip(found, self.sums[split], strict=True)
        ]
        return Scores({"accuracy": sum(right) / len(right)})
