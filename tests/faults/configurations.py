"""Wrong values for every key of a configuration, and what becomes of each before any training.

`bases` are configurations that between them have every key of every experiment and method, with the
scale tiny and a handful of examples. `cases` puts every value of `VALUES` in the place of every
value of theirs; what several bases share is tried once. `judge` goes the whole way of a run but for
the training: name, checks, data, tokenizer, model, method, record, and one chunk of predictions
where the value is one of those. It says which of these it was:

- ``clear``: refused with the key, the value and what is allowed, in one line;
- ``vague``: refused in other words;
- ``traceback``: an error that a user would see as a traceback;
- ``hang``: no answer within the time;
- ``accepted``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from scripts.runs import composition
from scripts.runs.building import build, load_task, random_model
from scripts.runs.checks import check, check_sources
from scripts.runs.composition import ConfigError
from scripts.runs.recording import config_of
from scripts.runs.run import Run
from scripts.sweeping import spec

#: what is written in the place of a value, as Hydra reads it.
VALUES = (
    "abc", "no", "off", "true", "false", "null", "nan", "inf", "-inf", "-1", "0", "1", "1.5",
    "1e-30", "1e20", "1e30", "10000000", "99999999999999999999", "'3'", "''", "' '", "'日本'",
    "'a\"b'", "'~/x'", "'../../x'", "'x#y (z)=1, 2'", "[1,2]", "[]", "[a,b]", "[[1]]", "{a:1}",
    "{}", "{train:1}", "'${seed}'",
)  # fmt: skip
#: what nobody would write, for the keys that only pin downloads.
FEW = ("abc", "null", "1", "''", "[1,2]", "{a:1}")
#: keys that decide what is done with the model after training.
LATE = re.compile(
    r"task\.(decoding|max_|predict_|head|labels|columns|parts|metrics|aggregate)|seed"
)
#: words by which a message says what is allowed or what to do.
ADVICE = re.compile(
    r"\b(allowed|must|write|choose|use|known|correct|set|give|take|lower|raise|name|named|needs|"
    r"leave|finite)\b"
)
METHODS = sorted(
    path.relative_to(composition.CONFIGS / "method").with_suffix("").as_posix()
    for path in (composition.CONFIGS / "method").rglob("*.yaml")
)
GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
SIZES = {
    "e2e": "{train:12,validation:3,test:3}",
    "webnlg": "{train:12,validation:4,test:4}",
    "xsum": "{train:8,validation:3,test:3}",
    "glue/mnli": "{train:12,validation_matched:6,validation_mismatched:6}",
    **{f"glue/{task}": "{train:12,validation:8}" for task in GLUE if task != "mnli"},
}
PRETRAININGS = {
    "pretraining": "causal_lm", "pretraining_masked": "sequence_classification",
    "pretraining_denoising": "seq2seq_lm",
}  # fmt: skip
SMALL = [
    "method=full", "scale=tiny", "logger=none", "task.num_documents=150", "task.block_size=64",
    "task.tokenizer_documents=150", "task.vocab_size=500", "task.num_validation_documents=5",
    "model.architecture.vocab_size=500",
]  # fmt: skip
_MORE = [
    f"task.num_{part}{what}=5"
    for part in ("", "validation_")
    for what in ("statements", "sentences")
]
FAMILY = {"e2e": "causal_lm", "webnlg": "causal_lm", "xsum": "seq2seq_lm"}


@dataclass(frozen=True)
class Case:
    """One value in the place of another.

    Attributes:
        base: overrides of the configuration.
        key: of the value.
        text: the value as it is written.
    """

    base: tuple[str, ...]
    key: str
    text: str

    @property
    def override(self) -> str:
        """What a user would write."""
        return f"{self.key}={self.text}"


@dataclass(frozen=True)
class Verdict:
    """What became of a case: the result, how far it came, and the message."""

    result: str
    stage: str
    message: str = ""


class HangError(BaseException):
    """No answer within the time."""


# ---------------------------------------------------------------------- what is tried


def write_models(folder: Path) -> None:
    """Write a model with random weights and a tokenizer of each family, which runs start from."""
    for experiment, family in PRETRAININGS.items():
        more = _MORE if experiment == "pretraining_masked" else []
        run = Run.compose([f"experiment={experiment}", *SMALL, *more])
        task = load_task(run.config)
        task.build_tokenizer().save_pretrained(folder / family)
        random_model(run.config, task).save_pretrained(folder / family)


def bases(folder: Path, *, is_short: bool = False) -> Iterator[tuple[str, ...]]:
    """Yield the overrides of configurations that have every key.

    Args:
        folder: holds what `write_models` wrote; run folders go there too.
        is_short: three experiments and three methods, for a quick look.
    """
    common = ("scale=tiny", f"paths.outputs={folder / 'outputs'}", "trainer.max_steps=20")
    experiments = ("e2e", "glue/mrpc", "xsum") if is_short else tuple(SIZES)
    methods = ("delta_lora", "adalora", "peft") if is_short else METHODS
    for experiment in experiments:
        model = f"model.path={folder / FAMILY.get(experiment, 'sequence_classification')}"
        sized = (f"task.embedded_sizes={SIZES[experiment]}", model)
        own = (f"experiment={experiment}", *common, *sized)
        yield (*own, "method=delta_lora")
        for method in methods if experiment == "glue/mrpc" else ():
            yield (*own, f"method={method}", "recipe.rank=4")
    if not is_short:
        for experiment in PRETRAININGS:
            none = [o for o in SMALL if not o.startswith(("scale", "logger"))]
            none += _MORE if experiment == "pretraining_masked" else []
            yield (f"experiment={experiment}", *none, *common)


@cache
def composed(base: tuple[str, ...]) -> DictConfig:
    """Return the configuration of a base before its references are resolved."""
    found: list[DictConfig] = []
    kept = composition.checked
    try:
        composition.checked = lambda cfg: found.append(cfg) or cfg  # type: ignore[func-returns-value]
        composition.compose(base)
    finally:
        composition.checked = kept
    return found[0]


def cases(all_bases: Sequence[tuple[str, ...]]) -> list[Case]:
    """Return every wrong value for every key; what several bases share once."""
    seen: set[tuple[str, str]] = set()
    found = []
    for base in all_bases:
        cfg = composed(base)
        for key, node in leaves(cfg):
            group = key.partition(".")[0]
            owner = str(cfg.choices.get(group, "")) if group in ("task", "method") else ""
            if group == "recipe":
                owner = str(cfg.choices.recipe)
            if (key, owner) in seen:
                continue
            seen.add((key, owner))
            found += [
                Case(base, key, text)
                for text in (FEW if ".release" in key else VALUES)
                if str(node) != text.strip("'")
            ]
    return found


def leaves(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of all values, of mappings and lists as a whole too, and what stands there."""
    for key in cfg:
        if not prefix and key in ("choices", "overrides"):
            continue
        node, name = cfg._get_node(key), f"{prefix}{key}"
        if "." in str(key):  # names of files
            continue
        yield name, node
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            yield from leaves(node, f"{name}.")


