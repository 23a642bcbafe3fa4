"""Beam searches against plain ones written here, and batches against single prompts."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from tasks.generation import BeamSearch, RepeatedNGramBlock, Seq2SeqBeamSearch

VOCABULARY = 20
ENDS = [18, 19]


def make_model(seed: int) -> GPT2LMHeadModel:
    """A random GPT-2 whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def make_prompts(seed: int, count: int = 6) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 18, (int(length),), generator=draw).tolist()
        for length in torch.randint(1, 9, (count,), generator=draw)
    ]


@torch.no_grad()
def plain_search(
    model: GPT2LMHeadModel, prompt: list[int], search: BeamSearch
) -> tuple[list[int], float]:
    """Beam search as the module's text describes it, one hypothesis at a time, without a cache.

    Returns:
        The best text without its end token, and its lead over the second best.
    """
    size = search.no_repeat_ngram_size
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    results: list[tuple[float, list[int]]] = []
    for step in range(search.max_new_tokens):
        candidates = []
        all_logits = model(torch.tensor([prompt + text for _, text in beams])).logits[:, -1]
        for (score, text), logits in zip(beams, all_logits.double(), strict=True):
            for start in range(len(text) - size + 1 if size else 0):
                if text[start : start + size - 1] == text[len(text) - size + 1 :]:
                    logits[text[start + size - 1]] = -math.inf
            for token, value in enumerate(logits.log_softmax(-1).tolist()):
                candidates.append((score + value, [*text, token]))
        candidates.sort(reverse=True)
        kept = candidates[: search.num_beams]
        is_last = step == search.max_new_tokens - 1
        for score, text in kept:
            if text[-1] in ENDS or is_last:
                results.append((score / len(text) ** search.length_penalty, text))
        beams = [c for c in candidates if c[1][-1] not in ENDS][: search.num_beams]
    results.sort(reverse=True)
    best = results[0][1]
    lead = results[0][0] - results[1][0] if len(results) > 1 else math.inf
    return (best[:-1] if best[-1] in ENDS else best), lead


@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "ngram"), [(4, 0.9, 2), (3, 0.6, 3), (5, 0.0, 0), (1, 0.8, 2)]
)
def test_generate_equals_a_plain_search(num_beams: int, length_penalty: float, ngram: int) -> None:
    search = BeamSearch(
        num_beams=num_beams,
        length_penalty=length_penalty,
        no_repeat_ngram_size=ngram,
        max_new_tokens=9,
        batch_size=1,
    )
    lengths = set()
    for seed in range(4):
        model = make_model(seed)
        for prompt in make_prompts(seed):
            expected, lead = plain_search(model, prompt, search)
            assert lead > 1e-5, "a near tie decides nothing; take another seed"
            assert search.generate(model, [prompt], ENDS) == [expected]
            lengths.add(len(expected))
    assert len(lengths) > 2 or num_beams == 1  # some end early, some late, some not at all


def test_a_batch_with_padding_equals_one_by_one() -> None:
    search = BeamSearch(num_beams=4, no_repeat_ngram_size=2, max_new_tokens=10)
    for seed in range(4):
        model, prompts = make_model(seed), make_prompts(seed, 8)
        assert len({len(prompt) for prompt in prompts}) > 2
        batched = search.generate(model, prompts, ENDS)
        assert batched == [search.generate(model, [prompt], ENDS)[0] for prompt in prompts]


