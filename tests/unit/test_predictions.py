"""One prediction for each input, in the order of the inputs."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.predictions import align

IDS = [f"test-{i}" for i in range(8)]


def made(*ids: str) -> list[dict[str, Any]]:
    return [{"id": name, "input": name.upper(), "prediction": name[-1]} for name in ids]


def test_order_is_that_of_the_inputs() -> None:
    found = align(made(*reversed(IDS)), IDS, "test", [name.upper() for name in IDS])
    assert [prediction["id"] for prediction in found] == IDS


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (made(*IDS[:2]), "no prediction for 6 of 8 inputs of test: test-2, test-3, .*test-6, ..."),
        (made(*IDS, "test-3"), "more than one prediction for 1 of 8 inputs of test: test-3"),
        (made(*IDS, "dev-0"), "predictions for unknown inputs 1 of 8 inputs of test: dev-0"),
    ],
)
def test_missing_double_and_unknown_are_named(
    predictions: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        align(predictions, IDS, "test")


def test_a_prediction_of_another_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"test-0 is for the input 'TEST-0', but .* 'other'"):
        align(made(*IDS), IDS, "test", ["other", *IDS[1:]])


def test_inputs_that_a_prediction_does_not_repeat_are_not_compared() -> None:
    assert align([{"id": "a", "prediction": 1}], ["a"], "test", ["text"])[0]["prediction"] == 1
