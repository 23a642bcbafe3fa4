r"""BLEU, METEOR and TER of WebNLG 2017, in two protocols that must not be compared.

``lora`` is what microsoft/LoRA (examples/NLG) and the papers after it print: its decoding script
prepares the texts and WebNLG/GenerationEval (8067849) scores them.

1. Outputs and references are lower-cased and split at every character that is no word character
   (``\W``), which stays as a token of its own.
2. An instance has six references: further ones are dropped, missing ones are filled with the first
   again. (All three scores ignore a repeated reference, so none is repeated here.)
3. BLEU sees this text: Moses' multi-bleu-detok.perl, that is `sacrebleu` with tokenizer 13a, with
   case, without smoothing, the closest reference length.
4. METEOR 1.5 (``-l en -norm``) and TER see the words of nltk's ``word_tokenize``. TER is that of
   `ter`, the smallest over the references, averaged over the instances.

``challenge_2017`` is what the challenge's own scripts print: as above, but characters are
transliterated to ASCII first, there are three references, and BLEU is multi-bleu.perl on these
tokens, in which a missing reference is an empty line that counts as a reference of length 0. METEOR
sees the same tokens. The challenge's TER (tercom 0.7.25) is not computed.

BLEU and METEOR sum over a whole set, so the score of all instances is no average of parts.

As a program it reads plain-text files (one output a line; references one a line, the groups
separated by an empty line)::

    python -m tasks.metrics.webnlg --predictions outputs.txt --references references.txt
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
from nltk.tokenize import word_tokenize
from sacrebleu.metrics import BLEU

from delta_lora import console
from delta_lora.console import as_path
from delta_lora.protocols import ItemScores, OfSets, Scores
from tasks.metrics import items
from tasks.metrics.e2e import check_texts
from tasks.metrics.files import read_pair, refuse, show
from tasks.metrics.java import MetricUnavailableError
from tasks.metrics.meteor import from_sums as meteor_from_sums
from tasks.metrics.meteor import meteor_subsets, shared_process
from tasks.metrics.meteor import statistics as meteor_statistics
from tasks.metrics.ter import lowest_ter

#: names of the scores, in table order, by protocol.
METRICS: dict[str, tuple[str, ...]] = {
    "lora": ("bleu", "meteor", "ter"),
    "challenge_2017": ("bleu", "meteor"),
}
#: references of an instance, by protocol; further ones are dropped.
NUM_REFERENCES: dict[str, int] = {"lora": 6, "challenge_2017": 3}

_NOT_WORD = re.compile(r"(\W)")
# What `unidecode` makes of characters that are no ASCII letter with marks.
_ASCII = {
    "ß": "ss", "æ": "ae", "ð": "d", "ø": "o", "þ": "th", "đ": "d", "ħ": "h", "ı": "i", "ł": "l",
    "œ": "oe",
    "\u00a0": " ", "‐": "-", "‑": "-", "–": "-", "—": "--", "‘": "'", "’": "'", "“": '"',
    "”": '"', "…": "...", "→": "-",
}  # fmt: skip

Texts = list[str]
Groups = list[list[str]]
Subsets = Sequence[Sequence[int]]
#: (instances, summands), and from (sets, summands), their sums over sets, to the scores, (sets,).
Summands = tuple[items.Array, Callable[[items.Array], items.Array]]


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    protocol: str = "lora",
    metrics: Sequence[str] | None = None,
) -> Scores:
    """Score the outputs for one set of instances.

    Args:
        predictions: one output per instance; an empty one is legal.
        references: for every instance one or more texts.
        protocol: ``lora`` or ``challenge_2017``.
        metrics: which scores, of `METRICS` of the protocol; None takes all.

    Returns:
        Fractions, TER possibly above 1; a score that cannot be computed here is in `missing` with
        the reason and the fix.

    Raises:
        ValueError: no instance, lengths that differ, an instance without references, an empty
            reference, an unknown protocol or metric, or text that is not valid Unicode.
        TypeError: a text is not a string, or an instance's references are one string.
    """
    parts = {"": range(len(predictions))}
    scores = score_parts(predictions, references, parts, protocol=protocol, metrics=metrics)
    return Scores(
        {name.removesuffix("_"): value for name, value in scores.values.items()},
        {name.removesuffix("_"): reason for name, reason in scores.missing.items()},
    )


def score_parts(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    parts: Mapping[str, Sequence[int]],
    *,
    protocol: str = "lora",
    metrics: Sequence[str] | None = None,
) -> Scores:
    """Score several parts of a set, each by itself; no pair of texts is compared twice.

    Args:
        predictions: one output per instance; an empty one is legal.
        references: for every instance one or more texts.
        parts: name (``seen``) -> indices of its instances.
        protocol: ``lora`` or ``challenge_2017``.
        metrics: which scores, of `METRICS` of the protocol; None takes all.

    Returns:
        As `score`, with names like ``bleu_seen``; a part without instances is missing.

    Raises:
        ValueError: as `score`.
        TypeError: as `score`.
    """
    if protocol not in METRICS:
        raise ValueError(f"unknown protocol {protocol!r}; allowed are {', '.join(METRICS)}")
    metrics = METRICS[protocol] if metrics is None else metrics
    if unknown := [name for name in metrics if name not in METRICS[protocol]]:
        raise ValueError(
            f"unknown metric {unknown[0]!r}; allowed with protocol {protocol} are "
            f"{', '.join(METRICS[protocol])}"
        )
    outputs, groups = check_texts(predictions, references)
    filled = {name: part for name, part in parts.items() if len(part)}
    missing = {
        f"{metric}_{name}": "no instance is of this part"
        for metric in metrics
        for name in parts.keys() - filled.keys()
    }
    values: dict[str, float] = {}
    failed: dict[str, str] = {}
    if "meteor" in metrics:
        try:
            shared_process().start()  # it loads its tables while the other scores are computed
        except MetricUnavailableError as error:
            failed["meteor"] = str(error)
    # Scoring METEOR last leaves it the most time to load.
    for metric in sorted(metrics, key=lambda name: name == "meteor"):
        if metric in failed:
            continue
        try:
            results = _SCORERS[protocol, metric](outputs, groups, list(filled.values()))
        except MetricUnavailableError as error:
            failed[metric] = str(error)
        else:
            values |= {f"{metric}_{name}": v for name, v in zip(filled, results, strict=True)}
    missing |= {f"{metric}_{name}": failed[metric] for metric in failed for name in filled}
    names = [f"{metric}_{name}" for metric in metrics for name in parts]
    return Scores(
        {name: values[name] for name in names if name in values},
        {name: missing[name] for name in names if name in missing},
    )


def item_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    parts: Mapping[str, Sequence[int]],
    *,
    protocol: str = "lora",
    metrics: Sequence[str] | None = None,
) -> ItemScores:
    """Return how the scores of `score_parts` depend on the instances.

    Args:
        predictions: as `score_parts`.
        references: as `score_parts`.
        parts: as `score_parts`; every part is counted within the same sets of instances.
        protocol: as `score_parts`.
        metrics: as `score_parts`.
    """
    metrics = METRICS[protocol] if metrics is None else metrics
    outputs, groups = check_texts(predictions, references)
    of_sets: dict[str, OfSets] = {}
    values: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for metric in metrics:
        names = {f"{metric}_{name}": part for name, part in parts.items()}
        try:
            table, from_sums = _SUMMANDS[protocol, metric](outputs, groups)
        except MetricUnavailableError as error:
            missing |= dict.fromkeys(names, str(error))
            continue
        for name, part in names.items():
            if not len(part):
                missing[name] = "no instance is of this part"
                continue
            of_sets[name] = items.additive(table, from_sums, part)
            if metric == "ter" and len(part) == len(outputs):
                values[name] = [row[0] for row in table]
    return ItemScores(len(outputs), of_sets, values, missing)


def prepare(text: str) -> str:
    r"""Return `text` as microsoft/LoRA writes it for the scorers: lower case, split at ``\W``."""
    return " ".join(_NOT_WORD.sub(r" \1 ", text.lower()).split())


def prepare_2017(text: str) -> str:
    r"""Return `text` as the challenge's scripts write it: lower case, ASCII, split at ``\W``.

    Raises:
        MetricUnavailableError: see `transliterate`.
    """
    return " ".join(_NOT_WORD.sub(r" \1 ", transliterate(text.lower())).split())


def transliterate(text: str) -> str:
    """Return `text` in ASCII as PyPI `unidecode` writes it, which the challenge's scripts use.

    The package is used where it is installed. Without it, Latin letters lose their marks and a
    table has what else the challenge's texts contain.

    Raises:
        MetricUnavailableError: the package is not installed and a character is not in the table.
    """
    if text.isascii():
        return text
    if importlib.util.find_spec("unidecode") is not None:
        return str(importlib.import_module("unidecode").unidecode(text))
    return "".join(map(_ascii, text))


@cache
def _ascii(character: str) -> str:
    if character.isascii():
        return character
    if character in _ASCII:
        return _ASCII[character]
    letters = unicodedata.normalize("NFD", character)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    if plain.isascii():
        return plain
    raise MetricUnavailableError(
        f"the protocol challenge_2017 has no ASCII form of {character!r} "
        f"(U+{ord(character):04X}) here; run `pip install unidecode`"
    )


def _words(text: str) -> str:
    """Return nltk's words; `text` counts as one sentence, as it has no capital letters."""
    return " ".join(word_tokenize(text, preserve_line=True))


