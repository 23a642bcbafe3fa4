"""Bytes of a training step and of decoding, from a `Ledger`.

Categories are those of `delta_lora.analysis.memory_model`: weights, gradients, optimizer, method,
activations. The peak of a step is the largest sum at any moment of its backward pass, on top of
weights, optimiser state and what the method keeps: what autograd still keeps, the gradients so far,
and what the running operation needs. Under gradient accumulation the gradients of the earlier
micro-batches are there from the start.
"""

from __future__ import annotations

from scripts.planning.adaptation import Adaptation
from scripts.planning.architecture import Architecture
from scripts.planning.ledger import FLOAT, Ledger


def step_bytes(ledger: Ledger, *, accumulates: bool) -> dict[str, int]:
    """Return the bytes of every category and the peak of one optimiser step.

    Args:
        ledger: of one micro-batch.
        accumulates: whether a step has several micro-batches.
    """
    adaptation = ledger.adaptation
    counters = ledger.trained_tensors if adaptation.states else 0
    sizes = {
        "weights": (ledger.parameters + ledger.adapters) * FLOAT,
        "gradients": ledger.trained * FLOAT,
        "optimizer": (adaptation.states * ledger.trained + counters) * FLOAT,
        "method": adaptation.kept_factors * ledger.adapters * FLOAT,
        "activations": sum(_all_kept(ledger).values()),
    }
    moving = _peak_of_backward(ledger, sizes["gradients"] if accumulates else 0)
    sizes["peak"] = sizes["weights"] + sizes["optimizer"] + sizes["method"] + moving
    return sizes


def _all_kept(ledger: Ledger) -> dict[int, int]:
    kept: dict[int, int] = {}
    for operation in ledger.operations:
        kept |= operation.kept
    return kept


def _peak_of_backward(ledger: Ledger, gradients_before: int) -> int:
    """Walk the backward pass; return the largest sum of what is alive."""
    first_use: dict[int, int] = {}
    for number, operation in enumerate(ledger.operations):
        for storage in operation.kept:
            first_use.setdefault(storage, number)
    kept = _all_kept(ledger)
    alive, made, peak = sum(kept.values()), gradients_before, 0
    for number in reversed(range(len(ledger.operations))):
        operation = ledger.operations[number]
        # Accumulated gradients stay where they are; the new one lives beside them for a moment.
        made += operation.held + (0 if gradients_before else operation.gradients)
        beside = operation.gradients if gradients_before else 0
        peak = max(peak, alive + made + beside + operation.work)
        for storage in operation.kept:
            if first_use[storage] == number:
                alive -= kept[storage]
    return peak


def decoding_bytes(
    shape: Architecture,
    adaptation: Adaptation,
    ledger: Ledger,
    *,
    inputs: int,
    num_beams: int,
    input_length: int,
    new_tokens: int,
) -> int:
    """Return the peak of a beam search on merged weights.

    The larger of two moments: the reading of all prompts at once, where the feed-forward layer of
    the last block is on top of what is cached, and the last step, where the keys and values of all
    beams live, those of one layer twice as beams change places, and the scores over the vocabulary
    several times as the best are searched.

    Args:
        shape: the model.
        adaptation: the method, whose own tensors stay.
        ledger: of a training step, for the sizes of the weights.
        inputs: prompts or sources of one chunk.
        num_beams: width of the search.
        input_length: tokens of the longest one.
        new_tokens: tokens that are written.
    """
    weights = (ledger.parameters + ledger.adapters * (1 + adaptation.kept_factors)) * FLOAT
    kept_slices = ledger.dense * FLOAT if adaptation.kind == "low_rank" else 0
    beams = inputs * num_beams
    per_token = 2 * shape.width * FLOAT
    scores = SCORE_COPIES * beams * shape.vocabulary * FLOAT
    block = (2 * shape.inner + 6 * shape.width) * FLOAT
    if shape.num_decoder_layers:
        layers = shape.num_decoder_layers
        own, cross = beams * new_tokens * per_token, beams * input_length * per_token
        states = beams * input_length * shape.width * FLOAT
        reading = inputs * input_length * block
        cache = layers * (own + cross) + max(own, cross) + states
    else:
        read, written = beams * input_length * per_token, beams * new_tokens * per_token
        reading = shape.num_layers * read + beams * input_length * block
        cache = (shape.num_layers + 1) * (read + written)
    return weights + kept_slices + max(reading, cache + scores)


#: tensors of (beams, vocabulary) that live at once: scores, log-probabilities, blocked ones, ...
SCORE_COPIES = 6
