"""GLUE: eight sentence and sentence-pair tasks for an encoder with a new head (Table 4).

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform", ICLR 2019. Set-up:
microsoft/LoRA, examples/NLU, with the length of 256 that the Delta-LoRA paper states.

Which sentences, labels and scores a task has stands in configs/task/glue/<task>.yaml; a further
task of this kind is a further yaml. The labels of the official test sets are not public, so papers
report the dev set, and the best epoch is chosen on that same set: what they call a result is a
maximum. The record holds the best and the last epoch.

Files are TSV without quoting, with a header of the hub's column names: ``train.tsv``, ``dev.tsv``
(MNLI: ``dev_matched.tsv`` and ``dev_mismatched.tsv``) and, where it is scored, ``test.tsv``; plain
or ``.gz``, in `data_dir` or in its folder named as the task. A file ``<name>_subset.tsv`` is read
where there is no complete one, which is said in the log and in every record.

Shapes: B examples of at most T tokens, C classes (1 for a regression).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.protocols import Batch, MetricSpec, Scores, Task
from tasks.bag_of_words import classify, regress
from tasks.data import (
    Release,
    encoded_folder,
    find_file,
    listing,
    open_folder,
    read_document,
    read_parquet,
    read_tsv,
    shorten,
)
from tasks.encoded import Block, EncodedSplit, Examples, Split, Store, Texts
from tasks.metrics import glue as metrics
from tasks.predictions import align, own_chunks
from tasks.rows import Rows, gather
from tasks.tiny.corpora import glue as embedded

logger = logging.getLogger(__name__)

SOURCES = ("hub", "files", "embedded")
SPLITS = ("train", "validation", "test")
#: split -> start of the names of its TSV files.
TSV_NAMES = {"train": "train", "validation": "dev", "test": "test"}
METRIC_LABELS = {
    "accuracy": "Accuracy", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson",
    "spearman": "Spearman",
}  # fmt: skip
#: what the hub and many files write where a label is hidden.
HIDDEN = "-1"


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        id: part and row number, for example ``dev_matched-0017``.
        texts: one or two sentences.
        label: class number, or a real number in a regression; None where it is hidden.
        part: which part of the split it is of (``matched``), or an empty text.
    """

    id: str
    texts: tuple[str, ...]
    label: float | None
    part: str


@dataclass(frozen=True)
class Encoded:
    """One example as token ids (and token types, where the model has them), (tokens,) int32."""

    id: str
    fields: Mapping[str, np.ndarray]
    label: float | None


