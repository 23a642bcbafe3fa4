"""A damaged file gives the same results or a line that names it; never others, never a traceback.

Every file of a run folder is damaged in every way of `tests.faults.damage`: of a finished run, of a
model that the suite pre-trained, of a saved adapter, of a run that was killed.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import delta_lora
from delta_lora import checkpoint
from delta_lora.stored import UnreadableError, sealed
from delta_lora.trainer import Trainer
from scripts import reproduce, tables
from scripts.auditing.measurements import Measurement
from scripts.export import export
from scripts.runs import checksums, execution
from scripts.runs.building import base_model, build_tokenizer
from scripts.runs.composition import ConfigError
from scripts.runs.durations import Durations
from scripts.runs.folder import predict
from scripts.runs.run import Run
from scripts.runs.starts import read_start
from tests.choices import first
from tests.contract.models import CASES
from tests.faults.damage import (
    ALL,
    OF_BYTES,
    OF_JSON,
    Damage,
    NotApplicableError,
    copy,
    damages,
    rewrite,
)
from tests.faults.tally import Tally
from tests.smoke.conftest import SMALL
from tests.toy import ToyMethod, ToyTask, toy_model
from tests.unit import fake_runs

pytestmark = pytest.mark.faults
#: of so many damages `make test` tries one.
SOME = 8


def answer(work: Callable[[], Any], path: Path) -> Any:
    """Return what `work` gives, or None where it refuses the file `path` in one line."""
    try:
        return work()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    assert path.name in message
    assert "\n" not in message
    return None


# ---------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Run]]:
    """Return two finished runs of seconds, of two seeds."""
    outputs = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nonexistent")  # no Java, which takes long to start
        runs = [
            Run.compose([*SMALL, f"paths.outputs={outputs}", f"seed={s}", "method=lora"])
            for s in (1, 2)
        ]
        for run in runs:
            execution.execute(run)
        yield runs[0], runs[1]


def at(run: Run, outputs: Path) -> Run:
    """Return the same run with another folder of outputs."""
    config = run.config.copy()
    config.paths.outputs = str(outputs)
    moved = Run(config)
    moved.meaning = run.meaning
    return moved


RESULT_FILES = (
    "record.json", "resources.json", "item_spread.json", "metrics.jsonl", "measured.jsonl",
    "predictions.jsonl", "config.yaml", "adapter/*",
)  # fmt: skip


def test_every_damage_to_a_finished_run_is_refused_by_name_or_changes_nothing(
    finished: tuple[Run, Run], tmp_path: Path, thorough: bool, tally: Tally
) -> None:
    run, other = finished
    known = execution.execute(run)
    count, refused = 0, 0
    for damage in list(damages(run.folder, *RESULT_FILES))[:: 1 if thorough else SOME]:
        mine = at(run, tmp_path)
        copy(run.folder, mine.folder)
        try:
            path = damage.apply(mine.folder, other.folder)
        except NotApplicableError:
            continue
        found = answer(lambda mine=mine: execution.execute(mine), path)  # type: ignore[misc]
        assert found in (None, known), damage
        count, refused = count + 1, refused + (found is None)
        tally.add("damaged files of a finished run", "clear error" if found is None else "right")
    assert count > (90 if thorough else 10)
    assert refused > (80 if thorough else 7)


def test_every_damage_to_a_pre_trained_model_is_refused_by_name(
    finished: tuple[Run, Run], tmp_path: Path, thorough: bool, tally: Tally
) -> None:
    run, _ = finished
    source = run.pretraining.folder
    task = execution.load_task(run.config)
    count = 0
    for damage in list(damages(source, "record.json", "model/*"))[:: 1 if thorough else SOME]:
        mine = at(run, tmp_path)
        folder = copy(source, mine.pretraining.folder)
        try:
            path = damage.apply(folder)
        except NotApplicableError:
            continue

        def work(mine: Run = mine) -> Any:
            build_tokenizer(mine, task)
            return base_model(mine, task, ())

        found = answer(work, path)
        assert found is None, damage
        count += 1
        tally.add("damaged files of a pre-trained model", "clear error")
    assert count > (60 if thorough else 6)
    folder = copy(source, at(run, tmp_path).pretraining.folder)
    (folder / "model" / "added_tokens.json").write_text('{"more": 3}')
    with pytest.raises(ConfigError, match=r"added_tokens\.json is damaged \(the run has not"):
        build_tokenizer(at(run, tmp_path), task)


def test_a_run_starts_from_no_damaged_one(finished: tuple[Run, Run], tmp_path: Path) -> None:
    run, other = finished
    for kind in ("bit-flip", "of-another-run", "nan", "no-tensor"):
        folder = copy(run.folder, tmp_path / run.folder.name)
        start = run.config.copy()
        start.init_from = str(folder)
        path = Damage("adapter/adapter_model.safetensors", kind).apply(folder, other.folder)
        with pytest.raises(UnreadableError, match=str(path)):
            read_start(Run(start))


def test_a_killed_run_goes_on_from_what_is_whole_to_the_same_bits(
    finished: tuple[Run, Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed before its record, and then each of its files of another run at once."""
    run, other = finished
    mine = at(run, tmp_path)
    shutil.copytree(run.pretraining.folder, mine.pretraining.folder)
    folder = copy(run.folder, mine.folder)
    (folder / "record.json").unlink()
    names = ["predictions.jsonl", "predictions.partial.jsonl", "metrics.jsonl", "measured.jsonl"]
    names += ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    for name in names:
        Damage(name, "of-another-run").apply(folder, other.folder)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    shutil.copytree(other.folder / "checkpoints" / newest.name, newest)
    found = execution.execute(mine)
    for name in (
        "predictions.jsonl",
        "metrics.jsonl",
        "record.json",
        "adapter/adapter_config.json",
    ):
        assert (folder / name).read_bytes() == (run.folder / name).read_bytes(), name
    assert found["metrics"] == run.record()["metrics"]
    assert f"checkpoint {newest} belongs to another run (run: {other.name} then" in caplog.text
    assert f"{folder / 'predictions.partial.jsonl'}, line 1 is damaged" in caplog.text
    assert f"{folder / 'metrics.jsonl'} is damaged" in caplog.text


