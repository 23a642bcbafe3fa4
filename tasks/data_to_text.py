"""What the data-to-text tasks share: token layout, beam search, files and their provenance.

Set-up: microsoft/LoRA, examples/NLG. A task says which files it reads, how they become rows and how
texts are scored; all else stands here.

Tokens of an example, with E the end-of-text token (50256 of GPT-2)::

    BPE(context) E BPE(" " + completion) E
    |- only input -| |---- targets ------|

Nothing stands before the context. Prompts for decoding end with the first E.

Beam search: see `tasks.generation` for what differs from the recipe. Each distinct context is
decoded once; the recipe decodes every row and keeps the last output of a context, which is the
same.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from torch import Tensor, nn

from delta_lora.checks import Range
from delta_lora.positions import num_positions
from delta_lora.protocols import Batch, ItemScores, Scores, Task
from tasks.data import Document, file_facts, of_split, read_document, warn_of_same_files
from tasks.encoded import Block, Examples, Split, Store, Texts
from tasks.generation import BeamSearch
from tasks.language_modeling import TokenSequence, causal_lm_loss, collate, truncate
from tasks.predictions import align, chosen, describe_part, own_chunks
from tasks.sources import MaxInputs, Source

logger = logging.getLogger(__name__)

#: tokens of a sequence: context, separator, target.
MaxLength = Annotated[int, Range(at_least=3, at_most=2**20)]
#: name of the scores of one reference against the others.
ONE_REFERENCE = "one reference against the others"
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Row:
    """One reference.

    Attributes:
        context: the input, linearised.
        completion: the text; empty where the data have an input without a text.
        place: where it came from (``file:line``).
        category: what kind of thing it is about, where the data say so.
    """

    context: str
    completion: str
    place: str
    category: str = ""


@dataclass(frozen=True)
class Input:
    """A distinct context with all its references, in the order of the file.

    Attributes:
        id: name in predictions, for example ``test-017``.
        context: the input, linearised.
        references: its texts; none where the split has no texts at all.
        category: that of its first row.
    """

    id: str
    context: str
    references: tuple[str, ...]
    category: str = ""


class DataToText(Task):
    """A task that turns a linearised record into a text.

    Args:
        source: where its files come from.
        protocol: which texts or scorers are used; recorded.
        max_length: tokens of a sequence; longer ones lose their end, which is logged.
        decoding: settings of the beam search; None takes its defaults.
        max_inputs: inputs of a split that are decoded and scored, evenly spaced over it; None: all.

    Raises:
        ValueError: a setting is not allowed.
    """

    family = "causal_lm"
    #: name in log lines.
    title: str
    #: split -> inputs that also occur in train, in the official data.
    shared_inputs: Mapping[str, int] = MappingProxyType({"validation": 0, "test": 0})

    def __init__(
        self,
        *,
        source: Source,
        protocol: str,
        max_length: int,
        decoding: BeamSearch | None,
        max_inputs: MaxInputs | None = None,
    ):
        self.source = source
        self.protocol = protocol
        self.max_length = max_length
        self.decoding = BeamSearch() if decoding is None else decoding
        self.max_inputs = max_inputs
        self._rows: dict[str, list[Row]] = {}
        self._inputs: dict[str, tuple[Input, ...]] = {}
        self._store = Store(self.title, source.encoded_folder)
        self._provenance: dict[str, Any] = {}

    # What differs between the tasks

    @abstractmethod
    def _find(self, folder: Path) -> dict[str, Path]:
        """Return split -> file; raise FileNotFoundError that says what is there instead."""

    @abstractmethod
    def _parse(self, split: str, document: Document) -> list[Row]:
        """Return the rows of a file; raise ValueError with file and line at a damaged one."""

    @abstractmethod
    def _score(self, texts: list[str], items: Sequence[Input]) -> Scores:
        """Score one text for each of `items` against all its references."""

    def _item_scores(self, texts: list[str], items: Sequence[Input]) -> ItemScores:
        """Return how the scores of `_score` depend on `items`; default: not known."""
        return super().item_scores([{"prediction": text} for text in texts], "")

    def _facts(self) -> dict[str, Any]:
        """Return what else a record says of the data; called when they are read."""
        return {}

    # Loading

    def check_source(self) -> None:
        """See `Task.check_source`."""
        self.source.check(self._find)

    def load(self) -> None:
        """Read all splits; see `Task.load`."""
        with self.source.open() as folder:
            self._read(folder)

    def _read(self, folder: Path) -> None:
        rows: dict[str, list[Row]] = {}
        inputs: dict[str, tuple[Input, ...]] = {}
        files = []
        for split, path in self._find(folder).items():
            document = read_document(path)
            parsed = self._parse(split, document)
            inputs[split] = group(split, parsed)
            rows[split] = [row for row in parsed if row.completion]
            official = self.source.official(document.name)
            facts = file_facts(document, len(rows[split]), official)
            if self.source.kind == "files" and not facts["official"]:
                logger.warning(
                    "%s is not %s of %s (sha256 %s, official %s): scores are not comparable with "
                    "published ones",
                    path, document.name, self.source.release and self.source.release.revision,
                    document.sha256, official,
                )  # fmt: skip
            files.append(facts)
        warn_of_same_files(files)
        self._rows, self._inputs = rows, inputs
        self._store = Store(self.title, self.source.encoded_folder)
        self._warn_of_overlap()
        release, is_official = self.source.release, all(file["official"] for file in files)
        self._provenance = {
            **self.source.facts(),
            # Files of your own may be the official ones.
            "revision": release.revision if release and is_official else None,
            "protocol": self.protocol,
            **self._facts(),
            "files": files,
            "rows": {split: len(rows[split]) for split in rows},
            "inputs": {split: len(inputs[split]) for split in rows},
            **describe_part(self.scored_split, len(inputs[self.scored_split]), self.max_inputs),
        }
        logger.info(
            "%s (%s, %s): %s",
            self.title,
            self.source.kind,
            self.protocol,
            ", ".join(
                f"{split} {len(rows[split]):,} rows of {len(inputs[split]):,} inputs"
                for split in rows
            ),
        )

    def _warn_of_overlap(self) -> None:
        contexts = {split: {i.context for i in items} for split, items in self._inputs.items()}
        for split, usual in self.shared_inputs.items():
            shared = len(contexts["train"] & contexts[split])
            if shared > usual:
                logger.warning(
                    "%d of %d inputs of %s also occur in train; in the official data %s",
                    shared,
                    len(contexts[split]),
                    split,
                    f"{usual} do" if usual else "none does",
                )

    def provenance(self) -> dict[str, Any]:
        """See `Task.provenance`; ``official`` tells whether a file is the pinned one."""
        of_split(self._rows, "train")
        return self._provenance

    # Training

    def examples(self, split: str, tokenizer: Any) -> Examples[TokenSequence]:
        """Encode a split, see the module's text for the layout.

        Args:
            split: ``train``, ``validation`` or ``test``.
            tokenizer: a fast tokenizer; its `model_max_length` (the positions of its model) limits
                the length as `max_length` does.

        Raises:
            ValueError: a context leaves no room for its text, or the tokenizer has no end token.
        """
        rows = of_split(self._rows, split)
        limit = self._limit(tokenizer)

        def encode(texts: Sequence[Texts], start: int) -> Block:
            places = [row.place for row in rows[start : start + len(texts)]]
            sequences = self._sequences(texts, places, tokenizer)
            kept = [truncate(sequence, limit) for sequence in sequences]
            return Block(
                {
                    "context": [sequence.tokens[: sequence.num_context] for sequence in kept],
                    "target": [sequence.tokens[sequence.num_context :] for sequence in kept],
                },
                [n for n, sequence in enumerate(sequences) if len(sequence.tokens) > limit],
            )

        encoded = self._store.get(
            Split(
                name=f"{self.name}-{split}",
                what=f"sequences of {split}",
                version=self.version,
                texts=[(row.context, " " + row.completion) for row in rows],
                encode=encode,
                limit=limit,
                place=lambda index: rows[index].place,
            ),
            tokenizer,
        )

        def make(index: int) -> TokenSequence:
            context = encoded.row("context", index).tolist()
            target = encoded.row("target", index).tolist()
            return TokenSequence(rows[index].place, context + target, len(context))

        return Examples(len(rows), make)

    def _sequences(
        self, texts: Sequence[Texts], places: Sequence[str], tokenizer: Any
    ) -> list[TokenSequence]:
        """Encode pairs of a context and a completion; equal contexts are encoded once."""
        contexts, completions = zip(*texts, strict=True)
        distinct = list(dict.fromkeys(contexts))
        prompts = dict(zip(distinct, self._prompts(distinct, tokenizer), strict=True))
        return [
            TokenSequence(
                place, [*prompts[context], *tokens, tokenizer.eos_token_id], len(prompts[context])
            )
            for place, context, tokens in zip(
                places, contexts, _encode(completions, tokenizer), strict=True
            )
        ]

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

    def length(self, example: TokenSequence) -> int:
        """Return the number of tokens of `example`."""
        return len(example.tokens)

    # Decoding

    def inputs(self, split: str = "test") -> tuple[Input, ...]:
        """Return the distinct inputs in order of first occurrence, of a part those that it has."""
        items = of_split(self._inputs, split)
        if split == "train":
            return items
        return tuple(items[i] for i in chosen(len(items), self.max_inputs))

    def predict(
        self,
        model: nn.Module,
        tokenizer: Any,
        split: str = "test",
        done: Iterable[dict[str, Any]] = (),
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[list[dict[str, Any]]]:
        """Decode every distinct input once, in chunks of similar length.

        Yields:
            Lists of ``{"id", "input", "prediction"}``; see `Task.predict` for `done` and `share`.
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
        for chunk in own_chunks(chunks, share):
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

    def check_model(self, model: nn.Module, tokenizer: Any = None) -> None:
        """See `Task.check_model`: prompt and output must find room in the model."""
        positions = num_positions(model.config)
        limits = [self.max_length, *filter(None, [positions])]
        self.decoding.check_room(min(limits))
        if tokenizer is None or positions is None:
            return
        contexts = [item.context for item in self.inputs(self.scored_split)]
        prompts = self._shorten(self._prompts(contexts, tokenizer), tokenizer)
        self.decoding.check_prompt(max(map(len, prompts)), positions)

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
        texts, items = self._aligned(predictions, split)
        missing = self._without_references(split)
        return Scores({}, missing) if missing else self._score(texts, items)

    def item_scores(self, predictions: Sequence[dict[str, Any]], split: str = "test") -> ItemScores:
        """See `Task.item_scores`."""
        texts, items = self._aligned(predictions, split)
        missing = self._without_references(split)
        if missing:
            return ItemScores(len(items), missing=missing)
        return self._item_scores(texts, items)

    def _aligned(
        self, predictions: Sequence[dict[str, Any]], split: str
    ) -> tuple[list[str], Sequence[Input]]:
        """Return one text for each input of `split`, and the inputs."""
        items = self.inputs(split)
        aligned = align(
            predictions, [item.id for item in items], split, [item.context for item in items]
        )
        return [prediction["prediction"] for prediction in aligned], items

    def _without_references(self, split: str) -> dict[str, str]:
        """Return why there is no score, by its name; empty where there is a reference."""
        if any(item.references for item in self.inputs(split)):
            return {}
        reason = f"{split} has no texts to compare with, so there are predictions only"
        return {spec.name: reason for spec in self.metrics}

    def references(self, split: str = "test") -> dict[str, list[str]]:
        """Return the texts of each input of `split`."""
        return {item.id: list(item.references) for item in self.inputs(split)}

    def scores_of_items(
        self, predictions: Sequence[dict[str, Any]], split: str = "test"
    ) -> dict[str, dict[str, float]]:
        """Return the scores that single texts have; see `_item_values`."""
        known = self.references(split)
        shown = [p for p in predictions if known[p["id"]]]
        values = self._item_values(
            [p["prediction"] for p in shown], [known[p["id"]] for p in shown]
        )
        return {
            p["id"]: {label: column[index] for label, column in values.items()}
            for index, p in enumerate(shown)
            if values
        }

    def _item_values(self, texts: list[str], references: list[list[str]]) -> dict[str, list[float]]:
        """Return the scores that single texts have, by the names and in the units of tables.

        Of all texts at once: a tokenizer may be a program that takes a second to start.
        """
        return {}

    def reference_scores(self, split: str = "test") -> dict[str, Scores]:
        """Score the first reference of each input against its other references.

        What a human text reaches with one reference less than a system has. It is no upper bound: a
        system that words the most usual way agrees more with the references than one writer with
        the others. Inputs with a single reference are left out.

        Returns:
            The scores under `ONE_REFERENCE`, all missing where no input has two references.
        """
        items = [item for item in self.inputs(split) if len(item.references) > 1]
        if not items:
            reason = f"no input of {split} has two references"
            return {ONE_REFERENCE: Scores({}, {spec.name: reason for spec in self.metrics})}
        others = [replace(item, references=item.references[1:]) for item in items]
        return {ONE_REFERENCE: self._score([item.references[0] for item in items], others)}


def group(split: str, rows: Sequence[Row]) -> tuple[Input, ...]:
    """Group references by context (equal contexts need not stand together)."""
    references: dict[str, list[str]] = {}
    categories: dict[str, str] = {}
    for row in rows:
        texts = references.setdefault(row.context, [])
        if row.completion:
            texts.append(row.completion)
        categories.setdefault(row.context, row.category)
    width = math.floor(math.log10(len(references))) + 1
    return tuple(
        Input(f"{split}-{index:0{width}d}", context, tuple(texts), categories[context])
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
