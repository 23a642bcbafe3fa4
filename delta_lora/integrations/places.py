"""Where a model was saved to and loaded from: told by the model, not guessed from names of folders.

A `TrainerCallback` is told neither where `Trainer` writes a checkpoint (``output_dir``, below it
``run-3`` in a search, anywhere in a subclass) nor which one it has read. But `Trainer` asks the
model to do both.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn


class Places:
    """The folders that a PEFT model was last saved to and loaded from.

    Args:
        model: its `save_pretrained` and `load_adapter` are followed; a model without them tells
            nothing, and a copy of the model is not followed.

    Attributes:
        loaded: the folder of the last `load_adapter`; None where there was none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._saved: Path | None = None
        self.loaded: Path | None = None
        for name, tell in (
            ("save_pretrained", self._see_saved),
            ("load_adapter", self._see_loaded),
        ):
            if hasattr(type(model), name):
                _follow(model, name, tell)

    def is_of(self, model: nn.Module) -> bool:
        """Return whether `model` is the one that is followed."""
        return self._model() is model

    def take_saved(self) -> Path | None:
        """Return the folder that the model was saved to since the last call; None for none."""
        saved, self._saved = self._saved, None
        return saved

    def _see_saved(self, model: nn.Module, folder: Path) -> None:
        if self.is_of(model):
            self._saved = folder

    def _see_loaded(self, model: nn.Module, folder: Path) -> None:
        if self.is_of(model):
            self.loaded = folder


def _follow(model: nn.Module, name: str, tell: Any) -> None:
    """Let ``model.<name>(folder, ...)`` tell of its folder when it is done."""
    original = getattr(type(model), name)
    signature = inspect.signature(original)
    first = list(signature.parameters)[1]

    @functools.wraps(original)
    def followed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        folder = signature.bind(self, *args, **kwargs).arguments[first]
        tell(self, Path(str(folder)))
        return result

    vars(model)[name] = MethodType(followed, model)  # a deep copy is bound to the copy
