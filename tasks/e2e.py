"""E2E NLG: from a meaning representation of a restaurant to a text (Table 1 of the paper).

Data: Novikova, Dusek, Rieser, "The E2E Dataset", SIGDIAL 2017; CC BY-SA 4.0. Set-up:
microsoft/LoRA, examples/NLG, which the paper says it keeps; token layout and decoding are those of
`tasks.data_to_text`.

Two protocols use two texts of the same references, and their scores must not be compared (the same
output gains about 1 BLEU by tokenised references). They are two tasks in every record:

- ``lora`` (record name ``e2e``): trains on and scores against microsoft/LoRA's tokenised text; what
  the papers' tables use.
- ``challenge`` (record name ``e2e_challenge``): the raw text of the official CSV, as the E2E
  Challenge scored it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from delta_lora.checks import OneOf, check_values
from delta_lora.protocols import ItemScores, MetricSpec, Scores
from tasks.data import (
    Document,
    find_file,
    listing,
    read_csv,
    read_lines,
    shorten,
    warn_if_cut,
)
from tasks.data_to_text import DataToText, Input, MaxLength, Row
from tasks.generation import BeamSearch
from tasks.metrics import e2e as metrics
from tasks.sources import Kind, MaxInputs, Release, Seed, Sizes, Source
from tasks.tiny.corpora import e2e as embedded

#: split -> file, by protocol; the names of the official releases.
FILES: dict[str, dict[str, str]] = {
    "lora": {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"},
    "challenge": {
        "train": "trainset.csv",
        "validation": "devset.csv",
        "test": "testset_w_refs.csv",
    },
}
NIST_VARIANTS = ("python", "perl")
#: slot of the official CSV -> key in microsoft/LoRA's contexts.
CONTEXT_KEYS: dict[str, str] = {
    "name": "name",
    "eatType": "Type",
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}
_SLOT = re.compile(r"([^\[\],]+)\[([^\[\]]+)\]")


class E2E(DataToText):
    """The E2E NLG task.

    Args:
        source: ``hub`` downloads the release of the protocol, ``files`` reads `data_dir`,
            ``embedded`` writes a corpus of the same form from a grammar; see `tasks.sources`.
        release_lora: the pinned files of ``lora``; needed by ``hub``.
        release_challenge: the pinned files of ``challenge``; likewise.
        data_dir: folder with the protocol's files, plain or ``.gz``; only with ``files``.
        cache_dir: where downloads and encoded data are kept; None takes the user's cache folder.
        protocol: ``lora`` or ``challenge``.
        max_length: tokens of a sequence; longer ones lose their end, which is logged.
        decoding: settings of the beam search; None takes its defaults.
        max_inputs: inputs of a split that are decoded and scored, evenly spaced over it; None: all.
        nist: ``python`` (e2e-metrics with -p, as microsoft/LoRA calls it) or ``perl`` (its
            default); only NIST differs.
        embedded_seed: seed of the ``embedded`` corpus; not the seed of the run.
        embedded_sizes: split -> meaning representations of the ``embedded`` corpus; None takes its
            defaults.

    Raises:
        ValueError: a setting is not allowed, or two do not fit.
    """

    title = "E2E"
    version = 1

    def __init__(
        self,
        *,
        source: Kind = "hub",
        release_lora: Release | None = None,
        release_challenge: Release | None = None,
        data_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        protocol: Annotated[str, OneOf(tuple(FILES))] = "lora",
        max_length: MaxLength = 512,
        decoding: BeamSearch | None = None,
        max_inputs: MaxInputs | None = None,
        nist: Annotated[str, OneOf(NIST_VARIANTS)] = "python",
        embedded_seed: Seed = 0,
        embedded_sizes: Sizes | None = None,
    ):
        check_values(E2E.__init__, locals(), prefix="task.")
        super().__init__(
            source=Source(
                kind=source,
                write=embedded.write,
                release={"lora": release_lora, "challenge": release_challenge}[protocol],
                data_dir=data_dir,
                cache_dir=cache_dir,
                embedded_seed=embedded_seed,
                embedded_sizes=embedded_sizes,
                splits=tuple(embedded.DEFAULT_SIZES),
                needed=FILES[protocol].values(),
                key=f"release_{protocol}",
            ),
            protocol=protocol,
            max_length=max_length,
            decoding=decoding,
            max_inputs=max_inputs,
        )
        self.nist = nist
        self.name = "e2e" if protocol == "lora" else f"e2e_{protocol}"
        suffix = "" if protocol == "lora" else f" ({protocol})"
        self.metrics = (
            MetricSpec("bleu", f"BLEU{suffix}", scale=100),
            MetricSpec("nist", f"NIST{suffix}")
            if nist == "python"
            else MetricSpec("nist_perl", f"NIST, perl{suffix}"),
            MetricSpec("meteor", f"METEOR{suffix}", scale=100),
            MetricSpec("rouge_l", f"ROUGE-L{suffix}", scale=100),
            MetricSpec("cider", f"CIDEr{suffix}"),
        )

    def _find(self, folder: Path) -> dict[str, Path]:
        """Return the protocol's files in `folder`; an error says what else is there."""
        names = FILES[self.protocol]
        found = {split: find_file(folder, name) for split, name in names.items()}
        missing = [name for split, name in names.items() if found[split] is None]
        if not missing:
            return {split: path for split, path in found.items() if path is not None}
        for other, other_names in FILES.items():
            if other != self.protocol and all(find_file(folder, n) for n in other_names.values()):
                hint = f"these are the files of the other protocol: task.protocol={other}"
                break
        else:
            hint = f"task.protocol={self.protocol} needs {', '.join(names.values())}"
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)} (plain or .gz); it holds {listing(folder)}; "
            f"{hint}"
        )

    def _parse(self, split: str, document: Document) -> list[Row]:
        warn_if_cut(document)
        return parse_text(document) if self.protocol == "lora" else parse_csv(document)

    def _facts(self) -> dict[str, Any]:
        return {"nist": self.nist}

    def _item_values(self, texts: list[str], references: list[list[str]]) -> dict[str, list[float]]:
        values = metrics.item_scores(texts, references, metrics=["rouge_l"]).values
        return {
            s.label: [s.scale * value for value in values[s.name]]
            for s in self.metrics
            if s.name in values
        }

    def _score(self, texts: list[str], items: Sequence[Input]) -> Scores:
        references = [list(item.references) for item in items]
        return metrics.score(texts, references, metrics=[spec.name for spec in self.metrics])

    def _item_scores(self, texts: list[str], items: Sequence[Input]) -> ItemScores:
        references = [list(item.references) for item in items]
        return metrics.item_scores(texts, references, metrics=[s.name for s in self.metrics])


