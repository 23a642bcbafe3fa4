"""What a method and a task are: the two interfaces that the trainer and the tasks share.

`delta_lora.trainer` knows nothing but these two classes, so it holds no method and no task name.
`tasks/` may import this module and `checks`, and nothing else of `delta_lora`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class MetricSpec:
    """How a metric is named, printed and compared.

    Attributes:
        name: key in records, for example ``rouge_l``.
        label: column head in tables, for example ``ROUGE-L``.
        scale: factor from the stored value (fractions are stored in [0, 1]) to the printed one.
        decimals: digits behind the point in tables.
        higher_is_better: direction of the metric.
    """

    name: str
    label: str
    scale: float = 1.0
    decimals: int = 2
    higher_is_better: bool = True


@dataclass
class Batch:
    """One micro-batch as the trainer sees it.

    Attributes:
        tensors: what `Task.loss` reads, by name.
        num_targets: number of terms in the summed loss (target tokens, or samples).
        num_tokens: number of input tokens, for the throughput figure.
        example_ids: names of the examples, for error messages.
    """

    tensors: dict[str, Tensor]
    num_targets: int
    num_tokens: int
    example_ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on `device`.

        To a CUDA device they go by way of pinned memory, so that the host does not wait for the
        steps that are queued there.
        """
        if torch.device(device).type == "cuda":
            moved = {
                name: (tensor if tensor.is_cuda else tensor.pin_memory()).to(
                    device, non_blocking=True
                )
                for name, tensor in self.tensors.items()
            }
        else:
            moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return Batch(moved, self.num_targets, self.num_tokens, self.example_ids)


class Method(ABC):
    """How a model is adapted: what is injected, what trains, what happens around a step.

    One file in `delta_lora/methods/` and one yaml in `configs/method/` make a method. The order of
    calls in a run is: `inject`, `param_groups`, then per optimiser step `before_micro_batch` for
    every micro-batch, `extra_loss` once (after the last micro-batch's forward pass), `before_step`
    (gradients complete and clipped, optimiser not yet run), `after_step` (parameters updated,
    gradients still there), and `finish` once at the end. A step that the loss scaler skipped calls
    neither `after_step` nor counts as a step.

    A method of your own is a subclass with a `name`. Its constructor takes keywords of plain values
    (JSON), which are what is written to a saved adapter.
    """

    #: key of the method, in records and in saved adapters.
    name: str
    #: raised when the same settings give another result.
    version: int = 1
    #: keywords of the constructor that change no result, so that no run is named by them.
    not_signed: tuple[str, ...] = ()
    #: peak learning rate of what `param_groups` returns.
    learning_rate: float
    #: parameters outside the optimiser that the method itself changes (Delta-LoRA's W, also where
    #: its closed form keeps the change of W beside it).
    num_updatable_parameters: int = 0
    #: whether `inject` plans by the length of the training.
    needs_total_steps: bool = False

    @abstractmethod
    def inject(
        self,
        model: nn.Module,
        *,
        projections: Sequence[str] | None,
        head: Sequence[str],
        total_steps: int,
        seed: int,
    ) -> None:
        """Prepare `model` in place: add branches, set `requires_grad` of every parameter.

        Args:
            model: the pre-trained model.
            projections: names or patterns of the adapted layers; None finds W_Q and W_V by
                structure.
            head: names of task modules that are new (a classification head) and train with every
                method.
            total_steps: number of optimiser steps of the run, for schedules.
            seed: seed of the run, for the initialisation and for anything the method draws itself.

        Raises:
            ValueError: a setting does not fit the model, or a pattern matches nothing.
        """

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return optimiser groups ``{"params": [(name, parameter), ...], "lr": float}``.

        Default: all parameters that require a gradient, in one group with the rate `learning_rate`.
        """
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [{"params": trained, "lr": self.learning_rate}]

    def before_micro_batch(self, step: int, micro_step: int) -> None:  # noqa: B027 - a hook
        """Run before every forward pass in training (`step` counts applied steps from 0)."""

    def extra_loss(self) -> Tensor | None:
        """Return a regulariser to add once per optimiser step, or None."""
        return None

    def before_step(self, step: int) -> None:  # noqa: B027 - a hook
        """Run when gradients are complete, before the optimiser."""

    def after_step(self, step: int) -> None:  # noqa: B027 - a hook
        """Run after the optimiser, before gradients are cleared."""

    def finish(self, num_steps: int) -> None:  # noqa: B027 - a hook
        """Run once after the last step; raise RuntimeError if a needed hook never ran."""

    def merged(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Run the model on merged weights within the context; restore it bit by bit afterwards."""
        return nullcontext(model)

    def updated_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return every parameter a run changes, by its name in `model` (tied names once).

        Default: all parameters that require a gradient.
        """
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the method's own state (importances, factors at the start step) as tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state but got {sorted(state)}")

    def describe(self) -> dict[str, Any]:
        """Return facts for the record (ranks after pruning, number of W updates); JSON values."""
        return {}

    def log_values(self) -> dict[str, float]:
        """Return what mirrors show of the state of the moment, by ``group/name``.

        Called at log steps, on the main process, and once before the first step; cheap, and it
        changes nothing that a result depends on.
        """
        return {}

    def load_facts(self, facts: Mapping[str, Any]) -> None:  # noqa: B027 - a hook
        """Set what a finished run's `describe` told, where the forward pass depends on it."""


