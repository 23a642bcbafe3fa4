"""Values a user sets: declared once, checked with one form of message before expensive work.

A constructor declares a value by its annotation, for example ``rank: Annotated[int,
Range(at_least=1)]``, and `check_values` checks all of them. A message says what was wrong, the
value got, what is allowed and what to do. A bool is never taken for a number, and a number in
quotes is not taken for a number either: both are typing errors in a yaml file that would change a
result without a word.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import inspect
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Class = TypeVar("Class", bound=type)
T = TypeVar("T")

# ---------------------------------------------------------------------- declarations


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number, in ``Annotated[int, Range(at_least=1)]``; None: no bound.

    Attributes:
        above: exclusive lower bound.
        at_least: inclusive lower bound.
        at_most: inclusive upper bound.
        below: exclusive upper bound.
        why: where the bounds come from, for the message, for example ``its memory grows with it``.
    """

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    why: str = ""

    def __contains__(self, number: float) -> bool:
        return (
            (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        signs = ((">", self.above), (">=", self.at_least), ("<=", self.at_most), ("<", self.below))
        bounds = " and ".join(f"{sign} {_plain(b)}" for sign, b in signs if b is not None)
        return f"{bounds} ({self.why})" if self.why else bounds


@dataclass(frozen=True)
class OneOf:
    """The values that are allowed, in ``Annotated[str, OneOf(("linear", "cosine"))]``."""

    options: Sequence[Any]

    def __contains__(self, value: object) -> bool:
        # 1 is no True here, and a list is none of them.
        return any(type(value) is type(option) and value == option for option in self.options)

    def __str__(self) -> str:
        return f"one of {', '.join(repr(option) for option in self.options)}"


@dataclass(frozen=True)
class Matches:
    """How a text must look, in ``Annotated[str, Matches("[0-9a-f]{40}", "a full hash")]``.

    Attributes:
        pattern: a regular expression for the whole text.
        words: what such a text is, for the message.
    """

    pattern: str
    words: str

    def __contains__(self, text: str) -> bool:
        return re.fullmatch(self.pattern, text, re.DOTALL) is not None

    def __str__(self) -> str:
        return self.words


#: a text with something in it.
NOT_EMPTY = Matches(r".*\S.*", "a text that is not empty")
#: a word that a file or a folder may be named by.
NAME = Matches(r"\w[\w.+-]{0,99}", "a name of letters, digits and any of _ . + -")


def check_values(
    declaration: Callable[..., Any],
    values: Mapping[str, Any],
    *,
    prefix: str = "",
    is_ours: bool = True,
) -> None:
    """Check values by the annotations of a class or a function.

    Understood are bool, int, float, str, paths (``str | Path``), ``Sequence[...]`` and
    ``Mapping[str, ...]`` of these, ``Literal`` and classes, each with ``| None`` where None is
    allowed, and `Range`, `OneOf` or `Matches` inside of ``Annotated``. A number without a `Range`
    must be finite, and a path not empty.

    Args:
        declaration: a dataclass, with ``vars(self)`` as values; or a constructor, with
            ``locals()`` at its beginning.
        values: by name; those without an annotation are not checked.
        prefix: what stands before a name in a message, for example ``trainer.``.
        is_ours: False: what an annotation that is not understood allows is left to its owner.

    Raises:
        TypeError: a value has another type than its annotation says.
        ValueError: a value is outside of its range, or not finite.
    """
    for name, hint in hints_of(declaration).items():
        if name in values:
            with contextlib.suppress(*() if is_ours else (UnknownHintError,)):
                check_value(prefix + name, values[name], hint)


@functools.cache
def hints_of(declaration: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the annotations of a class or a function by name, ``Annotated`` included."""
    return get_type_hints(declaration, include_extras=True)


class UnknownHintError(AssertionError):
    """There is no check for an annotation."""


def check_value(name: str, value: Any, hint: Any, rule: Any = None) -> None:
    """Check one value by its annotation.

    Args:
        name: the setting, for the message.
        value: what the user gave.
        hint: an annotation, see `check_values`.
        rule: `Range`, `OneOf` or `Matches`; that of an ``Annotated`` goes before.

    Raises:
        TypeError: a value has another type than its annotation says.
        ValueError: a value is outside of its range, or not finite.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        check_value(name, value, *parts[:2])
    elif origin in (Union, UnionType):
        if value is not None or NoneType not in parts:
            _check_union(name, value, [part for part in parts if part is not NoneType], rule)
    elif origin is Literal:
        check_choice(name, value, parts)
    elif isinstance(rule, OneOf):
        check_choice(name, value, rule.options)
    elif hint is int:
        _check_integer(name, value, rule or Range())
    elif hint is float:
        _check_real(name, value, rule or Range())
    elif hint is bool:
        check_bool(name, value)
    elif hint is str:
        check_text(name, value)
        if rule is not None and value not in rule:
            raise ValueError(f"{name}={shown(value)} is not allowed; write {rule}")
    elif hint is Path:
        check_path(name, value)
    elif origin in (list, tuple, Sequence, Mapping, dict):
        _check_entries(name, value, origin, parts)
    elif hint in (Any, object) or origin is Callable:
        pass
    elif isinstance(hint, type) and origin is None:
        if not isinstance(value, hint):
            raise TypeError(
                f"{name}={shown(value)} is a {type(value).__name__}, not a {hint.__name__}; "
                f"write _target_: {hint.__module__}.{hint.__qualname__} and its settings"
            )
    else:
        raise UnknownHintError(f"{name}: no check is known for the annotation {hint}")


def _check_union(name: str, value: Any, hints: Sequence[Any], rule: Any) -> None:
    """Check a value that may be of one of several types."""
    if len(hints) == 1:
        check_value(name, value, hints[0], rule)
    elif isinstance(rule, OneOf):
        check_choice(name, value, rule.options)
    elif set(hints) == {str, Path}:
        check_path(name, value)
    else:
        reasons = []
        for hint in hints:
            try:
                check_value(name, value, hint, rule)
            except (TypeError, ValueError) as error:
                reasons.append(str(error))
            else:
                return
        raise TypeError("; or: ".join(dict.fromkeys(reasons)))


def _check_entries(name: str, value: Any, origin: Any, parts: Sequence[Any]) -> None:
    """Check a list or a mapping, and each entry by what `parts` say of all of them."""
    if origin in (Mapping, dict):
        check_mapping(name, value)
        for key, entry in value.items():
            check_value(f"{name}.{key}", entry, parts[1])
    elif parts[0] is str:
        check_texts(name, value)
    else:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(
                f"{name}={shown(value)} is a {type(value).__name__}, not a list; write a list"
            )
        for number, entry in enumerate(value):
            check_value(f"{name}[{number}]", entry, parts[0])


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
    bounds = Range(above=above, at_least=at_least, at_most=at_most, below=below)
    return _check_real(name, value, bounds)


def _check_real(name: str, value: float, allowed: Range) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name}={shown(value)} is a {type(value).__name__}, not a number; "
            "write a plain number without quotes"
        )
    # An integer may be larger than any float.
    number = float(value) if abs(value) <= sys.float_info.max else math.inf
    if not math.isfinite(number) or number not in allowed:
        raise ValueError(
            f"{name}={shown(value)} is not allowed: it must be a finite number {allowed}".rstrip()
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
    bounds = Range(above=above, at_least=at_least, at_most=at_most, below=below)
    return _check_integer(name, value, bounds)


def _check_integer(name: str, value: int, allowed: Range) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name}={shown(value)} is a {type(value).__name__}, not an integer; "
            "write a whole number without quotes or a decimal point"
        )
    if value not in allowed:
        raise ValueError(
            f"{name}={shown(value)} is not allowed: it must be an integer {allowed}; "
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
            f"{name}={shown(value)} is a {type(value).__name__}, not a bool; write true or false"
        )
    return value


