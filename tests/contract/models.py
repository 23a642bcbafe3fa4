"""Tiny models of every supported family, built from configurations, with random weights.

A `Case` is a model, an input and a loss: what a method needs to train a few steps without a task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

import scripts.runs.composition  # noqa: F401  registers the resolver that lora_scaled uses
from delta_lora.protocols import Method

CONFIGS = Path(__file__).parents[2] / "configs"
#: our own methods; those of the package peft have their own contract (test_peft_rows.py).
METHODS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml") if p.stem != "peft")
#: the keys of configs/recipe that methods read, at a size where every mechanism runs in few steps.
RECIPE = {
    "rank": 2,
    "alpha": 3,
    "lora_dropout": 0.1,
    "update_ratio": 0.5,
    "start_step": 1,
    "learning_rate": {
        "low_rank": 1e-2,
        "lora_high": 3e-2,
        "dylora": 1e-2,
        "adalora": 1e-2,
        "full": 1e-3,
        "full_frozen_embeddings": 1e-3,
        "full_query_value": 1e-3,
    },
    "dylora": {"update": "frozen"},
    "adalora": {
        "init_rank": 3,
        "target_rank": 1,
        "orth_reg_weight": 0.1,
        "beta1": 0.85,
        "beta2": 0.85,
        "initial_fraction": 0.1,
        "final_fraction": 0.3,
        "interval": 2,
    },
}

VOCABULARY = 29
BATCH = 4
LENGTH = 6
NUM_LABELS = 3
WIDTH = 16

SPECIAL = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


class TinyMlp(nn.Module):
    """Any module with linear layers: adapted by explicit names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, WIDTH))
        self.classifier = nn.Linear(WIDTH, NUM_LABELS)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.classifier(self.layers(self.embed(input_ids)).mean(dim=1))


@dataclass(frozen=True)
class Case:
    """A tiny model and how to run it.

    Attributes:
        build: returns a new model.
        projections: patterns for `inject`; None for structure.
        head: names of head modules for `inject`.
        names: projection names that must be found.
    """

    build: Callable[[], nn.Module]
    projections: tuple[str, ...] | None
    head: tuple[str, ...]
    names: tuple[str, ...]

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model with weights drawn from `seed`, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zero biases would hide mistakes
                    nn.init.normal_(parameter, std=0.1)
        return model.to(dtype).eval()


def _encoder(model: type, config: type, **extra: Any) -> Callable[[], nn.Module]:
    return lambda: model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=LENGTH + 4,
            num_labels=NUM_LABELS,
            pad_token_id=1,
            **extra,
        )
    )


def gpt2(**extra: Any) -> nn.Module:
    """Build a GPT-2 with a fused Conv1D and tied embeddings."""
    values = {"n_layer": 2, "n_head": 2, "n_embd": WIDTH, "n_positions": LENGTH + 2} | extra
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCABULARY, **SPECIAL, **values))


def bart(**extra: Any) -> nn.Module:
    """Build a BART with encoder, decoder and cross attention and tied embeddings."""
    values = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "d_model": WIDTH,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": LENGTH + 4,
    } | extra
    config = tf.BartConfig(vocab_size=VOCABULARY, decoder_start_token_id=2, **SPECIAL, **values)
    return tf.BartForConditionalGeneration(config)


def llama() -> nn.Module:
    """Build a Llama with two query heads to a key and value head."""
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            **SPECIAL,
        )
    )


def vit() -> nn.Module:
    """Build a ViT for 8 x 8 images."""
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=NUM_LABELS,
        )
    )


def _pair(prefix: str, numbers: range, leaves: tuple[str, str]) -> tuple[str, ...]:
    roles = ("query", "value")
    return tuple(
        f"{prefix.format(i)}.{leaf}.{role}"
        for i in numbers
        for leaf, role in zip(leaves, roles, strict=True)
    )


