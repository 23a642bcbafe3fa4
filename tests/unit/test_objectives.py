"""Masked and denoising pre-training: examples, losses, initial weights, and that models learn."""

from __future__ import annotations

import random
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import BartConfig, BartForConditionalGeneration, RobertaConfig, RobertaForMaskedLM

from delta_lora.models import load_tokenizer
from tasks.tiny import mimetic
from tasks.tiny.corpora.general import Statement, statements
from tasks.tiny.corpora.sentences import MOODS, Sentence, damage, sentences
from tasks.tiny.objectives import Causal, Denoising, Masked
from tasks.tiny.objectives.base import IGNORED
from tasks.tiny.objectives.masked import _read
from tasks.tiny.pretraining import Pretraining

SETTINGS = {
    "corpus_seed": 1,
    "num_documents": 400,
    "num_validation_documents": 40,
    "block_size": 96,
    "vocab_size": 512,
    "tokenizer_documents": 300,
}


def build_task(objective, **more) -> Pretraining:
    task = Pretraining(**{**SETTINGS, "objective": objective, **more})
    task.load()
    return task


@pytest.fixture(scope="module")
def masked():
    return build_task(
        Masked(mask_rate=0.15, pair_mask_rate=0.4),
        num_statements=200,
        num_validation_statements=20,
        num_sentences=200,
        num_validation_sentences=20,
    )


@pytest.fixture(scope="module")
def masked_tokenizer(masked):
    return masked.build_tokenizer()


@pytest.fixture(scope="module")
def masked_blocks(masked, masked_tokenizer):
    return masked.examples("train", masked_tokenizer)


@pytest.fixture(scope="module")
def denoising():
    return build_task(Denoising(max_length=200))


@pytest.fixture(scope="module")
def denoising_tokenizer(denoising):
    return denoising.build_tokenizer()


@pytest.fixture(scope="module")
def pairs(denoising, denoising_tokenizer):
    return denoising.examples("train", denoising_tokenizer)


def build_roberta(attention: str = "sdpa", **changes) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 98, "type_vocab_size": 2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.06,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    config = RobertaConfig(**{**values, **changes})
    config._attn_implementation = attention
    return RobertaForMaskedLM(config)


def build_bart(**changes) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    values = {
        "vocab_size": 512, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "max_position_embeddings": 200, "dropout": 0.0, "init_std": 0.06,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }  # fmt: skip
    return BartForConditionalGeneration(BartConfig(**{**values, **changes}))


def parts(blocks):
    """Yield (ids, labels, texts) of every sequence."""
    for ids, _, segments, labels, texts in blocks:
        for segment in range(1, int(segments.max()) + 1):
            inside = segments == segment
            yield ids[inside], labels[inside], texts[inside]


def is_judged(labels) -> bool:
    return bool(labels[0] != IGNORED)


# ---------------------------------------------------------------------- masked


def test_only_words_are_masked(masked_blocks, masked_tokenizer):
    special = {masked_tokenizer.bos_token_id, masked_tokenizer.eos_token_id}
    for ids, labels, texts in parts(masked_blocks):
        if is_judged(labels):
            continue
        hidden = labels != IGNORED
        assert not special & set(labels[hidden].tolist())
        assert not special & set(ids[hidden].tolist())
        assert len(set(texts[hidden].tolist())) <= 1, "both texts of a pair are masked"


def test_mask_rates(masked_tokenizer):
    task = build_task(Masked(mask_rate=0.15, pair_mask_rate=0.4), num_documents=700)
    counts = dict.fromkeys(("single", "single hidden", "pair", "pair hidden"), 0)
    fates = {"mask": 0, "same": 0, "other": 0}
    for ids, labels, texts in parts(task.examples("train", masked_tokenizer)):
        hidden = labels != IGNORED
        kind = "pair" if texts.any() else "single"
        counts[kind] += len(ids) - (4 if kind == "pair" else 2)
        counts[f"{kind} hidden"] += int(hidden.sum())
        for shown, label in zip(ids[hidden].tolist(), labels[hidden].tolist(), strict=True):
            is_mask = shown == masked_tokenizer.mask_token_id
            fates["mask" if is_mask else "same" if shown == label else "other"] += 1
    assert counts["single hidden"] / counts["single"] == pytest.approx(0.15, rel=0.15)
    # One text of the two.
    assert counts["pair hidden"] / counts["pair"] == pytest.approx(0.4 / 2, rel=0.1)
    shares = [count / sum(fates.values()) for count in fates.values()]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_masks_are_a_function_of_the_corpus_and_the_split(masked, masked_tokenizer):
    torch.manual_seed(3)
    first = masked.examples("train", masked_tokenizer)
    torch.manual_seed(4)
    second = masked.examples("train", masked_tokenizer)
    assert all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_verdicts_of_statements(masked_tokenizer):
    groups = list(statements(5, 60))
    agrees, differs = masked_tokenizer.bos_token_id, masked_tokenizer.unk_token_id
    for statement in groups:
        blocks = Masked().encode([statement], masked_tokenizer, block_size=400, seed="0")
        ids, labels, texts = next(parts(blocks))
        second = texts.bool() & (ids != masked_tokenizer.eos_token_id)
        assert (labels[1:][~second[1:]] == IGNORED).all()
        assert labels[0] == (agrees if statement.changed is None else differs)
        wrong = ids[second & (labels == differs)]
        right = ids[second & (labels == agrees)]
        assert len(wrong) + len(right) == second.sum()
        if statement.changed is None:
            assert not len(wrong)
        else:
            found = masked_tokenizer.decode(wrong)
            # A token may reach over the ends of the value ("£15-25." or an opening letter).
            assert statement.changed.split()[0] in found
            assert len(right)


