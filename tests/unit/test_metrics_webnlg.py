"""WebNLG's scores: text preparation, TER, parts, what is refused, program and `evaluate` module."""

import json
import math
import random
import shutil
import sys
import types
from pathlib import Path

import evaluate
import pytest
from sacrebleu.metrics import BLEU

from tasks.metrics import webnlg
from tasks.metrics.meteor import MeteorProcess, shared_process
from tasks.metrics.ter import lowest_ter, ter

MODULE = Path(__file__).resolve().parents[2] / "tasks" / "metrics" / "webnlg_nlg"
OUTPUTS = ["Aarhus Airport is in Denmark.", "alan bean, an astronaut, was born in 1932", ""]
GROUPS = [
    ["Aarhus Airport is located in Denmark.", "Denmark is home to Aarhus Airport."],
    ["Alan Bean was born in 1932 and is an astronaut."],
    ["The 11th Mississippi Infantry Monument was erected in 1889."],
]
NO_METEOR = ("bleu", "ter")


# Text


@pytest.mark.parametrize(
    ("text", "prepared"),
    [
        ("Aarhus_Airport isn't (far)!", "aarhus_airport isn ' t ( far ) !"),
        ("  two\tblanks, ", "two blanks ,"),
        ("8.5–9.0 m²", "8 . 5 – 9 . 0 m²"),
        # Lower case first: the dot of the capital I becomes a character that is no word character.
        ("İlhan", "i ̇ lhan"),
        ("", ""),
    ],
)
def test_preparation(text, prepared):
    assert webnlg.prepare(text) == prepared


@pytest.mark.parametrize(
    ("text", "prepared"),
    [
        ("Adolfo Suárez Madrid–Barajas", "adolfo suarez madrid - barajas"),
        ("Weißbier, søster, ılık", "weissbier , soster , ilik"),
        ("İlhan’s", "ilhan ' s"),
        ("A → B", "a - b"),
    ],
)
def test_preparation_of_2017(text, prepared, monkeypatch):
    monkeypatch.setattr(webnlg.importlib.util, "find_spec", lambda name: None)
    assert webnlg.prepare_2017(text) == prepared


def test_characters_without_ascii_form_leave_the_score_empty(monkeypatch):
    monkeypatch.setattr(webnlg.importlib.util, "find_spec", lambda name: None)
    scores = webnlg.score(["北京"], [["Beijing"]], protocol="challenge_2017", metrics=["bleu"])
    assert not scores.values
    assert (
        "no ASCII form of '北' (U+5317) here; run `pip install unidecode`"
        in (scores.missing["bleu"])
    )


def test_the_package_decides_where_it_is_installed(monkeypatch):
    package = types.ModuleType("unidecode")
    package.unidecode = lambda text: text.replace("北", "Bei ")
    package.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "unidecode", package)
    assert webnlg.transliterate("北 x") == "Bei  x"
    assert webnlg.transliterate("plain") == "plain"


# TER


def slow_ter(hypothesis, reference):
    """The rules of `tasks.metrics.ter`, word for word and without any short cut."""

    def distance(words):
        row = list(range(len(reference) + 1))
        for i, word in enumerate(words, start=1):
            before, row = row, [i]
            for j, other in enumerate(reference, start=1):
                row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (word != other)))
        return row[-1]

    words, shifts = list(hypothesis), 0
    while True:
        candidates = []
        for i in range(len(words)):
            for j in range(len(reference)):
                if i == j or words[i] != reference[j]:
                    continue
                length = 1
                while (
                    i + length < len(words)
                    and j + length < len(reference)
                    and words[i + length] == reference[j + length]
                ):
                    length += 1
                left = words[:i] + words[i + length :]
                shifted = left[:j] + words[i : i + length] + left[j:]
                candidates.append((distance(words) - distance(shifted), shifted))
        gain, best = max(candidates, default=(0, words))
        if gain <= 0:
            return (shifts + distance(words)) / len(reference)
        words, shifts = best, shifts + 1


