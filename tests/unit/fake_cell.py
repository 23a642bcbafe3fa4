"""A stand-in for `scripts.runs.cell` whose runs take no time and can be told to go wrong.

Overrides of the form ``fake.<behaviour>=<row>:<seed>`` make one cell fail, get killed, wait or be
locked. ``init_from=<task>`` makes a run start from the one on that task. Its folder of runs is the
environment variable FAKE_CELL_OUTPUTS.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BASE = {"full": 0.60, "lora": 0.50, "dylora": 0.40, "adalora": 0.45, "delta_lora": 0.70}
METRICS = {"bleu": 1.0, "nist": 10.0, "meteor": 0.8, "rouge_l": 0.9, "cider": 4.0}


class ConfigError(ValueError):
    pass


class LockedError(RuntimeError):
    pass


def compose(overrides):
    config: dict[str, Any] = {"fake": {}}
    for override in overrides:
        key, _, value = override.partition("=")
        if key.startswith("fake."):
            config["fake"][key.removeprefix("fake.")] = value
        elif key == "wrong":
            raise ConfigError("unknown key 'wrong'")
        else:
            config[key] = value
    config["seed"] = int(config["seed"])
    config["choices"] = {"scale": config["scale"], "task": config["task"]}
    config["overrides"] = list(overrides)
    return config


def _name(config, *left_out):
    left_out = ("fake", "logger", "overrides", *left_out)
    signed = {k: v for k, v in config.items() if k not in left_out}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()[:12]


def group(config):
    return _name(config, "seed")


def run_dir(config):
    return Path(os.environ["FAKE_CELL_OUTPUTS"]) / _name(config)


def status(config):
    path = run_dir(config) / "record.json"
    if not path.exists():
        return SimpleNamespace(state="missing", reason="")
    record = json.loads(path.read_text())
    if record["status"] == "failed":
        return SimpleNamespace(state="failed", reason=record["error"]["message"])
    return SimpleNamespace(state="done", reason="")


def starts_from(config):
    if "init_from" not in config:
        return None
    kept = [o for o in config["overrides"] if o.partition("=")[0] not in ("init_from", "seed")]
    return compose([*kept, f"task={config['init_from']}", f"seed={config['seed']}"])


def unprepared(configs):
    is_prepared = (Path(os.environ["FAKE_CELL_OUTPUTS"]) / "prepared").is_dir()
    return [] if is_prepared else sorted({config["model"] for config in configs})


def check(config):
    if config["fake"].get("refuse") == config["method"]:
        raise ConfigError("rank=0 must be 1 or more")


def check_sources(config, seen):
    if config["model"] not in seen:
        seen.add(config["model"])
        sys.stdout.write(f"looking for {config['model']}\n")
        if config["fake"].get("absent") == config["model"]:
            raise ConfigError(f"{config['model']} has no model.safetensors")


def prepare(configs):
    if configs[0]["fake"].get("prepare") == "fail":
        raise RuntimeError("no space left on device")
    (Path(os.environ["FAKE_CELL_OUTPUTS"]) / "prepared").mkdir(parents=True, exist_ok=True)


def load_record(folder):
    record = json.loads((folder / "record.json").read_text())
    resources = folder / "resources.json"
    if resources.exists():
        record["resources"] = json.loads(resources.read_text())
    return record


def record(config, **changes):
    """Return the completed record of a run."""
    seed = config["seed"]
    base = BASE.get(config["method"], 0.55)
    score = base + 0.01 * (seed - 2) + 0.001 * ((seed * 7) % 5) * (len(config["method"]) % 3)
    return {
        "schema": 1,
        "signature": _name(config),
        "group": group(config),
        "status": "completed",
        "scale": config["scale"],
        "seed": seed,
        "method": config["method"],
        "recipe": config["recipe"],
        "task": {"name": "e2e", "version": 1, "protocol": "lora", "source": "embedded"},
        "model": {"name": config["model"]},
        "init_from": None,
        "parameters": {"trainable": 393216, "updatable": 50331648, "head": 0, "total": 354823168},
        "metrics": {name: score * factor for name, factor in METRICS.items()},
        "missing_metrics": {},
        "reference_metrics": {},
        "cosine_similarity": similarity(config["method"], seed),
        "training": {"steps": 10, "epochs": 1, "checkpoint_rule": "last"},
        "config": {
            "choices": config["choices"],
            "method": {"rank": 4, **({"eval_rank": None} if config["method"] == "dylora" else {})},
        },
        "provenance": {
            "git": {"commit": "0123456789abcdef", "dirty": False},
            "device": {"name": "test CPU", "type": "cpu"},
        },
        **changes,
    }


def similarity(method, seed):
    """Return values by which LoRA turns least and Delta-LoRA most, in every block."""
    turn = {"lora": 0.01, "full_query_value": 0.02, "delta_lora": 0.03}.get(method, 0.015)
    return {
        f"h.{block}.attn.{role}": 1 - turn - 0.001 * block - 0.0001 * seed
        for block in range(4)
        for role in ("query", "value")
    }


def resources(config):
    factor = 1.05 if config["method"] == "delta_lora" else 1.0
    seconds = 10.0 * factor * (1 + 0.01 * config["seed"])
    return {
        "train_time_s": seconds,
        "predict_time_s": 2.0,
        "score_time_s": 1.0,
        "peak_memory_bytes": int(7e8 * factor),
        "tokens_per_s": 1000.0,
        "sessions": 1,
    }


def write(config, content, measured=None):
    folder = run_dir(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(content))
    if measured is not None:
        (folder / "resources.json").write_text(json.dumps(measured))


def run(config):
    sys.stdout.write(f"running {config['method']}\n")
    sys.stdout.flush()
    with (run_dir(config).parent / "calls.txt").open("a") as stream:
        stream.write(f"{os.getpid()} {config['method']} {config['seed']} ")
        stream.write(f"{os.environ.get('OMP_NUM_THREADS')}\n")
    behaviour, here = config["fake"], f"{config['method']}:{config['seed']}"
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
        write(config, {**record(config), "status": "failed", "error": error})
        raise RuntimeError(error["message"])
    result = record(config)
    write(config, result, resources(config))
    return result
