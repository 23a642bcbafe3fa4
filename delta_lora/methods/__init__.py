"""The methods, one a file, and how one is found by its name and built from a description.

A description is JSON: ``{"name": "delta_lora", "rank": 8, ...}``, the name of a method and the
keywords of its constructor. Besides the methods of this folder every subclass of `Method` with a
`name` of its own can be named, once the module that defines it was imported. Nothing but modules of
this folder is ever imported by a name.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from delta_lora.checks import near
from delta_lora.protocols import Method


def method_class(name: str) -> type[Method]:
    """Return the class of a method by its name.

    Raises:
        ValueError: there is no such method (near matches are named), or there are two.
    """
    own = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name in own:
        importlib.import_module(f"{__name__}.{name}")
    found: dict[tuple[str, str], type[Method]] = {}
    others = set()
    for kind in _subclasses(Method):  # type: ignore[type-abstract]
        if (its_name := vars(kind).get("name")) == name:
            # A class that was defined again (a notebook's cell) takes the place of the former one.
            found[kind.__module__, kind.__qualname__] = kind
        elif isinstance(its_name, str):
            others.add(its_name)
    if len(found) > 1:
        places = " and ".join(f"{module}.{kind}" for module, kind in sorted(found))
        raise ValueError(f"two methods are called {name!r}: {places}; give yours another name")
    if not found:
        known = sorted({*own, *others})
        raise ValueError(
            f"unknown method {name!r}; {near(name, known)}known: {', '.join(known)}; "
            "a method of your own is known once the module that defines it was imported"
        )
    return next(iter(found.values()))


def _subclasses(kind: type[Method]) -> Iterator[type[Method]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def describe(kind: type[Method], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a method with `settings`: its name, and every setting it has.

    Args:
        kind: its class.
        settings: keywords of its constructor; those that are left out get their default.

    Raises:
        TypeError: a setting that the method does not have, or lacks.
    """
    every = inspect.signature(kind).parameters
    parameters = {k: p for k, p in every.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    if unnamed := [
        k for k, p in every.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]:
        raise TypeError(
            f"{kind.__qualname__} takes {', '.join(unnamed)} by place, and settings are saved by "
            f"name; write them behind a star: def __init__(self, *, {', '.join(unnamed)})"
        )
    for key in settings:
        if key not in parameters:
            raise TypeError(
                f"method {kind.name!r} has no setting {key!r}; {near(key, parameters)}"
                f"it has {', '.join(parameters)}"
            )
    if "name" in parameters:
        raise TypeError(f"{kind.__qualname__} has a setting 'name', which names the method itself")
    complete = {"name": kind.name}
    for key, parameter in parameters.items():
        complete[key] = settings.get(key, parameter.default)
        if complete[key] is inspect.Parameter.empty:
            raise TypeError(f"method {kind.name!r} needs {key}=...; it has {', '.join(parameters)}")
    return complete


def build(description: Mapping[str, Any]) -> Method:
    """Return the method of a description.

    Raises:
        TypeError: a setting that the method does not have, or lacks.
        ValueError: there is no such method, or a value is not allowed.
    """
    settings = dict(description)
    kind = method_class(str(settings.pop("name", None)))
    settings = describe(kind, settings)
    del settings["name"]
    return kind(**settings)
