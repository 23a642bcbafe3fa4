"""Runs of seconds that are killed, limited and continued, and what a straight run gives."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.tiny.bpe import train_tokenizer
from tests.faults.tally import Tally
from tests.faults.warm import RUN, Command, Ended, Warm
from tests.smoke.conftest import SMALL

#: where a case has the folder of the tokenizer that the bench makes.
TOKENIZER = "<tokenizer>"
#: a run that evaluates, scores and keeps its best epoch.
GLUE = (
    "experiment=glue/cola", "logger=none", "scale=paper", "task.source=embedded",
    "model.init=random", f"model.tokenizer_path={TOKENIZER}",
    "+model.architecture.hidden_size=16", "+model.architecture.num_hidden_layers=1",
    "+model.architecture.num_attention_heads=2", "+model.architecture.intermediate_size=16",
    "model.architecture.vocab_size=300", "model.architecture.max_position_embeddings=80",
    "task.embedded_sizes={train:24,validation:12}", "trainer.max_steps=9", "trainer.batch_size=8",
    "trainer.device=cpu", "trainer.num_threads=1", "trainer.log_every_steps=1",
    "trainer.checkpoint_every_steps=2", "method=delta_lora", "method.start_step=2",
    "method.learning_rate=0.01",
)  # fmt: skip
_E2E = {
    "delta_lora": ("method=delta_lora",),
    "closed_form": ("method=delta_lora", "method.form=closed_form"),
    "lora": ("method=lora",),
    "adalora": ("method=adalora",),
    "dylora": ("method=dylora",),
}
#: overrides of every kind of run.
CASES: dict[str, tuple[str, ...]] = {
    **{name: (*SMALL, *more) for name, more in _E2E.items()},
    "glue, best epoch": GLUE,
}
#: what a repetition gives again to the bit; see `digest`.
RESULTS = (
    "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl",
    "predictions.jsonl", "record.json", "item_spread.json",
)  # fmt: skip


@dataclass(frozen=True)
class Straight:
    """A run that nothing happened to.

    Attributes:
        overrides: of the run, without its folder.
        outputs: where it is.
        seconds: how long it took.
        events: its writing events.
    """

    overrides: tuple[str, ...]
    outputs: Path
    seconds: float
    events: list[str]

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return folder_in(self.outputs)

    @property
    def bases(self) -> list[Path]:
        """The folder of the run that pre-trained its model; none where it is random."""
        return [p for p in _runs(self.outputs) if p.name.startswith("pretraining")]


class Bench:
    """Makes straight runs once, and others beside them.

    Args:
        warm: runs the commands.
        place: an empty folder.
    """

    def __init__(self, warm: Warm, place: Path) -> None:
        self.warm, self.place = warm, place
        self._straight: dict[str, Straight] = {}
        self._numbers = itertools.count()

    def straight(self, name: str) -> Straight:
        """Return the straight run of a case of `CASES`."""
        if name not in self._straight:
            overrides = tuple(o.replace(TOKENIZER, str(self._tokenizer())) for o in CASES[name])
            outputs = self.place / f"straight-{len(self._straight)}"
            first = self.run(overrides, outputs)  # with its pre-training
            assert first.code == 0, first.output
            run = folder_in(outputs)
            shutil.rmtree(run)
            again = self.run(overrides, outputs)
            assert again.code == 0, again.output
            self._straight[name] = Straight(overrides, outputs, again.seconds, again.events)
        return self._straight[name]

    def _tokenizer(self) -> Path:
        folder = self.place / "tokenizer"
        if not folder.exists():
            made = train_tokenizer(
                ["the cook of the old inn serves a fair meal"] * 20, vocab_size=300
            )
            made.model_max_length = 64
            made.save_pretrained(folder)
        return folder

    def fresh(self, straight: Straight) -> Path:
        """Return a new folder of outputs in which the model is pre-trained already."""
        outputs = self.place / f"run-{next(self._numbers)}"
        outputs.mkdir()
        for base in straight.bases:
            (outputs / base.name).symlink_to(base)
        return outputs

    def command(self, overrides: Sequence[str], outputs: Path) -> Command:
        """Return the command of a run in a folder of outputs."""
        return Command((*overrides, f"paths.outputs={outputs}"), RUN, watch=str(outputs))

    def run(self, overrides: Sequence[str], outputs: Path, **faults: object) -> Ended:
        """Run a command line with faults; see `Command`."""
        return self.warm.run(replace(self.command(overrides, outputs), **faults))  # type: ignore[arg-type]

    def finish(
        self, straight: Straight, outputs: Path, tally: Tally, part: str, number: int, how: str
    ) -> None:
        """Give the command again without faults; count and check what comes of it.

        Args:
            straight: what it must be the same as.
            outputs: where faults were injected.
            tally: gets the outcome, with the number of faults.
            part: of the tally.
            number: of faults.
            how: what to type to have them again.
        """
        ended = self.run(straight.overrides, outputs)
        outcome, what = "right", ""
        if ended.code != 0:
            outcome, what = outcome_of(ended), ended.output
        elif digest(folder_in(outputs)) != digest(straight.folder):
            mine, theirs = digest(folder_in(outputs)), digest(straight.folder)
            differing = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
            outcome, what = "silent", f"not as in {straight.folder}: {differing}"
        tally.add(part, outcome, number)
        assert outcome == "right", f"{what}\nto repeat:\n{how}\n{self.command((), outputs)}"
        shutil.rmtree(outputs)


def outcome_of(ended: Ended) -> str:
    """Return how a command with an error ended, in the words of the tally."""
    if ended.hung:
        return "hang"
    return "traceback" if ended.has_traceback else "clear error"


def digest(folder: Path) -> dict[str, str]:
    """Return what is in a run folder: every file, with a checksum of those of `RESULTS`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_result = name in RESULTS and path.is_file()
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if is_result else ""
    return found


def unfinished(folder: Path) -> list[str]:
    """Return what is half written in a folder."""
    found = (p for p in folder.rglob("*") if p.name.startswith(".writing-") or ".tmp" in p.name)
    return sorted(path.relative_to(folder).as_posix() for path in found)


def folder_in(outputs: Path) -> Path:
    """Return the folder of the one run in a folder of outputs that is no pre-training."""
    (found,) = [p for p in _runs(outputs) if not p.name.startswith("pretraining")]
    return found


def _runs(outputs: Path) -> Iterator[Path]:
    for path in sorted(outputs.iterdir()):
        if "--seed" in path.name:
            yield path