@pytest.mark.parametrize("missing", [{}, {"meteor": "Java not found"}])
def test_what_a_kill_behind_the_record_left_is_removed_where_nothing_needs_it(
    missing: dict[str, str],
    finished: tuple[Run, Run],
    tmp_path: Path,
) -> None:
    mine = at(finished[0], tmp_path)
    folder = copy(finished[0].folder, mine.folder)
    kept = [folder / "checkpoints", folder / "best", folder / "predictions.partial.jsonl"]
    for path in kept[:2]:
        path.mkdir(exist_ok=True)
    kept[2].write_text("")
    rewrite(folder / "record.json", lambda record: record.update(missing_metrics=missing))
    assert execution.execute(mine)["missing_metrics"] == missing
    assert [path.exists() for path in kept] == [bool(missing)] * 3


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "adapter", "config.yaml"])
def test_what_stands_in_the_place_of_another_kind_is_named(
    name: str, finished: tuple[Run, Run], tmp_path: Path
) -> None:
    mine = at(finished[0], tmp_path)
    folder = copy(finished[0].folder, mine.folder)
    (folder / "record.json").unlink()
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(UnreadableError, match=rf"{path} is damaged \(a (file|folder) instead of"):
        execution.execute(mine)


def test_export_writes_nothing_of_a_damaged_run(finished: tuple[Run, Run], tmp_path: Path) -> None:
    run, other = finished
    for kind in ("bit-flip", "of-another-run", "nan", "missing-tensor", "folder"):
        folder = copy(run.folder, tmp_path / run.folder.name)
        Damage("adapter/adapter_model.safetensors", kind).apply(folder, other.folder)
        with pytest.raises((ValueError, FileNotFoundError), match="adapter"):
            export(folder, tmp_path / "export")
        assert not (tmp_path / "export").exists()


def test_the_adapter_of_another_run_is_not_loaded_beside_a_record(
    finished: tuple[Run, Run], tmp_path: Path
) -> None:
    run, other = finished
    folder = copy(run.folder, tmp_path / run.folder.name)
    shutil.rmtree(folder / "adapter")
    shutil.copytree(other.folder / "adapter", folder / "adapter")
    with pytest.raises(ValueError, match=r"record\.json has another adapter_sha256"):
        delta_lora.load(folder, base=run.pretraining.folder / "model")


