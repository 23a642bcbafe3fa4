"""Is a plan right? Every row of Tables 1 to 4 at the paper's sizes, three steps on a CPU.

    python scripts/dry_run.py                      results/plan/dry_run.json and .md
    python scripts/dry_run.py --tables table1      one table
    python scripts/dry_run.py --small --out FILE   the same rows on small models, in minutes

All rows take about an hour on two cores and 9 GiB of memory.

The models have random weights, the batches random tokens; the rest is the suite's own code: method,
optimiser, loss, checkpoint, adapter. Parameters, memory by category and bytes on disk are counted
and compared with what `scripts.planning` says of the same batch on a CPU. A row that stands in the
JSON is not measured again, so a stopped run continues. Exit code: 0 all within 10 %, 1 not.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from delta_lora import console
from delta_lora.console import as_path
from delta_lora.writing import make_folder, write_text
from scripts.planning import disk, memory
from scripts.planning.adaptation import read_adaptation
from scripts.planning.architecture import read_architecture
from scripts.planning.forward import Batch, write_down
from scripts.planning.ledger import CPU, Ledger
from scripts.planning.lengths import read_lengths
from scripts.planning.workload import mean_batch, read_workload
from scripts.reporting.results import RESULTS
from scripts.reporting.spec import TableSpec, load_table
from scripts.runs import composition

TABLES = ("table1", "table2", "table3", "table4")
OUT = RESULTS / "plan" / "dry_run.json"
LIMIT = 0.10
STEPS = 3
GIB = 2**30

#: examples of a micro-batch.
EXAMPLES = {"table1": 8, "table2": 2, "table3": 1, "table4": 4}
#: set for the measurement and not by the table: random BART has the dropout of the published one.
#: Delta-LoRA begins at once, so that three steps show all that it keeps (see `row_settings`).
BART_DROPOUT = "++model.config_overrides={attention_dropout: 0.1, activation_dropout: 0.1}"
SMALL = {
    "gpt2_medium": "{model_type: gpt2, vocab_size: 997, n_embd: 64, n_layer: 3, n_head: 4}",
    "bart_large": (
        "{model_type: bart, vocab_size: 997, d_model: 64, encoder_layers: 2, decoder_layers: 2, "
        "encoder_attention_heads: 4, decoder_attention_heads: 4, encoder_ffn_dim: 256, "
        "decoder_ffn_dim: 256, max_position_embeddings: 1024}"
    ),
    "roberta_base": (
        "{model_type: roberta, vocab_size: 997, hidden_size: 64, num_hidden_layers: 3, "
        "num_attention_heads: 4, intermediate_size: 256, max_position_embeddings: 258, "
        "type_vocab_size: 1}"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    names = options.tables.split(",")
    if unknown := [name for name in names if name not in TABLES]:
        print(f"error: --tables={','.join(unknown)}: use {', '.join(TABLES)}", file=sys.stderr)
        return 2
    content = _read(options.out, is_small=options.small)
    for name in names:
        spec = load_table(name)
        for row in spec.rows:
            settings = row_settings(spec, row, is_small=options.small)
            key = f"{name}/{row.name}"
            stored = content["rows"].get(key, {})
            if stored.get("settings") != settings:
                print(f"{key} ...", flush=True)
                stored = {"settings": settings, "measured": measure(settings)}
            planned = plan(settings)
            content["rows"][key] = {**stored, "planned": planned}
            _write(options.out, content)
            print(_line(key, content["rows"][key]), flush=True)
    wrong = off_rows(content)
    print(f"wrote {options.out} and {options.out.with_suffix('.md').name}")
    for text in wrong:
        print(f"off by more than {LIMIT:.0%}: {text}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=",".join(TABLES), help="default: table1 to table4")
    parser.add_argument(
        "--out", type=as_path, default=OUT, help="the JSON; a page stands beside it"
    )
    parser.add_argument("--small", action="store_true", help="models of few parameters, as a test")
    return parser


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Any:
    return composition.compose(overrides)


# ---------------------------------------------------------------------- what a row is


def row_settings(spec: TableSpec, row: Any, *, is_small: bool) -> dict[str, Any]:
    """Return what is measured of a row, as JSON: overrides, batch, micro-batches.

    Table 1's rows are measured at the recipe's batch, the others with fewer examples (`EXAMPLES`),
    which a CPU finishes sooner; the plan is of the same batch. Lengths are the mean ones of the
    data. A step of Table 3 has two micro-batches; Table 4 is measured on its first task.
    """
    run, base = next(iter(spec.runs.items()))
    overrides = [*base, *row.overrides, "scale=paper", "seed=1", "model.init=random"]
    model = _composed(tuple(overrides)).choices.model
    if model == "bart_large":
        overrides.append(BART_DROPOUT)
    if is_small:
        overrides.append(f"++model.architecture={SMALL[model]}")
    cfg = _composed(tuple(overrides))
    if read_adaptation(cfg).method == "delta_lora":
        overrides.append("method.start_step=-1")
    shape, lengths = read_architecture(cfg), read_lengths(cfg)
    return {
        "run": run,
        "overrides": overrides,
        "batch": vars(mean_batch(shape, lengths, EXAMPLES[spec.name])),
        "micro_batches": 2 if shape.family == "bart" else 1,
        "steps": STEPS if cfg.trainer.max_steps != 0 else 0,
    }


def plan(settings: dict[str, Any]) -> dict[str, int]:
    """Return what is planned for a row on a CPU: parameters, memory, bytes on disk."""
    cfg = _composed(tuple(settings["overrides"]))
    batch = Batch(**settings["batch"])
    adaptation, shape = read_adaptation(cfg), read_architecture(cfg)
    ledger = write_down(shape, adaptation, batch, CPU)
    workload = read_workload(cfg, shape, read_lengths(cfg))
    space = disk.run_disk(cfg, ledger, workload, 0)
    found = {**_counts(ledger), "adapter": space.adapter}
    if settings["steps"] == 0:
        return {**found, "weights": (ledger.parameters + ledger.adapters) * 4}
    sizes = memory.step_bytes(ledger, accumulates=settings["micro_batches"] > 1)
    return {**found, **sizes, "checkpoint": space.checkpoint}


def _counts(ledger: Ledger) -> dict[str, int]:
    return {
        "trainable": ledger.trained,
        "updatable": ledger.updatable,
        "total": ledger.parameters,
    }


# ---------------------------------------------------------------------- measured


def measure(settings: dict[str, Any]) -> dict[str, int]:
    """Build the model of a row, take its steps, write its files; return what was counted."""
    from hydra.utils import instantiate

    from delta_lora.analysis import memory_model
    from delta_lora.draws import seed_everything
    from scripts.runs.building import random_model

    cfg = _composed(tuple(settings["overrides"]))
    seed_everything(cfg.seed)
    task, trainer, method = (instantiate(cfg[part]) for part in ("task", "trainer", "method"))
    model = random_model(cfg, task)
    total = sum(p.numel() for p in model.parameters())
    method.inject(
        model,
        projections=cfg.model.projections,
        head=task.head,
        total_steps=trainer.total_steps(read_lengths(cfg).rows["train"]) or 1,
        seed=cfg.seed,
    )
    model.train()
    found = {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "updatable": method.num_updatable_parameters,
        "total": total,
    }
    optimizer = trainer.build_optimizer(model, method)
    if settings["steps"]:
        loss = _loss(cfg, task, model, Batch(**settings["batch"]))
        found |= memory_model.measure_step(
            model,
            method,
            optimizer,
            loss,
            warm_up_steps=settings["steps"] - 1,
            micro_batches=settings["micro_batches"],
        )
    else:
        found["weights"] = sum(p.numel() * p.element_size() for p in model.parameters())
    found |= _written(model, method, optimizer, has_checkpoint=settings["steps"] > 0)
    del model, optimizer, method
    gc.collect()
    return found


def _loss(cfg: Any, task: Any, model: Any, batch: Batch) -> Callable[[], Any]:
    """Return the task's loss on one batch of random tokens."""
    made = _random_batch(batch, read_architecture(cfg).vocabulary, cfg)
    smoothing = cfg.trainer.label_smoothing
    return lambda: task.loss(model, made, smoothing) / made.num_targets


