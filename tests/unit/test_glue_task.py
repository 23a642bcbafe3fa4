"""GLUE: files, labels, batches, predictions, bad input; the eight yaml files."""

from __future__ import annotations

import gzip
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hydra.utils import instantiate

from scripts.runs.composition import ConfigError, compose
from tasks.glue import Glue
from tasks.tiny.bpe import train_tokenizer

TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
ROWS = {
    "cola": ["A cat sat.\t1\t0", "Cat a sat.\t0\t1", 'He said "no.\t1\t2'],
    "rte": ["A b c d.\tA b.\t0\t0", "One two three.\tFour.\t1\t1", "E f.\tE.\t0\t2"],
    "stsb": ["A cat.\tA cat.\t5.000\t0", "A cat.\tA dog.\t2.5\t1", "A.\tB c d e.\t0\t2"],
    "mnli": ["A b c.\tA b.\t0\t0", "A b c.\tNo a.\t2\t1", "A b.\tPerhaps c.\t1\t2"],
}
HEADS = {
    "cola": "sentence\tlabel\tidx",
    "rte": "sentence1\tsentence2\tlabel\tidx",
    "stsb": "sentence1\tsentence2\tlabel\tidx",
    "mnli": "premise\thypothesis\tlabel\tidx",
}


def text(task: str, rows: list[str] | None = None) -> str:
    return "\n".join([HEADS[task], *(ROWS[task] if rows is None else rows)]) + "\n"


def write(folder: Path, task: str) -> Path:
    names = ["train", "dev_matched", "dev_mismatched"] if task == "mnli" else ["train", "dev"]
    for name in names:
        (folder / f"{name}.tsv").write_text(text(task), encoding="utf-8")
    return folder


@cache
def composed(task: str) -> Any:
    return compose([f"experiment=glue/{task}", "method=lora"]).task


def configured(task: str, **changes: Any) -> Glue:
    made: Glue = instantiate(composed(task), **changes)
    return made


def from_files(task: str, folder: Path, **changes: Any) -> Glue:
    made = configured(task, source="files", data_dir=str(folder), **changes)
    made.load()
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer(["a cat sat on the mat and said no"] * 20, vocab_size=300)
    made.model_max_length = 64
    return made


def model_for(task: Glue, tokenizer: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id, **task.model_config,
        )
    ).eval()  # fmt: skip


# ------------------------------------------------------------------------------ files


@pytest.mark.parametrize("task", sorted(ROWS))
def test_rows_are_read_from_plain_and_packed_files(task: str, tmp_path: Path) -> None:
    plain = from_files(task, write(tmp_path, task))
    assert next(row.texts for row in plain.inputs("train")) == tuple(
        ROWS[task][0].split("\t")[: len(plain.columns)]
    )
    root = tmp_path / "root" / task
    root.mkdir(parents=True)
    for path in tmp_path.glob("*.tsv"):
        (root / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    packed = from_files(task, tmp_path / "root")
    for split in ("train", "validation"):
        assert packed.inputs(split) == plain.inputs(split)
    facts = plain.provenance()
    assert facts["rows"]["train"] == 3
    assert all(file["complete"] is False for file in facts["files"])


def test_quotes_are_text(tmp_path: Path) -> None:
    assert from_files("cola", write(tmp_path, "cola")).inputs("train")[2].texts == ('He said "no.',)


def test_a_subset_is_read_where_there_is_no_complete_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "cola")
    (tmp_path / "train.tsv").rename(tmp_path / "train_subset.tsv")
    task = from_files("cola", tmp_path)
    assert "train_subset.tsv has 3 rows, the complete one 8551" in caplog.text
    assert task.provenance()["files"][0]["name"] == "train_subset.tsv"


def test_a_labelled_test_set_is_scored_and_not_called_incomplete(tmp_path: Path) -> None:
    write(tmp_path, "rte")
    (tmp_path / "test.tsv").write_text(text("rte"))
    task = from_files("rte", tmp_path, scored_split="test")
    complete = {file["name"]: file["complete"] for file in task.provenance()["files"]}
    assert complete == {"train.tsv": False, "dev.tsv": False, "test.tsv": None}
    predictions = [{"id": row.id, "prediction": row.label} for row in task.inputs("test")]
    assert task.score(predictions, "test").values == {"accuracy": 1.0}


def test_mnli_has_two_dev_sets_and_accuracy_over_both(tmp_path: Path) -> None:
    task = from_files("mnli", write(tmp_path, "mnli"))
    rows = task.inputs("validation")
    assert [row.id for row in rows][::3] == ["dev_matched-0", "dev_mismatched-0"]
    predictions = [
        {"id": row.id, "prediction": 0 if row.part == "matched" else row.label} for row in rows
    ]
    scores = task.score(predictions, "validation").values
    assert scores == pytest.approx(
        {"accuracy": 4 / 6, "accuracy_matched": 1 / 3, "accuracy_mismatched": 1.0}
    )


