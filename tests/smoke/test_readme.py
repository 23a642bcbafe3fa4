"""Every command and every snippet of README is run, with the smallest settings.

A new one needs a way to run it here; one that README lost must go from here as well.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts.runs.composition import compose
from scripts.sweeping.study import asks_for_study, read_study
from tests.smoke.conftest import ROOT, SMALL, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")
PLATES = (
    "configs/README.md", "configs/launcher/README.md", "tasks/README.md", "delta_lora/README.md",
    "results/README.md",
)  # fmt: skip
#: conftest empties the path, so it is looked up here.
MAKE = shutil.which("make")
#: README chooses task and model itself; two steps are enough.
TINY = [
    o for o in SMALL if not o.startswith(("task=", "model=", "scale=", "trainer.max_steps="))
] + ["recipe.max_steps=2", "recipe.start_step=0"]

Train = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the shell commands of `text`, each on one line, without comments."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    found = [re.sub(r"\s+#.*", "", line) for line in lines]
    return [" ".join(line.split()) for line in found if line.strip()]


def run(command: Sequence[str], folder: Path, **more: str) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(
        command, cwd=folder, env={**environment(), "PYTHONPATH": str(ROOT), **more},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


# ---------------------------------------------------------------------- commands


def run_table(command: str, outputs: Path, tmp_path: Path, _: Train) -> None:
    """Take the command line that make would run, and add where the results go."""
    if MAKE is None:
        pytest.skip("make is not installed")
    told = run([MAKE, "-n", *shlex.split(command)[1:], f"PYTHON={sys.executable}"], ROOT)
    (line,) = [line for line in told.splitlines() if "scripts/reproduce.py" in line]
    said = run(
        ["/bin/sh", "-c", f"{line} --results {tmp_path}"], ROOT,
        SCALE="tiny", SEEDS="1", WORKERS="1", LAUNCHER="local", LAUNCHER_ARGS="",
        ARGS=shlex.join([*TINY, f"paths.outputs={outputs}"]),
    )  # fmt: skip
    assert "12 of 12 runs finished" in said
    assert "LoRA without dropout" in said
    assert (tmp_path / "tiny" / "table1.md").is_file()


def run_install(_: str, outputs: Path, tmp_path: Path, train: Train) -> None:
    """Install a copy, so that nothing is built among the sources."""
    copy, site = tmp_path / "copy", tmp_path / "site"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        ROOT / "delta_lora", copy / "delta_lora", ignore=shutil.ignore_patterns("__pycache__")
    )
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(site)]
    run([sys.executable, "-m", "pip", "install", ".", *offline], copy)
    said = run(
        [sys.executable, "-c", "import delta_lora as d; print(d.attach, d.load, d.__file__)"],
        tmp_path, PYTHONPATH=str(site),
    )  # fmt: skip
    assert str(site) in said


def run_activation(_: str, outputs: Path, tmp_path: Path, train: Train) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "VENV := .venv\n" in makefile


def run_training(command: str, outputs: Path, tmp_path: Path, train: Train) -> None:
    """Run one run, or of a sweep two: the first seed, the first two values of another list."""
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "scripts/train.py")
    is_sweep = "-m" in arguments
    if is_sweep:
        num_kept = {"seed": 1}
        arguments = [
            ",".join(argument.split(",")[: num_kept.get(argument.partition("=")[0], 2)])
            for argument in arguments
        ]
    done = train([*arguments, *TINY, f"paths.outputs={outputs}"])
    assert done.returncode == 0, done.stderr[-4000:]
    records = re.findall(r"record: (\S+record\.json)", done.stderr)
    assert len(set(records)) == (2 if is_sweep else 1)
    assert all(Path(record).is_file() for record in records)


def run_plan(command: str, outputs: Path, tmp_path: Path, _: Train) -> None:
    overrides = shlex.join([*TINY, f"paths.outputs={outputs}"])
    _, *arguments = shlex.split(command)
    where = ["--results", str(tmp_path), "--seeds", "1", "--args", overrides]
    said = run([sys.executable, *arguments, *where], ROOT)
    assert "table1: 12 runs" in said


RUNNERS: dict[str, Callable[[str, Path, Path, Train], None]] = {
    "make reproduce-table1": run_table,
    "pip install .": run_install,
    "source .venv/bin/activate": run_activation,
    "python scripts/train.py experiment=e2e method=delta_lora scale=tiny seed=1": run_training,
    "python scripts/train.py -m experiment=e2e method=delta_lora scale=tiny seed=1,2,3 "
    "method.update_ratio=0.5,1,2": run_training,
    "python scripts/reproduce.py table1 --scale tiny --plan": run_plan,
}


#: commands that take long even so: a whole table, a sweep.
LONG = [
    command for command, how in RUNNERS.items() if how in (run_table, run_plan) or " -m " in command
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.long) if c in LONG else c for c in commands(README)],
)
def test_a_command_of_readme_runs(
    command: str, outputs: Path, tmp_path: Path, train: Train
) -> None:
    assert command in RUNNERS, "README has a new command: say in RUNNERS how to run it"
    RUNNERS[command](command, outputs, tmp_path, train)


def test_no_way_to_run_a_command_is_left_over() -> None:
    assert sorted(RUNNERS) == sorted(set(commands(README)))


# ---------------------------------------------------------------------- snippets


def tiny_gpt2(folder: Path) -> Any:
    import transformers as tf

    config = tf.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    tf.set_seed(1)
    tf.GPT2LMHeadModel(config).save_pretrained(folder / "base")
    return tf.GPT2LMHeadModel.from_pretrained(folder / "base")


def rows(num_rows: int) -> list[dict[str, Any]]:
    import torch

    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(50, (8,), generator=draw) for _ in range(num_rows)]
    return [{"input_ids": x, "labels": x} for x in ids]


def run_own_loop(snippet: str, folder: Path) -> None:
    import torch

    model = tiny_gpt2(folder)
    batches = [{key: value[None] for key, value in row.items()} for row in rows(3)]
    names: dict[str, Any] = {"model": model, "batches": batches}
    exec(snippet, names)
    ids = batches[0]["input_ids"]
    loaded = names["delta_lora"].load("my_adapter").model
    with torch.no_grad():
        trained = names["adapter"].model.eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, trained, atol=1e-5, rtol=0)
        assert not torch.equal(trained, tiny_gpt2(folder).eval()(ids).logits)


def run_callback(snippet: str, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    import transformers as tf

    lora = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["c_attn"])
    args = tf.TrainingArguments(
        output_dir=str(folder / "run"), max_steps=3, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=1, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    peft_model = peft.get_peft_model(tiny_gpt2(folder), lora)
    names = {"Trainer": tf.Trainer, "peft_model": peft_model, "args": args, "data": rows(4)}
    exec(snippet, names)
    assert peft.PeftConfig.from_pretrained("my_lora").r == 4
    peft.PeftModel.from_pretrained(tiny_gpt2(folder), "my_lora")


#: by a line that only this snippet has.
SNIPPETS: dict[str, Callable[[str, Path], None]] = {
    "adapter = delta_lora.attach(": run_own_loop,
    "callback = DeltaLoraCallback(": run_callback,
}


@pytest.mark.parametrize("snippet", blocks(README, "python"))
def test_a_snippet_of_readme_runs(
    snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [runner for line, runner in SNIPPETS.items() if line in snippet]
    assert len(found) == 1, "README has a new snippet: say in SNIPPETS how to run it"
    assert "start_step=500" in snippet
    monkeypatch.chdir(tmp_path)
    found[0](snippet.replace("start_step=500", "start_step=0"), tmp_path)


def test_no_way_to_run_a_snippet_is_left_over() -> None:
    assert len(SNIPPETS) == len(blocks(README, "python"))


# ---------------------------------------------------------------------- the rest of the texts


def training_commands() -> list[str]:
    plates = [ROOT / plate for plate in PLATES]
    texts = [plate.read_text(encoding="utf-8") for plate in plates if plate.exists()]
    found = [command for text in texts for command in commands(text)]
    return [command for command in found if "scripts/train.py" in command]


@pytest.mark.parametrize("command", training_commands())
def test_a_run_of_a_door_plate_composes(command: str) -> None:
    _, *arguments = shlex.split(command[command.index("scripts/train.py") :])
    if asks_for_study(arguments):
        assert read_study(arguments).search.space
        return
    compose(
        [argument.split(",")[0] for argument in arguments if not argument.startswith("-")
         and argument != "job"]
    )  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", *PLATES])
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        other = (ROOT / page).parent / path if path else ROOT / page
        assert other.exists(), f"{page}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    for plate in PLATES:
        assert len((ROOT / plate).read_text(encoding="utf-8").splitlines()) <= 150, plate


def test_every_experiment_method_and_target_that_readme_names_exists() -> None:
    methods = {path.stem for path in (ROOT / "configs" / "method").glob("*.yaml")}
    table = README[README.index("| `method=` |") : README.index("## Cost")]
    named = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines()
                                                 if line.startswith("| `"))))  # fmt: skip
    assert named <= methods
    assert methods <= named, "a method is missing from README"
    assert (ROOT / "configs" / "experiment" / "e2e.yaml").is_file()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE) or "reproduce" in target
