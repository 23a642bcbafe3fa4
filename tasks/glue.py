"""GLUE: eight sentence and sentence-pair tasks for an encoder with a new head (Table 4).

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform", ICLR 2019. Set-up:
microsoft/LoRA, examples/NLU, with the length of 256 that the Delta-LoRA paper states.

Which sentences, labels and scores a task has stands in configs/task/glue/<task>.yaml; a further
task of this kind is a further yaml. The labels of the official test sets are not public, so papers
report the dev set, and the best epoch is chosen on that same set: what they call a result is a
maximum. The record holds the best and the last epoch.

Files are TSV without quoting, ``train.tsv``, ``dev.tsv`` (MNLI: ``dev_matched.tsv`` and
``dev_mismatched.tsv``) and, where it is scored, ``test.tsv``; plain or ``.gz``, in `data_dir` or in
its folder of the task's name. Columns are the hub's or those of the official archives; other forms
are in `tasks.glue_layouts`. A file ``<name>_subset.tsv`` is read where there is no complete one,
which is said in the log and in every record.

Shapes: B examples of at most T tokens, C classes (1 for a regression).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delta_lora.checks import NAME, NOT_EMPTY, OneOf, Range, check_values
from delta_lora.protocols import Batch, ItemScores, MetricSpec, Scores, Task
from tasks.bag_of_words import classify, regress
from tasks.data import of_split
from tasks.encoded import Block, EncodedSplit, Examples, Split, Store, Texts
from tasks.generation import NumSequences
from tasks.glue_files import SPLITS, GlueFiles, Row, text_columns
from tasks.metrics import glue as metrics
from tasks.metrics.items import mean
from tasks.predictions import align, chosen, describe_part, own_chunks
from tasks.rows import Rows
from tasks.sources import Kind, MaxInputs, Release, Seed, Sizes, Source
from tasks.tiny.corpora import glue as embedded

logger = logging.getLogger(__name__)

METRIC_LABELS = {
    "accuracy": "Accuracy", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson",
    "spearman": "Spearman",
}  # fmt: skip


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
        num_rows: rows of the complete files, by file name without suffix; what is not named is
            not compared.
        release: the pinned files; needed by ``hub``.
        parts: names of the parts of the dev set (``matched``, ``mismatched``), or empty. Accuracy
            is then also given for each part.
        source: ``hub`` downloads the release, ``files`` reads `data_dir`, ``embedded`` writes a
            corpus of the same form from a grammar; see `tasks.sources`.
        data_dir: folder with the files, or with a folder of the task's name; only with ``files``.
        cache_dir: where downloads and encoded data are kept; None takes the user's cache folder.
        max_length: tokens of an example; the longer sentence is cut first, which is logged.
        scored_split: ``validation``, as papers do, or ``test``, whose labels may be hidden.
        predict_batch_size: examples at once when predicting; changes nothing but speed.
        max_inputs: rows of a split that are predicted and scored, evenly spaced over it, also those
            that choose the best epoch; the loss there is of all rows. None: all.
        embedded_seed: seed of the ``embedded`` corpus; not the seed of the run.
        embedded_sizes: split -> rows of the ``embedded`` corpus; None takes its defaults.
        head: modules of the model that are new.

    Raises:
        ValueError: a setting is not allowed, or two do not fit.
    """

    version = 1
    family = "sequence_classification"

    def __init__(
        self,
        *,
        task: Annotated[str, NAME],
        columns: Sequence[Annotated[str, NOT_EMPTY]],
        labels: Sequence[Annotated[str, NOT_EMPTY]] | None,
        metrics: Sequence[Annotated[str, OneOf(tuple(METRIC_LABELS))]],
        num_rows: Mapping[str, Annotated[int, Range(at_least=1, at_most=10**9)]] = MappingProxyType(
            {}
        ),
        release: Release | None = None,
        parts: Sequence[Annotated[str, NAME]] = (),
        source: Kind = "hub",
        data_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        max_length: Annotated[int, Range(at_least=6, at_most=2**20)] = 256,
        scored_split: Annotated[str, OneOf(SPLITS[1:])] = "validation",
        predict_batch_size: NumSequences = 64,
        max_inputs: MaxInputs | None = None,
        embedded_seed: Seed = 0,
        embedded_sizes: Sizes | None = None,
        head: Sequence[Annotated[str, NOT_EMPTY]] = ("classifier",),
    ) -> None:
        check_values(Glue.__init__, locals(), prefix="task.")
        _check_names(columns, labels, metrics, parts, head)
        if source == "embedded" and task not in embedded.LAYOUTS:
            raise ValueError(
                f"task.task={task!r} has no embedded corpus; use one of "
                f"{', '.join(embedded.LAYOUTS)}, or task.source=files"
            )
        if source != "files" and task in embedded.LAYOUTS:  # own files have the parts they have
            _check_parts(task, parts)
        self.source = Source(
            kind=source,
            write=partial(embedded.write, task=task),
            release=release,
            data_dir=data_dir,
            cache_dir=cache_dir,
            embedded_seed=embedded_seed,
            embedded_sizes=embedded_sizes,
            splits=tuple(embedded.LAYOUTS[task].sizes) if task in embedded.LAYOUTS else (),
        )
        self.scored_split = scored_split
        if scored_split == "test" and source != "files":
            raise ValueError(
                f"task.scored_split=test with task.source={source}: only your own files can have a "
                "test set; use task.source=files, or task.scored_split=validation"
            )
        self.task = task
        self.name = f"glue_{task}"
        self.columns = tuple(columns)
        self.labels = None if labels is None else tuple(labels)
        self.parts = tuple(parts)
        self._files = GlueFiles(
            source=self.source,
            task=task,
            columns=self.columns,
            labels=self.labels,
            num_rows=num_rows,
            parts=self.parts,
            splits=SPLITS if scored_split == "test" else SPLITS[:2],
        )
        # Two special tokens round one sentence, up to four with a pair, and one token of each.
        self.max_length = max_length
        self.predict_batch_size = predict_batch_size
        self.max_inputs = max_inputs
        self.head = tuple(head)
        self.selection_metric = metrics[0]
        self.metrics = _metric_specs(metrics, self.parts)
        self.model_config = _model_config(self.labels)
        self._scores = tuple(metrics)
        self._rows: dict[str, Rows[Row]] = {}
        self._store = Store(f"GLUE {self.task}", self.source.encoded_folder)
        self._padding: dict[str, int] = {}
        self._provenance: dict[str, Any] = {}

    # Loading

    def check_source(self) -> None:
        """See `Task.check_source`."""
        self._files.check()

    def load(self) -> None:
        """Read train and dev set, and the test set where it is scored; see `Task.load`."""
        self._rows, files = self._files.read()
        self._store = Store(f"GLUE {self.task}", self.source.encoded_folder)
        self._provenance = {
            **self.source.facts(),
            "scored_split": self.scored_split,
            "files": files,
            "rows": {split: len(rows) for split, rows in self._rows.items()},
            **describe_part(self.scored_split, len(self._rows[self.scored_split]), self.max_inputs),
        }
        logger.info(
            "GLUE %s (%s): %s", self.task, self.source.kind,
            ", ".join(f"{split} {len(rows):,} rows" for split, rows in self._rows.items()),
        )  # fmt: skip

    def provenance(self) -> dict[str, Any]:
        """See `Task.provenance`; ``complete`` tells whether a file has the official rows."""
        self.inputs("train")
        return self._provenance

    # Training

    def examples(self, split: str, tokenizer: Any) -> Examples[Encoded]:
        """Encode a split: ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]`` in the model's own form.

        Args:
            split: ``train``, ``validation`` or ``test``.
            tokenizer: a fast tokenizer with a padding token; its `model_max_length` limits the
                length as `max_length` does.

        Raises:
            ValueError: the tokenizer has no padding token.
        """
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has neither a padding token nor an end token to pad with; set "
                "pad_token in tokenizer_config.json, or take the tokenizer of an encoder"
            )
        table = of_split(self._rows, split).table
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
        rows = of_split(self._rows, split)
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

        texts = rows.table.select(text_columns(len(self.columns)))
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
        """Return the rows of a split, of a part those that it has."""
        rows = of_split(self._rows, split)
        if split == "train" or self.max_inputs is None:
            return rows
        return rows.take(chosen(len(rows), self.max_inputs))

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
        rows, examples = list(self.inputs(split)), self.examples(split, tokenizer)
        places = chosen(len(examples), self.max_inputs)
        finished = {prediction["id"] for prediction in done}
        lengths = self._tokens(split, tokenizer).lengths("input_ids")[list(places)]
        order = np.argsort(-lengths, kind="stable").tolist()
        size = self.predict_batch_size
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        device = next(model.parameters()).device
        for chunk in own_chunks(chunks, share):
            if all(rows[i].id in finished for i in chunk):
                continue
            batch = self.collate([examples[places[i]] for i in chunk]).to(device)
            logits_BC = self._logits(model, batch)
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
        return self._score(*self._aligned(predictions, split))

    def item_scores(
        self, predictions: Sequence[dict[str, Any]], split: str = "validation"
    ) -> ItemScores:
        """See `Task.item_scores`."""
        rows, values = self._aligned(predictions, split)
        labels = [row.label for row in rows if row.label is not None]
        if len(labels) < len(rows):
            return ItemScores(len(rows), missing=self._score(rows, values).missing)
        found = metrics.item_scores(values, labels, metrics=self._scores)
        right = found.values.get("accuracy")
        if right is None:
            return found
        places = {p: [i for i, row in enumerate(rows) if row.part == p] for p in self.parts}
        of_parts = {f"accuracy_{p}": mean(right, own) for p, own in places.items() if own}
        return replace(found, of_sets={**found.of_sets, **of_parts})

    def _aligned(
        self, predictions: Sequence[dict[str, Any]], split: str
    ) -> tuple[Sequence[Row], list[float]]:
        """Return the rows of a split, and one predicted value for each."""
        rows = self.inputs(split)
        aligned = align(
            predictions, [row.id for row in rows], split, [_joined(row) for row in rows]
        )
        return rows, [float(prediction["prediction"]) for prediction in aligned]

    def references(self, split: str = "validation") -> dict[str, list[str]]:
        """Return the label of each row of `split` that has one."""
        rows = self.inputs(split)
        return {row.id: [f"{row.label:g}"] for row in rows if row.label is not None}

    def scores_of_items(
        self, predictions: Sequence[dict[str, Any]], split: str = "validation"
    ) -> dict[str, dict[str, float]]:
        """Return whether each class is the right one: 1 or 0; of real numbers nothing."""
        if self.labels is None:
            return {}
        labels = {row.id: row.label for row in self.inputs(split)}
        return {
            p["id"]: {"correct": float(float(p["prediction"]) == labels[p["id"]])}
            for p in predictions
            if labels[p["id"]] is not None
        }

    def _score(self, rows: Sequence[Row], values: Sequence[float]) -> Scores:
        labels = [row.label for row in rows if row.label is not None]
        if len(labels) < len(rows):
            reason = f"the {self.scored_split} set has no labels; only predictions are written"
            return Scores({}, {spec.name: reason for spec in self.metrics})
        scores = metrics.score(values, labels, metrics=self._scores)
        for part in self.parts if "accuracy" in self._scores else ():
            own = [index for index, row in enumerate(rows) if row.part == part]
            if not own:
                scores.missing[f"accuracy_{part}"] = f"no row is of the part {part}"
                continue
            found = metrics.score(
                [values[i] for i in own], [labels[i] for i in own], metrics=("accuracy",)
            )
            scores.values[f"accuracy_{part}"] = found.values["accuracy"]
        return scores

    def reference_scores(self, split: str = "validation") -> dict[str, Scores]:
        """Return what needs no model: the most frequent class, and a model of word counts."""
        train, rows = self.inputs("train"), self.inputs(split)
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


