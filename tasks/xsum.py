"""XSum: from a BBC article to a summary of one sentence (Table 3 of the paper).

Data: Narayan, Cohen, Lapata, "Don't Give Me the Details, Just the Summary!", EMNLP 2018. Set-up:
AdaLoRA's summarisation script for BART-large, whose settings the paper says it takes.

Tokens of an example, with the tokenizer's own begin and end tokens (BART's <s> and </s>)::

    encoder reads   <s> document </s>          at most `max_source_length`, the end is cut off
    decoder writes  <s> summary </s>           at most `max_target_length`
    decoder reads   START <s> summary          START: the model's decoder_start_token_id

Equal inputs are decoded once. Scores are ROUGE of `tasks.metrics.rouge` on the test split; the
script only ever scores the validation split, which `predict` takes too.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from delta_lora.checks import OneOf, Range, check_values
from delta_lora.positions import num_positions
from delta_lora.protocols import Batch, ItemScores, MetricSpec, Scores, Task
from tasks.data import (
    Document,
    check_text,
    file_facts,
    find_file,
    listing,
    of_split,
    read_document,
    read_jsonl,
    read_parquet,
    warn_of_same_files,
)
from tasks.encoded import Block, EncodedSplit, Examples, Split, Store, Texts
from tasks.generation import Seq2SeqBeamSearch
from tasks.metrics import rouge
from tasks.predictions import align, own_chunks
from tasks.rows import Rows, gather
from tasks.seq2seq import Pair, check_start, collate, seq2seq_loss
from tasks.sources import Kind, Release, Seed, Sizes, Source
from tasks.tiny.corpora import xsum as embedded

logger = logging.getLogger(__name__)

#: tokens: begin token, text, end token.
MaxLength = Annotated[int, Range(at_least=3, at_most=2**20)]
#: rows of the official splits.
OFFICIAL_ROWS: dict[str, int] = {"train": 204_045, "validation": 11_332, "test": 11_334}
#: split -> file of the hub's Parquet conversion.
HUB_FILES = {split: f"default/xsum-{split}.parquet" for split in OFFICIAL_ROWS}
#: columns of a split, in the order of `Row`.
_SCHEMA = pa.schema([(column, pa.string()) for column in ("id", "document", "summary", "place")])
#: characters of a document that a prediction repeats.
_KEY_LENGTH = 80


@dataclass(frozen=True)
class Row:
    """One article.

    Attributes:
        id: the BBC's number, or the split and the number of the row where the data have none.
        document: the article.
        summary: its reference, None where a test split has none.
        place: where it came from (``file:line``).
    """

    id: str
    document: str
    summary: str | None
    place: str

    @property
    def key(self) -> str:
        """What identifies the document: its beginning and its sha1."""
        digest = hashlib.sha1(self.document.encode(), usedforsecurity=False).hexdigest()
        return f"{' '.join(self.document[:_KEY_LENGTH].split())} [sha1 {digest}]"


class XSum(Task):
    """The XSum task.

    Args:
        source: ``hub`` downloads the official splits, ``files`` reads `data_dir`, ``embedded``
            writes a corpus of the same form from a grammar; see `tasks.sources`.
        release: the pinned Parquet files of the hub, `HUB_FILES`; needed by ``hub``.
        data_dir: folder with ``train``, ``validation`` and ``test``, each as ``.jsonl`` or
            ``_subset.jsonl``, plain or ``.gz``; only with ``files``.
        cache_dir: where downloads and encoded data are kept; None takes the user's cache folder.
        max_source_length: tokens of a document; longer ones lose their end, which is logged.
        max_target_length: tokens of a summary, likewise.
        decoding: settings of the beam search; None takes its defaults.
        aggregate: ``mean`` or ``bootstrap``, see `tasks.metrics.rouge`.
        max_rows: split -> how many of its first articles are used, which is logged and recorded;
            None uses all.
        embedded_seed: seed of the ``embedded`` corpus; not the seed of the run.
        embedded_sizes: split -> articles of the ``embedded`` corpus; None takes its defaults.

    Raises:
        ValueError: a setting is not allowed, or two do not fit.
    """

    name = "xsum"
    version = 1
    family = "seq2seq_lm"
    metrics = (
        MetricSpec("rouge_1", "ROUGE-1", scale=100),
        MetricSpec("rouge_2", "ROUGE-2", scale=100),
        MetricSpec("rouge_l", "ROUGE-L", scale=100),
        MetricSpec("rouge_lsum", "ROUGE-Lsum", scale=100),
    )

    def __init__(
        self,
        *,
        source: Kind = "hub",
        release: Release | None = None,
        data_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        max_source_length: MaxLength = 768,
        max_target_length: MaxLength = 64,
        decoding: Seq2SeqBeamSearch | None = None,
        aggregate: Annotated[str, OneOf(rouge.AGGREGATES)] = "mean",
        max_rows: Mapping[str, Annotated[int, Range(at_least=1, at_most=10**9)]] | None = None,
        embedded_seed: Seed = 0,
        embedded_sizes: Sizes | None = None,
    ):
        check_values(XSum.__init__, locals(), prefix="task.")
        self.source = Source(
            kind=source,
            write=embedded.write,
            release=release,
            data_dir=data_dir,
            cache_dir=cache_dir,
            embedded_seed=embedded_seed,
            embedded_sizes=embedded_sizes,
            splits=tuple(embedded.DEFAULT_SIZES),
            needed=HUB_FILES.values(),
        )
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.decoding = Seq2SeqBeamSearch() if decoding is None else decoding
        self.aggregate = aggregate
        self.max_rows = dict(max_rows or {})
        if unknown := set(self.max_rows) - set(OFFICIAL_ROWS):
            raise ValueError(
                f"task.max_rows={self.max_rows} names {', '.join(sorted(unknown))}; it may name "
                f"{', '.join(OFFICIAL_ROWS)}"
            )
        self._rows: dict[str, Rows[Row]] = {}
        self._store = Store("XSum", self.source.encoded_folder)
        self._provenance: dict[str, Any] = {}
        self._truncated: dict[str, int] = {}

    # Loading

    def load(self) -> None:
        """Read all splits; see `Task.load`."""
        read = self._read_hub if self.source.kind == "hub" else self._read
        with self.source.open() as folder:
            rows, files = read(folder)
        for split, count in self.max_rows.items():
            if len(rows[split]) > count:
                logger.warning(
                    "using the first %d of %d rows of %s", count, len(rows[split]), split
                )
                rows[split] = rows[split][:count]
        for split, items in rows.items():
            _check_ids(items, split)
        self._rows, self._truncated = rows, {}
        self._store = Store("XSum", self.source.encoded_folder)
        self._warn_of_overlap()
        self._provenance = {
            **self.source.facts(),
            "aggregate": self.aggregate,
            "files": files,
            "rows": {split: len(items) for split, items in rows.items()},
            **({"max_rows": self.max_rows} if self.max_rows else {}),
        }
        counts = ", ".join(f"{split} {len(items):,}" for split, items in rows.items())
        logger.info("XSum (%s): %s rows", self.source.kind, counts)
        if not self._has_references("test"):
            logger.warning("the test split has no summaries: predictions only, no scores")

    def _read(self, folder: Path) -> tuple[dict[str, Rows[Row]], list[dict[str, Any]]]:
        rows: dict[str, Rows[Row]] = {}
        files = []
        for split, path in _find(folder).items():
            document, official = read_document(path), OFFICIAL_ROWS[split]
            rows[split] = Rows(gather(_parse(split, document), _SCHEMA), Row)
            num_rows = len(rows[split])
            if self.source.kind == "files" and num_rows != official:
                logger.warning(
                    "%s has %d of the %d rows of the official %s split: scores are not comparable "
                    "with published ones",
                    path, num_rows, official, split,
                )  # fmt: skip
            # The official release names its articles but holds no texts, so no checksum exists.
            files.append({**file_facts(document, num_rows, None), "official_rows": official})
        warn_of_same_files(files)
        return rows, files

    def check_source(self) -> None:
        """See `Task.check_source`."""
        self.source.check(_find)

    def _read_hub(self, folder: Path) -> tuple[dict[str, Rows[Row]], list[dict[str, Any]]]:
        revision = self.source.facts()["revision"]
        rows: dict[str, Rows[Row]] = {}
        files = []
        for split, official in OFFICIAL_ROWS.items():
            name = HUB_FILES[split]
            stream = read_parquet(folder / name, ("document", "summary", "id"))
            found = gather(
                (
                    {**row, "id": str(row["id"]), "place": f"{split}:{number}"}
                    for number, row in stream
                ),
                _SCHEMA,
            )
            if len(found) != official:
                raise ValueError(
                    f"{revision}: {len(found):,} rows in {split}, officially {official:,}; another "
                    "revision of the data set, or a download that ended early"
                )
            for number, summary in enumerate(_texts(found, "summary"), start=1):
                if not summary.strip():
                    raise ValueError(f"{revision}, {split}, row {number}: the summary is empty")
            if num_empty := sum(not document.strip() for document in _texts(found, "document")):
                logger.warning(
                    "%d documents of the official %s split are empty; they are kept",
                    num_empty,
                    split,
                )
            rows[split] = Rows(found, Row)
            files.append(
                {
                    "name": name,
                    "sha256": self.source.official(name),
                    "bytes": (folder / name).stat().st_size,
                    "rows": official,
                    "official": True,
                }
            )
        return rows, files

    def _warn_of_overlap(self) -> None:
        train = set(map(_digest, _texts(self._rows["train"].table, "document")))
        for split in ("validation", "test"):
            documents = _texts(self._rows[split].table, "document")
            if shared := sum(_digest(document) in train for document in documents):
                logger.warning(
                    "%d of %d documents of %s also occur in train",
                    shared,
                    len(self._rows[split]),
                    split,
                )

    def provenance(self) -> dict[str, Any]:
        """See `Task.provenance`; ``official`` tells whether a split is known to be the real one."""
        self.inputs("train")
        return self._provenance

    def inputs(self, split: str = "test") -> Rows[Row]:
        """Return the rows of a split, which `predict` reads.

        Raises:
            RuntimeError: nothing is loaded.
            ValueError: there is no such split.
        """
        return of_split(self._rows, split)

    def _has_references(self, split: str) -> bool:
        return self.inputs(split)[0].summary is not None

    # Training

    def examples(self, split: str, tokenizer: Any) -> Examples[Pair]:
        """Encode a split, see the module's text for the layout.

        Args:
            split: ``train``, ``validation`` or ``test``.
            tokenizer: a fast tokenizer that puts an end token behind a text; its
                `model_max_length` (the positions of its model) limits lengths too.

        Raises:
            ValueError: the split has no summaries, or the tokenizer adds no end token.
        """
        table = self.inputs(split).table
        if table["summary"].null_count:
            raise ValueError(f"the {split} split has no summaries, so there is no loss on it")
        sources = self._documents(split, tokenizer)
        targets = self._encoded(split, "summary", "summaries", self.max_target_length, tokenizer)
        places = table["place"].combine_chunks()

        def make(index: int) -> Pair:
            place: str = places[index].as_py()
            return Pair(place, sources.row("tokens", index), targets.row("tokens", index))

        return Examples(len(sources), make)

    def _documents(self, split: str, tokenizer: Any) -> EncodedSplit:
        return self._encoded(split, "document", "documents", self.max_source_length, tokenizer)

    def _encoded(
        self, split: str, column: str, plural: str, max_length: int, tokenizer: Any
    ) -> EncodedSplit:
        """Return the token ids of each text of a column, cut with their end token kept."""
        rows = self.inputs(split)
        limit = min(max_length, tokenizer.model_max_length)

        def encode(texts: Sequence[Texts], start: int) -> Block:
            batch = tokenizer(
                list(texts), truncation=True, max_length=limit, return_attention_mask=False
            )
            ids = batch["input_ids"]
            if not ids[0] or ids[0][-1] != tokenizer.eos_token_id:
                raise ValueError(
                    "the tokenizer puts no end token behind a text, so that the decoder would "
                    "never learn to stop; take the tokenizer of an encoder-decoder model"
                )
            cut = [n for n, encoding in enumerate(batch.encodings) if encoding.overflowing]
            return Block({"tokens": ids}, cut)

        encoded = self._store.get(
            Split(
                name=f"{self.name}-{split}-{plural}",
                what=f"{split} {plural}",
                version=self.version,
                texts=_texts(rows.table, column),
                encode=encode,
                limit=limit,
                place=lambda index: rows[index].place,
            ),
            tokenizer,
        )
        self._truncated[f"{split} {plural}"] = encoded.num_cut
        return encoded

    def length(self, example: Pair) -> int:
        """Return the number of tokens of a document, which decide the padding."""
        return len(example.source)

    def collate(self, examples: Sequence[Pair]) -> Batch:
        """Make a padded batch, see `tasks.seq2seq`."""
        return collate(examples)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss summed over the tokens of the summaries."""
        return seq2seq_loss(model, batch, label_smoothing)

    # Decoding

    def predict(
        self,
        model: Any,
        tokenizer: Any,
        split: str = "test",
        done: Iterable[dict[str, Any]] = (),
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[list[dict[str, Any]]]:
        """Summarise every document, equal ones once, in chunks of similar length.

        Yields:
            Lists of ``{"id", "input", "prediction"}``, where ``input`` is `Row.key`; see
            `Task.predict` for `done` and `share`.
        """
        rows = self.inputs(split)
        ids = rows.table["id"].to_pylist()
        sources = self._documents(split, tokenizer)
        same: dict[bytes, list[int]] = {}
        for index in range(len(sources)):
            same.setdefault(sources.row("tokens", index).tobytes(), []).append(index)
        groups = list(same.values())
        finished = {prediction["id"] for prediction in done}
        lengths = sources.lengths("tokens").tolist()
        chunks = self.decoding.chunks([lengths[group[0]] for group in groups])
        logger.info(
            "decoding %d documents of %s (%d different) in %d chunks",
            len(rows),
            split,
            len(groups),
            len(chunks),
        )
        for chunk in own_chunks(chunks, share):
            members = [groups[number] for number in chunk]
            if all(ids[index] in finished for group in members for index in group):
                continue
            texts = [_tensor(sources, group[0]) for group in members]
            outputs = self.decoding.generate(model, texts)
            yield [
                {
                    "id": ids[index],
                    "input": rows[index].key,
                    "prediction": tokenizer.decode(
                        output, skip_special_tokens=True, clean_up_tokenization_spaces=False
                    ).strip(),
                }
                for group, output in zip(members, outputs, strict=True)
                for index in group
                if ids[index] not in finished
            ]

    def check_model(self, model: nn.Module, tokenizer: Any = None) -> None:
        """See `Task.check_model`: source and output must find room, and have tokens that end."""
        check_start(model)
        positions = num_positions(model.config)
        if positions is not None:
            self.decoding.check_room(positions)
        if tokenizer is not None:
            self.decoding.settings(model)
            if positions is not None:
                lengths = self._documents(self.scored_split, tokenizer).lengths("tokens")
                self.decoding.check_source(int(lengths.max()), positions)

    def describe(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Return how many texts lose their end, and the settings of decoding with their origin."""
        self._documents(self.scored_split, tokenizer)
        return {
            "truncated": dict(sorted(self._truncated.items())),
            "generation": self.decoding.settings(model)[1],
        }

    # Scoring

    def score(self, predictions: Sequence[dict[str, Any]], split: str = "test") -> Scores:
        """Score one prediction for each document of `split` against its summary.

        Returns:
            The four ROUGE scores; all of them missing where the split has no summaries.

        Raises:
            ValueError: a prediction is missing, double, unknown or of another document.
        """
        texts, summaries = self._aligned(predictions, split)
        missing = self._without_summaries(split)
        if missing:
            return Scores({}, missing)
        names = [spec.name for spec in self.metrics]
        return rouge.score(texts, summaries, metrics=names, aggregate=self.aggregate)

    def item_scores(self, predictions: Sequence[dict[str, Any]], split: str = "test") -> ItemScores:
        """See `Task.item_scores`; the scores are means, whatever `aggregate` is."""
        texts, summaries = self._aligned(predictions, split)
        missing = self._without_summaries(split)
        if missing:
            return ItemScores(len(texts), missing=missing)
        return rouge.item_scores(texts, summaries, metrics=[spec.name for spec in self.metrics])

    def _aligned(
        self, predictions: Sequence[dict[str, Any]], split: str
    ) -> tuple[list[str], list[str]]:
        """Return one text for each document of `split`, and the documents' summaries."""
        rows = self.inputs(split)
        aligned = align(predictions, [row.id for row in rows], split, [row.key for row in rows])
        return [each["prediction"] for each in aligned], [row.summary or "" for row in rows]

    def _without_summaries(self, split: str) -> dict[str, str]:
        """Return why there is no score, by its name; empty where there are summaries."""
        if self._has_references(split):
            return {}
        reason = f"the {split} split has no summaries; score predictions.jsonl where they are known"
        return {spec.name: reason for spec in self.metrics}

    def references(self, split: str = "test") -> dict[str, list[str]]:
        """Return the summary of each document of `split` that has one."""
        return {row.id: [row.summary] for row in self.inputs(split) if row.summary is not None}

    def scores_of_items(
        self, predictions: Sequence[dict[str, Any]], split: str = "test"
    ) -> dict[str, dict[str, float]]:
        """Return the ROUGE scores of each summary, per cent."""
        known, found = self.references(split), {}
        for p in predictions:
            if p["id"] in known:
                values = rouge.score([p["prediction"]], known[p["id"]]).values
                found[p["id"]] = {s.label: s.scale * values[s.name] for s in self.metrics}
        return found


def _find(folder: Path) -> dict[str, Path]:
    """Return the file of each split in `folder`."""
    found: dict[str, Path] = {}
    for split in OFFICIAL_ROWS:
        names = (f"{split}.jsonl", f"{split}_subset.jsonl")
        paths = [path for name in names if (path := find_file(folder, name)) is not None]
        if len(paths) > 1:
            raise ValueError(
                f"{folder} holds both {paths[0].name} and {paths[1].name}; remove one of them"
            )
        if not paths:
            raise FileNotFoundError(
                f"{folder} has no {' or '.join(names)} (plain or .gz); it holds {listing(folder)}; "
                "needed are train, validation and test"
            )
        found[split] = paths[0]
    return found


def _parse(split: str, document: Document) -> Iterator[dict[str, str]]:
    """Yield the values of each line by column; a summary that is not there is left out."""
    needed = ("document",) if split == "test" else ("document", "summary")
    has_summaries = None
    for number, values in read_jsonl(document, needed, ("summary",), raw=("id",)):
        place = f"{document.path}, line {number}"
        name = values.pop("id", None)
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        name = f"{split}-{number:06d}" if name is None else check_text(name, "id", place)
        for key in ("document", "summary"):
            if key in values and not values[key].strip():
                raise ValueError(f"{place}: the {key} is empty; remove or mend the row")
        if has_summaries is None:
            has_summaries = "summary" in values
        if ("summary" in values) != has_summaries:
            raise ValueError(
                f"{place}: {'a' if 'summary' in values else 'no'} summary, but the rows before it "
                "are different; give all of a test split, or none"
            )
        yield {"id": name, **values, "place": f"{document.name}:{number}"}


def _check_ids(rows: Rows[Row], split: str) -> None:
    seen: dict[str, int] = {}
    for index, name in enumerate(_texts(rows.table, "id")):
        if name in seen:
            raise ValueError(
                f"{rows[index].place}: id {name!r} of {split} is also that of "
                f"{rows[seen[name]].place}; each article needs its own, or none"
            )
        seen[name] = index


def _texts(table: pa.Table, column: str) -> Rows[str]:
    """Return one column of texts."""
    return Rows(table.select([column]), lambda text: text)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _tensor(encoded: EncodedSplit, index: int) -> Tensor:
    """Return (tokens,) int32, a copy: what is mapped from a file cannot be a tensor."""
    return torch.from_numpy(encoded.row("tokens", index).copy())
