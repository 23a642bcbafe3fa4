"""What is random in a run, as functions of its seed and of the step, never of history."""

from __future__ import annotations

import math
import random

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a tuple of integers."""
    seed = int(np.random.SeedSequence([k & 0xFFFFFFFF for k in key]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def step_indices(num_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return the examples of the global batch of optimiser step `step`.

    Every epoch is one permutation of the data; the last batch of an epoch is filled up with random
    repeats of the epoch's examples, so that all batches have `batch_size` examples.
    """
    steps_per_epoch = math.ceil(num_examples / batch_size)
    epoch, position = divmod(step, steps_per_epoch)
    order = _epoch_order(num_examples, batch_size, seed, epoch)
    return order[position * batch_size : (position + 1) * batch_size]


_ORDERS: dict[tuple[int, int, int, int], list[int]] = {}


def _epoch_order(num_examples: int, batch_size: int, seed: int, epoch: int) -> list[int]:
    key = (num_examples, batch_size, seed, epoch)
    if key not in _ORDERS:
        draw = np.random.default_rng([seed & 0xFFFFFFFF, epoch])
        missing = -num_examples % batch_size
        order = [*draw.permutation(num_examples), *draw.integers(num_examples, size=missing)]
        _ORDERS.clear()
        _ORDERS[key] = [int(index) for index in order]
    return _ORDERS[key]