def _different(texts: Sequence[str], limit: int) -> list[str]:
    """Return the first `limit` texts without repetitions, which change no score."""
    return list(dict.fromkeys(texts[:limit]))


def _texts_of_bleu(outputs: Texts, groups: Groups, protocol: str) -> tuple[BLEU, Texts, Groups]:
    """Return the scorer of a protocol, and the texts as it sees them."""
    limit = NUM_REFERENCES[protocol]
    if protocol == "lora":
        references = [[prepare(text) for text in texts[:limit]] for texts in groups]
        bleu = BLEU(tokenize="13a", smooth_method="none", force=True)
        return bleu, [prepare(text) for text in outputs], references
    references = [
        [prepare_2017(text) for text in texts[:limit]] + [""] * (limit - len(texts))
        for texts in groups
    ]
    bleu = BLEU(tokenize="none", smooth_method="none", force=True)
    return bleu, [prepare_2017(text) for text in outputs], references


def _bleu(outputs: Texts, groups: Groups, subsets: Subsets, *, protocol: str) -> list[float]:
    bleu, outputs, groups = _texts_of_bleu(outputs, groups, protocol)
    results = []
    for subset in subsets:
        longest = max(len(groups[index]) for index in subset)
        streams: Any = [  # None where an instance has fewer references
            [groups[index][place] if place < len(groups[index]) else None for index in subset]
            for place in range(longest)
        ]
        results.append(bleu.corpus_score([outputs[i] for i in subset], streams).score / 100)
    return results