def test_labels_may_be_names(tmp_path: Path) -> None:
    write(tmp_path, "rte")
    rows = ["A b.\tA.\tentailment\t0", "A b.\tC.\tnot_entailment\t1"]
    (tmp_path / "dev.tsv").write_text(text("rte", rows))
    assert [r.label for r in from_files("rte", tmp_path).inputs("validation")] == [0, 1]


def test_hidden_test_labels_give_predictions_only(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "cola")
    (tmp_path / "test.tsv").write_text("idx\tsentence\n0\tA cat.\n1\tCat a.\n")
    task = from_files("cola", tmp_path, scored_split="test")
    assert "no labels; predictions are written, nothing is scored" in caplog.text
    model = model_for(task, tokenizer)
    predictions = [p for chunk in task.predict(model, tokenizer, "test") for p in chunk]
    assert {p["prediction"] for p in predictions} <= {0, 1}
    scores = task.score(predictions, "test")
    assert scores.values == {}
    assert "no labels" in scores.missing["matthews"]


@pytest.mark.parametrize("hidden", ["-1", "-1.0", ""])
def test_hidden_labels_are_written_in_several_ways(tmp_path: Path, hidden: str) -> None:
    write(tmp_path, "stsb")
    (tmp_path / "test.tsv").write_text(text("stsb", [f"A.\tB.\t{hidden}\t0"]))
    task = from_files("stsb", tmp_path, scored_split="test")
    assert [row.label for row in task.inputs("test")] == [None]


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("rte", "dev.tsv", "sentence1\tlabel\nA\t0\n", "dev.tsv, line 1: no column 'sentence2'"),
        ("rte", "dev.tsv", text("rte", ["A.\tB.\t2\t0"]),
         r"dev.tsv, line 2: label '2' of GLUE rte; allowed: 0 \(entailment\), 1 \(not_entail"),
        ("rte", "train.tsv", text("rte", ["A.\tB.\t-1\t0"]), "line 2: label '-1'"),
        ("stsb", "dev.tsv", text("stsb", ["A.\tB.\t5.1\t0"]), "a number from 0 to 5"),
        ("stsb", "dev.tsv", text("stsb", ["A.\tB.\tnan\t0"]), "a number from 0 to 5"),
        ("stsb", "dev.tsv", text("stsb", ["A.\tB.\tx\t0"]), "label 'x' of GLUE stsb"),
        ("cola", "train.tsv", text("cola", ["A.\t1\t0", "B c\t1"]),
         "train.tsv, line 3: 2 fields, but the header has 3"),
        ("cola", "train.tsv", text("cola", [" \t1\t0"]), "line 2: sentence is empty"),
        ("cola", "train.tsv", text("cola", []), "a header but no rows"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_its_line(
    task: str, name: str, content: str, message: str, tmp_path: Path
) -> None:
    (write(tmp_path, task) / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        from_files(task, tmp_path)


def test_bytes_that_are_no_utf8_and_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, "cola")
    (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\tidx\nfine\t1\t0\ncaf\xe9\t1\t1\n")
    with pytest.raises(ValueError, match=r"dev.tsv, line 3: byte 0xe9 is not UTF-8"):
        from_files("cola", tmp_path)
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no dev.tsv or dev_subset.tsv .* holds train"):
        from_files("cola", tmp_path)


def test_some_hidden_test_labels_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "cola")
    (tmp_path / "test.tsv").write_text(text("cola", ["A cat.\t1\t0", "Cat a.\t-1\t1"]))
    with pytest.raises(ValueError, match="1 of 2 test rows have no label"):
        from_files("cola", tmp_path, scored_split="test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "web"}, "task.source='web'.* 'hub', 'files', 'embedded'"),
        ({"data_dir": "x"}, "a folder goes with task.source=files"),
        ({"scored_split": "train"}, "scored_split='train'.* 'validation', 'test'"),
        ({"scored_split": "test"}, "only your own files can have a test set"),
        ({"max_length": 3}, "task.max_length=3 .*>= 6"),
        (
            {"metrics": ["pearson"]},
            r"task.metrics=\['pearson'\] for classes .*; allowed: accuracy, f1, matthews",
        ),
        ({"columns": ["a", "b", "c"]}, "a task has one or two sentences"),
        ({"parts": ["a", "b"]}, r"task.parts=\['a', 'b'\]: .* cola has no parts; write .*\[\]"),
    ],
)
def test_a_wrong_setting_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match="(?s)" + message) as caught:
        configured("cola", **changes)
    assert isinstance(caught.value.__cause__ or caught.value, ValueError)


@pytest.mark.parametrize("parts", [[], ["matched", "other"]])
def test_parts_of_mnli_are_its_own(parts: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?s)mnli has the parts matched, mismatched; write"):
        configured("mnli", parts=parts, source="embedded")
    assert configured("mnli", parts=["matched"], source="embedded").parts == ("matched",)


# ------------------------------------------------------------------------------ model side


