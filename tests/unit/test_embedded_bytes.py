"""The tiny world, byte by byte: a corpus that changes would void every result at the tiny scale."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.encoded import tokenizer_sha256
from tasks.tiny.bpe import train_pair_tokenizer, train_tokenizer
from tasks.tiny.corpora import e2e, glue, webnlg, xsum
from tasks.tiny.corpora.general import documents
from tasks.tiny.objectives import Causal, Denoising, Masked
from tasks.tiny.pretraining import Pretraining

FILES = {
    "e2e": "e105e86f9da03910f1f559081b86169b4453705fd335177da86d17b87fbd9a51",
    "webnlg": "1c55f4d89746e2025025cb4de9b55413011430c99e56a5ceb0ee5153b2718370",
    "xsum": "ecd98a391f3034c23dd7e1a9e4dabd0e190c232b3c8902a4f39333af15fd6fc4",
    "cola": "140932ae9115dd3e3903da422d916b71e5d8723780703635f8c1a154cc75f6b3",
    "mnli": "9685ca30ee9adcfbd536e4907aedde26b8a12cab22d04f69982115df7ad39036",
    "mrpc": "459b2343acfa55c212c58bb9ffa8bd3be63130c106b60afe7f8e88e1378bce1c",
    "qnli": "53bddfd89c84d1ac2ba50efcc121fc619c77576a71bcd525d4575cff0977b021",
    "qqp": "82cb427eadc663bfcb5b866371e3077b2f07722ad6175a10b8b97c85c2ef3036",
    "rte": "5ec438df0516a6eceac3f0c92d1ece738309458e03a22e90ed8b5d25f8ba4cd7",
    "sst2": "8c57a5f990b2351120cfc7a435d8fdc91483b08142850a2fc987b395dc1706dd",
    "stsb": "851dc1a705f712a2254e99b488ee60dfa0cd9151acf2a5d05607da5b1d2cad5b",
}
TOKENIZERS = {
    "plain": "1ab148f66409d84dfe8ccfd1803f5f627980054e5e6d8d01f370a83ff72b1aa0",
    "pair": "9d030c2ef4718b4a60e0eb3a4ebd856197d3607451eafbc513a75186ada1fa00",
}
PRETRAINING = {
    "causal": {
        "train": "74e1620f586c27c793062f7705c40cc1da873efe6d3fb609589e5add5b2117b0",
        "validation": "3be3cb8c843de5bddae475fec504497a0b60f1f60fb434fc71c2ef93edca86a9",
        "corpus": "b3754a4a0e3b26cc990e3dfef4f661514da5b5429a53f1ee06c5e633737d5986",
    },
    "masked": {
        "train": "fa5fce976d96f20d453259885f8a8d454a2d4e214b3c5918e2632613bc305c05",
        "validation": "19b8e46abcf496fe5818a40d92511e82c0a787134c2314c20bd13d9880859d29",
        "corpus": "6b381d261485c3ae5f4e5c7b99a70f90737ec8d727c7a4cd773b67399d45b714",
    },
    "denoising": {
        "train": "f2aa473ed1bc53c9e385723c640b76d3a183ad273e3ca7c9ba451463f6f4cc40",
        "validation": "9475d4218e046f0c8a9b7d54db56b3e1f0a302a1853b23fe0490a70af59160ce",
        "corpus": "b3754a4a0e3b26cc990e3dfef4f661514da5b5429a53f1ee06c5e633737d5986",
    },
}


def sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def of_files(folder: Path) -> str:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256(
        part
        for path in paths
        for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes())
    )


def of_values(value: Any) -> Iterable[bytes]:
    """Yield the bytes of examples: named tuples and objects of texts and tensors."""
    if isinstance(value, torch.Tensor):
        yield str(value.dtype).encode() + str(tuple(value.shape)).encode()
        yield value.numpy().tobytes()
    elif isinstance(value, str):
        yield value.encode()
    else:
        for part in value if isinstance(value, (list, tuple)) else vars(value).values():
            yield from of_values(part)


@pytest.mark.parametrize("corpus", [e2e, webnlg, xsum], ids=lambda corpus: corpus.__name__)
def test_the_files_of_a_corpus(corpus, tmp_path):
    corpus.write(tmp_path, seed=0)
    assert of_files(tmp_path) == FILES[corpus.__name__.rpartition(".")[2]]


@pytest.mark.parametrize("task", sorted(glue.LAYOUTS))
def test_the_files_of_a_glue_corpus(task, tmp_path):
    glue.write(tmp_path, task, seed=0)
    assert of_files(tmp_path) == FILES[task]


def test_the_tokenizers():
    texts = list(documents(0, 400))
    made = {
        "plain": train_tokenizer(texts, vocab_size=600),
        "pair": train_pair_tokenizer(texts, vocab_size=600, max_length=64, segments=True),
    }
    assert {name: tokenizer_sha256(tokenizer) for name, tokenizer in made.items()} == TOKENIZERS


@pytest.mark.parametrize("objective", [Causal(), Masked(), Denoising()], ids=lambda o: o.name)
def test_what_the_tiny_models_are_pretrained_on(objective):
    counts = {"num_statements": 60, "num_validation_statements": 5} | {
        "num_sentences": 60, "num_validation_sentences": 5
    }  # fmt: skip
    task = Pretraining(
        objective=objective, corpus_seed=0, num_documents=300, num_validation_documents=20,
        block_size=64, vocab_size=500, tokenizer_documents=200,
        **(counts if objective.uses_verdicts else {}),
    )  # fmt: skip
    task.load()
    tokenizer = task.build_tokenizer()
    found = {
        split: sha256(of_values(task.examples(split, tokenizer)))
        for split in ("train", "validation")
    }
    found["corpus"] = task.provenance()["sha256"]
    assert found == PRETRAINING[objective.name]
