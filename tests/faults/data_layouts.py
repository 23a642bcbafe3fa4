"""Sound data files of every task in every form, and what reads them as a run or a program does."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hydra.utils import instantiate

from scripts.runs.composition import compose
from tasks.e2e import E2E
from tasks.metrics import e2e as e2e_scorer
from tasks.metrics import webnlg as webnlg_scorer
from tasks.tiny.bpe import train_tokenizer
from tasks.tiny.corpora import e2e as e2e_corpus
from tasks.tiny.corpora import webnlg as webnlg_corpus
from tasks.tiny.corpora import xsum as xsum_corpus
from tasks.webnlg import WebNLG
from tasks.xsum import XSum
from tests.faults.official import FOLDERS, expected, names, write_hub, write_official

Example = tuple[object, ...]
GLUE = tuple(f"glue/{task}" for task in FOLDERS)


@dataclass(frozen=True)
class Layout:
    """One form of the files of one task.

    Attributes:
        name: in the names of tests.
        write: writes a sound folder.
        read: returns the examples of a folder.
        kind: of its files: ``lines``, ``csv``, ``tsv``, ``jsonl``, ``json``, ``parquet``,
            ``arrow``, or ``texts`` of a scorer.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], list[Example]]
    kind: str

    def __str__(self) -> str:
        """As tests are called."""
        return self.name


def _of_task(make: Callable[[Path], Any]) -> Callable[[Path], list[Example]]:
    """Return what reads the examples of a task as a run does."""

    def read(folder: Path) -> list[Example]:
        task = make(folder)
        task.check_source()
        task.load()
        found: list[Example] = []
        for split in ("train", "validation", "test"):
            with contextlib.suppress(ValueError):  # GLUE's test set
                rows = task.inputs(split)
            for row in rows:
                if hasattr(row, "references"):
                    texts: list[Example] = [(row.context, r) for r in row.references]
                    texts = [(*pair, row.category) for pair in texts or [(row.context, "")]]
                elif hasattr(row, "document"):
                    texts = [(row.document, row.summary)]
                else:
                    texts = [(*row.texts, row.label, row.part)]
                found += [(split, *text) for text in texts]
        _encode(found)
        return found

    return read


def _encode(examples: list[Example]) -> None:
    texts = [str(part) for row in examples for part in row if isinstance(part, str)]
    _tokenizer()(texts, add_special_tokens=False)


@cache
def _tokenizer() -> Any:
    return train_tokenizer(["a cat sat on the mat"] * 10, vocab_size=300)


@cache
def _glue(name: str) -> Any:
    return compose([f"experiment={name}", "method=lora"]).task


def _read_glue(name: str) -> Callable[[Path], list[Example]]:
    return _of_task(lambda folder: instantiate(_glue(name), source="files", data_dir=str(folder)))


def _only(write: Callable[..., object], *patterns: str) -> Callable[[Path], object]:
    """Return a writer of those files of a corpus that fit."""

    def run(folder: Path) -> None:
        write(folder, seed=3, sizes={"train": 6, "validation": 3, "test": 3})
        for path in list(folder.iterdir()):
            if not any(path.match(pattern) for pattern in patterns):
                path.unlink()

    return run


