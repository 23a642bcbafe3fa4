"""WebNLG 2017: from a set of RDF triples to a text (Table 2 of the paper).

Data: Gardent, Shimorina, Narayan, Perez-Beltrachini, "The WebNLG Challenge", INLG 2017;
CC BY-NC-SA 4.0. Set-up: microsoft/LoRA, examples/NLG, which the paper says it keeps; token layout
and decoding are those of `tasks.data_to_text`.

1. An input is the ``modifiedtripleset`` of an entry, ``subject : property : object`` joined by
   `` | ``, names as they stand. Every lexicalisation whose comment is ``good`` is a row; entries
   without one give none.
2. An entry is *seen* where its category occurs in train. In the official data these are ten of
   fifteen categories; about half of the test entries are unseen.
3. All scores are given for seen, unseen and all entries of the test set, each set by itself.

Two protocols score the same texts, and their scores must not be compared; they are two tasks in
every record (see `tasks.metrics.webnlg`):

- ``lora`` (record name ``webnlg``): what the papers' tables use.
- ``challenge_2017`` (record name ``webnlg_challenge_2017``): as the challenge scored it, without
  its TER.

Two file layouts give the same rows: the official JSON, and one object a line (see `parse_lines`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from delta_lora.checks import OneOf, check_values
from delta_lora.protocols import ItemScores, MetricSpec, Scores
from tasks.data import (
    Document,
    check_text,
    find_file,
    json_of,
    listing,
    of_split,
    read_lines,
    shorten,
)
from tasks.data_to_text import DataToText, Input, MaxLength, Row
from tasks.generation import BeamSearch
from tasks.metrics import webnlg as metrics
from tasks.sources import Kind, MaxInputs, Release, Seed, Sizes, Source
from tasks.tiny.corpora import webnlg as embedded

logger = logging.getLogger(__name__)

#: split -> file name without its ending; the names of the official release.
FILES: dict[str, str] = {"train": "train", "validation": "dev", "test": "test"}
#: ending of the official layout, then of the flattened one.
LAYOUTS = ("json", "jsonl")
PROTOCOLS = tuple(metrics.METRICS)
PARTS = ("seen", "unseen", "all")
#: comment of the lexicalisations that count.
GOOD = "good"


@dataclass(frozen=True)
class Entry:
    """One set of triples.

    Attributes:
        key: its name in the file.
        category: what it is about.
        context: its triples, linearised.
        texts: its good texts, stripped.
        num_rejected: texts marked otherwise.
    """

    key: str
    category: str
    context: str
    texts: tuple[str, ...]
    num_rejected: int


class WebNLG(DataToText):
    """The WebNLG 2017 task.

    Args:
        source: ``hub`` downloads the release, ``files`` reads `data_dir`, ``embedded`` writes a
            corpus of the same form from a grammar; see `tasks.sources`.
        release: the pinned files; needed by ``hub``.
        data_dir: folder with ``train``, ``dev`` and ``test``, all as ``.json`` or all as
            ``.jsonl``, plain or ``.gz``; only with ``files``.
        cache_dir: where downloads and encoded data are kept; None takes the user's cache folder.
        protocol: ``lora`` or ``challenge_2017``; only the scores differ.
        max_length: tokens of a sequence; longer ones lose their end, which is logged.
        decoding: settings of the beam search; None takes its defaults.
        max_inputs: inputs of a split that are decoded and scored, evenly spaced over it; None: all.
        embedded_seed: seed of the ``embedded`` corpus; not the seed of the run.
        embedded_sizes: split -> entries of the ``embedded`` corpus; None takes its defaults.

    Raises:
        ValueError: a setting is not allowed, or two do not fit.
    """

    title = "WebNLG"
    version = 1
    shared_inputs = MappingProxyType({"validation": 11, "test": 10})

    def __init__(
        self,
        *,
        source: Kind = "hub",
        release: Release | None = None,
        data_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        protocol: Annotated[str, OneOf(PROTOCOLS)] = "lora",
        max_length: MaxLength = 512,
        decoding: BeamSearch | None = None,
        max_inputs: MaxInputs | None = None,
        embedded_seed: Seed = 0,
        embedded_sizes: Sizes | None = None,
    ):
        check_values(WebNLG.__init__, locals(), prefix="task.")
        super().__init__(
            source=Source(
                kind=source,
                write=embedded.write,
                release=release,
                data_dir=data_dir,
                cache_dir=cache_dir,
                embedded_seed=embedded_seed,
                embedded_sizes=embedded_sizes,
                splits=tuple(embedded.DEFAULT_SIZES),
                needed=[f"{name}.json" for name in FILES.values()],
            ),
            protocol=protocol,
            max_length=max_length,
            decoding=decoding,
            max_inputs=max_inputs,
        )
        self._counts: dict[str, dict[str, int]] = {}

        self.name = "webnlg" if protocol == "lora" else f"webnlg_{protocol}"
        suffix = "" if protocol == "lora" else f" ({protocol})"
        labels = {"bleu": "BLEU", "meteor": "METEOR", "ter": "TER"}
        self.metrics = tuple(
            MetricSpec(
                f"{metric}_{part}",
                f"{labels[metric]} {part}{suffix}",
                scale=100 if metric == "bleu" else 1,
                higher_is_better=metric != "ter",
            )
            for metric in metrics.METRICS[protocol]
            for part in PARTS
        )

    def _find(self, folder: Path) -> dict[str, Path]:
        """Return the files of the first layout that is complete, see `LAYOUTS`."""
        found = {
            layout: {
                split: path
                for split, name in FILES.items()
                if (path := find_file(folder, f"{name}.{layout}")) is not None
            }
            for layout in LAYOUTS
        }
        complete = [layout for layout in LAYOUTS if len(found[layout]) == len(FILES)]
        if not complete:
            raise FileNotFoundError(
                f"{folder} has neither {' nor '.join(map(_names, LAYOUTS))} (plain or .gz); it "
                f"holds {listing(folder)}; all three files must be of one layout"
            )
        if len(complete) > 1:
            logger.info(
                "%s holds both layouts; reading the official %s, not %s",
                folder,
                _names(complete[0]),
                _names(complete[1]),
            )
        return found[complete[0]]

    def _parse(self, split: str, document: Document) -> list[Row]:
        read = parse_lines if document.name.endswith(".jsonl") else parse_json
        entries = list(read(document))
        if not entries:
            raise ValueError(f"{document.path} has no entries; copy the whole file again")
        without = [entry.key for entry in entries if not entry.texts]
        self._counts[split] = {
            "entries": len(entries),
            "without_good_text": len(without),
            "rejected_texts": sum(entry.num_rejected for entry in entries),
        }
        if len(without) == len(entries):
            return self._without_texts(split, document, entries)
        if without:
            logger.info(
                "%s: %d of %d entries have no text marked %r and give no row (first: %s)",
                document.name,
                len(without),
                len(entries),
                GOOD,
                without[0],
            )
        return [
            Row(entry.context, text, f"{document.name}:{entry.key}.{number}", entry.category)
            for entry in entries
            for number, text in enumerate(entry.texts, start=1)
        ]

    def _without_texts(self, split: str, document: Document, entries: Sequence[Entry]) -> list[Row]:
        """Return the inputs of a test split whose texts are held back."""
        if split != "test":
            raise ValueError(
                f"{document.path}: none of {len(entries)} entries has a text marked {GOOD!r}; only "
                "a test split may come without texts"
            )
        logger.warning(
            "%s has no texts: its %d inputs are decoded, but there will be no scores",
            document.path,
            len(entries),
        )
        return [
            Row(entry.context, "", f"{document.name}:{entry.key}", entry.category)
            for entry in entries
        ]

    def _facts(self) -> dict[str, Any]:
        return {
            "seen_categories": sorted(self._seen_categories()),
            "counts": dict(self._counts),
        }

    def _seen_categories(self) -> set[str]:
        return {row.category for row in of_split(self._rows, "train")}

    def _item_values(self, texts: list[str], references: list[list[str]]) -> dict[str, list[float]]:
        if "ter" not in metrics.METRICS[self.protocol]:
            return {}
        parts = {"all": range(len(texts))}
        found = metrics.item_scores(
            texts, references, parts, protocol=self.protocol, metrics=["ter"]
        )
        return {"TER": list(found.values["ter_all"])}

    def _parts(self, items: Sequence[Input]) -> dict[str, list[int]]:
        """Return the numbers of the entries of each part."""
        seen = self._seen_categories()
        return {
            "seen": [i for i, item in enumerate(items) if item.category in seen],
            "unseen": [i for i, item in enumerate(items) if item.category not in seen],
            "all": list(range(len(items))),
        }

    def _item_scores(self, texts: list[str], items: Sequence[Input]) -> ItemScores:
        return metrics.item_scores(
            texts,
            [list(item.references) for item in items],
            self._parts(items),
            protocol=self.protocol,
        )

    def _score(self, texts: list[str], items: Sequence[Input]) -> Scores:
        parts = self._parts(items)
        wanted = {spec.name for spec in self.metrics}
        scores = metrics.score_parts(
            texts,
            [list(item.references) for item in items],
            parts,
            protocol=self.protocol,
            metrics=[
                metric
                for metric in metrics.METRICS[self.protocol]
                if wanted & {f"{metric}_{part}" for part in PARTS}
            ],
        )
        return Scores(
            {name: value for name, value in scores.values.items() if name in wanted},
            {name: reason for name, reason in scores.missing.items() if name in wanted},
        )


def parse_json(document: Document) -> Iterator[Entry]:
    """Yield the entries of an official file, ``{"entries": [{"1": {...}}, {"2": {...}}, ...]}``.

    Of an entry ``category``, ``modifiedtripleset`` (objects with ``subject``, ``property`` and
    ``object``) and ``lexicalisations`` (objects with ``comment`` and ``lex``; an empty list where
    there is no text) are read.

    Raises:
        ValueError: it is no JSON, a key is missing, a value has another type, or a good text is
            empty.
    """
    whole = json_of(document.text, str(document.path), whole=True)
    entries = _get(whole, "entries", list, str(document.path))
    for position, wrapped in enumerate(entries, start=1):
        place = f"{document.path}, entry {position}"
        if not isinstance(wrapped, dict) or len(wrapped) != 1:
            raise ValueError(
                f"{place}: expected an object with one key, the entry's number, got "
                f"{shorten(wrapped)}"
            )
        ((key, value),) = wrapped.items()
        place = f"{document.path}, entry {key}"
        triples = [
            tuple(_get(triple, part, str, place) for part in ("subject", "property", "object"))
            for triple in _get(value, "modifiedtripleset", list, place)
        ]
        texts, num_rejected = [], 0
        for lexicalisation in _get(value, "lexicalisations", list, place):
            comment = _get(lexicalisation, "comment", str, place)
            if not comment.strip():
                raise ValueError(
                    f"{place}: the comment of a text is empty; write {GOOD!r}, or what is wrong "
                    "with the text"
                )
            if comment == GOOD:
                texts.append(_get(lexicalisation, "lex", str, place))
            else:
                num_rejected += 1
        yield _entry(key, _get(value, "category", str, place), triples, texts, num_rejected, place)


def parse_lines(document: Document) -> Iterator[Entry]:
    """Yield the entries of a flattened file, one object a line.

    Read are ``id``, ``category``, ``triples`` (lists of subject, property and object),
    ``references`` (the good texts) and, where it is there, ``rejected`` (the others).

    Raises:
        ValueError: as `parse_json`.
    """
    for number, line in read_lines(document):
        place = f"{document.path}, line {number}"
        value = json_of(line, place)
        triples = []
        for triple in _get(value, "triples", list, place):
            if not isinstance(triple, list) or len(triple) != 3:
                raise ValueError(
                    f"{place}: {shorten(triple)} in 'triples'; expected [subject, property, object]"
                )
            triples.append(tuple(check_text(part, "triples", place) for part in triple))
        texts = [
            check_text(text, "references", place) for text in _get(value, "references", list, place)
        ]
        num_rejected = len(_get({"rejected": []} | value, "rejected", list, place))
        key = str(_get(value, "id", (int, str), place))
        yield _entry(key, _get(value, "category", str, place), triples, texts, num_rejected, place)


def _entry(
    key: str,
    category: str,
    triples: Sequence[tuple[str, ...]],
    texts: Sequence[str],
    num_rejected: int,
    place: str,
) -> Entry:
    if not triples:
        raise ValueError(f"{place}: no triples; an entry needs at least one")
    if not all(part.strip() for part in (category, *chain.from_iterable(triples))):
        raise ValueError(
            f"{place}: the category or a part of a triple is empty; write it, or remove the entry"
        )
    stripped = tuple(" ".join(text.splitlines()).strip() for text in texts)
    if "" in stripped:
        raise ValueError(
            f"{place}: the {stripped.index('') + 1}. good text is empty; remove it or write it"
        )
    context = " | ".join(" : ".join(triple) for triple in triples)
    return Entry(key, category, context, stripped, num_rejected)


def _get(value: Any, key: str, kind: type | tuple[type, ...], place: str) -> Any:
    """Return ``value[key]``, checked."""
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object with {key!r}, got {shorten(value)}")
    if key not in value:
        raise ValueError(
            f"{place}: no {key!r}; the object has {', '.join(map(repr, value)) or 'no keys'}; add "
            "it, or copy the whole file again"
        )
    if not isinstance(value[key], kind) or isinstance(value[key], bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join({str: "text", list: "list", int: "number"}[k] for k in kinds)
        raise ValueError(f"{place}: {key!r} is {shorten(value[key])}; expected a {expected}")
    return check_text(value[key], key, place) if isinstance(value[key], str) else value[key]


def _names(layout: str) -> str:
    return ", ".join(f"{name}.{layout}" for name in FILES.values())
