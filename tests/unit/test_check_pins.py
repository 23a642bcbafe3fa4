"""The committed list of pins holds what is loaded; `make check-pins` finds what is wrong."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from delta_lora.sources import check_source
from scripts import check_pins
from scripts.check_pins import Pin, read_pins
from scripts.runs.composition import CONFIGS, compose
from tasks.sources import Release

ADDRESSES = {
    "dataset": "https://huggingface.co/datasets/{0.repository}/resolve/{0.revision}/",
    "github": "https://raw.githubusercontent.com/{0.repository}/{0.revision}/",
}
TASKS = sorted(
    str(path.relative_to(CONFIGS / "task").with_suffix(""))
    for path in (CONFIGS / "task").rglob("*.yaml")
    if path.stem != "_base"
)


class _Server(BaseHTTPRequestHandler):
    """The hub's listings and GitHub's files, as they are told; remembers what is asked."""

    #: path -> status, headers, body.
    answers: ClassVar[dict[str, tuple[int, dict[str, str], bytes]]]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        status, headers, body = self.answers.get(path, (404, {}, b""))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a server that stands for the hub and for GitHub."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    web = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{web.server_port}"
    use_hub(monkeypatch, tmp_path, url)
    _Server.asked = []
    _Server.answers = {}
    yield url
    web.shutdown()
    thread.join()
    web.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str) -> None:
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(f"{constants}ENDPOINT", url)
    monkeypatch.setattr(f"{constants}HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}HF_HUB_CACHE", str(folder / "cache"))
    # What newer clients ask for themselves and keep.
    monkeypatch.setattr(f"{constants}AGENT_HARNESSES_PATH", str(folder / "a"), raising=False)


def listing(pin: Pin) -> tuple[int, dict[str, str], bytes]:
    """Return the hub's answer for a pin whose files are as listed, unknown sizes 7 bytes."""
    siblings: list[dict[str, Any]] = []
    for name, file in pin.files.items():
        size = 7 if file.size is None else file.size
        siblings.append({"rfilename": name, "size": size})
        if name.endswith((".safetensors", ".parquet")):
            siblings[-1]["lfs"] = {
                "sha256": file.sha256 or "f" * 64, "size": size, "pointerSize": 1
            }  # fmt: skip
    content = {"id": pin.repository, "sha": pin.revision, "siblings": siblings}
    return 200, {}, json.dumps(content).encode()


def path_of(pin: Pin) -> str:
    return f"/api/{pin.kind}s/{pin.repository}/revision/{pin.revision}"


# The committed list


def releases(task: str) -> list[Release]:
    config = compose([f"task={task}", "recipe=e2e", "model=gpt2_medium"]).task
    values = [value for value in config.values() if OmegaConf.is_dict(value)]
    return [instantiate(v) for v in values if v.get("_target_") == "tasks.sources.Release"]


def test_every_data_file_of_the_configs_is_listed_with_its_checksum_and_no_other() -> None:
    assert sum(bool(releases(task)) for task in TASKS) == 11
    asked = {
        release.file_url(name): sha256
        for task in TASKS
        for release in releases(task)
        for name, sha256 in release.files.items()
    }
    listed = {
        ADDRESSES[pin.kind].format(pin) + name: file.sha256
        for pin in read_pins()
        if pin.kind != "model"
        for name, file in pin.files.items()
    }
    assert asked == listed


def test_every_model_of_the_configs_is_listed_at_its_revision_and_no_other() -> None:
    configs = [OmegaConf.load(path) for path in (CONFIGS / "model").glob("*.yaml")]
    pinned = {(c.hub_id, c.revision) for c in configs if c.get("hub_id") is not None}
    assert pinned == {(p.repository, p.revision) for p in read_pins() if p.kind == "model"}
    assert all(len(revision) == 40 for _, revision in pinned)


def test_the_listed_files_are_those_that_are_loaded(server: str) -> None:
    models = [pin for pin in read_pins() if pin.kind == "model"]
    assert len(models) == 6
    for pin in models:
        _Server.answers[path_of(pin)] = listing(pin)
        check_source(pin.repository, pin.revision)


def test_nothing_is_called_verified_that_is_not_known() -> None:
    for pin in read_pins():
        assert pin.source
        known = [None not in (file.size, file.sha256) for file in pin.files.values()]
        assert all(known) or not pin.verified
        for file in pin.files.values():
            assert file.sha256 is None or len(file.sha256) == 64


# The command

MODEL, DATA, CODE = "owner/model", "owner/data", "owner/code"


@pytest.fixture
def command(server: str, tmp_path: Path) -> Callable[..., int]:
    """Run the command on one pin of each kind, all of which are there."""
    pins = [
        {
            "repository": repository, "kind": kind, "revision": "a" * 40, "verified": False,
            "source": "a test", "files": files,
        }
        for repository, kind, files in (
            (MODEL, "model", {
                "config.json": {"size": 5, "sha256": None},
                "model.safetensors": {"size": 9, "sha256": "b" * 64},
            }),
            (DATA, "dataset", {"a/train.parquet": {"size": 3, "sha256": "c" * 64}}),
            (CODE, "github", {"data/test.txt": {"size": 4, "sha256": "d" * 64}}),
        )
    ]  # fmt: skip
    path = tmp_path / "pins.yaml"
    OmegaConf.save(OmegaConf.create(pins), path)
    for pin in read_pins(path):
        if pin.kind != "github":
            _Server.answers[path_of(pin)] = listing(pin)
    _Server.answers[f"/{CODE}/{'a' * 40}/data/test.txt"] = 200, {}, b"four"

    def run(*arguments: str, github: str = server) -> int:
        return check_pins.main(["--listing", str(path), *arguments], github=github)

    return run


