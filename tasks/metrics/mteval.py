"""The 13a tokenisation that BLEU and NIST see, in the two variants of e2e-metrics.

Both split ASCII punctuation off, except a full stop or comma between digits and a hyphen that no
digit precedes. The Python scorer (option ``-p``) lower-cases tokens by Unicode, so ``É`` equals
``é``, and an empty text is one empty token; mteval-v13a.pl lower-cases A to Z only and knows no
empty token.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# ASCII punctuation and symbols but for the apostrophe, comma, hyphen and full stop.
_PUNCTUATION = re.compile(r"([!-&(-+/:-@\[-`{-~])")
_POINT_AFTER_TEXT = re.compile(r"([^0-9])([.,])")
_POINT_BEFORE_TEXT = re.compile(r"([.,])([^0-9])")
_HYPHEN_AFTER_DIGIT = re.compile(r"([0-9])-")
_SPACE = re.compile(r"\s+")
# Perl's \s: Python's without the four separators of ASCII.
_SPACE_OF_PERL = re.compile(r"[^\S\x1c-\x1f]+")
_LOWER_ASCII = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}

Ngram = tuple[str, ...]


def _separate(text: str) -> str:
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = _PUNCTUATION.sub(r" \1 ", f" {text} ")
    text = _POINT_AFTER_TEXT.sub(r"\1 \2 ", text)
    text = _POINT_BEFORE_TEXT.sub(r" \1 \2", text)
    return _HYPHEN_AFTER_DIGIT.sub(r"\1 - ", text)


@functools.lru_cache(maxsize=1 << 16)
def tokenize(text: str) -> Ngram:
    """Return the tokens of the Python scorer, lower-cased; never none: "" has the token ""."""
    return tuple(token.lower() for token in _SPACE.sub(" ", _separate(text)).strip().split(" "))


@functools.lru_cache(maxsize=1 << 16)
def tokenize_perl(text: str) -> Ngram:
    """Return the tokens of mteval-v13a.pl, lower-cased; "" has none."""
    separated = _separate(_SPACE_OF_PERL.sub(" ", text)).translate(_LOWER_ASCII)
    return tuple(word for word in _SPACE_OF_PERL.split(separated) if word)


def count_ngrams(tokens: Ngram, order: int) -> Counter[Ngram]:
    """Return the n-grams of one order with their counts."""
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


@functools.lru_cache(maxsize=1 << 15)
def max_counts(references: tuple[Ngram, ...], order: int) -> Counter[Ngram]:
    """Return for every n-gram its largest count in any one reference; not to be changed."""
    largest: Counter[Ngram] = Counter()
    for tokens in references:
        for ngram, count in count_ngrams(tokens, order).items():
            largest[ngram] = max(largest[ngram], count)
    return largest