def sample(found: Sequence[Case], number: int, seed: int) -> list[Case]:
    """Return so many of `found`, drawn by a seed, in their order."""
    chosen = random.Random(seed).sample(range(len(found)), min(number, len(found)))
    return [found[index] for index in sorted(chosen)]


# ---------------------------------------------------------------------- what becomes of it


def judge(case: Case, *, limit_s: int = 20, is_deep: bool = True) -> Verdict:
    """Go the way of a run with one wrong value.

    Args:
        case: the value.
        limit_s: seconds until it counts as a hang.
        is_deep: build what a run needs too, where nothing is refused before.
    """
    stage = ["compose"]
    with quiet():
        try:
            with limited(limit_s):
                _go(case, stage, is_deep=is_deep)
        except HangError:
            return Verdict("hang", stage[0])
        except ConfigError as error:
            result = "clear" if is_clear(case, str(error)) else "vague"
            return Verdict(result, stage[0], str(error))
        except Exception as error:
            return Verdict("traceback", stage[0], f"{type(error).__name__}: {error}")
    return Verdict("accepted", stage[0])


def _go(case: Case, stage: list[str], *, is_deep: bool) -> None:
    if case.key in composition.GROUPS:
        composition.compose([*case.base, case.override])
        raise AssertionError("a member of a group that does not exist")
    [override] = OverridesParser.create().parse_overrides([case.override])
    cfg = composed(case.base).copy()
    with open_dict(cfg):
        OmegaConf.update(cfg, case.key, override.value(), merge=False, force_add=True)
        cfg.overrides = [*case.base, case.override]
    run = Run(composition.checked(cfg))
    stage[0] = "name"
    assert run.name
    stage[0] = "check"
    check(run)
    if run.config.task.get("source", "embedded") == "embedded":
        stage[0] = "sources"
        check_sources(run, set())
    if not is_deep or run.pretraining is not None or run.start is not None:
        return
    stage[0] = "data"
    task = load_task(run.config)
    stage[0] = "build"
    built = build(run, task, None)
    stage[0] = "record"
    facts = {"config": config_of(run), "meaning": run.meaning, "data": task.provenance()}
    json.dumps(facts, allow_nan=False)
    if LATE.match(case.key) and run.config.predict:
        stage[0] = "predict"
        built.model.eval()
        with built.method.merged(built.model) as model:
            next(iter(task.predict(model, built.tokenizer, task.scored_split)), None)


