"""Planning, workers, failures, interruption: `scripts/reproduce.py` on runs of no length."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import reproduce
from scripts.reporting.spec import ROOT, load_table
from scripts.runs import batch, checks, devices, launchers
from scripts.runs.cells import Cell
from scripts.runs.devices import Cuda
from scripts.runs.durations import Durations, format_seconds
from scripts.runs.jobs import Job, Outcome
from scripts.runs.run import Run
from scripts.runs.workers import Pool
from tests.choices import first
from tests.unit import fake_runs

pytestmark = pytest.mark.usefixtures("no_pictures")

LAUNCH = (
    "import sys; from tests.unit import fake_runs; fake_runs.install(); "
    "from scripts.reproduce import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_runs.install(monkeypatch.setattr)
    return tmp_path / "outputs"


def arguments_for(folder: Path, *arguments: str) -> list[str]:
    """Return the command line with outputs and results in `folder`."""
    found, place = list(arguments), f"paths.outputs={folder / 'outputs'}"
    for index, argument in enumerate(found):
        if argument == "--args":
            found[index + 1] += f" {place}"
            break
    else:
        if not any(argument.startswith("--args=") for argument in found):
            found += ["--args", place]
    return ["table1", "--results", str(folder / "results"), *found]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., int]:
    """Run the command in this process, at scale tiny."""

    def call(*arguments: str) -> int:
        return reproduce.main(arguments_for(tmp_path, "--scale", "tiny", *arguments))

    return call


def calls(outputs: Path) -> list[list[str]]:
    """Return (process, method, seed, threads) of every run that was started."""
    return [line.split() for line in (outputs / "calls.txt").read_text().splitlines()]


# ---------------------------------------------------------------------- whole commands


def test_a_table_from_nothing_and_again(
    command: Callable[..., int],
    outputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("--workers", "2") == 0
    first = capsys.readouterr().out
    assert first.startswith("scale: tiny (as asked)\n")
    assert "table1: 36 runs: 0 done, 0 partial, 0 stale, 0 failed, 36 missing" in first
    assert "[36/36]" in first
    started = calls(outputs)
    assert len(started) == 36
    assert len({process for process, *_ in started}) == 2
    assert str(os.getpid()) not in {process for process, *_ in started}
    assert {threads for *_, threads in started} == {"1"}
    table = (tmp_path / "results" / "tiny" / "table1.md").read_bytes()
    assert "wrote " in first
    assert "table1.{md,csv,tex,json}" in first
    assert max(map(len, first[first.index("Table 1: ") :].splitlines()[:-6])) <= 100
    logs = sorted(path.name for path in (outputs / "logs").iterdir())
    assert logs == ["table1-worker0.log", "table1-worker1.log"]
    assert "running lora" in (outputs / "logs" / logs[0]).read_text()

    start = time.monotonic()
    assert command("--workers", "2") == 0
    assert time.monotonic() - start < 5
    assert "all 36 runs are done; nothing to run" in capsys.readouterr().out
    assert len(calls(outputs)) == 36
    assert (tmp_path / "results" / "tiny" / "table1.md").read_bytes() == table


def test_plan_runs_nothing_and_estimates_from_earlier_runs(
    command: Callable[..., int], outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--plan") == 0
    assert "expected time: unknown" in capsys.readouterr().out
    assert not outputs.exists()

    extra = [f"paths.outputs={outputs}"]
    cells = load_table("table1").cells(scale="tiny", seeds=[1, 2, 3], extra=extra)
    for cell in cells[:12]:  # all rows of seed 1
        fake_runs.write(cell.run, fake_runs.record(cell.run), {"train_time_s": 60.0})
    error = {"type": "RuntimeError", "message": "out of\nmemory"}
    fake_runs.write(cells[-1].run, fake_runs.record(cells[-1].run, status="failed", error=error))
    assert command("--plan", "--workers", "3") == 0
    out = capsys.readouterr().out
    assert "36 runs: 12 done, 0 partial, 0 stale, 1 failed, 23 missing" in out
    assert "    e2e, seed 3: failed (out of memory)" in out
    assert "to run: 24; expected time: about 8 min 00 s with 3 worker(s)" in out
    assert "(24 from same settings)" in out
    assert not (outputs / "calls.txt").exists()


@pytest.mark.long
def test_failures_do_not_stop_the_table_and_the_same_command_mends_them(
    command: Callable[..., int],
    outputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = "fake.fail=full:1 fake.kill=lora:1 fake.exit=dylora:1 fake.lock=adalora:1"
    assert command("--seeds", "1", "--workers", "1", "--args", wrong) == 1
    captured = capsys.readouterr()
    assert "the same command tries the others again" in captured.err
    table = (tmp_path / "results" / "tiny" / "table1.md").read_text()
    for text in (
        "Full fine-tuning, seed 1: failed: RuntimeError: loss is &lt;nan&gt;",
        "LoRA, seed 1: failed: the worker process was ended by SIGKILL (killed, perhaps for lack",
        "DyLoRA, seed 1: failed: the worker process ended with exit code 3; see logs/table1-",
        "AdaLoRA, seed 1: failed: LockedError: process 7 is already working in this folder",
        "7 of 12 runs finished",
    ):
        assert text in table
    processes = [process for process, *_ in calls(outputs)]
    assert len(set(processes)) == 3  # those that died were replaced, the last one had nothing left
    assert len(processes) == 12

    assert command("--seeds", "1", "--workers", "1") == 0
    assert "7 done" in capsys.readouterr().out
    assert len(calls(outputs)) == 17
    assert "12 of 12 runs finished" in (tmp_path / "results" / "tiny" / "table1.md").read_text()


@pytest.mark.long
def test_a_start_runs_once_and_what_needs_it_is_not_run_where_it_fails(
    command: Callable[..., int],
    outputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--seeds", "1", "--workers", "1", "--args")
    assert command(*arguments, "init_from=webnlg fake.fail=dylora:1") == 1
    captured = capsys.readouterr()
    assert "runs that are only made to start others from them: 12\n" in captured.out
    assert "to run: 24; " in captured.out
    assert "] dylora on webnlg, seed 1: FAILED: RuntimeError: loss is <nan>" in captured.out
    reason = "not run: the run that it starts from failed: RuntimeError: loss is <nan>"
    assert f"] dylora on e2e, seed 1: {reason}" in captured.out
    assert f"dylora on e2e, seed 1: {reason}" in captured.err
    table = (tmp_path / "results" / "tiny" / "table1.md").read_text()
    assert "DyLoRA, seed 1: not run: the run that it starts from failed: RuntimeError" in table
    methods = [method for _, method, *_ in calls(outputs)]
    assert methods.count("dylora") == 1
    assert len(methods) == 23

    assert command(*arguments, "init_from=webnlg") == 0
    assert "runs that are only made to start others from them: 1\n" in capsys.readouterr().out
    assert [method for _, method, *_ in calls(outputs)][23:] == ["dylora", "dylora"]


@pytest.mark.long
def test_models_are_pre_trained_only_where_they_lack(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--prepare", "--workers", "1") == 0
    assert "pre-training tiny_gpt2 (once) ..." in capsys.readouterr().out
    assert command("--seeds", "1", "--workers", "1") == 0
    assert "pre-training" not in capsys.readouterr().out


def test_scale_paper_without_a_gpu_is_refused_before_any_work(
    outputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(devices, "cuda", lambda: Cuda((), "the driver is too old"))
    for name in ("check", "check_sources"):
        monkeypatch.setattr(checks, name, lambda *_: None)

    def command(*arguments: str) -> int:
        return reproduce.main(
            arguments_for(tmp_path, "--scale", "paper", "--seeds", "1", *arguments)
        )

    assert command() == 2
    error = capsys.readouterr().err
    for words in ("the driver is too old", "--scale tiny", "--args trainer.device=cpu"):
        assert words in error
    assert not outputs.exists()
    assert command("--plan") == 0
    assert "would be refused: scale=paper needs a CUDA device" in capsys.readouterr().out
    assert command("--args", "trainer.device=cpu") == 0
    assert "1 worker on the CPU" in capsys.readouterr().out
    assert command("--args", "trainer.device=cpu") == 0  # nothing to run


def test_a_failing_preparation_stops_with_its_reason(
    command: Callable[..., int], outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--seeds", "1", "--args", "fake.prepare=fail") == 1
    assert "no space left on device" in capsys.readouterr().err
    assert not (outputs / "calls.txt").exists()


def test_prepare_only_prepares(command: Callable[..., int], outputs: Path) -> None:
    assert command("--prepare", "--workers", "1") == 0
    (made,) = outputs.glob("*/record.json")
    assert made.parent.name.startswith("pretraining--full--seed1--")
    assert not (outputs / "calls.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1,1"], "named twice"),
        (["--seeds", "1,-2"], "integers of 0 or more"),
        (["--seeds", ""], "integers of 0 or more"),
        (["--workers", "0"], "use auto or a number"),
        (["--args", "seed=4"], "seed is set by --seeds"),
        (["--args", "+scale=paper"], "scale is set by --scale"),
        (["--args=--multirun"], "is no override"),
        (["--args", "recipe.rank"], "is no override"),
        (["--args", "a='b"], "No closing quotation"),
        (["--args", "wrong=1"], "table1, row full: unknown key 'wrong'"),
        (["--args", "recipe.rank=0"], "recipe.rank=0 is not allowed"),
        (["--args", "model.path=/nowhere"], "table1, row full: model.path=/nowhere: no such fold"),
    ],
)
def test_bad_input_is_explained_before_any_work(
    command: Callable[..., int],
    outputs: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert command(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not outputs.exists()


def test_an_unusable_results_folder_is_found_before_any_work(
    command: Callable[..., int], outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").write_text("")
    assert command() == 2
    assert "cannot write to the results folder" in capsys.readouterr().err
    assert not outputs.exists()


def _launch(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    where = arguments_for(tmp_path, "--scale", "tiny", "--seeds", "1", *arguments)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *where],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and the tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened within a minute"
        time.sleep(0.05)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads process states from /proc")
@pytest.mark.parametrize("number", first([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]))
def test_stopping_the_command_stops_its_workers(
    tmp_path: Path, outputs: Path, number: signal.Signals
) -> None:
    process = _launch(tmp_path, "--workers", "1", "--args", "fake.wait=lora:1")
    log = outputs / "calls.txt"
    _wait_for(lambda: log.exists() and " lora 1 " in log.read_text())
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "stopped; the same command continues from here" in error
        assert "Traceback" not in error
    worker = int(calls(outputs)[0][0])
    _wait_for(lambda: not _is_alive(worker))
    assert len(calls(outputs)) == 4  # full, dagger, double dagger, lora


def test_help_and_bad_arguments_come_before_heavy_packages() -> None:
    code = (
        "import sys; from scripts import audit, reproduce, tables; "
        "heavy = {'torch', 'transformers', 'datasets', 'evaluate'} & set(sys.modules); "
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- parts


def test_workers_share_the_jobs_in_order(outputs: Path) -> None:
    base = Run.compose(["experiment=e2e", "scale=tiny", f"paths.outputs={outputs}"])
    runs = [base.with_seed(seed) for seed in (1, 2, 3)]
    jobs = [Job(batch.EXECUTE, (run,), str(i)) for i, run in enumerate(runs)]
    outputs.mkdir()
    with Pool(environments=[{}], logs=outputs / "logs", name="x") as pool:
        outcomes = [outcome for outcome in pool.run(jobs) if outcome is not None]
        assert [outcome.job.key for outcome in outcomes] == ["0", "1", "2"]
        assert {outcome.error for outcome in outcomes} == {None}
        assert pool.running == []
        more = [outcome for outcome in pool.run(jobs[:1]) if outcome is not None]
        assert more[0].error is None
    assert len({process for process, *_ in calls(outputs)}) == 1


def test_a_pool_needs_a_worker(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one worker"):
        Pool(environments=[], logs=tmp_path, name="x")


def test_on_a_terminal_there_is_a_bar_and_failures_stay_readable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    label = Cell("lora", "e2e", Run.compose(["experiment=e2e", "scale=tiny"])).label
    with batch.Progress(2) as progress:
        progress.tick([label], "3 s")
        progress.step(label, Outcome(Job("a:b", (), "x"), "RuntimeError: no", 2.0), "unknown")
    out, err = capsys.readouterr()
    assert out.strip() == "[1/2] lora on e2e, seed 1: FAILED: RuntimeError: no (2.0 s)"
    assert "left 3 s: lora on e2e, seed 1" in err
    assert "1/2 |" in err


def test_the_time_left_is_told_where_some_of_it_is_unknown() -> None:
    known, other = ["scale=tiny", "experiment=e2e"], ["trainer.max_steps=7"]
    cells = [Cell("lora", "e2e", Run.compose([*known, f"seed={seed}"])) for seed in (1, 2, 3)]
    odd = Cell("untrained", "e2e", Run.compose([*known, *other]))
    durations, running = Durations(), {cells[0].signature: 4.0, cells[1].signature: 1.0}
    assert batch.time_left([*cells, odd], running, durations) == "unknown"
    durations.add(cells[2].run.group, cells[2].run.config, 10.0)
    assert batch.time_left(cells, running, durations) == "12 s"
    assert batch.time_left([*cells, odd], running, durations) == "12 s and 1 of unknown length"
    assert batch.time_left([], {}, durations) == "0 s"


def test_durations_prefer_the_same_settings() -> None:
    durations = Durations()
    run = Run.compose(["experiment=e2e", "scale=tiny", "method=lora"])
    kin = Run.compose(["experiment=e2e", "scale=tiny", "method=delta_lora"])
    other = Run.compose(["experiment=e2e", "scale=tiny", "method=lora", "trainer.max_steps=7"])
    assert durations.expect(run) is None
    durations.add(kin.group, kin.config, 10.0)
    known = durations.expect(run), durations.basis(run)
    assert known == (10.0, "same task, model, data and steps")
    durations.add(run.group, run.config, 40.0)
    another = run.with_seed(2)
    assert (durations.expect(another), durations.basis(another)) == (40.0, "same settings")
    assert durations.expect(other) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "unknown"),
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_well(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_runs_shared_by_two_tables_run_once(
    outputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = load_table("table1")
    rows = tuple(row for row in first.rows if row.name in ("lora", "delta_lora", "lora_high_lr"))
    paper = {"title": "", "rows": {}}
    second = dataclasses.replace(
        first, name="table6", number=6, rows=rows, paper=paper, claims=(), contrasts=()
    )
    monkeypatch.setattr(reproduce, "load_table", {"table1": first, "table6": second}.__getitem__)
    where = arguments_for(tmp_path, "--scale", "tiny", "--seeds", "1", "--workers", "1")
    assert reproduce.main(["table6", *where]) == 0
    assert "3 runs are shared by several rows or tables and run once" in capsys.readouterr().out
    assert len(calls(outputs)) == 12
    content = json.loads((tmp_path / "results" / "tiny" / "table6.json").read_text())
    assert [row["method"] for row in content["rows"]] == ["lora", "delta_lora", "lora_high_lr"]
    assert all(row["metrics"]["bleu"]["n"] == 1 for row in content["rows"])


def test_a_run_knows_all_tables_of_the_command_that_need_it(tmp_path: Path) -> None:
    base = ["experiment=e2e", "scale=tiny", f"paths.outputs={tmp_path}"]
    run, other = (Run.compose([*base, f"method={name}"]) for name in ("lora", "delta_lora"))
    cells = [Cell("lora", "e2e", run, "table1"), Cell("delta_lora", "e2e", other, "table1")]
    cells.append(Cell("plain", "e2e", run, "rank"))
    planned = batch.Batch.plan(
        cells, scale="tiny", extra=(), workers="1", launcher=launchers.Here()
    )
    assert [cell.run.part_of for cell in planned.todo] == [["table1", "rank"], ["table1"]]
    assert [cell.signature for cell in planned.todo] == [run.name, other.name]
