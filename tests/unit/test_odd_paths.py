"""Paths as people have them: home, variables, letters, links to nothing, too long, in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import delta_lora
from delta_lora import export
from delta_lora.checks import check_path
from delta_lora.console import as_path
from delta_lora.models import load_model, load_tokenizer
from delta_lora.sources import check_source
from scripts.runs.composition import ConfigError
from scripts.runs.folder import lock
from scripts.runs.meaning import folder_checksum
from scripts.runs.run import Run
from tasks.data import find_file
from tasks.sources import cache_folder, open_folder
from tasks.tiny.bpe import train_tokenizer
from tests.choices import first
from tests.contract.models import CASES

NAMES = [
    "a b", "ü", "数据", "it's", 'a"b', "a=b", "a,b", "#x", "[x]", "{x}", "(x)", "a\nb", "%s", "-x",
    "$5", "a;b", "a&b", "*", "?", "..x", "x" * 200,
]  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home folder that is not the working folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PLACE", str(folder))
    monkeypatch.chdir(tmp_path / "work")
    return folder


def adapter() -> Any:
    return delta_lora.attach(CASES["gpt2"].model(), method="lora", rank=2, alpha=4)


@pytest.mark.parametrize("prefix", ["~", "$HOME", "${PLACE}"])
def test_home_and_variables_mean_the_same_everywhere(prefix: str, home: Path) -> None:
    model = CASES["gpt2"].model()
    model.save_pretrained(home / "base")
    train_tokenizer(["a text"] * 20, vocab_size=300).save_pretrained(home / "base")
    made = adapter()
    assert made.save(f"{prefix}/adapter") == home / "adapter"
    loaded = delta_lora.load(f"{prefix}/adapter", base=f"{prefix}/base")
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
    export.export_peft(f"{prefix}/adapter", f"{prefix}/peft", base=CASES["gpt2"].model())
    export.export_merged(f"{prefix}/adapter", f"{prefix}/merged", base=f"{prefix}/base")
    assert (home / "peft" / "adapter_config.json").is_file()
    assert (home / "merged" / "model.safetensors").is_file()
    assert load_tokenizer(f"{prefix}/base").vocab_size
    assert load_model("causal_lm", source=f"{prefix}/base") is not None
    check_source(f"{prefix}/base")
    assert cache_folder(f"{prefix}/cache") == home / "cache"
    assert open_folder(f"{prefix}/base") == (home / "base").resolve()
    assert as_path(f"{prefix}/x") == check_path("x", f"{prefix}/x") == home / "x"
    written = prefix.replace("${", "${oc.env:")  # braces are the configuration's own
    assert Run.compose(["scale=tiny", f'paths.outputs="{written}/runs"']).outputs == home / "runs"
    assert folder_checksum("model.path", f"{prefix}/base")
    assert not list(Path.cwd().iterdir())


def test_a_variable_that_is_not_set_is_said(home: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no variable \$NOWHERE; set it"):
        check_path("paths.outputs", "$NOWHERE/runs")
    (Path.cwd() / "$NOWHERE").mkdir()
    assert check_path("paths.outputs", "$NOWHERE") == Path("$NOWHERE")


@pytest.mark.parametrize("name", first(NAMES, 9))
def test_a_folder_of_any_name_holds_adapters_and_runs(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    adapter().save(folder)
    assert delta_lora.load(folder, base=CASES["gpt2"].model())
    inner = '"' + str(folder).replace("\\", "\\\\").replace('"', '\\"') + '"'
    run = Run.compose(["scale=tiny", f"paths.outputs={inner}"])
    assert run.outputs == folder
    with lock(run.outputs / "run", wait=False):
        pass


def test_without_quotes_the_message_says_how_they_are_written() -> None:
    for value in ("/data/a b,c", "/data/[x]", "/data/a=b", "/data/ü"):
        with pytest.raises(ConfigError, match=r"paths\.outputs='\\?\"") as caught:
            Run.compose(["scale=tiny", f"paths.outputs={value}"])
        assert f"paths.outputs='\"{value}\"'" in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 30)])
def test_a_path_that_is_too_long_is_one_line(name: str, tmp_path: Path) -> None:
    def work() -> None:
        run = Run.compose(["scale=tiny", f"paths.outputs={tmp_path / name}"])
        lock(run.folder, wait=False).__enter__()

    with pytest.raises(ValueError, match=r"shorter path|not allowed") as caught:
        work()
    assert "\n" not in str(caught.value)


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "adapter_model.safetensors").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"file that stands where a folder belongs"):
        lock(tmp_path / "file" / "run", wait=False).__enter__()
    with pytest.raises(OSError, match=r"cannot write .*folder that stands in its place"):
        adapter().save(tmp_path / "folder")
    assert not list((tmp_path / "folder").glob(".*"))


def test_a_link_to_nothing_is_left_out_where_nobody_reads_it_and_named_where_one_does(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    CASES["gpt2"].model().save_pretrained(model)
    train_tokenizer(["a text"] * 20, vocab_size=300).save_pretrained(model)
    before = folder_checksum("model.path", str(model))
    for name in (".#train.txt", "README.md"):  # a lock of Emacs; a file that a cache has pruned
        (model / name).symlink_to("me@host.4711")
    assert folder_checksum("model.path", str(model)) == before
    check_source(model)
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("../blobs/abc")
    with pytest.raises(FileNotFoundError, match=r"config\.json is a link to \.\./blobs/abc"):
        check_source(model)
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.txt").symlink_to("/nowhere/train.txt")
    with pytest.raises(FileNotFoundError, match=r"train\.txt is a link to /nowhere/train\.txt"):
        find_file(data, "train.txt")


def test_files_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    folder = tmp_path / "λ"
    adapter().save(folder)
    json.loads((folder / "adapter_config.json").read_bytes().decode("utf-8"))