class Task(ABC):
    """What is learned and how it is scored.

    One file in `tasks/` and one yaml in `configs/task/` make a task. Scoring is a pure function of
    (predictions, references), so that it can run again without the model.
    """

    #: key of the task in records.
    name: str
    #: bumped when a score can change.
    version: int
    #: what `score` returns, in table order.
    metrics: tuple[MetricSpec, ...]
    #: family of models whose outputs `loss` reads (one of `families.FAMILIES`); None: any.
    family: str | None = None
    #: keywords of the constructor that change no result, so that no run is named by them.
    not_signed: tuple[str, ...] = ("cache_dir",)
    #: names of new task modules that train with every method.
    head: tuple[str, ...] = ()
    #: values of the model's configuration that the head needs, for example ``num_labels``.
    model_config: Mapping[str, Any] = MappingProxyType({})
    #: metric of the validation split by which the best epoch is chosen; None: validation loss.
    selection_metric: str | None = None
    #: split that the final predictions and scores of a run are of.
    scored_split: str = "test"

    def check_source(self) -> None:  # noqa: B027 - a hook
        """Check that what `load` reads is there or can be downloaded, without reading it at length.

        Raises:
            FileNotFoundError: a folder or file is missing.
            RuntimeError: a file is neither in the cache nor where it is downloaded from.
        """

    @abstractmethod
    def load(self) -> None:
        """Read and check all data; nothing else of the task works before.

        Raises:
            FileNotFoundError: a folder or file is missing.
            ValueError: a file is empty, truncated or has the wrong columns (file and line named).
        """

    def check_model(self, model: nn.Module, tokenizer: Any = None) -> None:  # noqa: B027 - a hook
        """Check that what the settings ask for after the training can be done with a model.

        Args:
            model: before the training; its weights may be on the meta device.
            tokenizer: its tokenizer, where the data are read; None where they are not.

        Raises:
            ValueError: it cannot; the message says which setting to change.
        """

    def build_tokenizer(self) -> Any | None:
        """Return a tokenizer for a model that starts from random weights, or None to load one."""
        return None

    def initialise(self, model: nn.Module, examples: Sequence[Any]) -> None:  # noqa: B027 - a hook
        """Change the random weights of a model that starts from them, before the method sees it."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Return source, revision, protocol, sha256 of what was read and rows per split."""

    @abstractmethod
    def examples(self, split: str, tokenizer: Any) -> Sequence[Any]:
        """Return the encoded examples of ``train`` or ``validation`` for the loss."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Make one micro-batch."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss **summed** over the batch's targets (float32 scalar)."""

    def inputs(self, split: str) -> Sequence[Any]:
        """Return the distinct inputs that `predict` reads (the split defaults to the test set)."""
        return ()

    def predict(
        self,
        model: nn.Module,
        tokenizer: Any,
        split: str,
        done: Iterable[dict[str, Any]] = (),
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield chunks of predictions, JSON objects with at least ``id`` and ``prediction``.

        Args:
            model: the model on merged weights, in eval mode.
            tokenizer: its tokenizer.
            split: ``test`` or ``validation``.
            done: predictions that an interrupted run already wrote; they are skipped without
                changing the composition of the remaining chunks, so the result is the same.
            share: index of this process, and number of processes. Of all chunks, finished or not,
                in their one fixed order, a process yields those whose number modulo the number of
                processes is its index; so the shares of all processes together are the whole.

        Raises:
            ValueError: `share` names no process.
        """
        return iter(())

    def score(self, predictions: Sequence[dict[str, Any]], split: str) -> Scores:
        """Return the metrics of `predictions`."""
        return Scores({}, {})

    def item_scores(self, predictions: Sequence[dict[str, Any]], split: str) -> ItemScores:
        """Return how the scores of `predictions` depend on the single inputs of `split`.

        From this follows how much a score would move on other test items. Default: not known.

        Raises:
            ValueError: as `score`.
        """
        reason = f"the task {self.name} does not say how its scores depend on its test items"
        return ItemScores(len(predictions), missing={spec.name: reason for spec in self.metrics})

    def references(self, split: str) -> dict[str, list[str]]:
        """Return what a prediction is compared with, by the id of the input, for people to read."""
        return {}

    def scores_of_items(
        self, predictions: Sequence[dict[str, Any]], split: str
    ) -> dict[str, dict[str, float]]:
        """Return what each of some predictions scores by itself, for people to read.

        Args:
            predictions: any of the split, in any order.
            split: ``test`` or ``validation``.

        Returns:
            By the id of the input: name of the score, as tables call it, to value in their units.
            Only of scores that a single prediction has; nothing where the task has no such score,
            or no references. A score of a whole set, such as BLEU, is none.
        """
        return {}

    def reference_scores(self, split: str) -> dict[str, Scores]:
        """Return what needs no model, by name: a reference against the others, word counts, ..."""
        return {}

    def length(self, example: Any) -> int:
        """Return the number of tokens of an encoded example, for grouping by length.

        Raises:
            ValueError: examples of this task cannot be grouped.
        """
        raise ValueError(
            f"trainer.group_by_length=true, but {type(self).__name__} does not say how long an "
            "example is; set it to false"
        )

    def describe(self, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
        """Return facts for the record that depend on model and tokenizer; JSON values."""
        return {}


@dataclass
class Scores:
    """Metric values, and the reason for each that could not be computed.

    Attributes:
        values: by metric name; fractions in [0, 1] where the metric is one.
        missing: metric name to reason and fix (for example: no Java).
    """

    values: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)


#: from how often each item occurs, (sets, items) float64, to the score of each such set, (sets,)
#: float64; NaN where a set has no such score.
OfSets = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class ItemScores:
    """How the scores of a test set depend on its items.

    Attributes:
        num_items: inputs of the test set.
        of_sets: by name of a score: its value on other sets made of the same items.
        values: by name of a score that is the mean over items: the values of the items, in the
            order of the test set. A score that is no such mean (BLEU, F1) is not in it.
        missing: why a score is not in `of_sets`.
    """

    num_items: int
    of_sets: Mapping[str, OfSets] = field(default_factory=dict)
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
