"""What a single prediction scores: the numbers behind a mean, and nothing that is none."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
from hydra.utils import instantiate

from scripts.runs.run import Run
from tasks.metrics import e2e

SIZES = "{train:12,validation:6,test:6}"


def task_of(experiment: str, *more: str) -> Any:
    overrides = [f"experiment={experiment}", "scale=tiny", *more]
    task = instantiate(Run.compose(overrides).config.task)
    task.load()
    return task


def text_predictions(task: Any) -> list[dict[str, Any]]:
    """Return the reference of the next input, which is neither right nor all wrong."""
    known = task.references("test")
    names = list(known)
    shifted = [*names[1:], names[0]]
    found = [{"id": n, "prediction": known[s][0]} for n, s in zip(names, shifted, strict=True)]
    found[0]["prediction"] = known[names[0]][0]
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    ("experiment", "means"),
    [
        ("e2e", {"ROUGE-L": "rouge_l"}),
        ("webnlg", {"TER": "ter_all"}),
        ("xsum", {"ROUGE-1": "rouge_1", "ROUGE-2": "rouge_2", "ROUGE-L": "rouge_l"}),
    ],
)
def test_a_score_that_is_a_mean_is_the_mean_of_those_of_the_items(
    experiment: str, means: dict[str, str]
) -> None:
    task = task_of(experiment, f"task.embedded_sizes={SIZES}")
    predictions = text_predictions(task)
    found = task.scores_of_items(predictions, "test")
    assert list(found) == [p["id"] for p in predictions]
    values = task.score(predictions, "test").values
    scales = {spec.name: spec.scale for spec in task.metrics}
    for label, name in means.items():
        mean = fmean(scores[label] for scores in found.values())
        assert mean == pytest.approx(scales[name] * values[name])
    few = predictions[2:4]
    assert task.scores_of_items(few, "test") == {p["id"]: found[p["id"]] for p in few}


@pytest.mark.parametrize("name", ["rte", "cola"])
def test_a_class_is_right_or_wrong(name: str) -> None:
    task = task_of(f"glue/{name}")
    labels = task.references("validation")
    predictions = [{"id": n, "prediction": float(label[0])} for n, label in labels.items()][:4]
    predictions[0]["prediction"] = 1 - predictions[0]["prediction"]
    found = task.scores_of_items(predictions, "validation")
    assert [scores["correct"] for scores in found.values()] == [0, 1, 1, 1]


def test_a_score_of_a_whole_set_is_none_of_an_item() -> None:
    task = task_of("glue/stsb")
    assert task.scores_of_items([{"id": "any", "prediction": 2.5}], "validation") == {}
    found = task_of("e2e", f"task.embedded_sizes={SIZES}")
    (scores,) = found.scores_of_items(text_predictions(found)[:1], "test").values()
    assert list(scores) == ["ROUGE-L"]


def test_the_tokenizer_of_e2e_starts_for_all_texts_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    tokenize = e2e.tokenize
    monkeypatch.setattr(
        e2e, "tokenize", lambda texts: started.append(len(texts)) or tokenize(texts)
    )
    task = task_of("e2e", f"task.embedded_sizes={SIZES}")
    task.scores_of_items(text_predictions(task), "test")
    assert len(started) <= 2, "one call for the predictions, one for the references"
