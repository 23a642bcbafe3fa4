"""Small files of GLUE in the forms in which people have them, written here and never copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

Row = tuple[object, ...]

#: folder that the official archive of a task makes.
FOLDERS = {
    "cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI",
    "qnli": "QNLI", "rte": "RTE",
}  # fmt: skip
#: tasks whose official training files have a header.
HEADED = tuple(task for task in FOLDERS if task != "cola")
LABELS = {"rte": ("entailment", "not_entailment"), "qnli": ("entailment", "not_entailment"),
          "mnli": ("entailment", "neutral", "contradiction")}  # fmt: skip
_HUB_COLUMNS = {
    "cola": "sentence", "sst2": "sentence", "mnli": "premise hypothesis",
    "qnli": "question sentence", "qqp": "question1 question2", "rte": "sentence1 sentence2",
    "mrpc": "sentence1 sentence2", "stsb": "sentence1 sentence2",
}  # fmt: skip
_SINGLE = [
    ('The cat said "no.', 1), ("Cat the sat mat.", 0), ("A dog, it seems, was late ", 1),
    ("Été \u2028 in Prague.", 0), ('"Quoted whole."', 1), ("Of the and to.", 0),
]  # fmt: skip
_PAIRS = [
    ('He called her "the witness".', "A witness, he said.", 1), ("One two.", "Three four.", 0),
    ('"Why?', "Because it's 5 o'clock.", 1), ("Müller paid 3 £.", "Nobody paid.", 0),
    ("A plane lands.", "A plane is landing.", 1), ("It rains.", "The sun shines.", 0),
]  # fmt: skip
_SCORES = [5.0, 0.0, 3.8, 2.5, 4.75, 1.0]


def expected(task: str, split: str, name: str = "") -> list[Row]:
    """Return the rows that a split of the small files has: texts, and the label.

    Args:
        task: of GLUE.
        split: ``train``, ``validation`` or ``test``.
        name: of one file of the split; all of them where it is empty.
    """
    base: list[Row] = list(_SINGLE if task in ("cola", "sst2") else _PAIRS)
    if task == "stsb":
        base = [(*row[:-1], score) for row, score in zip(base, _SCORES, strict=True)]
    if task == "mnli":
        base = [(*row[:-1], number % 3) for number, row in enumerate(base)]
    if split == "train":
        return base
    marked = "" if split == "validation" else " last"
    rows = [(f"{row[0]} again{marked}", *row[1:]) for row in base]
    if task != "mnli":
        return rows[:4]
    matched = rows[:3]
    other = [(f"{row[0]} elsewhere", *row[1:]) for row in rows[:4]]
    return {"": [*matched, *other], "matched": matched, "mismatched": other}[name.partition("_")[2]]


def names(task: str, *, test: bool = False) -> list[str]:
    """Return the names of a task's files, without their ending."""
    splits = ["train", "dev", *(["test"] if test else [])]
    if task != "mnli":
        return splits
    parts = [f"{split}_{part}" for split in splits[1:] for part in ("matched", "mismatched")]
    return ["train", *parts]


def write_hub(folder: Path, task: str) -> Path:
    """Write TSV files with the hub's columns; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names(task):
        header = [*_HUB_COLUMNS[task].split(), "label", "idx"]
        rows = expected(task, _split(name), name)
        _write(folder / f"{name}.tsv", header, [(*row, n) for n, row in enumerate(rows)])
    return folder


def write_official(
    folder: Path,
    task: str,
    rows: Mapping[str, Sequence[Row]] | None = None,
    *,
    msr: bool = False,
) -> Path:
    """Write a task as its official archive has it; return the folder.

    Args:
        folder: is made.
        task: of GLUE.
        rows: split -> rows, in place of the small ones.
        msr: of MRPC Microsoft's own files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if msr:
        _write_msr(folder)
        return folder
    for name in names(task, test=rows is None):
        split = _split(name)
        own = expected(task, split, name) if rows is None else rows[split]
        header, form = _official(task, split)
        lines = [form(number, *map(str, row)) for number, row in enumerate(own)]
        _write(folder / f"{name}.tsv", header, lines)
    return folder