def change(repository: str, file: str, values: Mapping[str, Any] | None) -> None:
    """Change what the hub lists of a file; None takes it away."""
    (path,) = [p for p in _Server.answers if f"s/{repository}/" in p]
    content = json.loads(_Server.answers[path][2])
    (entry,) = [s for s in content["siblings"] if s["rfilename"] == file]
    if values is None:
        content["siblings"].remove(entry)
    else:
        entry.update(values)
    _Server.answers[path] = 200, {}, json.dumps(content).encode()


def test_all_pins_pass(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command() == 0
    assert capsys.readouterr().out.splitlines() == [
        "PASS model owner/model@aaaaaaaaaaaa",
        "PASS dataset owner/data@aaaaaaaaaaaa",
        "PASS github owner/code@aaaaaaaaaaaa",
        "all 3 pins are there",
    ]
    assert command(DATA) == 0
    assert "all 1 pins are there" in capsys.readouterr().out


def test_a_missing_file(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    change(MODEL, "model.safetensors", None)
    del _Server.answers[f"/{CODE}/{'a' * 40}/data/test.txt"]
    assert command() == 1
    captured = capsys.readouterr()
    assert "FAIL model owner/model@aaaaaaaaaaaa: no model.safetensors\n" in captured.out
    assert "PASS dataset owner/data" in captured.out
    assert "FAIL github owner/code@aaaaaaaaaaaa: no data/test.txt\n" in captured.out
    assert "2 of 3 pins fail: take another revision" in captured.err


def test_another_size_or_checksum(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    change(MODEL, "config.json", {"size": 6})
    change(DATA, "a/train.parquet", {"lfs": {"sha256": "e" * 64, "size": 3, "pointerSize": 1}})
    _Server.answers[f"/{CODE}/{'a' * 40}/data/test.txt"] = 200, {}, b"fives"
    assert command() == 1
    out = capsys.readouterr().out
    assert "FAIL model owner/model@aaaaaaaaaaaa: size of config.json is 6, expected 5" in out
    assert f"sha256 of a/train.parquet is {'e' * 64}, expected {'c' * 64}" in out
    assert "size of data/test.txt is 5, expected 4" in out


def test_what_the_list_does_not_know_yet_is_shown(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    change(MODEL, "config.json", {"lfs": {"sha256": "e" * 64, "size": 5, "pointerSize": 1}})
    assert command() == 0
    assert f"not in pins.yaml yet: config.json: sha256: {'e' * 64}" in capsys.readouterr().out


def test_redirections_are_followed(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file = f"/{CODE}/{'a' * 40}/data/test.txt"
    _Server.answers["/store/1"] = 206, {"Content-Range": "bytes 0-0/4"}, b"f"
    _Server.answers[file] = 302, {"Location": "/store/1"}, b""
    path = f"/api/models/{MODEL}/revision/{'a' * 40}"
    _Server.answers["/api/models/new/name"] = _Server.answers[path]
    _Server.answers[path] = 307, {"Location": "/api/models/new/name"}, b""
    assert command() == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, b""), "refuses to list owner/model at revision"),
        ((404, {"X-Error-Code": "RepoNotFound"}, b""), "has no model owner/model"),
        ((404, {"X-Error-Code": "RevisionNotFound"}, b""), "but not its revision aaaa"),
        ((200, {}, b"<html>log in</html>"), "gave something else than a listing"),
    ],
)
def test_a_hub_that_answers_otherwise(
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    answer: tuple[int, dict[str, str], bytes],
    message: str,
) -> None:
    _Server.answers[f"/api/models/{MODEL}/revision/{'a' * 40}"] = answer
    assert command() == 1
    out = capsys.readouterr().out
    assert "FAIL model owner/model@aaaaaaaaaaaa: " in out
    assert message in out
    assert out.count("PASS") == 2


def test_a_file_that_may_not_be_read(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    _Server.answers[f"/{CODE}/{'a' * 40}/data/test.txt"] = 401, {}, b""
    assert command() == 1
    assert "FAIL github owner/code@aaaaaaaaaaaa: 401 Client Error" in capsys.readouterr().out


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes a connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_hangs_fails_its_own_pins_after_one_wait(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], silent: str
) -> None:
    assert command("--timeout", "0.3", github=silent) == 1
    out = capsys.readouterr().out
    assert f"FAIL github owner/code@aaaaaaaaaaaa: {silent} does not answer: ReadTimeout" in out
    assert out.count("PASS") == 2


@pytest.mark.parametrize("how", ["hangs", "refuses", "is not to be asked"])
def test_without_a_network_there_is_one_message(
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    silent: str,
    how: str,
) -> None:
    url = silent if how == "hangs" else "http://127.0.0.1:9"
    use_hub(monkeypatch, tmp_path, url)
    if how == "is not to be asked":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert command("--timeout", "0.3", github=url) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: neither the hub nor GitHub answers, so nothing was")
    assert len(captured.err.splitlines()) == 1
    assert _Server.asked == []


def test_wrong_arguments_and_a_wrong_list(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command("owner/modle") == 2
    assert "['owner/modle'] is not pinned; pinned are ['owner/code'," in capsys.readouterr().err
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("- {repository: a/b, kind: disk}\n")
    assert check_pins.main(["--listing", str(wrong)]) == 2
    assert "kind='disk'; allowed: model, dataset, github" in capsys.readouterr().err
    wrong.write_text("- {repository: a/b, kind: model, files: {a: {size: 1}}}\n")
    assert check_pins.main(["--listing", str(wrong)]) == 2
    assert "wrong.yaml: a/b: " in capsys.readouterr().err
