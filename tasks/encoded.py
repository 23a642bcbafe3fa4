"""Encoded splits: token ids as int32 columns, made once, kept on disk, shared by all processes.

Every cell of a table trains on the same tokens. The first process that needs a split encodes it,
block by block, into an Arrow file in the cache folder; all others map that file into memory, where
its pages are shared. Small splits and those of the embedded corpora stay in memory; both forms give
the same numbers.

A file is found by a hash of all that decides its content: every text, the whole state of the
tokenizer, the length limit, the task and its version. It says so itself, and its checksum stands
beside it (``<file>.sha256``, as ``sha256sum`` writes it), so a damaged or foreign file is made
again. Nothing here can stop a run: what cannot be kept on disk is encoded in memory, with one
warning. The folder may be removed at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

from delta_lora import locks
from delta_lora.writing import make_folder, whole, write_text

T = TypeVar("T")
#: one or more texts of a row.
Texts = str | tuple[str, ...]

logger = logging.getLogger(__name__)

#: of the file's layout.
FORMAT = 1
#: rows encoded at once: the lists of numbers, words and places of a tokenizer are large.
BLOCK = 1000
#: splits with fewer rows are encoded in every process, which takes seconds.
MIN_ROWS_ON_DISK = 5000
#: key of the file's own description in the metadata of its schema.
_ABOUT = b"delta_lora"
#: column that tells whether a row lost its end.
_IS_CUT = "is_cut"


@dataclass(frozen=True)
class Block:
    """What a task's encoder returns for some rows.

    Attributes:
        columns: name -> token ids of each row; the same names for every block of a split.
        cut: numbers of the rows, counted within the block, that lost their end.
    """

    columns: Mapping[str, Sequence[Sequence[int]]]
    cut: Sequence[int] = ()


@dataclass(frozen=True)
class Split:
    """What is to be encoded, and how.

    Attributes:
        name: of the file, for example ``glue_mnli-train``.
        what: in messages, for example ``examples of train``.
        version: of the task; bumped when its encoder changes.
        texts: one text, or a tuple of texts, for each row.
        encode: called with up to `BLOCK` texts and the number of the first.
        limit: tokens that a row may have.
        place: where a row comes from, for messages.
    """

    name: str
    what: str
    version: int
    texts: Sequence[Texts]
    encode: Callable[[Sequence[Texts], int], Block]
    limit: int
    place: Callable[[int], str]


class EncodedSplit:
    """Token ids of a split.

    Args:
        blocks: column -> (values, offsets) for equally many rows each, the last one fewer; both
            int32, row i of a block is ``values[offsets[i]:offsets[i + 1]]``.
        is_cut: (rows,) 1 where a row lost its end.
    """

    def __init__(
        self, blocks: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]], is_cut: np.ndarray
    ) -> None:
        self.columns = {name: [block[name] for block in blocks] for name in blocks[0]}
        self.num_cut = int(is_cut.sum())
        self.first_cut = int(is_cut.argmax()) if self.num_cut else None
        self._num_rows = len(is_cut)
        _, offsets = next(iter(blocks[0].values()))
        self._block = len(offsets) - 1

    def __len__(self) -> int:
        return self._num_rows

    def row(self, column: str, index: int) -> np.ndarray:
        """Return (tokens,) int32, not to be written to."""
        block, at = divmod(index, self._block)
        values, offsets = self.columns[column][block]
        return values[offsets[at] : offsets[at + 1]]

    def lengths(self, column: str) -> np.ndarray:
        """Return the number of tokens of each row, (rows,) int32."""
        return np.concatenate([np.diff(offsets) for _, offsets in self.columns[column]])


class Examples(Sequence[T], Generic[T]):
    """Examples that are made when they are taken.

    Args:
        num_examples: how many there are.
        make: returns one by its number.
    """

    def __init__(self, num_examples: int, make: Callable[[int], T]) -> None:
        self._range = range(num_examples)
        self._make = make

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._make(number) for number in self._range[index]]
        return self._make(self._range[index])


class Store:
    """The encoded splits of one task: each is encoded, or read, once in a process.

    Args:
        title: of the task, in messages.
        folder: where files are kept; None keeps everything in memory.
    """

    def __init__(self, title: str, folder: Path | None) -> None:
        self._title = title
        self._folder = folder
        self._known: dict[str, tuple[Any, int, EncodedSplit]] = {}

    def get(self, split: Split, tokenizer: Any) -> EncodedSplit:
        """Return the tokens of a split; the first time, log how many rows lost their end.

        Args:
            split: its name stands for its texts and its encoder, which must not change.
            tokenizer: must not change between two calls with the same object.

        Raises:
            ValueError: what the encoder says of a row.
        """
        known, limit, encoded = self._known.get(split.name, (None, None, None))
        if known is tokenizer and limit == split.limit and encoded is not None:
            return encoded
        encoded = encode(split, tokenizer, self._folder)
        self._known[split.name] = tokenizer, split.limit, encoded
        if encoded.first_cut is not None:
            logger.warning(
                "%s: %d of %d %s are longer than %d tokens and lose their end (first: %s)",
                self._title, encoded.num_cut, len(encoded), split.what, split.limit,
                split.place(encoded.first_cut),
            )  # fmt: skip
        return encoded


def encode(split: Split, tokenizer: Any, folder: Path | None) -> EncodedSplit:
    """Return the tokens of a split, from `folder` where they are already known.

    Args:
        split: what is encoded.
        tokenizer: what `split.encode` uses; one without a serialised state (no fast tokenizer) has
            nothing to find a file by, so that memory is used.
        folder: None uses memory.

    Raises:
        ValueError: what the encoder says of a row.
    """
    if folder is None or len(split.texts) < MIN_ROWS_ON_DISK:
        return _in_memory(split)
    state = tokenizer_sha256(tokenizer)
    if state is None:
        return _in_memory(split)
    about = _describe(split, state)
    key = hashlib.sha256(about.encode()).hexdigest()[:24]
    path = folder / f"{split.name}-{key}.arrow"
    try:
        return _read_or_make(path, about, split)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        if folder not in _WARNED_OF:
            _WARNED_OF.add(folder)
            logger.warning(
                "encoded data cannot be kept in %s (%s), so every run encodes them in memory; mend "
                "that, or choose another folder with task.cache_dir=FOLDER",
                folder, error,
            )  # fmt: skip
    return _in_memory(split)


_WARNED_OF: set[Path] = set()


# What decides the tokens


def _describe(split: Split, tokenizer: str) -> str:
    """Return all that decides the tokens of a split, as JSON."""
    digest = hashlib.sha256()
    for texts in split.texts:
        for text in (texts,) if isinstance(texts, str) else texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    about = {
        "format": FORMAT,
        "name": split.name,
        "version": split.version,
        "rows": len(split.texts),
        "texts": digest.hexdigest(),
        "limit": split.limit,
        "tokenizer": tokenizer,
        "packages": {name: version(name) for name in ("tokenizers", "transformers")},
    }
    return json.dumps(about, sort_keys=True)


def tokenizer_sha256(tokenizer: Any) -> str | None:
    """Return a checksum of all that decides how a tokenizer encodes; None if it is no fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    for setting in ("truncation", "padding"):  # of the last call
        state.pop(setting, None)
    settings = {
        name: getattr(tokenizer, name, None)
        for name in ("model_input_names", "truncation_side", "split_special_tokens")
    }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    whole = [type(tokenizer).__name__, state, settings, special]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