def random_pairs(count):
    rng = random.Random(0)
    for _ in range(count):
        vocabulary = "abcdefghij"[: rng.randint(1, 10)]
        reference = [rng.choice(vocabulary) for _ in range(rng.randint(1, 12))]
        hypothesis = [rng.choice(vocabulary) for _ in range(rng.randint(0, 12))]
        if rng.random() < 0.5:  # shifts that help
            hypothesis = reference[:]
            for _ in range(rng.randint(0, 4)):
                hypothesis.insert(
                    rng.randrange(len(hypothesis)), hypothesis.pop(rng.randrange(len(hypothesis)))
                )
        yield hypothesis, reference


def test_ter_equals_its_rules():
    found = [(ter(*pair), slow_ter(*pair)) for pair in random_pairs(400)]
    assert all(fast == slow for fast, slow in found)
    assert len({fast for fast, _ in found}) > 40


def test_ter_equals_pyter():
    pyter = pytest.importorskip("pyter", reason="pyter3 is not installed")
    for hypothesis, reference in random_pairs(1500):
        assert ter(hypothesis, reference) == pyter.ter(hypothesis, reference)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "rate"),
    [
        # Snover et al. 2006, figure 1: one shift, two substitutions and one insertion of 13 words.
        (
            "THIS WEEK THE SAUDIS denied information published in the AMERICAN new york times",
            "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times",
            3 / 13,
        ),
        ("a b c", "a b c", 0.0),
        ("b c a", "a b c", 1 / 3),
        ("", "a b", 1.0),
        ("a b c d", "e", 4.0),
    ],
)
def test_known_rates(hypothesis, reference, rate):
    assert ter(hypothesis.split(), reference.split()) == pytest.approx(rate)
    assert slow_ter(hypothesis.split(), reference.split()) == pytest.approx(rate)


def test_ter_needs_a_reference():
    with pytest.raises(ValueError, match="the reference has no words"):
        ter(["a"], [])


def test_the_lowest_ter_is_that_of_the_nearest_reference():
    rng = random.Random(1)
    pairs = list(random_pairs(400))
    for hypothesis, own in pairs:
        references = [own] + [rng.choice(pairs)[1] for _ in range(rng.randint(0, 4))]
        rng.shuffle(references)
        expected = min(slow_ter(hypothesis, reference) for reference in references)
        assert lowest_ter(hypothesis, references) == expected


def test_the_lowest_ter_needs_references_with_words():
    with pytest.raises(ValueError, match="no reference"):
        lowest_ter(["a"], [])
    with pytest.raises(ValueError, match="the reference has no words"):
        lowest_ter(["a"], [["a"], []])


def test_ter_of_long_texts_takes_no_minutes():
    words = [f"w{i % 40}" for i in range(150)]
    shuffled = words[:]
    random.Random(0).shuffle(shuffled)
    assert 0 < ter(shuffled[:60], words[:60]) < 1


# Scores


def test_scores_by_hand():
    scores = webnlg.score(OUTPUTS, GROUPS, metrics=NO_METEOR)
    assert list(scores.values) == ["bleu", "ter"]
    # 1 insertion in 7 tokens; "an astronaut" and its commas in 10 words; nothing of 9 words.
    rates = [ter(a.split(), b.split()) for a, b in (
        ("aarhus airport is in denmark .", "aarhus airport is located in denmark ."),
        ("alan bean , an astronaut , was born in 1932",
         "alan bean was born in 1932 and is an astronaut ."),
    )]  # fmt: skip
    assert rates[0] == 1 / 7
    assert scores.values["ter"] == pytest.approx((sum(rates) + 1.0) / 3)


def test_nltk_words_are_scored_by_ter_only():
    # word_tokenize makes two words of "cannot"; the 13a tokens of BLEU keep it.
    scores = webnlg.score(["I cannot go"], [["i can not go"]], metrics=NO_METEOR)
    assert scores.values["ter"] == 0.0
    assert scores.values["bleu"] == 0.0