class Glue(Task):
    """One task of GLUE.

    Args:
        task: name of the task, for example ``cola``; also the folder of its files.
        columns: one or two columns of text.
        labels: names of the classes in the order of their numbers; None for a regression.
        metrics: scores in table order, of `tasks.metrics.glue.METRICS`; the first one chooses the
            best epoch.
        num_rows: rows of the complete files, by file name without suffix.
        release: the pinned files of the hub.
        parts: names of the parts of the dev set (``matched``, ``mismatched``), or empty. Accuracy
            is then also given for each part.
        source: ``hub``, ``files`` (reads `data_dir`) or ``embedded`` (the suite's own grammar).
        data_dir: folder with the files, or with a folder of the task's name; only with ``files``.
        cache_dir: where ``hub`` keeps downloads, and `tasks.encoded` what it made of them or of
            files; None takes the user's cache folder.
        max_length: tokens of an example; the longer sentence is cut first, which is logged.
        scored_split: ``validation``, as papers do, or ``test``, whose labels may be hidden.
        predict_batch_size: examples at once when predicting; changes nothing but speed.
        embedded_seed: seed of the ``embedded`` corpus; not the seed of the run.
        embedded_sizes: split -> rows of the ``embedded`` corpus; None takes its defaults.
        head: modules of the model that are new.

    Raises:
        ValueError: a setting is not allowed, or two do not fit.
    """

    version = 1

    def __init__(
        self,
        *,
        task: str,
        columns: Sequence[str],
        labels: Sequence[str] | None,
        metrics: Sequence[str],
        num_rows: Mapping[str, int],
        release: Release,
        parts: Sequence[str] = (),
        source: str = "hub",
        data_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        max_length: int = 256,
        scored_split: str = "validation",
        predict_batch_size: int = 64,
        embedded_seed: int = 0,
        embedded_sizes: Mapping[str, int] | None = None,
        head: Sequence[str] = ("classifier",),
    ) -> None:
        if source not in SOURCES:
            raise ValueError(f"task.source={source!r}; allowed: {', '.join(SOURCES)}")
        if (data_dir is not None) != (source == "files"):
            raise ValueError(
                f"task.source={source} with task.data_dir={data_dir}: a folder goes with "
                "task.source=files and with nothing else"
            )
        if scored_split not in SPLITS[1:]:
            raise ValueError(f"task.scored_split={scored_split!r}; allowed: validation, test")
        if scored_split == "test" and source != "files":
            raise ValueError(
                f"task.scored_split=test with task.source={source}: only your own files can have a "
                "test set; use task.source=files, or task.scored_split=validation"
            )
        if len(columns) not in (1, 2):
            raise ValueError(f"task.columns={list(columns)}; a task has one or two sentences")
        # Two special tokens round one sentence, up to four with a pair, and one token of each.
        for name, value, least in (
            ("max_length", max_length, 6),
            ("predict_batch_size", predict_batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"task.{name}={value}; allowed: at least {least}")
        allowed = CLASSIFICATION if labels is not None else REGRESSION
        if not metrics or any(name not in allowed for name in metrics):
            raise ValueError(f"task.metrics={list(metrics)}; allowed: {', '.join(allowed)}")
        self.task = task
        self.name = f"glue_{task}"
        self.columns = tuple(columns)
        self.labels = None if labels is None else tuple(labels)
        self.num_rows = dict(num_rows)
        self.release = release
        self.parts = tuple(parts)
        self.source = source
        self.data_dir = data_dir
        self.cache_dir = cache_dir
        self.max_length = max_length
        self.scored_split = scored_split
        self.predict_batch_size = predict_batch_size
        self.embedded_seed = embedded_seed
        self.embedded_sizes = None if embedded_sizes is None else dict(embedded_sizes)
        self.head = tuple(head)
        self.selection_metric = metrics[0]
        self._scores = tuple(metrics)
        self.metrics = tuple(
            MetricSpec(name, METRIC_LABELS[name], scale=100) for name in metrics
        ) + tuple(
            MetricSpec(f"accuracy_{part}", f"Accuracy, {part}", scale=100)
            for part in (self.parts if "accuracy" in metrics else ())
        )
        self.model_config = (
            {"num_labels": 1, "problem_type": "regression"}
            if self.labels is None
            else {
                "num_labels": len(self.labels),
                "problem_type": "single_label_classification",
                "id2label": dict(enumerate(self.labels)),
                "label2id": {label: number for number, label in enumerate(self.labels)},
            }
        )
        self._rows: dict[str, Rows[Row]] = {}
        self._store = Store(f"GLUE {self.task}", encoded_folder(self.source, self.cache_dir))
        self._padding: dict[str, int] = {}
        self._provenance: dict[str, Any] = {}

    # Loading

    def check_source(self) -> None:
        """See `Task.check_source`."""
        if self.source == "hub":
            self.release.check_source(self.cache_dir)
        elif self.source == "files":
            folder = self._files_folder()
            for split in self._splits():
                for name in self._names(split):
                    self._find_file(name, folder)

    def load(self) -> None:
        """Read train and dev set, and the test set where it is scored; see `Task.load`."""
        splits = self._splits()
        files: list[dict[str, Any]] = []
        rows: dict[str, Rows[Row]] = {}
        if self.source == "hub":
            folder = self.release.fetch(self.cache_dir)
            for split in splits:
                rows[split] = self._read_split(split, folder, files, is_hub=True)
        elif self.source == "files":
            folder = self._files_folder()
            for split in splits:
                rows[split] = self._read_split(split, folder, files)
        else:
            with TemporaryDirectory() as temporary:
                embedded.write(
                    Path(temporary), self.task, seed=self.embedded_seed, sizes=self.embedded_sizes
                )
                for split in splits:
                    rows[split] = self._read_split(split, Path(temporary) / self.task, files)
        self._rows = rows
        self._store = Store(f"GLUE {self.task}", encoded_folder(self.source, self.cache_dir))
        self._provenance = {
            "source": self.source,
            "revision": self.release.revision if self.source == "hub" else None,
            "embedded_seed": self.embedded_seed if self.source == "embedded" else None,
            "scored_split": self.scored_split,
            "files": files,
            "rows": {split: len(rows[split]) for split in rows},
        }
        logger.info(
            "GLUE %s (%s): %s", self.task, self.source,
            ", ".join(f"{split} {len(rows[split]):,} rows" for split in rows),
        )  # fmt: skip

    def _splits(self) -> Sequence[str]:
        return SPLITS if self.scored_split == "test" else SPLITS[:2]

    def _files_folder(self) -> Path:
        """Return the folder of the task's own files, in `data_dir` or `data_dir` itself."""
        assert self.data_dir is not None
        folder = open_folder(self.data_dir)
        return folder / self.task if (folder / self.task).is_dir() else folder

    def _names(self, split: str) -> list[str]:
        """Return the names of the files of a split, without their endings."""
        parts = self.parts if self.parts and split != "train" else ("",)
        return [f"{TSV_NAMES[split]}_{part}" if part else TSV_NAMES[split] for part in parts]

    def _read_split(
        self, split: str, folder: Path, files: list[dict[str, Any]], *, is_hub: bool = False
    ) -> Rows[Row]:
        """Read all parts of a split; what was read is added to `files`."""
        tables = []
        for name in self._names(split):
            part = name.removeprefix(TSV_NAMES[split]).removeprefix("_")
            read = self._read_hub if is_hub else self._read_file
            found, facts = read(name, folder)
            table = self._table(name, part, split, found)
            # None: of a test set with labels, GLUE gives no number of rows to compare with.
            is_complete = len(table) == self.num_rows[name] if name in self.num_rows else None
            if is_complete is False and self.source == "files":
                logger.warning(
                    "GLUE %s: %s has %d rows, the complete one %d: its scores are no GLUE scores",
                    self.task, facts["name"], len(table), self.num_rows[name],
                )  # fmt: skip
            files.append({**facts, "rows": len(table), "complete": is_complete})
            tables.append(table)
        rows = Rows(pa.concat_tables(tables), _make_row)
        if split == "test":
            self._check_hidden(rows)
        return rows

    def _table(
        self, name: str, part: str, split: str, found: Iterable[tuple[str, Mapping[str, Any]]]
    ) -> pa.Table:
        """Return the rows of a part, with the columns that `_make_row` takes."""
        texts = _text_columns(len(self.columns))
        label = pa.float64() if self.labels is None else pa.int64()
        schema = pa.schema([*((text, pa.string()) for text in texts), ("label", label)])
        table = gather(
            (
                {
                    **{text: values[c] for text, c in zip(texts, self.columns, strict=True)},
                    "label": self._label(values, split, place),
                }
                for place, values in found
            ),
            schema,
        )
        width = math.floor(math.log10(max(len(table), 1))) + 1
        ids = pa.array([f"{name}-{index:0{width}d}" for index in range(len(table))], pa.string())
        table = table.add_column(0, "part", pa.repeat(part, len(table)))
        return table.add_column(0, "id", ids)

    def _read_file(
        self, name: str, folder: Path
    ) -> tuple[Iterator[tuple[str, dict[str, Any]]], dict[str, Any]]:
        document = read_document(self._find_file(name, folder))
        is_test = name.startswith(TSV_NAMES["test"])
        required = self.columns if is_test else (*self.columns, "label")

        def rows() -> Iterator[tuple[str, dict[str, Any]]]:
            number = None
            for number, values in read_tsv(document, required, optional=("label",)):
                place = f"{document.path}, line {number}"
                for column in self.columns:
                    if not values[column].strip():
                        raise ValueError(f"{place}: {column} is empty; the row is truncated")
                yield place, values
            if number is None:
                raise ValueError(f"{document.path} has a header but no rows")

        facts = {"name": document.name, "sha256": document.sha256, "bytes": document.num_bytes}
        return rows(), facts

    def _find_file(self, name: str, folder: Path) -> Path:
        path = find_file(folder, f"{name}.tsv") or find_file(folder, f"{name}_subset.tsv")
        if path is None:
            raise FileNotFoundError(
                f"{folder} has no {name}.tsv or {name}_subset.tsv (plain or .gz), which "
                f"GLUE {self.task} needs; it holds {listing(folder)}"
            )
        return path

    def _read_hub(
        self, name: str, folder: Path
    ) -> tuple[Iterator[tuple[str, dict[str, Any]]], dict[str, Any]]:
        hub_name = name.replace(TSV_NAMES["validation"], "validation")
        file = f"{self.task}/{hub_name}-00000-of-00001.parquet"
        path = folder / file
        rows = (
            (f"{path}, row {number}", values)
            for number, values in read_parquet(path, (*self.columns, "label"))
        )
        facts = {"name": file, "sha256": self.release.files[file], "bytes": path.stat().st_size}
        return rows, facts

    def _label(self, values: Mapping[str, Any], split: str, place: str) -> float | None:
        text = str(values.get("label", HIDDEN)).strip()
        if split == "test" and (not text or text in (HIDDEN, f"{HIDDEN}.0")):
            return None
        if self.labels is not None:
            names = {name: number for number, name in enumerate(self.labels)}
            names |= {str(number): number for number in range(len(self.labels))}
            if text not in names:
                allowed = ", ".join(f"{n} ({name})" for n, name in enumerate(self.labels))
                raise ValueError(
                    f"{place}: label {shorten(text)} of GLUE {self.task}; allowed: {allowed}"
                )
            return names[text]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 5:
            raise ValueError(
                f"{place}: label {shorten(text)} of GLUE {self.task}; allowed: a number from 0 to 5"
            )
        return value

    def _check_hidden(self, rows: Sequence[Row]) -> None:
        hidden = sum(row.label is None for row in rows)
        if 0 < hidden < len(rows):
            raise ValueError(
                f"GLUE {self.task}: {hidden} of {len(rows)} test rows have no label; give all of "
                "them one, or none"
            )
        if hidden:
            logger.warning(
                "GLUE %s: the test set has no labels; predictions are written, nothing is scored",
                self.task,
            )

    def provenance(self) -> dict[str, Any]:
        """See `Task.provenance`; ``complete`` tells whether a file has the official rows."""
        self._of_split("train")
        return self._provenance

    def _of_split(self, split: str) -> Rows[Row]:
        if not self._rows:
            raise RuntimeError("the data are not loaded; call load() first")
        if split not in self._rows:
            raise ValueError(f"split={split!r}; allowed: {', '.join(self._rows)}")
        return self._rows[split]

    # Training

    def examples(self, split: str, tokenizer: Any) -> Examples[Encoded]:
        """Encode a split: ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]`` in the model's own form.

        Args:
            split: ``train``, ``validation`` or ``test``.
            tokenizer: a fast tokenizer with a padding token; its `model_max_length` limits the
                length as `max_length` does.
        """
        table = self._of_split(split).table
        encoded = self._tokens(split, tokenizer)
        names = tuple(encoded.columns)
        ids, labels = table["id"].combine_chunks(), table["label"].to_pylist()
        self._padding = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
        }

        def make(index: int) -> Encoded:
            fields = {name: encoded.row(name, index) for name in names}
            return Encoded(ids[index].as_py(), fields, labels[index])

        return Examples(len(encoded), make)

    def _tokens(self, split: str, tokenizer: Any) -> EncodedSplit:
        """Return the fields of all examples of a split."""
        rows = self._of_split(split)
        limit = min(self.max_length, tokenizer.model_max_length)

        def encode(texts: Sequence[Texts], start: int) -> Block:
            columns = [list(column) for column in zip(*texts, strict=True)]
            fields = _encode(columns, tokenizer)
            too_long = [i for i, ids in enumerate(fields["input_ids"]) if len(ids) > limit]
            if too_long:
                cut = _encode([[c[i] for i in too_long] for c in columns], tokenizer, limit=limit)
                for name, values in cut.items():
                    for index, value in zip(too_long, values, strict=True):
                        fields[name][index] = value
            return Block(fields, too_long)

        texts = rows.table.select(_text_columns(len(self.columns)))
        return self._store.get(
            Split(
                name=f"{self.name}-{split}",
                what=f"examples of {split}",
                version=self.version,
                texts=Rows(texts, lambda *texts: texts),
                encode=encode,
                limit=limit,
                place=lambda index: rows[index].id,
            ),
            tokenizer,
        )

    def length(self, example: Encoded) -> int:
        """Return the number of tokens of an example."""
        return len(example.fields["input_ids"])

    def collate(self, examples: Sequence[Encoded]) -> Batch:
        """Pad to the longest of the batch.

        Returns:
            A batch with ``input_ids``, ``attention_mask`` (and ``token_type_ids``) of (B, T) in
            int64, and ``labels`` (B,), int64 for classes and float32 for a regression.
        """
        lengths = np.array([self.length(example) for example in examples])
        longest = int(lengths.max())
        arrays: dict[str, np.ndarray] = {}
        for name, fill in self._padding.items():
            if name in examples[0].fields:
                arrays[name] = np.full((len(examples), longest), fill, dtype=np.int64)
                for line, example in zip(arrays[name], examples, strict=True):
                    line[: len(example.fields[name])] = example.fields[name]
        arrays["attention_mask"] = (np.arange(longest) < lengths[:, None]).astype(np.int64)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if examples[0].label is not None:
            dtype = torch.float32 if self.labels is None else torch.int64
            tensors["labels"] = torch.tensor([example.label for example in examples], dtype=dtype)
        ids = [example.id for example in examples]
        return Batch(tensors, len(examples), int(lengths.sum()), ids)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return cross-entropy, or squared error in a regression, summed over the examples."""
        logits_BC = self._logits(model, batch)
        labels_B = batch.tensors["labels"]
        if self.labels is None:
            return F.mse_loss(logits_BC[:, 0], labels_B, reduction="sum")
        return F.cross_entropy(
            logits_BC, labels_B, reduction="sum", label_smoothing=label_smoothing
        )

    @staticmethod
    def _logits(model: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.tensors.items() if name != "labels"}
        logits: Tensor = model(**inputs).logits
        return logits.float()

    # Prediction

    def inputs(self, split: str = "validation") -> Rows[Row]:
        """Return the rows of a split."""
        return self._of_split(split)

    @torch.no_grad()
    def predict(
        self,
        model: nn.Module,
        tokenizer: Any,
        split: str = "validation",
        done: Iterable[dict[str, Any]] = (),
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[list[dict[str, Any]]]:
        """Predict a split in chunks of similar length.

        Yields:
            Lists of ``{"id", "input", "prediction"}``: the class number, or the real number of a
            regression; see `Task.predict` for `done` and `share`.
        """
        rows, examples = list(self._of_split(split)), self.examples(split, tokenizer)
        finished = {prediction["id"] for prediction in done}
        lengths = self._tokens(split, tokenizer).lengths("input_ids")
        order = np.argsort(-lengths, kind="stable").tolist()
        size = self.predict_batch_size
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        device = next(model.parameters()).device
        for chunk in own_chunks(chunks, share):
            if all(rows[i].id in finished for i in chunk):
                continue
            logits_BC = self._logits(model, self.collate([examples[i] for i in chunk]).to(device))
            values = logits_BC[:, 0] if self.labels is None else logits_BC.argmax(1)
            yield [
                {"id": rows[i].id, "input": _joined(rows[i]), "prediction": value}
                for i, value in zip(chunk, values.tolist(), strict=True)
                if rows[i].id not in finished
            ]

    # Scoring

    def score(self, predictions: Sequence[dict[str, Any]], split: str = "validation") -> Scores:
        """Score one prediction for each row of `split`.

        Raises:
            ValueError: a prediction is missing, double, unknown or of another input.
        """
        rows = self._of_split(split)
        aligned = align(
            predictions, [row.id for row in rows], split, [_joined(row) for row in rows]
        )
        return self._score(rows, [float(prediction["prediction"]) for prediction in aligned])

    def _score(self, rows: Sequence[Row], values: Sequence[float]) -> Scores:
        labels = [row.label for row in rows if row.label is not None]
        if len(labels) < len(rows):
            reason = f"the {self.scored_split} set has no labels; only predictions are written"
            return Scores({}, {spec.name: reason for spec in self.metrics})
        scores = metrics.score(values, labels, metrics=self._scores)
        for part in self.parts if "accuracy" in self._scores else ():
            chosen = [index for index, row in enumerate(rows) if row.part == part]
            found = metrics.score(
                [values[i] for i in chosen], [labels[i] for i in chosen], metrics=("accuracy",)
            )
            scores.values[f"accuracy_{part}"] = found.values["accuracy"]
        return scores

    def reference_scores(self, split: str = "validation") -> dict[str, Scores]:
        """Return what needs no model: the most frequent class, and a model of word counts."""
        train, rows = self._of_split("train"), self._of_split(split)
        texts, others = [row.texts for row in train], [row.texts for row in rows]
        labels = [row.label for row in train if row.label is not None]
        if self.labels is None:
            counted: Sequence[float] = regress(texts, labels, others)
        else:
            counted = classify(texts, [int(label) for label in labels], others)
        found = {"bag of words": self._score(rows, counted)}
        if self.labels is not None:
            most_frequent = Counter(labels).most_common(1)[0][0]
            found["most frequent class"] = self._score(rows, [most_frequent] * len(rows))
        return found


CLASSIFICATION = tuple(metrics.CLASSIFICATION)
REGRESSION = tuple(metrics.REGRESSION)


def _encode(
    columns: Sequence[list[str]], tokenizer: Any, limit: int | None = None
) -> dict[str, list[list[int]]]:
    """Encode one or two columns; with `limit`, the longer text of a pair is cut first."""
    batch = tokenizer(
        *columns,
        truncation=False if limit is None else "longest_first",
        max_length=limit,
        return_attention_mask=False,
        verbose=False,
    )
    return {name: batch[name] for name in ("input_ids", "token_type_ids") if name in batch}


def _text_columns(count: int) -> list[str]:
    return [f"text_{number}" for number in range(count)]


def _make_row(id: str, part: str, *values: Any) -> Row:
    *texts, label = values
    return Row(id, tuple(texts), label, part)


def _joined(row: Row) -> str:
    return "\t".join(row.texts)