# ---------------------------------------------------------------------- an adapter


def test_every_damage_to_a_saved_adapter_is_refused_or_changes_nothing(
    tmp_path: Path, tally: Tally
) -> None:
    settings = {"rank": 2, "alpha": 4, "update_ratio": 2.0, "start_step": -1}
    ids = torch.arange(6)[None]

    def logits(adapter: Any) -> torch.Tensor:
        with torch.no_grad():
            return adapter.model(input_ids=ids).logits

    for seed in (1, 2):
        adapter = delta_lora.attach(
            CASES["gpt2"].model(), method="delta_lora", seed=seed, **settings
        )
        for parameter in adapter.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01 * seed
        adapter.save(tmp_path / str(seed))
    sound, other = tmp_path / "1", tmp_path / "2"
    known = logits(delta_lora.load(sound, base=CASES["gpt2"].model()))
    count = 0
    for damage in damages(sound, "*"):
        folder = copy(sound, tmp_path / "damaged")
        try:
            path = damage.apply(folder, other)
        except NotApplicableError:
            continue

        def work(folder: Path = folder) -> Any:
            return logits(delta_lora.load(folder, base=CASES["gpt2"].model()))

        found = answer(work, path)
        assert found is None or torch.equal(found, known), damage
        count += 1
        tally.add("damaged files of an adapter", "clear error" if found is None else "right")
    assert count > 25


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "holds infinite or undefined values, in "),
        ("missing-tensor", r"it lacks \S+lora_"),
        ("no-tensor", r"it lacks \S+lora_\S+ and \d+ more"),
        ("other-shape", r"has the shape \(32, 1\), not \(2, 16\)"),
    ],
)
def test_tensors_are_compared_with_the_method_even_where_checksums_agree(
    kind: str, message: str, tmp_path: Path
) -> None:
    adapter = delta_lora.attach(CASES["gpt2"].model(), method="lora", rank=2, alpha=4)
    adapter.save(tmp_path)
    path = Damage("adapter_model.safetensors", kind).apply(tmp_path)
    description = json.loads((tmp_path / "adapter_config.json").read_text())
    description["tensors_sha256"] = checkpoint.sha256_file(path)
    del description["sha256"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message) as caught:
        delta_lora.load(tmp_path, base=CASES["gpt2"].model())
    assert str(path) in str(caught.value)


# ---------------------------------------------------------------------- a training


def fit(folder: Path, seed: int = 1, stop_at: int | None = None) -> torch.Tensor:
    class Killed(ToyMethod):
        def after_step(self, step: int) -> None:
            super().after_step(step)
            if step == stop_at:
                raise ZeroDivisionError

    task, model, method = ToyTask(), toy_model(0.3), Killed()
    task.load()
    method.inject(model)
    Trainer(
        batch_size=8, num_epochs=3, warmup_steps=1, device="cpu", log_every_steps=2,
        checkpoint_every_steps=2,
    ).fit(
        model, method=method, task=task, train=task.examples("train"), validation=[], seed=seed,
        folder=folder, identity={"run": f"toy-{seed}", "seed": seed},
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_every_damage_to_a_killed_training_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, thorough: bool, tally: Tally
) -> None:
    for name, seed in (("killed", 1), ("other", 2)):
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path / name, seed, stop_at=9)
    straight = fit(tmp_path / "straight")
    log = (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    newest = sorted((tmp_path / "killed" / "checkpoints").iterdir())[-1].name
    count = 0
    tried = list(damages(tmp_path / "killed", f"checkpoints/{newest}/*", "*.jsonl"))
    for damage in tried[:: 1 if thorough else SOME]:
        folder = copy(tmp_path / "killed", tmp_path / "damaged")
        caplog.clear()
        try:
            path = damage.apply(folder, tmp_path / "other")
        except NotApplicableError:
            continue
        if damage.kind == "folder" and path.suffix == ".jsonl":  # `check_places` names it
            continue
        assert torch.equal(fit(folder), straight), damage
        assert (folder / "metrics.jsonl").read_bytes() == log, damage
        is_read = path.name != "measured.jsonl"
        assert not is_read or str(path.parent) in caplog.text or path.read_bytes() == log, damage
        count += 1
        tally.add("damaged files of a killed training", "right")
    assert count > (60 if thorough else 6)


@pytest.mark.parametrize("kind", first(["of-another-run", "{}", "[]", "empty", "schema-99"], 2))
def test_where_no_checkpoint_is_left_the_run_says_what_to_do(kind: str, tmp_path: Path) -> None:
    for name, seed in (("killed", 1), ("other", 2)):
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path / name, seed, stop_at=9)
    folder = tmp_path / "killed"
    for path in (folder / "checkpoints").iterdir():
        if kind == "of-another-run":
            shutil.rmtree(path)
            shutil.copytree(tmp_path / "other" / "checkpoints" / path.name, path)
        else:
            Damage(f"checkpoints/{path.name}/manifest.json", kind).apply(folder)
    with pytest.raises(checkpoint.NoneIntactError, match="delete that folder to train") as caught:
        fit(folder)
    assert str(folder / "checkpoints") in str(caught.value)


