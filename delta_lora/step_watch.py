"""Notice an optimiser step that was taken without the calls around it.

A method such as Delta-LoRA works before and after every optimiser step. A loop that leaves these
calls out trains something else, without an error of its own: so torch's optimisers are asked to
tell of every step, and the next forward pass in training raises.

What counts is that an optimiser of torch (a subclass, or the inner one of a wrapper) has run its
`step` over a trained parameter that has a gradient. So nothing is noticed of gradient accumulation,
`load_state_dict`, `model.to(...)`, `zero_grad` or a step that a loss scaler skipped, and nothing of
changes that are written by hand. The version counter of a tensor would not do: fused optimisers
leave it as it is, and loading weights raises it.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_BEFORE = (
    "an optimiser step was taken without adapter.before_step(), so the training is not that of "
    "method {name!r}"
)
_AFTER = (
    "an optimiser step was taken and adapter.after_step() was not called, so the training is not "
    "that of method {name!r}"
)
_UNUSED_RATE = (
    "{kind} was given lr={given:g} and trains with {own} instead, for adapter.param_groups() "
    "brings the rate of method {name!r}; give the rate to attach(..., learning_rate={given:g}) and "
    "none to the optimiser"
)
_ADVICE = (
    "; in every step call adapter.before_step() right before optimizer.step() and "
    "adapter.after_step() right after it, and start again from the base or from what "
    "Adapter.state_dict returned before"
)


class StepWatch:
    """Whether every optimiser step of a model stood between `open` and `close`.

    Args:
        model: the injected model.
        name: of its method, for messages.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name
        #: what an optimiser has done since; None where nothing is left to clear up.
        self._suspicion: str | None = None
        #: of a fused optimiser under a loss scaler: above 0 where it has skipped the step.
        self._found_inf: Tensor | None = None
        self._is_open = False
        self._begin()

    def _begin(self) -> None:
        #: what an optimiser trains of the model.
        self._own: weakref.WeakKeyDictionary[Optimizer, list[Tensor]] = weakref.WeakKeyDictionary()
        listen(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()  # a copy of the model is trained by another optimiser

    def open(self) -> None:
        """Say that the optimiser step comes now.

        Raises:
            RuntimeError: as for `check`.
        """
        self.check()
        self._is_open = True

    def close(self) -> None:
        """Say that the optimiser step has been taken.

        Raises:
            RuntimeError: `open` was not called before it.
        """
        if not self._is_open:
            raise RuntimeError(_BEFORE.format(name=self.name) + _ADVICE)
        self.forget()

    def forget(self) -> None:
        """Start afresh: what has been trained so far was replaced."""
        self._suspicion = self._found_inf = None
        self._is_open = False

    def check(self) -> None:
        """Check that the last optimiser step stood between `open` and `close`.

        Raises:
            RuntimeError: it did not.
        """
        if self._suspicion is None:
            return
        if self._found_inf is not None and bool(self._found_inf > 0):
            self._suspicion = self._found_inf = None
            return
        raise RuntimeError(self._suspicion.format(name=self.name) + _ADVICE)

    def see(self, optimizer: Optimizer) -> None:
        """Take notice of an optimiser step of this process.

        Raises:
            RuntimeError: the first step of an optimiser whose own learning rate no group has.
        """
        if optimizer not in self._own:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            trained = {id(p) for p in self.model.parameters() if p.requires_grad}
            self._own[optimizer] = [p for p in parameters if id(p) in trained]
            if self._own[optimizer] and (unused := _unused_rate(optimizer)) is not None:
                rates = sorted({_rate(group) for group in optimizer.param_groups})
                raise RuntimeError(
                    _UNUSED_RATE.format(
                        kind=type(optimizer).__name__,
                        given=unused,
                        own=", ".join(f"{rate:g}" for rate in rates),
                        name=self.name,
                    )
                )
        if all(p.grad is None for p in self._own[optimizer]):
            return
        if self._suspicion is not None and self._found_inf is None:
            return
        self._suspicion = _AFTER if self._is_open else _BEFORE
        found = getattr(optimizer, "found_inf", None)
        self._found_inf = found.detach() if isinstance(found, Tensor) else None


def _unused_rate(optimizer: Optimizer) -> float | None:
    """Return the learning rate that an optimiser was given and that no group of it has, or None."""
    given = optimizer.defaults.get("lr")
    parameter = inspect.signature(type(optimizer)).parameters.get("lr")
    if given is None or (parameter is not None and given == parameter.default):
        return None
    return None if any(_rate(g) == float(given) for g in optimizer.param_groups) else float(given)


def _rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a group, before any schedule."""
    return float(group.get("initial_lr", group["lr"]))


class Listener(Protocol):
    """What is told of every optimiser step of this process."""

    def see(self, optimizer: Optimizer) -> None:
        """Take notice of a step that `optimizer` has taken."""


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
_handles: list[Any] = []


def listen(listener: Listener) -> None:
    """Tell `listener` of every optimiser step of this process, as long as it is used elsewhere."""
    _listeners.add(listener)
    if not _handles:
        _handles.append(register_optimizer_step_post_hook(_after_any_step))


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in list(_listeners):
        listener.see(optimizer)
