"""Weights & Biases as a mirror of a run, in a process of its own.

The mirror is a reader: a child process (`delta_lora.wandb_writer`) follows the files of the run
folder, from their beginning, and tells wandb. So a run that was interrupted is mirrored whole when
it goes on, and nothing of wandb (a dead service, a network that hangs, its exit hooks) is in the
process that trains. That one says through a pipe when to read and how the run ended (silence: it
was killed), hears the child's complaints, and waits at the end, at most `PATIENCE_S` over all runs
of the process.

What cannot be reached online is written offline, and what cannot be written is left out; both with
one warning, and for the rest of the process.

What is not set here is taken from the variables of wandb: ``WANDB_MODE``, ``WANDB_DISABLED``,
``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_DIR``, ``WANDB_RUN_GROUP``, ``WANDB_JOB_TYPE``,
``WANDB_NAME`` and ``WANDB_TAGS`` (which are added to the run's own). ``WANDB_RUN_ID`` is not: the
id is the run's name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import netrc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from delta_lora.checks import NOT_EMPTY, Matches, OneOf, check_choice, check_values
from delta_lora.runlog import warn_once

if TYPE_CHECKING:
    from delta_lora.protocols import MetricSpec

logger = logging.getLogger(__name__)

PROJECT = "delta-lora"
MODES = ("auto", "online", "offline", "disabled")
#: what the words of WANDB_MODE mean.
ENVIRONMENT_MODES = {
    "online": "online", "run": "online", "shared": "online",
    "offline": "offline", "dryrun": "offline", "disabled": "disabled",
}  # fmt: skip
#: names that wandb takes.
WORD = Matches(r"(?!\s)[^/\\#?%:]{1,128}", "a name without any of / \\ # ? % :")
#: seconds that the runs of a process may wait for mirrors in trouble, all together.
PATIENCE_S = 20.0
#: seconds that a connection may take, and the upload of what is left at the end.
INIT_TIMEOUT_S = 8.0
FINISH_TIMEOUT_S = 8.0
#: variables that the child does not see, since its arguments decide.
HIDDEN = ("WANDB_MODE", "WANDB_DISABLED", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SERVICE")
#: wandb takes no longer names and tags.
MAX_NAME, MAX_TAG = 128, 64


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a mirror shows of a run besides the curves in its folder.

    Attributes:
        folder: of the run.
        outputs: where wandb's files go unless ``WANDB_DIR`` says otherwise.
        id: one name, one run: what is mirrored again takes the place of what was there.
        name: for people.
        group: what runs that differ in their seed share.
        job_type: ``train`` or ``pretrain``.
        tags: what people filter by.
        config: JSON values.
        metrics: of the task; scores are shown in the units of the tables.
        summary: further values of the summary.
        media: pictures (png) and tables (csv) to show, by their names.
    """

    folder: Path
    outputs: Path
    id: str
    name: str
    group: str
    job_type: str
    tags: Sequence[str]
    config: Mapping[str, Any]
    metrics: Sequence[MetricSpec] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    media: Mapping[str, Path] = field(default_factory=dict)


@dataclass
class _Process:
    """What the mirrors of this process have come to.

    Attributes:
        best: the best mode that is still tried.
        patience_s: seconds that may still be waited.
    """

    best: str = "online"
    patience_s: float = PATIENCE_S


_process = _Process()


def be_patient() -> None:
    """Wait as long as it takes: for a command whose whole work is to mirror."""
    global INIT_TIMEOUT_S, FINISH_TIMEOUT_S
    INIT_TIMEOUT_S, FINISH_TIMEOUT_S, _process.patience_s = 60.0, 300.0, 3600.0


def run_id(name: str) -> str:
    """Return the id that wandb has for the run called `name`."""
    return re.sub(r"[/\\#?%:]", "-", name)[:MAX_NAME]