def _check_names(
    columns: Sequence[str],
    labels: Sequence[str] | None,
    metrics: Sequence[str],
    parts: Sequence[str],
    head: Sequence[str],
) -> None:
    """Refuse names that do not fit one another; arguments as of `Glue`."""
    for name, names in (
        ("columns", columns), ("labels", labels or ()), ("metrics", metrics), ("parts", parts),
        ("head", head),
    ):  # fmt: skip
        if len(set(names)) < len(names):
            raise ValueError(f"task.{name}={list(names)} has one twice; name each once")
    if labels is not None and len(labels) < 2:
        raise ValueError(
            f"task.labels={list(labels)}: a class needs another one beside it; write at least two "
            "labels, or null for a regression"
        )
    if len(columns) not in (1, 2):
        raise ValueError(
            f"task.columns={list(columns)}: a task has one or two sentences; write the names of "
            "their columns"
        )
    allowed = CLASSIFICATION if labels is not None else REGRESSION
    if not metrics or any(name not in allowed for name in metrics):
        kind = "a regression (task.labels=None)" if labels is None else "classes (task.labels)"
        raise ValueError(f"task.metrics={list(metrics)} for {kind}; allowed: {', '.join(allowed)}")


def _check_parts(task: str, parts: Sequence[str]) -> None:
    """Refuse parts of a dev set that the files of GLUE have not."""
    known = embedded.LAYOUTS[task].parts
    if not set(parts) <= set(known) or bool(parts) != bool(known):
        have = f"the parts {', '.join(known)}" if known else "no parts"
        raise ValueError(
            f"task.parts={list(parts)}: the dev set of GLUE {task} has {have}; write "
            f"task.parts=[{','.join(known)}]"
        )


def _metric_specs(names: Sequence[str], parts: Sequence[str]) -> tuple[MetricSpec, ...]:
    """Return the scores in table order; accuracy is also given for each part of the dev set."""
    whole = [MetricSpec(name, METRIC_LABELS[name], scale=100) for name in names]
    split = [MetricSpec(f"accuracy_{p}", f"Accuracy, {p}", scale=100) for p in parts]
    return (*whole, *(split if "accuracy" in names else ()))


def _model_config(labels: Sequence[str] | None) -> dict[str, Any]:
    """Return what the head needs; no labels mean a regression."""
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(labels),
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }


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


def _joined(row: Row) -> str:
    return "\t".join(row.texts)
