"""Seconds and memory of reading and encoding data of the size of MNLI and of XSum.

    python benchmarks/data_at_scale.py                      # both, at full size: many minutes
    python benchmarks/data_at_scale.py mnli --share 0.1 --source files

Writes synthetic rows of that size (made-up words with the frequencies of a language, the lengths of
the real data) as the hub has them (Parquet, no network is used) and as files, and a tokenizer
trained on them. Then each use is measured in a process of its own:

- ``first``: an empty cache folder, so that everything is encoded;
- ``second``: the same folder again, as every other run and worker of a table finds it.

Prints one JSON object a use: seconds (of the clock, and of processor time) of `Task.load`, of
encoding train and of encoding the evaluation splits; peak resident memory of the process after
each, in GiB above what it had before the data; how much is private at the end (RssAnon: the rest
are pages of files, which all processes share); milliseconds of a batch (taking its examples and
`Task.collate`), the median of `NUM_BATCHES` random ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from delta_lora import console
from delta_lora.console import as_path

ROWS = {
    "mnli": {"train": 392_702, "dev_matched": 9_815, "dev_mismatched": 9_832},
    "xsum": {"train": 204_045, "validation": 11_332, "test": 11_334},
}
#: words of a row's texts: median, and sigma of a log-normal distribution.
LENGTHS = {"mnli": ((17, 0.7), (9, 0.4)), "xsum": ((320, 0.7), (21, 0.25))}
NUM_WORDS = 30_000
NUM_BATCHES = 500
BATCH_SIZE = {"mnli": 16, "xsum": 8}
VOCABULARY = 8_000


def main() -> int:
    """Write the data, measure each use in its own process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*ROWS], help=f"of {', '.join(ROWS)}")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, above 0 to 1")
    parser.add_argument("--folder", type=as_path, help="keep the data here and use them again")
    parser.add_argument("--source", choices=("hub", "files"), default="hub")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in ROWS]:
        parser.error(f"unknown data {', '.join(unknown)}; allowed: {', '.join(ROWS)}")
    if not 0 < arguments.share <= 1:
        parser.error(f"--share {arguments.share}; allowed: above 0 and at most 1")
    if arguments.measure is not None:
        name, folder = arguments.measure
        print(json.dumps(measure(name, Path(folder), arguments.source)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.names:
            folder = (arguments.folder or Path(temporary)) / f"{name}-{arguments.share:g}"
            if not (folder / "tokenizer.json").exists():
                write(name, arguments.share, folder)
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                for use in ("first", "second"):
                    found = _in_process(name, folder, cache, arguments.source)
                    print(json.dumps({"data": name, "use": use, **found}), flush=True)
    return 0


def _in_process(name: str, folder: Path, cache: str, source: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--source", source, "--measure", name, str(folder)]
    environment = {**os.environ, "DATA_AT_SCALE_CACHE": cache}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# Writing


def write(name: str, share: float, folder: Path) -> None:
    """Write the files of a task and ``tokenizer.json`` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = _words(rng)
    for split, rows in ROWS[name].items():
        texts = list(_texts(name, max(1, round(share * rows)), words, rng))
        (_write_mnli if name == "mnli" else _write_xsum)(folder, split, texts)
    _train_tokenizer(name, words, folder)


def _write_mnli(folder: Path, split: str, texts: Sequence[Sequence[str]]) -> None:
    with (folder / f"{split}.tsv").open("w", encoding="utf-8") as stream:
        stream.write("premise\thypothesis\tlabel\tidx\n")
        for number, (premise, hypothesis) in enumerate(texts):
            stream.write(f"{premise}\t{hypothesis}\t{number % 3}\t{number}\n")
    premises, hypotheses = zip(*texts, strict=True)
    labels = [number % 3 for number in range(len(texts))]
    table = pa.table({"premise": premises, "hypothesis": hypotheses, "label": labels})
    pq.write_table(table, folder / f"{split.replace('dev', 'validation')}.parquet")


def _write_xsum(folder: Path, split: str, texts: Sequence[Sequence[str]]) -> None:
    documents, summaries = zip(*texts, strict=True)
    ids = [f"{split}{number}" for number in range(len(texts))]
    table = pa.table({"document": documents, "summary": summaries, "id": ids})
    pq.write_table(table, folder / f"{split}.parquet")
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
        for batch in table.to_batches(max_chunksize=1000):
            for row in batch.to_pylist():
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _words(rng: np.random.Generator) -> np.ndarray:
    """Return made-up words, common ones short."""
    syllables = [c + v for c in "bcdfghjklmnprstvw" for v in ("a", "e", "i", "o", "u", "ar", "on")]
    lengths = 1 + np.arange(NUM_WORDS) * 4 // NUM_WORDS + rng.integers(0, 2, NUM_WORDS)
    return np.array(["".join(rng.choice(syllables, length)) for length in lengths])


def _texts(
    name: str, num_rows: int, words: np.ndarray, rng: np.random.Generator
) -> Iterator[list[str]]:
    """Yield the two texts of each row; one word in some hundred has a character beyond Latin-1."""
    frequencies = 1 / (np.arange(NUM_WORDS) + 3)
    frequencies /= frequencies.sum()
    for start in range(0, num_rows, 1000):
        block = min(1000, num_rows - start)
        columns = []
        for median, sigma in LENGTHS[name]:
            lengths = np.maximum(2, rng.lognormal(np.log(median), sigma, block)).astype(int)
            ranks = rng.choice(NUM_WORDS, lengths.sum(), p=frequencies)
            drawn = iter(np.split(words[ranks], np.cumsum(lengths)[:-1]))
            columns.append([" ".join(part).capitalize() + " – the end." for part in drawn])
        yield from (list(texts) for texts in zip(*columns, strict=True))


def _train_tokenizer(name: str, words: np.ndarray, folder: Path) -> None:
    """Train a byte-level BPE with the special tokens of RoBERTa and BART, as those have it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    rng = np.random.default_rng(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = (text for row in _texts(name, 3000, words, rng) for text in row)
    special = ["<s>", "<pad>", "</s>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.save(str(folder / "tokenizer.json"))


# Measuring


def measure(name: str, folder: Path, source: str) -> dict[str, Any]:
    """Load, encode and collate; runs in a process of its own."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
    )
    task = _task(name, folder, source)
    before = _peak_gib()
    seconds, cpu_seconds, peaks = {}, {}, {}
    splits = ("validation",) if name == "mnli" else ("validation", "test")

    def timed(step: str, action: Any) -> Any:
        began, cpu_began = time.monotonic(), time.process_time()
        result = action()
        seconds[step] = round(time.monotonic() - began, 2)
        cpu_seconds[step] = round(time.process_time() - cpu_began, 2)
        peaks[step] = round(_peak_gib() - before, 2)
        return result

    timed("load", task.load)
    train = timed("train", lambda: task.examples("train", tokenizer))
    kept = timed("evaluation", lambda: [task.examples(split, tokenizer) for split in splits])
    rng = np.random.default_rng(2)
    size = BATCH_SIZE[name]
    times, num_tokens = [], 0
    for indices in rng.integers(0, len(train), (NUM_BATCHES, size)).tolist():
        began = time.perf_counter()
        batch = task.collate([train[i] for i in indices])
        times.append(time.perf_counter() - began)
        num_tokens += batch.num_tokens
    return {
        "rows": len(train) + sum(map(len, kept)),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gib": peaks,
        "private_gib": round(_private_gib(), 2),
        "tokens_a_row": round(num_tokens / NUM_BATCHES / size, 1),
        "batch_ms": round(float(np.median(times)) * 1000, 3),
    }


def _task(name: str, folder: Path, source: str) -> Any:
    from hydra.utils import instantiate

    from scripts.runs.composition import compose

    task = {"mnli": "glue/mnli", "xsum": "xsum"}[name]
    overrides = [f"experiment={task}", "method=lora"]
    if source == "files":
        overrides += ["task.source=files", f"task.data_dir={folder}"]
    cache = Path(os.environ["DATA_AT_SCALE_CACHE"])
    made = instantiate(compose(overrides).task, cache_dir=str(cache))
    if source == "hub":
        _as_release(made, name, folder, cache)
    return made


def _as_release(task: Any, name: str, folder: Path, cache: Path) -> None:
    """Let a task find the Parquet files as its pinned release, already downloaded."""
    from tasks import xsum
    from tasks.sources import Release

    sums = {}
    downloaded = cache / "owner--name" / ("0" * 40)
    for path in sorted(folder.glob("*.parquet")):
        file = f"mnli/{path.stem}-00000-of-00001.parquet"
        if name == "xsum":
            file = xsum.HUB_FILES[path.stem]
            xsum.OFFICIAL_ROWS[path.stem] = pq.read_metadata(path).num_rows
        copy = downloaded / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            shutil.copy(path, copy)
        sums[file] = hashlib.sha256(path.read_bytes()).hexdigest()
    task.source.release = Release("owner/name", "0" * 40, "http://127.0.0.1:9", sums)


def _peak_gib() -> float:
    # Not getrusage: its peak is that of the process that started this one, where that was higher.
    return _status_gib("VmHWM")


def _private_gib() -> float:
    return _status_gib("RssAnon")


def _status_gib(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"/proc/self/status has no {name}; this needs Linux 4.5 or newer")


if __name__ == "__main__":
    console.run(main)