# In memory


def _blocks(split: Split) -> Iterator[tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]]:
    """Encode a split; yield the columns of each block, and which of its rows lost their end."""
    for start in range(0, len(split.texts), BLOCK):
        texts = list(split.texts[start : start + BLOCK])
        block = split.encode(texts, start)
        is_cut = np.zeros(len(texts), dtype=np.int8)
        is_cut[list(block.cut)] = 1
        yield {name: _flatten(rows) for name, rows in block.columns.items()}, is_cut


def _flatten(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.fromiter(chain.from_iterable(rows), np.int32, int(offsets[-1])), offsets


def _in_memory(split: Split) -> EncodedSplit:
    blocks, is_cut = zip(*_blocks(split), strict=True)
    return EncodedSplit(blocks, np.concatenate(is_cut))


# On disk


class _UnfitError(OSError):
    """A file is damaged, or of something else."""


def _read_or_make(path: Path, about: str, split: Split) -> EncodedSplit:
    """Return what `path` holds; one process makes it, others wait for that.

    Raises:
        OSError: the file cannot be written, or not be read again.
    """
    with contextlib.suppress(FileNotFoundError, _UnfitError):
        return _read(path, about)
    make_folder(path.parent)
    with _locked(path.with_suffix(".lock")):
        try:
            return _read(path, about)  # another process has made it meanwhile
        except FileNotFoundError:
            pass
        except _UnfitError as error:
            logger.warning("%s %s; it is made again", path, error)
        _write(path, about, split)
    return _read(path, about)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`."""
    held = locks.take(path, wait=False)
    if held is None:
        advice = locks.advice(path)
        logger.info("waiting for another process, which encodes %s%s", path.stem, advice)
        held = locks.take(path, wait=True)
    assert held is not None
    try:
        yield
    finally:
        held.release()


def _checksum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _write(path: Path, about: str, split: Split) -> None:
    """Encode a split into `path`, which appears when it is complete; its checksum comes last."""
    _checksum_of(path).unlink(missing_ok=True)
    logger.info("encoding %d %s, once, into %s", len(split.texts), split.what, path)
    with whole(path) as temporary:
        with temporary.open("wb") as stream:
            _write_arrow(stream, about, split)
        line = f"{_sha256(temporary)}  {path.name}\n"
    write_text(_checksum_of(path), line)


def _write_arrow(stream: Any, about: str, split: Split) -> None:
    writer = None
    for columns, is_cut in _blocks(split):
        arrays = {
            name: pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
            for name, (values, offsets) in columns.items()
        }
        batch = pa.RecordBatch.from_pydict({**arrays, _IS_CUT: pa.array(is_cut)})
        if writer is None:
            writer = pa.ipc.new_file(stream, batch.schema.with_metadata({_ABOUT: about}))
        writer.write_batch(batch)
    assert writer is not None, "a split has rows"
    writer.close()


def _read(path: Path, about: str) -> EncodedSplit:
    """Map a file into memory.

    Raises:
        FileNotFoundError: there is none, or none that was finished.
        _UnfitError: it is damaged, or of something else.
    """
    expected = _checksum_of(path).read_bytes().split()[:1]
    if expected != [_sha256(path).encode()]:
        raise _UnfitError("is damaged (its sha256 is not that of its .sha256 file)")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if (reader.schema.metadata or {}).get(_ABOUT) != about.encode():
            raise _UnfitError("is of something else")
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except pa.ArrowException as error:
        raise _UnfitError(f"is no Arrow file ({error})") from error
    names = [name for name in reader.schema.names if name != _IS_CUT]
    blocks = [
        {name: (batch[name].values.to_numpy(), batch[name].offsets.to_numpy()) for name in names}
        for batch in batches
    ]
    return EncodedSplit(blocks, np.concatenate([batch[_IS_CUT].to_numpy() for batch in batches]))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
