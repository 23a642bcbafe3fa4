"""The E2E task: loading, tokens, padding-free loss, decoding, scoring."""

from __future__ import annotations

import csv
import gzip
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
)

from delta_lora.protocols import Batch
from tasks.data import read_document
from tasks.data_to_text import ONE_REFERENCE, clean, group
from tasks.e2e import E2E, context_of, parse_csv, parse_text
from tasks.generation import BeamSearch
from tasks.language_modeling import TokenSequence, causal_lm_loss, collate, truncate
from tasks.metrics import e2e as scorers
from tasks.sources import Release
from tasks.tiny.bpe import train_tokenizer
from tasks.tiny.corpora import e2e as embedded

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "task" / "e2e.yaml"
SIZES = {"train": 60, "validation": 6, "test": 12}


def make_release(*names: str) -> Release:
    return Release("owner/name", "0" * 40, "http://127.0.0.1:9", dict.fromkeys(names, "0" * 64))


def make_task(**settings: Any) -> E2E:
    values: dict[str, Any] = {
        "source": "embedded",
        "release_lora": make_release("train.txt", "valid.txt", "test.txt"),
        "release_challenge": make_release("trainset.csv", "devset.csv", "testset_w_refs.csv"),
        "embedded_sizes": SIZES if settings.get("source", "embedded") == "embedded" else None,
    }
    return E2E(**{**values, **settings})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    embedded.write(folder, seed=0, sizes=SIZES)
    return folder


@pytest.fixture(scope="module")
def task() -> E2E:
    task = make_task(
        decoding=BeamSearch(num_beams=4, max_new_tokens=24, batch_size=5), max_length=128
    )
    task.load()
    return task


@pytest.fixture(scope="module")
def tokenizer(task: E2E) -> PreTrainedTokenizerFast:
    texts = [f"{i.context} {' '.join(i.references)}\n\n\n\n" for i in task.inputs("train")]
    tokenizer = train_tokenizer(texts, vocab_size=500)
    tokenizer.model_max_length = 160
    return tokenizer


