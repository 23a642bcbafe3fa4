"""Which model a run starts from is told by what is loaded, not by what the configuration names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.runs import weights
from scripts.runs.run import Run
from scripts.runs.weights import facts_of_record, hub_weights, label, model_facts

GPT2_MEDIUM = {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16}
LLAMA = {"model_type": "llama", "hidden_size": 576}
OWN = "defaults: [/model/_base@_here_, _self_]\nname: smol\nfamily: causal_lm\n"
Facts = Callable[..., dict[str, Any]]


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    """Return the facts of a run; a folder that it names holds what `config` says."""

    def of(*overrides: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
        folder = tmp_path / "place" / "SmolLM2"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config or LLAMA))
        (folder / "model.safetensors").write_bytes(b"weights")
        found = [o.replace("FOLDER", str(folder)) for o in overrides]
        run = Run.compose(["experiment=e2e", "method=lora", *found])
        told = run.model_facts
        assert str(tmp_path) not in json.dumps(told)
        return told

    return of


def test_the_hub_is_named_where_its_weights_are_loaded(facts: Facts) -> None:
    told = facts()
    assert told["name"] == "gpt2_medium"
    assert told["hub_id"] == "openai-community/gpt2-medium"
    assert told["revision"]
    assert "folder" not in told


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model=causal_lm", "model.path=FOLDER"], "SmolLM2"),
        (["model.path=FOLDER"], "SmolLM2"),
        (["scale=tiny", "model.path=FOLDER"], "SmolLM2"),
        (["model.path=FOLDER", "model.name=mine"], "mine"),
    ],
)
def test_a_folder_is_named_and_no_hub(facts: Facts, overrides: list[str], name: str) -> None:
    told = facts(*overrides)
    expected = {
        "name": name, "init": "pretrained", "hub_id": None, "revision": None, "folder": "SmolLM2"
    }  # fmt: skip
    assert told == expected


def test_a_copy_of_the_model_keeps_its_name(facts: Facts) -> None:
    told = facts("model.path=FOLDER", config={**GPT2_MEDIUM, "vocab_size": 50257})
    assert (told["name"], told["folder"], told["hub_id"]) == ("gpt2_medium", "SmolLM2", None)
    assert facts("model.path=FOLDER", config={**GPT2_MEDIUM, "n_layer": 12})["name"] == "SmolLM2"


@pytest.mark.parametrize("path", ["null", "FOLDER"])
def test_a_file_of_ones_own_names_its_folder(facts: Facts, tmp_path: Path, path: str) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    place = tmp_path / "place" / "SmolLM2"
    written = f"{OWN}path: {path.replace('FOLDER', str(place))}\n"
    (tmp_path / "own" / "model" / "smol.yaml").write_text(written)
    overrides = [f"hydra.searchpath=[file://{tmp_path / 'own'}]", "model=smol"]
    told = facts(*overrides, *(["model.path=FOLDER"] if path == "null" else []))
    assert (told["name"], told["folder"]) == ("smol", "SmolLM2")


def test_weights_that_are_pinned_are_known_by_their_bytes(
    facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = {
        "hub_id": "openai-community/gpt2-medium", "revision": "c0", "size": 7,
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }  # fmt: skip
    monkeypatch.setattr(weights, "_pins", lambda: [pin])
    told = facts("model=causal_lm", "model.path=FOLDER")
    assert told["same_as"] == {"hub_id": pin["hub_id"], "revision": "c0"}
    assert (told["hub_id"], told["name"]) == (None, "SmolLM2")
    assert hub_weights(told) == (pin["hub_id"], "c0")
    assert facts("model.path=FOLDER")["name"] == "gpt2_medium"
    monkeypatch.setattr(weights, "_pins", lambda: [{**pin, "size": 8}])
    assert "same_as" not in facts("model=causal_lm", "model.path=FOLDER")


def test_every_pin_of_weights_is_compared() -> None:
    assert {pin["hub_id"] for pin in weights._pins()} >= {
        "openai-community/gpt2-medium", "FacebookAI/roberta-base", "facebook/bart-large"
    }  # fmt: skip


def test_random_and_pretrained_weights_are_of_no_hub(facts: Facts) -> None:
    told = facts("model.init=random", "model.tokenizer_path=FOLDER")
    assert (told["hub_id"], told["revision"]) == (None, None)
    assert label(told) == "gpt2_medium with random weights"
    run = Run.compose(["experiment=e2e", "method=lora", "scale=tiny"])
    assert run.model_facts == {
        "name": "tiny_gpt2", "init": "pretrained", "hub_id": None, "revision": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model=causal_lm", "model.hub_id=them/it", "model.revision=c1"], "them/it"),
        (["model.hub_id=them/it", "model.revision=c1"], "them/it"),
        (["model=causal_lm", "model.hub_id=them/it", "model.name=it"], "it"),
    ],
)
def test_another_model_of_the_hub_is_called_by_its_id(
    facts: Facts, overrides: list[str], name: str
) -> None:
    told = facts(*overrides)
    assert (told["name"], told["hub_id"]) == (name, "them/it")


def test_a_record_from_before_folders_were_named_is_read_by_its_path() -> None:
    model = {"name": "smol", "init": "pretrained", "hub_id": "gpt2", "revision": "c0"}
    record = {"model": model, "config": {"model": {"path": "/home/me/SmolLM2"}}}
    told = facts_of_record(record)
    assert (told["name"], told["hub_id"], hub_weights(told)) == ("SmolLM2", None, (None, None))
    record["config"]["model"]["path"] = None
    assert facts_of_record(record) == model


def test_facts_need_no_overrides() -> None:
    config = Run.compose(["experiment=e2e", "method=lora"]).config.copy()
    config.overrides = None
    assert model_facts(config, is_made_here=False)["name"] == "gpt2_medium"
