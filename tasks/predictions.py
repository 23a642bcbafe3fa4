"""Bring predictions and inputs together: exactly one prediction for each input, in its order.

Also which inputs a part of a split has, and which chunks of them one of several processes predicts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

#: how many names an error message lists.
NUM_LISTED = 5


def align(
    predictions: Sequence[dict[str, Any]],
    ids: Sequence[str],
    split: str,
    inputs: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return the predictions in the order of `ids`.

    Args:
        predictions: objects with ``id`` and, where they say it, ``input``.
        ids: names of the inputs of a split, all different.
        split: its name, for messages.
        inputs: what each input says; a prediction that says something else belongs to other data.

    Raises:
        ValueError: a prediction is missing, double, unknown or of another input.
    """
    counts = Counter(prediction["id"] for prediction in predictions)
    known = set(ids)
    for problem, names in (
        ("no prediction for", [name for name in ids if name not in counts]),
        ("more than one prediction for", [name for name, count in counts.items() if count > 1]),
        ("predictions for unknown inputs", [name for name in counts if name not in known]),
    ):
        if names:
            more = ", ..." if len(names) > NUM_LISTED else ""
            raise ValueError(
                f"{problem} {len(names)} of {len(ids)} inputs of {split}: "
                f"{', '.join(map(str, names[:NUM_LISTED]))}{more}"
            )
    by_id = {prediction["id"]: prediction for prediction in predictions}
    for name, expected in zip(ids, inputs or (), strict=inputs is not None):
        if (got := by_id[name].get("input", expected)) != expected:
            raise ValueError(
                f"the prediction {name} is for the input {got!r}, but here the input is "
                f"{expected!r}: it was made from other data"
            )
    return [by_id[name] for name in ids]


def chosen(count: int, wanted: int | None) -> range | list[int]:
    """Return the places of the inputs of a split that are predicted and scored.

    They are evenly spaced over the split, first input included: test sets stand in an order (by
    category, by length), so that the first ones would be of one kind.

    Args:
        count: inputs of the split.
        wanted: how many are predicted; None, or no less than there are: all.
    """
    if wanted is None or wanted >= count:
        return range(count)
    return [number * count // wanted for number in range(wanted)]


def describe_part(split: str, count: int, wanted: int | None) -> dict[str, Any]:
    """Return what a record says of a split of which a part is scored; nothing where all is.

    Args:
        split: its name.
        count: its inputs.
        wanted: as for `chosen`.
    """
    if wanted is None or wanted >= count:
        return {}
    return {"part": {"split": split, "used": wanted, "of": count}}


def own_chunks(chunks: Sequence[T], share: tuple[int, int]) -> Iterator[T]:
    """Yield the chunks of one process, see `Task.predict`.

    Args:
        chunks: all of them, in the order that every process has.
        share: index of the process, and number of processes.

    Raises:
        ValueError: `share` names no process.
    """
    index, count = share
    if not 0 <= index < count:
        raise ValueError(
            f"share={share}; allowed: (index of a process, number of processes), the index from 0 "
            "to one less than the number"
        )
    yield from chunks[index::count]
