"""E2E NLG: from a meaning representation of a restaurant to a text (Table 1 of the paper).

Data: Novikova, Dusek, Rieser, "The E2E Dataset", SIGDIAL 2017; CC BY-SA 4.0. Set-up:
microsoft/LoRA, examples/NLG, which the paper says it keeps.

Two protocols use two texts of the same references, and their scores must not be compared (the same
output gains about 1 BLEU by tokenised references). They are two tasks in every record:

- ``lora`` (record name ``e2e``): trains on and scores against microsoft/LoRA's tokenised text; what
  the papers' tables use.
- ``challenge`` (record name ``e2e_challenge``): the raw text of the official CSV, as the E2E
  Challenge scored it.

Tokens of an example, with E the end-of-text token (50256 of GPT-2)::

    BPE(context) E BPE(" " + completion) E
    |- only input -| |---- targets ------|

Nothing stands before the context. Prompts for decoding end with the first E.

Beam search: see `tasks.generation` for what differs from the recipe. Each distinct meaning
representation is decoded once; the recipe decodes every row and keeps the last output of a context,
which is the same.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from delta_lora.protocols import Batch, MetricSpec, Scores, Task
from tasks.data import (
    Document,
    Release,
    find_file,
    listing,
    open_folder,
    read_csv,
    read_document,
    read_lines,
    shorten,
)
from tasks.embedded import e2e as embedded
from tasks.generation import BeamSearch
from tasks.language_modeling import TokenSequence, causal_lm_loss, collate, truncate
from tasks.metrics import e2e as metrics

logger = logging.getLogger(__name__)

#: split -> file, by protocol; the names of the official releases.
FILES: dict[str, dict[str, str]] = {
    "lora": {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"},
    "challenge": {
        "train": "trainset.csv",
        "validation": "devset.csv",
        "test": "testset_w_refs.csv",
    },
}
SOURCES = ("hub", "files", "embedded")
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
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Row:
    """One reference: a context, its completion and the place they came from (``file:line``)."""

    context: str
    completion: str
    place: str


@dataclass(frozen=True)
class MeaningRepresentation:
    """A distinct context with all its references, in the order of the file."""

    id: str
    context: str
    references: tuple[str, ...]


class E2E(Task):
    """The E2E NLG task.

    Args:
        source: ``hub`` downloads the pinned release of the protocol, ``files`` reads `data_dir`,
            ``embedded`` writes a corpus of the same form from a grammar.
        data_dir: folder with the protocol's files, plain or ``.gz``; only with ``files``.
        cache_dir: where ``hub`` keeps downloads; None takes the user's cache folder.
        protocol: ``lora`` or ``challenge``.
        release_lora: the pinned files of ``lora``.
        release_challenge: the pinned files of ``challenge``.
        max_length: tokens of a sequence; longer ones lose their end, which is logged.
        decoding: settings of the beam search.
        nist: ``python`` (e2e-metrics with -p, as microsoft/LoRA calls it) or ``perl`` (its
            default); only NIST differs.
        embedded_seed: seed of the ``embedded`` corpus; not the seed of the run.
        embedded_sizes: split -> meaning representations of the ``embedded`` corpus; None takes its
            defaults.

    Raises:
        ValueError: a setting is not allowed, or two do not fit.
    """

    version = 1

    def __init__(
        self,
        *,
        source: str,
        release_lora: Release,
        release_challenge: Release,
        data_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        protocol: str = "lora",
        max_length: int = 512,
        decoding: BeamSearch | None = None,
        nist: str = "python",
        embedded_seed: int = 0,
        embedded_sizes: Mapping[str, int] | None = None,
    ):
        for name, value, allowed in (
            ("source", source, SOURCES),
            ("protocol", protocol, tuple(FILES)),
            ("nist", nist, NIST_VARIANTS),
        ):
            if value not in allowed:
                raise ValueError(f"task.{name}={value!r}; allowed: {', '.join(allowed)}")
        if (data_dir is not None) != (source == "files"):
            raise ValueError(
                f"task.source={source} with task.data_dir={data_dir}: a folder goes with "
                "task.source=files and with nothing else"
            )
        if max_length < 3:
            raise ValueError(
                f"task.max_length={max_length}; allowed: at least 3 (context, separator, target)"
            )
        self.source = source
        self.data_dir = data_dir
        self.cache_dir = cache_dir
        self.protocol = protocol
        self.release = {"lora": release_lora, "challenge": release_challenge}[protocol]
        if missing := set(FILES[protocol].values()) - set(self.release.files):
            raise ValueError(f"task.release_{protocol}.files lacks {sorted(missing)}")
        self.max_length = max_length
        self.decoding = BeamSearch() if decoding is None else decoding
        self.nist = nist
        self.embedded_seed = embedded_seed
        self.embedded_sizes = None if embedded_sizes is None else dict(embedded_sizes)

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
        self._rows: dict[str, list[Row]] = {}
        self._inputs: dict[str, tuple[MeaningRepresentation, ...]] = {}
        self._provenance: dict[str, Any] = {}

    # Loading

    def load(self) -> None:
        """Read all splits; see `Task.load`."""
        if self.source == "embedded":
            with TemporaryDirectory() as folder:
                embedded.write(Path(folder), seed=self.embedded_seed, sizes=self.embedded_sizes)
                self._read(Path(folder))
        elif self.source == "files":
            assert self.data_dir is not None
            self._read(open_folder(self.data_dir))
        else:
            self._read(self.release.fetch(self.cache_dir))

    def _read(self, folder: Path) -> None:
        parse = parse_text if self.protocol == "lora" else parse_csv
        rows: dict[str, list[Row]] = {}
        files = []
        for split, path in self._find(folder).items():
            document = read_document(path)
            rows[split] = parse(document)
            official = self.release.files[document.name]
            is_official = document.sha256 == official
            if self.source == "files" and not is_official:
                logger.warning(
                    "%s is not %s of %s (sha256 %s, official %s): scores are not comparable with "
                    "published ones",
                    path,
                    document.name,
                    self.release.revision,
                    document.sha256,
                    official,
                )
            files.append(
                {
                    "name": document.name,
                    "sha256": document.sha256,
                    "bytes": document.num_bytes,
                    "rows": len(rows[split]),
                    "official": is_official,
                }
            )
        self._rows = rows
        self._inputs = {split: group(split, rows[split]) for split in rows}
        self._warn_of_overlap()
        is_release = self.source != "embedded" and all(file["official"] for file in files)
        self._provenance = {
            "source": self.source,
            "protocol": self.protocol,
            "revision": self.release.revision if is_release else None,
            "embedded_seed": self.embedded_seed if self.source == "embedded" else None,
            "nist": self.nist,
            "files": files,
            "rows": {split: len(rows[split]) for split in rows},
            "inputs": {split: len(self._inputs[split]) for split in rows},
        }
        logger.info(
            "E2E (%s, %s): %s",
            self.source,
            self.protocol,
            ", ".join(
                f"{split} {len(rows[split]):,} rows of {len(self._inputs[split]):,} inputs"
                for split in rows
            ),
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

    def _warn_of_overlap(self) -> None:
        contexts = {split: {i.context for i in items} for split, items in self._inputs.items()}
        for split in ("validation", "test"):
            if shared := len(contexts["train"] & contexts[split]):
                logger.warning(
                    "%d of %d inputs of %s also occur in train; in the official data none does",
                    shared,
                    len(contexts[split]),
                    split,
                )

    def provenance(self) -> dict[str, Any]:
        """See `Task.provenance`; ``official`` tells whether a file is the pinned one."""
        self._of_split(self._rows, "train")
        return self._provenance

    def _of_split(self, table: Mapping[str, Any], split: str) -> Any:
        if not table:
            raise RuntimeError("the data are not loaded; call load() first")
        if split not in table:
            raise ValueError(f"split={split!r}; allowed: {', '.join(table)}")
        return table[split]

    # Training

    def examples(self, split: str, tokenizer: Any) -> list[TokenSequence]:
        """Encode a split, see the module's text for the layout.

        Args:
            split: ``train``, ``validation`` or ``test``.
            tokenizer: a fast tokenizer; its `model_max_length` (the positions of its model) limits
                the length as `max_length` does.
        """
        rows = self._of_split(self._rows, split)
        distinct = list(dict.fromkeys(row.context for row in rows))
        contexts = dict(zip(distinct, self._prompts(distinct, tokenizer), strict=True))
        completions = _encode([" " + row.completion for row in rows], tokenizer)
        sequences = [
            TokenSequence(
                row.place,
                [*contexts[row.context], *completion, tokenizer.eos_token_id],
                len(contexts[row.context]),
            )
            for row, completion in zip(rows, completions, strict=True)
        ]
        return truncate(sequences, self._limit(tokenizer))

    def _limit(self, tokenizer: Any) -> int:
        return min(self.max_length, tokenizer.model_max_length)

    def _prompts(self, contexts: Sequence[str], tokenizer: Any) -> list[list[int]]:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-text token, which separates context and completion; "
                "set tokenizer.eos_token"
            )
        return [[*tokens, tokenizer.eos_token_id] for tokens in _encode(contexts, tokenizer)]

    def collate(self, examples: Sequence[TokenSequence]) -> Batch:
        """Make a padding-free batch, see `tasks.language_modeling`."""
        return collate(examples)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss summed over completion and end tokens."""
        return causal_lm_loss(model, batch, label_smoothing)

    # Decoding

    def inputs(self, split: str = "test") -> tuple[MeaningRepresentation, ...]:
        """Return the distinct meaning representations in order of first occurrence."""
        return self._of_split(self._inputs, split)

    def predict(
        self,
        model: nn.Module,
        tokenizer: Any,
        split: str = "test",
        done: Iterable[dict[str, Any]] = (),
    ) -> Iterator[list[dict[str, Any]]]:
        """Decode every distinct input once, in chunks of similar length.

        Yields:
            Lists of ``{"id", "input", "prediction"}``; see `Task.predict` for `done`.
        """
        items = self.inputs(split)
        prompts = self._shorten(self._prompts([i.context for i in items], tokenizer), tokenizer)
        end_tokens = [tokenizer.eos_token_id]
        # The recipe also ends at token 628, GPT-2's blank line.
        blank_line = tokenizer.encode(_BLANK_LINE, add_special_tokens=False)
        if len(blank_line) == 1:
            end_tokens += blank_line
        finished = {prediction["id"] for prediction in done}
        chunks = self.decoding.chunks([len(prompt) for prompt in prompts])
        logger.info("decoding %d inputs of %s in %d chunks", len(items), split, len(chunks))
        for chunk in chunks:
            if any(items[index].id not in finished for index in chunk):
                outputs = self.decoding.generate(
                    model, [prompts[index] for index in chunk], end_tokens
                )
                texts = [
                    # Cleaning up spaces would undo the tokenised text that the scorer expects.
                    tokenizer.decode(output, clean_up_tokenization_spaces=False)
                    for output in outputs
                ]
                yield [
                    {
                        "id": items[index].id,
                        "input": items[index].context,
                        "prediction": clean(text, tokenizer.eos_token),
                    }
                    for index, text in zip(chunk, texts, strict=True)
                    if items[index].id not in finished
                ]

    def _shorten(self, prompts: list[list[int]], tokenizer: Any) -> list[list[int]]:
        """Keep the end of prompts that leave no room for the output, as the recipe does."""
        room = self._limit(tokenizer) - self.decoding.max_new_tokens
        too_long = sum(len(prompt) > room for prompt in prompts)
        if too_long and room < 1:
            raise ValueError(
                f"max_new_tokens={self.decoding.max_new_tokens} leaves no room for a prompt within "
                f"{self._limit(tokenizer)} tokens; lower task.decoding.max_new_tokens"
            )
        if too_long:
            logger.warning(
                "%d of %d prompts are longer than %d tokens and lose their beginning",
                too_long,
                len(prompts),
                room,
            )
        return [prompt[-room:] for prompt in prompts]

    # Scoring

    def score(self, predictions: Sequence[dict[str, Any]], split: str = "test") -> Scores:
        """Score one prediction for each input of `split` against all its references.

        Raises:
            ValueError: a prediction is missing, double, unknown or of another input.
        """
        items = self.inputs(split)
        counts = Counter(prediction["id"] for prediction in predictions)
        known = {item.id for item in items}
        for problem, ids in (
            ("no prediction for", [item.id for item in items if item.id not in counts]),
            ("more than one prediction for", [i for i, count in counts.items() if count > 1]),
            ("predictions for unknown inputs", [i for i in counts if i not in known]),
        ):
            if ids:
                raise ValueError(
                    f"{problem} {len(ids)} of {len(items)} inputs of {split}: "
                    f"{', '.join(map(str, ids[:5]))}{', ...' if len(ids) > 5 else ''}"
                )
        by_id = {prediction["id"]: prediction for prediction in predictions}
        for item in items:
            if (got := by_id[item.id].get("input", item.context)) != item.context:
                raise ValueError(
                    f"the prediction {item.id} is for the input {got!r}, but here the input is "
                    f"{item.context!r}: it was made from other data"
                )
        return self._score(
            [by_id[item.id]["prediction"] for item in items],
            [list(item.references) for item in items],
        )

    def reference_scores(self, split: str = "test") -> Scores:
        """Score the first reference of each input against its other references.

        What a human text reaches with one reference less than a system has. It is no upper bound: a
        system that words the most usual way agrees more with the references than one writer with
        the others. Inputs with a single reference are left out.

        Raises:
            ValueError: no input has two references.
        """
        items = [item for item in self.inputs(split) if len(item.references) > 1]
        if not items:
            raise ValueError(f"no input of {split} has two references")
        return self._score(
            [item.references[0] for item in items],
            [list(item.references[1:]) for item in items],
        )

    def _score(self, texts: list[str], references: list[list[str]]) -> Scores:
        return metrics.score(texts, references, metrics=[spec.name for spec in self.metrics])


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
        raise ValueError(f"{document.path} has a header but no rows")
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


def group(split: str, rows: Sequence[Row]) -> tuple[MeaningRepresentation, ...]:
    """Group references by context (equal contexts need not stand together)."""
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row.context, []).append(row.completion)
    width = math.floor(math.log10(len(references))) + 1
    return tuple(
        MeaningRepresentation(f"{split}-{index:0{width}d}", context, tuple(texts))
        for index, (context, texts) in enumerate(references.items())
    )


def clean(text: str, end_of_text: str) -> str:
    """Cut a decoded text at the end-of-text string, then at the first blank line, and strip it."""
    return text.split(end_of_text)[0].split(_BLANK_LINE)[0].strip()


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Encode a list at once; lengths are judged later, where a cut is logged."""
    return tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
