"""Damaged model folders and such whose files disagree: see `tests.faults.model_folders`.

What must hold: a message that names the folder before the first step, or the right model; no
traceback, no hang, no other model without a word.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import AutoConfig

from delta_lora.positions import num_positions
from tests.faults.damage import NotApplicableError
from tests.faults.model_folders import (
    CHANGES,
    FAMILIES,
    Change,
    Sound,
    cases,
    judge,
    sound,
    write_folders,
)
from tests.faults.tally import Tally

PART = "model folders"
#: damaged folders of the short form.
SHORT = 12
GOOD = ("right", "clear error")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sound]:
    folder, found = tmp_path_factory.mktemp("models"), {}
    write_folders(folder)

    def of(family: str) -> Sound:
        if family not in found:
            found[family] = sound(family, folder)
        return found[family]

    return of


def wrong(
    family: str, names: Sequence[str], sounds: Callable[[str], Sound], folder: Path, tally: Tally
) -> list[str]:
    """Damage a folder in each of these ways, and return what did not go well."""
    failures = []
    for name in names:
        try:
            outcome = judge(sounds(family), CHANGES[name], folder)
        except NotApplicableError:
            continue
        tally.add(PART, outcome.outcome)
        failures += [] if outcome.outcome in GOOD else [f"{name}: {outcome}"]
    return failures


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.parametrize("family", FAMILIES)
def test_every_damage_to_a_folder(
    family: str, sounds: Callable[[str], Sound], tmp_path: Path, tally: Tally
) -> None:
    names = [name for its, name in cases() if its == family]
    assert wrong(family, names, sounds, tmp_path / "model", tally) == []


@pytest.mark.faults
def test_some_damages(sounds: Callable[[str], Sound], tmp_path: Path, tally: Tally) -> None:
    family = "causal_lm"
    names = random.Random(15).sample([name for its, name in cases() if its == family], SHORT)
    assert wrong(family, names, sounds, tmp_path / "model", tally) == []


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json is three bytes", r"config.json is damaged \(no JSON"),
        ("tokenizer.json is three bytes", r"tokenizer.json is damaged \(no JSON"),
        (
            "n_embd is 10000000",
            r"makes a model of 3\.6e\+15 parameters, whose weights .*take .*GiB",
        ),
        ("n_embd is 256", r"model.safetensors does not hold the model that .*/config.json"),
        ("a vocabulary beyond the embedding", r"numbers 'word39' 539, but the model of .* has 500"),
        ("tokenizer.json: a number twice", r"numbers both '.*' and 'zzz' 5, so that either may be"),
        ("a tokenizer of another model", r"bos_token_id is 499 of the tokenizer and 0 of"),
        ("a head apart", r"a head that is not the embedding"),
        ("tensors: NaN", r"of the weights of .* infinite or NaN; copy them again"),
        ("tensors: whole numbers", r"is stored as I64, and needed are real numbers"),
        ("config.json is a dangling link", r"config.json is a link to nowhere, which leads to no"),
        ("an index of pickles", r"names 'a.bin': only safetensors of its own folder"),
        ("only a pickle", r"never loaded: only safetensors are safe"),
        ("no model_type", r"config.json has no model_type"),
        ("tokenizer: model_max_length is -1", r"model_max_length=-1 of the tokenizer is no length"),
    ],
)
def test_messages(name: str, message: str, sounds: Callable[[str], Sound], tmp_path: Path) -> None:
    change = CHANGES.get(name) or CHANGES[f"tensors: {name}"]
    outcome = judge(sounds("causal_lm"), change, tmp_path / "model")
    assert outcome.outcome == "clear error"
    assert re.search(message, outcome.message), outcome.message


def test_other_links_that_lead_nowhere_change_nothing(
    sounds: Callable[[str], Sound], tmp_path: Path
) -> None:
    lock = Change(lambda folder: (folder / ".#config.json").symlink_to("user@host.123"))
    assert judge(sounds("causal_lm"), lock, tmp_path / "model").outcome == "right"


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "bart", "max_position_embeddings": 1024}, 1024),
        ({"model_type": "t5"}, None),
    ],
)
def test_positions_of_a_model(values: dict[str, object], count: int | None) -> None:
    assert num_positions(AutoConfig.for_model(**values)) == count
