"""Every task: batches from disk and from memory, each text encoded once, predictions in shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from delta_lora.protocols import Batch
from scripts.runs.composition import compose
from tasks import encoded
from tasks.generation import BeamSearch, Seq2SeqBeamSearch
from tasks.sources import Release
from tasks.tiny.bpe import train_pair_tokenizer, train_tokenizer
from tasks.tiny.corpora import e2e, glue, webnlg, xsum

SIZES = {"train": 30, "validation": 14, "test": 16}
#: an encoder with one text or with two, with classes or numbers; an encoder-decoder; decoders.
TASKS = ("glue/cola", "glue/mnli", "glue/stsb", "xsum", "e2e", "webnlg")


def write(name: str, folder: Path) -> Path:
    """Write the embedded corpus of a task as files."""
    task = name.removeprefix("glue/")
    if task != name:
        parts = ("_matched", "_mismatched") if task == "mnli" else ("",)
        sizes = {"train": 30, **{f"validation{part}": 14 // len(parts) for part in parts}}
        glue.write(folder, task, seed=0, sizes=sizes)
    else:
        {"e2e": e2e, "webnlg": webnlg, "xsum": xsum}[name].write(folder, seed=0, sizes=SIZES)
    return folder


def make(name: str, *more: str) -> Any:
    cfg = compose([f"experiment={name}", "method=lora", *more])
    task = instantiate(cfg.task)
    task.load()
    return task


def from_files(name: str, folder: Path, cache: Path) -> Any:
    batch = "predict_batch_size" if name.startswith("glue/") else "decoding.batch_size"
    return make(
        name, "task.source=files", f"task.data_dir={folder}", f"task.cache_dir={cache}",
        f"task.{batch}=3",
    )  # fmt: skip


def tokenizer_for(name: str) -> Any:
    """Return a tokenizer that cuts some texts."""
    texts = ["a restaurant near the river serves food in the town of people and places"] * 20
    if name in ("e2e", "webnlg"):
        tokenizer = train_tokenizer(texts, vocab_size=300)
        tokenizer.model_max_length = 640
        return tokenizer
    segments = name.startswith("glue/")
    return train_pair_tokenizer(
        texts, vocab_size=300, max_length=40 if segments else 60, segments=segments
    )


class SumOfTokens(nn.Module):
    """A classifier without weights to speak of: its logits follow from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Any:
        total = (input_ids * attention_mask).sum(1).float()
        return SimpleNamespace(logits=torch.stack([total % 7, total % 5, total % 3], dim=1))


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode to the first tokens of the input."""

    def generate(self: Any, model: Any, inputs: Any, *_: Any) -> list[list[int]]:
        return [list(map(int, tokens))[:6] for tokens in inputs]

    monkeypatch.setattr(BeamSearch, "generate", generate)
    monkeypatch.setattr(Seq2SeqBeamSearch, "generate", generate)


def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "MIN_ROWS_ON_DISK", 1)
    monkeypatch.setattr(encoded, "BLOCK", 7)


def count_calls(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of texts of every call of the tokenizer."""
    sizes: list[int] = []
    whole = type(tokenizer).__call__

    def call(self: Any, texts: Any, *more: Any, **settings: Any) -> Any:
        sizes.append(len(texts))
        return whole(self, texts, *more, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    return sizes


def seen(task: Any, tokenizer: Any) -> Iterator[tuple[Any, ...]]:
    """Yield all that a trainer sees of train and validation set."""
    for split in ("train", "validation"):
        examples = task.examples(split, tokenizer)
        for start in range(0, len(examples), 4):
            chosen = examples[start : start + 4]
            batch: Batch = task.collate(chosen)
            yield (
                batch.tensors, batch.num_targets, batch.num_tokens, batch.example_ids,
                [task.length(example) for example in chosen],
            )  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_batches_from_disk_are_those_from_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache, tokenizer = write(name, tmp_path / "data"), tmp_path / "c", tokenizer_for(name)
    memory = list(seen(from_files(name, folder, cache), tokenizer))
    assert not cache.exists()
    on_disk(monkeypatch)
    warnings = []
    for _ in ("made", "read"):
        caplog.clear()
        other = list(seen(from_files(name, folder, cache), tokenizer))
        warnings.append([r.getMessage() for r in caplog.records if "lose their" in r.getMessage()])
        assert len(other) == len(memory)
        for (tensors, *facts), (expected, *expected_facts) in zip(other, memory, strict=True):
            assert facts == expected_facts
            assert list(tensors) == list(expected)
            for key, tensor in tensors.items():
                assert tensor.dtype == expected[key].dtype
                assert torch.equal(tensor, expected[key])
        monkeypatch.setattr(encoded, "_blocks", None)  # the second time nothing is encoded
    assert warnings[0] == warnings[1]
    assert (len(warnings[0]) > 0) == (name not in ("e2e", "webnlg"))
    assert list((cache / "encoded").glob("*.arrow"))


@pytest.mark.parametrize("name", TASKS)
def test_no_more_than_a_block_is_encoded_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, tokenizer = from_files(name, write(name, tmp_path), tmp_path), tokenizer_for(name)
    sizes = count_calls(tokenizer, monkeypatch)
    monkeypatch.setattr(encoded, "BLOCK", 7)
    num_examples = len(task.examples("train", tokenizer))
    assert max(sizes) == 7
    assert sum(sizes) >= num_examples


@pytest.mark.parametrize("name", TASKS)
def test_the_embedded_corpora_and_small_files_write_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, tokenizer = tmp_path / "cache", tokenizer_for(name)
    list(seen(from_files(name, write(name, tmp_path / "data"), cache), tokenizer))
    on_disk(monkeypatch)
    list(seen(make(name, "task.source=embedded", f"task.cache_dir={cache}"), tokenizer))
    assert not cache.exists()


def test_documents_and_summaries_are_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoding: None
) -> None:
    folder, tokenizer = write("xsum", tmp_path / "data"), tokenizer_for("xsum")
    calls = count_calls(tokenizer, monkeypatch)
    model = SimpleNamespace(
        config=SimpleNamespace(), generation_config=SimpleNamespace(
            decoder_start_token_id=2, eos_token_id=2, bos_token_id=0, pad_token_id=1, to_dict=dict
        )
    )  # fmt: skip
    facts = []
    for use in ("memory", "made", "read"):
        if use == "made":
            on_disk(monkeypatch)
        task = from_files("xsum", folder, tmp_path / "cache")
        calls.clear()
        for split in ("train", "validation"):
            task.examples(split, tokenizer)
        list(task.predict(model, tokenizer, "validation"))
        list(task.predict(model, tokenizer, "test"))
        facts.append(task.describe(model, tokenizer)["truncated"])
        assert sum(calls) == (0 if use == "read" else 2 * 30 + 2 * 14 + 16)
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["train documents"] > 0
    assert list(facts[0]) == [
        "test documents", "train documents", "train summaries", "validation documents",
        "validation summaries",
    ]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_shares_of_the_predictions_are_the_whole(name: str, tmp_path: Path, decoding: None) -> None:
    task, tokenizer = from_files(name, write(name, tmp_path), tmp_path), tokenizer_for(name)
    model, split = SumOfTokens(), task.scored_split

    def predict(**settings: Any) -> list[Any]:
        return list(task.predict(model, tokenizer, split, **settings))

    whole = predict()
    assert sum(map(len, whole)) == len(task.inputs(split))
    assert len(whole) >= 4
    for count in (1, 2, 3, len(whole) + 1):
        for index in range(count):
            assert predict(share=(index, count)) == whole[index::count]
    # Chunks are counted whether they are finished or not, and keep their members.
    done = [*whole[0], *whole[2][:1], *whole[3]]
    rest = [[], whole[1], whole[2][1:], [], *whole[4:]]
    for index in range(2):
        expected = [chunk for chunk in rest[index::2] if chunk]
        assert predict(share=(index, 2), done=done) == expected
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"share=\(.* allowed: \(index of a process"):
            predict(share=share)