def make_model(attention: str = "sdpa", vocab_size: int = 500, **settings: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    values = {"n_positions": 160, "n_embd": 32, "n_layer": 2, "n_head": 2} | settings
    config = GPT2Config(
        vocab_size=vocab_size,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
        **values,
    )
    return GPT2LMHeadModel(config)


# Loading


@pytest.mark.parametrize("protocol", ["lora", "challenge"])
def test_files_and_the_embedded_corpus_are_read_alike(
    corpus: Path, tmp_path: Path, protocol: str
) -> None:
    task = make_task(protocol=protocol)
    task.load()
    for path in corpus.iterdir():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    for folder in (corpus, tmp_path):
        other = make_task(source="files", data_dir=folder, protocol=protocol)
        other.load()
        for split in SIZES:
            assert other.inputs(split) == task.inputs(split)
            assert len(task.inputs(split)) == SIZES[split]
        files = other.provenance()["files"]
        assert files == task.provenance()["files"]
        assert [f["sha256"] for f in files] == [
            hashlib.sha256((corpus / f["name"]).read_bytes()).hexdigest() for f in files
        ]


def test_the_protocols_are_two_tasks_on_the_same_references() -> None:
    lora, challenge = make_task(), make_task(protocol="challenge")
    for task in (lora, challenge):
        task.load()
    assert (lora.name, challenge.name) == ("e2e", "e2e_challenge")
    assert not {m.label for m in lora.metrics} & {m.label for m in challenge.metrics}
    assert lora.provenance()["protocol"] == "lora"
    assert challenge.provenance()["protocol"] == "challenge"

    def squeeze(text: str) -> str:
        return "".join(text.split())

    differ = 0
    for a, b in zip(lora.inputs("test"), challenge.inputs("test"), strict=True):
        assert (a.id, squeeze(a.context)) == (b.id, squeeze(b.context))
        assert [*map(squeeze, a.references)] == [*map(squeeze, b.references)]
        differ += a.references != b.references
    assert differ == SIZES["test"]


def test_provenance_tells_official_files_from_others(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hashes = {
        name: hashlib.sha256((corpus / name).read_bytes()).hexdigest()
        for name in ("train.txt", "valid.txt", "test.txt")
    }
    official = Release("owner/name", "0" * 40, "http://127.0.0.1:9", hashes)
    task = make_task(source="files", data_dir=corpus, release_lora=official)
    task.load()
    found = task.provenance()
    assert found["revision"] == official.revision
    assert found["inputs"] == SIZES
    assert found["rows"]["test"] == sum(len(i.references) for i in task.inputs("test"))
    assert not caplog.records

    other = Release("owner/name", "0" * 40, "http://127.0.0.1:9", hashes | {"test.txt": "f" * 64})
    task = make_task(source="files", data_dir=corpus, release_lora=other)
    task.load()
    assert task.provenance()["revision"] is None
    assert [f["official"] for f in task.provenance()["files"]] == [True, True, False]
    assert "test.txt is not test.txt of owner/name@" in caplog.text


def test_shared_inputs_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, text in (
        ("train.txt", "a : b||x\nc : d||y\n"),
        ("valid.txt", "e : f||z\n"),
        ("test.txt", "a : b||x\ng : h||x\n"),
    ):
        (tmp_path / name).write_text(text)
    make_task(source="files", data_dir=tmp_path).load()
    assert "1 of 2 inputs of test also occur in train" in caplog.text
    assert "validation also" not in caplog.text


def test_the_hub_without_network_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    with pytest.raises(RuntimeError, match=r"could not download .*task\.source=files"):
        make_task(source="hub", cache_dir=tmp_path).load()


def test_missing_files(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_task(source="files", data_dir=tmp_path / "nowhere").load()
    (tmp_path / "train.txt").write_text("a||b\n")
    with pytest.raises(
        FileNotFoundError, match=r"no valid.txt, test.txt \(plain or .gz\); it holds train.txt;"
    ):
        make_task(source="files", data_dir=tmp_path).load()
    (corpus_csv := tmp_path / "csv").mkdir()
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        (corpus_csv / name).write_bytes((corpus / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"other protocol: task\.protocol=challenge"):
        make_task(source="files", data_dir=corpus_csv).load()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a||b\nname : X | area\n", 2),
        ("a||b\n\nc||d\n", 2),
        ("a||\n", 1),
        ("||b\n", 1),
        ("a||b||c\n", 1),
    ],
)
def test_damaged_text(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"train.txt, line {line}: expected 'context\|\|comp"):
        parse_text(read_document(tmp_path / "train.txt"))


def test_text_rows_drop_the_space_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("name : X||It is fine . \nname : Y||y\r\n", newline="")
    rows = parse_text(read_document(tmp_path / "a.txt"))
    assert [(r.context, r.completion, r.place) for r in rows] == [
        ("name : X", "It is fine .", "a.txt:1"),
        ("name : Y", "y", "a.txt:2"),
    ]


def test_csv_rows_keep_the_raw_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("mr", "ref"),
                ("name[X], customer rating[5 out of 5]", " Two  blanks, £30. "),
                ("name[X, Y], familyFriendly[no]", "first \r\n  second"),
            ]
        )
    rows = parse_csv(read_document(path))
    assert [(r.context, r.completion, r.place) for r in rows] == [
        ("name : X | customer rating : 5 out of 5", "Two  blanks, £30.", "a.csv:2"),
        ("name : X, Y | family friendly : no", "first second", "a.csv:3"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("name[X], colour[red]", "x")], r"a.csv, line 2: 'colour\[red\]' in the meaning repres"),
        ([("name[X", "x")], r"line 2: 'name\[X'"),
        ([("", "x")], "line 2: ''"),
        ([("name[X]", "x"), ("name[X]", " ")], "line 3: the reference is empty"),
        ([], "has a header but no rows"),
    ],
)
def test_damaged_csv_rows(tmp_path: Path, rows: list[tuple[str, str]], message: str) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *rows])
    with pytest.raises(ValueError, match=message):
        parse_csv(read_document(tmp_path / "a.csv"))


def test_all_slots_are_renamed_as_in_the_text_release() -> None:
    mr = (
        "name[A], eatType[pub], food[Thai], priceRange[cheap], customer rating[low], "
        "area[riverside], familyFriendly[yes], near[B]"
    )
    assert context_of(mr, "here") == (
        "name : A | Type : pub | food : Thai | price : cheap | customer rating : low | "
        "area : riverside | family friendly : yes | near : B"
    )


