"""What can be wrong with a model's folder: files that are damaged, missing, or disagree.

`write_folders` makes sound folders of each family; `CHANGES` damages a copy; `judge` goes the way
of a run from its settings to its first predictions, without a step, and says what became of it:

- ``right``: the same weights and the same tokens as of the sound folder; or, of a *legal* change,
  another model that is whole.
- ``clear error``: refused in one line with a path within the folder (or the folder's own, where a
  file is not there) and with what to do; or the right model with a warning that the sound folder
  does not give.
- ``traceback``: any other error.
- ``silent``: other weights or tokens without a word.
- ``hang``: no answer within the time.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scripts.runs.building import build, load_task
from scripts.runs.checks import check, check_sources
from scripts.runs.composition import ConfigError
from scripts.runs.run import Run
from tests.faults.configurations import FAMILY, SIZES, HangError, limited, write_models
from tests.faults.damage import NotApplicableError
from tests.faults.data_files import ADVICE, heard

LIMIT_S = 60
#: what a case may take beside what the process has, so that a size that is built costs no machine.
_ROOM = 6 * 2**30
FAMILIES = {"causal_lm": "e2e", "sequence_classification": "glue/mrpc", "seq2seq_lm": "xsum"}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Change:
    """One change of a folder.

    Attributes:
        apply: takes the folder, and is to change it in place; it may raise `NotApplicableError`.
        families: that it is for.
        legal: whether what it makes is another model, which nobody has to be told of.
    """

    apply: Callable[[Path], object]
    families: tuple[str, ...] = ("causal_lm",)
    legal: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a folder, how far it came, and the message."""

    outcome: str
    stage: str = ""
    message: str = ""


# ---------------------------------------------------------------------- what is changed


