"""The card of an export: its base is the model that was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts import export

SMOL = {"name": "SmolLM2", "init": "pretrained", "hub_id": None, "revision": None}
GPT2 = {"name": "gpt2_medium", "init": "pretrained", "hub_id": "them/gpt2", "revision": "c0"}
METHOD = {"name": "delta_lora", "rank": 4}


def description(**base: Any) -> dict[str, Any]:
    known = {
        "family": "causal_lm", "source": "../../place/SmolLM2", "revision": None,
        "config_overrides": {},
    }  # fmt: skip
    return {"method": METHOD, "base": {**known, **base}}


def record(model: dict[str, Any], path: str | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "model": model,
        "config": {"model": {"path": path}},
        "task": {"name": "e2e"},
        "metrics": {"bleu": 0.5},
        "missing_metrics": {},
        "scale": "tiny",
        "training": {"steps": 3, "batch_size": 2, "examples": 6},
        "seed": 1,
        "recipe": "e2e",
        "signature": "e2e--delta_lora--seed1--0",
        **changes,
    }


@pytest.fixture
def card(tmp_path: Path) -> Any:
    def write(*arguments: Any, is_peft: bool = True) -> str:
        if is_peft:
            (tmp_path / "adapter_config.json").write_text("{}")
        export._write_card(tmp_path, *arguments, "facts")
        return (tmp_path / "README.md").read_text()

    return write


def test_a_folder_is_no_model_of_the_hub(card: Any) -> None:
    text = card(description(), record({**SMOL, "folder": "SmolLM2"}, "/place/SmolLM2"))
    assert "base_model" not in text
    assert "# delta_lora on SmolLM2\n" in text
    assert 'from_pretrained("SmolLM2")' in text
    assert "/place" not in text


def test_a_record_of_the_wish_is_read_by_what_was_loaded(card: Any) -> None:
    text = card(description(), record(GPT2, "/place/SmolLM2"))
    assert "base_model" not in text
    assert "gpt2" not in text
    assert "# delta_lora on SmolLM2\n" in text


def test_the_hub_is_named_with_its_revision_and_tags_once(card: Any) -> None:
    text = card(description(source="them/gpt2", revision="c0"), record(GPT2))
    assert "base_model: them/gpt2\n" in text
    assert 'from_pretrained("them/gpt2", revision="c0")' in text
    tags = [line for line in text.splitlines() if line.startswith("- ")][:2]
    assert tags == ["- delta-lora", "- lora"]
    assert text.count("\n- delta-lora\n") == 1


def test_a_pinned_copy_is_known_by_its_bytes(card: Any) -> None:
    same = {"hub_id": "them/gpt2", "revision": "c0"}
    model = {**SMOL, "folder": "SmolLM2", "same_as": same}
    text = card(description(), record(model, "/place/SmolLM2"))
    assert "base_model: them/gpt2\n" in text
    assert 'from_pretrained("them/gpt2", revision="c0")' in text


def test_what_was_not_scored_has_no_table_of_scores(card: Any) -> None:
    text = card(description(), record({**SMOL, "folder": "SmolLM2"}, metrics={}))
    assert "trained and was not scored" in text
    assert "| metric |" not in text


def test_a_part_of_the_test_set_is_said(card: Any) -> None:
    part = {"split": "test", "used": 60, "of": 630}
    text = card(description(), record(SMOL, task={"name": "e2e", "part": part}))
    assert "60 of 630 inputs of test" in text


def test_only_verdicts_on_this_model_are_told(card: Any) -> None:
    other = card(description(), record({**SMOL, "folder": "SmolLM2"}, "/place/SmolLM2"))
    assert "No table of `SmolLM2` at scale `tiny` judges a claim." in other
    own = card(description(), record({**SMOL, "name": "tiny_gpt2"}))
    assert "Judged by this suite on `tiny_gpt2`" in own


@pytest.mark.parametrize(
    ("base", "title", "hub"),
    [
        ({"source": "them/gpt2", "revision": "c0"}, "them/gpt2", True),
        ({"source": "/home/me/SmolLM2"}, "SmolLM2", False),
        ({"source": "./../SmolLM2"}, "SmolLM2", False),
        ({"source": None}, "a model of its own", False),
        ({"source": "/home/me/x", "name": "SmolLM2"}, "SmolLM2", False),
    ],
)
def test_an_adapter_without_a_run_says_what_it_knows(
    card: Any, base: dict[str, Any], title: str, hub: bool
) -> None:
    text = card(description(**base), None)
    assert f"# delta_lora on {title}\n" in text
    assert ("base_model: " in text) is hub
    assert "/home" not in text
