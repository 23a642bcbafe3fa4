"""BLEU, NIST, ROUGE-L and CIDEr against values worked out by hand or by brute force."""

import math
import random

import pytest
import sacrebleu
from pycocoevalcap.cider.cider import Cider

from tasks.metrics import mteval
from tasks.metrics.bleu import bleu
from tasks.metrics.cider import cider
from tasks.metrics.java import MetricUnavailableError
from tasks.metrics.nist import nist, nist_perl
from tasks.metrics.rouge_l import rouge_l

TEXTS = [
    "Blue Lagoon is a quiet pub near the river, open from 9.30 to 11.",
    "Near the river there's a pub: Blue Lagoon (£10-15).",
    "The Golden Fork serves sushi, and it's family-friendly!",
    "A family-friendly place for sushi is The Golden Fork.",
    "Sushi? Try The Golden Fork near the old mill for 20 pounds.",
]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", [""]),
        ("Costs £10.50, or 20-25.", ["costs", "£10.50", ",", "or", "20", "-", "25", "."]),
        ("it's family-friendly", ["it's", "family-friendly"]),
        ("(a)[b]{c}", ["(", "a", ")", "[", "b", "]", "{", "c", "}"]),
        ("CAFÉ &quot;x&quot; &amp; y", ["café", '"', "x", '"', "&", "y"]),
        ("a.b 1,000", ["a", ".", "b", "1,000"]),
        ("a\x1fb", ["a", "b"]),
    ],
)
def test_tokens_of_the_python_scorer(text, tokens):
    assert list(mteval.tokenize(text)) == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        ("CAFÉ", ["cafÉ"]),
        ("&QUOT;", ["&", "quot", ";"]),
        ("a\x1fb c\xa0d", ["a\x1fb", "c", "d"]),
    ],
)
def test_tokens_of_the_perl_scorer(text, tokens):
    assert list(mteval.tokenize_perl(text)) == tokens


def test_bleu_by_hand():
    # precisions 4/5, 3/4, 2/3, 1/2, whose product is 1/5; one token too short
    expected = math.exp(1 - 6 / 5) * 0.2**0.25
    assert bleu(["a b c d e"], [["a b c d f g"]]) == pytest.approx(expected, abs=1e-12)


def test_bleu_takes_the_shorter_of_two_equally_close_references():
    assert bleu(["a b c d e"], [["a b c d f g", "a b c d"]]) == pytest.approx(0.2**0.25, abs=1e-12)


def test_bleu_clips_by_the_largest_count_in_one_reference():
    # "the" at most twice in one reference: 2/7 unigrams, 1/6 bigrams, then floored at 1e-15
    expected = (2 / 7 * 1 / 6 * 1e-15 / 5 * 1e-15 / 4) ** 0.25
    score = bleu(["the " * 7], [["the the a b c d e", "the a b c d e f"]])
    assert score == pytest.approx(expected, rel=1e-9)


def test_bleu_of_an_empty_output_takes_ngrams_away():
    # an empty output is one token, 0 bigrams, -1 trigrams, -2 four-grams
    precisions = 5 / 6 * 4 / 4 * 3 / 2 * 2e9
    penalty = math.exp(1 - 7 / 6)
    score = bleu(["a b c d e", ""], [["a b c d e"], ["x y"]])
    assert score == pytest.approx(penalty * precisions**0.25, rel=1e-9)


def test_bleu_equals_sacrebleu_on_long_outputs():
    outputs = [TEXTS[0].replace("quiet", "loud"), TEXTS[1], TEXTS[4] + " Yes."]
    groups = [TEXTS[:1], TEXTS[:2], TEXTS[2:]]
    streams = [[g[k] if k < len(g) else None for g in groups] for k in range(3)]
    expected = sacrebleu.corpus_bleu(outputs, streams, lowercase=True, smooth_method="none")
    assert expected.score > 10
    assert bleu(outputs, groups) == pytest.approx(expected.score / 100, abs=1e-12)


def test_nist_by_hand():
    # information: a log2(6/2), the other words log2(6/1), "a a" and "a b" log2(2/1), the rest 0
    expected = (2 * math.log2(3) + 4 * math.log2(6)) / 6 + 2 / 5
    assert nist(["a a b c d e"], [["a a b c d e"]]) == pytest.approx(expected, abs=1e-12)
    assert nist_perl(["a a b c d e"], [["a a b c d e"]]) == pytest.approx(expected, abs=1e-12)


def test_nist_is_halved_at_two_thirds_of_the_reference_length():
    expected = 0.5 * ((2 * math.log2(3) + 2 * math.log2(6)) / 4 + 2 / 3)
    assert nist_perl(["a a b c"], [["a a b c d e"]]) == pytest.approx(expected, abs=1e-12)


def test_nist_variants_differ_in_the_reference_length():
    outputs = ["a b c d e f", "g h i j k l"]
    groups = [["a b c d e f"], ["g h i j k l", "g h i j k l m n o", "g h i j k l m n o"]]
    beta = math.log(2) / math.log(1.5) ** 2

    def penalty(length):
        return math.exp(-beta * math.log(12 / length) ** 2)

    # mean lengths 6 and 8; 30 tokens over 2 references an instance
    assert nist(outputs, groups) / penalty(14) == pytest.approx(
        nist_perl(outputs, groups) / penalty(15), abs=1e-12
    )


def test_nist_perl_gives_words_after_zero_the_information_of_unigrams():
    text = "0 x y z w"
    assert nist(["0 x y z w"], [[text]]) == pytest.approx(math.log2(5), abs=1e-12)
    expected = math.log2(5) + math.log2(5) / 4
    assert nist_perl([text], [[text]]) == pytest.approx(expected, abs=1e-12)


def test_nist_without_ngrams_is_undefined():
    with pytest.raises(MetricUnavailableError, match="no 5-grams"):
        nist(["a b c d"], [["a b c d e"]])


def test_nist_perl_refuses_text_that_ends_its_input_file():
    with pytest.raises(MetricUnavailableError, match="closing tag"):
        nist_perl(["a </seg> b"], [["a b"]])


def test_rouge_l_takes_precision_and_recall_from_different_references():
    precision, recall = 2 / 3, 1.0
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    score = rouge_l(["a b c", ""], [["a x c", "a b"], ["d"]])
    assert score == pytest.approx(expected / 2, abs=1e-12)


def test_cider_of_the_only_reference_counts_orders_that_exist():
    # cosine 1 for uni- and bigrams, 0 for the orders that two words do not have
    assert cider(["a b", "c d"], [["a b"], ["c d"]]) == pytest.approx(5.0, abs=1e-12)
    assert cider(["a b"], [["a b"]]) == 0.0


def test_cider_equals_the_official_class():
    chance = random.Random(1)

    def text(longest):
        return " ".join(
            chance.choices(["a", "b", "café", "日本", "£"], k=chance.randint(0, longest))
        )

    groups = [[text(9) for _ in range(chance.randint(1, 4))] for _ in range(60)]
    outputs = ["", *(text(14) for _ in range(59))]
    one_each = {index: [output] for index, output in enumerate(outputs)}
    expected, _ = Cider().compute_score(dict(enumerate(groups)), one_each)
    assert expected > 0.1
    assert cider(outputs, groups) == pytest.approx(expected, rel=1e-12)
