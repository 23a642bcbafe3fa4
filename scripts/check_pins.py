"""Ask the hub and GitHub whether every pinned file is there, and is what configs/pins.yaml says.

    python scripts/check_pins.py                      all pins; needs the network, downloads nothing
    python scripts/check_pins.py facebook/bart-large  some

One line a pin: PASS, or FAIL with what is wrong. Of a repository of the hub its listing is read:
names, sizes, and the sha256 of large files; of GitHub's files names and sizes. (A run compares
every data file with its sha256 when it downloads it.) HF_ENDPOINT and HF_TOKEN count. Exit code: 0
all pass, 1 one fails, 2 bad input, or nobody answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from delta_lora import console
from delta_lora.console import as_path
from delta_lora.sources import HubError, HubUnreachableError, RemoteFile, list_files
from scripts.runs.composition import CONFIGS
from tasks.sources import remote_size

LISTING = CONFIGS / "pins.yaml"
KINDS = ("model", "dataset", "github")
GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Pin:
    """One repository at one commit, and what is known of the files that are taken from it.

    Attributes:
        repository: for example ``facebook/bart-large``.
        kind: one of `KINDS`: a model or a data set of the Hugging Face hub, or a GitHub repository.
        revision: full commit hash.
        verified: whether the bytes of the commit were compared with `files`.
        source: where what `files` say comes from.
        files: name to size and sha256; None where unknown.
    """

    repository: str
    kind: str
    revision: str
    verified: bool
    source: str
    files: Mapping[str, RemoteFile]


class NoAnswerError(Exception):
    """A server that is asked does not answer."""


def read_pins(path: Path = LISTING) -> list[Pin]:
    """Return the pins of the committed list.

    Raises:
        ValueError: an entry is not one of `KINDS`, or lacks a value.
    """
    pins = []
    entries: Any = OmegaConf.to_container(OmegaConf.load(path))
    for entry in entries:
        if entry.get("kind") not in KINDS:
            raise ValueError(f"{path}: kind={entry.get('kind')!r}; allowed: {', '.join(KINDS)}")
        try:
            files = {name: RemoteFile(**known) for name, known in entry["files"].items()}
            pins.append(Pin(**{**entry, "files": files}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: {entry.get('repository')}: {error}") from error
    return pins


def find(pin: Pin, timeout_s: float, github: str = GITHUB) -> dict[str, RemoteFile]:
    """Return what the network has of the files of a pin, by name; absent ones are left out.

    Raises:
        HubError: the hub does not list the repository.
        NoAnswerError: the server does not answer.
        requests.RequestException: GitHub answers, but not for a file.
    """
    if pin.kind != "github":
        try:
            return list_files(pin.repository, pin.revision, kind=pin.kind, timeout_s=timeout_s)  # type: ignore[arg-type]
        except HubUnreachableError as error:
            raise NoAnswerError(str(error)) from error
    found = {}
    for name in pin.files:
        url = f"{github}/{pin.repository}/{pin.revision}/{name}"
        try:
            found[name] = RemoteFile(remote_size(url, timeout_s=timeout_s), None)
        except requests.HTTPError as error:
            if error.response is None or error.response.status_code != requests.codes.not_found:
                raise
        except (requests.ConnectionError, requests.Timeout) as error:
            raise NoAnswerError(f"{github} does not answer: {type(error).__name__}") from error
    return found


def compare(pin: Pin, found: Mapping[str, RemoteFile]) -> tuple[list[str], list[str]]:
    """Return what is wrong with a pin, and what the list does not know of it yet."""
    wrong, new = [], []
    for name, known in pin.files.items():
        if name not in found:
            wrong.append(f"no {name}")
            continue
        for what in ("size", "sha256"):
            here, there = getattr(known, what), getattr(found[name], what)
            if here is None and there is not None:
                new.append(f"{name}: {what}: {there}")
            elif there is not None and here != there:
                wrong.append(f"{what} of {name} is {there}, expected {here}")
    return wrong, new


def check(
    pins: Sequence[Pin], timeout_s: float, github: str = GITHUB
) -> list[tuple[Pin, list[str], list[str]]] | None:
    """Return for every pin what is wrong and what is new; None where nobody answers.

    A server that does not answer once is not asked again.
    """
    results, silent = [], dict[str, str]()
    has_answer = False
    for pin in pins:
        server = "github" if pin.kind == "github" else "hub"
        wrong: list[str] = []
        new: list[str] = []
        try:
            if server in silent:
                raise NoAnswerError(silent[server])
            wrong, new = compare(pin, find(pin, timeout_s, github))
            has_answer = True
        except NoAnswerError as error:
            silent[server] = str(error)
            wrong = [str(error)]
        except (HubError, requests.RequestException) as error:
            has_answer = True
            wrong = [str(error)]
        results.append((pin, wrong, new))
    return results if has_answer else None


def main(arguments: Sequence[str] | None = None, github: str = GITHUB) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repositories", nargs="*", metavar="OWNER/NAME", help="default: all")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for each answer")
    parser.add_argument("--listing", type=as_path, default=LISTING, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        pins = read_pins(options.listing)
    except (ValueError, OSError) as error:
        return console.complain(error)
    names = {pin.repository for pin in pins}
    if unknown := [name for name in options.repositories if name not in names]:
        print(f"error: {unknown} is not pinned; pinned are {sorted(names)}", file=sys.stderr)
        return 2
    chosen = [p for p in pins if not options.repositories or p.repository in options.repositories]
    results = check(chosen, options.timeout, github)
    if results is None:
        print(
            "error: neither the hub nor GitHub answers, so nothing was checked; connect this "
            "machine to the network (HF_ENDPOINT names a mirror of the hub; unset HF_HUB_OFFLINE)",
            file=sys.stderr,
        )
        return 2
    for pin, wrong, new in results:
        label = f"{pin.kind} {pin.repository}@{pin.revision[:12]}"
        print(f"FAIL {label}: {'; '.join(wrong)}" if wrong else f"PASS {label}")
        for line in new:
            print(f"     not in {LISTING.name} yet: {line}")
    num_failed = sum(bool(wrong) for _, wrong, _ in results)
    if num_failed:
        print(
            f"{num_failed} of {len(results)} pins fail: take another revision in configs/model or "
            f"configs/task and in {LISTING.name}, or a local copy (model.path=FOLDER, "
            "task.source=files task.data_dir=FOLDER)",
            file=sys.stderr,
        )
        return 1
    print(f"all {len(results)} pins are there")
    return 0


if __name__ == "__main__":
    console.run(main)