def test_foreign_names_among_checkpoints_are_passed_over(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "killed", stop_at=9)
    folder = tmp_path / "killed" / "checkpoints"
    newest = sorted(folder.iterdir())[-1]
    shutil.copytree(newest, folder / "step-00000099")
    (folder / "step-final").mkdir()
    (folder / "step-00000077").write_text("")
    assert torch.equal(fit(tmp_path / "killed"), fit(tmp_path / "straight"))


# ---------------------------------------------------------------------- predictions


class Reader:
    """A task that predicts one text an input."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.asked = stop_at, 0

    def inputs(self, split: str) -> list[str]:
        return [f"i{n}" for n in range(6)]

    def predict(self, model: Any, tokenizer: Any, split: str, done: Any, share: Any) -> Any:
        known = {p["id"] for p in done}
        for name in self.inputs(split):
            if name not in known:
                if self.asked == self.stop_at:
                    raise ZeroDivisionError
                self.asked += 1
                yield [{"id": name, "prediction": f"{name} is café 0.1", "score": 0.1}]


def test_every_damage_to_partial_predictions_is_predicted_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tally: Tally
) -> None:
    origins = {"killed": {"run": "a"}, "other": {"run": "b"}}
    for name, origin in origins.items():
        (tmp_path / name).mkdir()
        with pytest.raises(ZeroDivisionError):
            predict(Reader(4), None, None, tmp_path / name, "test", origin=origin)
    (tmp_path / "straight").mkdir()
    expected = predict(
        Reader(), None, None, tmp_path / "straight", "test", origin=origins["killed"]
    )
    text = (tmp_path / "straight" / "predictions.jsonl").read_bytes()
    for kind in ("none", *ALL):
        folder = copy(tmp_path / "killed", tmp_path / "damaged")
        caplog.clear()
        if kind not in ("none", "folder"):
            try:
                Damage("predictions.partial.jsonl", kind).apply(folder, tmp_path / "other")
            except NotApplicableError:
                continue
        task = Reader()
        found = predict(task, None, None, folder, "test", origin=origins["killed"])
        assert found == expected, kind
        assert (folder / "predictions.jsonl").read_bytes() == text, kind
        tally.add("damaged partial predictions", "right")
        if kind == "none":
            assert (task.asked, caplog.text) == (2, "")


def test_predictions_of_another_training_are_not_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        predict(Reader(4), None, None, tmp_path, "test", origin={"run": "a", "adapter_sha256": "1"})
    task = Reader()
    predict(task, None, None, tmp_path, "test", origin={"run": "a", "adapter_sha256": "2"})
    assert task.asked == 6


# ---------------------------------------------------------------------- many runs


@pytest.fixture
def table(outputs: Path, no_pictures: None) -> list[Run]:
    """Return the finished runs of Table 1 for one seed, of no length."""
    cells = reproduce.load_table("table1").cells(scale="tiny", seeds=[1], extra=[])
    runs = list({cell.signature: cell.run for cell in cells}.values())
    for run in runs:
        fake_runs.write(run, fake_runs.record(run), fake_runs.resources(run))
    return runs


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if kind in ("empty", "types") else [pytest.mark.long])
        for name in ("record.json", "resources.json")
        for kind in (*OF_BYTES, *OF_JSON)
        if kind not in ("digit", "bit-flip", "early-bit-flip")
        # Resources of earlier versions name no run and have no schema.
        and not (name == "resources.json" and kind in ("{}", "of-another-run", "schema-99"))
    ],
)
def test_a_damaged_record_costs_its_run_only(
    name: str,
    kind: str,
    table: list[Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tally: Tally,
) -> None:
    run, other = table[:2]
    path = Damage(name, kind).apply(run.folder, other.folder)
    arguments = ["table1", "--scale", "tiny", "--seeds", "1"]
    arguments += ["--results", str(tmp_path / "results")]
    assert reproduce.main([*arguments, "--plan"]) == 1
    assert str(path) in capsys.readouterr().out
    assert tables.main(arguments) == 1
    seen = capsys.readouterr()
    assert str(path) in seen.err
    content = json.loads((tmp_path / "results" / "tiny" / "table1.json").read_text())
    absent = [item for row in content["rows"] for item in row["absent"]]
    assert [item["state"] for item in absent] == ["damaged"] * len(absent)
    assert {item["signature"] for item in absent} == {run.name}
    assert run.status().state == "damaged"
    tally.add("damaged records beside others of a table", "clear error")


def test_a_foreign_record_beside_the_runs_tells_no_times_and_stops_nothing(
    table: list[Run], outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, text in enumerate(
        ["", "{}", "[]", '{"status": "completed"}', "\xff\x00", "[" * 9999]
    ):
        folder = outputs / f"foreign{number}"
        folder.mkdir()
        (folder / "record.json").write_text(text, encoding="latin-1")
    durations = Durations()
    durations.read([outputs])
    assert durations.expect(table[0]) is not None
    for number in range(6):
        assert f"foreign{number}/record.json" in caplog.text


def test_a_damaged_accepted_record_costs_its_cell_only(
    table: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted = tmp_path / "results" / "runs" / "tiny"
    accepted.mkdir(parents=True)
    for run in table:
        (accepted / f"{run.name}.json").write_text(json.dumps(run.record()))
        shutil.rmtree(run.folder)
    path = accepted / f"{table[0].name}.json"
    path.write_text(path.read_text()[:100])
    arguments = ["table1", "--scale", "tiny", "--seeds", "1"]
    assert tables.main([*arguments, "--results", str(tmp_path / "results")]) == 1
    assert f"left out: {path} is no run record" in capsys.readouterr().err


def test_records_without_checksums_are_read_without_a_word(
    finished: tuple[Run, Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = at(finished[0], tmp_path)
    folder = copy(finished[0].folder, mine.folder)
    drop = ("files", "sha256", "run")
    for name in ("record.json", "resources.json", "item_spread.json"):
        content = json.loads((folder / name).read_text())
        content |= {"schema": 2} if name == "record.json" else {}
        old = {k: v for k, v in content.items() if k not in drop}
        (folder / name).write_text(json.dumps(old))
    caplog.set_level(logging.INFO)
    record = execution.execute(mine)
    assert record["metrics"] == finished[0].record()["metrics"]
    assert caplog.text == ""
    assert checksums.check_files(folder)["schema"] == 2


def test_a_damaged_measurement_is_named_and_made_again(
    finished: tuple[Run, Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (
        Measurement("rank", "rank of LoRA", {"row": row}, at(finished[0], tmp_path), True)
        for row in ("lora", "full")
    )
    first.path.parent.mkdir(parents=True)
    for one in (first, second):
        content = {"schema": 3, "signature": one.signature, "result": {"rank": 4}}
        checkpoint.write_json(one.path, sealed(content))
    known, text = first.read(), first.path.read_bytes()
    assert known is not None
    for kind in (*OF_BYTES, *OF_JSON):
        ALL[kind](first.path, second.path)
        caplog.clear()
        assert first.read() in (None, known), kind
        assert first.read() == known or str(first.path) in caplog.text, kind
        if first.path.is_dir():
            first.path.rmdir()
        first.path.write_bytes(text)


def test_a_record_of_a_newer_version_is_named_with_its_number(
    finished: tuple[Run, Run], tmp_path: Path
) -> None:
    mine = at(finished[0], tmp_path)
    folder = copy(finished[0].folder, mine.folder)
    path = Damage("record.json", "schema-99").apply(folder)
    with pytest.raises((UnreadableError, ConfigError), match=rf"{path} has schema 99, and this "):
        execution.execute(mine)