@pytest.mark.parametrize("task", sorted(ROWS))
def test_a_padded_batch_gives_the_losses_of_its_examples(
    task: str, tmp_path: Path, tokenizer: Any
) -> None:
    made = from_files(task, write(tmp_path, task))
    examples = made.examples("train", tokenizer)
    model = model_for(made, tokenizer)
    batch = made.collate(examples)
    assert batch.num_targets == 3
    assert batch.num_tokens == sum(map(made.length, examples))
    with torch.no_grad():
        alone = sum(float(made.loss(model, made.collate([example]))) for example in examples)
        assert float(made.loss(model, batch)) == pytest.approx(alone, abs=1e-5)


def test_predictions_do_not_depend_on_the_batch_and_skip_what_is_done(
    tmp_path: Path, tokenizer: Any
) -> None:
    folder = write(tmp_path, "stsb")
    big, small = (from_files("stsb", folder, predict_batch_size=size) for size in (64, 1))
    model = model_for(big, tokenizer)
    (whole,) = big.predict(model, tokenizer, "validation")
    chunks = list(small.predict(model, tokenizer, "validation"))
    assert [len(chunk) for chunk in chunks] == [1, 1, 1]
    by_id = {p["id"]: p["prediction"] for p in whole}
    for (prediction,) in chunks:
        assert prediction["prediction"] == pytest.approx(by_id[prediction["id"]], abs=1e-6)
    rest = list(small.predict(model, tokenizer, "validation", done=chunks[0]))
    assert rest == chunks[1:]
    assert small.score(whole, "validation").values.keys() == {"pearson", "spearman"}


def test_predictions_of_other_data_are_refused(tmp_path: Path) -> None:
    task = from_files("cola", write(tmp_path, "cola"))
    predictions = [{"id": r.id, "input": "other", "prediction": 1} for r in task.inputs()]
    with pytest.raises(ValueError, match="was made from other data"):
        task.score(predictions)
    with pytest.raises(ValueError, match="no prediction for 3 of 3 inputs"):
        task.score([])


def test_long_texts_are_cut_and_counted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "rte")
    rows = [f"{'a cat sat ' * 50_000}\tA cat.\t0\t0", "A.\tB.\t1\t1"]
    (tmp_path / "train.tsv").write_text(text("rte", rows))
    task = from_files("rte", tmp_path, max_length=32)
    first, second = task.examples("train", tokenizer)
    assert task.length(first) == 32
    assert task.length(second) < 32
    assert "1 of 2 examples of train are longer than 32 tokens" in caplog.text


def test_scores_without_a_model(tmp_path: Path) -> None:
    found = from_files("rte", write(tmp_path, "rte")).reference_scores("validation")
    assert found["most frequent class"].values == {"accuracy": pytest.approx(2 / 3)}
    assert set(found["bag of words"].values) == {"accuracy"}
    scores = from_files("stsb", write(tmp_path, "stsb")).reference_scores("validation")
    assert set(scores) == {"bag of words"}


# ------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("task", TASKS)
def test_the_embedded_corpus_loads_through_the_same_code(
    task: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    made = configured(task, source="embedded")
    made.load()
    assert not caplog.records
    train = made.inputs("train")
    assert len({row.label for row in train}) >= 2
    assert not {row.texts for row in train} & {row.texts for row in made.inputs("validation")}


@pytest.mark.parametrize("task", TASKS)
def test_recipes_name_whose_alpha_and_batch_they_take(task: str) -> None:
    def recipe(*more: str) -> Any:
        return compose([f"experiment=glue/{task}", "method=lora", *more])

    paper, scripts = recipe(), recipe("recipe.variant=scripts")
    assert (paper.method.alpha, scripts.method.alpha) == (8, 16)
    batch = 32 if task in ("cola", "qnli", "rte") else 16
    assert paper.trainer.batch_size == batch
    assert scripts.trainer.batch_size == batch * (2 if task == "cola" else 8)
    assert (paper.method.dropout, paper.trainer.warmup_ratio) == (0.0, 0.06)
    with pytest.raises(ConfigError, match=r"recipe\.variant='both' is none of"):
        recipe("recipe.variant=both")


# Real data

REAL_ROWS = {
    "cola": {"train": 8551, "validation": 1043},
    "mrpc": {"train": 3668, "validation": 408},
    "rte": {"train": 2490, "validation": 277},
    "stsb": {"train": 5749, "validation": 1500},
}


@pytest.mark.skipif(
    "DELTA_LORA_DATA" not in os.environ,
    reason="set DELTA_LORA_DATA to a folder with glue/<task>/*.tsv.gz to check the real files",
)
@pytest.mark.parametrize("task", TASKS)
def test_the_real_release(task: str) -> None:
    """The four small tasks are complete; the others may be cut, and are then not called GLUE."""
    made = from_files(task, Path(os.environ["DELTA_LORA_DATA"]) / "glue")
    found = made.provenance()
    for file in found["files"]:
        assert file["complete"] is ("_subset" not in file["name"])
    if task in REAL_ROWS:
        assert found["rows"] == REAL_ROWS[task]
    if made.labels is not None:
        for split in ("train", "validation"):
            labels = {row.label for row in made.inputs(split)}
            assert labels == set(range(len(made.labels)))
    assert len({row.id for row in made.inputs("train")}) == found["rows"]["train"]
