"""Runs that take no time and can be told to go wrong; all but their work is real.

Overrides of the form ``fake.<behaviour>=<method>:<seed>`` make one run fail, get killed, wait or be
locked; of a grid ``<method>:<seed>:<lambda>:<K>``. `install` puts what
stands here in the place of the real work.
"""

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from delta_lora.result import FitResult, PrunedError
from scripts.runs import batch, composition
from scripts.runs.folder import LockedError
from scripts.runs.recording import config_of, write_pruned
from scripts.runs.run import Run

BASE = {"full": 0.60, "lora": 0.50, "dylora": 0.40, "adalora": 0.45, "delta_lora": 0.70}
METRICS = {"bleu": 1.0, "nist": 10.0, "meteor": 0.8, "rouge_l": 0.9, "cider": 4.0}
#: overrides that change no composition but a value, so that one composition serves many tests.
VALUES = ("fake.", "paths.outputs=", "seed=", "method.update_ratio=", "method.start_step=")
_compose = composition.compose
#: folder of all run folders where no override names one; a test sets it.
OUTPUTS: Path | None = None


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let runs be composed and executed by this module, here and by the workers.

    Args:
        put: sets an attribute; a test gives that of its monkeypatch.
    """
    put(composition, "compose", compose)
    put(batch, "EXECUTE", f"{__name__}:execute")
    put(batch, "ATTEMPT", f"{__name__}:execute")
    put(batch, "PREPARE", f"{__name__}:prepare")


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """Compose; of runs that differ in their method alone, all but the first in no time."""
    methods = [o for o in overrides if o.startswith("method")]
    has_values = any(o.startswith("recipe.") for o in overrides)
    if not has_values and len(methods) == 1 and methods != ["method=full"]:  # any recipe has those
        name = methods[0].removeprefix("method=")
        path = composition.CONFIGS / "method" / f"{name}.yaml"
        own = OmegaConf.load(path) if path.is_file() else {}
        if own and "defaults" not in own:
            cfg = _composed(tuple("method=full" if o in methods else o for o in overrides)).copy()
            with open_dict(cfg):
                cfg.method, cfg.choices.method = own, name
            OmegaConf.resolve(cfg)
            return cfg
    return _compose(overrides)


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose as the suite does; the same overrides once."""
    return _finished(tuple(overrides), OUTPUTS)


@functools.lru_cache(maxsize=64)  # many tests have a folder of their own
def _finished(overrides: tuple[str, ...], outputs: Path | None) -> DictConfig:
    composed = tuple(o for o in overrides if not o.startswith(VALUES))
    cfg = _composed(composed).copy()
    with open_dict(cfg):
        cfg.overrides, cfg.fake = list(overrides), {}
        cfg.paths.outputs = None if outputs is None else str(outputs)
        for override in overrides:
            key, _, value = override.partition("=")
            if key == "seed":
                cfg.seed = int(value)
            elif key.startswith("method.") and override not in composed:
                cfg.method[key.removeprefix("method.")] = yaml.safe_load(value)
            elif key == "paths.outputs":
                cfg.paths.outputs = value
            elif key.startswith("fake."):
                cfg.fake[key.removeprefix("fake.")] = value
    return cfg


def prepare(runs: Sequence[Run]) -> None:
    """Write that the models of `runs` are pre-trained."""
    if runs[0].config.fake.get("prepare") == "fail":
        raise RuntimeError("no space left on device")
    for run in runs:
        assert run.pretraining is not None
        made = record(run.pretraining, model={"name": "tiny", "saved_weights_sha256": "made"})
        write(run.pretraining, made)


def record(run: Run, **changes: Any) -> dict[str, Any]:
    """Return the completed record of a run."""
    seed, method = run.seed, run.choices.method
    base = BASE.get(method, 0.55)
    score = base + 0.01 * (seed - 2) + 0.001 * ((seed * 7) % 5) * (len(method) % 3)
    score += _setting(run, seed)
    return {
        "schema": 2,
        "signature": run.name,
        "group": run.group,
        "meaning": run.meaning,
        "status": "completed",
        "scale": run.choices.scale,
        "seed": seed,
        "method": method,
        "recipe": run.choices.recipe,
        "task": {"name": "e2e", "version": 1, "protocol": "lora", "source": "embedded"},
        "model": {"name": run.choices.model},
        "init_from": _start(run),
        "parameters": {"trainable": 393216, "updatable": 50331648, "head": 0, "total": 354823168},
        "metrics": {name: score * factor for name, factor in METRICS.items()},
        "missing_metrics": {},
        "reference_metrics": {},
        "cosine_similarity": similarity(method, seed),
        "adapter_sha256": None,
        "training": {
            "steps": 10,
            "epochs": 1,
            "checkpoint_rule": "last",
            "chosen_step": 10,
            "validation": [
                {"step": 5, "loss": 9.0 - score},
                {"step": 10, "loss": 2.0 - score},
            ],
        },
        "config": config_of(run),
        "provenance": {
            "git": {"commit": "0123456789abcdef", "dirty": False},
            "device": {"name": "test CPU", "type": "cpu"},
        },
        **changes,
    }


