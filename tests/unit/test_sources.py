"""What a model is loaded from is looked at first: folders, the local cache, the hub's listing."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from delta_lora.sources import (
    HubError,
    HubUnreachableError,
    check_source,
    list_files,
    shards,
)

COMMIT = "4422181a85458e2acc57a4c1f845b9dfd60bd411"
NAME = "owner/model"


def write_model(folder: Path, *left_out: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    for name in left_out:
        (folder / name).unlink()
    return folder


# Folders


def test_a_folder_with_everything(tmp_path: Path) -> None:
    check_source(write_model(tmp_path))


@pytest.mark.parametrize(
    ("name", "needs", "message"),
    [
        ("config.json", {}, r"has no config\.json; the copy is not complete"),
        ("model.safetensors", {}, r"has no model\.safetensors; convert .*model\.revision=COMMIT"),
        ("tokenizer.json", {}, r"has no tokenizer\.json nor .*model\.tokenizer_path=FOLDER"),
        ("model.safetensors", {"tokenizer": False}, "It holds config.json, tokenizer.json"),
    ],
)
def test_what_a_folder_lacks_is_named(
    tmp_path: Path, name: str, needs: dict[str, bool], message: str
) -> None:
    folder = write_model(tmp_path, name)
    with pytest.raises(FileNotFoundError, match=message):
        check_source(folder, **needs)


def test_only_what_is_needed_is_missed(tmp_path: Path) -> None:
    check_source(write_model(tmp_path / "a", "tokenizer.json"), tokenizer=False)
    check_source(write_model(tmp_path / "b", "config.json", "model.safetensors"), model=False)
    with pytest.raises(FileNotFoundError, match=r"model folder .*nowhere does not exist"):
        check_source(tmp_path / "nowhere")


def test_a_pickle_in_place_of_safetensors_is_explained(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(FileNotFoundError, match=r"its pytorch_model\.bin is never loaded"):
        check_source(folder)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", None])
def test_weights_that_are_not_whole_are_found(tmp_path: Path, content: bytes | None) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ValueError, match=r"is no whole safetensors file: .*git lfs pull"):
        check_source(tmp_path)


def write_shards(folder: Path, weight_map: object) -> Path:
    write_model(folder, "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_every_file_that_an_index_names_must_be_there(tmp_path: Path) -> None:
    index = write_shards(
        tmp_path, {"w": "a.safetensors", "x": "b.safetensors", "y": "a.safetensors"}
    )
    assert shards(index) == ["a.safetensors", "b.safetensors"]
    save_file({"w": torch.zeros(3), "y": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no b\.safetensors; the copy is not complete"):
        check_source(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"b\.safetensors \(5 bytes\) is no whole"):
        check_source(tmp_path)
    save_file({"x": torch.zeros(3)}, tmp_path / "b.safetensors")
    check_source(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"w": "../a.safetensors"},
            r"names '\.\./a\.safetensors': only safetensors of its own folder",
        ),
        ({"w": "/a.safetensors"}, "only safetensors of its own folder"),
        ({"w": "b\\a.safetensors"}, "only safetensors of its own folder"),
        ({"w": ".."}, "only safetensors of its own folder"),
        ({"w": "a.bin"}, "only safetensors of its own folder"),
        ({"w": 3}, "only safetensors of its own folder"),
        ({}, "names no file of weights"),
        (["a.safetensors"], "is no index of safetensors"),
    ],
)
def test_an_index_names_files_beside_it(tmp_path: Path, weight_map: object, message: str) -> None:
    write_shards(tmp_path, weight_map)
    with pytest.raises(ValueError, match=message):
        check_source(tmp_path)


# The hub


class _Hub(BaseHTTPRequestHandler):
    """Answers as it is told, and remembers what it was asked."""

    answer: ClassVar[tuple[int, dict[str, str], bytes]]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        if self.path.startswith(
            ("/api/models", "/api/datasets")
        ):  # not what the client asks itself
            self.asked.append(self.path)
        status, headers, body = self.answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def listing(*names: str) -> tuple[int, dict[str, str], bytes]:
    siblings: list[dict[str, Any]] = [{"rfilename": name, "size": 3} for name in names]
    for file in siblings:
        if file["rfilename"].endswith(".safetensors"):
            file["lfs"] = {"sha256": "a" * 64, "size": 3, "pointerSize": 1}
    content = {"id": NAME, "sha": COMMIT, "siblings": siblings}
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[_Hub]]:
    """A stand-in for the hub, and an empty cache."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(f"{constants}ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(f"{constants}HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}HF_HUB_CACHE", str(tmp_path / "cache"))
    # What newer clients ask for themselves and keep.
    monkeypatch.setattr(f"{constants}AGENT_HARNESSES_PATH", str(tmp_path / "a"), raising=False)
    _Hub.asked = []
    _Hub.answer = 404, {}, b""
    yield _Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_lists_a_repository_with_one_request(hub: type[_Hub]) -> None:
    hub.answer = listing("config.json", "tokenizer.json", "model.safetensors")
    files = list_files(NAME, COMMIT)
    assert (files["config.json"].size, files["config.json"].sha256) == (3, None)
    assert files["model.safetensors"].sha256 == "a" * 64
    assert hub.asked == [f"/api/models/{NAME}/revision/{COMMIT}?blobs=true"]
    check_source(NAME, COMMIT)
    list_files(NAME, COMMIT, kind="dataset")
    assert hub.asked[1:] == [hub.asked[0], hub.asked[0].replace("models", "datasets")]


