"""Where the runs of a command work: on this machine, or on a cluster.

`configs/launcher/<name>.yaml` has the options of each cluster, and `load` replaces some of them.
"""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from delta_lora.checks import near
from scripts.runs.allotment import Allotment, allot, cluster_environment, parse_workers
from scripts.runs.composition import CONFIGS, ConfigError, as_config_error
from scripts.runs.scale import missing_device, runs_on_cpu
from scripts.runs.workers import Pool

if TYPE_CHECKING:
    from scripts.runs.elsewhere import Elsewhere

LOCAL = "local"
FOLDER = CONFIGS / "launcher"


class Here:
    """Runs as worker processes on this machine: a queue for all of its devices."""

    name = LOCAL
    #: whether this machine must have what the runs need.
    is_here = True

    def allot(
        self,
        workers: str,
        scale: str,
        overrides: Sequence[str],
        num_jobs: int,
        planned: Callable[[], int | None] = lambda: None,
    ) -> Allotment:
        """Return the workers of a command; arguments as of `scripts.runs.allotment.allot`."""
        return allot(workers, scale, overrides, num_jobs, planned)

    def refusal(self, scale: str, overrides: Sequence[str]) -> str | None:
        """Return why runs of `scale` with `overrides` cannot be made, or None."""
        return missing_device(scale, overrides)

    def check(self, scale: str, overrides: Sequence[str]) -> None:
        """Do nothing: this machine is there."""

    def pool(self, allotment: Allotment, logs: Path, name: str) -> Pool:
        """Return the workers, for a ``with`` block; arguments as of `Pool`."""
        return Pool(environments=allotment.environments, logs=logs, name=name)


@dataclass(kw_only=True)
class Launcher(ABC):
    """A cluster for the runs of a command; same interface as `Here`."""

    is_here = False
    gpus: int | None
    cpus: int

    @property
    @abstractmethod
    def name(self) -> str:
        """How commands call it."""

    @abstractmethod
    def check(self, scale: str, overrides: Sequence[str]) -> None:
        """Check that the cluster is there and has room, before any work.

        Raises:
            ValueError: it is not so; the message says what to do.
        """

    @abstractmethod
    def open(
        self, *, gpus: int, limit: int | None, environment: Mapping[str, str], logs: Path, name: str
    ) -> Elsewhere:
        """Return the cluster, for a ``with`` block; arguments as of `Elsewhere`."""

    def gpus_of(self, scale: str, overrides: Sequence[str]) -> int:
        """Return the GPUs of a run: one device, or none where it is told to train on the CPU."""
        if self.gpus is not None:
            return self.gpus
        return 0 if runs_on_cpu(scale, overrides) else 1

    def allot(
        self,
        workers: str,
        scale: str,
        overrides: Sequence[str],
        num_jobs: int,
        planned: Callable[[], int | None] = lambda: None,
    ) -> Allotment:
        """Return how many runs the cluster is given at once, and their environment.

        Args:
            workers: a number of 1 or more, or ``auto``: all that can be done.
            scale: scale of the runs.
            overrides: overrides of every run.
            num_jobs: number of runs.
            planned: not asked: a run has a device of its own.

        Raises:
            ValueError: `workers` is neither.
        """
        number = self.limit(parse_workers(workers))
        gpus = self.gpus_of(scale, overrides)
        environment = cluster_environment(scale, gpus=gpus, cpus=self.cpus)
        most = "as many at once as it has room for" if number is None else f"{number} at a time"
        device = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "no GPU"
        cores = f"{self.cpus} core{'s' if self.cpus > 1 else ''}"
        text = f"on {self.name}, {most}; {device} and {cores} for each run"
        count = max(1, min(number or 1, num_jobs))
        environments = tuple(dict(environment) for _ in range(count))
        return Allotment(environments, text, is_open=number is None, gpus=gpus)

    def limit(self, number: int | None) -> int | None:
        """Return how many runs the cluster is given at most; None: as many as there are.

        Args:
            number: what the command was told; None: nothing.
        """
        return number

    def refusal(self, scale: str, overrides: Sequence[str]) -> str | None:
        """Return why runs of `scale` with `overrides` cannot be made, or None."""
        if scale != "paper" or runs_on_cpu(scale, overrides) or self.gpus_of(scale, overrides):
            return None
        return (
            "scale=paper needs a CUDA device, and launcher.gpus=0 asks for none; use "
            "launcher.gpus=1, or trainer.device=cpu to train on CPUs (the paper's models: weeks)"
        )

    def pool(self, allotment: Allotment, logs: Path, name: str) -> Elsewhere:
        """Return the cluster, for a ``with`` block.

        Args:
            allotment: from `allot`.
            logs: folder for what the runs print.
            name: start of the names of their logs.
        """
        return self.open(
            gpus=allotment.gpus,
            limit=None if allotment.is_open else len(allotment.environments),
            environment=allotment.environments[0],
            logs=logs,
            name=name,
        )


def names() -> list[str]:
    """Return the names that `load` knows."""
    return [LOCAL, *sorted(path.stem for path in FOLDER.glob("*.yaml"))]


def load(name: str, options: str = "") -> Here | Launcher:
    """Return a launcher.

    Args:
        name: of `names`.
        options: values in place of those of its file, such as ``partition=gpu time=24:00:00``.

    Raises:
        ConfigError: name, option or value is not known or not allowed.
    """
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    known = names()
    if name not in known:
        raise ConfigError(f"launcher={name!r}: {near(name, known)}known: {', '.join(known)}")
    given = parse_options(options)
    if name == LOCAL:
        if given:
            raise ConfigError(
                f"{options!r}: launcher={LOCAL} has no options; use a cluster "
                f"({', '.join(known[1:])}), or --workers (WORKERS= with make)"
            )
        return Here()
    config = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"), resolve=True)
    assert isinstance(config, dict)
    keys = sorted(key for key in map(str, config) if key != "_target_")
    for key in given:
        if key not in keys:
            raise ConfigError(
                f"launcher={name} has no option {key!r}; {near(key, keys)}known: {', '.join(keys)}"
            )
    with as_config_error():
        launcher: Launcher = instantiate({**config, **given}, _convert_="all")
    return launcher


def parse_options(text: str) -> dict[str, str | int | None]:
    """Return options such as ``gpus=1 time=24:00:00 account=null`` by name; numbers are whole.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        parts = [part.partition("=") for part in shlex.split(text)]
    except ValueError as error:
        raise ConfigError(f"cannot read the launcher's options {text!r}: {error}") from error
    for key, separator, _ in parts:
        if not separator:
            raise ConfigError(f"{key!r} is no option of a launcher; write name=value, as in gpus=1")
    return {key: _value_of(value) for key, _, value in parts}


def _value_of(text: str) -> str | int | None:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return None if text == "null" else text


def parse_memory(text: str | None) -> int | None:
    """Return a memory such as ``32G`` or ``500M`` in bytes; None for None.

    Raises:
        ValueError: it is no such text.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)([MGT])B?", text)
    if found is None:
        raise ValueError(
            f"launcher.memory={text!r} is no memory; write a whole number with M, G or T, such as "
            "32G"
        )
    return int(found[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[found[2]]
