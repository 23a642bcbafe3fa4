"""Encoded splits: memory and disk give the same, and a cache never decides over a run."""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import encoded
from tasks.encoded import Block, EncodedSplit, Examples, Split, Store, Texts, tokenizer_sha256
from tasks.tiny.bpe import train_pair_tokenizer

TEXTS = [f"row {'x' * (i % 5)} {i}" for i in range(20)]


class Counted:
    """Encodes characters as numbers, rows 4 and 11 cut; counts the rows it was given."""

    def __init__(self, delay: float = 0.0) -> None:
        self.rows: list[int] = []
        self.delay = delay

    def __call__(self, texts: Sequence[Texts], start: int) -> Block:
        time.sleep(self.delay)
        self.rows += range(start, start + len(texts))
        ids = [[ord(letter) for letter in str(text)] for text in texts]
        cut = [number - start for number in (4, 11) if start <= number < start + len(texts)]
        return Block({"ids": ids, "more": [[i, len(ids)] for i in range(len(ids))]}, cut)


def split(encode: Any = None, **changes: Any) -> Split:
    values: dict[str, Any] = {
        "name": "toy-train", "what": "examples of train", "version": 1, "texts": TEXTS,
        "encode": encode or Counted(), "limit": 9, "place": lambda index: f"line {index + 1}",
    }  # fmt: skip
    return Split(**{**values, **changes})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_pair_tokenizer(TEXTS, vocab_size=300, max_length=64, segments=False)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "MIN_ROWS_ON_DISK", 1)
    monkeypatch.setattr(encoded, "BLOCK", 3)
    monkeypatch.setattr(encoded, "_WARNED_OF", set())


def everything(found: EncodedSplit) -> list[Any]:
    rows = [found.row(name, index).tolist() for name in found.columns for index in range(20)]
    lengths = [found.lengths(name).tolist() for name in found.columns]
    return [list(found.columns), len(found), rows, lengths, found.num_cut, found.first_cut]


def files(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.glob(f"*{ending}"))


def unfinished(folder: Path) -> list[Path]:
    return sorted(folder.glob(".writing-*"))


# What is kept


def test_memory_and_disk_give_the_same(tmp_path: Path, tokenizer: Any) -> None:
    memory = encoded.encode(split(), tokenizer, None)
    assert not list(tmp_path.iterdir())
    first, second = Counted(), Counted()
    made = encoded.encode(split(first), tokenizer, tmp_path / "a")
    read = encoded.encode(split(second), tokenizer, tmp_path / "a")
    assert everything(made) == everything(read) == everything(memory)
    assert memory.row("ids", 7).tolist() == [ord(letter) for letter in TEXTS[7]]
    assert memory.row("ids", 7).dtype == read.row("ids", 7).dtype == np.int32
    assert (memory.num_cut, memory.first_cut) == (2, 4)
    assert (first.rows, second.rows) == (list(range(20)), [])
    assert not unfinished(tmp_path / "a")


def test_small_splits_and_tokenizers_without_a_state_stay_in_memory(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded.encode(split(), object(), tmp_path)
    monkeypatch.setattr(encoded, "MIN_ROWS_ON_DISK", 21)
    encoded.encode(split(), tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"texts": [*TEXTS[:-1], "other"]},
        {"texts": TEXTS[:-1]},
        {"texts": [(text, "") for text in TEXTS]},
        {"limit": 8},
        {"version": 2},
        {"name": "toy-test"},
    ],
)
def test_whatever_decides_the_tokens_names_the_file(
    tmp_path: Path, tokenizer: Any, change: dict[str, Any]
) -> None:
    encoded.encode(split(), tokenizer, tmp_path)
    again = Counted()
    encoded.encode(split(again, **change), tokenizer, tmp_path)
    assert again.rows
    assert len(files(tmp_path, ".arrow")) == 2


def test_texts_are_not_run_together(tmp_path: Path, tokenizer: Any) -> None:
    for texts in ([("ab", "c")], [("a", "bc")]):
        encoded.encode(split(texts=texts), tokenizer, tmp_path)
    assert len(files(tmp_path, ".arrow")) == 2


def test_the_whole_state_of_a_tokenizer_counts(tokenizer: Any) -> None:
    def make(texts: Sequence[str] = TEXTS, **settings: Any) -> Any:
        values: dict[str, Any] = {"vocab_size": 300, "max_length": 64, "segments": False}
        return train_pair_tokenizer(texts, **{**values, **settings})

    usual = tokenizer_sha256(tokenizer)
    assert tokenizer_sha256(make()) == usual
    tokenizer("some text", truncation=True, max_length=5, padding="max_length")
    assert tokenizer_sha256(tokenizer) == usual  # a call changes nothing that stays
    others = [make(["quite other words"] * 9), make(vocab_size=270), make(segments=True), make()]
    others[-1].add_tokens(["row"])
    left, unsplit, named = make(), make(), make()
    left.truncation_side = "left"
    unsplit.split_special_tokens = True
    named.eos_token = "<mask>"
    hashes = [tokenizer_sha256(other) for other in [*others, left, unsplit, named]]
    assert len({usual, *hashes}) == 1 + len(hashes)
    assert tokenizer_sha256(object()) is None