class WandbMirror:
    """Mirrors a run to Weights & Biases.

    Args:
        project: wandb project; None takes ``WANDB_PROJECT``, or ``delta-lora``.
        entity: wandb entity; None takes ``WANDB_ENTITY``, or the account's default.
        mode: ``auto`` (online where a key is configured, else offline), ``online``, ``offline`` or
            ``disabled``; None takes ``WANDB_DISABLED`` and ``WANDB_MODE``, or ``auto``.
        tags: more tags than the run's own; None takes ``WANDB_TAGS``.

    Raises:
        ValueError: unknown `mode` or ``WANDB_MODE``; `mode` is ``online`` without a key.
        TypeError: a value of another type.
    """

    def __init__(
        self,
        *,
        project: Annotated[str | None, WORD] = None,
        entity: Annotated[str | None, WORD] = None,
        mode: Annotated[str | None, OneOf(MODES)] = None,
        tags: Sequence[Annotated[str, NOT_EMPTY]] | None = None,
    ) -> None:
        check_values(WandbMirror.__init__, locals(), prefix="logger.")
        environment = os.environ
        self._project = project or environment.get("WANDB_PROJECT") or PROJECT
        self._entity = entity or environment.get("WANDB_ENTITY") or None
        if tags is None:
            tags = [tag.strip() for tag in environment.get("WANDB_TAGS", "").split(",")]
        self._tags = [tag for tag in tags if tag]
        self._mode = _mode_of(environment) if mode is None else mode
        check_choice("logger.mode", self._mode, MODES)
        problem = key_problem(environment)
        if mode == "online" and problem is not None:
            raise ValueError(
                f"logger.mode=online, but {problem}; run `wandb login` or set WANDB_API_KEY, or "
                "use logger.mode=offline"
            )
        self._child: _Child | None = None
        #: where the last run went: ``online``, ``offline``, or None where it went nowhere.
        self.written: str | None = None

    def begin(self, run: RunFacts) -> None:
        """Start to mirror `run`; nothing is read before the first `log`."""
        mode = self._mode_now(run)
        if mode == "disabled":
            return
        environment = os.environ
        own = [tag[:MAX_TAG] for tag in dict.fromkeys([*run.tags, *self._tags])]
        self._child = _Child(
            mode,
            {
                "folder": str(run.folder),
                "parent": os.getpid(),
                "init": {
                    "project": self._project,
                    "entity": self._entity,
                    "dir": environment.get("WANDB_DIR") or str(run.outputs),
                    "id": run_id(run.id),
                    "name": (environment.get("WANDB_NAME") or run.name)[:MAX_NAME],
                    "group": (environment.get("WANDB_RUN_GROUP") or run.group)[:MAX_NAME],
                    "job_type": environment.get("WANDB_JOB_TYPE") or run.job_type,
                    "tags": own,
                    "config": dict(run.config),
                },
                "scales": {spec.name: spec.scale for spec in run.metrics},
                "best": {spec.name: spec.higher_is_better for spec in run.metrics},
                "summary": dict(run.summary),
                "media": {name: str(path) for name, path in run.media.items()},
                "init_timeout_s": INIT_TIMEOUT_S,
                "finish_timeout_s": FINISH_TIMEOUT_S,
            },
        )

    def _mode_now(self, run: RunFacts) -> str:
        """Return the mode in which `run` is mirrored, as far as can be told without a network."""
        mode = self._mode
        if mode in ("auto", "online"):
            problem = key_problem(os.environ)
            if problem is None:
                mode = _process.best
            elif mode == "auto" and problem == NO_KEY:
                logger.info("no wandb key: offline files in %s", run.outputs / "wandb")
                mode = "offline"
            else:
                warn_once(f"Weights & Biases is written offline: {problem}; run `wandb login`")
                mode = "offline"
        return "disabled" if _process.best == "disabled" else mode

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Let the child read what is in the run folder, from now on."""
        if self._child is not None:
            self._child.read()

    def close(self, status: str, error: str = "") -> None:
        """Let the child read to the end and finish; wait for it while there is patience."""
        if self._child is not None:
            self._child.close({"status": status, "error": redacted(error)})
            self.written = self._child.mode
            self._child = None


class _Child:
    """The process that talks to wandb.

    Args:
        mode: ``online`` or ``offline``.
        spec: all that it needs to know; JSON values.

    Attributes:
        mode: the one that it has come to, None where it failed.
    """

    def __init__(self, mode: str, spec: Mapping[str, Any]) -> None:
        self.mode: str | None = mode
        environment = {key: value for key, value in os.environ.items() if key not in HIDDEN}
        root = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [root, environment.get("PYTHONPATH")])
        )
        self._reads = False
        self._heard = b""
        self._has_problem = False
        read_end, self._words = os.pipe()
        with tempfile.TemporaryFile() as file, contextlib.closing(os.fdopen(read_end)):
            file.write(json.dumps(spec).encode())
            file.seek(0)
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", "delta_lora.wandb_writer", mode, str(read_end)],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=[read_end],
                start_new_session=True,  # Ctrl-C is for the run, which then tells the mirror
                bufsize=0,
            )
        assert self._process.stdout is not None
        self._reports = self._process.stdout
        os.set_blocking(self._reports.fileno(), False)

    def read(self) -> None:
        """Let it begin to read, once; hear what it has to say."""
        if not self._reads:
            self._reads = True
            self._say({"read": True})
        self._hear()

    def close(self, end: Mapping[str, Any]) -> None:
        """Say how the run ended, and wait."""
        self._say({"read": True})
        self._say({"end": dict(end)})
        os.close(self._words)
        began = time.monotonic()
        try:
            self._process.wait(timeout=max(0.0, _process.patience_s))
            self._hear()
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._hear()
            self._complain("offline", "it did not finish in time")
        if self._process.returncode != 0 and not self._has_problem:
            self._complain("offline", f"its process ended with {self._process.returncode}")
        self._reports.close()
        if self._has_problem:
            _process.patience_s -= time.monotonic() - began

    def _say(self, word: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is gone; `close` says so
            os.write(self._words, json.dumps(word).encode() + b"\n")

    def _hear(self) -> None:
        """Pass on what it reported."""
        while chunk := self._reports.read(65536):
            self._heard += chunk
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            report = json.loads(line)
            self._complain(report["mode"], report["problem"])

    def _complain(self, mode: str, problem: str) -> None:
        """Warn that a mode does not work, and do not try it again in this process."""
        self._has_problem = True
        problem = redacted(problem)
        self.mode = "offline" if mode == "online" else None
        if mode == "online":
            _process.best = "offline"
            warn_once(
                f"Weights & Biases cannot be reached: {problem}. Runs go to offline files "
                "(`wandb sync` uploads them); training goes on"
            )
        else:
            _process.best = "disabled"
            warn_once(
                f"Weights & Biases gets nothing more from this process: {problem}. Training goes "
                "on, and metrics.jsonl has every value"
            )


# ---------------------------------------------------------------------- settings


def _mode_of(environment: Mapping[str, str]) -> str:
    """Return what WANDB_DISABLED and WANDB_MODE ask for."""
    if environment.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on"):
        return "disabled"
    word = environment.get("WANDB_MODE", "").strip().lower()
    if not word:
        return "auto"
    return ENVIRONMENT_MODES[check_choice("WANDB_MODE", word, tuple(ENVIRONMENT_MODES))]


# ---------------------------------------------------------------------- the key

NO_KEY = "no key is configured"


def key_problem(environment: Mapping[str, str]) -> str | None:
    """Return what is wrong with the configured key, by its form alone, or None."""
    if environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    key = _key(environment)
    if key is None:
        return NO_KEY
    if re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", key):  # a signed token
        return None
    secret = key.partition("-")[2] or key  # a company's server puts a word before it
    if not re.fullmatch(r"[\w-]+", secret):
        return "the key has characters that no key has"
    if len(secret) < 40:
        return f"the key has {len(secret)} characters, and a key has at least 40"
    return None


def redacted(text: str) -> str:
    """Return a message in one line, without the key, cut to a readable length."""
    key = _key(os.environ)
    if key is not None:
        text = text.replace(key, "***")
    return " ".join(text.split())[:400]


def _key(environment: Mapping[str, str]) -> str | None:
    """Return the key of the environment, or the one that `wandb login` stored."""
    if environment.get("WANDB_API_KEY"):
        return environment["WANDB_API_KEY"].strip()
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        found = netrc.netrc(environment.get("NETRC") or None).hosts
    except (OSError, netrc.NetrcParseError):
        return None
    named = found.get(host) or next((v for k, v in found.items() if "wandb" in k), None)
    return None if named is None else named[2] or None
