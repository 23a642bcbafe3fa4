"""A PEFT LoRA under transformers.Trainer beside our own run: what the tests of both share."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from delta_lora.draws import step_indices
from delta_lora.integrations import DeltaLoraCallback
from delta_lora.methods.delta_lora import DeltaLora
from delta_lora.protocols import Batch, Task
from delta_lora.trainer import Trainer

F64 = torch.float64
RATIO, RANK, ALPHA, LR, DECAY, CLIP = 0.5, 2, 3, 1e-2, 0.1, 0.5
NUM_STEPS, BATCH, WARMUP, SEED = 100, 4, 10, 3
VOCABULARY, LENGTH, NUM_LABELS = 29, 6, 3
SCALING = ALPHA / RANK
#: float64 rounding: 8e-16 was measured; Adam, which divides gradients by themselves, may enlarge
#: it elsewhere.
TOLERANCE = 1e-12
both_forms = pytest.mark.parametrize("form", ["in_place", "closed_form"])


def roberta(dtype=F64, layers=2):
    """Build a RoBERTa classifier without dropout; the same weights in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.RobertaForSequenceClassification(
            tf.RobertaConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers,
                num_attention_heads=2, intermediate_size=24, max_position_embeddings=LENGTH + 4,
                num_labels=NUM_LABELS, pad_token_id=1, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, initializer_range=0.2,
            )
        )  # fmt: skip
    return model.to(dtype)


def examples(num_examples=NUM_STEPS * BATCH):
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (num_examples, LENGTH), generator=draw)
    return [{"input_ids": x, "labels": (x[0] + x[3]) % NUM_LABELS} for x in ids]


class Classification(Task):
    """The examples as a task of our own trainer."""

    name, version, metrics = "toy", 1, ()

    def load(self):
        pass

    def provenance(self):
        return {}

    def examples(self, split, tokenizer):
        return examples()

    def collate(self, rows):
        tensors = {k: torch.stack([row[k] for row in rows]) for k in ("input_ids", "labels")}
        return Batch(tensors, len(rows), 1, [])

    def loss(self, model, batch, label_smoothing=0.0):
        logits = model(input_ids=batch.tensors["input_ids"]).logits
        return F.cross_entropy(logits, batch.tensors["labels"], reduction="sum")


def run_ours(folder, *, K, num_steps=NUM_STEPS, num_micro=1, ratio=RATIO):
    """Train with our trainer; return (factors at the start, final tensors by PEFT's names)."""
    model = roberta()
    method = DeltaLora(
        rank=RANK, alpha=ALPHA, learning_rate=LR, update_ratio=ratio, start_step=K, form="in_place"
    )
    method.inject(model, projections=None, head=["classifier"], total_steps=num_steps, seed=SEED)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    Trainer(
        batch_size=BATCH, micro_batch_size=BATCH // num_micro, max_steps=num_steps,
        warmup_steps=WARMUP, weight_decay=DECAY, no_decay=("bias",), max_grad_norm=CLIP,
        evaluate_every_epochs=None, device="cpu",
    ).fit(
        model, method=method, task=Classification(), train=examples(), validation=[], seed=SEED,
        folder=folder / "ours",
    )  # fmt: skip
    with method.merged(model):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    final = {n: p.detach().clone() for n, p in model.named_parameters()}
    return start, final | weights


def lora_model(start=None, model=None, **values):
    """Wrap the classifier by PEFT, with the factors of `start` (our names)."""
    defaults = {
        "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
    }  # fmt: skip
    config = peft.LoraConfig(**(defaults | values))
    model = peft.get_peft_model(roberta() if model is None else model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if start is not None and "lora_" in name:
                parameter.copy_(start[our_name(name)])
    return model


def our_name(theirs):
    layer, _, leaf = theirs.removeprefix("base_model.model.").rpartition(".lora_")
    return f"{layer}.{layer.rpartition('.')[2]}.lora_{leaf[0]}"


class Sequential(tf.Trainer):
    """Gives the examples in their order, without shuffling."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def sum_over_batch(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class Kill(tf.TrainerCallback):
    """Ends the process' training as an exception after some step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_of(
    folder,
    model,
    callback,
    *,
    num_steps=NUM_STEPS,
    num_micro=1,
    more=(),
    eval_dataset=None,
    kind=Sequential,
    **values,
):
    """Return a transformers.Trainer with the settings and the data order of `run_ours`."""
    rows = examples()
    order = [i for step in range(num_steps) for i in step_indices(len(rows), BATCH, SEED, step)]
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        **({
            "per_device_train_batch_size": BATCH // num_micro,
            "gradient_accumulation_steps": num_micro, "max_steps": num_steps, "learning_rate": LR,
            "weight_decay": DECAY, "warmup_steps": WARMUP, "lr_scheduler_type": "linear",
            "max_grad_norm": CLIP, "optim": "adamw_torch_fused", "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": SEED,
            "logging_strategy": "no", "remove_unused_columns": False,
        } | values),
    )  # fmt: skip
    return kind(
        model,
        arguments,
        train_dataset=[rows[i] for i in order],
        eval_dataset=eval_dataset,
        compute_loss_func=sum_over_batch,
        callbacks=[callback, *more],
    )


def delta(**values):
    return DeltaLoraCallback(**({"update_ratio": RATIO, "start_step": 1} | values))


def trained(tmp_path, form="closed_form", dtype=torch.float32, num_steps=12, **values):
    torch.manual_seed(2)
    model = lora_model(model=roberta(dtype), **values)
    callback = delta(form=form)
    trainer_of(tmp_path / "run", model, callback, num_steps=num_steps).train()
    return model.eval(), callback


def lora_layers(model):
    return {
        n.removeprefix("base_model.model."): m
        for n, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }


@torch.no_grad()
def effective_weight(layer):
    """Return the (out, in) matrix that a layer computes, whatever it is made of."""
    A = next(iter(layer.lora_A.values())).weight
    eye = torch.eye(A.shape[1], dtype=A.dtype)
    return (layer(eye) - layer(torch.zeros_like(eye))).T


def differences(model, final):
    """Return the largest absolute difference of each tensor to those of our run."""
    out = {}
    for name, layer in lora_layers(model).items():
        out[f"{name} whole"] = effective_weight(layer) - final[f"{name}.weight"]
    for name, p in model.named_parameters():
        if "lora_" in name:
            out[name] = p - final[our_name(name)]
        elif ".modules_to_save.default." in name:
            plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            out[name] = p - final[plain]
    return {name: float(tensor.detach().abs().max()) for name, tensor in out.items()}


def assert_same(model, final, tolerance=TOLERANCE):
    found = differences(model, final)
    assert len(found) == 4 * 3 + 4
    worst = max(found, key=found.__getitem__)
    assert found[worst] < tolerance, f"{worst}: {found[worst]:.1e}"