def _bleu_summands(outputs: Texts, groups: Groups, *, protocol: str) -> Summands:
    """Return matches and n-grams by order, and lengths of output and closest reference."""
    bleu, outputs, groups = _texts_of_bleu(outputs, groups, protocol)
    table = []
    for output, texts in zip(outputs, groups, strict=True):
        found = bleu.corpus_score([output], [[text] for text in texts])
        table.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    order = bleu.max_ngram_order

    def from_sums(sums: Sequence[float]) -> float:
        counts = [int(number) for number in sums]
        scored = BLEU.compute_bleu(
            counts[:order],
            counts[order : 2 * order],
            sys_len=counts[-2],
            ref_len=counts[-1],
            smooth_method="none",
        )
        return float(scored.score) / 100

    return np.array(table, dtype=np.float64), items.each(from_sums)


def _meteor(outputs: Texts, groups: Groups, subsets: Subsets, *, protocol: str) -> list[float]:
    return meteor_subsets(*_meteor_texts(outputs, groups, protocol), subsets)


def _meteor_summands(outputs: Texts, groups: Groups, *, protocol: str) -> Summands:
    return meteor_statistics(*_meteor_texts(outputs, groups, protocol)), meteor_from_sums


def _meteor_texts(outputs: Texts, groups: Groups, protocol: str) -> tuple[Texts, Groups]:
    if protocol == "lora":
        return _lora_words(outputs, groups)
    limit = NUM_REFERENCES["challenge_2017"]
    references = [_different([prepare_2017(t) for t in texts], limit) for texts in groups]
    return [prepare_2017(text) for text in outputs], references


