"""GLUE as people have it: the official archives, and the forms in which hub data are saved."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.faults.official import FOLDERS, HEADED, expected, names, write_hub, write_official
from tests.unit.test_glue_task import TASKS, from_files


def rows(task: str, folder: Path, split: str = "train", **changes: Any) -> list[tuple[Any, ...]]:
    return [(*row.texts, row.label) for row in from_files(task, folder, **changes).inputs(split)]


@pytest.mark.parametrize("task", TASKS)
def test_the_official_archives_are_read_as_they_are_unpacked(task: str, tmp_path: Path) -> None:
    folder = write_official(tmp_path / FOLDERS[task], task)
    for place in (tmp_path, folder):
        for split in ("train", "validation"):
            assert rows(task, place, split) == expected(task, split)
    hub = write_hub(tmp_path / "hub", task)
    assert rows(task, hub) == expected(task, "train")


@pytest.mark.parametrize("task", TASKS)
def test_the_official_test_sets_have_no_labels(task: str, tmp_path: Path) -> None:
    write_official(tmp_path / FOLDERS[task], task)
    found = rows(task, tmp_path, "test", scored_split="test")
    assert found == [(*row[:-1], None) for row in expected(task, "test")]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data + b"\n\r\n  \n",
    ],
)
def test_byte_order_marks_line_ends_and_blank_lines_change_nothing(
    task: str, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    for path in write_official(tmp_path / FOLDERS[task], task).glob("*.tsv"):
        path.write_bytes(change(path.read_bytes()))
    for split in ("train", "validation"):
        assert rows(task, tmp_path, split) == expected(task, split)


@pytest.mark.parametrize("name", ["cola", "CoLA", "COLA", "Cola"])
def test_the_case_of_the_folder_does_not_count(name: str, tmp_path: Path) -> None:
    write_official(tmp_path / name, "cola")
    assert rows("cola", tmp_path) == expected("cola", "train")


def test_a_folder_in_a_folder_of_one_name(tmp_path: Path) -> None:
    write_official(tmp_path / "QNLIv2" / "QNLI", "qnli")
    assert rows("qnli", tmp_path) == expected("qnli", "train")


def test_two_folders_that_may_both_be_the_task(tmp_path: Path) -> None:
    for name in ("QNLI", "QNLIv2"):
        write_official(tmp_path / name, "qnli")
    with pytest.raises(ValueError, match=r"QNLI and QNLIv2, .* task\.data_dir=.*/QNLI"):
        rows("qnli", tmp_path)


# ------------------------------------------------------------------------------ MRPC of Microsoft


def test_microsofts_files_are_split_by_glues_list(tmp_path: Path) -> None:
    write_official(tmp_path / "MRPC", "mrpc", msr=True)
    assert rows("mrpc", tmp_path) == expected("mrpc", "train")
    assert rows("mrpc", tmp_path, "validation") == expected("mrpc", "validation")
    assert rows("mrpc", tmp_path, "test", scored_split="test") == expected("mrpc", "test")
    (file, *_) = from_files("mrpc", tmp_path).provenance()["files"]
    assert (file["name"], file["split_by"]["name"]) == ("msr_paraphrase_train.txt", "dev_ids.tsv")


def test_what_is_wrong_with_the_list_is_named(tmp_path: Path) -> None:
    ids = write_official(tmp_path / "MRPC", "mrpc", msr=True) / "dev_ids.tsv"
    kept = ids.read_text()
    ids.write_text(kept + "7\t8\n")
    with pytest.raises(ValueError, match=r"dev_ids.tsv names 1 pairs that .*first: 7 and 8"):
        rows("mrpc", tmp_path)
    ids.write_text("one\n" + kept)
    with pytest.raises(ValueError, match=r"dev_ids.tsv, line 1: 'one'; expected the two numbers"):
        rows("mrpc", tmp_path)
    ids.unlink()
    with pytest.raises(FileNotFoundError, match=r"msr_paraphrase_train.txt but no dev_ids.tsv"):
        rows("mrpc", tmp_path)


# ------------------------------------------------------------------------------ broken rows


@pytest.mark.parametrize("task", TASKS)
def test_a_row_with_too_few_columns_is_named(task: str, tmp_path: Path) -> None:
    path = write_official(tmp_path, task) / "train.tsv"
    with path.open("a", encoding="utf-8") as file:
        file.write("half\ta row\n")
    line = len(expected(task, "train")) + 1 + (task in HEADED)
    if task == "sst2":
        message = f"line {line}: label 'a row'"  # as many fields as there are
    else:
        message = f"line {line}: (2 fields|fewer fields)"
    with pytest.raises(ValueError, match=rf"train.tsv, {message}"):
        rows(task, tmp_path)


def test_the_few_broken_rows_of_qqp_are_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_official(tmp_path, "qqp") / "train.tsv"
    header, *lines = path.read_text().splitlines()
    many = [lines[i % len(lines)] for i in range(2000)]
    many[7:7] = ["7\t8\t9\tfirst half", "second half\t0"]
    path.write_text("\n".join([header, *many]) + "\n")
    task = from_files("qqp", tmp_path)
    assert len(task.inputs("train")) == 2000
    assert "2 rows with fewer fields than the header's 6 are left out" in caplog.text
    assert "(first: line 9)" in caplog.text
    assert task.provenance()["files"][0]["left_out"] == 2


def test_files_with_one_label_and_copies_get_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_hub(tmp_path, "mrpc")
    (folder / "dev.tsv").write_text("sentence1\tsentence2\tlabel\nA.\tB.\t1\nC.\tD.\t1\n")
    from_files("mrpc", tmp_path)
    assert "all 2 rows of dev.tsv have the label equivalent" in caplog.text
    (folder / "dev.tsv").write_bytes((folder / "train.tsv").read_bytes())
    from_files("mrpc", tmp_path)
    assert "dev.tsv has the same content as train.tsv" in caplog.text


# ------------------------------------------------------------------------------ saved data sets


def write_saved(folder: Path, task: str, form: str) -> Path:
    """Write a task as `datasets` saves it: JSON lines, Parquet shards, or save_to_disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names(task):
        split = "train" if name == "train" else "validation"
        columns, hub = [*HUB[task], "label"], name.replace("dev", "validation")
        table = pa.Table.from_pylist(
            [dict(zip(columns, row, strict=True)) for row in expected(task, split, name)]
        )
        if form == "jsonl":
            lines = [json.dumps(row) for row in table.to_pylist()]
            (folder / f"{hub}.jsonl").write_text("\n".join(lines) + "\n")
        elif form == "parquet":
            for number, part in enumerate((table[:1], table[1:])):
                path = folder / f"{hub}-{number:05d}-of-00002.parquet"
                pyarrow.parquet.write_table(part, path)
        else:
            datasets = pytest.importorskip("datasets")
            datasets.Dataset(table).save_to_disk(str(folder / hub))
    return folder


