"""Delta-LoRA with transformers.Trainer and PEFT: train, export, load again.

    python examples/trainer_callback.py                            # no download, under a minute
    python examples/trainer_callback.py --form in_place            # W is written, as in the paper
    python examples/trainer_callback.py --model FOLDER_OR_HUB_ID   # your own text classifier

Without --model a tiny RoBERTa with random weights is built, first trained on all its parameters for
one task (its "pre-training": are most of the first three letters from n to z?), and then adapted
with Delta-LoRA to another task (are most of all eight letters from n to z?).
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor

from delta_lora.delta import FORM, FORMS
from delta_lora.integrations import DeltaLoraCallback

LENGTH = 8  # letters in a text
FIRST_LETTER = 3  # ids 0, 1 and 2 are <s>, <pad> and </s>


def make_data(task: str, num_examples: int, seed: int, tokenizer=None) -> list[dict[str, Tensor]]:
    """Return random texts of letters with their label, 0 or 1, as the Trainer wants them."""
    draw = torch.Generator().manual_seed(seed)
    letters = torch.randint(26, (num_examples, LENGTH), generator=draw)
    is_late = letters >= 13
    counted = is_late if task == "whole" else is_late[:, :3]
    labels = counted.float().mean(dim=1) > 0.5
    if tokenizer is None:
        start = torch.zeros(num_examples, 1, dtype=torch.long)
        ids = torch.cat([start, letters + FIRST_LETTER], dim=1)
    else:  # a real model reads text
        texts = [" ".join(string.ascii_lowercase[i] for i in row) for row in letters.tolist()]
        ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels.long(), strict=True)]


def accuracy(model: torch.nn.Module, data: list[dict[str, Tensor]]) -> float:
    """Return the share of right answers."""
    model.eval()
    ids = torch.stack([row["input_ids"] for row in data]).to(next(model.parameters()).device)
    labels = torch.stack([row["labels"] for row in data]).to(ids.device)
    with torch.no_grad():
        predictions = model(input_ids=ids).logits.argmax(dim=-1)
    return float((predictions == labels).float().mean())


def training_arguments(folder: Path, steps: int, rate: float) -> transformers.TrainingArguments:
    """Return ordinary settings; nothing here is special to Delta-LoRA."""
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=rate,
        save_strategy="steps",
        save_steps=max(1, steps // 2),
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=1,
    )


def make_base(folder: Path) -> Path:
    """Build a tiny RoBERTa, train all of it on the first task, save it; return its folder."""
    transformers.set_seed(1)
    config = transformers.RobertaConfig(
        vocab_size=FIRST_LETTER + 26,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LENGTH + 4,
        num_labels=2,
    )
    model = transformers.RobertaForSequenceClassification(config)
    data = make_data("start", 2000, seed=1)
    arguments = training_arguments(folder / "base_run", 200, 3e-3)
    transformers.Trainer(model, arguments, train_dataset=data).train()
    model.save_pretrained(folder / "base")
    return folder / "base"


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a classifier: folder or hub id (default: a tiny RoBERTa)")
    parser.add_argument("--output", type=Path, default=Path("outputs/trainer_callback"))
    parser.add_argument("--form", choices=FORMS, default=FORM)
    parser.add_argument("--update-ratio", type=float, default=0.5, help="lambda in the paper")
    parser.add_argument("--start-step", type=int, default=20, help="K in the paper")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model) if args.model else None
    name = args.model or str(make_base(args.output))
    train = make_data("whole", 2000, seed=2, tokenizer=tokenizer)
    test = make_data("whole", 500, seed=3, tokenizer=tokenizer)

    def load_base() -> torch.nn.Module:
        transformers.set_seed(1)  # a head that the folder lacks is drawn the same each time
        return transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)

    # An ordinary PEFT LoRA. Delta-LoRA asks for one thing: no dropout in it.
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=["query", "value"],  # W_Q and W_V; q_proj and v_proj in other models
        modules_to_save=["classifier"],  # the head is new and trains as a whole
    )
    model = peft.get_peft_model(load_base(), lora)
    model.print_trainable_parameters()
    print(f"accuracy before: {accuracy(model, test):.3f}")

    # These two lines make it Delta-LoRA.
    callback = DeltaLoraCallback(
        update_ratio=args.update_ratio, start_step=args.start_step, form=args.form
    )
    trainer = transformers.Trainer(
        model,
        training_arguments(args.output / "run", args.steps, args.learning_rate),
        train_dataset=train,
        callbacks=[callback],
    )
    # After an interruption run trainer.train(resume_from_checkpoint=True) on a fresh model.
    trainer.train()
    after = accuracy(model, test)
    print(f"accuracy after:  {after:.3f} ({callback.num_updates} updates of W)")

    # model.save_pretrained would keep A and B only. The export is the trained model: a plain LoRA
    # of twice the rank on the untouched base, which everything that reads PEFT can load.
    folder = callback.export(model, args.output / "adapter")
    loaded = peft.PeftModel.from_pretrained(load_base(), folder)
    print(f"accuracy of the exported adapter, loaded again: {accuracy(loaded, test):.3f}")
    print(f"the adapter is in {folder}")


if __name__ == "__main__":
    main()
