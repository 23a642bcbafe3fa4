"""The Penn Treebank tokens: the rules by themselves, and equal to the CoreNLP jar."""

import random
import shutil

import pytest

from tasks.metrics import ptb, ptb_rules

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java on PATH")

# Expected values are what the CoreNLP 3.4.1 jar prints.
SENTENCES = [
    ("The Café isn't cheap.", "the café is n't cheap"),
    (
        "It's kid-friendly, costs £20-25; you'll love it!",
        "it 's kid-friendly costs # 20-25 you 'll love it",
    ),
    ("You cannot miss 'The Mill'.", "you can not miss the mill"),
    ("I'm gonna try O'Brien's c'mon.", "i 'm gon na try o'brien 's c'mon"),
    ("Rated 3.5 -of 5", "rated 3.5 of 5"),
    ("called the'Rice Boat' near", "called the'rice boat near"),
    ("5-star,family-friendly pub", "5-star family-friendly pub"),
    ("good.It is... fine !! ?", "good.it is fine !!"),
    ('"Yes" -- or $5 ----- no', "yes or $ 5 ----- no"),
    ("a -LRB- b -rcb-c", "a -lrb- b -rcb- c"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES)
def test_rules_tokenise_plain_sentences(text, expected):
    tokens = ptb_rules.tokenize([text])[0]
    assert " ".join(token for token in tokens if token not in ptb.PUNCTUATION) == expected


@pytest.mark.parametrize(
    "text",
    [
        "see St. John", "the U.S. pub", "(no)", "a/b", "naïve", "www.pub x", "pub.com", "x_y",
        "5.Yes it is", "call 020-555-12345", "nice :D", "line\nbreak", "no. 5", "5\u00a0pounds",
    ],
)  # fmt: skip
def test_rules_refuse_what_they_do_not_know(text):
    with pytest.raises(ptb_rules.UncertainError):
        ptb_rules.tokenize([text])


def test_rules_see_the_next_line():
    assert ptb_rules.tokenize(["is it? no.", "a pub"])[0][-2:] == ["no", "."]
    with pytest.raises(ptb_rules.UncertainError, match="no"):
        ptb_rules.tokenize(["is it? no.", "5 pubs"])


@needs_java
@pytest.mark.java
def test_jar_gives_the_expected_tokens():
    texts, expected = zip(*SENTENCES, strict=True)
    assert ptb.tokenize_with_jar(texts) == expected


@needs_java
@pytest.mark.java
def test_jar_keeps_empty_lines_and_leaves_brackets_in():
    texts = ("", "(a)", "", "[b] “c” naïve 日本 |||", "...", "")
    expected = ("", "-lrb- a -rrb-", "", "-lsb- b -rsb- c naïve 日本 | | |", "", "")
    assert ptb.tokenize_with_jar(texts) == expected


@needs_java
@pytest.mark.java
def test_rules_equal_the_jar_on_random_strings():
    chance = random.Random(0)
    pieces = [
        "it",
        "The",
        "Café",
        "cannot",
        "wanna",
        "'twas",
        "'tis",
        "isn't",
        "'s",
        "'re",
        "'em",
        "'til",
        "'90s",
        "'n'",
        "y'all",
        "O'Brien",
        "d'oeuvre",
        "pro-",
        "c'mon",
        "a",
        "X",
        "é",
        "5",
        "20",
        "3.50",
        "1,000",
        "£",
        "$",
        "-",
        "--",
        "---",
        ".",
        "..",
        "...",
        "?",
        "!",
        ",",
        ";",
        ":",
        "'",
        "''",
        '"',
        "family-friendly",
        "non-",
        "no",
        "WE'RE",
        "x2",
        " ",
        " ",
        " ",
        " ",
    ]
    certain = []
    for _ in range(3000):
        text = "".join(chance.choices(pieces, k=chance.randint(1, 12))).strip()
        try:
            ptb_rules.tokenize([*certain[-1:], text, "5"])
        except ptb_rules.UncertainError:
            continue
        certain.append(text)
    assert len(certain) > 1500
    lines = [
        " ".join(token for token in tokens if token not in ptb.PUNCTUATION)
        for tokens in ptb_rules.tokenize(certain)
    ]
    wrong = [
        (text, line, jar)
        for text, line, jar in zip(
            certain, lines, ptb.tokenize_with_jar(tuple(certain)), strict=True
        )
        if line != jar
    ]
    assert not wrong