def test_damage_is_what_it_says_and_where_it_says():
    words = ["the", "baker", "of", "the", "old", "town", "sells", "hats", "to", "every", "painter"]
    kinds = set()
    for seed in range(80):
        found, wrong = damage(words, random.Random(seed))
        if len(wrong) == 2:
            first, second = sorted(wrong)
            found[first], found[second] = found[second], found[first]
            assert (second, found) == (first + 1, words)
            kinds.add("order")
            continue
        (at,) = wrong
        if len(found) == len(words):
            kinds.add("ending")
            assert {found[at] + "s", found[at]} & {words[at], words[at] + "s"}
            assert found[at] != words[at]
            found[at] = words[at]
        elif len(found) > len(words):
            kinds.add("doubled")
            assert found.pop(at) in words
        else:
            kinds.add("missing")
            found.insert(at, words[at])
        assert found == words
    assert kinds == {"order", "missing", "doubled", "ending"}
    assert damage(["Two", "words"], random.Random(0)) == (["Two", "words"], frozenset())


def test_verdicts_of_single_sentences(masked_tokenizer):
    right, wrong = masked_tokenizer.bos_token_id, masked_tokenizer.unk_token_id
    text = "the baker of the old town sells hats to every painter"
    seen = set()
    for seed in range(60):
        rng = random.Random(seed)
        tokens = _read(Sentence(text), masked_tokenizer, 96, rng)
        shown = masked_tokenizer.decode([t.id for t in tokens], skip_special_tokens=True)
        inside = tokens[1:-1]
        assert {t.label for t in inside} <= {right, wrong}
        assert tokens[-1].label == IGNORED
        assert tokens[0].label == (right if shown.split() == text.split() else wrong)
        seen.add(tokens[0].label)
        rng = random.Random(seed)
        expected: list[str] = []
        if rng.random() < 0.5:
            words, places = damage(text.split(), rng)
            expected = [words[at] for at in sorted(places)]
        assert (
            masked_tokenizer.decode([t.id for t in inside if t.label == wrong]).split() == expected
        )
    assert seen == {right, wrong}


def test_every_token_of_an_opinion_names_its_mood(masked_tokenizer):
    labels = set()
    for mood in MOODS:
        tokens = _read(
            Sentence("the food was fair .", mood), masked_tokenizer, 96, random.Random(1)
        )
        shown = masked_tokenizer.decode([t.id for t in tokens[1:-1]])
        assert shown.split() == ["the", "food", "was", "fair", "."]
        (label,) = {t.label for t in tokens}
        assert mood.startswith(masked_tokenizer.decode([label]).strip())
        labels.add(label)
    assert len(labels) == 2


def test_sentences_have_all_kinds_and_opinions_one_mind():
    found = [*sentences(3, 400)]
    assert found[:100] == [*sentences(3, 100)]
    assert found != [*sentences(4, 400)]
    assert {sentence.mood for sentence in found} == {None, *MOODS}
    for text, mood in found:
        assert text.strip()
        assert mood is None or not {"but", "although"} & set(text.split())
    with pytest.raises(ValueError, match="num_sentences=-1: 0 or more"):
        next(sentences(3, -1))


def test_sequences_of_a_block_do_not_see_each_other(masked, masked_blocks):
    for attention in ("sdpa", "eager"):
        model = build_roberta(attention).eval()
        blocks = [block for block in masked_blocks if block.segments.max() > 1][:4]
        expected = torch.zeros(())
        num_targets = 0
        for ids, labels, texts in parts(blocks):
            hidden = labels != IGNORED
            logits = model(input_ids=ids[None], token_type_ids=texts[None]).logits[0]
            expected = expected + F.cross_entropy(logits[hidden], labels[hidden], reduction="sum")
            num_targets += int(hidden.sum())
        batch = masked.collate(blocks)
        assert batch.num_targets == num_targets
        torch.testing.assert_close(masked.loss(model, batch), expected, rtol=1e-5, atol=1e-3)