def _split(name: str) -> str:
    return {"train": "train", "dev": "validation", "test": "test"}[name.partition("_")[0]]


def _write(path: Path, header: Sequence[str], rows: Sequence[Row], end: str = "\n") -> None:
    lines = ["\t".join(map(str, row)) for row in ([header] if header else []) + list(rows)]
    path.write_bytes((end.join(lines) + end).encode())


def _named(task: str, label: str) -> str:
    return LABELS[task][int(label)]


def _official(task: str, split: str) -> tuple[list[str], Callable[..., Row]]:
    """Return the header of an official file, and what makes a line of a row."""
    is_test = split == "test"
    if task == "cola":
        if is_test:
            return ["index", "sentence"], lambda n, s, y: (n, s)
        return [], lambda n, s, y: ("gj04", y, "" if y == "1" else "*", s)
    if task == "sst2":
        if is_test:
            return ["index", "sentence"], lambda n, s, y: (n, s)
        return ["sentence", "label"], lambda n, s, y: (s, y)
    if task == "mrpc":
        if is_test:
            header = ["index", "#1 ID", "#2 ID", "#1 String", "#2 String"]
            return header, lambda n, a, b, y: (n, 100 + n, 200 + n, a, b)
        header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        return header, lambda n, a, b, y: (y, 100 + n, 200 + n, a, b)
    if task == "stsb":
        header = ["index", "genre", "filename", "year", "old_index", "source1", "source2",
                  "sentence1", "sentence2", *([] if is_test else ["score"])]  # fmt: skip
        return header, lambda n, a, b, y: (
            n, "main-captions", "MSRvid", "2012test", n, "none", "none", a, b,
            *(() if is_test else (y,)),
        )  # fmt: skip
    if task == "qqp":
        if is_test:
            return ["id", "question1", "question2"], lambda n, a, b, y: (n, a, b)
        header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
        return header, lambda n, a, b, y: (n, 2 * n, 2 * n + 1, a, b, y)
    if task == "mnli":
        many = [f"label{number}" for number in range(1, 2 if split == "train" else 6)]
        header = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse",
                  "sentence2_binary_parse", "sentence1_parse", "sentence2_parse", "sentence1",
                  "sentence2", *([] if is_test else [*many, "gold_label"])]  # fmt: skip
        return header, lambda n, a, b, y: (
            n, 31193, f"{n}n", "government", f"( {a} )", f"( {b} )", f"(ROOT {a})", f"(ROOT {b})",
            a, b, *(() if is_test else [_named("mnli", y)] * (len(many) + 1)),
        )  # fmt: skip
    columns = _HUB_COLUMNS[task].split()
    header = ["index", *columns, *([] if is_test else ["label"])]
    return header, lambda n, a, b, y: (n, a, b, *(() if is_test else (_named(task, y),)))


def _write_msr(folder: Path) -> None:
    header = ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    lines, ids = [], []
    dev = iter(enumerate(expected("mrpc", "validation"), start=500))
    for number, row in enumerate(expected("mrpc", "train"), start=900):
        lines.append((row[2], number, number + 50, row[0], row[1]))
        for other, row_of_dev in islice(dev, 1):  # dev rows stand among the others
            lines.append((row_of_dev[2], other, other + 50, row_of_dev[0], row_of_dev[1]))
            ids.append((other, other + 50))
    _write(folder / "msr_paraphrase_train.txt", header, lines, "\r\n")
    _write(folder / "dev_ids.tsv", [], ids)
    tests = [
        (row[2], 1300 + n, 1400 + n, row[0], row[1])
        for n, row in enumerate(expected("mrpc", "test"))
    ]
    _write(folder / "msr_paraphrase_test.txt", header, tests, "\r\n")