def test_bleu_is_sacrebleu_on_the_prepared_text():
    outputs = ["The ABC-1 (x) is 3.5 m long, and it's blue.", "A b c d e f."]
    groups = [["The abc-1 is 3.5 m long, and it is blue."], ["A B c d e g.", "a b c d f f f."]]
    scores = webnlg.score(outputs, groups, metrics=["bleu"])
    streams = [[webnlg.prepare(g[i]) if i < len(g) else None for g in groups] for i in range(2)]
    expected = BLEU(tokenize="13a", smooth_method="none", force=True).corpus_score(
        [webnlg.prepare(text) for text in outputs], streams
    )
    assert 0.1 < scores.values["bleu"] == expected.score / 100 < 0.9


@pytest.mark.parametrize(("protocol", "limit"), [("lora", 6), ("challenge_2017", 3)])
def test_further_references_are_dropped(protocol, limit):
    texts = [f"number {word} is a text of ours" for word in "abcdefgh"]
    metrics = [name for name in webnlg.METRICS[protocol] if name != "meteor"]

    def values(output, references):
        return webnlg.score([output], [references], protocol=protocol, metrics=metrics).values

    assert values(texts[limit - 1], texts)["bleu"] == pytest.approx(1.0)
    assert values(texts[limit], texts)["bleu"] < 0.9
    assert values(texts[limit], texts) == values(texts[limit], texts[:limit])


def test_repeated_references_change_nothing_but_empty_ones_do():
    output, reference = "Aarhus Airport is in Denmark now.", "Aarhus Airport is a place in Denmark."
    once = webnlg.score([output], [[reference]], metrics=NO_METEOR)
    assert once == webnlg.score([output], [[reference] * 6], metrics=NO_METEOR)
    # In 2017 a missing reference was an empty line, and its length 0 the closest to 4 of 0 and 8.
    short = "aarhus airport is a"
    lora = webnlg.score([short], [[reference]], metrics=["bleu"]).values["bleu"]
    official = webnlg.score(
        [short], [[reference]], protocol="challenge_2017", metrics=["bleu"]
    ).values["bleu"]
    assert lora == pytest.approx(math.exp(1 - 8 / 4))
    assert official == pytest.approx(1.0)


def test_parts_are_scored_by_themselves():
    parts = {"seen": [0, 2], "unseen": [1], "all": [0, 1, 2]}
    scores = webnlg.score_parts(OUTPUTS, GROUPS, parts, metrics=NO_METEOR)
    assert list(scores.values) == [f"{m}_{p}" for m in NO_METEOR for p in parts]
    for part, indices in parts.items():
        alone = webnlg.score(
            [OUTPUTS[i] for i in indices], [GROUPS[i] for i in indices], metrics=NO_METEOR
        )
        for metric in NO_METEOR:
            assert scores.values[f"{metric}_{part}"] == alone.values[metric]


def test_a_part_without_instances_is_missing():
    parts = {"unseen": [], "all": range(3)}
    scores = webnlg.score_parts(OUTPUTS, GROUPS, parts, metrics=NO_METEOR)
    assert list(scores.values) == ["bleu_all", "ter_all"]
    assert scores.missing == dict.fromkeys(
        ("bleu_unseen", "ter_unseen"), "no instance is of this part"
    )


def test_without_java_only_meteor_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    shared_process().close()
    scores = webnlg.score_parts(OUTPUTS, GROUPS, {"all": range(3), "none": []})
    assert list(scores.values) == ["bleu_all", "ter_all"]
    assert "Java not found" in scores.missing["meteor_all"]
    assert scores.missing["meteor_none"] == "no instance is of this part"


