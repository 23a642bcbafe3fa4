"""A value is declared once, by an annotation, and checked by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from delta_lora.checks import OneOf, Range, check_values, documented


@documented
@dataclass(kw_only=True)
class Declared:
    """Some values."""

    whole: Annotated[int, Range(at_least=1)]
    """How many there are."""

    real: Annotated[float, Range(above=0, at_most=1)] = 0.5
    """How much of
    it."""

    perhaps: Annotated[int | None, Range(below=9)] = None
    or_none: Annotated[float, Range(at_least=0)] | None = None
    unbounded: float = 0.0
    flag: bool = False
    word: Annotated[str, OneOf(("a", "b"))] = "a"
    """Which."""

    text: str = ""
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_values(type(self), vars(self), prefix="part.")


class Plain:
    """The same from a constructor with arguments."""

    def __init__(self, *, rank: Annotated[int, Range(at_least=1)] = 8, form: str = "x") -> None:
        check_values(Plain.__init__, locals())
        self.rank, self.form = rank, form


GOOD: list[dict[str, Any]] = [
    {"whole": 1}, {"real": 1}, {"real": 1.0}, {"perhaps": -5}, {"perhaps": None}, {"or_none": None},
    {"or_none": 0}, {"unbounded": -1e300}, {"flag": True}, {"word": "b"}, {"text": "x"},
    {"names": ["a", "b"]}, {"names": ("a",)}, {"names": []},
]  # fmt: skip
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"whole": 0}, ValueError, r"part\.whole=0 is not allowed: it must be an integer >= 1; set pa"),
    ({"whole": True}, TypeError, r"part\.whole=True is a bool, not an integer; write a whole num"),
    ({"whole": 2.0}, TypeError, r"part\.whole=2\.0 is a float, not an integer"),
    ({"whole": "2"}, TypeError, r"part\.whole='2' is a str, not an integer"),
    ({"whole": None}, TypeError, r"part\.whole=None is a NoneType, not an integer"),
    (
        {"real": 0},
        ValueError,
        r"part\.real=0 is not allowed: it must be a finite number > 0 and <=",
    ),
    ({"real": 1.1}, ValueError, "> 0 and <= 1; set part.real accordingly"),
    ({"real": float("nan")}, ValueError, "part.real=nan is not allowed"),
    ({"real": True}, TypeError, "part.real=True is a bool, not a number"),
    ({"real": "0.5"}, TypeError, "part.real='0.5' is a str, not a number"),
    ({"perhaps": 9}, ValueError, "must be an integer < 9"),
    ({"perhaps": "none"}, TypeError, "part.perhaps='none'"),
    ({"or_none": -1}, ValueError, "part.or_none=-1"),
    (
        {"unbounded": float("inf")},
        ValueError,
        "inf is not allowed: it must be a finite number; set",
    ),
    ({"unbounded": None}, TypeError, "part.unbounded=None"),
    ({"flag": 1}, TypeError, "part.flag=1 is a int, not a bool; write true or false"),
    ({"flag": None}, TypeError, "part.flag=None"),
    ({"word": "c"}, ValueError, "part.word='c' is not known; choose one of 'a', 'b'"),
    ({"word": None}, ValueError, "part.word=None is not known"),
    ({"text": 3}, TypeError, "part.text=3 is a int, not a text"),
    ({"names": "bias"}, TypeError, "part.names='bias' is a str, not a list of texts"),
    ({"names": ["a", 1]}, TypeError, "part.names="),
    ({"names": None}, TypeError, "part.names=None"),
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_what_is_declared_is_taken_as_given(values: dict[str, Any]) -> None:
    declared = Declared(**{"whole": 3, **values})
    [(name, value)] = values.items()
    assert getattr(declared, name) is value


@pytest.mark.parametrize(("values", "error", "message"), BAD, ids=lambda v: str(v)[:30])
def test_what_is_not_is_refused_by_its_name(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Declared(**{"whole": 3, **values})


def test_a_constructor_is_checked_by_its_own_annotations() -> None:
    assert Plain(rank=2).rank == 2
    with pytest.raises(ValueError, match=r"^rank=0 is not allowed: it must be an integer >= 1"):
        Plain(rank=0)
    with pytest.raises(TypeError, match=r"^form=1 is a int, not a text"):
        Plain(form=1)  # type: ignore[arg-type]


def test_an_annotation_that_nobody_can_check_is_our_bug() -> None:
    def build(*, table: Mapping[str, int]) -> None:
        check_values(build, {"table": table})

    check_values(build, {"other": 1})
    with pytest.raises(AssertionError, match="table: no check is known"):
        build(table={})


def test_sentences_below_fields_are_in_the_docstring() -> None:
    assert Declared.__doc__ == (
        "Some values.\n\nArgs:\n"
        "    whole (>= 1): How many there are.\n"
        "    real (> 0 and <= 1): How much of it.\n"
        "    word (one of 'a', 'b'): Which."
    )