def test_glue_reads_the_same_rows_from_the_hub_and_from_files(tmp_path: Path) -> None:
    plain = from_files("glue/mnli", write("glue/mnli", tmp_path / "data"), tmp_path)
    cache = tmp_path / "cache" / "owner--name" / ("0" * 40) / "mnli"
    cache.mkdir(parents=True)
    sums = {}
    for file in ("train", "dev_matched", "dev_mismatched"):
        rows = [r for r in (*plain.inputs("train"), *plain.inputs()) if r.id.startswith(file)]
        table = pyarrow.table(
            {
                "label": [row.label for row in rows],
                "hypothesis": [row.texts[1] for row in rows],
                "premise": [row.texts[0] for row in rows],
            }
        )
        path = cache / f"{file.replace('dev', 'validation')}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(table, path)
        sums[f"mnli/{path.name}"] = encoded._sha256(path)
    cfg = compose(["experiment=glue/mnli", "method=lora"]).task
    task = instantiate(cfg, cache_dir=str(tmp_path / "cache"))
    task.source.release = Release("owner/name", "0" * 40, "http://127.0.0.1:9", sums)
    task.load()
    for split in ("train", "validation"):
        assert task.inputs(split) == plain.inputs(split)
    assert [file["sha256"] for file in task.provenance()["files"]] == list(sums.values())
