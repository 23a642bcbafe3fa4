"""A search by Optuna: what it reads, what it chooses, what it gives up, what it says at the end."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from scripts import train
from scripts.reporting.spec import ROOT
from scripts.runs.command import exit_code
from scripts.runs.composition import ConfigError
from scripts.runs.folder import lock
from scripts.runs.run import Run
from scripts.sweeping.multirun import read_grid
from scripts.sweeping.search import Rule, Search, Settings, Trial
from scripts.sweeping.space import Dimension, read_space
from scripts.sweeping.study import read_study
from scripts.sweeping.study_pictures import draw_study
from tests.unit import fake_runs

BASE = ["-m", "hydra/sweeper=optuna", "experiment=e2e", "scale=tiny", "method=delta_lora",
        "logger=none"]  # fmt: skip
SPACE = ["method.update_ratio=interval(0.1,4)", "method.start_step=range(0,50,5)"]
KINDS = ("json", "csv", "md", "svg", "png")
LAUNCH = (
    "import sys; from pathlib import Path; from tests.unit import fake_runs; fake_runs.install(); "
    "fake_runs.OUTPUTS = Path(sys.argv[1]); from scripts.train import command; "
    "sys.exit(command(sys.argv[2:]))"
)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make runs take no time; return the folder of all that they leave."""
    fake_runs.install(monkeypatch.setattr)
    monkeypatch.setattr(fake_runs, "OUTPUTS", tmp_path)
    return tmp_path


def study(*arguments: str) -> int:
    """Run a study in this process; return the exit code."""
    return exit_code(lambda: read_study([*BASE, *arguments]).run())


def view(folder: Path) -> Path:
    """Return the folder of the one study there is."""
    (found,) = (folder / "sweeps").iterdir()
    return found


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((view(folder) / "study.json").read_text())


def num_calls(folder: Path) -> int:
    calls = fake_runs.calls_file(folder)
    return len(calls.read_text().splitlines()) if calls.exists() else 0


# ---------------------------------------------------------------------- what is searched


