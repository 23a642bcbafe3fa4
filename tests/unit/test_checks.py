"""A value is declared once, by an annotation, and checked by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from delta_lora.checks import (
    NOT_EMPTY,
    Matches,
    OneOf,
    Range,
    check_path,
    check_value,
    check_values,
    documented,
)


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


class Part:
    """A value that is an object."""


class Wide:
    """What else an annotation may say."""

    def __init__(
        self,
        *,
        sizes: Mapping[str, Annotated[int, Range(at_least=1, at_most=9)]] | None = None,
        folder: str | Path | None = None,
        stop: Annotated[bool | str, OneOf((True, False, "never"))] = False,
        hash_: Annotated[str, Matches("[0-9a-f]{4}", "four hexadecimal digits")] = "00ff",
        title: Annotated[str, NOT_EMPTY] = "x",
        word: Literal["a", "b"] = "a",
        part: Part | None = None,
        names: Sequence[Annotated[str, NOT_EMPTY]] = (),
        free: Any = None,
        either: int | Sequence[str] = 1,
    ) -> None:
        check_values(Wide.__init__, locals(), prefix="wide.")


WIDE_GOOD: list[dict[str, Any]] = [
    {"sizes": {"a": 1, "b": 9}}, {"sizes": {}}, {"folder": "x y"}, {"folder": Path("~/x")},
    {"stop": True}, {"stop": "never"}, {"hash_": "abcd"}, {"word": "b"}, {"part": Part()},
    {"names": ["a"]}, {"free": object()}, {"either": 3}, {"either": ["a"]},
]  # fmt: skip
WIDE_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sizes": {"a": 0}}, ValueError, r"wide\.sizes\.a=0 is not allowed: .* >= 1 and <= 9; set wi"),
    ({"sizes": {"a": True}}, TypeError, r"wide\.sizes\.a=True is a bool"),
    ({"sizes": [1]}, TypeError, r"wide\.sizes=\[1\] is a list, not a mapping"),
    ({"sizes": {1: 1}}, TypeError, "not a mapping of names"),
    ({"sizes": "a"}, TypeError, r"wide\.sizes='a' is a str, not a mapping"),
    ({"folder": 3}, TypeError, r"wide\.folder=3 is a int, not a path"),
    ({"folder": ""}, ValueError, r"wide\.folder='' is not allowed: .* path"),
    ({"folder": "a\0b"}, ValueError, r"wide\.folder="),
    ({"folder": "~nobody-of-this-name/x"}, ValueError, r"wide\.folder=.* write the whole path"),
    ({"stop": 1}, ValueError, r"wide\.stop=1 is not known; choose one of True, False, 'never'"),
    ({"stop": "no"}, ValueError, r"wide\.stop='no'"),
    ({"hash_": "abcde"}, ValueError, r"wide\.hash_='abcde' is not allowed; write four hexadec"),
    ({"hash_": 1234}, TypeError, r"wide\.hash_=1234 is a int, not a text"),
    ({"title": " "}, ValueError, r"wide\.title=' ' is not allowed; write a text that is not emp"),
    ({"word": "c"}, ValueError, r"wide\.word='c' is not known; choose one of 'a', 'b'"),
    (
        {"part": "x"},
        TypeError,
        r"wide\.part='x' is a str, not a Part; write _target_: .*Part ",
    ),
    ({"names": "ab"}, TypeError, r"wide\.names='ab' is a str, not a list"),
    ({"names": ["a", ""]}, ValueError, r"wide\.names\[1\]=''"),
    ({"either": "a"}, TypeError, r"wide\.either='a' .*not an integer.*; or: .*not a list of texts"),
]


@pytest.mark.parametrize("values", WIDE_GOOD, ids=lambda values: "-".join(values))
def test_wider_declarations_are_understood(values: dict[str, Any]) -> None:
    Wide(**values)


@pytest.mark.parametrize(("values", "error", "message"), WIDE_BAD, ids=lambda v: str(v)[:30])
def test_wider_declarations_are_held_to(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        Wide(**values)
    assert "\n" not in str(raised.value)


def test_an_annotation_that_nobody_can_check_is_our_bug() -> None:
    def build(*, many: set[int]) -> None:
        check_values(build, {"many": many})

    check_values(build, {"other": 1})
    check_values(build, {"many": 1}, is_ours=False)
    with pytest.raises(AssertionError, match="many: no check is known"):
        build(many=set())


def test_a_bound_says_where_it_comes_from() -> None:
    rule = Range(at_least=1, at_most=65536, why="all are in memory at once")
    with pytest.raises(ValueError, match=r"n=65537 .*>= 1 and <= 65536 \(all are in memory"):
        check_value("n", 65537, int, rule)


def test_numbers_beyond_every_float_are_shown_and_refused() -> None:
    with pytest.raises(ValueError, match=r"x=1000.*\.\.\. is not allowed: it must be "):
        check_value("x", 10**400, float)


def test_a_path_with_a_tilde_is_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert check_path("folder", "~/x") == Path("/home/me/x")


def test_sentences_below_fields_are_in_the_docstring() -> None:
    assert Declared.__doc__ == (
        "Some values.\n\nArgs:\n"
        "    whole (>= 1): How many there are.\n"
        "    real (> 0 and <= 1): How much of it.\n"
        "    word (one of 'a', 'b'): Which."
    )
