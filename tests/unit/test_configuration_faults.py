"""Wrong values of every kind: each is refused in one line before any work, or means something.

The short form of the faults of configurations: what stands in tests/faults tries all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import train
from scripts.runs.building import build_tokenizer, load_task
from scripts.runs.checks import check
from scripts.runs.composition import ConfigError
from scripts.runs.run import Run
from tests.faults import configurations
from tests.faults.configurations import Case, Verdict

#: values that are tried here, of some ten thousand.
NUMBER, DEEP = 110, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("faults")
    configurations.write_models(found)
    return found


def checked(*overrides: str) -> None:
    run = Run.compose(overrides)
    assert run.name
    check(run)


def unlike(verdicts: list[tuple[Case, Verdict]]) -> list[str]:
    return [
        f"{case.override} of {case.base[0]}: {verdict}; it lacks {missing}"
        for case, verdict in verdicts
        if verdict.result not in ("clear", "accepted")
        for missing in [configurations.missing(case, verdict.message)]
    ]


def test_a_wrong_value_is_refused_by_key_and_value_with_what_is_allowed(folder: Path) -> None:
    found = configurations.cases(list(configurations.bases(folder, is_short=True)))
    assert len(found) > 5000
    drawn = configurations.sample(found, NUMBER, seed=1)
    verdicts = [(case, configurations.judge(case, is_deep=False)) for case in drawn]
    assert unlike(verdicts) == []
    accepted = [case for case, verdict in verdicts if verdict.result == "accepted"]
    assert len(accepted) < NUMBER / 3, "most of these values mean nothing"


def test_what_is_accepted_can_be_built_and_recorded(folder: Path) -> None:
    base = next(configurations.bases(folder, is_short=True))
    cases = [
        Case(base, key, text)
        for key, text in (
            ("seed", "4294967295"),
            ("task.decoding.length_penalty", "-10"),
            ("task.decoding.max_new_tokens", "40"),
            ("task.decoding.early_stopping", "true"),
            ("task.embedded_seed", "4294967295"),
            ("task.max_length", "100"),
            ("trainer.max_steps", "1000000000"),
            ("logger.tags", "['ü']"),
        )
    ]
    assert len(cases) < DEEP
    verdicts = [(case, configurations.judge(case)) for case in cases]
    assert unlike(verdicts) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("predict=no", r"predict='no' is a str, not a bool; write true or false"),
        ("save_model=off", r"save_model='off' is a str, not a bool"),
        ("seed=4294967296", r"seed=4294967296 is not allowed: .*<= 4294967295"),
        ("paths.outputs=''", r"paths\.outputs='' is not allowed"),
        ("paths.outputs=3", r"paths\.outputs=3 is a int, not a path"),
        (
            "model.init=Random",
            r"model\.init='Random' is not known; choose one of 'pretrained'",
        ),
        ("model.dropout=abc", r"model\.dropout='abc' is a str, not a number"),
        ("model.dtype=half", r"model\.dtype='half' is not known"),
        ("model.attention=fast", r"model\.attention='fast' is not known"),
        ("model.projections=c_attn", r"model\.projections='c_attn' is a str, not a list"),
        ("model.config_overrides.activation_function=abc", r"activation_function.*'abc'.*makes no"),
        ("model.pretrain=abc", r"model\.pretrain='abc' is a str, not a list"),
        ("+model.nmae=x", r"unknown key model\.nmae='x'; did you mean 'name'"),
        ("trainer.no_decay=bias", r"trainer\.no_decay='bias' is a str, not a list"),
        ("trainer.compile=no", r"trainer\.compile='no' is a str, not a bool"),
        ("trainer.deterministic=no", r"trainer\.deterministic='no' is a str, not a bool"),
        ("trainer.batch_size=null", r"trainer\.batch_size=None is a NoneType, not an integer"),
        ("trainer.eval_batch_size=null", r"trainer\.eval_batch_size=None"),
        ("trainer.batch_size=100000", r"trainer\.batch_size=100000 .*micro_batch_size.*4096"),
        ("trainer._target_=os.path", r"trainer\._target_=.*os.*is no Trainer"),
        ("+trainer.momentun=1", r"unknown key trainer\.momentun=1: .*did you mean 'momentum'"),
        ("method._target_=3", r"method\._target_=3 is a int, not a text"),
        ("method._target_=torch.nn.Linear", r"Linear is no Method; a method is a class that inher"),
        ("method.rank=100000", r"method\.rank=100000 .*<= 65536"),
        ("task._target_=tasks.e2e.E3E", r"cannot be imported: tasks\.e2e has no E3E"),
        ("task.decoding=abc", r"task\.decoding='abc' is a str, not a BeamSearch"),
        ("task.decoding._target_=tasks.sources.Release", r"decoding\._target_=.* is no BeamSearch"),
        ("task.decoding.length_penalty=1e30", r"task\.decoding\.length_penalty=1e\+30 .*<= 10"),
        ("task.decoding.num_beams=100000", r"num_beams=100000 .*<= 256 \(each is a whole text in"),
        ("task.decoding.max_new_tokens=5000", r"max_new_tokens=5000 leaves no room .* at most 511"),
        ("task.embedded_seed=[1,2]", r"task\.embedded_seed=\[1, 2\] is a List\w*, not an integer"),
        ("task.embedded_sizes={train:3}", r"it must have a number for each of train, validation"),
        ("+task.embedded_sizes.train=true", r"task\.embedded_sizes\.train=True is a bool"),
        ("task.cache_dir=3", r"task\.cache_dir=3 is a int, not a path"),
        (
            "task.release_lora.commit=abc",
            r"release_lora\.commit='abc' is not allowed; write a ",
        ),
        ("logger.mode=abc", r"logger\.mode='abc' is not known; choose one of 'auto', 'online'"),
        ("logger.tags=abc", r"logger\.tags='abc' is a str, not a list"),
        ("logger.project=a/b", r"logger\.project='a/b' is not allowed; write a name without any"),
        ("recipe.batch_size=abc", r"recipe\.batch_size='abc' is a str, not an integer"),
        ("recipe.adalora.beta1=abc", r"recipe\.adalora\.beta1='abc'"),
        ("recipe.dylora=3", r"recipe\.dylora=3 is a int, not a mapping"),
        ("+recipe.bacth_size=3", r"unknown key recipe\.bacth_size=3.*did you mean 'batch_size'"),
        ("init_from=3", r"init_from=3 is a int, not a text"),
        ("train_fraction=2", r"train_fraction=2 is not allowed: .*<= 1"),
        ("trainer.max_steps=0", r"total_steps=0 .*max_steps=0.* needs at least one step"),
    ],
)
def test_what_once_went_wrong_late(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        checked("scale=tiny", f"paths.outputs={tmp_path}", override)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora_dropout=-1", r"peft\.lora_dropout=-1 .*>= 0 and < 1"),
        ("lora_dropout=true", r"peft\.lora_dropout=True is a bool"),
        ("r=1.5", r"peft\.r=1\.5 is a float"),
        ("lora_alpha=[1]", r"peft\.lora_alpha=\[1\] is a list"),
        ("+use_dora=no", r"peft\.use_dora='no' is a str, not a bool"),
        ("+bias=abc", r"peft\.bias='abc' is not known; choose one of 'none'"),
    ],
)
def test_settings_of_peft_are_checked_by_its_types(setting: str, message: str) -> None:
    plus = "+" if setting.startswith("+") else ""
    with pytest.raises(ConfigError, match=message):
        checked("scale=tiny", "method=peft", f"{plus}method.peft.{setting.strip('+')}")


@pytest.mark.parametrize("name", ["ü", "数据", "a#b", "a(b", "a=b", "a,b", "it's", "~/x", 'a"b'])
def test_paths_with_special_characters_are_to_be_quoted(name: str) -> None:
    base = ["scale=tiny", "task.source=files"]
    with pytest.raises(ConfigError, match=r"stands in quotes.*: task\.data_dir='\"") as raised:
        train.check_arguments([*base, f"task.data_dir={name}"])
    assert "\n" not in str(raised.value)
    advised = str(raised.value).rpartition(": task.data_dir=")[2].strip("'")
    advised = advised if advised.endswith('"') else f'"{name}"'
    cfg = Run.compose([*base, f"task.data_dir={advised}"]).config
    assert cfg.task.data_dir == name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=abc"], r"n_jobs=abc.*Integer"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], r"n_jobs=0 starts nothing"),
        (["hydra/launcher=abc"], r"hydra/launcher/abc.*joblib"),
        (["hydra.launcher.foo=1"], r"foo"),
        (["hydra.mode=abc"], r"expected one of \[RUN, MULTIRUN\]"),
        (["trainer.max_steps=1,2"], r"has several values, which only a sweep may have"),
        (["recipe.alpha=${nothing}"], r"recipe\.alpha=\$\{nothing\}: .*nothing.* not found"),
        (["experiment=glue/rte", "recipe.variant=abc"], r"recipe\.variant='abc' .*'paper', 'scr"),
    ],
)
def test_settings_of_a_launch_are_checked_before(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        train.check_arguments(["scale=tiny", *overrides])
    assert "\n" not in str(raised.value)


def test_a_tilde_in_outputs_is_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Run.compose(["scale=tiny", "paths.outputs='~/x'"]).outputs == tmp_path / "x"


def test_wrong_values_of_a_sweep_are_named(tmp_path: Path) -> None:
    found = configurations.sweep_cases()
    assert len(found) > 500
    verdicts = []
    for case in configurations.sample(found, 120, seed=1):
        verdicts.append((case, configurations.judge_sweep(case, tmp_path)))
    assert unlike(verdicts) == []


def test_a_corpus_that_makes_too_few_tokens_is_no_traceback() -> None:
    """It is found when the tokenizer is built, which is before any training."""
    small = ["experiment=pretraining", *configurations.SMALL, "task.tokenizer_documents=1"]
    run = Run.compose(small)
    with pytest.raises(ConfigError, match=r"task\.tokenizer_documents=1 only make \d+ tokens"):
        build_tokenizer(run, load_task(run.config))


@pytest.mark.parametrize("size", ["n_embd=1000000"])
def test_a_model_larger_than_the_machine_is_refused_before_it_is_built(size: str) -> None:
    small = ["experiment=pretraining", *configurations.SMALL]
    with pytest.raises(
        ConfigError, match=r"makes a model of \S+ parameters, whose weights and grad"
    ):
        checked(*small, f"model.architecture.{size}")
