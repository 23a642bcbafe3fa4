"""Weights and data are looked for before a run reads any, and once before a table starts."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

import delta_lora.sources
from delta_lora.sources import RemoteFile
from scripts.runs import checks
from scripts.runs.batch import Batch
from scripts.runs.cells import Cell
from scripts.runs.checks import check_sources
from scripts.runs.composition import ConfigError
from scripts.runs.execution import execute
from scripts.runs.launchers import Here
from scripts.runs.run import Run
from tasks.e2e import E2E

MODEL = "facebook/bart-large"


#: what config.json describes.
SMALL = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32}


def write_model(folder: Path, *left_out: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    for name in left_out:
        (folder / name).unlink()
    return folder


def composed(tmp_path: Path, *overrides: str, task: str = "e2e", model: str = "gpt2_medium") -> Any:
    return Run.compose(
        [f"experiment={task}", f"model={model}", "method=lora", "logger=none",
         "trainer.device=cpu", f"paths.outputs={tmp_path / 'outputs'}", *overrides]
    )  # fmt: skip


class _Files(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404 if "absent" in self.path else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that has every file without "absent" in its name."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    _Files.asked = []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Hub:
    """Stands for the hub's listings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *names: str) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.names = names
        monkeypatch.setattr(delta_lora.sources, "list_files", self.list_files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def list_files(self, repository: str, revision: str | None, **_: object) -> Any:
        self.asked.append((repository, revision))
        return dict.fromkeys(self.names, RemoteFile(1, None))


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where data are read."""

    def load(task: E2E) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(E2E, "load", load)


@pytest.mark.usefixtures("no_load")
def test_a_folder_without_safetensors_is_found_before_data_are_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    cfg = composed(tmp_path, f"model.path={folder}", "task.source=embedded")
    with pytest.raises(ConfigError, match=r"has no model\.safetensors .*pytorch_model\.bin"):
        execute(cfg)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.usefixtures("no_load")
def test_a_pin_without_safetensors_is_found_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, tmp_path, "config.json", "vocab.json", "pytorch_model.bin")
    cfg = composed(tmp_path, "task.source=embedded", "model.architecture=null")
    with pytest.raises(ConfigError, match=r"gpt2-medium at revision .* has no model\.safet"):
        execute(cfg)
    assert hub.asked == [("openai-community/gpt2-medium", cfg.config.model.revision)]


def test_a_tokenizer_of_its_own_is_looked_for_in_its_place(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "tokenizer.json")
    other = write_model(tmp_path / "other", "model.safetensors", "config.json")
    embedded = "task.source=embedded"
    with pytest.raises(ConfigError, match=r"model has no tokenizer\.json"):
        check_sources(composed(tmp_path, embedded, f"model.path={model}"), set())
    both = [f"model.path={model}", f"model.tokenizer_path={other}"]
    check_sources(composed(tmp_path, embedded, *both), set())
    only = ["model.init=random", f"model.tokenizer_path={other}"]
    check_sources(composed(tmp_path, embedded, *only), set())


def test_data_that_cannot_be_downloaded_are_found(tmp_path: Path, files: str) -> None:
    model = write_model(tmp_path / "model")
    settings = [f"model.path={model}", f"task.cache_dir={tmp_path / 'cache'}"]
    cfg = composed(tmp_path, *settings, f"task.release_lora.url={files}")
    check_sources(cfg, set())
    assert sorted(_Files.asked) == ["/test.txt", "/train.txt", "/valid.txt"]
    cfg = composed(tmp_path, *settings, f"task.release_lora.url={files}/absent")
    with pytest.raises(ConfigError, match=r"/absent/train\.txt .*404.*task\.source=files"):
        check_sources(cfg, set())
    (cached := tmp_path / "cache" / "microsoft--LoRA" / cfg.config.task.release_lora.commit).mkdir(
        parents=True
    )
    for name in cfg.config.task.release_lora.files:
        (cached / name).write_text("in the cache")
    asked = len(_Files.asked)
    check_sources(cfg, set())
    assert len(_Files.asked) == asked


def planned(todo: list[Cell]) -> Batch:
    return Batch.plan(
        todo, scale="paper", extra=["trainer.device=cpu"], workers="1", launcher=Here()
    )


def test_a_table_asks_once_for_each_model_and_each_data_source(
    tmp_path: Path, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, tmp_path, "config.json", "vocab.json", "model.safetensors")
    monkeypatch.setattr(checks, "check", lambda run: None)
    settings = [f"task.cache_dir={tmp_path / 'cache'}", f"task.release.url={files}"]

    def item(row: str, task: str, *more: str, seed: int = 1) -> Cell:
        overrides = (*settings, f"method={row}", f"seed={seed}", *more)
        return Cell(row, task, composed(tmp_path, *overrides, task=task, model="roberta_base"))

    rows = ("lora", "full", "delta_lora")
    todo = [item(row, "glue/rte", seed=seed) for row in rows for seed in (1, 2)]
    todo += [item(row, "glue/mrpc", "init_from=glue/mnli") for row in rows]
    planned(todo).check(tmp_path / "results")
    assert hub.asked == [("FacebookAI/roberta-base", todo[0].run.config.model.revision)]
    # Two files each of RTE and MRPC, and three of MNLI, which MRPC starts from.
    assert len(_Files.asked) == len(set(_Files.asked)) == 7
    assert sum("mnli" in path for path in _Files.asked) == 3


def test_a_row_whose_weights_are_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch, tmp_path, "config.json", "vocab.json", "pytorch_model.bin")
    monkeypatch.setattr(checks, "check", lambda run: None)
    run = composed(tmp_path, "task.source=embedded", task="xsum", model="bart_large")
    with pytest.raises(ValueError, match=rf"row lora on xsum: {MODEL} at .* no model\.safetensors"):
        planned([Cell("lora", "xsum", run)]).check(tmp_path / "results")


def test_a_folder_seen_for_its_tokenizer_is_still_looked_at_for_its_weights(
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path / "model", "model.safetensors")
    cfg = composed(
        tmp_path, f"model.path={folder}", f"model.tokenizer_path={folder}", "task.source=embedded"
    )
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        check_sources(cfg, set())


def test_the_tiny_scale_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, tmp_path)
    for task, model in (
        ("e2e", "gpt2_medium"),
        ("xsum", "bart_large"),
        ("glue/rte", "roberta_base"),
    ):
        check_sources(composed(tmp_path, "scale=tiny", task=task, model=model), set())
    assert hub.asked == []


def test_a_new_pin_renames_the_runs_that_read_it_and_no_other(tmp_path: Path) -> None:
    def name(source: str, commit: str | None = None, **files: str) -> str:
        run = composed(tmp_path, f"task.source={source}", task="xsum", model="bart_large")
        pin = run.config.task.release
        changed = {"commit": commit or pin.commit, "files": {**pin.files, **files}}
        run.config.task.release = {**pin, **changed}
        return run.name

    other = {"default/xsum-test.parquet": hashlib.sha256(b"other").hexdigest()}
    assert name("embedded") == name("embedded", **other)
    assert name("hub") != name("hub", **other)
    commit = hashlib.sha1(b"other").hexdigest()
    assert name("hub") == name("hub", commit), "the checksums say which data they are"


# ---------------------------------------------------------------------- other people's models


def write_llama(folder: Path) -> Path:
    config = tf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    write_model(folder)
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=gpt2_medium"], r"has 'activation_function', but a LlamaConfig has no such value"),
        (["model=causal_lm", "method.rank=64"], "rank"),
        (["model=causal_lm", "model.projections=[q_prj]"], "q_proj"),
        (["model=seq2seq_lm"], "is of the family seq2seq_lm, but task=e2e is learned by a causal"),
        (["model=causal_lm", "model.path=null"], "model=causal_lm has no weights"),
    ],
)
def test_what_does_not_fit_a_folder_is_found_before_data_and_weights_are_read(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    llama = write_llama(tmp_path / "llama")
    run = composed(tmp_path, "scale=tiny", f"model.path={llama}", *overrides, model="causal_lm")
    with pytest.raises(ConfigError, match=message):
        checks.check(run)


def test_a_folder_of_any_architecture_fits_the_generic_model(tmp_path: Path) -> None:
    llama = write_llama(tmp_path / "llama")
    run = composed(tmp_path, "scale=tiny", f"model.path={llama}", model="causal_lm")
    checks.check(run)