def _setting(run: Run, seed: int) -> float:
    """Return what lambda and K that differ from the recipe's add: best at lambda 1, small K."""
    method, recipe = run.config.method, run.config.recipe
    ratio, start = method.get("update_ratio"), method.get("start_step")
    if ratio is None or (ratio == recipe.update_ratio and start == recipe.start_step):
        return 0.0
    noise = ((seed * 13 + int(10 * ratio) * 7 + start * 3) % 11 - 5) / 5
    return 0.03 - 0.02 * abs(ratio - 1) - 0.0004 * start + 0.004 * noise


def _start(run: Run) -> dict[str, Any] | None:
    if run.start_run is None:
        return None
    return {"task": run.start_run.meaning["task"]["name"], "adapter_sha256": None}


def similarity(method, seed):
    """Return values by which LoRA turns least and Delta-LoRA most, in every block."""
    turn = {"lora": 0.01, "full_query_value": 0.02, "delta_lora": 0.03}.get(method, 0.015)
    return {
        f"h.{block}.attn.{role}": 1 - turn - 0.001 * block - 0.0001 * seed
        for block in range(4)
        for role in ("query", "value")
    }


def resources(run):
    factor = 1.05 if run.choices.method == "delta_lora" else 1.0
    seconds = 10.0 * factor * (1 + 0.01 * run.seed)
    return {
        "train_time_s": seconds,
        "predict_time_s": 2.0,
        "score_time_s": 1.0,
        "peak_memory_bytes": int(7e8 * factor),
        "tokens_per_s": 1000.0,
        "sessions": 1,
    }


def write(run: Run, content: dict[str, Any], measured: dict[str, Any] | None = None) -> None:
    """Write the record of a run, and its resources."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "record.json").write_text(json.dumps(content))
    if measured is not None:
        (run.folder / "resources.json").write_text(json.dumps(measured))


def calls_file(outputs: Path) -> Path:
    """Return where every run that was begun is noted."""
    return outputs / "calls.txt"


def execute(run: Run, prune: Callable[..., str | None] | None = None) -> dict[str, Any]:
    """Behave as told, or write the record of a run; `prune` is asked at its first evaluation."""
    method, settings = run.choices.method, run.config.method
    sys.stdout.write(f"running {method}\n")
    sys.stdout.flush()
    with calls_file(run.outputs).open("a") as stream:
        stream.write(f"{os.getpid()} {method} {run.seed} {os.environ.get('OMP_NUM_THREADS')}\n")
    own = f"{settings.get('update_ratio')}:{settings.get('start_step')}"
    here = f"{method}:{run.seed}"
    # A run is meant by its method and seed, or by those and lambda and K.
    behaviour = {
        how: here if which == f"{here}:{own}" else which for how, which in run.config.fake.items()
    }
    if behaviour.get("kill") == here:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour.get("exit") == here:
        os._exit(3)
    if behaviour.get("lock") == here:
        raise LockedError("process 7 is already working in this folder")
    if behaviour.get("wait") == here:
        time.sleep(60)
    if behaviour.get("fail") == here:
        error = {"type": "RuntimeError", "message": "loss is <nan> | at step 3"}
        write(run, {**record(run), "status": "failed", "error": error})
        raise RuntimeError(error["message"])
    result = record(run)
    validation = result["training"]["validation"]
    if prune is not None and (reason := prune(validation[:1])) is not None:
        stop = PrunedError(validation[0]["step"], 10, reason, FitResult(validation=validation[:1]))
        run.folder.mkdir(parents=True, exist_ok=True)
        return write_pruned(run, stop)
    write(run, result, resources(run))
    return result