def test_inputs_are_grouped_by_value_in_order_of_first_occurrence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("b||1\na||2\nb||3\n")
    items = group("test", parse_text(read_document(tmp_path / "a.txt")))
    assert [(i.id, i.context, i.references) for i in items] == [
        ("test-0", "b", ("1", "3")),
        ("test-1", "a", ("2",)),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "web"}, "source='web'.* 'hub', 'files', 'embedded'"),
        ({"protocol": "raw"}, "protocol='raw'.* 'lora', 'challenge'"),
        ({"nist": "mteval"}, "nist='mteval'.* 'python', 'perl'"),
        ({"source": "files"}, "source=files with task.data_dir=None"),
        ({"data_dir": "x"}, "source=embedded with task.data_dir=x"),
        ({"max_length": 2}, "max_length=2 .*>= 3"),
        ({"release_lora": make_release("train.txt")}, "lacks .*test.txt"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(**settings)


def test_nothing_works_before_loading() -> None:
    task = make_task()
    for call in (task.provenance, task.inputs):
        with pytest.raises(RuntimeError, match=r"call load\(\) first"):
            call()
    task.load()
    with pytest.raises(ValueError, match="split='dev'; allowed: train, validation, test"):
        task.inputs("dev")


def test_the_config_is_the_recipe() -> None:
    config = OmegaConf.load(CONFIG)
    task = instantiate(config)
    assert isinstance(task, E2E)
    assert (task.source.kind, task.protocol, task.max_length, task.nist) == (
        "hub",
        "lora",
        512,
        "python",
    )
    assert task.decoding == BeamSearch(
        num_beams=10, length_penalty=0.9, no_repeat_ngram_size=4, max_new_tokens=64
    )
    for protocol in ("lora", "challenge"):
        release = instantiate(OmegaConf.merge(config, {"protocol": protocol})).source.release
        assert release.commit in release.url


# Tokens and loss


def test_the_layout_of_an_example(task: E2E, tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token_id
    examples = task.examples("train", tokenizer)
    (_, first), *_ = (line.split("||") for line in _lines("train"))
    context = _lines("train")[0].split("||")[0]
    tokens = list(examples[0].tokens)
    separator = examples[0].num_context - 1
    assert tokens.count(end) == 2
    assert (tokens[separator], tokens[-1]) == (end, end)
    assert tokens[:separator] == tokenizer.encode(context)
    assert tokens[separator + 1 : -1] == tokenizer.encode(" " + first.strip())
    assert examples[0].id == "train.txt:1"
    assert len(examples) == task.provenance()["rows"]["train"]


def _lines(split: str) -> list[str]:
    rows = embedded.splits(seed=0, sizes=SIZES)[split]
    return [f"{context}||{completion}" for context, completion in rows]


def test_a_batch_has_no_padding_and_targets_only_after_the_context() -> None:
    batch = collate([TokenSequence("a", [1, 2, 9, 4, 9], 3), TokenSequence("b", [5, 9, 6], 1)])
    assert {name: tensor.tolist() for name, tensor in batch.tensors.items()} == {
        "input_ids": [[1, 2, 9, 4, 5, 9]],
        "position_ids": [[0, 1, 2, 3, 0, 1]],
        "loss_positions": [2, 3, 4, 5],
        "targets": [4, 9, 9, 6],
    }
    assert (batch.num_targets, batch.num_tokens, batch.example_ids) == (4, 6, ["a", "b"])
    with pytest.raises(ValueError, match="at least one sequence"):
        collate([])


@pytest.mark.parametrize("num_context", [0, 3])
def test_a_sequence_has_input_and_targets(num_context: int) -> None:
    with pytest.raises(ValueError, match="a: "):
        TokenSequence("a", [1, 2, 3], num_context)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_free_equals_one_by_one(
    task: E2E, tokenizer: PreTrainedTokenizerFast, attention: str, smoothing: float
) -> None:
    examples = task.examples("train", tokenizer)[:7]
    examples.append(TokenSequence("short", [3, 4], 1))
    model = make_model(attention, initializer_range=0.2)

    together = causal_lm_loss(model, collate(examples), smoothing)
    together.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = sum(causal_lm_loss(model, collate([example]), smoothing) for example in examples)
    alone.backward()
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)

    # The same from the definition, on logits of the plain forward pass.
    expected = torch.zeros((), dtype=torch.float64)
    for example in examples:
        tokens = torch.tensor([example.tokens])
        log_p = model(input_ids=tokens).logits[0].double().log_softmax(-1)
        for position in range(example.num_context, len(example.tokens)):
            before = log_p[position - 1]
            nll = -before[example.tokens[position]]
            expected += (1 - smoothing) * nll + smoothing * (-before).mean()
    torch.testing.assert_close(together.double(), expected, rtol=1e-5, atol=0)


def test_sequences_of_a_batch_do_not_see_one_another() -> None:
    model = make_model(initializer_range=0.2)
    second = TokenSequence("b", [4, 8, 15, 16], 2)

    def second_loss(first: list[int]) -> torch.Tensor:
        batch = collate([TokenSequence("a", first, 2), second])
        keep = batch.tensors["loss_positions"][-2:], batch.tensors["targets"][-2:]
        tensors = batch.tensors | {"loss_positions": keep[0], "targets": keep[1]}
        return causal_lm_loss(model, Batch(tensors, 2, batch.num_tokens))

    torch.testing.assert_close(second_loss([1, 2, 3, 4]), second_loss([9, 9, 9, 9]))


def test_the_loss_is_float32_for_a_bf16_model() -> None:
    model = make_model().to(torch.bfloat16)
    batch = collate([TokenSequence("a", list(range(20)), 2)])
    assert causal_lm_loss(model, batch).dtype == torch.float32


def test_too_long_sequences_and_unfit_models() -> None:
    model = make_model(n_positions=8)
    fits = [TokenSequence("a", list(range(9)), 1), TokenSequence("b", list(range(9)), 1)]
    assert torch.isfinite(causal_lm_loss(model, collate(fits)))
    with pytest.raises(ValueError, match=r"9 tokens among \['long'\] but the model has 8"):
        causal_lm_loss(model, collate([TokenSequence("long", list(range(10)), 1)]))
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"Linear.forward takes no position_ids and no logits_to_k"):
        causal_lm_loss(linear, collate(fits))
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 20}
    config = RobertaConfig(**sizes, num_attention_heads=1, is_decoder=True)
    with pytest.raises(TypeError, match=r"numbers its positions from behind the padding token's"):
        causal_lm_loss(RobertaForCausalLM(config), collate(fits))
    wrapped = torch.nn.DataParallel(model)  # a wrapper as DDP is one: the model is its .module
    torch.testing.assert_close(
        causal_lm_loss(wrapped, collate(fits)), causal_lm_loss(model, collate(fits))
    )


