"""Measure the token lengths that plans are made with: configs/plan/lengths.yaml.

    python scripts/measure_lengths.py --data DATA --tokenizer BPE > lengths.yaml

DATA holds ``e2e/lora``, ``webnlg``, ``xsum`` and ``glue`` (release files: ``task.source=files``);
BPE holds GPT-2's tables, ``encoder.json`` and ``vocab.bpe``. RoBERTa and BART cut texts by the same
tables and add begin and end tokens: 2 to a text, 4 to a pair.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import yaml
from hydra.utils import instantiate

from delta_lora import console
from delta_lora.console import as_path
from scripts.planning.lengths import SHARES
from scripts.runs.composition import compose

GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
HEADER = """\
# Token lengths of the real data, which plans are made with. They were measured by
# scripts/measure_lengths.py; the data themselves are not part of this repository. GPT-2's
# byte-level BPE, which RoBERTa and BART share. Lengths are those after the cut of configs/task.
#   rows      training, validation and scored rows of the complete data
#   measured  rows that the quantiles are of, where that is only a part of the training split
#   quantiles at the shares of `scripts.planning.lengths.SHARES`
#   mean, sd  mean and standard deviation
"""


def summary(lengths: Sequence[int]) -> dict[str, Any]:
    """Return mean, standard deviation and quantiles of some lengths."""
    values = np.asarray(lengths)
    return {
        "mean": round(float(values.mean()), 2),
        "sd": round(float(values.std()), 2),
        "quantiles": [round(float(q)) for q in np.quantile(values, SHARES)],
    }


def data_to_text(name: str, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the lengths of E2E or WebNLG."""
    task = _load(name, folder)
    train = task.examples("train", tokenizer)
    contexts = [item.context for item in task.inputs("test")]
    # A context and the end token behind it.
    prompts = [len(ids) + 1 for ids in tokenizer(contexts)["input_ids"]]
    return {
        "rows": {
            "train": len(train),
            "validation": len(task.examples("validation", tokenizer)),
            "scored": len(prompts),
        },
        "sequence": summary([len(example.tokens) for example in train]),
        "targets": summary([len(e.tokens) - e.num_context for e in train]),
        "prompt": summary(prompts),
    }


def xsum(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the lengths of XSum, of the rows that are there."""
    task = _load("xsum", folder)
    rows = task.inputs("train")

    def cut(texts: Sequence[str], limit: int) -> list[int]:
        return [min(len(ids) + 2, limit) for ids in tokenizer(list(texts))["input_ids"]]

    return {
        "rows": {"train": 204045, "validation": 11332, "scored": 11334},
        "measured": len(rows),
        "source": summary(cut([row.document for row in rows], task.max_source_length)),
        "target": summary(cut([row.summary for row in rows], task.max_target_length)),
    }


def glue(name: str, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the lengths of a task of GLUE, of the rows that are there."""
    task = _load(f"glue/{name}", folder)
    rows = task.inputs("train")
    columns = list(zip(*(row.texts for row in rows), strict=True))
    ids = [tokenizer(list(column))["input_ids"] for column in columns]
    extra = 2 * len(columns)
    lengths = [
        min(sum(map(len, parts)) + extra, task.max_length) for parts in zip(*ids, strict=True)
    ]
    official = {key: int(value) for key, value in task.num_rows.items()}
    entry: dict[str, Any] = {
        "rows": {
            "train": official["train"],
            "validation": sum(n for split, n in official.items() if split != "train"),
        },
    }
    entry["rows"]["scored"] = entry["rows"]["validation"]
    if len(rows) < official["train"]:
        entry["measured"] = len(rows)
    return {**entry, "sequence": summary(lengths)}


def _load(name: str, folder: Path) -> Any:
    cfg = compose([f"experiment={name}", "task.source=files", f"task.data_dir={folder}"])
    task = instantiate(cfg.task)
    task.load()
    return task


def main() -> None:
    """Measure all tasks and print the file."""
    from delta_lora.models import load_tokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=as_path, required=True)
    parser.add_argument("--tokenizer", type=as_path, required=True)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    found: dict[str, Any] = {
        "e2e": data_to_text("e2e", options.data / "e2e" / "lora", tokenizer),
        "webnlg": data_to_text("webnlg", options.data / "webnlg", tokenizer),
        "xsum": xsum(options.data / "xsum", tokenizer),
    }
    for name in GLUE:
        found[f"glue/{name}"] = glue(name, options.data / "glue", tokenizer)
    print(
        HEADER + yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=100), end=""
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # what models and data say of themselves
    console.run(main)