def test_every_kind_of_sweep_is_a_dimension() -> None:
    fixed, space = read_space(
        ["seed=3", "a=interval(0.1,4)", "b=int(interval(0,50))", "c=tag(log,interval(1,100))",
         "d=range(1,9,2)", "e=range(0.1,0.5,0.1)", "f=1,2", "g=choice(x,y)", "h=range(9,0,-3)",
         "method=glob(lora_*)", "+new=interval(1,2)"]
    )  # fmt: skip
    assert fixed == ["seed=3"]
    found = {d.key: d for d in space}
    floats, integers = optuna.distributions.FloatDistribution, optuna.distributions.IntDistribution
    assert found["a"].distribution == floats(0.1, 4)
    assert found["b"].distribution == integers(0, 50)
    assert found["c"].distribution == floats(1, 100, log=True)
    assert found["d"].distribution == integers(1, 7, step=2)
    assert found["e"].distribution == floats(0.1, 0.4, step=0.1)
    assert found["e"].texts == read_grid(["e=range(0.1,0.5,0.1)"]).swept["e"]  # as Hydra writes it
    assert [found["e"].text(v) for v in (0.1, 0.2, 0.3, 0.4)] == list(found["e"].texts)
    assert found["f"].distribution == optuna.distributions.CategoricalDistribution(("1", "2"))
    assert found["g"].texts == ("x", "y")
    assert found["h"].distribution == integers(3, 9, step=3)
    assert found["method"].texts == ("lora_high_lr", "lora_no_dropout", "lora_scaled")
    assert found["+new"].text(1.25) == "1.25"
    for dimension in space:
        json.dumps(dimension.describe())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a study needs a setting to search; add one"),
        (["seed=1,2"], "a study cannot search seed; the best seed says nothing"),
        (["scale=tiny,small"], "a study cannot search scale"),
        (["experiment=e2e,webnlg"], "a study cannot search experiment"),
        (["method.update_ratio=interval(4,1)"], "the lower end 4 must be below the upper end 1"),
        (["method.update_ratio=tag(log,interval(0,1))"], "needs a lower end above 0, not 0"),
        (["method.update_ratio=tag(x,interval(1,2))"], "tag x is not known here"),
        (["method.update_ratio=interval(1"], "cannot read the override"),
        (["recipe.rnk=1,2"], "unknown key 'recipe.rnk'; did you mean"),
        (["method=lora,lorra"], "unknown method 'lorra'; did you mean 'lora'"),
        ([*SPACE, "hydra.sweeper.n_trial=3"], "did you mean 'n_trials'"),
        ([*SPACE, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 is not allowed"),
        ([*SPACE, "hydra.sweeper.sampler=cma"], "hydra.sweeper.sampler='cma'"),
        ([*SPACE, "hydra.sweeper.direction=maximize"], "lower is better; use minimize"),
        ([*SPACE, "hydra.sweeper.study_name=a/b"], "use a name of a folder"),
        ([*SPACE, "hydra/launcher=joblib"], "leave the launcher out, hydra.sweeper.n_jobs=N"),
        ([*SPACE, "hydra.sweeper.storage=sqlite:///x.db"], "is no setting of a study"),
        ([*SPACE, "trainer.evaluate_every_epochs=null"], "a study compares validation scores"),
    ],
)
def test_what_cannot_be_is_refused_before_any_run(
    arguments: list[str], message: str, fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [a for a in BASE if not a.startswith(tuple(f"{x.split('=')[0]}=" for x in arguments))]
    code = exit_code(lambda: read_study([*wanted, *arguments]).run())
    assert code == 2
    assert message in capsys.readouterr().err
    assert num_calls(fake) == 0


def test_an_interval_without_a_sampler_says_what_to_add() -> None:
    with pytest.raises(ConfigError, match="add hydra/sweeper=optuna"):
        train.check_arguments(["-m", "experiment=e2e", "scale=tiny", SPACE[0]])
    with pytest.raises(ConfigError, match="add -m"):
        read_study([*BASE[1:], *SPACE])


def test_settings_are_also_read_as_the_plugin_of_hydra_calls_them(fake: Path) -> None:
    found = read_study(
        [*BASE, *SPACE, "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=7",
         "hydra.sweeper.direction=minimize"]
    )  # fmt: skip
    assert (found.search.settings.sampler, found.search.settings.seed) == ("random", 7)


def test_a_study_is_named_by_all_that_its_trials_depend_on(fake: Path) -> None:
    def name(*more: str) -> str:
        return read_study([*BASE, *SPACE, *more]).name

    first = name()
    assert first.startswith("update_ratio-start_step-study-")
    assert name("hydra.sweeper.n_trials=99") == first
    assert name("trainer.checkpoint_every_s=5") == first
    for other in ("seed=2", "hydra.sweeper.seed=2", "hydra.sweeper.n_jobs=3", "recipe.rank=2",
                  "hydra.sweeper.pruner=none", "hydra.sweeper.pruner_startup=3"):  # fmt: skip
        assert name(other) != first, other
    assert name("hydra.sweeper.study_name=mine") == "mine"


# ---------------------------------------------------------------------- what is chosen


def parabola(search: Search, count: int) -> list[Trial]:
    """Return trials whose value is the distance to 1."""
    trials: list[Trial] = []
    for number in range(count):
        asked = search.ask(trials)
        value = abs(asked.params["x"] - 1)
        known = {"state": "done", "value": value, "curve": (2 * value, value)}
        trials.append(Trial(number, asked.params, **known))
    return trials


def test_the_sampler_learns_and_repeats() -> None:
    space = [Dimension("x", "real", 0.0, 10.0)]
    search = Search(space, Settings(n_jobs=1), metric="loss", direction="minimize")
    trials = parabola(search, 40)
    assert trials == parabola(search, 40)
    early, late = trials[:10], trials[30:]
    assert sum(t.value for t in late) < sum(t.value for t in early) / 2
    other = Search(space, Settings(n_jobs=1, seed=2), metric="loss", direction="minimize")
    assert parabola(other, 3)[0].params != trials[0].params


@pytest.mark.parametrize("seed", range(1, 6))
def test_the_first_trials_are_spread_over_every_setting(seed: int) -> None:
    _, space = read_space(
        ["a=interval(0.1,4)", "b=int(interval(0,9))", "c=tag(log,interval(1,100))", "d=x,y",
         "e=range(0.1,0.5,0.1)", "f=tag(log,int(interval(1,64)))"]
    )  # fmt: skip
    search = Search(space, Settings(seed=seed), metric="loss", direction="minimize")
    trials: list[Trial] = []
    for _ in range(10):
        trials.append(search.ask(trials))
    search.ask([Trial(t.number, t.params, "done", value=1.0, curve=(1.0,)) for t in trials])
    middles = {"a": 2.05, "b": 4.5, "c": 10.0, "e": 0.25, "f": 8.5}
    for key, middle in middles.items():
        assert 3 <= sum(trial.params[key] < middle for trial in trials) <= 7, key
    assert 3 <= sum(trial.params["d"] == "x" for trial in trials) <= 7
    for dimension in space:
        for trial in trials:
            value = trial.params[dimension.key]
            assert dimension.distribution._contains(
                dimension.distribution.to_internal_repr(value)
            ), (dimension, value)
            assert dimension.text(value)


def test_a_trial_knows_the_groups_before_it_and_nothing_of_its_own() -> None:
    search = Search(
        [Dimension("x", "real", 0.0, 10.0)], Settings(n_jobs=4), metric="loss", direction="minimize"
    )
    trials = parabola(search, 15)
    open_ones = [Trial(t.number, t.params) for t in trials[12:]]
    assert search.ask([*trials[:12], *open_ones]) == search.ask(trials)
    worse = [Trial(t.number, t.params, "done", value=9.0, curve=(9.0,)) for t in trials[:12]]
    assert search.ask([*worse, *open_ones]).params != search.ask(trials).params
    rule = search.rule(trials, 14)
    assert rule is not None
    assert rule.curves == tuple(t.curve for t in trials[:12])


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    space = [Dimension("x", "real", 0.0, 10.0), Dimension("m", "choice", texts=("a", "b"))]
    search = Search(space, Settings(), metric="loss", direction="minimize")
    trials = [
        Trial(0, {"x": 1.5, "m": "a"}, "done", value=2.0, curve=(3.0, 2.0)),
        Trial(1, {"x": 2.5, "m": "b"}, "pruned", "worse", curve=(9.0,), step=5),
        Trial(2, {"x": 3.5, "m": "b"}, "failed", "loss is nan"),
        Trial(3, {"x": 4.5, "m": "b"}, "held", "another process"),
    ]
    path = tmp_path / "study.journal"
    search.write(path, "mine", trials, {"seed": 1})
    assert search.read(path, {"seed": 1}) == trials
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(path))
    )  # as optuna-dashboard opens it
    loaded = optuna.load_study(study_name="mine", storage=storage)
    assert loaded.best_value == 2.0
    with pytest.raises(ValueError, match="was made with another seed; choose another"):
        search.read(path, {"seed": 2})
    path.write_text("no journal\n")
    with pytest.raises(ValueError, match="is no study"):
        search.read(path, {"seed": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["study.journal"]


# ---------------------------------------------------------------------- what is given up


def entries(*values: float) -> list[dict[str, float]]:
    return [{"step": 5 * (i + 1), "loss": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("direction", "sign"), [("minimize", 1.0), ("maximize", -1.0)], ids=["lower", "higher"]
)
def test_the_median_of_earlier_trials_decides(direction: str, sign: float) -> None:
    curves = tuple((sign * 4.0, sign * last) for last in (1.0, 2.0, 3.0))
    rule = Rule("loss", direction, 3, 0, curves)
    assert rule(entries(sign * 4.0)) is None  # as the others
    reason = rule(entries(sign * 4.5))
    assert reason == (
        f"its best validation loss so far, {sign * 4.5:g}, is worse than {sign * 4:g}, "
        "the median of 3 earlier trials at evaluation 1"
    )
    assert rule(entries(sign * 4.0, sign * 2.0)) is None
    assert "at evaluation 2" in str(rule(entries(sign * 4.0, sign * 2.5)))
    assert rule.first_stop(entries(sign * 4.0, sign * 2.5, sign * 0.1)) is not None
    assert rule(entries(sign * 9.0, sign * 1.0)) is None  # its best counts, not its last
    assert rule(entries(sign * 4.0, sign * 2.0, sign * 9.0)) is None  # no other got as far
    assert rule(entries(math.nan)) is None  # a score that is not there decides nothing


def test_too_few_trials_and_first_evaluations_decide_nothing() -> None:
    curves = ((4.0, 1.0), (4.0, 2.0))
    assert Rule("loss", "minimize", 3, 0, curves)(entries(99.0)) is None
    late = Rule("loss", "minimize", 2, 1, curves)
    assert late(entries(99.0)) is None
    assert late(entries(99.0, 98.0)) is not None


# ---------------------------------------------------------------------- whole studies


@pytest.mark.long
@pytest.mark.slow
def test_a_study_that_was_killed_goes_on_to_the_same_trials_and_bytes(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["hydra.sweeper.n_trials=11", "hydra.sweeper.pruner_startup=3"]
    assert study(*SPACE, *few) == 0
    said = capsys.readouterr().out
    content = content_of(fake)
    states = [trial["state"] for trial in content["trials"]]
    assert {"done", "pruned"} == set(states)
    assert said.splitlines()[-1] == f"{states.count('done')} done, {states.count('pruned')} pruned"
    assert "The best of many looks better" in said
    undisturbed = {kind: (view(fake) / f"study.{kind}").read_bytes() for kind in KINDS}
    made = num_calls(fake)

    # Asked again it costs nothing; more trials begin with the same ones.
    assert study(*SPACE, *few) == 0
    assert num_calls(fake) == made
    assert {kind: (view(fake) / f"study.{kind}").read_bytes() for kind in KINDS} == undisturbed
    assert study(*SPACE, few[1], "hydra.sweeper.n_trials=12") == 0
    longer = content_of(fake)["trials"]
    assert longer[:11] == content["trials"]

    # Killed in the middle of a group.
    other = fake / "other"
    ratio, start = (content["trials"][6]["values"][k] for k in
                    ("method.update_ratio", "method.start_step"))  # fmt: skip
    wait = f"fake.wait=delta_lora:1:{ratio}:{start}"
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(other), *BASE, *SPACE, *few, wait], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while num_calls(other) < 8:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (view(other) / "study.json").exists()
    monkeypatch.setattr(fake_runs, "OUTPUTS", other)
    assert study(*SPACE, *few) == 0
    assert {kind: (view(other) / f"study.{kind}").read_bytes() for kind in KINDS} == undisturbed


def test_failed_refused_and_held_trials_cost_themselves_only(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = ["method.update_ratio=-1,1,2,3"]
    few = ["hydra.sweeper.n_trials=12", "hydra.sweeper.sampler=random", "hydra.sweeper.pruner=none"]
    wrong = ["fake.fail=delta_lora:1:2:3", "fake.lock=delta_lora:1:3:3"]
    assert study(*space, *few, *wrong) == 1, capsys.readouterr().err
    last = capsys.readouterr().err.splitlines()[-1]
    rows = content_of(fake)["trials"]
    expected = {"-1": "refused", "1": "done", "2": "failed", "3": "held"}
    assert {r["values"]["method.update_ratio"] for r in rows} == set(expected)
    for row in rows:
        assert row["state"] == expected[row["values"]["method.update_ratio"]]
    counts = {s: sum(r["state"] == s for r in rows) for s in expected.values()}
    assert last.startswith(
        f"{counts['done']} done, {counts['failed']} failed, {counts['refused']} refused, "
        f"{counts['held']} held by another process: trial "
    )
    page = (view(fake) / "study.md").read_text()
    assert "refused: method.update_ratio=-1 is not allowed" in page
    assert "failed: RuntimeError: loss is &lt;nan> | at step 3" in page.replace("\\|", "|")
    made = num_calls(fake)

    assert study(*space, *few) == 1  # the same again: what failed and was held, and no more
    assert num_calls(fake) == made + 2
    rows = content_of(fake)["trials"]
    assert {row["state"] for row in rows} == {"done", "refused"}
    with (view(fake) / "study.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 12
    assert all(bool(line["bleu"]) == (line["state"] == "done") for line in lines)
    assert content_of(fake)["best"] is not None


@pytest.mark.long
def test_what_lost_its_record_is_made_again_to_the_same_view(fake: Path) -> None:
    few = ["hydra.sweeper.n_trials=8", "hydra.sweeper.pruner_startup=3"]
    assert study(*SPACE, *few) == 0
    before = {kind: (view(fake) / f"study.{kind}").read_bytes() for kind in KINDS}
    trials = content_of(fake)["trials"]
    done = [trial["signature"] for trial in trials if trial["state"] == "done"]
    shutil.rmtree(fake / done[-1])
    made = num_calls(fake)
    assert study(*SPACE, *few) == 0
    assert num_calls(fake) == made + 1
    assert {kind: (view(fake) / f"study.{kind}").read_bytes() for kind in KINDS} == before


def test_without_optuna_a_study_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install optuna"):
        read_study([*BASE, *SPACE])


@pytest.mark.long
def test_a_worker_that_is_killed_costs_its_trial_only(fake: Path) -> None:
    few = ["hydra.sweeper.n_trials=4", "hydra.sweeper.sampler=random"]
    killing = "fake.kill=delta_lora:1:2:3"
    assert study("method.update_ratio=1,2", *few, killing) == 1
    rows = content_of(fake)["trials"]
    for row in rows:
        assert row["state"] == {"1": "done", "2": "failed"}[row["values"]["method.update_ratio"]]


def test_a_mistake_in_every_trial_is_said_once(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(*SPACE, "recipe.rank=0") == 2
    assert "error: recipe.rank=0" in capsys.readouterr().err
    assert num_calls(fake) == 0
    assert not (fake / "sweeps").exists()


def test_a_study_at_full_scale_is_refused_without_a_gpu_but_shown(
    fake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_full = [argument if argument != "scale=tiny" else "scale=paper" for argument in BASE]
    asked = [*at_full, "method.update_ratio=1,2", "hydra.sweeper.n_trials=2"]
    if exit_code(lambda: read_study(asked).run()) == 0:
        pytest.skip("this machine has a GPU")
    assert "Use scale=tiny, or trainer.device=cpu" in capsys.readouterr().err
    for ratio in (1, 2):
        run = Run.compose([*at_full[2:], f"method.update_ratio={ratio}"])
        fake_runs.write(run, fake_runs.record(run), {})
    assert exit_code(lambda: read_study(asked).run()) == 0
    assert num_calls(fake) == 0


def test_one_process_works_on_a_study(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_study([*BASE, *SPACE])
    with lock(found.folder, wait=False):
        assert study(*SPACE) == 2
    assert "one process chooses the trials of a study" in capsys.readouterr().err


@pytest.mark.long
def test_what_a_table_or_another_study_has_made_costs_nothing(fake: Path) -> None:
    def compose(ratio: int) -> Run:
        return Run.compose([*BASE[2:], f"method.update_ratio={ratio}"])

    done = compose(1)
    fake_runs.write(done, fake_runs.record(done), {})
    few = ["hydra.sweeper.n_trials=6", "hydra.sweeper.sampler=random"]
    assert study("method.update_ratio=1,2", *few) == 0
    assert num_calls(fake) == 1  # one run for all trials with the other value
    # A record of a run that another study gave up: this one knows too little to do so.
    given_up = compose(4)
    never = fake_runs.execute(given_up, prune=lambda validation: "of another study")
    assert never["status"] == "pruned"
    assert given_up.status().state == "partial"
    assert study("method.update_ratio=1,4", *few) == 0
    assert given_up.status().state == "done"


def test_a_score_that_more_is_better_of_is_maximised() -> None:
    asked = [argument if argument != "experiment=e2e" else "experiment=glue/rte"
             for argument in BASE]  # fmt: skip
    found = read_study([*asked, SPACE[0], "hydra.sweeper.direction=maximize"])
    assert (found.search.metric, found.search.direction) == ("accuracy", "maximize")


@pytest.mark.long
def test_the_test_score_of_the_best_stands_beside_the_validation_score(fake: Path) -> None:
    assert study(*SPACE, "hydra.sweeper.n_trials=5", "seed=2") == 0
    content = content_of(fake)
    best = content["trials"][content["best"]]
    assert best["validation"] == min(row["validation"] for row in content["trials"])
    page = (view(fake) / "study.md").read_text()
    assert f"**Trial {best['trial']}: λ = " in page
    assert f"loss, validation split (lower is better) {best['validation']:.3f}" in page
    assert f"BLEU, test split {best['test']:.2f}" in page
    assert "best of 5 finished trials, each with the one seed 2" in page
    assert "seed=3,4,5" in content["again"]
    assert not math.isclose(best["test"], best["validation"])


@pytest.mark.long
def test_the_picture_says_what_the_content_says(
    fake: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    space = ["method.update_ratio=tag(log,interval(0.1,4))", SPACE[1], "recipe.rank=2,4"]
    few = ["hydra.sweeper.n_trials=9", "hydra.sweeper.pruner_startup=2"]
    assert study(*space, *few) == 0
    content = content_of(fake)
    content["trials"][1] = {
        **content["trials"][1], "state": "failed", "validation": None, "test": None
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("picture")
    files = draw_study(content, folder)
    assert [path.name for path in files] == ["study.svg", "study.png"]
    svg = files[0].read_text()
    for text in ("λ", "K", "rank r", "trial", "Loss, validation split",
                 "BLEU, test split", "green: best so far"):  # fmt: skip
        assert text in svg, text
    assert "#c62828" in svg
    again = tmp_path_factory.mktemp("again")
    assert [p.read_bytes() for p in draw_study(content, again)] == [p.read_bytes() for p in files]


@pytest.mark.long
def test_a_whole_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(tmp_path), *BASE, *SPACE, "hydra.sweeper.n_trials=3"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3 done"
