"""`task.max_inputs`: a part of a split is predicted and scored, evenly spaced, and it is said."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from scripts.planning.lengths import read_lengths
from scripts.planning.workload import read_decoding
from scripts.runs.run import Run
from tasks.e2e import E2E
from tasks.predictions import chosen
from tasks.webnlg import WebNLG
from tests.unit.test_glue_task import from_files, model_for, tokenizer, write

__all__ = ["tokenizer"]
SIZES = {"train": 20, "validation": 6, "test": 11}


@pytest.mark.parametrize(("count", "wanted"), [(630, 60), (10, 9), (10, 1), (7, 7), (3, 9)])
def test_a_part_is_evenly_spaced_and_begins_with_the_first(count: int, wanted: int) -> None:
    found = list(chosen(count, wanted))
    assert found[0] == 0
    assert len(found) == len(set(found)) == min(count, wanted)
    assert found[-1] < count
    gaps = {b - a for a, b in pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert list(chosen(count, None)) == list(range(count))


def part_and_whole(kind: type[Any], wanted: int | None) -> tuple[Any, Any]:
    made = []
    for number in (wanted, None):
        task = kind(source="embedded", embedded_sizes=SIZES, max_inputs=number)
        task.load()
        made.append(task)
    return made[0], made[1]


@pytest.mark.parametrize("kind", [E2E, WebNLG])
def test_only_the_part_is_decoded_and_scored(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # Java takes ten seconds to start
    part, whole = part_and_whole(kind, 4)
    items, all_items = part.inputs("test"), whole.inputs("test")
    count = len(all_items)
    assert items == tuple(all_items[i] for i in chosen(count, 4))
    assert part.provenance()["part"] == {"split": "test", "used": 4, "of": count}
    assert "part" not in whole.provenance()
    assert part.inputs("train") == whole.inputs("train")
    assert part.references("test").keys() == {item.id for item in items}
    made = [{"id": i.id, "input": i.context, "prediction": i.references[0]} for i in items]
    assert part.score(made, "test").values
    assert part.item_scores(made, "test").num_items == 4
    with pytest.raises(ValueError, match="no prediction"):
        part.score(made[:-1], "test")


@pytest.mark.parametrize("kind", [E2E, WebNLG])
def test_more_than_there_are_is_the_whole(kind: type[Any]) -> None:
    part, whole = part_and_whole(kind, 10_000)
    assert part.inputs("test") == whole.inputs("test")
    assert part.provenance() == whole.provenance()


def test_a_classifier_predicts_the_same_on_its_part(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, "mnli")
    whole = from_files("mnli", tmp_path)
    part = from_files("mnli", tmp_path, max_inputs=4)
    rows = whole.inputs("validation")
    places = chosen(len(rows), 4)
    assert [row.id for row in part.inputs("validation")] == [rows[i].id for i in places]
    assert part.provenance()["part"] == {"split": "validation", "used": 4, "of": 6}
    for split in ("train", "validation"):  # the loss is of all rows
        assert len(part.examples(split, tokenizer)) == len(whole.examples(split, tokenizer))
    model = model_for(whole, tokenizer).eval()
    by_id = {p["id"]: p for c in whole.predict(model, tokenizer, "validation") for p in c}
    found = [p for c in part.predict(model, tokenizer, "validation") for p in c]
    assert {p["id"] for p in found} == {rows[i].id for i in places}
    assert all(p == by_id[p["id"]] for p in found)
    assert part.score(found, "validation").values["accuracy"] >= 0


def test_a_part_of_the_dev_set_without_rows_is_missing(tmp_path: Path) -> None:
    part = from_files("mnli", write(tmp_path, "mnli"), max_inputs=1)
    (row,) = part.inputs("validation")
    made = [{"id": row.id, "input": "\t".join(row.texts), "prediction": 0}]
    scores = part.score(made, "validation")
    assert scores.missing == {"accuracy_mismatched": "no row is of the part mismatched"}
    assert set(scores.values) == {"accuracy", "accuracy_matched"}
    assert set(part.item_scores(made, "validation").of_sets) == {"accuracy", "accuracy_matched"}


@pytest.mark.parametrize("wanted", [0, -1, 1.5, True, "many"])
def test_a_number_that_is_none_is_refused(wanted: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"task\.max_inputs"):
        E2E(source="embedded", max_inputs=wanted)


@pytest.mark.parametrize("experiment", ["e2e", "webnlg", "glue/rte"])
def test_a_part_is_another_run_and_all_is_the_same(experiment: str) -> None:
    start = [f"experiment={experiment}", "method=lora", "scale=tiny"]
    meaning = Run.compose(start).meaning
    assert "max_inputs" not in meaning["task"]
    part = Run.compose([*start, "task.max_inputs=5"]).meaning
    assert part["task"].pop("max_inputs") == 5
    assert part == meaning


def test_less_decoding_is_planned() -> None:
    start = ["experiment=e2e", "method=lora", "scale=paper"]
    found = []
    for more in ([], ["task.max_inputs=60"]):
        config = Run.compose([*start, *more]).config
        decoding = read_decoding(config, read_lengths(config))
        assert decoding is not None
        found.append(decoding.chunks)
    assert found == [20, 2]
