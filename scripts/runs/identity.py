"""Which run a configuration is: its name, its folder, and the runs that it builds on.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scripts.runs import provenance
from scripts.runs.composition import CONFIGS, ROOT, ConfigError, compose
from scripts.runs.folder import RECORD

#: what cannot change a result and is left out of the signature.
NOT_SIGNED = (
    "logger", "choices.logger", "paths", "overrides", "trainer.checkpoint_every_steps",
    "trainer.checkpoint_every_s",
)  # fmt: skip
#: keys that are signed only where they are set, with the value that means they are not.
SIGNED_IF_SET = {
    "init_from": None,
    "recipe.group_by_length": False,
    "recipe.micro_batch_size": None,
    "task.max_rows": None,
    "train_fraction": None,
    "trainer.group_by_length": False,
    "trainer.matmul_precision": "fp32",
    "trainer.optimizer": "adamw",
    "trainer.momentum": 0.0,
}
#: class of a task -> key of its pin, and what stands in a signature instead where a run does not
#: read it (without ``task.source=hub``): the pin of the time when the first such run was named.
#: So a new pin renames no run that it is nothing to.
UNREAD_PINS = {
    "tasks.xsum.XSum": (
        "release",
        {
            "hub": {
                "_target_": "tasks.data.HubDataset",
                "repository": "EdinburghNLP/xsum",
                "revision": "refs/convert/parquet",
                "name": None,
            }
        },
    ),
}


def signed_config(cfg: DictConfig) -> dict[str, Any]:
    """Return what a run's result depends on, as plain JSON values.

    Paths are replaced by checksums of what stands there, and a model that the suite pre-trains by
    the signature of that run; so a signature is the same on every machine.

    Raises:
        ConfigError: a folder named in the configuration does not exist.
    """
    content: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    for key in NOT_SIGNED:
        _drop(content, key)
    for key, unset in SIGNED_IF_SET.items():
        if OmegaConf.select(cfg, key) == unset:
            _drop(content, key)
    pin, first = UNREAD_PINS.get(cfg.task["_target_"], ("", {}))
    if pin and cfg.task.source != "hub":
        del content["task"][pin]
        content["task"].update(first)
    if cfg.task.get("data_dir") is not None:
        content["task"]["data_dir"] = _folder_checksum("task.data_dir", cfg.task.data_dir)
    for key in ("path", "tokenizer_path"):
        if cfg.model.get(key) is not None:
            content["model"][key] = _folder_checksum(f"model.{key}", cfg.model[key])
    if cfg.model.pretrain is not None:
        content["model"]["pretrain"] = _pretraining_signature(tuple(cfg.model.pretrain))
    if cfg.init_from is not None:
        before = start(cfg)
        content["init_from"] = before.name if isinstance(before, Path) else signature(before)
    return content


def _drop(content: dict[str, Any], key: str) -> None:
    node, _, rest = key.partition(".")
    (content[node] if rest else content).pop(rest or node, None)


def signature(cfg: DictConfig) -> str:
    """Return the name of a run: 12 hex digits."""
    return provenance.signature(signed_config(cfg))


def group(cfg: DictConfig) -> str:
    """Return the signature without the seed: what the runs of one table cell share."""
    return provenance.signature({**signed_config(cfg), "seed": None})


def run_dir(cfg: DictConfig) -> Path:
    """Return the folder of a run."""
    return outputs(cfg) / signature(cfg)


def outputs(cfg: DictConfig) -> Path:
    """Return the folder of all run folders."""
    return ROOT / "outputs" if cfg.paths.outputs is None else Path(cfg.paths.outputs)


def pretraining(cfg: DictConfig) -> DictConfig:
    """Return the configuration of the run that pre-trains the model of `cfg`."""
    other = _pretraining(tuple(cfg.model.pretrain)).copy()
    other.paths = cfg.paths
    return other


@functools.cache
def _pretraining(overrides: tuple[str, ...]) -> DictConfig:
    return compose([*overrides, "save_model=true", "predict=false", "logger=none"])


@functools.cache
def _pretraining_signature(overrides: tuple[str, ...]) -> str:
    return signature(_pretraining(overrides))


def start(cfg: DictConfig) -> DictConfig | Path:
    """Return the run whose weights the run of `cfg` starts from.

    ``init_from`` names a task (of the same name as its recipe) or is the folder of a finished run.
    The run on a task is the same command with another task and recipe: same model, method, scale
    and seed, and every override of a single value, those of ``task.`` and ``recipe.`` included. So
    a table whose runs all take ``recipe.rank=4`` starts from its own cell on that task.

    Raises:
        ConfigError: it is neither, or the run would start from itself.
    """
    name = str(cfg.init_from)
    if (CONFIGS / "task" / f"{name}.yaml").is_file():
        if name == cfg.choices.task:
            raise ConfigError(f"init_from={name} is the task of this run itself; use null")
        other = _start(name, tuple(_kept(cfg.overrides))).copy()
        other.seed = cfg.seed
        other.overrides.append(f"seed={cfg.seed}")
        return other
    folder = Path(name).expanduser().resolve()
    if not (folder / RECORD).is_file():
        raise ConfigError(
            f"init_from={name} is neither a task nor the folder of a run with a {RECORD}; "
            "use a task such as glue/mnli, a run folder, or null"
        )
    return folder


def starts_from(cfg: DictConfig) -> DictConfig | None:
    """Return the run on another task that the run of `cfg` starts from; None where it has none.

    Its own ``overrides`` compose it again.

    Raises:
        ConfigError: ``init_from`` is no task and no folder of a run.
    """
    before = None if cfg.init_from is None else start(cfg)
    return None if isinstance(before, Path) else before


def _kept(overrides: Iterable[str]) -> Iterator[str]:
    dropped = ("experiment", "task", "recipe", "seed", "init_from", "score_references")
    for override in overrides:
        if override.partition("=")[0].lstrip("+~") not in dropped:
            yield override


@functools.cache
def _start(task: str, overrides: tuple[str, ...]) -> DictConfig:
    # Composing takes a quarter of a second; another seed is only another value.
    return compose([*overrides, f"experiment={task}"])


_CHECKSUMS: dict[tuple[str, float], str] = {}


def _folder_checksum(key: str, path: str) -> str:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{key}={path}: no such folder (looked in {folder.resolve()})")
    newest = max((p.stat().st_mtime for p in folder.rglob("*")), default=0.0)
    cache_key = (str(folder.resolve()), newest)
    if cache_key not in _CHECKSUMS:
        _CHECKSUMS[cache_key] = provenance.sha256_folder(folder)
    return f"sha256:{_CHECKSUMS[cache_key]}"
