"""Loss curves of every method on a small GPT-2, against stored ones.

They catch a change of results that no equivalence test expects. After a wanted change write them
again and say why in the changelog under "Changes results":

    python -m tests.golden.test_trajectories
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from delta_lora.draws import seed_everything
from delta_lora.protocols import Batch, Task
from delta_lora.trainer import Trainer
from scripts.runs.composition import compose, options
from tasks.language_modeling import TokenSequence, causal_lm_loss, collate

CURVES = Path(__file__).with_name("trajectories.json")
#: one curve for the package peft; its other methods have their contract.
METHODS = [name for name in options("method") if "/" not in name]
NUM_STEPS = 8


class CopyTask(Task):
    """Random words, then the same words again: a few steps already lower the loss."""

    name, version, metrics = "copy", 1, ()

    def load(self) -> None:
        draw = np.random.default_rng(11)
        self.sequences = []
        for number in range(12):
            words = draw.integers(1, 60, size=int(draw.integers(4, 9))).tolist()
            self.sequences.append(
                TokenSequence(str(number), [*words, 0, *words, 0], len(words) + 1)
            )

    def provenance(self) -> dict[str, Any]:
        return {}

    def examples(self, split: str, tokenizer: Any = None) -> Sequence[TokenSequence]:
        return self.sequences

    def collate(self, examples: Sequence[TokenSequence]) -> Batch:
        return collate(examples)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        return causal_lm_loss(model, batch, label_smoothing)


def trajectory(name: str, folder: Path) -> list[float]:
    """Return the loss of every step."""
    cfg = compose(
        [f"method={name}", "recipe.start_step=2", "recipe.adalora.interval=1"]
        + [f"recipe.learning_rate.{key}=0.01" for key in compose([]).recipe.learning_rate]
    )
    seed_everything(5)
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(
        GPT2Config(
            **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0
        )
    )
    task, method = CopyTask(), instantiate(cfg.method)
    task.load()
    method.inject(model, projections=None, head=(), total_steps=NUM_STEPS, seed=5)
    trainer = Trainer(
        batch_size=4, max_steps=NUM_STEPS, warmup_steps=1, weight_decay=0.01, label_smoothing=0.1,
        evaluate_every_epochs=None, log_every_steps=1, device="cpu",
    )  # fmt: skip
    trainer.fit(
        model, method=method, task=task, train=task.examples("train"), validation=[], seed=5,
        folder=folder,
    )  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


@pytest.mark.parametrize("name", METHODS)
def test_losses_follow_the_stored_curve(name: str, tmp_path: Path) -> None:
    stored = json.loads(CURVES.read_text())
    assert set(stored) == set(METHODS), "write the curves again"
    assert trajectory(name, tmp_path) == pytest.approx(stored[name], rel=2e-4)


def test_the_curves_differ_between_methods() -> None:
    stored = json.loads(CURVES.read_text())
    last = {name: round(curve[-1], 4) for name, curve in stored.items()}
    same = {"lora", "lora_high_lr"}  # every rate is set to the same value here
    assert len(set(last.values())) == len(last) - len(same) + 1, last


if __name__ == "__main__":
    torch.set_num_threads(1)
    curves = {}
    for method_name in METHODS:
        with tempfile.TemporaryDirectory() as path:
            curves[method_name] = [round(x, 6) for x in trajectory(method_name, Path(path))]
    CURVES.write_text(json.dumps(curves, indent=1) + "\n")
    sys.stdout.write(f"wrote {CURVES}\n")