def _random_batch(batch: Batch, vocabulary: int, cfg: Any) -> Any:
    import torch

    from delta_lora.protocols import Batch as Tensors
    from tasks import language_modeling, seq2seq

    generator = torch.Generator().manual_seed(0)

    def tokens(number: int) -> Any:
        return torch.randint(3, vocabulary, (number,), generator=generator, dtype=torch.int32)

    if batch.is_packed:
        lengths = _shares(batch.length, batch.sequences)
        targets = _shares(batch.targets, batch.sequences)
        return language_modeling.collate([
            language_modeling.TokenSequence(str(n), tokens(length + 1).tolist(), length + 1 - t)
            for n, (length, t) in enumerate(zip(lengths, targets, strict=True))
        ])  # fmt: skip
    if batch.targets:
        return seq2seq.collate([
            seq2seq.Pair(str(n), tokens(batch.length), tokens(batch.targets))
            for n in range(batch.sequences)
        ])  # fmt: skip
    ids = torch.stack([tokens(batch.length) for _ in range(batch.sequences)]).long()
    mask = torch.ones_like(ids)
    mask[0, batch.length - 1] = 0  # one that is padded, as nearly always
    labels = torch.randint(0, len(cfg.task.labels), (batch.sequences,), generator=generator)
    names = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Tensors(names, batch.sequences, ids.numel(), [str(n) for n in range(batch.sequences)])