@pytest.mark.parametrize("action", ["dies", "hangs"])
def test_a_process_that_fails_leaves_meteor_empty(action, monkeypatch):
    code = (
        "import sys; sys.exit('no memory')" if action == "dies" else "import time; time.sleep(60)"
    )
    process = MeteorProcess(timeout_s=1.0)
    monkeypatch.setattr(process, "command", lambda: [sys.executable, "-c", code])
    monkeypatch.setattr(webnlg, "shared_process", lambda: process)
    monkeypatch.setattr("tasks.metrics.meteor.shared_process", lambda: process)
    scores = webnlg.score(OUTPUTS, GROUPS)
    assert list(scores.values) == ["bleu", "ter"]
    reason = "ended unexpectedly" if action == "dies" else "no answer within 1 s"
    assert reason in scores.missing["meteor"]
    process.close()


@pytest.mark.parametrize(
    ("predictions", "references", "settings", "message"),
    [
        (["a"], [["b"]], {"protocol": "2017"}, "unknown protocol '2017'; allowed are lora, chall"),
        (["a"], [["b"]], {"metrics": ["rouge"]}, "unknown metric 'rouge'; allowed with protocol"),
        (
            ["a"],
            [["b"]],
            {"protocol": "challenge_2017", "metrics": ["ter"]},
            "unknown metric 'ter'",
        ),
        ([], [], {}, "no predictions to score"),
        (["a"], [], {}, "1 predictions but 0 groups"),
        (["a"], [[]], {}, "instance 0 has no references"),
        (["a"], [["b", " "]], {}, "reference 1 of instance 0 is empty"),
    ],
)
def test_what_cannot_be_scored_is_refused(predictions, references, settings, message):
    with pytest.raises(ValueError, match=message):
        webnlg.score(predictions, references, **settings)


@pytest.mark.long
@pytest.mark.java
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java on PATH")
def test_meteor_of_parts_equals_meteor_of_each():
    parts = {"seen": [0, 2], "unseen": [1], "all": [0, 1, 2]}
    together = webnlg.score_parts(OUTPUTS, GROUPS, parts, metrics=["meteor"])
    for part, indices in parts.items():
        alone = webnlg.score(
            [OUTPUTS[i] for i in indices], [GROUPS[i] for i in indices], metrics=["meteor"]
        )
        assert together.values[f"meteor_{part}"] == alone.values["meteor"]
    assert 0 < together.values["meteor_seen"] < 1


# Program and module


@pytest.fixture
def files(tmp_path):
    predictions, references = tmp_path / "outputs.txt", tmp_path / "references.txt"
    predictions.write_text("\n".join(OUTPUTS[:2]) + "\n", encoding="utf-8")
    references.write_text("\n\n".join("\n".join(group) for group in GROUPS[:2]) + "\n")
    return ["--predictions", str(predictions), "--references", str(references)]


def test_program(files, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    shared_process().close()
    assert webnlg.main([*files, "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    expected = webnlg.score(OUTPUTS[:2], GROUPS[:2])
    assert {name: found[name] for name in expected.values} == expected.values
    assert found["missing"].keys() == {"meteor"}
    assert "meteor: missing: Java not found" in err
    assert webnlg.main([*files, "--protocol", "challenge_2017"]) == 1
    assert capsys.readouterr().out.startswith("bleu: 0.")


def test_program_refuses_files_that_do_not_fit(files, tmp_path, capsys):
    (tmp_path / "outputs.txt").write_text("one\n")
    assert webnlg.main(files) == 2
    assert "outputs.txt has 1 outputs, but" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["default", "lora", "challenge_2017"])
def test_evaluate_module(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    monkeypatch.setenv("PATH", "")
    shared_process().close()
    module = evaluate.load(str(MODULE), name, cache_dir=str(tmp_path))
    protocol = "lora" if name == "default" else name
    computed = module.compute(predictions=OUTPUTS, references=GROUPS)
    expected = webnlg.score(OUTPUTS, GROUPS, protocol=protocol)
    assert computed.pop("missing") == expected.missing
    assert set(computed) == set(webnlg.METRICS[protocol])
    assert computed.pop("meteor") is None
    assert computed == expected.values


def test_evaluate_module_refuses_an_unknown_protocol():
    with pytest.raises(ValueError, match="unknown protocol 'raw' of webnlg_nlg"):
        evaluate.load(str(MODULE), "raw")
