"""How much work a run is: steps, micro-batches, evaluations, chunks of a beam search."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from scripts.planning.architecture import Architecture
from scripts.planning.forward import Batch
from scripts.planning.lengths import Lengths, TaskLengths


@dataclass(frozen=True)
class Workload:
    """What a run does.

    Attributes:
        steps: optimiser steps.
        micro_batches: forward passes of a step.
        mean: the average micro-batch.
        largest: the largest one of the run.
        evaluated: forward passes over batches of the validation split, all evaluations together.
        evaluation: the average batch of an evaluation.
    """

    steps: int
    micro_batches: int
    mean: Batch
    largest: Batch
    evaluated: int
    evaluation: Batch


@dataclass(frozen=True)
class Decoding:
    """A beam search over the inputs of a split.

    Attributes:
        chunks: chunks of inputs.
        inputs: of one chunk.
        num_beams: width of the search.
        mean_length: tokens of an input.
        longest: tokens of the longest input.
        new_tokens: tokens that are written.
    """

    chunks: int
    inputs: int
    num_beams: int
    mean_length: float
    longest: int
    new_tokens: int


def read_workload(cfg: Any, shape: Architecture, lengths: TaskLengths) -> Workload:
    """Return what the run of `cfg` trains and evaluates."""
    trainer = cfg.trainer
    rows = lengths.rows["train"]
    if cfg.train_fraction is not None:
        rows = max(1, math.ceil(cfg.train_fraction * rows))
    steps_per_epoch = math.ceil(rows / trainer.batch_size)
    steps = trainer.max_steps
    if steps is None:
        steps = math.ceil(trainer.num_epochs * steps_per_epoch)
    micro = min(trainer.micro_batch_size or trainer.batch_size, trainer.batch_size)
    evaluations = _evaluations(steps, steps_per_epoch, trainer.evaluate_every_epochs)
    batches = math.ceil(lengths.rows["validation"] / trainer.eval_batch_size)
    scored = 0
    if shape.family == "roberta":
        # The metric of an epoch takes a second pass over the split, and so do the final scores.
        scored = math.ceil(lengths.rows["scored"] / cfg.task.predict_batch_size)
    return Workload(
        steps=steps,
        micro_batches=math.ceil(trainer.batch_size / micro),
        mean=_mean_of_step(shape, lengths, trainer, micro),
        largest=_largest(shape, lengths, micro),
        evaluated=evaluations * (batches + scored) + scored * bool(cfg.predict),
        evaluation=mean_batch(shape, lengths, trainer.eval_batch_size),
    )


def _evaluations(steps: int, steps_per_epoch: int, every: int | None) -> int:
    if every is None or steps == 0:
        return 0
    return math.ceil(steps / (steps_per_epoch * every))


def read_decoding(cfg: Any, lengths: TaskLengths) -> Decoding | None:
    """Return the beam search of a run, or None where nothing is decoded."""
    if lengths.prompt is None or not cfg.predict:
        return None
    settings = cfg.task.decoding
    new = settings.get("max_new_tokens") or settings.max_length - 1
    return Decoding(
        chunks=math.ceil(lengths.rows["scored"] / settings.batch_size),
        inputs=min(settings.batch_size, lengths.rows["scored"]),
        num_beams=settings.num_beams,
        mean_length=lengths.prompt.mean,
        longest=lengths.prompt.longest,
        new_tokens=new,
    )


def mean_batch(shape: Architecture, lengths: TaskLengths, sequences: int) -> Batch:
    """Return the average micro-batch of so many examples."""
    if shape.family == "gpt2":
        tokens = sequences * (lengths.sequence.mean - 1)  # the last token is only a target
        return Batch(sequences, round(tokens), True, round(sequences * _targets(lengths).mean))
    targets = 0 if lengths.targets is None else round(lengths.targets.mean_of_longest(sequences))
    longest = round(lengths.sequence.mean_of_longest(sequences))
    return Batch(sequences, longest, targets=targets, has_padding=sequences > 1)


def _mean_of_step(shape: Architecture, lengths: TaskLengths, trainer: Any, micro: int) -> Batch:
    """Return the average micro-batch of a step, whose examples may be sorted first."""
    mean = mean_batch(shape, lengths, micro)
    parts = math.ceil(trainer.batch_size / micro)
    if not trainer.group_by_length or mean.is_packed or parts == 1:
        return mean
    longest = lengths.sequence.mean_of_sorted_parts(trainer.batch_size, parts)
    return replace(mean, length=round(longest))


def _largest(shape: Architecture, lengths: TaskLengths, sequences: int) -> Batch:
    if shape.family == "gpt2":
        tokens = lengths.sequence.largest_sum(sequences) - sequences
        return Batch(sequences, tokens, True, _targets(lengths).largest_sum(sequences))
    targets = 0 if lengths.targets is None else lengths.targets.longest
    return Batch(sequences, lengths.sequence.longest, targets=targets)


def _targets(lengths: TaskLengths) -> Lengths:
    assert lengths.targets is not None
    return lengths.targets