def parse_text(document: Document) -> list[Row]:
    """Parse ``context||completion`` lines.

    Raises:
        ValueError: a line has no ``||`` or more than one, or nothing on one side.
    """
    rows = []
    for number, line in read_lines(document):
        parts = line.strip().split("||")
        if len(parts) != 2 or not all(part.strip() for part in parts):
            raise ValueError(
                f"{document.path}, line {number}: expected 'context||completion' with text on "
                f"both sides of one '||', got {shorten(line)}; the line is truncated or of another "
                "format"
            )
        rows.append(Row(parts[0], parts[1].strip(), f"{document.name}:{number}"))
    return rows


def parse_csv(document: Document) -> list[Row]:
    """Parse the official CSV with columns ``mr,ref``.

    White space round a reference is dropped, and a line break within one (two training references
    have one) becomes a space; nothing else of the text changes.

    Raises:
        ValueError: see `tasks.data.read_csv`; a malformed meaning representation; an empty
            reference; no rows.
    """
    rows = []
    for number, (mr, reference) in read_csv(document, ("mr", "ref")):
        place = f"{document.path}, line {number}"
        text = re.sub(r"[ \t]*[\r\n]\s*", " ", reference.strip())
        if not text:
            raise ValueError(f"{place}: the reference is empty; the row is truncated")
        rows.append(Row(context_of(mr, place), text, f"{document.name}:{number}"))
    if not rows:
        raise ValueError(f"{document.path} has a header but no rows; copy it again")
    return rows


def context_of(mr: str, place: str) -> str:
    """Return ``name[X], eatType[Y]`` as microsoft/LoRA writes it: ``name : X | Type : Y``.

    Only the slots' names change; the values stay raw.

    Args:
        mr: meaning representation of the official CSV.
        place: file and line, for the message.

    Raises:
        ValueError: it is not of this form, or a slot is unknown.
    """
    pairs = []
    for part in re.split(r"(?<=\]),\s*", mr.strip()):
        match = _SLOT.fullmatch(part)
        if match is None or match[1] not in CONTEXT_KEYS:
            raise ValueError(
                f"{place}: {shorten(part)} in the meaning representation {shorten(mr)}; expected "
                f"slot[value] pairs joined by commas, with the slots {', '.join(CONTEXT_KEYS)}"
            )
        pairs.append(f"{CONTEXT_KEYS[match[1]]} : {match[2]}")
    return " | ".join(pairs)
