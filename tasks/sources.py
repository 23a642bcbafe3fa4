"""Where a task's files come from: a pinned release, a folder of your own, or a grammar.

A task has one `Source` and asks it for a folder; which of the three it is makes no other difference
to the task. Kinds:

- ``hub`` downloads the files of a `Release` (one commit, a checksum for each file) into the cache.
- ``files`` reads a folder of yours.
- ``embedded`` writes a corpus in the real files' format into a temporary folder.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pooch
import requests
from requests.exceptions import RequestException

from delta_lora.checks import Matches, OneOf, Range, check_choice, check_values, expanded, shown
from delta_lora.writing import failed, writing
from tasks.data import listing

KINDS = ("hub", "files", "embedded")
#: how a task's constructor declares what it hands on.
Kind = Annotated[str, OneOf(KINDS)]
Seed = Annotated[int, Range(at_least=0, at_most=2**32 - 1)]
#: how many inputs of a split are decoded.
MaxInputs = Annotated[int, Range(at_least=1, at_most=10**9)]
Sizes = Mapping[
    str,
    Annotated[
        int, Range(at_least=1, at_most=5000, why="the grammar has no more texts that differ")
    ],
]
_HUB = "https://huggingface.co"
#: behind what is wrong with the cache.
_ELSEWHERE = "give the same command again; task.cache_dir=FOLDER names another cache"
_ADVICE = (
    "where there is no network, take a copy of the files and use task.source=files "
    "task.data_dir=FOLDER"
)


@dataclass(kw_only=True)
class Source:
    """The source of one task's files.

    Attributes:
        kind: ``hub``, ``files`` or ``embedded``.
        write: writes the ``embedded`` corpus: called with a folder, ``seed`` and ``sizes``.
        release: the pinned files, needed by ``hub``; ``files`` are compared with them.
        data_dir: the folder of ``files``; None with any other kind. A relative one starts at the
            working folder.
        cache_dir: where downloads and encoded data are kept; None takes the user's cache folder.
        embedded_seed: seed of the ``embedded`` corpus; not the seed of the run.
        embedded_sizes: split -> rows of the ``embedded`` corpus; None takes its defaults.
        splits: of the ``embedded`` corpus.
        needed: names that `release` must have.
        key: the setting that `release` stands in, for messages.

    Raises:
        ValueError: the kind is unknown, a folder is given without ``files`` or missing with it, or
            the release is missing or lacks a file.
    """

    kind: Kind
    write: Callable[..., None]
    release: Release | None = None
    data_dir: str | Path | None = None
    cache_dir: str | Path | None = None
    embedded_seed: Seed = 0
    embedded_sizes: Sizes | None = None
    splits: Collection[str] = ()
    needed: Collection[str] = ()
    key: str = "release"

    def __post_init__(self) -> None:
        own = ("release", "data_dir", "cache_dir", "embedded_seed", "embedded_sizes")
        values = {name: getattr(self, name) for name in own}
        check_values(Source, {"source": self.kind, **values}, prefix="task.")
        check_choice("task.source", self.kind, KINDS)
        if (
            self.embedded_sizes is not None
            and self.splits
            and set(self.embedded_sizes) != set(self.splits)
        ):
            raise ValueError(
                f"task.embedded_sizes={shown(dict(self.embedded_sizes))}: it must have a number "
                f"for each of {', '.join(self.splits)} and for nothing else; or write null for "
                "the usual sizes"
            )
        if (self.data_dir is not None) != (self.kind == "files"):
            raise ValueError(
                f"task.source={self.kind} with task.data_dir={self.data_dir}: "
                "task.source=files needs task.data_dir=FOLDER, and a folder goes with "
                "task.source=files and with nothing else"
            )
        if self.release is None and self.kind == "hub":
            raise ValueError(
                f"task.source=hub without task.{self.key}: a download needs its commit and "
                "checksums; give them, or use task.source=files or embedded"
            )
        if self.release and (missing := set(self.needed) - set(self.release.files)):
            raise ValueError(f"task.{self.key}.files lacks {sorted(missing)}")

    def check(self, find: Callable[[Path], object]) -> None:
        """Check that the files are there or can be downloaded, without reading them at length.

        Args:
            find: looks for the task's files in a folder of ``files``; raises where one is missing.

        Raises:
            FileNotFoundError: a folder or file is missing.
            RuntimeError: a file is neither in the cache nor where it is downloaded from.
        """
        if self.kind == "files":
            assert self.data_dir is not None
            find(open_folder(self.data_dir))
        elif self.kind == "hub":
            assert self.release is not None
            self.release.check_source(self.cache_dir)

    @contextmanager
    def open(self) -> Iterator[Path]:
        """Give the folder with the files; that of ``embedded`` is gone afterwards.

        Raises:
            FileNotFoundError: the folder is missing.
            RuntimeError: a file cannot be downloaded.
            ValueError: what was downloaded is not the pinned file.
            WriteError: the files cannot be written.
        """
        if self.kind == "embedded":
            with TemporaryDirectory() as temporary:
                folder = Path(temporary)
                with writing(folder, "give the same command again; TMPDIR names another folder"):
                    self.write(folder, seed=self.embedded_seed, sizes=self.embedded_sizes)
                yield folder
        elif self.kind == "files":
            assert self.data_dir is not None
            yield open_folder(self.data_dir)
        else:
            assert self.release is not None
            yield self.release.fetch(self.cache_dir)

    def official(self, name: str) -> str | None:
        """Return the sha256 of the pinned file of this name; None where there is none."""
        return self.release.files.get(name) if self.release else None

    def facts(self) -> dict[str, str | int | None]:
        """Return what a record says: the kind, the revision and the seed, where they decide."""
        return {
            "source": self.kind,
            "revision": self.release.revision if self.release and self.kind == "hub" else None,
            "embedded_seed": self.embedded_seed if self.kind == "embedded" else None,
        }

    @property
    def encoded_folder(self) -> Path | None:
        """Where `tasks.encoded` keeps tokens; None for the small ``embedded`` data."""
        return None if self.kind == "embedded" else cache_folder(self.cache_dir) / "encoded"


@dataclass(frozen=True)
class Release:
    """Files of a repository at one commit, with their checksums.

    Attributes:
        repository: for example ``microsoft/LoRA``.
        commit: full hash, 40 hexadecimal digits.
        url: folder that the files are downloaded from; it should contain the commit.
        files: file name -> sha256 of the unpacked file.
    """

    repository: Annotated[str, Matches(r"[\w.-]+/[\w.-]+", "OWNER/NAME, as microsoft/LoRA")]
    commit: Annotated[
        str,
        Matches(
            "[0-9a-f]{40}",
            "a full hash (40 hexadecimal digits); a branch or a short hash does not pin the data",
        ),
    ]
    url: Annotated[
        str, Matches(r"(https?|file)://\S+", "an address, as https://example.org/data/COMMIT")
    ]
    files: Mapping[str, Annotated[str, Matches("[0-9a-f]{64}", "a sha256, 64 hexadecimal digits")]]

    def __post_init__(self) -> None:
        check_values(Release, vars(self), prefix="release.")
        object.__setattr__(self, "files", dict(self.files))
        for name in self.files:
            if not re.fullmatch(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*", name):
                raise ValueError(
                    f"release.files={name!r} is no name of a file within the repository; write "
                    "names of letters, digits and any of _ . + -, with / between folders"
                )

    @property
    def revision(self) -> str:
        """``repository@commit``."""
        return f"{self.repository}@{self.commit}"

    def fetch(self, cache_dir: str | Path | None = None, *, retries: int = 2) -> Path:
        """Download the files that the cache does not hold yet, and verify all of them.

        Where the cache holds them, nothing is asked of the network.

        Args:
            cache_dir: None takes the user's cache folder.
            retries: further attempts after a failed or damaged download.

        Returns:
            The folder that holds the files.

        Raises:
            RuntimeError: a file cannot be downloaded.
            ValueError: what was downloaded is not the pinned file.
            WriteError: the cache cannot be written.
        """
        folder = self._folder(cache_dir)
        fetcher = pooch.create(
            path=folder,
            base_url=f"{self._address}/",
            registry={name: f"sha256:{sha256}" for name, sha256 in self.files.items()},
            retry_if_failed=retries,
        )
        downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=60)
        for name in self.files:
            try:
                fetcher.fetch(name, downloader=downloader)
            except RequestException as error:
                raise RuntimeError(
                    f"could not download {fetcher.get_url(name)} ({self.revision}): {error}; "
                    f"{_ADVICE}"
                ) from error
            except OSError as error:
                raise failed(folder / name, error, _ELSEWHERE) from error
            except ValueError as error:
                raise ValueError(
                    f"{fetcher.get_url(name)} is not the pinned file of {self.revision} "
                    f"(sha256 {self.files[name]} expected): the download is damaged or something "
                    f"else answered in its place; {_ADVICE}"
                ) from error
        return folder

    def check_source(self, cache_dir: str | Path | None = None, *, timeout_s: float = 20.0) -> None:
        """Check that every file is in the cache or can be downloaded, without downloading any.

        Only of files that the cache lacks is the network asked, see `remote_size`.

        Args:
            cache_dir: as for `fetch`.
            timeout_s: seconds to wait for each answer.

        Raises:
            RuntimeError: a file is neither in the cache nor where it is downloaded from.
        """
        folder = self._folder(cache_dir)
        for name in self.files:
            if (folder / name).is_file():
                continue
            try:
                remote_size(self.file_url(name), timeout_s=timeout_s)
            except RequestException as error:
                raise RuntimeError(
                    f"{self.file_url(name)} ({self.revision}) cannot be downloaded: {error}; "
                    f"{_ADVICE}"
                ) from error

    def file_url(self, name: str) -> str:
        """Return the address of one of `files`."""
        return f"{self._address}/{name}"

    @property
    def _address(self) -> str:
        """`url` without a slash at its end; the hub's on the mirror that HF_ENDPOINT names."""
        mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
        url = self.url.rstrip("/")
        is_hub = url.startswith(f"{_HUB}/")
        return f"{mirror}{url.removeprefix(_HUB)}" if mirror and is_hub else url

    def _folder(self, cache_dir: str | Path | None) -> Path:
        return cache_folder(cache_dir) / self.repository.replace("/", "--") / self.commit