# What goes wrong


def test_a_damaged_or_foreign_file_is_named_and_made_again(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    expected = everything(encoded.encode(split(), tokenizer, tmp_path))
    (path,), (checksum,) = files(tmp_path, ".arrow"), files(tmp_path, ".sha256")
    whole, line = path.read_bytes(), checksum.read_bytes()
    other = tmp_path / "other"
    encoded.encode(split(limit=8), tokenizer, other)
    foreign, foreign_line = files(other, ".arrow")[0], files(other, ".sha256")[0]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    text = b"no Arrow file at all"
    cases = {
        "is damaged": (bytes(flipped), line),
        "is damaged (": (whole[:-100], line),
        "damaged (its sha256": (b"", line),
        "(its sha256": (whole, b""),
        "is of something else": (foreign.read_bytes(), foreign_line.read_bytes()),
        "is no Arrow file": (text, f"{encoded.hashlib.sha256(text).hexdigest()}  x\n".encode()),
    }
    for message, (content, sum_line) in cases.items():
        caplog.clear()
        path.write_bytes(content)
        checksum.write_bytes(sum_line)
        again = Counted()
        assert everything(encoded.encode(split(again), tokenizer, tmp_path)) == expected
        assert again.rows == list(range(20))
        (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
        assert message in record.getMessage()
        assert f"{path} is" in record.getMessage()
        assert path.read_bytes() == whole
        assert checksum.read_bytes() == line


def test_what_a_killed_process_left_is_made_again_without_a_word(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    encoded.encode(split(), tokenizer, tmp_path)
    (path,), (checksum,) = files(tmp_path, ".arrow"), files(tmp_path, ".sha256")
    checksum.unlink()
    left = path.with_name(f".writing-{2**22 + 1}-{path.name}")  # no process has this number
    left.write_bytes(path.read_bytes()[:500])
    again = Counted()
    encoded.encode(split(again), tokenizer, tmp_path)
    assert again.rows
    assert checksum.exists()
    assert not left.exists()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_folder_that_takes_no_files_costs_one_warning(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "file"
    folder.write_text("no folder")
    expected = everything(encoded.encode(split(), tokenizer, None))
    for _ in range(2):
        assert everything(encoded.encode(split(), tokenizer, folder)) == expected
    assert caplog.text.count("cannot be kept in") == 1
    assert "task.cache_dir=FOLDER" in caplog.text


def test_a_full_disk_costs_one_warning(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    expected = everything(encoded.encode(split(), tokenizer, None))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # bytes of any file
    try:
        found = encoded.encode(split(), tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything(found) == expected
    assert "File too large" in caplog.text
    assert not [*files(tmp_path, ".arrow"), *unfinished(tmp_path), *files(tmp_path, ".sha256")]


def test_what_the_encoder_says_of_a_row_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    def encode(texts: Sequence[Texts], start: int) -> Block:
        if start == 6:
            raise ValueError("row 7 is wrong")
        return Counted()(texts, start)

    with pytest.raises(ValueError, match="row 7 is wrong"):
        encoded.encode(split(encode), tokenizer, tmp_path)
    assert not [*files(tmp_path, ".arrow"), *unfinished(tmp_path)]


def test_one_makes_a_file_and_the_others_wait(tmp_path: Path, tokenizer: Any) -> None:
    work, found = Counted(delay=0.02), []

    def run() -> None:
        found.append(everything(encoded.encode(split(work), tokenizer, tmp_path)))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert work.rows == list(range(20))
    assert found == [everything(encoded.encode(split(), tokenizer, None))] * 4


# What a task sees


def test_a_store_encodes_once_and_counts_what_is_cut_in_every_form(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    said = "Toy: 2 of 20 examples of train are longer than 9 tokens and lose their end"
    for folder in (None, tmp_path, tmp_path):
        caplog.clear()
        store, work = Store("Toy", folder), Counted()
        first = store.get(split(work), tokenizer)
        assert store.get(split(work), tokenizer) is first
        assert len(work.rows) in (0, 20)
        assert caplog.text.count(f"{said} (first: line 5)") == 1
    other = train_pair_tokenizer(TEXTS, vocab_size=280, max_length=64, segments=False)
    assert store.get(split(), other) is not first
    assert store.get(split(limit=8), other).num_cut == 2


def test_examples_are_a_sequence() -> None:
    examples = Examples(5, lambda index: f"example {index}")
    assert len(examples) == 5
    assert [*examples] == examples[:] == [f"example {n}" for n in range(5)]
    assert examples[-1] == "example 4"
    assert examples[1:4:2] == ["example 1", "example 3"]
    with pytest.raises(IndexError):
        examples[5]