CASES = {
    "mlp": Case(
        TinyMlp,
        ("layers.0", "layers.2"),
        ("classifier",),
        ("layers.0.output", "layers.2.output"),
    ),
    "roberta": Case(
        _encoder(tf.RobertaForSequenceClassification, tf.RobertaConfig),
        None,
        ("classifier",),
        _pair("roberta.encoder.layer.{}.attention.self", range(1), ("query", "value")),
    ),
    "bert": Case(
        _encoder(tf.BertForSequenceClassification, tf.BertConfig),
        None,
        ("classifier",),
        _pair("bert.encoder.layer.{}.attention.self", range(1), ("query", "value")),
    ),
    "gpt2": Case(
        gpt2,
        None,
        (),
        tuple(f"transformer.h.{i}.attn.c_attn.{r}" for i in range(2) for r in ("query", "value")),
    ),
    "bart": Case(
        bart,
        None,
        (),
        tuple(
            f"model.{block}.{leaf}_proj.{role}"
            for block in (
                "encoder.layers.0.self_attn",
                "decoder.layers.0.self_attn",
                "decoder.layers.0.encoder_attn",
            )
            for leaf, role in (("v", "value"), ("q", "query"))
        ),
    ),
    "llama": Case(
        llama, None, (), _pair("model.layers.{}.self_attn", range(1), ("q_proj", "v_proj"))
    ),
    "vit": Case(
        vit,
        None,
        ("classifier",),
        _pair("vit.layers.{}.attention", range(1), ("q_proj", "v_proj")),
    ),
}


def method_from_config(name: str, recipe: Any = None, **overrides: Any) -> Method:
    """Return the method of ``configs/method/<name>.yaml`` with the values of `recipe`."""
    config = OmegaConf.create(
        {
            "recipe": RECIPE if recipe is None else recipe,
            "method": OmegaConf.load(CONFIGS / "method" / f"{name}.yaml"),
        }
    )
    return instantiate(config.method, **overrides)


def inject(method: Method, model: nn.Module, case: Case, *, total_steps: int = 10, seed: int = 3):
    """Inject `method` as a run on `case` does; return the model."""
    method.inject(
        model, projections=case.projections, head=case.head, total_steps=total_steps, seed=seed
    )
    return model


def inputs(model: nn.Module, step: int = 0, batch: int = BATCH) -> dict[str, Tensor]:
    """Return input and labels for `model`; the same for the same `step`."""
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(NUM_LABELS, (batch,), generator=generator)
    if isinstance(model, tf.ViTForImageClassification):
        pixels = torch.randn(batch, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels.to(next(model.parameters()).dtype), "labels": labels}
    ids = torch.randint(3, VOCABULARY, (batch, LENGTH), generator=generator)
    if isinstance(model, tf.RobertaForSequenceClassification | tf.BertForSequenceClassification):
        return {"input_ids": ids, "labels": labels}
    return {"input_ids": ids, "labels": labels if isinstance(model, TinyMlp) else ids}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of `model` on `batch`."""
    if isinstance(model, TinyMlp):
        return model(batch["input_ids"])
    return model(**batch).logits


def loss_of(model: nn.Module, scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of logits; in their type, where transformers' is float32 always."""
    if isinstance(model, tf.GPT2LMHeadModel | tf.LlamaForCausalLM):
        scores, labels = scores[:, :-1], labels[:, 1:]
    return F.cross_entropy(scores.flatten(0, -2), labels.flatten())


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of `model` on `batch`."""
    return loss_of(model, logits(model, batch), batch["labels"])


def adamw(method: Method, model: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """Return AdamW over the groups of `method`, as the trainer builds it."""
    groups = [
        {"params": [p for _, p in group["params"]], "lr": group["lr"]}
        for group in method.param_groups(model)
    ]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def train(
    method: Method,
    model: nn.Module,
    num_steps: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    first_step: int = 0,
    num_micro: int = 1,
    weight_decay: float = 0.1,
) -> Iterator[int]:
    """Train in the order of calls that `Method` promises; yield after every step.

    The model is in training mode and every micro-batch has its own seed, so dropout repeats. At a
    yield the optimiser and `after_step` have run and the gradients are still there.
    """
    model.train()
    optimizer = optimizer or adamw(method, model, weight_decay)
    for step in range(first_step, first_step + num_steps):
        optimizer.zero_grad()
        batch = inputs(model, step)
        for micro_step in range(num_micro):
            torch.manual_seed(100 * step + micro_step)
            method.before_micro_batch(step, micro_step)
            part = {k: v[micro_step::num_micro].contiguous() for k, v in batch.items()}
            total = loss(model, part) / num_micro
            extra = method.extra_loss() if micro_step == num_micro - 1 else None
            (total if extra is None else total + extra).backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        yield step