def test_a_pin_without_safetensors_is_found_before_anything_is_downloaded(hub: type[_Hub]) -> None:
    hub.answer = listing("config.json", "tokenizer.json", "pytorch_model.bin", "vocab.json")
    message = (
        rf"{NAME} at revision {COMMIT} has no model\.safetensors \(its pytorch_model\.bin is never "
        r"loaded: .*\); convert .* take a revision that has them \(model\.revision=COMMIT\)"
    )
    with pytest.raises(FileNotFoundError, match=message):
        check_source(NAME, COMMIT)
    check_source(NAME, COMMIT, model=False)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (404, {"X-Error-Code": "RepoNotFound"}, b""),
            r"has no model owner/model, or may not show",
        ),
        ((404, {"X-Error-Code": "RevisionNotFound"}, b""), f"but not its revision {COMMIT}"),
        ((401, {}, b""), r"refuses to list owner/model at revision .*401"),
        ((403, {"X-Error-Code": "GatedRepo"}, b""), "is gated: accept its terms"),
        ((500, {}, b"sorry"), "refuses to list owner/model"),
        ((200, {}, b"<html>log in</html>"), "something else than a listing of owner/model"),
        ((200, {}, b"[]"), "something else than a listing of owner/model"),
    ],
)
def test_a_hub_that_answers_otherwise(
    hub: type[_Hub], answer: tuple[int, dict[str, str], bytes], message: str
) -> None:
    hub.answer = answer
    with pytest.raises(HubError, match=message):
        check_source(NAME, COMMIT)


def test_a_hub_that_hangs_is_not_waited_for(
    hub: type[_Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(HubUnreachableError, match=r"cache lacks config\.json, .*does not ans"):
            check_source(NAME, COMMIT, timeout_s=0.3)


def cache(folder: Path, *left_out: str) -> None:
    """Write a model where `huggingface_hub` keeps one that it downloaded."""
    write_model(folder / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT, *left_out)


def test_nothing_is_asked_where_the_cache_holds_everything(
    hub: type[_Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path / "cache")
    check_source(NAME, COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_source(NAME, COMMIT)
    assert hub.asked == []


def test_what_the_cache_lacks_is_asked_for_and_missed_offline(
    hub: type[_Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path / "cache", "model.safetensors")
    hub.answer = listing("config.json", "tokenizer.json", "model.safetensors")
    check_source(NAME, COMMIT)
    assert len(hub.asked) == 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match=r"lacks model\.safetensors of .*HF_HUB_OFFLINE"):
        check_source(NAME, COMMIT)
    assert len(hub.asked) == 1


def test_a_download_that_was_cut_off_is_found_in_the_cache(hub: type[_Hub], tmp_path: Path) -> None:
    cache(tmp_path / "cache")
    (path,) = (tmp_path / "cache").rglob("model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        check_source(NAME, COMMIT)


def test_a_name_that_is_neither_folder_nor_repository(hub: type[_Hub]) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder nor a name that the hub could"):
        check_source("a/b/c")
    assert hub.asked == []
