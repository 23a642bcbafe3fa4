"""GLUE-like data: eight tasks in the columns and files of the real ones.

Labels follow from the grammar alone and from how words belong together, not from which words there
are: one module a family of tasks says how. All texts are about the entities of `world`; those of
the dev files are other ones than those of the training file, and MNLI's mismatched dev file is
about categories that its training file does not have.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.tiny.corpora.glue.acceptability import cola
from tasks.tiny.corpora.glue.facts import Source
from tasks.tiny.corpora.glue.pairs import mnli, mrpc, qnli, qqp, rte, stsb
from tasks.tiny.corpora.glue.sentiment import sst2
from tasks.tiny.corpora.world import CATEGORIES

#: categories of MNLI's mismatched dev file only; the training file has the others
MISMATCHED_CATEGORIES = ("shop", "museum")

_FILES = {"train": "train.tsv", "validation": "dev.tsv"}
_MNLI_FILES = {
    "train": "train.tsv",
    "validation_matched": "dev_matched.tsv",
    "validation_mismatched": "dev_mismatched.tsv",
}


@dataclass(frozen=True)
class Layout:
    """How the files of a task look.

    Attributes:
        texts: names of the text columns; ``label`` and ``idx`` follow.
        files: split, as the hub's `glue` data set calls it -> file name.
        sizes: split -> number of rows of the corpus that scale=tiny uses.
    """

    texts: tuple[str, ...]
    files: Mapping[str, str]
    sizes: Mapping[str, int]

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of all columns in their order."""
        return (*self.texts, "label", "idx")

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts of the dev set, where it has some: matched and mismatched of MNLI."""
        names = (split.partition("validation_")[2] for split in self.files)
        return tuple(name for name in names if name)


_SENTENCES = ("sentence1", "sentence2")
LAYOUTS: dict[str, Layout] = {
    "cola": Layout(("sentence",), _FILES, {"train": 2500, "validation": 400}),
    "sst2": Layout(("sentence",), _FILES, {"train": 2500, "validation": 400}),
    "mrpc": Layout(_SENTENCES, _FILES, {"train": 1800, "validation": 300}),
    "stsb": Layout(_SENTENCES, _FILES, {"train": 2000, "validation": 300}),
    "qqp": Layout(("question1", "question2"), _FILES, {"train": 2500, "validation": 400}),
    "mnli": Layout(
        ("premise", "hypothesis"),
        _MNLI_FILES,
        {"train": 2500, "validation_matched": 300, "validation_mismatched": 300},
    ),
    "qnli": Layout(("question", "sentence"), _FILES, {"train": 2500, "validation": 400}),
    "rte": Layout(_SENTENCES, _FILES, {"train": 1500, "validation": 300}),
}
_MAKERS: dict[str, Callable[[Source], tuple[str, ...]]] = {
    "cola": cola,
    "sst2": sst2,
    "mrpc": mrpc,
    "stsb": stsb,
    "qqp": qqp,
    "mnli": mnli,
    "qnli": qnli,
    "rte": rte,
}


def _categories(task: str, split: str) -> tuple[str, ...]:
    if split == "validation_mismatched":
        return MISMATCHED_CATEGORIES
    if task == "mnli":
        return tuple(name for name in CATEGORIES if name not in MISMATCHED_CATEGORIES)
    return tuple(CATEGORIES)


def draw(
    task: str, *, seed: int, sizes: Mapping[str, int] | None = None
) -> dict[str, list[tuple[str, ...]]]:
    """Draw all splits of one task.

    Args:
        task: a key of `LAYOUTS`.
        seed: equal seeds give equal corpora; tasks differ from each other under one seed.
        sizes: split -> number of rows; None takes the sizes of the layout.

    Returns:
        Split -> rows of the texts and the label (as the file has it), without ``idx``. No texts are
        twice in the corpus, and no entity is in two splits.

    Raises:
        ValueError: an unknown task or split, or a size below 1.
    """
    if task not in LAYOUTS:
        raise ValueError(f"unknown GLUE task {task!r}; allowed: {sorted(LAYOUTS)}")
    layout = LAYOUTS[task]
    sizes = layout.sizes if sizes is None else sizes
    for split, size in sizes.items():
        if split not in layout.files or size < 1:
            raise ValueError(
                f"sizes of {task} has {split!r}: {size}; allowed are sizes of at least 1 for "
                f"{sorted(layout.files)}"
            )
    rng = random.Random(f"glue-{task}-{seed}")  # noqa: S311 (not for security)
    taken: set[tuple[str, ...]] = set()
    seen: set[tuple[str, ...]] = set()
    corpus = {}
    for split, size in sizes.items():
        source = Source(rng, _categories(task, split), taken)
        rows: list[tuple[str, ...]] = []
        while len(rows) < size:
            row = _MAKERS[task](source)
            if row[:-1] not in seen:
                seen.add(row[:-1])
                rows.append(row)
        source.close()
        corpus[split] = rows
    return corpus


@functools.lru_cache(maxsize=len(LAYOUTS))
def _drawn(
    task: str, seed: int, sizes: tuple[tuple[str, int], ...] | None
) -> dict[str, list[tuple[str, ...]]]:
    """Draw once what a worker's runs share; a run of seconds would spend half a second on it."""
    return draw(task, seed=seed, sizes=None if sizes is None else dict(sizes))


def write(folder: Path, task: str, *, seed: int, sizes: Mapping[str, int] | None = None) -> None:
    """Write one task as tab-separated files with the columns of the hub's `glue` data set.

    Args:
        folder: gets ``<task>/train.tsv`` and ``<task>/dev.tsv`` (MNLI: ``dev_matched.tsv`` and
            ``dev_mismatched.tsv``); made if missing. UTF-8, one header line, no quoting.
        task: a key of `LAYOUTS`.
        seed: equal seeds give equal bytes.
        sizes: split -> number of rows; None takes the sizes of the layout.

    Raises:
        ValueError: an unknown task or split, or a size below 1.
    """
    corpus = _drawn(task, seed, None if sizes is None else tuple(sizes.items()))
    layout = LAYOUTS[task]
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split, rows in corpus.items():
        table = [layout.columns, *((*row, str(i)) for i, row in enumerate(rows))]
        text = "".join("\t".join(row) + "\n" for row in table)
        (folder / task / layout.files[split]).write_text(text, encoding="utf-8", newline="")
