"""The XSum task: loading, tokens, decoding, scoring."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from tasks.generation import Seq2SeqBeamSearch
from tasks.sources import Release
from tasks.tiny.bpe import train_pair_tokenizer, train_tokenizer
from tasks.tiny.corpora import xsum as embedded
from tasks.xsum import HUB_FILES, OFFICIAL_ROWS, XSum

ROOT = Path(__file__).parents[2]
SIZES = {"train": 40, "validation": 4, "test": 10}
#: of files that no test downloads.
RELEASE = Release(
    "owner/name", "a" * 40, "http://127.0.0.1:9", dict.fromkeys(HUB_FILES.values(), "0" * 64)
)


def make_task(**settings: Any) -> XSum:
    values: dict[str, Any] = {
        "source": "embedded",
        "release": RELEASE,
        "embedded_sizes": SIZES if settings.get("source", "embedded") == "embedded" else None,
        "decoding": Seq2SeqBeamSearch(num_beams=2, max_length=12, batch_size=4),
    }
    return XSum(**{**values, **settings})


def make_loaded(**settings: Any) -> XSum:
    task = make_task(**settings)
    task.load()
    return task


def write_split(folder: Path, name: str, rows: list[dict[str, Any] | str]) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_files(folder: Path, **changed: list[dict[str, Any] | str]) -> Path:
    """Write three splits of two rows each, some of them changed."""
    for split in OFFICIAL_ROWS:
        rows: list[dict[str, Any] | str] = [
            {"document": f"{split} one.\nIts second line.", "summary": "First.", "id": f"{split}1"},
            {"document": f"{split} two.", "summary": "Second.", "id": None},
        ]
        write_split(folder, f"{split}.jsonl", changed.get(split, rows))
    return folder


@pytest.fixture(scope="module")
def task() -> XSum:
    return make_loaded()


@pytest.fixture(scope="module")
def tokenizer(task: XSum) -> PreTrainedTokenizerFast:
    """A tokenizer like BART's."""
    texts = [row.document for row in task.inputs("train")]
    return train_pair_tokenizer(texts, vocab_size=400, max_length=256, segments=False)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=256,
        init_std=0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    return BartForConditionalGeneration(config).eval()


# Loading