def test_the_block_looks_at_generated_tokens_only_and_renormalises() -> None:
    prompt, generated = [1, 2, 3, 4, 5, 6], [5, 6, 7, 5]
    input_ids = torch.tensor([prompt + generated, [*prompt, 9, 9, 1, 2]])
    scores = torch.randn(2, 12).log_softmax(-1)
    blocked = RepeatedNGramBlock(2, len(prompt))(input_ids, scores)

    assert torch.isneginf(blocked).nonzero().tolist() == [[0, 6]]  # only "5 6" was generated
    torch.testing.assert_close(blocked.exp().sum(-1), torch.ones(2))
    logits = scores[0].clone()
    logits[6] = -torch.inf
    torch.testing.assert_close(blocked[0], logits.log_softmax(-1))
    # What makes the class necessary: the block of transformers also counts the prompt ("2 3").
    theirs = NoRepeatNGramLogitsProcessor(2)(input_ids, scores)
    assert torch.isneginf(theirs).nonzero().tolist() == [[0, 6], [1, 3]]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_block_equals_a_plain_count(size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    for length in range(12):
        ids = torch.randint(0, 3, (8, 2 + length), generator=draw)
        blocked = RepeatedNGramBlock(size, 2)(ids, torch.zeros(8, 3))
        for row, banned in zip(ids[:, 2:].tolist(), torch.isneginf(blocked).tolist(), strict=True):
            seen = {tuple(row[i : i + size]) for i in range(length - size + 1)}
            tail = row[length - size + 1 :] if size > 1 else []
            expected = [(*tail, token) in seen for token in range(3)]
            if all(expected):  # nothing is left to renormalise
                continue
            assert banned == expected


def test_the_generation_settings_of_a_checkpoint_do_not_count() -> None:
    search = BeamSearch(num_beams=3, no_repeat_ngram_size=0, max_new_tokens=8)
    model, prompts = make_model(1), make_prompts(1)
    expected = search.generate(model, prompts, ENDS)
    foreign = GenerationConfig(
        repetition_penalty=9.0, do_sample=True, temperature=5.0, no_repeat_ngram_size=1
    )
    model.generation_config = foreign
    assert search.generate(model, prompts, ENDS) == expected
    assert model.generation_config is foreign


def test_chunks_hold_every_prompt_once_with_neighbours_in_length() -> None:
    lengths = [3, 9, 3, 5, 9, 1, 4]
    chunks = BeamSearch(batch_size=3).chunks(lengths)
    assert chunks == [[1, 4, 3], [6, 0, 2], [5]]
    assert sorted(itertools.chain(*chunks)) == list(range(7))
    assert BeamSearch().chunks([]) == []


def test_unusable_models_and_prompts() -> None:
    search = BeamSearch(max_new_tokens=30)
    model = make_model(0)
    with pytest.raises(ValueError, match=r"11 tokens and .*max_new_tokens=30 need 41 positions"):
        search.generate(model, [[1] * 11], ENDS)
    assert len(search.generate(model, [[1] * 10], ENDS)) == 1
    with pytest.raises(ValueError, match="a prompt is empty"):
        search.generate(model, [[1], []], ENDS)
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        search.generate(model.train(), [[1]], ENDS)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 0},
        {"num_beams": 2.5},
        {"max_new_tokens": 0},
        {"batch_size": True},
        {"no_repeat_ngram_size": -1},
        {"early_stopping": "always"},
        {"early_stopping": 1},
        {"length_penalty": "abc"},
        {"length_penalty": 1e30},
        {"length_penalty": float("nan")},
        {"num_beams": 100_000},
    ],
)
def test_settings_are_checked(setting: dict[str, object]) -> None:
    message = rf"decoding\.{next(iter(setting))}=.*(allowed|integer|choose|number|bool)"
    with pytest.raises((ValueError, TypeError), match=message):
        BeamSearch(**setting)  # type: ignore[arg-type]


# Encoder-decoders

START, BOS, EOS = 2, 0, 2


