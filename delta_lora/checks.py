"""Values a user sets: declared once, checked with one form of message before expensive work.

A constructor declares a value by its annotation, for example ``rank: Annotated[int,
Range(at_least=1)]``, and `check_values` checks all of them. A message says what was wrong, the
value got, what is allowed and what to do. A bool is never taken for a number, and a number in
quotes is not taken for a number either: both are typing errors in a yaml file that would change a
result without a word.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

Class = TypeVar("Class", bound=type)

# ---------------------------------------------------------------------- declarations


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number, in ``Annotated[int, Range(at_least=1)]``; None: no bound.

    Attributes:
        above: exclusive lower bound.
        at_least: inclusive lower bound.
        at_most: inclusive upper bound.
        below: exclusive upper bound.
    """

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        signs = ((">", self.above), (">=", self.at_least), ("<=", self.at_most), ("<", self.below))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)


@dataclass(frozen=True)
class OneOf:
    """The words that are allowed, in ``Annotated[str, OneOf(("linear", "cosine"))]``."""

    options: Sequence[str]

    def __str__(self) -> str:
        return f"one of {', '.join(repr(option) for option in self.options)}"


def check_values(
    declaration: Callable[..., Any], values: Mapping[str, Any], *, prefix: str = ""
) -> None:
    """Check values by the annotations of a class or a function.

    Understood are bool, int, float, str and ``Sequence[str]``, each with ``| None`` where None is
    allowed, and `Range` or `OneOf` inside of ``Annotated``. A number without a `Range` must be
    finite.

    Args:
        declaration: a dataclass, with ``vars(self)`` as values; or a constructor, with
            ``locals()`` at its beginning.
        values: by name; those without an annotation are not checked.
        prefix: what stands before a name in a message, for example ``trainer.``.

    Raises:
        TypeError: a value has another type than its annotation says.
        ValueError: a value is outside of its range, or not finite.
    """
    for name, hint in get_type_hints(declaration, include_extras=True).items():
        if name in values:
            _check_value(prefix + name, values[name], hint)


def _check_value(name: str, value: Any, hint: Any, rule: Any = None) -> None:
    """Check one value by its annotation, without what is wrapped around its type."""
    if get_origin(hint) is Annotated:
        hint, rule, *_ = get_args(hint)
        _check_value(name, value, hint, rule)
    elif get_origin(hint) in (Union, UnionType):
        if value is not None or NoneType not in get_args(hint):
            [hint] = (part for part in get_args(hint) if part is not NoneType)
            _check_value(name, value, hint, rule)
    elif isinstance(rule, OneOf):
        check_choice(name, value, rule.options)
    elif hint is int:
        check_integer(name, value, **vars(rule or Range()))
    elif hint is float:
        check_real(name, value, **vars(rule or Range()))
    elif hint is bool:
        check_bool(name, value)
    elif hint is str:
        check_text(name, value)
    elif hint == Sequence[str]:
        check_texts(name, value)
    else:
        raise AssertionError(f"{name}: no check is known for the annotation {hint}")


def documented(cls: Class) -> Class:
    """Add to a docstring the sentences below the fields, with what is allowed, for `help`."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:  # installed without its source
        return cls
    [definition] = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Args:"]
    hints = get_type_hints(cls, include_extras=True)
    for field, below in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            name, sentence = ast.unparse(field.target), ast.literal_eval(below.value)
            rule = f" ({get_args(hints[name])[1]})" if get_origin(hints[name]) is Annotated else ""
            text = " ".join(f"{name}{rule}: {sentence}".split())
            lines.append(textwrap.indent(textwrap.fill(text, 88, subsequent_indent="    "), "    "))
    cls.__doc__ = "\n".join(lines)
    return cls


# ---------------------------------------------------------------------- one value


def check_real(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> float:
    """Return `value` as a float if it is a finite number within the bounds, those of `Range`.

    Args:
        name: the setting, for the message.
        value: what the user gave.
        above: exclusive lower bound.
        at_least: inclusive lower bound.
        at_most: inclusive upper bound.
        below: exclusive upper bound.

    Returns:
        The value as a Python float.

    Raises:
        TypeError: the value is no number.
        ValueError: the value is not finite or outside the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}, not a number; "
            "write a plain number without quotes"
        )
    number, allowed = (
        float(value),
        Range(above=above, at_least=at_least, at_most=at_most, below=below),
    )
    if not math.isfinite(number) or number not in allowed:
        raise ValueError(
            f"{name}={value!r} is not allowed: it must be a finite number {allowed}".rstrip()
            + f"; set {name} accordingly"
        )
    return number


def check_integer(
    name: str,
    value: int,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> int:
    """Return `value` if it is a whole number within the bounds; arguments as of `check_real`.

    Raises:
        TypeError: the value is no integer (a float with a whole value is none either).
        ValueError: the value is outside the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}, not an integer; "
            "write a whole number without quotes or a decimal point"
        )
    allowed = Range(above=above, at_least=at_least, at_most=at_most, below=below)
    if value not in allowed:
        raise ValueError(
            f"{name}={value!r} is not allowed: it must be an integer {allowed}; "
            f"set {name} accordingly"
        )
    return int(value)


def check_bool(name: str, value: bool) -> bool:
    """Return `value` if it is a bool.

    Raises:
        TypeError: the value is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}, not a bool; write true or false"
        )
    return value


def check_choice(name: str, value: str, options: Sequence[str]) -> str:
    """Return `value` if it is one of `options`.

    Raises:
        ValueError: the value is none of them.
    """
    if value not in options:
        raise ValueError(f"{name}={value!r} is not known; choose {OneOf(options)}")
    return value


def check_text(name: str, value: str) -> str:
    """Return `value` if it is a string.

    Raises:
        TypeError: the value is anything else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, not a text; write a text")
    return value


def check_texts(name: str, value: Sequence[str]) -> tuple[str, ...]:
    """Return `value` as a tuple if it is a list or another sequence of strings.

    Raises:
        TypeError: the value is anything else, or one string, which would be read letter by letter.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(item, str) for item in value):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}, not a list of texts; "
            "write a list, for example ['bias']"
        )
    return tuple(value)


def near(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x' or 'y'? " for the names of `known` that are spelt like `name`.

    Empty where there is none; otherwise it ends with a space, so that what is allowed can follow.
    """
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(map(repr, found))}? " if found else ""