def is_clear(case: Case, message: str) -> bool:
    """Return whether a message is one line with the key, the value and what is allowed."""
    return not missing(case, message)


def missing(case: Case, message: str) -> list[str]:
    """Return what a message should have and has not."""
    [override] = OverridesParser.create().parse_overrides([case.override])
    value: Any = override.value()
    leaf = case.key.rpartition(".")[2]
    shown = {str(value), repr(value), case.text, case.text.strip("'\""), repr(value)[:60]}
    shown |= {"None"} if value is None else set()
    if isinstance(value, (dict, list, DictConfig, ListConfig)):
        shown |= {type(value).__name__, *map(str, value)}
    if value in ("${seed}",):
        shown.add("1")
    lacks = []
    if leaf not in message:
        lacks.append("key")
    if not any(text and text in message for text in shown) and str(value).strip():
        lacks.append("value")
    if not ADVICE.search(message):
        lacks.append("what is allowed")
    if "\n" in message:
        lacks.append("one line")
    return lacks


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `HangError` in the block after so many seconds."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the log."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------- sweeps


def sweep_cases() -> list[Case]:
    """Return every wrong value for every entry of every file of configs/sweep."""
    found = []
    for name in spec.sweep_names():
        content = yaml.safe_load((composition.CONFIGS / "sweep" / f"{name}.yaml").read_text())
        for key in _entries(content):
            found += [Case((name,), key, text) for text in VALUES if "$" not in text]
    return found


def _entries(content: Any, prefix: str = "") -> Iterator[str]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        yield f"{prefix}{key}"
        if isinstance(value, (dict, list)):
            yield from _entries(value, f"{prefix}{key}.")


def judge_sweep(case: Case, folder: Path) -> Verdict:
    """Read a sweep's file with one wrong value, written into a folder."""
    [override] = OverridesParser.create().parse_overrides([f"x={case.text}"])
    path = composition.CONFIGS / "sweep" / f"{case.base[0]}.yaml"
    content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    *parents, last = case.key.split(".")
    place = content
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    place[int(last) if isinstance(place, list) else last] = override.value()
    (folder / f"{case.base[0]}.yaml").write_text(yaml.safe_dump(content))
    kept = spec.SWEEPS
    try:
        spec.SWEEPS = folder
        with limited(20):
            assert spec.load_sweep(case.base[0], "tiny").points()
    except HangError:
        return Verdict("hang", "sweep")
    except ValueError as error:
        # An entry of a list is called by the name of the list.
        named = {"axis", "method"} if case.key[:2] in ("ax", "re") else set()
        named |= {part.removesuffix("s") for part in (*parents, last) if not part.isdecimal()}
        lacks = [] if any(name in str(error) for name in named) else ["key"]
        lacks += [] if ADVICE.search(str(error)) and "\n" not in str(error) else ["what is allowed"]
        return Verdict("vague" if lacks else "clear", "sweep", str(error))
    except Exception as error:
        return Verdict("traceback", "sweep", f"{type(error).__name__}: {error}")
    finally:
        spec.SWEEPS = kept
    return Verdict("accepted", "sweep")