def make_bart(seed: int) -> BartForConditionalGeneration:
    """A random BART whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=24,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        init_std=0.5,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config).eval()


def make_sources(seed: int, count: int = 6) -> list[torch.Tensor]:
    return [torch.tensor(prompt, dtype=torch.int32) for prompt in make_prompts(seed, count)]


@torch.no_grad()
def plain_seq2seq_search(
    model: BartForConditionalGeneration, source: torch.Tensor, search: Seq2SeqBeamSearch
) -> tuple[list[int], float]:
    """Beam search with an encoder-decoder, one source, without a cache, all steps.

    Returns:
        The best text without start and end token, and its lead over the second best.
    """
    assert search.no_repeat_ngram_size is not None
    assert search.length_penalty is not None
    size = search.no_repeat_ngram_size
    beams: list[tuple[float, list[int]]] = [(0.0, [START])]
    results: list[tuple[float, list[int]]] = []
    for length in range(2, search.max_length + 1):
        candidates = []
        all_logits = model(
            input_ids=source.long().expand(len(beams), -1),
            decoder_input_ids=torch.tensor([text for _, text in beams]),
        ).logits[:, -1]
        for (score, text), log_p in zip(beams, all_logits.double().log_softmax(-1), strict=True):
            for start in range(len(text) - size + 1 if size else 0):
                if text[start : start + size - 1] == text[len(text) - size + 1 :]:
                    log_p[text[start + size - 1]] = -math.inf
            forced = BOS if search.forced_bos and length == 2 else None
            forced = EOS if search.forced_eos and length == search.max_length else forced
            for token, value in enumerate(log_p.tolist()):
                if forced is not None:
                    value = 0.0 if token == forced else -math.inf
                candidates.append((score + value, [*text, token]))
        candidates.sort(reverse=True)
        for score, text in candidates[: search.num_beams]:
            if text[-1] == EOS or length == search.max_length:
                results.append((score / (length - 1) ** search.length_penalty, text))
        if search.num_beams == 1 and candidates[0][1][-1] == EOS:
            break  # greedy search
        beams = [c for c in candidates if c[1][-1] != EOS][: search.num_beams]
    results = sorted((r for r in results if r[0] > -math.inf), reverse=True)
    lead = results[0][0] - results[1][0] if len(results) > 1 else math.inf
    return [token for token in results[0][1][1:] if token != EOS], lead


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4, "length_penalty": 1.0, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 0, "forced_bos": True},
        {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 3, "forced_eos": True},
        {"num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 2},
    ],
)
def test_seq2seq_equals_a_plain_search(settings: dict[str, float]) -> None:
    search = Seq2SeqBeamSearch(**{"max_length": 8, "early_stopping": "never", **settings})  # type: ignore[arg-type]
    lengths = set()
    for seed in range(3):
        model = make_bart(seed)
        for source in make_sources(seed, 4):
            expected, lead = plain_seq2seq_search(model, source, search)
            assert lead > 1e-5, "a near tie decides nothing; take another seed"
            assert search.generate(model, [source]) == [expected]
            lengths.add(len(expected))
    assert len(lengths) > 1


def test_a_padded_batch_of_sources_equals_one_by_one() -> None:
    search = Seq2SeqBeamSearch(num_beams=3, max_length=9, no_repeat_ngram_size=2)
    different = set()
    for seed in range(3):
        model, sources = make_bart(seed), make_sources(seed, 8)
        assert len({len(source) for source in sources}) > 2
        batched = search.generate(model, sources)
        assert batched == [search.generate(model, [source])[0] for source in sources]
        different |= set(map(tuple, batched))
    assert len(different) > 6  # the sources matter


def test_what_the_recipe_leaves_open_comes_from_the_checkpoint_and_is_recorded(
    tmp_path: Path,
) -> None:
    model = make_bart(0)
    model.save_pretrained(tmp_path)
    # As in an old checkpoint: settings of generation stand in config.json, and nowhere else.
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "no_repeat_ngram_size": 3, "early_stopping": True, "num_beams": 4, "min_length": 3,
        "max_length": 20, "forced_bos_token_id": 0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = BartForConditionalGeneration.from_pretrained(tmp_path).eval()

    settings, record = Seq2SeqBeamSearch().settings(model)
    told = {name: (entry["value"], entry["origin"]) for name, entry in record.items()}
    assert told == {
        "num_beams": (8, "recipe"),
        "max_length": (64, "recipe"),
        "do_sample": (False, "recipe"),
        "no_repeat_ngram_size": (3, "checkpoint"),
        "early_stopping": (True, "checkpoint"),
        "min_length": (3, "checkpoint"),
        "forced_bos_token_id": (0, "checkpoint"),
        "bos_token_id": (0, "checkpoint"),
        "eos_token_id": (2, "checkpoint"),
        "pad_token_id": (1, "checkpoint"),
        "decoder_start_token_id": (2, "checkpoint"),
        "length_penalty": (1.0, "default"),
        "repetition_penalty": (1.0, "default"),
        "forced_eos_token_id": (None, "default"),
    }
    assert json.dumps(record)
    assert all(getattr(settings, name) == value for name, (value, _) in told.items())

    explicit = Seq2SeqBeamSearch(
        length_penalty=0.8, no_repeat_ngram_size=0, early_stopping=False, forced_bos=False,
        forced_eos=True,
    )  # fmt: skip
    settings, record = explicit.settings(model)
    for name, value in (
        ("length_penalty", 0.8),
        ("no_repeat_ngram_size", 0),
        ("early_stopping", False),
        ("forced_bos_token_id", None),
        ("forced_eos_token_id", 2),
    ):
        assert record[name] == {"value": value, "origin": "recipe"}
        assert getattr(settings, name) == value
    # And the search obeys: n-grams of three repeat without the block, not with the checkpoint's.
    stored = model.generation_config
    source = make_sources(0, 1)
    short = Seq2SeqBeamSearch(num_beams=2, max_length=20)
    text = short.generate(model, source)[0]
    assert text[0] == BOS
    windows = list(zip(text, text[1:], text[2:], strict=False))
    assert len(windows) == len(set(windows))
    free = Seq2SeqBeamSearch(num_beams=2, max_length=20, no_repeat_ngram_size=0, forced_bos=False)
    other = free.generate(model, source)[0]
    assert other != text
    assert model.generation_config is stored


def test_unfit_encoder_decoders_and_sources() -> None:
    model = make_bart(0)
    search = Seq2SeqBeamSearch(num_beams=2, max_length=6)
    with pytest.raises(ValueError, match=r"source of 25 tokens.* 24 positions"):
        search.generate(model, [torch.ones(25, dtype=torch.int32)])
    with pytest.raises(ValueError, match=r"decoding\.max_length=64.* 24 positions"):
        Seq2SeqBeamSearch().generate(model, [torch.ones(1, dtype=torch.int32)])
    with pytest.raises(ValueError, match="a source is empty"):
        search.generate(model, [torch.ones(0, dtype=torch.int32)])
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        search.generate(model.train(), [torch.ones(1, dtype=torch.int32)])
    model = make_bart(0)
    for holder in (model.generation_config, model.config):
        holder.decoder_start_token_id = holder.bos_token_id = None
    with pytest.raises(ValueError, match="no decoder_start_token_id, bos_token_id, which decod"):
        Seq2SeqBeamSearch(forced_bos=True).settings(model)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 0},
        {"max_length": 1},
        {"batch_size": 2.0},
        {"no_repeat_ngram_size": -1},
        {"early_stopping": "soon"},
        {"length_penalty": 1e30},
        {"forced_eos": "no"},
    ],
)
def test_seq2seq_settings_are_checked(setting: dict[str, object]) -> None:
    message = rf"decoding\.{next(iter(setting))}=.*(allowed|integer|choose|number|bool)"
    with pytest.raises((ValueError, TypeError), match=message):
        Seq2SeqBeamSearch(**setting)  # type: ignore[arg-type]