def test_a_sequence_is_cut_behind_its_context() -> None:
    sequence = TokenSequence("a", [1, 2, 3, 4], 2)
    assert truncate(sequence, 4) == sequence
    assert truncate(sequence, 3) == TokenSequence("a", [1, 2, 3], 2)
    with pytest.raises(ValueError, match="a: its context has 2 tokens, so a length of 2 leaves"):
        truncate(sequence, 2)


def test_max_length_and_the_models_positions_limit_examples(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task(max_length=90)
    task.load()
    longest = max(len(e.tokens) for e in make_loaded().examples("train", tokenizer))
    assert longest > 90
    assert max(len(e.tokens) for e in task.examples("train", tokenizer)) == 90
    assert re.search(r"E2E: \d+ of \d+ sequences of train are longer than 90 tokens", caplog.text)
    tokenizer.model_max_length = 80
    try:
        assert max(len(e.tokens) for e in task.examples("train", tokenizer)) == 80
    finally:
        tokenizer.model_max_length = 160


def make_loaded() -> E2E:
    task = make_task()
    task.load()
    return task


def test_a_tokenizer_without_end_token(task: E2E, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token"):
        task.examples("train", bare)


# Decoding


@pytest.fixture(scope="module")
def trained(task: E2E, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A tiny GPT-2 that has begun to speak, so that few candidates are near ties."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    examples = task.examples("train", tokenizer)
    for step in range(100):
        chosen = [examples[(step * 8 + i) % len(examples)] for i in range(8)]
        batch = task.collate(chosen)
        loss = task.loss(model, batch) / batch.num_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2.0
    return model.eval()


def flatten(chunks: Any) -> dict[str, dict[str, Any]]:
    return {p["id"]: p for chunk in chunks for p in chunk}


#: end of the attribute by which `transformers` 5 obeys for BPE tokenizers.
FORCED = "for_bpe_even_though_it_will_corrupt_output"


def test_predictions_equal_one_by_one(
    task: E2E,
    tokenizer: PreTrainedTokenizerFast,
    trained: GPT2LMHeadModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A checkpoint may ask to join words and punctuation; tokenised text must stay tokenised.
    monkeypatch.setattr(tokenizer, "clean_up_tokenization_spaces", True)
    monkeypatch.setattr(tokenizer, f"clean_up_tokenization_spaces_{FORCED}", True)
    batched = flatten(task.predict(trained, tokenizer, "test"))
    alone = make_task(
        decoding=BeamSearch(num_beams=4, max_new_tokens=24, batch_size=1), max_length=128
    )
    alone.load()
    assert batched == flatten(alone.predict(trained, tokenizer, "test"))
    assert sorted(batched) == [item.id for item in task.inputs("test")]
    assert len({p["prediction"] for p in batched.values()}) > 6
    for item in task.inputs("test"):
        prediction = batched[item.id]
        assert set(prediction) == {"id", "input", "prediction"}
        assert prediction["input"] == item.context
        assert tokenizer.eos_token not in prediction["prediction"]
        assert prediction["prediction"] == prediction["prediction"].strip()
    assert any(" ." in p["prediction"] for p in batched.values())


def test_decoding_resumes_without_another_composition(
    task: E2E,
    tokenizer: PreTrainedTokenizerFast,
    trained: GPT2LMHeadModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    original = BeamSearch.generate

    def generate(self: BeamSearch, model: Any, prompts: Any, ends: Any) -> Any:
        calls.append(len(prompts))
        return original(self, model, prompts, ends)

    monkeypatch.setattr(BeamSearch, "generate", generate)
    chunks = list(task.predict(trained, tokenizer, "test"))
    assert calls == [len(chunk) for chunk in chunks] == [5, 5, 2]
    assert list(task.predict(trained, tokenizer, "test", done=chunks[0])) == chunks[1:]
    torn = chunks[0] + chunks[1][:2]
    assert list(task.predict(trained, tokenizer, "test", done=torn)) == [chunks[1][2:], chunks[2]]
    assert calls == [5, 5, 2, 5, 2, 5, 2]  # a torn chunk is decoded whole
    assert not list(task.predict(trained, tokenizer, "test", done=flatten(chunks).values()))


def test_a_blank_line_ends_a_text(
    task: E2E,
    tokenizer: PreTrainedTokenizerFast,
    trained: GPT2LMHeadModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[int]] = []

    def generate(self: BeamSearch, model: Any, prompts: Any, ends: list[int]) -> Any:
        seen.append(ends)
        return [tokenizer.encode(" one .\n\n two") for _ in prompts]

    monkeypatch.setattr(BeamSearch, "generate", generate)
    predictions = flatten(task.predict(trained, tokenizer, "validation"))
    blank_line = tokenizer.encode("\n\n")
    assert len(blank_line) == 1
    assert seen[0] == [tokenizer.eos_token_id, *blank_line]
    assert {p["prediction"] for p in predictions.values()} == {"one ."}

    plain = train_tokenizer(["no blank lines here"], vocab_size=300)
    plain.model_max_length = 1000
    long_task = make_task(max_length=1000)
    long_task.load()
    next(long_task.predict(trained, plain, "validation"))
    assert seen[-1] == [plain.eos_token_id]


def test_long_prompts_keep_their_end(
    tokenizer: PreTrainedTokenizerFast,
    trained: GPT2LMHeadModel,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[list[int]] = []

    def generate(self: BeamSearch, model: Any, prompts: Any, ends: Any) -> Any:
        seen.extend(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(BeamSearch, "generate", generate)
    task = make_task(max_length=34, decoding=BeamSearch(max_new_tokens=24))
    task.load()
    list(task.predict(trained, tokenizer, "test"))
    assert "prompts are longer than 10 tokens and lose their beginning" in caplog.text
    assert max(map(len, seen)) == 10
    assert {prompt[-1] for prompt in seen} == {tokenizer.eos_token_id}
    task = make_task(max_length=24, decoding=BeamSearch(max_new_tokens=24))
    task.load()
    with pytest.raises(ValueError, match="max_new_tokens=24 leaves no room for a prompt within 24"):
        list(task.predict(trained, tokenizer, "test"))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" It is . ", "It is ."),
        (" It is .<|endoftext|> And", "It is ."),
        (" It is .\n\nAnd<|endoftext|>", "It is ."),
        (" one\ntwo ", "one\ntwo"),
        ("<|endoftext|>x", ""),
    ],
)
def test_post_processing(text: str, cleaned: str) -> None:
    assert clean(text, "<|endoftext|>") == cleaned


# Scoring


def as_predictions(task: E2E, texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"id": item.id, "input": item.context, "prediction": text}
        for item, text in zip(task.inputs("test"), texts, strict=True)
    ]


def without_meteor(**settings: Any) -> E2E:
    """A task that scores all but METEOR, which has to start Java (see the tests of the scorers)."""
    task = make_task(**settings)
    task.load()
    task.metrics = tuple(spec for spec in task.metrics if spec.name != "meteor")
    return task


@pytest.mark.parametrize("settings", [{}, {"nist": "perl"}, {"protocol": "challenge"}])
def test_the_scorer_knows_every_metric_of_the_table(settings: dict[str, str]) -> None:
    names = [spec.name for spec in make_task(**settings).metrics]
    nist = "nist_perl" if settings.get("nist") == "perl" else "nist"
    assert names == ["bleu", nist, "meteor", "rouge_l", "cider"]
    assert set(names) <= {*scorers.METRICS, *scorers.OPTIONAL_METRICS}


def test_scores() -> None:
    task = without_meteor()
    items = task.inputs("test")
    perfect = task.score(as_predictions(task, [item.references[-1] for item in items]))
    assert set(perfect.values) == {"bleu", "nist", "rouge_l", "cider"}
    assert perfect.values["bleu"] == pytest.approx(1.0)
    shuffled = as_predictions(task, [item.references[-1] for item in (*items[1:], items[0])])
    worse = task.score(shuffled[::-1])  # the order of predictions does not matter
    assert worse.values == task.score(shuffled).values
    assert all(worse.values[name] < perfect.values[name] for name in perfect.values)


def test_the_perl_nist_has_its_own_name() -> None:
    task = without_meteor(nist="perl")
    scores = task.score(as_predictions(task, [i.references[0] for i in task.inputs("test")]))
    assert "nist_perl" in scores.values
    assert "nist" not in scores.values


def test_reference_scores_leave_the_first_reference_out(monkeypatch: pytest.MonkeyPatch) -> None:
    task = without_meteor()
    scores = task.reference_scores("test")[ONE_REFERENCE]
    assert 0.1 < scores.values["bleu"] < 1.0

    calls = []
    monkeypatch.setattr("tasks.e2e.metrics.score", lambda *args, **_: calls.append(args))
    task.reference_scores("test")
    texts, references = calls[0]
    for item, text, others in zip(task.inputs("test"), texts, references, strict=True):
        assert (text, *others) == item.references


def test_predictions_must_belong_to_the_inputs(task: E2E) -> None:
    good = as_predictions(task, ["x"] * SIZES["test"])
    for predictions, message in (
        (good[:-2], "no prediction for 2 of 12 inputs of test: test-10, test-11"),
        ([*good, good[0]], "more than one prediction for 1 of 12 inputs of test: test-00"),
        ([*good, {"id": "test-99", "prediction": ""}], "unknown inputs 1 of 12 .* test-99"),
        ([{**good[0], "input": "name : Z"}, *good[1:]], "test-00 is for the input 'name : Z'"),
    ):
        with pytest.raises(ValueError, match=message):
            task.score(predictions)


def test_reference_scores_need_two_references(tmp_path: Path) -> None:
    for name in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / name).write_text(f"name : {name}||x\n")
    task = make_task(source="files", data_dir=tmp_path)
    task.load()
    found = task.reference_scores("test")[ONE_REFERENCE]
    assert not found.values
    assert found.missing == {m.name: "no input of test has two references" for m in task.metrics}


# Real data


@pytest.mark.skipif(
    "DELTA_LORA_DATA" not in os.environ,
    reason="set DELTA_LORA_DATA to a folder with e2e/lora and e2e/raw to check the real files",
)
@pytest.mark.parametrize(("protocol", "folder"), [("lora", "lora"), ("challenge", "raw")])
def test_the_real_release(protocol: str, folder: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    data_dir = Path(os.environ["DELTA_LORA_DATA"]) / "e2e" / folder
    config = OmegaConf.merge(
        OmegaConf.load(CONFIG),
        {"source": "files", "data_dir": str(data_dir), "protocol": protocol},
    )
    task = instantiate(config)
    task.load()
    found = task.provenance()
    assert found["rows"] == {"train": 42_061, "validation": 4_672, "test": 4_693}
    assert found["inputs"] == {"train": 4_862, "validation": 547, "test": 630}
    assert all(file["official"] for file in found["files"])
    assert not caplog.records
