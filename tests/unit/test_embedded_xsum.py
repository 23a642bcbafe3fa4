"""The embedded XSum corpus: format, splits, and that a summary is more than a sentence copied."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tasks.metrics.rouge import score
from tasks.tiny.corpora import xsum
from tasks.tiny.corpora.wording import sentence
from tasks.tiny.corpora.world import PRICES, RATINGS

SIZES = {"train": 80, "validation": 10, "test": 40}


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[tuple[str, str]]]:
    return xsum.draw(seed=7, sizes=SIZES)


def sentences(document: str) -> list[str]:
    return [text.rstrip(".") + "." for text in document.split(". ")]


def test_files_have_the_format_of_the_real_ones(
    tmp_path: Path, corpus: dict[str, list[tuple[str, str]]]
) -> None:
    xsum.write(tmp_path / "new", seed=7, sizes=SIZES)
    ids = []
    for split, rows in corpus.items():
        text = (tmp_path / "new" / f"{split}.jsonl").read_text(encoding="utf-8")
        assert text.endswith("}\n")
        read = [json.loads(line) for line in text.splitlines()]
        assert [list(row) for row in read] == [["document", "summary", "id"]] * SIZES[split]
        assert [(row["document"], row["summary"]) for row in read] == rows
        ids += [row["id"] for row in read]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"\d{8}", name) for name in ids)


def test_a_corpus_is_a_function_of_its_seed(corpus: dict[str, list[tuple[str, str]]]) -> None:
    assert xsum.draw(seed=7, sizes=SIZES) == corpus
    assert xsum.draw(seed=8, sizes=SIZES) != corpus
    assert {split: len(rows) for split, rows in xsum.draw(seed=0).items()} == xsum.DEFAULT_SIZES


def test_articles_and_summaries(corpus: dict[str, list[tuple[str, str]]]) -> None:
    documents = [document for rows in corpus.values() for document, _ in rows]
    assert len(set(documents)) == len(documents)
    for rows in corpus.values():
        for document, summary in rows:
            assert 30 <= len(document.split()) <= 110
            assert 6 <= len(summary.split()) <= 30
            assert "{" not in document + summary
            assert len(sentences(document)) >= 5
            assert summary.count(".") == 1  # one sentence
            assert summary not in document
            assert summary[0].isupper()


def test_the_news_tells_which_place_the_summary_is_about(
    corpus: dict[str, list[tuple[str, str]]],
) -> None:
    for document, summary in corpus["train"]:
        parts = sentences(document)
        news, past = (
            [part for part in parts if part.lower().startswith(tuple(map(str.lower, words)))]
            for words in (xsum.NOW, xsum.THEN)
        )
        assert len(news) == 1
        assert len(past) == 1
        assert news[0] != parts[0]
        names = re.findall(r"^((?!All of).+?) is an? ", "\n".join(parts), re.MULTILINE)
        assert len(names) == 2
        subject = [name for name in names if name in news[0]]
        assert len(subject) == 1
        other = next(name for name in names if name != subject[0])
        assert subject[0] in summary
        assert other not in summary
        assert other in past[0]


def test_changes_up_and_down_are_judged() -> None:
    """Prices and ratings that rise are told apart from those that fall."""
    claims = {"raised": 1, "more expensive": 1, "lowered": -1, "cheaper": -1}
    claims |= {"better": 1, "won over": 1, "worse": -1, "disappointed": -1}
    found = []
    for document, summary in xsum.draw(seed=3, sizes={"train": 400})["train"]:
        for claim, direction in claims.items():
            if claim in summary:
                start = next(w for w in xsum.NOW if sentence(w)[:-1] in document)
                news = document.split(sentence(start)[:-1])[1].split(". ")[0]
                levels = [*PRICES[:3], *PRICES[3:], *RATINGS[:3], *RATINGS[3:]]
                told = sorted(
                    (news.index(level), levels.index(level)) for level in levels if level in news
                )
                assert len(told) == 2, news
                old, new = (place for _, place in told)
                if "in place of" in news or "where" in news:
                    old, new = new, old
                assert (new - old) * direction > 0, (news, summary)
                found.append(claim)
    assert set(found) == set(claims)


def test_no_sentence_of_the_article_is_a_good_summary(
    corpus: dict[str, list[tuple[str, str]]],
) -> None:
    documents, summaries = zip(*corpus["test"], strict=True)
    lead = score([sentences(document)[0] for document in documents], summaries).values
    best = [
        max(sentences(document), key=lambda text: score([text], [summary]).values["rouge_1"])
        for document, summary in corpus["test"]
    ]
    oracle = score(best, summaries).values
    other = score([*summaries[1:], summaries[0]], summaries).values
    assert lead["rouge_2"] < 0.2
    assert lead["rouge_l"] < oracle["rouge_l"] < 0.5
    assert other["rouge_l"] < 0.4


@pytest.mark.parametrize("sizes", [{"train": 0}, {"dev": 3}])
def test_bad_sizes_are_errors(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="allowed are sizes of at least 1"):
        xsum.draw(seed=1, sizes=sizes)