def check_choice(name: str, value: T, options: Sequence[Any]) -> T:
    """Return `value` if it is one of `options`; 1 is none of them where True is one.

    Raises:
        ValueError: the value is none of them.
    """
    if value not in OneOf(options):
        raise ValueError(f"{name}={shown(value)} is not known; choose {OneOf(options)}")
    return value


def check_text(name: str, value: str) -> str:
    """Return `value` if it is a string.

    Raises:
        TypeError: the value is anything else.
    """
    if not isinstance(value, str):
        raise TypeError(
            f"{name}={shown(value)} is a {type(value).__name__}, not a text; write a text, a "
            f"number in quotes within quotes: {name}='\"1\"'"
        )
    return value


def check_path(name: str, value: str | Path) -> Path:
    """Return `value` as a path, with ``~`` as the home folder and ``$NAME`` as that variable.

    Raises:
        TypeError: the value is no text and no path.
        ValueError: it is empty, or no file system has such a path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(
            f"{name}={shown(value)} is a {type(value).__name__}, not a path; write a path, one "
            f"of digits only in quotes within quotes: {name}='\"1\"'"
        )
    text = str(value)
    if not text.strip() or "\0" in text or len(text) > 4000:
        raise ValueError(
            f"{name}={shown(value)} is not allowed: it must be the path of a folder or a file, "
            "not empty; write . for the working folder"
        )
    path = expanded(text, name)
    unset = re.search(r"\$(\w+|\{\w+\})", str(path))
    if unset and not path.exists():
        raise ValueError(
            f"{name}={shown(value)}: there is no variable {unset[0]}; set it, or write the whole "
            "path"
        )
    return path


def expanded(path: str | Path, name: str = "") -> Path:
    """Return a path with ``~`` and ``$NAME`` as what they stand for.

    Args:
        path: as it is written.
        name: of the setting, for the message.

    Raises:
        ValueError: ``~name``, and there is no such user.
    """
    try:
        return Path(os.path.expandvars(path)).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{name}{'=' if name else ''}{shown(str(path))}: {str(error).rstrip('.')}; write the "
            "whole path, or ./~... for a name with ~"
        ) from error


def check_mapping(name: str, value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `value` if it is a mapping with texts as keys.

    Raises:
        TypeError: it is anything else.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(
            f"{name}={shown(value)} is a {type(value).__name__}, not a mapping of names to "
            f"values; write one, for example {name}={{name: 1}}"
        )
    return value


def check_texts(name: str, value: Sequence[str]) -> tuple[str, ...]:
    """Return `value` as a tuple if it is a list or another sequence of strings.

    Raises:
        TypeError: the value is anything else, or one string, which would be read letter by letter.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(item, str) for item in value):
        raise TypeError(
            f"{name}={shown(value)} is a {type(value).__name__}, not a list of texts; "
            "write a list, for example ['bias']"
        )
    return tuple(value)


def near(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x' or 'y'? " for the names of `known` that are spelt like `name`.

    Empty where there is none; otherwise it ends with a space, so that what is allowed can follow.
    """
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(map(repr, found))}? " if found else ""


def shown(value: object, limit: int = 80) -> str:
    """Return ``repr(value)`` in one line, cut to `limit` characters for a message."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # of an integer with thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _plain(bound: float) -> str:
    """Return a bound as people write it: 65536, not 6.55e+04."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