def _put(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return apply


def _text(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return apply


def _json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        if not path.exists():
            raise NotApplicableError
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return apply


def _set(name: str, **values: object) -> Callable[[Path], None]:
    return _json(name, lambda content: content.update(values))


def _without(name: str, key: str) -> Callable[[Path], None]:
    return _json(name, lambda content: content.pop(key))


def _tensors(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        (folder / WEIGHTS).unlink()
        save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def _shards(
    names: tuple[str, ...] = (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ),
    change: Callable[[dict[str, Any]], object] = lambda index: None,
    less: int = 0,
) -> Callable[[Path], None]:
    """Split the weights into files with an index."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        halves: list[dict[str, torch.Tensor]] = [{}, {}]
        for number, name in enumerate(sorted(tensors)):
            halves[number % 2][name] = tensors[name].clone()
        (folder / WEIGHTS).unlink()
        index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
        for file, half in zip(names, halves, strict=True):
            save_file(half, folder / Path(file).name, metadata={"format": "pt"})
            index["weight_map"] |= dict.fromkeys(half, file)
        change(index)
        (folder / INDEX).write_text(json.dumps(index))
        for file in names[:less]:
            (folder / file).unlink()

    return apply


def _sharded(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        _shards()(folder)
        change(folder)

    return apply


def _first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def _one(
    part: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Return what changes the first tensor whose name has `part`."""
    return lambda tensors: {**tensors, (n := _first(tensors, part)): change(tensors[n])}


def _all(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _grow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = _first(tensors, "wte" if any("wte" in n for n in tensors) else "embed")
    return {**tensors, name: torch.cat([tensors[name], tensors[name][:3]])}


def _tied_apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add a head that differs from the embedding, which config.json says it is."""
    name = _first(tensors, "wte")
    return {**tensors, "lm_head.weight": tensors[name] + 1}


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")


def _larger_vocabulary(folder: Path) -> None:
    """Give it a tokenizer with more words than the embedding has rows."""
    content = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    for number in range(40):
        vocabulary[f"word{number}"] = len(vocabulary)
    (folder / TOKENIZER).write_text(json.dumps(content), encoding="utf-8")


def _added(content: str, number: int) -> dict[str, object]:
    return {
        "id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip


def _special_beyond(folder: Path) -> None:
    """Give it an end token beyond the embedding."""
    _json(TOKENIZER, lambda c: c["added_tokens"].append(_added("<end>", 5000)))(folder)
    _set(TOKENIZER_CONFIG, eos_token="<end>")(folder)


def _other_ids(folder: Path) -> None:
    """Put the tokenizer of another model in its place: the same words under other numbers."""
    content = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    size = len(vocabulary)
    content["model"]["vocab"] = {word: size - 1 - number for word, number in vocabulary.items()}
    for token in content["added_tokens"]:
        token["id"] = size - 1 - token["id"]
    (folder / TOKENIZER).write_text(json.dumps(content), encoding="utf-8")


def _no_special(folder: Path) -> None:
    for key in ("bos_token", "eos_token", "pad_token"):
        _without(TOKENIZER_CONFIG, key)(folder)


_HUGE = 10**7
_BERT = {
    "model_type": "bert", "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 512, "vocab_size": 500,
}  # fmt: skip
ALL = tuple(FAMILIES)

CHANGES: dict[str, Change] = {
    # config.json
    **{
        f"{name} is {what}": Change(
            _put(name, content), ALL if what in ("empty", "a list") else ("causal_lm",)
        )
        for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION)
        for what, content in {
            "empty": "", "blank": "\n", "three bytes": "abc", "a list": "[]", "null": "null",
            "a text": '"gpt2"', "a number": "3", "half": '{"model_type": "gpt2", "n_la',
            "nested": "[" * 100_000, "binary": bytes(range(256)), "utf-16": "{}".encode("utf-16"),
            "zeros": bytes(300), "a web page": "<!DOCTYPE html>", "placeholder":
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a huge number": '{"a": ' + "9" * 5000 + "}",
        }.items()
    },
    **{
        f"{name} is {what}": Change(_instead(name, make))
        for name in (CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, GENERATION)
        for what, make in {
            "missing": lambda path: None,
            "a folder": lambda path: path.mkdir(),
            "a dangling link": lambda path: path.symlink_to("nowhere"),
            "a link to itself": lambda path: path.symlink_to(path.name),
            "a link to its folder": lambda path: path.symlink_to("."),
        }.items()
    },
    f"{CONFIG} is an empty object": Change(_put(CONFIG, "{}"), ALL),
    f"{TOKENIZER} is an empty object": Change(_put(TOKENIZER, "{}"), ALL),
    f"{TOKENIZER_CONFIG} is an empty object": Change(_put(TOKENIZER_CONFIG, "{}"), ALL),
    f"{GENERATION} is an empty object": Change(_put(GENERATION, "{}")),
    "no model_type": Change(_without(CONFIG, "model_type"), ALL),
    **{
        f"model_type is {value!r}": Change(_set(CONFIG, model_type=value), families)
        for value, families in (
            ("gptx", ("causal_lm",)), (None, ("causal_lm",)), (3, ("causal_lm",)),
            (["gpt2"], ("causal_lm",)), ("bert", ALL), ("llama", ("causal_lm",)), ("t5", ALL),
            ("clip", ("causal_lm",)),
        )
    },
    "another architecture": Change(_put(CONFIG, json.dumps(_BERT)), ALL),
    "no architectures": Change(_without(CONFIG, "architectures"), ALL),
    "other architectures": Change(_set(CONFIG, architectures=["BertModel"]), ALL),
    "architectures is a number": Change(_set(CONFIG, architectures=7)),
    "auto_map": Change(
        _set(CONFIG, auto_map={"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"})
    ),
    "auto_map of an unknown type": Change(
        _set(CONFIG, model_type="own", auto_map={"AutoConfig": "code.Config"})
    ),
    "quantization": Change(
        _set(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4})
    ),
    "unknown quantization": Change(_set(CONFIG, quantization_config={"quant_method": "x"})),
    "quantization is a text": Change(_set(CONFIG, quantization_config="x")),
    **{
        f"{key} is {value!r}": Change(_set(CONFIG, **{key: value}))
        for key, values in {
            "n_embd": (256, 64, _HUGE, 2**60, 0, -1, 1.5, "128", None, [128], True),
            "n_layer": (4, 2, 10**6, 0, -1, 1.5, "3", None),
            "n_head": (3, 0, -4, 256, "4", None),
            "n_positions": (1024, 256, 2**40, 8, 0, -1, None),
            "n_inner": (64, _HUGE, -1, "x"),
            "vocab_size": (400, 600, _HUGE * 100, 0, -1, None, "500"),
            "activation_function": ("abc", None, 3),
            "layer_norm_epsilon": ("abc", None, -1.0, float("nan")),
            "attn_pdrop": (2, -1, "x", float("nan")),
            "dtype": ("abc", "int8", 3, "float1"),
            "tie_word_embeddings": (False,),
            "eos_token_id": (7, 10**9, -1, "x", [0, 1]),
            "pad_token_id": (10**9, -100, "x"),
            "num_labels": (-1, 10**9, "x"),
            "id2label": ("x", 3, ["a"]),
            "problem_type": ("x",),
            "is_decoder": ("x",),
            "pruned_heads": ({"0": [0]}, "x"),
            "rope_scaling": ("x",),
        }.items()
        for value in values
    },
    **{
        f"{key} is {value!r} there": Change(_set(CONFIG, **{key: value}), (family,))
        for family, values in {
            "sequence_classification": {
                "hidden_size": (256, _HUGE), "num_hidden_layers": (2, 4, 10**6),
                "num_attention_heads": (3, 0), "max_position_embeddings": (66, 1024, 2, 20),
                "vocab_size": (400, 600), "type_vocab_size": (1, 3), "pad_token_id": (3, 600),
                "num_labels": (7,), "position_embedding_type": ("relative_key",),
            },
            "seq2seq_lm": {
                "d_model": (256, _HUGE), "encoder_layers": (1, 3), "decoder_layers": (1, 3, 10**6),
                "encoder_attention_heads": (3,), "max_position_embeddings": (16, 32, 1024),
                "vocab_size": (400, 600), "decoder_start_token_id": (None, 10**9, -1, "x"),
                "forced_eos_token_id": (10**9,), "eos_token_id": (None, 9), "pad_token_id": (None,),
            },
        }.items()
        for key, several in values.items()
        for value in several
    },
    "dtype is bfloat16": Change(_set(CONFIG, dtype="bfloat16")),
    # weights
    "weights cut": Change(_instead(WEIGHTS, lambda path: path.write_bytes(b"\0" * 100))),
    **{
        f"weights: {what}": Change(
            lambda folder, change=change: (folder / WEIGHTS).write_bytes(
                change((folder / WEIGHTS).read_bytes())
            ),
            ALL if what in ("half", "empty") else ("causal_lm",),
        )
        for what, change in {
            "empty": lambda data: b"",
            "half": lambda data: data[: len(data) // 2],
            "a byte less": lambda data: data[:-1],
            "a byte more": lambda data: data + b"x",
            "header only": lambda data: data[:3000],
            "a huge header": lambda data: (2**60).to_bytes(8, "little") + data[8:],
            "a header of zeros": lambda data: data[:8] + bytes(len(data) - 8),
            "placeholder": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
            "a zip": lambda data: b"PK\x03\x04" + data,
        }.items()
    },
    **{
        f"tensors: {what}": Change(_tensors(change), families)
        for what, change, families in (
            ("one less", lambda t: {n: v for n, v in t.items() if n != _first(t, "0")}, ALL),
            ("half of them", lambda t: dict(list(t.items())[::2]), ALL),
            ("none", lambda t: {}, ALL),
            ("one more", lambda t: {**t, "more.weight": torch.ones(3)}, ("causal_lm",)),
            ("other names", _renamed, ALL),
            ("another shape", _one("0", lambda w: w[..., :-1].clone()), ALL),
            ("turned", _one("c_attn.weight", lambda w: w.T.contiguous()),
             ("causal_lm",)),
            ("a longer embedding", _grow, ALL),
            ("NaN", _one("0", lambda w: w * float("nan")), ALL),
            ("infinite", _one("0", lambda w: w + float("inf")), ("causal_lm",)),
            ("whole numbers", _all(torch.int64), ("causal_lm",)),
            ("one of whole numbers", _one("0", lambda w: w.to(torch.int8)),
             ("causal_lm",)),
            ("booleans", _all(torch.bool), ("causal_lm",)),
            ("complex", _all(torch.complex64), ("causal_lm",)),
            ("eight bits", _all(torch.float8_e4m3fn), ("causal_lm",)),
            ("a head apart", _tied_apart, ("causal_lm",)),
            ("empty", _one("0", lambda w: torch.zeros(0)), ("causal_lm",)),
        )
    },
    "tensors: half precision": Change(
        _tensors(_all(torch.float16)), legal=True
    ),
    "tensors: double precision": Change(
        _tensors(_all(torch.float64))
    ),
    "only a pickle": Change(_pickle, ALL),
    "shards": Change(_shards(), ALL),
    "a shard less": Change(_shards(less=1), ALL),
    "an index of pickles": Change(_shards(names=("a.bin", "b.bin"))),
    "an index beyond the folder": Change(_shards(names=("../a.safetensors", "b.safetensors"))),
    "an index of one name more": Change(
        _shards(change=lambda i: i["weight_map"].update(x="model-00001-of-00002.safetensors"))
    ),
    "an index of wrong places": Change(
        _shards(change=lambda i: i["weight_map"].update(
            dict(zip(i["weight_map"], reversed(list(i["weight_map"].values())), strict=True))
        ))
    ),
    "an index without half of the names": Change(
        _shards(change=lambda i: [i["weight_map"].pop(n) for n in list(i["weight_map"])[::2]])
    ),
    "an index without a map": Change(_shards(change=lambda i: i.pop("weight_map"))),
    "an index with an empty map": Change(_shards(change=lambda i: i["weight_map"].clear())),
    "an index of numbers": Change(_shards(change=lambda i: i["weight_map"].update(x=3))),
    "an index that is no JSON": Change(_sharded(_put(INDEX, "{"))),
    "an index that is a list": Change(_sharded(_put(INDEX, "[]"))),
    "a shard cut": Change(_sharded(_put("model-00002-of-00002.safetensors", bytes(50)))),
    # tokenizer
    "a vocabulary beyond the embedding": Change(_larger_vocabulary, ALL),
    "a tokenizer of another model": Change(_other_ids, ALL),
    "an end token beyond the embedding": Change(_special_beyond, ALL),
    "no special tokens": Change(_no_special, ALL),
    **{
        f"no {key}": Change(_without(TOKENIZER_CONFIG, key), ALL)
        for key in ("eos_token", "pad_token", "tokenizer_class", "model_max_length")
    },
    **{
        f"tokenizer: {key} is {value!r}": Change(_set(TOKENIZER_CONFIG, **{key: value}))
        for key, values in {
            "tokenizer_class": ("Abc", 3, "BertTokenizer"),
            "model_max_length": (5, 0, -1, "abc", None, 1.5),
            "eos_token": (3, ["a"], "<new>", None),
            "pad_token": (3, "<new>", None),
            "auto_map": ({"AutoTokenizer": ["code.Tok", None]},),
            "added_tokens_decoder": ({"x": 3}, "x"),
            "padding_side": ("abc",),
            "truncation_side": ("abc",),
            "chat_template": (3,),
            "extra_special_tokens": (3,),
        }.items()
        for value in values
    },
    **{
        # Without merges or words to begin with it is another tokenizer, and whole.
        f"tokenizer.json: {what}": Change(
            _json(TOKENIZER, change), legal=what in ("no merges", "no pre-tokenizer")
        )
        for what, change in {
            "no model": lambda c: c.pop("model"),
            "another model": lambda c: c["model"].update(type="Abc"),
            "no vocabulary": lambda c: c["model"].update(vocab={}),
            "no merges": lambda c: c["model"].update(merges=[]),
            "merges of unknown words": lambda c: c["model"].update(merges=[["zzz", "yyy"]]),
            "no tokens added": lambda c: c.update(added_tokens=[]),
            "no pre-tokenizer": lambda c: c.update(pre_tokenizer=None),
            "a version to come": lambda c: c.update(version="9.0"),
            "a number twice": lambda c: c["model"]["vocab"].update(zzz=5),
            "a huge number": lambda c: c["model"]["vocab"].update(zzz=2**31),
        }.items()
    },
    # generation_config.json
    **{
        f"generation: {key} is {value!r}": Change(
            _set(GENERATION, **{key: value}), ("causal_lm", "seq2seq_lm")
        )
        for key, values in {
            "eos_token_id": (10**9, "x", []),
            "pad_token_id": ("x",),
            "num_beams": ("abc", -1, 10**9),
            "max_length": (-1, "x"),
            "temperature": (-1.0, "x"),
            "do_sample": ("x",),
            "forced_bos_token_id": (10**9,),
            "decoder_start_token_id": (10**9,),
            "length_penalty": ("x",),
            "no_repeat_ngram_size": (-3, "x"),
            "early_stopping": ("x",),
        }.items()
        for value in values
    },
}  # fmt: skip


# ---------------------------------------------------------------------- what becomes of it


@dataclass(frozen=True)
class Sound:
    """A sound folder of a family.

    Attributes:
        family: of `FAMILIES`.
        folder: never changed.
        facts: what a run reads from it, see `_facts`.
        said: what is logged then.
    """

    family: str
    folder: Path
    facts: Any
    said: frozenset[str]


def write_folders(folder: Path) -> None:
    """Write a sound folder of each family."""
    write_models(folder)


def sound(family: str, folder: Path) -> Sound:
    """Return what a run reads from a sound folder."""
    with heard("delta_lora", "scripts", "tasks") as records:
        facts = _go(family, folder / family, [""])
    return Sound(family, folder / family, facts, frozenset(r.getMessage() for r in records))


def judge(found: Sound, change: Change, folder: Path) -> Outcome:
    """Damage a copy of a sound folder; return what becomes of it.

    Raises:
        NotApplicableError: the folder cannot have this damage.
    """
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(found.folder, folder)
    change.apply(folder)
    stage = [""]
    with heard("delta_lora", "scripts", "tasks") as records, _bounded():
        try:
            with limited(LIMIT_S):
                facts = _go(found.family, folder, stage)
        except HangError:
            return Outcome("hang", stage[0])
        except ConfigError as error:
            message = str(error)
            is_clear = str(folder) in message and "\n" not in message and ADVICE.search(message)
            return Outcome("clear error" if is_clear else "traceback", stage[0], message)
        except Exception as error:
            return Outcome("traceback", stage[0], f"{type(error).__name__}: {error}")
    if facts == found.facts or change.legal:
        return Outcome("right", stage[0])
    news = [r.getMessage() for r in records if r.getMessage() not in found.said]
    if any(str(folder) in line for line in news):
        return Outcome("clear error", stage[0], "; ".join(news))
    return Outcome("silent", stage[0], "; ".join(news))


def _go(family: str, folder: Path, stage: list[str]) -> Any:
    """Go the way of a run; return what was read."""
    experiment = FAMILIES[family]
    assert FAMILY.get(experiment, "sequence_classification") == family
    stage[0] = "compose"
    run = Run.compose(
        [
            f"experiment={experiment}", "scale=tiny", f"model.path={folder}", "method=delta_lora",
            f"paths.outputs={folder.parent / 'outputs'}", "trainer.max_steps=20", "logger=none",
            f"task.embedded_sizes={SIZES[experiment]}",
        ]
    )  # fmt: skip
    assert run.name
    stage[0] = "check"
    check(run)
    stage[0] = "sources"
    check_sources(run, set())
    stage[0] = "data"
    task = load_task(run.config)
    stage[0] = "build"
    built = build(run, task, None)
    stage[0] = "batch"
    batch = task.collate([built.train[i] for i in range(2)])
    with torch.no_grad():
        loss = float(task.loss(built.model.eval(), batch))
    assert math.isfinite(loss)
    stage[0] = "predict"
    with built.method.merged(built.model) as model:
        chunk = next(iter(task.predict(model, built.tokenizer, task.scored_split)))
    tokens = [{n: t.tolist() for n, t in batch.tensors.items()}]
    return built.weights_sha256, tokens, loss, chunk


class _bounded:  # noqa: N801
    """Bound the memory of the process in the block."""

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + _ROOM
        resource.setrlimit(resource.RLIMIT_AS, (room, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._before)


def cases() -> Iterator[tuple[str, str]]:
    """Yield family and name of every change."""
    for name, change in CHANGES.items():
        for family in change.families:
            yield family, name
