"""Checks of the values a user sets: one message form, before any expensive work.

A message says what was wrong, the value got, what is allowed and what to do. A bool is never taken
for a number, and a number in quotes is not taken for a number either: both are typing errors in a
yaml file that would change a result without a word.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real


def check_real(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> float:
    """Return `value` as a float if it is a finite number within the bounds.

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
    number = float(value)
    bounds = [
        (text, bound, holds)
        for text, bound, holds in (
            (">", above, above is None or number > above),
            (">=", at_least, at_least is None or number >= at_least),
            ("<=", at_most, at_most is None or number <= at_most),
            ("<", below, below is None or number < below),
        )
        if bound is not None
    ]
    if not math.isfinite(number) or not all(holds for _, _, holds in bounds):
        allowed = " and ".join(f"{text} {bound:g}" for text, bound, _ in bounds)
        raise ValueError(
            f"{name}={value!r} is not allowed: it must be a finite number"
            f"{' ' + allowed if allowed else ''}; set {name} accordingly"
        )
    return number


def check_integer(name: str, value: int, *, at_least: int) -> int:
    """Return `value` if it is a whole number not below `at_least`.

    Args:
        name: the setting, for the message.
        value: what the user gave.
        at_least: inclusive lower bound.

    Returns:
        The value as a Python int.

    Raises:
        TypeError: the value is no integer (a float with a whole value is none either).
        ValueError: the value is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}, not an integer; "
            "write a whole number without quotes or a decimal point"
        )
    if value < at_least:
        raise ValueError(
            f"{name}={value!r} is not allowed: it must be an integer >= {at_least}; "
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
        allowed = ", ".join(repr(option) for option in options)
        raise ValueError(f"{name}={value!r} is not known; choose one of {allowed}")
    return value


def near(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x' or 'y'? " for the names of `known` that are spelt like `name`.

    Empty where there is none; otherwise it ends with a space, so that what is allowed can follow.
    """
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(map(repr, found))}? " if found else ""
