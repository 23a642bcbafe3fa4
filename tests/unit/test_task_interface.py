"""What every task promises the suite: a family of models, and a constructor that says all."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import pytest

from delta_lora.models import FAMILIES
from delta_lora.protocols import Task
from tasks.e2e import E2E
from tasks.generation import BeamSearch, Seq2SeqBeamSearch
from tasks.glue import Glue
from tasks.sources import Release, Source
from tasks.tiny.objectives import Causal, Denoising, Masked
from tasks.tiny.pretraining import Pretraining
from tasks.webnlg import WebNLG
from tasks.xsum import XSum

TASKS = [E2E, WebNLG, XSum, Glue, Pretraining]
OBJECTIVES = [Causal, Masked, Denoising]
CHOSEN = [*OBJECTIVES, BeamSearch, Seq2SeqBeamSearch]


def settings(cls: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls).parameters)


@pytest.mark.parametrize("cls", [*TASKS, *CHOSEN, Source, Release], ids=lambda c: c.__name__)
def test_a_constructor_names_and_types_every_setting(cls: type) -> None:
    hints = typing.get_type_hints(cls if "__post_init__" in vars(cls) else cls.__init__)
    for name, parameter in settings(cls).items():
        assert name in hints
        if cls is not Release:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("cls", CHOSEN, ids=lambda c: c.__name__)
def test_what_is_chosen_among_several_has_a_name_and_only_defaults(cls: type) -> None:
    assert [c.name for c in CHOSEN].count(cls.name) == 1  # type: ignore[attr-defined]
    assert all(p.default is not inspect.Parameter.empty for p in settings(cls).values())
    assert "name" not in settings(cls)


@pytest.mark.parametrize("cls", TASKS, ids=lambda c: c.__name__)
def test_only_what_a_task_cannot_guess_is_required(cls: type[Task]) -> None:
    required = {n for n, p in settings(cls).items() if p.default is inspect.Parameter.empty}
    assert required == {
        Glue: {"task", "columns", "labels", "metrics"},
        Pretraining: {"objective", "num_documents", "tokenizer_documents"},
    }.get(cls, set())  # type: ignore[call-overload]
    assert cls.not_signed == ("cache_dir",)


def test_a_task_says_of_which_family_its_model_is() -> None:
    made: list[tuple[Task, str]] = [
        (E2E(source="embedded"), "causal_lm"),
        (WebNLG(source="embedded"), "causal_lm"),
        (XSum(source="embedded"), "seq2seq_lm"),
        (
            Glue(
                task="rte", columns=["sentence1"], labels=["a", "b"], metrics=["accuracy"],
                source="embedded",
            ),
            "sequence_classification",
        ),
        *(
            (Pretraining(objective=o, num_documents=2, tokenizer_documents=1), family)
            for o, family in (
                (Causal(), "causal_lm"), (Masked(), "masked_lm"), (Denoising(), "seq2seq_lm"),
            )
        ),
    ]  # fmt: skip
    for task, family in made:
        assert task.family == family
        assert family in FAMILIES


def test_a_task_without_a_family_takes_any_model() -> None:
    assert Task.family is None


def test_where_a_task_keeps_its_cache_changes_no_data(tmp_path: Path) -> None:
    def rows(**changes: Any) -> Any:
        sizes = {"train": 3, "validation": 2, "test": 2}
        task = E2E(source="embedded", embedded_sizes=sizes, **changes)
        task.load()
        return task.inputs("train"), task.provenance()

    assert rows() == rows(cache_dir=tmp_path)
