"""Execute one run from its configuration to its record: build, fit, score, write."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf

from delta_lora import processes, writing
from delta_lora.result import PrunedError
from delta_lora.runlog import Guarded
from delta_lora.stored import UnreadableError
from scripts.runs import checksums, item_spread
from scripts.runs.building import Built, build, describe_method, load_task
from scripts.runs.checks import check, check_sources
from scripts.runs.composition import ConfigError
from scripts.runs.folder import (
    ADAPTER,
    RECORD,
    clear,
    finish,
    lock,
    predict,
    remove_served,
    tidy,
)
from scripts.runs.mirroring import mirror_of, write_references
from scripts.runs.own_files import own_files
from scripts.runs.recording import Scored, record_of, write_failure, write_pruned
from scripts.runs.run import Run
from scripts.runs.starts import read_start
from scripts.runs.weights import label
from scripts.runs.workers import COMMAND_BEGAN, cells_on_device

#: says by the evaluations so far why a run is given up, or None.
Prune = Callable[[Sequence[dict[str, float]]], str | None]

logger = logging.getLogger(__name__)


def execute(run: Run, *, wait: bool = True, prune: Prune | None = None) -> dict[str, Any]:
    """Execute a run, or continue it, or return its record if it is done.

    Args:
        run: the run.
        wait: wait for another process in the same folder instead of failing.
        prune: gives the run up at an evaluation, as in `delta_lora.trainer.Trainer.fit`. Its record
            then says ``pruned``, and asking again without it continues the run.

    Returns:
        The record (in processes of a distributed run other than the main one: an empty dict).

    Raises:
        ConfigError: the input is wrong; nothing was written.
        UnreadableError: a file of its folder is damaged, or of another run; nothing was written.
        LockedError: another process works in the run folder.
        WriteError: a file cannot be written; asking again continues the run.
        Exception: whatever stopped the run; the record then says ``failed`` and why.
    """
    if _is_done(run):
        return _known(run)
    check(run)
    check_sources(run, set())  # before data are read and tokens made
    is_main = processes.is_main()
    with lock(run.folder, wait=wait) if is_main else contextlib.nullcontext():
        if _is_done(run):  # another process finished it while this one waited
            return _known(run)
        if run.status().state == "stale":
            clear(run.folder)
        tidy(run.folder)
        checksums.check_places(run.folder)
        (run.folder / RECORD).unlink(missing_ok=True)  # of an attempt that failed or was pruned
        try:
            return _execute(run, is_main=is_main, prune=prune)
        except (ConfigError, UnreadableError):
            raise
        except PrunedError as stop:
            return write_pruned(run, stop) if is_main else {}
        except Exception as error:
            if is_main:
                write_failure(run, error)
            raise


def _known(run: Run) -> dict[str, Any]:
    """Return the record of a run that is done, once its files are compared with it."""
    record = checksums.check_files(run.folder)
    if processes.is_main():
        remove_served(run.folder, record)
    return record


def _is_done(run: Run) -> bool:
    """Return whether a run is done.

    Raises:
        UnreadableError: its record is damaged.
    """
    now = run.status()
    if now.state == "damaged":
        raise UnreadableError(now.reason)
    return now.state == "done"


def attempt(run: Run, prune: Prune | None = None) -> dict[str, Any]:
    """Execute a run where no other process does.

    Returns:
        As `execute`.

    Raises:
        LockedError: another process works in the run folder.
        Exception: as `execute`.
    """
    return execute(run, wait=False, prune=prune)


def _execute(run: Run, *, is_main: bool, prune: Prune | None) -> dict[str, Any]:
    """Build, fit, score, write: the whole way of a run; arguments and errors as `execute`."""
    from delta_lora import memory

    memory.release()  # of the run that this process made before
    task = load_task(run.config)  # before anything expensive
    prepare([run])
    if run.start_run is not None:
        _ensure(run.start_run, f"first the run that this one starts from: {run.start_run.folder}")
    built = build(run, task, read_start(run))
    _log_start(run, built)
    own = own_files(run.config)  # as they are now, before hours of training
    if is_main:
        text = OmegaConf.to_yaml(run.config, resolve=True)
        writing.write_text(run.folder / "config.yaml", text)
    with _mirrored(run, task, is_main=is_main) as mirrors:
        fitted = _fit(run, built, mirrors, prune)
        adapter = _write_adapter(run, built, fitted.chosen_step) if is_main else None
        scored = _score(run, built, adapter, is_main=is_main)
        if not is_main:
            return {}
        record = {**record_of(run, built, fitted, scored, own), "adapter_sha256": adapter}
        if run.config.save_model:
            record["model"]["saved_weights_sha256"] = _save_model(run, built)
        resources = {**fitted.resources, **scored.resources}
        finish(run.folder, record, resources, scored.item_spread)
        return run.record()


# ---------------------------------------------------------------------- what comes before


def prepare(runs: Sequence[Run]) -> None:
    """Pre-train, once, the models that the runs need and that do not exist yet."""
    needed = {run.pretraining.name: run for run in runs if run.pretraining is not None}
    for run in needed.values():
        assert run.pretraining is not None
        folder = run.pretraining.folder
        _ensure(run.pretraining, f"pre-training {run.config.model.name} (once; kept in {folder})")


def _ensure(run: Run, message: str) -> None:
    """Execute `run` unless it is done.

    Raises:
        RuntimeError: it failed earlier in the same command, which does not try it again.
    """
    now = run.status()
    if now.state == "done":
        return
    began = float(os.environ.get(COMMAND_BEGAN, "inf"))
    if now.state == "failed" and (run.folder / RECORD).stat().st_mtime >= began:
        raise RuntimeError(f"the run that this one starts from failed: {now.reason}")
    logger.info(message)
    execute(run)
    while not processes.is_main() and not run.is_done:
        time.sleep(0.2)  # the main process is still writing


# ---------------------------------------------------------------------- fit


def _fit(run: Run, built: Built, mirrors: list[Any], prune: Prune | None) -> Any:
    """Train the model of a run, from its newest checkpoint on; return what came of it."""
    task = built.task
    return built.trainer.fit(
        built.model,
        method=built.method,
        task=task,
        train=built.train,
        validation=built.validation,
        seed=run.seed,
        folder=run.folder,
        mirrors=mirrors,
        identity=_identity(run, built),
        score=None if task.selection_metric is None else _validation_score(task, built.tokenizer),
        prune=prune,
    )


def _identity(run: Run, built: Built) -> dict[str, Any]:
    """Return what a checkpoint must agree on to be continued."""
    identity = {
        "run": run.name,
        "seed": run.seed,
        "base_weights_sha256": built.weights_sha256,
        "data": built.task.provenance(),
        "num_examples": len(built.train),
        "total_steps": built.total_steps,
    }
    if built.start is not None:
        identity["init_from"] = built.start.facts
    if run.config.train_fraction is not None:
        identity["train_fraction"] = run.config.train_fraction
    return identity


def _validation_score(task: Any, tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    """Return what scores a network on the validation split, each process its share of it."""

    def score(network: Any) -> dict[str, float]:
        chunks = task.predict(network, tokenizer, "validation", share=processes.share())
        own = [prediction for chunk in chunks for prediction in chunk]
        return task.score(processes.gather(own), "validation").values

    return score


# ---------------------------------------------------------------------- score


def _score(run: Run, built: Built, adapter: str | None, *, is_main: bool) -> Scored:
    """Predict the scored split on merged weights, each process its share, and score it.

    Args:
        run: the run.
        built: after its training.
        adapter: checksum of what it trained; None in processes other than the main one.
        is_main: whether this is the main process.
    """
    from delta_lora.analysis import similarity
    from delta_lora.finite import check_values
    from delta_lora.protocols import Scores

    task, predictions, analysis = built.task, [], {}
    split = task.scored_split
    began = time.monotonic()
    with built.method.merged(built.model) as merged:
        if is_main:
            analysis = similarity.cosine_similarities(built.originals, merged)
        if run.config.predict:
            origin = {"run": run.name, "adapter_sha256": adapter}
            predictions = predict(task, merged, built.tokenizer, run.folder, split, origin=origin)
    predicted = time.monotonic()
    scores = task.score(predictions, split) if predictions else Scores({}, {})
    check_values(scores.values, f"scoring the split {split}")
    is_asked = is_main and run.config.score_references
    references = task.reference_scores(split) if is_asked else {}
    ended = time.monotonic()
    spread = item_spread.measure(task, predictions, run.folder) if predictions else None
    return Scored(
        scores=scores,
        references=references,
        item_spread=spread,
        similarity=analysis,
        num_predictions=len(predictions),
        resources={
            "predict_time_s": predicted - began,
            "cells_on_device": cells_on_device(),  # neighbours spoil the times
            "score_time_s": ended - predicted,
            "item_spread_time_s": time.monotonic() - ended,
        },
    )


# ---------------------------------------------------------------------- write


def _write_adapter(run: Run, built: Built, step: int) -> str:
    """Write every parameter that the run changed; return their checksum."""
    from delta_lora import adapter_file

    return adapter_file.write(
        (run.folder / ADAPTER).parent,
        built.method.updated_tensors(built.model),
        {
            "method": describe_method(run, built.method),
            "seed": run.seed,
            "base": built.base,
            "facts": built.method.describe(),
            "step": step,
        },
    )


def _save_model(run: Run, built: Built) -> str:
    """Write the whole model with its tokenizer; return the checksum of its weights."""
    from delta_lora.models import fingerprint

    folder = run.folder / "model"
    with writing.filling(folder) as temporary:
        built.model.save_pretrained(temporary)
        built.tokenizer.save_pretrained(temporary)
    return fingerprint(built.model)


def _log_start(run: Run, built: Built) -> None:
    parameters = built.parameters
    trainable, updatable = parameters["trainable"], parameters["updatable"]
    logger.info(
        "run %s: %s on %s, %s; trainable %s (%.3f x 2^20), updatable %s (%.3f x 2^20), base %s; "
        "%d examples, batch %d, %d steps",
        run.name, run.choices.method, run.choices.task, label(run.model_facts),
        f"{trainable:,}", trainable / 2**20, f"{updatable:,}", updatable / 2**20,
        f"{parameters['total']:,}", len(built.train), built.trainer.batch_size, built.total_steps,
    )  # fmt: skip


@contextlib.contextmanager
def _mirrored(run: Run, task: Any, *, is_main: bool) -> Iterator[list[Guarded]]:
    """Yield the mirrors of a run, and tell them how it ended."""
    if run.config.logger["_target_"] is None or not is_main:
        yield []
        return
    mirror = Guarded(lambda: mirror_of(run, task))
    try:
        yield [mirror]
    except KeyboardInterrupt as stop:
        mirror.close("stopped", str(stop))
        raise
    except PrunedError as stop:
        mirror.close("pruned", str(stop))
        raise
    except Exception as error:
        mirror.close("failed", f"{type(error).__name__}: {error}")
        raise
    if run.config.predict:
        with mirror.aside():
            write_references(task, run.folder)
    mirror.close("completed")