def _webnlg_lines(folder: Path) -> None:
    _only(webnlg_corpus.write, "*.json")(folder)
    for path in list(folder.glob("*.json")):
        lines = []
        for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
            ((key, value),) = entry.items()
            triples = [
                [t["subject"], t["property"], t["object"]] for t in value["modifiedtripleset"]
            ]
            texts = [text["lex"] for text in value["lexicalisations"] if text["comment"] == "good"]
            row = {
                "id": key,
                "category": value["category"],
                "triples": triples,
                "references": texts,
            }
            lines.append(json.dumps(row, ensure_ascii=False))
        path.unlink()
        (folder / f"{path.stem}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


COLUMNS = {
    "glue/cola": ["sentence"],
    "glue/stsb": ["sentence1", "sentence2"],
    "glue/mnli": ["premise", "hypothesis"],
}


def write_saved(folder: Path, name: str, form: str) -> None:
    """Write a GLUE task as `datasets` saves it: JSON lines, Parquet shards, or save_to_disk."""
    folder.mkdir(parents=True, exist_ok=True)
    task = name.partition("/")[2]
    for file in names(task):
        split = "train" if file == "train" else "validation"
        columns, hub = [*COLUMNS[name], "label"], file.replace("dev", "validation")
        rows = [dict(zip(columns, row, strict=True)) for row in expected(task, split, file)]
        table = pa.Table.from_pylist(rows)
        if form == "jsonl":
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            (folder / f"{hub}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        elif form == "parquet":
            for number, part in enumerate((table[:1], table[1:])):
                path = folder / f"{hub}-{number:05d}-of-00002.parquet"
                pyarrow.parquet.write_table(part, path)
        else:
            import datasets

            datasets.disable_progress_bars()
            datasets.Dataset(table).save_to_disk(str(folder / hub))


def _of_scorer(scorer: Any) -> Callable[[Path], list[Example]]:
    """Return what reads outputs and references as the program of a scorer does."""

    def read(folder: Path) -> list[Example]:
        found: list[Example] = []

        def score(outputs: list[str], groups: list[list[str]], **_: object) -> Any:
            outputs, groups = e2e_scorer.check_texts(outputs, groups)
            found.extend((o, *g) for o, g in zip(outputs, groups, strict=True))
            return e2e_scorer.Scores({}, {})

        pair = [f"--{name}={folder / f'{name}.txt'}" for name in ("predictions", "references")]
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            patch.setattr(scorer, "score", score)
            code = scorer.main(pair)
        if code == 2:
            raise ValueError(said.getvalue().strip())
        assert code == 0
        return found

    return read


def _write_pair(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    outputs = ["A pub — cheap.", "It isn't near.", "", "Été 3 £.", "The last."]
    groups = ["A café.\nA cheap pub.", "It is not near.", "Nothing.", "Été.\nZwei\nThree.", "Last."]
    (folder / "predictions.txt").write_text("\n".join(outputs) + "\n", encoding="utf-8")
    (folder / "references.txt").write_text("\n\n".join(groups) + "\n", encoding="utf-8")


LAYOUTS = [
    Layout(
        "e2e/lora",
        _only(e2e_corpus.write, "*.txt"),
        _of_task(lambda folder: E2E(source="files", data_dir=folder)),
        "lines",
    ),
    Layout(
        "e2e/challenge",
        _only(e2e_corpus.write, "*.csv"),
        _of_task(lambda folder: E2E(source="files", data_dir=folder, protocol="challenge")),
        "csv",
    ),
    Layout(
        "webnlg/json",
        _only(webnlg_corpus.write, "*.json"),
        _of_task(lambda folder: WebNLG(source="files", data_dir=folder)),
        "json",
    ),
    Layout(
        "webnlg/jsonl",
        _webnlg_lines,
        _of_task(lambda folder: WebNLG(source="files", data_dir=folder)),
        "jsonl",
    ),
    Layout(
        "xsum",
        _only(xsum_corpus.write, "*.jsonl"),
        _of_task(lambda folder: XSum(source="files", data_dir=folder)),
        "jsonl",
    ),
    *(Layout(n, lambda f, n=n: write_hub(f, n[5:]), _read_glue(n), "tsv") for n in GLUE),
    *(
        Layout(f"{n} official", lambda f, n=n: write_official(f, n[5:]), _read_glue(n), "tsv")
        for n in GLUE
    ),
    Layout(
        "glue/mrpc msr",
        lambda f: write_official(f, "mrpc", msr=True),
        _read_glue("glue/mrpc"),
        "tsv",
    ),
    *(
        Layout(
            f"{n} {form}", lambda f, n=n, form=form: write_saved(f, n, form), _read_glue(n), form
        )
        for form in ("jsonl", "parquet", "arrow")
        for n in ("glue/stsb", "glue/mnli")
    ),
    Layout("scorer e2e", _write_pair, _of_scorer(e2e_scorer), "texts"),
    Layout("scorer webnlg", _write_pair, _of_scorer(webnlg_scorer), "texts"),
]
TEXTUAL = ("lines", "csv", "tsv", "jsonl", "json", "texts")