def test_no_hook_stays_behind(masked, masked_blocks):
    model = build_roberta()
    masked.loss(model, masked.collate(masked_blocks[:2]))
    ids = masked_blocks[0].input_ids[None]
    assert model(input_ids=ids).logits.shape == (1, 96, 512)
    with pytest.raises(RuntimeError):
        masked.loss(model, masked.collate(masked_blocks[:2]).to("meta"))
    assert not model.lm_head._forward_pre_hooks


def test_an_encoder_learns(masked, masked_blocks):
    model = build_roberta()
    masked.initialise(model, masked_blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = masked.collate(masked_blocks[:8])
    losses = []
    for _ in range(20):
        loss = masked.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_masked_tokenizer_round_trip(masked_tokenizer, tmp_path):
    RobertaConfig().save_pretrained(tmp_path)
    masked_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.model_max_length == 96
    assert loaded.convert_ids_to_tokens(range(5)) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    names = ("bos", "pad", "eos", "unk", "mask", "cls", "sep")
    ids = [getattr(loaded, f"{name}_token_id") for name in names]
    assert ids == [0, 1, 2, 3, 4, 0, 2]
    pair = loaded("Ada lives here.", "Does Ada?")
    assert pair == masked_tokenizer("Ada lives here.", "Does Ada?")
    text = "<s> Ada lives here.</s></s> Does Ada?</s>"
    assert loaded.decode(pair["input_ids"]) == text
    start = pair["input_ids"].index(2) + 1
    assert pair["token_type_ids"] == [0] * start + [1] * (len(pair["input_ids"]) - start)
    # The same word is the same token wherever it stands.
    first, inside = (loaded(text, add_special_tokens=False)["input_ids"] for text in ("x", "a x"))
    assert first == inside[-len(first) :]


# ---------------------------------------------------------------------- denoising


def test_the_target_is_the_text(denoising, denoising_tokenizer, pairs):
    texts = {"\n".join(group) + "\n" for group in denoising._groups("train")}
    begin, end = denoising_tokenizer.bos_token_id, denoising_tokenizer.eos_token_id
    found = "".join(denoising_tokenizer.decode(pair.target[1:-1]) for pair in pairs)
    short = {text for text in texts if len(denoising_tokenizer(text)["input_ids"]) < 90}
    assert len(short) > 100
    assert all(text in found for text in short)
    for pair in pairs:
        assert (pair.target[0], pair.target[-1]) == (begin, end)
        assert (pair.source[0], pair.source[-1]) == (begin, end)
        assert max(len(pair.source), len(pair.target)) <= 96


def test_the_source_is_the_damaged_text(denoising_tokenizer, pairs):
    mask = denoising_tokenizer.mask_token_id
    num_tokens = num_kept = num_masks = 0
    for pair in pairs:
        kept = pair.source[pair.source != mask].tolist()
        target = pair.target.tolist()
        assert all(kept.count(token) <= target.count(token) for token in set(kept))
        num_tokens += len(target) - 2
        num_kept += len(kept) - 2
        num_masks += len(pair.source) - len(kept)
    share = 1 - num_kept / num_tokens
    assert share == pytest.approx(0.3, abs=0.03)
    assert share * num_tokens / num_masks == pytest.approx(3.0, rel=0.1)


def test_sentences_are_permuted_within_their_document(denoising_tokenizer):
    text = "One. Two is. Three?\nFour. Five"
    kinds = set()
    for number in range(40):
        objective = Denoising(mask_rate=1e-9)
        pair = objective.encode(
            [[text], ["Zed."]], denoising_tokenizer, block_size=96, seed=str(number)
        )[0]
        shown = denoising_tokenizer.decode(pair.source[1:-1])
        head, _, _ = shown.partition("Zed.")
        sentences = re.findall(r"One\.| Two is\.| Three\?|\nFour\.| Five", head)
        assert sorted(sentences) == ["\nFour.", " Five", " Three?", " Two is.", "One."]
        assert "Zed." in shown[len("".join(sentences)) :]
        kinds.add(tuple(sentences))
    assert len(kinds) > 20
    straight = Denoising(mask_rate=1e-9, permuted_share=0.0)
    pair = straight.encode([[text]], denoising_tokenizer, block_size=96, seed="0")[0]
    assert torch.equal(pair.source, pair.target)


def test_damage_is_a_function_of_the_corpus_and_the_split(denoising, denoising_tokenizer, pairs):
    again = denoising.examples("train", denoising_tokenizer)
    assert all(torch.equal(a.source, b.source) for a, b in zip(again, pairs, strict=True))


def test_denoising_tokenizer_round_trip(denoising_tokenizer, tmp_path):
    BartConfig().save_pretrained(tmp_path)
    denoising_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "The Amber Owl costs £15-25.\nCafé Noé"
    encoded = loaded(text)
    assert loaded.model_max_length == 200
    assert loaded.decode(encoded["input_ids"], skip_special_tokens=True) == text
    assert sorted(encoded) == ["attention_mask", "input_ids"]


def test_an_encoder_decoder_learns_to_use_its_source(denoising, pairs):
    model = build_bart()
    denoising.initialise(model, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        batch = denoising.collate(pairs[8 * step % 80 :][:8])
        loss = denoising.loss(model, batch) / batch.num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = denoising.collate(pairs[:8])
    right = denoising.loss(model, batch)
    for name in ("input_ids", "attention_mask"):
        batch.tensors[name] = batch.tensors[name].roll(1, dims=0)
    assert right < denoising.loss(model, batch)


# ---------------------------------------------------------------------- initial weights


def test_shifted_and_matching_heads_look_where_they_should():
    model = build_roberta(hidden_size=128, num_hidden_layers=1, attn_implementation="eager")
    mimetic.initialise_encoder(model, torch.ones(512, dtype=torch.long))
    model.eval().set_attn_implementation("eager")
    first = torch.arange(10, 30)
    ids = torch.cat([torch.tensor([0]), first, torch.tensor([2, 2]), first.flip(0)])[None]
    texts = torch.zeros_like(ids)
    texts[:, 22:] = 1
    weights = model(input_ids=ids, token_type_ids=texts, output_attentions=True).attentions[0][0]
    length = ids.shape[1]
    inner = torch.arange(2, length - 2)
    assert (weights[0].argmax(-1)[inner] == inner - 1).float().mean() > 0.5
    assert (weights[1].argmax(-1)[inner] == inner + 1).float().mean() > 0.5
    at = torch.arange(23, length)
    twin = 43 - at  # position in the first text of the same token
    assert (weights[2:].argmax(-1)[:, at] == twin).float().mean() > 0.8


def test_the_output_bias_is_the_frequency_of_the_tokens():
    counts = torch.randint(0, 50, (512,))
    roberta, bart = build_roberta(), build_bart()
    mimetic.initialise_encoder(roberta, counts)
    mimetic.initialise_encoder_decoder(bart, counts)
    shares = (counts + 1) / (counts + 1).sum()
    torch.testing.assert_close(roberta.lm_head.bias.softmax(0), shares)
    torch.testing.assert_close(bart.final_logits_bias[0].softmax(0), shares)


@pytest.mark.parametrize(
    ("function", "model", "message"),
    [
        (mimetic.initialise_encoder, lambda: build_roberta(type_vocab_size=1), "2 segments"),
        (mimetic.initialise_encoder, build_bart, "a bart of 4 heads.*needed: a roberta"),
        (mimetic.initialise_encoder_decoder, build_roberta, "needed: a bart"),
        (
            mimetic.initialise_encoder_decoder,
            lambda: build_bart(decoder_attention_heads=2),
            "of 2 heads",
        ),
    ],
)
def test_models_that_cannot_be_initialised(function, model, message):
    with pytest.raises(ValueError, match=message):
        function(model(), torch.ones(512, dtype=torch.long))


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Masked(mask_rate=0), "mask_rate=0"),
        (lambda: Masked(pair_mask_rate=1.0), "pair_mask_rate=1.0"),
        (lambda: Denoising(mask_rate=1), "mask_rate=1"),
        (lambda: Denoising(mean_span=0), "mean_span=0"),
        (lambda: Denoising(permuted_share=1.5), "permuted_share=1.5"),
        (
            lambda: build_task(Denoising(), num_statements=3),
            "objective=denoising learns from documents only",
        ),
        (lambda: build_task(Masked(), num_statements=-3), "num_statements=-3 .*>= 0"),
        (
            lambda: build_task(Causal(), num_sentences=3),
            "objective=causal learns from documents only",
        ),
    ],
)
def test_bad_settings_are_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_provenance_counts_statements_and_sentences(masked):
    facts = masked.provenance()
    assert facts["rows"] == {"train": 800, "validation": 80}
    assert facts["objective"] == "masked"
    kinds = {type(group) for group in masked._groups("validation")}
    assert kinds == {list, Statement, Sentence}
    other = build_task(
        Masked(),
        num_statements=200,
        num_validation_statements=19,
        num_sentences=200,
        num_validation_sentences=20,
    )
    assert other.provenance()["sha256"] != facts["sha256"]