HUB = {
    "cola": ["sentence"], "sst2": ["sentence"], "mnli": ["premise", "hypothesis"],
    "qqp": ["question1", "question2"], "qnli": ["question", "sentence"],
    **{task: ["sentence1", "sentence2"] for task in ("mrpc", "stsb", "rte")},
}  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "parquet", "save_to_disk"])
@pytest.mark.parametrize("task", ["cola", "stsb", "mnli"])
def test_saved_data_sets_are_read(task: str, form: str, tmp_path: Path) -> None:
    write_saved(tmp_path / task, task, form)
    for split in ("train", "validation"):
        assert rows(task, tmp_path, split) == expected(task, split)
    assert all(file["sha256"] for file in from_files(task, tmp_path).provenance()["files"])


def test_what_is_wrong_with_a_saved_data_set_is_named(tmp_path: Path) -> None:
    folder = write_saved(tmp_path / "a", "cola", "parquet")
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"not 2 of one set \(train-00001-of-00002"):
        rows("cola", folder)
    folder = write_saved(tmp_path / "b", "cola", "parquet")
    (folder / "train-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet is no Parquet file"):
        rows("cola", folder)
    folder = write_saved(tmp_path / "c", "cola", "save_to_disk")
    write_hub(folder, "cola")
    with pytest.raises(ValueError, match=r"all of which may be train of GLUE cola; leave one"):
        rows("cola", folder)
    for path in folder.glob("*.tsv"):
        path.unlink()
    state = folder / "train" / "state.json"
    state.write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(ValueError, match=r"state.json names '../x.arrow': only files beside it"):
        rows("cola", folder)
    state.write_text("{}")
    with pytest.raises(ValueError, match=r"state.json does not name the files"):
        rows("cola", folder)


# ------------------------------------------------------------------------------ real data


@pytest.mark.skipif(
    "DELTA_LORA_DATA" not in os.environ,
    reason="set DELTA_LORA_DATA to a folder with glue/<task>/*.tsv.gz to check the real texts",
)
@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb", "rte"])
def test_the_real_rows_survive_the_official_form(task: str, tmp_path: Path) -> None:
    """Real sentences, with their quotes, written in the official form, are read back unchanged."""
    real = Path(os.environ["DELTA_LORA_DATA"]) / "glue"
    found = {split: rows(task, real, split) for split in ("train", "validation")}
    write_official(tmp_path, task, found)
    for split, wanted in found.items():
        assert rows(task, tmp_path, split) == wanted
