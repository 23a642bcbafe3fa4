"""The WebNLG task: both file layouts, rows, seen and unseen, damaged files, decoding, scores."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tasks.data import read_document
from tasks.data_to_text import ONE_REFERENCE
from tasks.generation import BeamSearch
from tasks.metrics import webnlg as scorers
from tasks.sources import Release
from tasks.tiny.bpe import train_tokenizer
from tasks.tiny.corpora import webnlg as embedded
from tasks.webnlg import PARTS, WebNLG, parse_json, parse_lines

CONFIG = Path(__file__).parents[2] / "configs" / "task" / "webnlg.yaml"
SIZES = {"train": 60, "validation": 6, "test": 12}
NAMES = {"train": "train", "validation": "dev", "test": "test"}


def make_release(hashes: dict[str, str] | None = None) -> Release:
    files = dict.fromkeys((f"{name}.json" for name in NAMES.values()), "0" * 64)
    return Release(
        "owner/name", "0" * 40, "http://127.0.0.1:9", files if hashes is None else hashes
    )


def make_task(**settings: Any) -> WebNLG:
    values: dict[str, Any] = {
        "source": "embedded",
        "release": make_release(),
        "embedded_sizes": SIZES if settings.get("source", "embedded") == "embedded" else None,
    }
    return WebNLG(**{**values, **settings})


def loaded(**settings: Any) -> WebNLG:
    task = make_task(**settings)
    task.load()
    return task


def from_folder(folder: Path, **settings: Any) -> WebNLG:
    return loaded(source="files", data_dir=folder, **settings)


def flatten(content: dict[str, Any]) -> str:
    """The entries of an official file in the other layout."""
    lines = []
    for number, wrapped in enumerate(content["entries"], start=1):
        (value,) = wrapped.values()
        texts = {True: [], False: []}
        for item in value["lexicalisations"]:
            texts[item["comment"] == "good"].append(item["lex"])
        entry = {
            "id": number,
            "category": value["category"],
            "triples": [
                [t["subject"], t["property"], t["object"]] for t in value["modifiedtripleset"]
            ],
            "references": texts[True],
            "rejected": texts[False],
        }
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("webnlg")
    embedded.write(folder, seed=0, sizes=SIZES)
    return folder


@pytest.fixture(scope="module")
def task() -> WebNLG:
    return loaded(decoding=BeamSearch(num_beams=2, max_new_tokens=8, batch_size=5), max_length=128)


@pytest.fixture(scope="module")
def tokenizer(task: WebNLG) -> PreTrainedTokenizerFast:
    texts = [f"{i.context} {' '.join(i.references)}" for i in task.inputs("train")]
    tokenizer = train_tokenizer(texts, vocab_size=500)
    tokenizer.model_max_length = 160
    return tokenizer


def entry(
    *texts: str, category: str = "Town", triples: tuple[tuple[str, str, str], ...] | None = None
) -> dict[str, Any]:
    triples = (("A", "b", "C"),) if triples is None else triples
    return {
        "category": category,
        "modifiedtripleset": [{"subject": s, "property": p, "object": o} for s, p, o in triples],
        "lexicalisations": [{"comment": "good", "lex": text} for text in texts],
    }


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """Write an official folder; a split that is not given has one entry of its own."""
    for split, name in NAMES.items():
        entries = splits.get(split, [entry("a text", triples=((split, "is", "here"),))])
        content = {"entries": [{str(i): value} for i, value in enumerate(entries, start=1)]}
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# Loading


def test_both_layouts_and_the_embedded_corpus_give_the_same_rows(
    corpus: Path, tmp_path: Path, task: WebNLG, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folders = {name: tmp_path / name for name in ("plain", "packed", "lines", "both")}
    for folder in folders.values():
        folder.mkdir()
    for path in corpus.iterdir():
        data = path.read_bytes()
        lines = flatten(json.loads(data)).encode()
        (folders["plain"] / path.name).write_bytes(data)
        (folders["packed"] / f"{path.name}.gz").write_bytes(gzip.compress(data))
        (folders["lines"] / f"{path.name}l.gz").write_bytes(gzip.compress(lines))
        (folders["both"] / path.name).write_bytes(data)
        (folders["both"] / f"{path.name}l").write_bytes(lines)
    for name, folder in folders.items():
        caplog.clear()
        other = from_folder(folder)
        for split in SIZES:
            assert other.inputs(split) == task.inputs(split)
            assert [(r.context, r.completion, r.category) for r in other._rows[split]] == [
                (r.context, r.completion, r.category) for r in task._rows[split]
            ]
        found, expected = other.provenance(), task.provenance()
        for key in ("rows", "inputs", "counts", "seen_categories", "protocol"):
            assert found[key] == expected[key], key
        read = [file["name"] for file in found["files"]]
        assert all(file.endswith("l") == (name == "lines") for file in read)
        said = "holds both layouts; reading the official train.json, dev.json, test.json"
        assert (said in caplog.text) == (name == "both")


def test_rows_are_the_good_texts_of_linearised_triples(tmp_path: Path) -> None:
    item = entry(
        " First text. ",
        "Second\ntext.",
        category="Airport",
        triples=(("Aarhus_Airport", "cityServed", '"Aarhus, Denmark"@en'), ("X", "y", "1.0")),
    )
    item["lexicalisations"].insert(1, {"comment": "toFix", "lex": ""})
    task = from_folder(write(tmp_path, train=[item]))
    context = 'Aarhus_Airport : cityServed : "Aarhus, Denmark"@en | X : y : 1.0'
    assert [(r.context, r.completion, r.place, r.category) for r in task._rows["train"]] == [
        (context, "First text.", "train.json:1.1", "Airport"),
        (context, "Second text.", "train.json:1.2", "Airport"),
    ]
    assert task.inputs("train")[0].references == ("First text.", "Second text.")
    assert task.provenance()["counts"]["train"] == {
        "entries": 1, "without_good_text": 0, "rejected_texts": 1,
    }  # fmt: skip


def test_entries_without_a_good_text_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    item = entry("bad")
    item["lexicalisations"][0]["comment"] = "toFix"
    task = from_folder(write(tmp_path, train=[entry("x"), item, entry()]))
    assert "train.json: 2 of 3 entries have no text marked 'good' and give no row" in caplog.text
    assert task.provenance()["rows"]["train"] == 1
    assert task.provenance()["counts"]["train"]["without_good_text"] == 2


def test_provenance_tells_official_files_from_others(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hashes = {
        f"{name}.json": hashlib.sha256((corpus / f"{name}.json").read_bytes()).hexdigest()
        for name in NAMES.values()
    }
    official = make_release(hashes)
    found = from_folder(corpus, release=official).provenance()
    assert found["revision"] == official.revision
    assert found["inputs"]["test"] == SIZES["test"]
    counts = found["counts"]["train"]
    assert found["inputs"]["train"] == counts["entries"] - counts["without_good_text"]
    assert found["seen_categories"] == sorted(c.capitalize() for c in embedded.SEEN)
    assert not caplog.records
    found = from_folder(corpus, release=make_release(hashes | {"dev.json": "f" * 64})).provenance()
    assert found["revision"] is None
    assert [file["official"] for file in found["files"]] == [True, False, True]
    assert "dev.json is not dev.json of owner/name@" in caplog.text


def test_more_shared_inputs_than_in_the_official_data_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = [entry("x", triples=((str(i), "is", "there"),)) for i in range(11)]
    from_folder(write(tmp_path, train=shared, test=shared[:10]))
    assert "also occur" not in caplog.text
    from_folder(write(tmp_path, train=shared, test=shared))
    assert "11 of 11 inputs of test also occur in train; in the official data 10 do" in caplog.text


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("{}")
    (tmp_path / "dev.jsonl").write_text("{}")
    with pytest.raises(
        FileNotFoundError,
        match=r"neither train.json, dev.json, test.json nor train.jsonl, .*holds dev.jsonl, train",
    ):
        from_folder(tmp_path)


def test_the_hub_without_network_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    with pytest.raises(RuntimeError, match=r"could not download .*task\.source=files"):
        loaded(source="hub", cache_dir=tmp_path)


# Damaged files


def damaged(change: Any) -> str:
    content = {"entries": [{"1": entry("x")}, {"2": entry("y")}]}
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"entries": [\n{"1": {"cat', r"train.json, line 2: no valid JSON .*truncated"),
        ("[]", r"train.json: expected an object with 'entries', got \[\]"),
        ('{"items": []}', r"train.json: no 'entries'; the object has 'items'"),
        ('{"entries": {}}', r"train.json: 'entries' is {}; expected a list"),
        ('{"entries": []}', r"train.json has no entries"),
        ('{"entries": [{"1": {}, "2": {}}]}', "entry 1: expected an object with one key"),
        (
            damaged(lambda c: c["entries"][1]["2"].pop("lexicalisations")),
            "entry 2: no 'lexicalisations'; the object has 'category', 'modifiedtripleset'",
        ),
        (
            damaged(lambda c: c["entries"][1]["2"].update(category=3)),
            "entry 2: 'category' is 3; expected a text",
        ),
        (
            damaged(lambda c: c["entries"][1]["2"].update(modifiedtripleset=[])),
            "entry 2: no triples",
        ),
        (
            damaged(lambda c: c["entries"][0]["1"]["modifiedtripleset"][0].pop("object")),
            "entry 1: no 'object'; the object has 'subject', 'property'",
        ),
        (
            damaged(lambda c: c["entries"][0]["1"]["lexicalisations"][0].update(lex=" ")),
            "entry 1: the 1. good text is empty",
        ),
        (
            damaged(lambda c: c["entries"][0]["1"]["lexicalisations"][0].update(lex=None)),
            "entry 1: 'lex' is None; expected a text",
        ),
        (
            damaged(lambda c: [e.popitem()[1] and e.update(x=entry()) for e in c["entries"]]),
            "none of 2 entries has a text marked 'good'; only a test split may",
        ),
    ],
)
def test_damaged_official_files(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path)
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_folder(tmp_path)


LINE = {"id": 1, "category": "Town", "triples": [["A", "b", "C"]], "references": ["x"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"triples": [["A", "b"]]}, r"line 2: \['A', 'b'\] in 'triples'; expected \[subject"),
        ({"triples": [["A", "b", 1]]}, "line 2: 'triples' is 1; expected a text"),
        ({"triples": "A b C"}, "line 2: 'triples' is 'A b C'; expected a list"),
        ({"references": [""]}, "line 2: the 1. good text is empty"),
        ({"references": None}, "line 2: 'references' is None; expected a list"),
        ({"id": True}, "line 2: 'id' is True; expected a number or text"),
    ],
)
def test_damaged_flattened_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | change) + "\n")
    with pytest.raises(ValueError, match=f"train.jsonl, {message}"):
        list(parse_lines(read_document(path)))
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE)[:20])
    with pytest.raises(ValueError, match="line 2: no valid JSON"):
        list(parse_lines(read_document(path)))


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    write(tmp_path)
    text = (tmp_path / "dev.json").read_bytes()
    (tmp_path / "dev.json").write_bytes(b"\n\n" + text.replace(b"a text", b"caf\xe9"))
    with pytest.raises(ValueError, match=r"dev.json, line 3: byte 0xe9 is not UTF-8"):
        from_folder(tmp_path)


def test_both_parsers_give_the_same_entries(corpus: Path, tmp_path: Path) -> None:
    document = read_document(corpus / "train.json")
    (tmp_path / "train.jsonl").write_text(flatten(json.loads(document.text)), encoding="utf-8")
    assert list(parse_lines(read_document(tmp_path / "train.jsonl"))) == list(parse_json(document))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "web"}, "source='web'.* 'hub', 'files', 'embedded'"),
        ({"protocol": "2017"}, "protocol='2017'.* 'lora', 'challenge_2017'"),
        ({"source": "files"}, "source=files with task.data_dir=None"),
        ({"data_dir": "x"}, "source=embedded with task.data_dir=x"),
        ({"max_length": 2}, "max_length=2 .*>= 3"),
        ({"release": make_release({"train.json": "0" * 64})}, r"lacks \['dev.json', 'test.json'\]"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(**settings)


def test_the_config_is_the_recipe() -> None:
    task = instantiate(OmegaConf.load(CONFIG))
    assert isinstance(task, WebNLG)
    assert (task.name, task.source.kind, task.protocol, task.max_length) == (
        "webnlg",
        "hub",
        "lora",
        512,
    )
    assert task.decoding == BeamSearch(
        num_beams=10, length_penalty=0.8, no_repeat_ngram_size=4, max_new_tokens=64
    )
    assert task.source.release.commit in task.source.release.url


# Tokens and decoding


def test_the_layout_of_an_example(task: WebNLG, tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token_id
    examples = task.examples("train", tokenizer)
    row, first = task._rows["train"][0], examples[0]
    assert len(examples) == task.provenance()["rows"]["train"]
    assert list(first.tokens) == [
        *tokenizer.encode(row.context), end, *tokenizer.encode(" " + row.completion), end,
    ]  # fmt: skip
    assert first.num_context == len(tokenizer.encode(row.context)) + 1
    assert task.length(first) == len(first.tokens)


def test_a_context_longer_than_the_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    long = entry("x", triples=tuple((f"Place {i}", "near", "Town") for i in range(60)))
    settings: dict[str, Any] = {
        "decoding": BeamSearch(num_beams=1, max_new_tokens=4), "max_length": 512,
    }  # fmt: skip
    task = from_folder(write(tmp_path, train=[long]), **settings)
    with pytest.raises(
        ValueError, match=r"train.json:1.1: its context has \d+ tokens, so a length"
    ):
        task.examples("train", tokenizer)
    task = from_folder(write(tmp_path, test=[long]), **settings)
    (chunk,) = task.predict(make_model(), tokenizer, "test")
    assert len(chunk) == 1
    assert "1 of 1 prompts are longer than 156 tokens and lose their beginning" in caplog.text


def make_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=500, n_positions=160, n_embd=16, n_layer=1, n_head=1, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def test_every_input_is_decoded_once_and_scored(
    task: WebNLG, tokenizer: PreTrainedTokenizerFast
) -> None:
    predictions = [p for chunk in task.predict(make_model(), tokenizer, "test") for p in chunk]
    assert sorted(p["id"] for p in predictions) == [item.id for item in task.inputs("test")]
    scores = without_meteor().score(predictions)
    assert set(scores.values) == {f"{m}_{p}" for m in ("bleu", "ter") for p in PARTS}


# Scores


def as_predictions(task: WebNLG, texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"id": item.id, "input": item.context, "prediction": text}
        for item, text in zip(task.inputs("test"), texts, strict=True)
    ]


def without_meteor(**settings: Any) -> WebNLG:
    """A task that scores all but METEOR, which has to start Java (see the tests of the scorers)."""
    task = loaded(**settings)
    task.metrics = tuple(spec for spec in task.metrics if not spec.name.startswith("meteor"))
    return task


@pytest.mark.parametrize("protocol", ["lora", "challenge_2017"])
def test_the_metrics_of_the_table(protocol: str) -> None:
    task = make_task(protocol=protocol)
    names = [f"{m}_{p}" for m in scorers.METRICS[protocol] for p in ("seen", "unseen", "all")]
    assert [spec.name for spec in task.metrics] == names
    assert {spec.name for spec in task.metrics if not spec.higher_is_better} == {
        name for name in names if name.startswith("ter")
    }
    assert {spec.scale for spec in task.metrics if spec.name.startswith("bleu")} == {100}
    assert task.name == ("webnlg" if protocol == "lora" else "webnlg_challenge_2017")


def test_the_protocols_never_share_a_label() -> None:
    lora, official = make_task(), make_task(protocol="challenge_2017")
    assert not {m.label for m in lora.metrics} & {m.label for m in official.metrics}


def test_seen_means_that_the_category_occurs_in_train() -> None:
    task = without_meteor()
    items = task.inputs("test")
    unseen = {c.capitalize() for c in embedded.UNSEEN}
    assert 0 < sum(item.category in unseen for item in items) < len(items)
    # Right for the seen categories, nonsense for the others.
    texts = ["zzz" if item.category in unseen else item.references[0] for item in items]
    scores = task.score(as_predictions(task, texts)[::-1])
    assert (scores.values["bleu_seen"], scores.values["ter_seen"]) == pytest.approx((1.0, 0.0))
    assert (scores.values["bleu_unseen"], scores.values["ter_unseen"]) == pytest.approx((0.0, 1.0))
    assert 0 < scores.values["bleu_all"] < 1
    assert scores.values["ter_all"] == pytest.approx(
        sum(item.category in unseen for item in items) / len(items)
    )


def test_a_test_set_without_unseen_categories_says_so(tmp_path: Path) -> None:
    task = without_meteor(source="files", data_dir=write(tmp_path))
    scores = task.score(as_predictions(task, ["a text"]))
    assert scores.values["ter_seen"] == scores.values["ter_all"] == 0.0
    assert scores.missing == dict.fromkeys(
        ("bleu_unseen", "ter_unseen"), "no instance is of this part"
    )


def test_a_test_split_without_texts_gives_predictions_only(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    empty = [entry(triples=((str(i), "is", "there"),)) for i in range(3)]
    task = from_folder(
        write(tmp_path, test=empty), decoding=BeamSearch(num_beams=1, max_new_tokens=4)
    )
    assert "test.json has no texts: its 3 inputs are decoded, but there will be no scores" in (
        caplog.text
    )
    assert task.provenance()["rows"]["test"] == 0
    assert [item.references for item in task.inputs("test")] == [()] * 3
    predictions = [p for chunk in task.predict(make_model(), tokenizer, "test") for p in chunk]
    assert len(predictions) == 3
    scores = task.score(predictions)
    assert not scores.values
    assert set(scores.missing) == {spec.name for spec in task.metrics}
    assert "there are predictions only" in scores.missing["bleu_all"]
    assert not task.reference_scores("test")[ONE_REFERENCE].values


def test_reference_scores_leave_the_first_reference_out(monkeypatch: pytest.MonkeyPatch) -> None:
    task = without_meteor()
    scores = task.reference_scores("test")[ONE_REFERENCE]
    assert 0.1 < scores.values["bleu_all"] < 1.0
    assert 0.0 < scores.values["ter_all"] < 0.7

    calls: list[Any] = []
    monkeypatch.setattr(
        "tasks.webnlg.metrics.score_parts", lambda *args, **_: calls.append(args) or scores
    )
    task.reference_scores("test")
    texts, references, _ = calls[0]
    items = [item for item in task.inputs("test") if len(item.references) > 1]
    for item, text, others in zip(items, texts, references, strict=True):
        assert (text, *others) == item.references


def test_predictions_of_other_data_are_refused(task: WebNLG) -> None:
    good = as_predictions(task, ["x"] * SIZES["test"])
    other = copy.deepcopy(good)
    other[0]["input"] = "A : b : C"
    for predictions, message in (
        (good[:-1], "no prediction for 1 of 12 inputs of test: test-11"),
        (other, "test-00 is for the input 'A : b : C'"),
    ):
        with pytest.raises(ValueError, match=message):
            task.score(predictions)


# Real data


@pytest.mark.skipif(
    "DELTA_LORA_DATA" not in os.environ,
    reason="set DELTA_LORA_DATA to a folder with webnlg to check the real files",
)
def test_the_real_release(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    folder = Path(os.environ["DELTA_LORA_DATA"]) / "webnlg"
    settings = {"source": "files", "data_dir": str(folder)}
    task = instantiate(OmegaConf.merge(OmegaConf.load(CONFIG), settings))
    task.load()
    found = task.provenance()
    assert found["rows"] == {"train": 18_025, "validation": 2_258, "test": 4_928}
    assert found["inputs"] == {"train": 6_888, "validation": 870, "test": 1_862}
    assert {split: c["without_good_text"] for split, c in found["counts"].items()} == {
        "train": 5, "validation": 1, "test": 0,
    }  # fmt: skip
    assert all(file["official"] for file in found["files"])
    assert not caplog.records
    assert found["seen_categories"] == [
        "Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument",
        "SportsTeam", "University", "WrittenWork",
    ]  # fmt: skip
    seen = [item.category in found["seen_categories"] for item in task.inputs("test")]
    assert (sum(seen), len(seen) - sum(seen)) == (971, 891)

    for name in NAMES.values():
        (tmp_path / f"{name}.jsonl.gz").symlink_to(folder / f"{name}.jsonl.gz")
    other = instantiate(
        OmegaConf.merge(OmegaConf.load(CONFIG), settings | {"data_dir": str(tmp_path)})
    )
    other.load()
    for split in NAMES:
        assert other.inputs(split) == task.inputs(split)
        assert [(r.context, r.completion, r.category) for r in other._rows[split]] == [
            (r.context, r.completion, r.category) for r in task._rows[split]
        ]
    assert other.provenance()["revision"] is None