def test_files_and_the_embedded_corpus_are_read_alike(tmp_path: Path, task: XSum) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    embedded.write(plain, seed=0, sizes=SIZES)
    packed.mkdir()
    for path in plain.iterdir():
        (packed / f"{path.stem}_subset.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    for folder in (plain, packed):
        other = make_loaded(source="files", data_dir=folder)
        for split in SIZES:
            found = [(row.id, row.document, row.summary) for row in other.inputs(split)]
            assert found == [(r.id, r.document, r.summary) for r in task.inputs(split)]
            assert len(found) == SIZES[split]
        hashes = [file["sha256"] for file in other.provenance()["files"]]
        assert hashes == [file["sha256"] for file in task.provenance()["files"]]
        assert hashes == [
            hashlib.sha256((plain / f"{split}.jsonl").read_bytes()).hexdigest() for split in SIZES
        ]


def test_subsets_are_said_to_be_no_official_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_loaded(source="files", data_dir=write_files(tmp_path))
    for split, official in OFFICIAL_ROWS.items():
        assert f"{split}.jsonl has 2 of the {official} rows of the official {split}" in caplog.text
    found = task.provenance()
    assert found["rows"] == {"train": 2, "validation": 2, "test": 2}
    assert [file["official"] for file in found["files"]] == [False] * 3
    assert [file["official_rows"] for file in found["files"]] == list(OFFICIAL_ROWS.values())
    assert found["revision"] is None
    assert [row.id for row in task.inputs("test")] == ["test1", "test-000002"]
    assert task.inputs("test")[0].document == "test one.\nIts second line."


@pytest.mark.parametrize(
    ("split", "row", "message"),
    [
        ("train", {"document": " \n", "summary": "x"}, "line 2: the document is empty"),
        ("train", {"document": "x", "summary": " "}, "line 2: the summary is empty"),
        ("test", {"document": "x", "summary": ""}, "line 2: the summary is empty"),
        ("validation", {"document": "x"}, "line 2: no 'summary'"),
        ("train", {"document": "x", "summary": None}, "line 2: 'summary' is None"),
        ("test", {"document": "x"}, "line 2: no summary, but the rows before it are different"),
        ("test", {"summary": "x"}, "line 2: no 'document'"),
        ("train", '{"document": "x", "summ', "line 2: no valid JSON"),
        ("train", {"document": "x", "summary": "y", "id": "same"}, "'same' of train is also that"),
    ],
)
def test_damaged_rows(tmp_path: Path, split: str, row: dict[str, Any] | str, message: str) -> None:
    good = {"document": "good", "summary": "good", "id": "same"}
    folder = write_files(tmp_path, **{split: [good, row]})
    with pytest.raises(ValueError, match=rf"{split}\.jsonl.*{message}"):
        make_loaded(source="files", data_dir=folder)


def test_damaged_bytes(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    (folder / "test.jsonl").write_bytes(
        b'{"document": "a", "summary": "b"}\n{"document": "\xe9"}\n'
    )
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2: byte 0xe9 is not UTF-8"):
        make_loaded(source="files", data_dir=folder)


def test_missing_and_double_files(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    (folder / "test_subset.jsonl").write_bytes((folder / "test.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"both test\.jsonl and test_subset\.jsonl"):
        make_loaded(source="files", data_dir=folder)
    (folder / "test.jsonl").unlink()
    (folder / "train.jsonl").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no train\.jsonl or train_subset\.jsonl .* it holds test_subset"
    ):
        make_loaded(source="files", data_dir=folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_loaded(source="files", data_dir=tmp_path / "nowhere")


def test_shared_documents_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any] | str] = [{"document": "train two.", "summary": "x"}]
    make_loaded(source="files", data_dir=write_files(tmp_path, test=rows))
    assert "1 of 1 documents of test also occur in train" in caplog.text
    assert "validation also" not in caplog.text


def make_release(cache: Path, **counts: int) -> Release:
    """Return a release whose Parquet files lie in `cache`, so that nothing is downloaded."""
    files = {}
    for split, count in counts.items():
        path = cache / "owner--name" / ("a" * 40) / HUB_FILES[split]
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            "document": [
                "" if (split, n) == ("train", 1) else f"{split} {n}" for n in range(count)
            ],
            "summary": [" " if (split, n) == ("test", 7) else "text" for n in range(count)],
            "id": [f"{split}{n}" for n in range(count)],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        files[HUB_FILES[split]] = hashlib.sha256(path.read_bytes()).hexdigest()
    return Release("owner/name", "a" * 40, "http://127.0.0.1:9", files)


def test_the_hubs_files_are_read_from_the_cache_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tasks.xsum.OFFICIAL_ROWS", {"train": 3, "validation": 2, "test": 2})
    release = make_release(tmp_path, train=3, validation=2, test=2)
    task = make_task(source="hub", release=release, cache_dir=tmp_path)
    task.check_source()
    task.load()
    found = task.provenance()
    assert found["revision"] == f"owner/name@{'a' * 40}"
    assert [(file["name"], file["rows"]) for file in found["files"]] == [
        ("default/xsum-train.parquet", 3),
        ("default/xsum-validation.parquet", 2),
        ("default/xsum-test.parquet", 2),
    ]
    assert [file["sha256"] for file in found["files"]] == list(release.files.values())
    row = task.inputs("train")[2]
    assert (row.id, row.document, row.summary, row.place) == (
        "train2",
        "train 2",
        "text",
        "train:3",
    )
    assert "1 documents of the official train split are empty; they are kept" in caplog.text


def test_files_of_the_hub_that_are_not_the_official_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.xsum.OFFICIAL_ROWS", {"train": 3, "validation": 2, "test": 8})
    release = make_release(tmp_path, train=3, validation=2, test=8)
    with pytest.raises(ValueError, match="test, row 8: the summary is empty"):
        make_loaded(source="hub", release=release, cache_dir=tmp_path)
    release = make_release(tmp_path, train=3, validation=1, test=2)
    with pytest.raises(ValueError, match="1 rows in validation, officially 2"):
        make_loaded(source="hub", release=release, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"release\.files lacks \['default/xsum-test\.parquet'\]"):
        make_task(release=make_release(tmp_path, train=1, validation=1))


def test_a_source_is_checked_before_it_is_read(tmp_path: Path) -> None:
    make_task().check_source()  # embedded
    with pytest.raises(RuntimeError, match=r"xsum-train\.parquet .* cannot be downloaded"):
        make_task(source="hub", cache_dir=tmp_path).check_source()
    folder = write_files(tmp_path)
    make_task(source="files", data_dir=folder).check_source()
    (folder / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no test\.jsonl or test_subset\.jsonl"):
        make_task(source="files", data_dir=folder).check_source()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "web"}, "source='web'.* 'hub', 'files', 'embedded'"),
        ({"aggregate": "max"}, "aggregate='max'.* 'mean', 'bootstrap'"),
        ({"source": "files"}, "source=files with task.data_dir=None"),
        ({"data_dir": "x"}, "source=embedded with task.data_dir=x"),
        ({"max_source_length": 2}, "max_source_length=2 .*>= 3"),
        ({"max_target_length": 2}, "max_target_length=2 .*>= 3"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(**settings)


def test_nothing_works_before_loading(task: XSum) -> None:
    bare = make_task()
    for call in (bare.provenance, bare.inputs):
        with pytest.raises(RuntimeError, match=r"call load\(\) first"):
            call()
    with pytest.raises(ValueError, match="split='dev'; allowed: train, validation, test"):
        task.inputs("dev")


def test_the_config_is_the_recipe() -> None:
    task = instantiate(OmegaConf.load(ROOT / "configs" / "task" / "xsum.yaml"))
    assert isinstance(task, XSum)
    assert (task.source.kind, task.max_source_length, task.max_target_length) == ("hub", 768, 64)
    release = task.source.release
    assert release.revision == f"EdinburghNLP/xsum@{release.url.rpartition('/')[2]}"
    assert set(release.files) == set(HUB_FILES.values())
    decoding = task.decoding
    assert (decoding.num_beams, decoding.max_length) == (8, 64)
    left_open = ("length_penalty", "no_repeat_ngram_size", "early_stopping", "forced_bos")
    assert [getattr(decoding, name) for name in left_open] == [None] * 4


# Tokens


def test_the_layout_of_an_example(task: XSum, tokenizer: PreTrainedTokenizerFast) -> None:
    rows, examples = task.inputs("train"), task.examples("train", tokenizer)
    assert len(examples) == len(rows)
    for row, example in zip(rows, examples, strict=True):
        assert example.id == row.place
        for tokens, text in ((example.source, row.document), (example.target, row.summary)):
            inside = tokenizer.encode(text, add_special_tokens=False)
            assert tokens.tolist() == [tokenizer.bos_token_id, *inside, tokenizer.eos_token_id]
    batch = task.collate(examples[:3])
    assert batch.num_targets == sum(len(example.target) for example in examples[:3])


def test_only_the_first_rows_can_be_used(caplog: pytest.LogCaptureFixture) -> None:
    task, part = make_loaded(), make_loaded(max_rows={"test": 3})
    assert part.inputs("test") == task.inputs("test")[:3]
    assert part.inputs("train") == task.inputs("train")
    assert part.provenance()["max_rows"] == {"test": 3}
    assert "using the first 3 of" in caplog.text
    assert "max_rows" not in task.provenance()
    with pytest.raises(ValueError, match="names dev; it may name train, validation, test"):
        make_loaded(max_rows={"dev": 3})
    with pytest.raises(ValueError, match=r"task\.max_rows\.test=0 .*>= 1"):
        make_loaded(max_rows={"test": 0})


def test_long_documents_are_cut_and_counted_once(
    tmp_path: Path,
    model: BartForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = {"document": "word " * 50_000, "summary": "It was long. " * 30}
    folder = write_files(tmp_path, train=[long, {"document": "short", "summary": "Short."}])
    task = make_loaded(source="files", data_dir=folder, max_target_length=20)
    first, second = task.examples("train", tokenizer)
    assert (len(first.source), len(first.target)) == (256, 20)  # 256: the model's positions
    assert first.source[-1] == first.target[-1] == tokenizer.eos_token_id
    assert len(second.source) < 10
    task.examples("train", tokenizer)
    assert caplog.text.count("1 of 2 train documents are longer than 256 tokens") == 1
    assert caplog.text.count("1 of 2 train summaries are longer than 20 tokens") == 1
    task.examples("validation", tokenizer)
    facts = task.describe(model, tokenizer)["truncated"]
    assert facts["train documents"] == 1
    assert facts["validation summaries"] == facts["test documents"] == 0


def test_a_tokenizer_without_an_end_token_is_an_error(task: XSum) -> None:
    plain = train_tokenizer(["no template here"], vocab_size=300)
    with pytest.raises(ValueError, match="puts no end token behind a text"):
        task.examples("train", plain)


# Decoding


def flatten(chunks: Any) -> dict[str, dict[str, Any]]:
    return {p["id"]: p for chunk in chunks for p in chunk}


def test_predictions(
    task: XSum, tokenizer: PreTrainedTokenizerFast, model: BartForConditionalGeneration
) -> None:
    batched = flatten(task.predict(model, tokenizer, "test"))
    one = Seq2SeqBeamSearch(num_beams=2, max_length=12, batch_size=1)
    assert flatten(make_loaded(decoding=one).predict(model, tokenizer, "test")) == batched
    assert list(flatten(task.predict(model, tokenizer, "validation"))) != list(batched)
    assert len({p["prediction"] for p in batched.values()}) > 2
    for row in task.inputs("test"):
        found = batched[row.id]
        sha1 = hashlib.sha1(row.document.encode()).hexdigest()
        assert list(found) == ["id", "input", "prediction"]
        assert found["input"] == f"{row.document[:80].strip()} [sha1 {sha1}]"
        assert found["prediction"] == found["prediction"].strip()
        assert "<" not in found["prediction"]
    generation = task.describe(model, tokenizer)["generation"]
    assert generation["num_beams"] == {"value": 2, "origin": "recipe"}
    assert generation["forced_eos_token_id"]["origin"] == "checkpoint"
    json.dumps(task.describe(model, tokenizer))


def test_decoding_resumes_without_another_composition(
    task: XSum,
    tokenizer: PreTrainedTokenizerFast,
    model: BartForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def generate(self: Seq2SeqBeamSearch, model: Any, sources: Any) -> list[list[int]]:
        calls.append(len(sources))
        return [source.tolist()[1:9] for source in sources]

    monkeypatch.setattr(Seq2SeqBeamSearch, "generate", generate)
    chunks = list(task.predict(model, tokenizer, "test"))
    assert calls == [len(chunk) for chunk in chunks] == [4, 4, 2]
    lengths = {r.id: len(tokenizer(r.document)["input_ids"]) for r in task.inputs("test")}
    order = [lengths[p["id"]] for chunk in chunks for p in chunk]
    assert order == sorted(order, reverse=True)
    torn = chunks[0] + chunks[1][:2]
    assert list(task.predict(model, tokenizer, "test", done=torn)) == [chunks[1][2:], chunks[2]]
    assert calls == [4, 4, 2, 4, 2]  # a torn chunk is decoded whole
    assert not list(task.predict(model, tokenizer, "test", done=flatten(chunks).values()))


def test_equal_documents_are_decoded_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model: BartForConditionalGeneration
) -> None:
    texts = ["same text", "other", "same text", "same text"]
    rows: list[dict[str, Any] | str] = [{"document": text, "summary": "x"} for text in texts]
    task = make_loaded(source="files", data_dir=write_files(tmp_path, test=rows))
    (chunk,) = task.predict(model, tokenizer, "test")
    assert len(chunk) == 4
    found = {p["id"]: p["prediction"] for p in chunk}
    assert len({found[f"test-00000{n}"] for n in (1, 3, 4)}) == 1


# Scoring


def as_predictions(task: XSum, texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"id": row.id, "input": row.key, "prediction": text}
        for row, text in zip(task.inputs("test"), texts, strict=True)
    ]


def test_scores(task: XSum) -> None:
    summaries = [row.summary or "" for row in task.inputs("test")]
    perfect = task.score(as_predictions(task, summaries))
    names = ["rouge_1", "rouge_2", "rouge_l", "rouge_lsum"]
    assert [spec.name for spec in task.metrics] == names
    assert perfect.values == pytest.approx(dict.fromkeys(names, 1.0))
    shuffled = as_predictions(task, [*summaries[1:], summaries[0]])
    worse = task.score(shuffled[::-1])  # the order of predictions does not matter
    assert worse.values == task.score(shuffled).values
    assert all(0 < worse.values[name] < 0.8 for name in names)
    bootstrap = make_loaded(aggregate="bootstrap")
    assert bootstrap.score(shuffled).values != worse.values
    assert bootstrap.provenance()["aggregate"] == "bootstrap"


def test_predictions_must_belong_to_the_documents(task: XSum) -> None:
    good = as_predictions(task, ["x"] * SIZES["test"])
    for predictions, message in (
        (good[:-1], "no prediction for 1 of 10 inputs of test"),
        ([{**good[0], "input": "other"}, *good[1:]], "it was made from other data"),
    ):
        with pytest.raises(ValueError, match=message):
            task.score(predictions)


def test_a_test_split_without_summaries_gives_predictions_only(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    model: BartForConditionalGeneration,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows: list[dict[str, Any] | str] = [{"document": "a"}, {"document": "b", "summary": None}]
    task = make_loaded(source="files", data_dir=write_files(tmp_path, test=rows))
    assert "the test split has no summaries: predictions only, no scores" in caplog.text
    predictions = list(flatten(task.predict(model, tokenizer, "test")).values())
    scores = task.score(predictions)
    assert not scores.values
    assert set(scores.missing) == {spec.name for spec in task.metrics}
    assert "the test split has no summaries" in scores.missing["rouge_1"]
    with pytest.raises(ValueError, match="the test split has no summaries, so there is no loss"):
        task.examples("test", tokenizer)


# Real data


@pytest.mark.skipif(
    "DELTA_LORA_DATA" not in os.environ,
    reason="set DELTA_LORA_DATA to a folder with xsum/*.jsonl.gz to check the real files",
)
def test_the_real_subsets() -> None:
    task = make_loaded(source="files", data_dir=Path(os.environ["DELTA_LORA_DATA"]) / "xsum")
    found = task.provenance()
    assert found["rows"] == {"train": 1000, "validation": 200, "test": 1926}
    assert not any(file["official"] for file in found["files"])
    ids = [row.id for row in task.inputs("test")]
    assert sum(not name.startswith("test-") for name in ids) == 1462