def _shares(total: int, parts: int) -> list[int]:
    return [(total + part) // parts for part in range(parts)]


def _written(model: Any, method: Any, optimizer: Any, *, has_checkpoint: bool) -> dict[str, int]:
    """Write a checkpoint and the adapter to a temporary folder; return their bytes."""
    from delta_lora import adapter_file, checkpoint

    updated = method.updated_tensors(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        found = {}
        if has_checkpoint:
            tensors, plain = checkpoint.optimizer_tensors(optimizer)
            parts = {"weights": updated, "optimizer": tensors, "method": method.state_dict()}
            checkpoint.save(path / "checkpoints", 1, tensors=parts, state={"optimizer": plain})
            found["checkpoint"] = _folder_bytes(path / "checkpoints")
            checkpoint.remove(path / "checkpoints")
        base: dict[str, Any] = {"source": None, "head": [], "projections": None}
        described = {"method": {}, "seed": 1, "base": base, "facts": method.describe()}
        adapter_file.write(path / "adapter", updated, described)
        return {**found, "adapter": _folder_bytes(path / "adapter")}


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------- files and words


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Return measured over planned of every number; 1 where both are 0."""
    planned, measured = row["planned"], row["measured"]
    return {
        name: measured[name] / planned[name] if planned[name] else float(measured[name] == 0)
        for name in planned
    }


def off_rows(content: dict[str, Any]) -> list[str]:
    """Return what is planned wrongly by more than the limit, in words."""
    return [
        f"{key}: {name} planned {row['planned'][name]:,}, measured {row['measured'][name]:,}"
        for key, row in content["rows"].items()
        for name, ratio in ratios(row).items()
        if abs(ratio - 1) > LIMIT
    ]


def _line(key: str, row: dict[str, Any]) -> str:
    name, ratio = max(ratios(row).items(), key=lambda item: abs(item[1] - 1))
    peak = row["measured"].get("peak", row["measured"]["weights"])
    return f"{key}: peak {peak / GIB:.2f} GiB; furthest off: {name}, measured/planned {ratio:.3f}"


def _read(path: Path, *, is_small: bool) -> dict[str, Any]:
    import torch
    import transformers

    fresh = {
        "schema": 1,
        "device": "cpu",
        "models": "small" if is_small else "paper",
        "packages": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": {},
    }
    if not path.exists():
        return fresh
    content = json.loads(path.read_text(encoding="utf-8"))
    if {**content, "rows": {}} != fresh:
        raise SystemExit(
            f"error: {path} was made with other models or packages; remove it, or name another "
            "file with --out"
        )
    return dict(content)


def _write(path: Path, content: dict[str, Any]) -> None:
    make_folder(path.parent)
    write_text(path, json.dumps(content, indent=1) + "\n")
    write_text(path.with_suffix(".md"), page(content))


def page(content: dict[str, Any]) -> str:
    """Return the page: planned and measured of every row."""
    worst = max(abs(r - 1) for row in content["rows"].values() for r in ratios(row).values())
    lines = [
        "# Planned and measured: every row of Tables 1 to 4",
        "",
        f"Models of the {content['models']} sizes with random weights, {STEPS} optimiser steps on "
        "a CPU in float32 (scripts/dry_run.py says at which batches); torch "
        f"{content['packages']['torch']}, transformers {content['packages']['transformers']}. "
        f"The largest difference of any number is {worst:.1%}. MiB; planned / measured.",
        "",
        "| Row | Trainable | Updatable | Activations | Peak of a step | Checkpoint | Adapter |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in content["rows"].items():
        planned, measured = row["planned"], row["measured"]
        cells = [_pair(planned, measured, name, 1, "d") for name in ("trainable", "updatable")]
        cells += [
            _pair(planned, measured, name, 2**20, ".1f")
            for name in ("activations", "peak", "checkpoint", "adapter")
        ]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _pair(
    planned: dict[str, int], measured: dict[str, int], name: str, unit: int, form: str
) -> str:
    if name not in planned:
        return "no step"
    values = [v // unit if form == "d" else v / unit for v in (planned[name], measured[name])]
    first, second = (f"{value:,{form}}" for value in values)
    return first if first == second else f"{first} / {second}"


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # what models and data say of themselves
    console.run(main)