def remote_size(url: str, *, timeout_s: float) -> int | None:
    """Return the size in bytes of a file on the network, without downloading it.

    It asks for one byte, as a download would ask for all: redirections to another server are
    followed, and some of those answer nothing else.

    Args:
        url: address of the file.
        timeout_s: seconds to wait for an answer.

    Returns:
        None where the server does not say.

    Raises:
        RequestException: the file is not there, or there is no answer.
    """
    headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=timeout_s) as answer:
        answer.raise_for_status()
        is_part = answer.status_code == requests.codes.partial
        header = answer.headers.get("Content-Range" if is_part else "Content-Length", "")
    size = header.rpartition("/")[2]  # bytes 0-0/123, or 123
    return int(size) if size.isdecimal() else None


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Return `cache_dir`, or the suite's folder in the user's cache where it is None."""
    return expanded(pooch.os_cache("delta_lora") if cache_dir is None else cache_dir)


def open_folder(data_dir: str | Path) -> Path:
    """Return `data_dir` as an absolute path; a relative one starts at the working folder.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
    """
    folder = expanded(data_dir).resolve()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"data_dir={str(data_dir)!r} is a file; give the folder it is in")
    parent = next(parent for parent in folder.parents if parent.is_dir())
    raise FileNotFoundError(
        f"data_dir={str(data_dir)!r} does not exist (looked for {folder}; {parent} holds "
        f"{listing(parent)})"
    )