def _ter_lora(outputs: Texts, groups: Groups, subsets: Subsets) -> list[float]:
    rates = _rates(tuple(outputs), tuple(map(tuple, groups)))
    return [sum(rates[index] for index in subset) / len(subset) for subset in subsets]


def _ter_summands(outputs: Texts, groups: Groups) -> Summands:
    rates = _rates(tuple(outputs), tuple(map(tuple, groups)))
    return np.array([[rate, 1.0] for rate in rates]), lambda sums: sums[:, 0] / sums[:, 1]


@lru_cache(maxsize=1)  # a set's score, and what its instances add to it
def _rates(outputs: tuple[str, ...], groups: tuple[tuple[str, ...], ...]) -> list[float]:
    """Return the translation edit rate of every instance; not to be changed."""
    texts, references = _lora_words(outputs, groups)
    return [
        lowest_ter(text.split(), [option.split() for option in options])
        for text, options in zip(texts, references, strict=True)
    ]


def _lora_words(outputs: Sequence[str], groups: Sequence[Sequence[str]]) -> tuple[Texts, Groups]:
    references = [
        _different([_words(prepare(text)) for text in texts], NUM_REFERENCES["lora"])
        for texts in groups
    ]
    return [_words(prepare(text)) for text in outputs], references


_SCORERS: dict[tuple[str, str], Callable[[Texts, Groups, Subsets], list[float]]] = {
    ("lora", "bleu"): partial(_bleu, protocol="lora"),
    ("lora", "meteor"): partial(_meteor, protocol="lora"),
    ("lora", "ter"): _ter_lora,
    ("challenge_2017", "bleu"): partial(_bleu, protocol="challenge_2017"),
    ("challenge_2017", "meteor"): partial(_meteor, protocol="challenge_2017"),
}
_SUMMANDS: dict[tuple[str, str], Callable[[Texts, Groups], Summands]] = {
    ("lora", "bleu"): partial(_bleu_summands, protocol="lora"),
    ("lora", "meteor"): partial(_meteor_summands, protocol="lora"),
    ("lora", "ter"): _ter_summands,
    ("challenge_2017", "bleu"): partial(_bleu_summands, protocol="challenge_2017"),
    ("challenge_2017", "meteor"): partial(_meteor_summands, protocol="challenge_2017"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores of a file of outputs; exit code 1: one is missing, 2: a file is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--predictions", type=as_path, required=True, help="one output a line")
    parser.add_argument(
        "--references",
        type=as_path,
        required=True,
        help="one a line, groups end at an empty line",
    )
    parser.add_argument("--protocol", choices=list(METRICS), default="lora")
    parser.add_argument("--json", action="store_true", help="full precision, as one JSON object")
    options = parser.parse_args(arguments)
    try:
        outputs, groups = read_pair(options.predictions, options.references)
        scores = score(outputs, groups, protocol=options.protocol)
    except (OSError, ValueError) as error:
        return refuse(error)
    return show(scores, as_json=options.json)


if __name__ == "__main__":
    console.run(main)
