"""Files that cannot be written: one line with the path, what was wrong, and what to do.

Whatever writes a file does so within `writing`, which turns the system's error into `WriteError`.
`whole` writes a file under another name first, so that a kill or a full disk leaves the one before
or the new one, and nothing half.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

#: of every file and folder that is not whole yet.
UNFINISHED = ".writing-"
#: what to do, where no caller knows better.
CONTINUES = "give the same command again: it continues"
_then: ContextVar[str | None] = ContextVar("then", default=None)
_ADVICE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "mount it for writing, or name another folder",
    errno.EACCES: "allow writing there, or name another folder",
    errno.EPERM: "allow writing there, or name another folder",
    errno.ENAMETOOLONG: "name a folder with a shorter path",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files on this machine",
    errno.ENOTDIR: "remove the file that stands where a folder belongs",
    errno.EEXIST: "remove what stands in its place",
    errno.EISDIR: "remove the folder that stands in its place",
    errno.ENOENT: "see that its folder exists",
}


class WriteError(OSError):
    """A file or a folder could not be written; the message is one line.

    Args:
        message: with the path, what was wrong, and what to do.
        number: of the system's error, where it is known.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


@contextlib.contextmanager
def writing(path: Path, then: str = CONTINUES) -> Iterator[None]:
    """Say of what goes wrong in the block that `path` cannot be written, and what to do.

    Args:
        path: the file or folder that the block writes.
        then: what to do behind the cause is mended.

    Raises:
        WriteError: the system, or a library that writes for us, could not.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise failed(path, error, then) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # not imported for its name alone
            raise
        raise failed(path, error, then) from error


@contextlib.contextmanager
def advising(then: str) -> Iterator[None]:
    """Say `then` behind whatever cannot be written in the block: a caller who knows better."""
    token = _then.set(then)
    try:
        yield
    finally:
        _then.reset(token)


def failed(path: Path, error: Exception, then: str = CONTINUES) -> WriteError:
    """Return the error for a path that could not be written, as `writing` raises it."""
    message = f"cannot write {_shown(path)}: {reason_of(path, error)}, then {_then.get() or then}"
    return WriteError(message, _number_of(error))


def reason_of(path: Path, error: Exception) -> str:
    """Return in one line why a path could not be written, and what to do about it."""
    number = _number_of(error)
    reason = str(error) if number is None else os.strerror(number)
    advice = _ADVICE.get(number or 0, "mend that")
    return f"{' '.join(reason.split())}{_room(path, number)}; {advice}"


def _shown(path: Path) -> str:
    """Return a path in one line, without the names of what is not whole yet."""
    parts = [re.sub(rf"^{re.escape(UNFINISHED)}(\d+-)?", "", part) for part in path.parts]
    named = Path(*(new for new, old in zip(parts, path.parts, strict=True) if old == new or new))
    return " ".join(str(named).split()) if "\n" in str(named) else str(named)


def _number_of(error: Exception) -> int | None:
    return error.errno if isinstance(error, OSError) else _number_in(str(error))


def _number_in(text: str) -> int | None:
    """Return the number in ``... (os error 28)``, as Rust says it."""
    _, found, rest = text.rpartition("(os error ")
    number = rest.partition(")")[0]
    return int(number) if found and number.isdigit() else None


def _room(path: Path, number: int | None) -> str:
    """Return in words how much may still be written, where that is the reason."""
    if number == errno.EFBIG:
        return f" (a file may have {resource.getrlimit(resource.RLIMIT_FSIZE)[0]:,} bytes)"
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    try:
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
        free, files = shutil.disk_usage(place).free, os.statvfs(place).f_favail
    except (OSError, StopIteration):
        return ""
    return f" ({free:,} bytes free" + (")" if files else ", and no more files can be made)")


def discard(path: Path) -> None:
    """Remove what is not whole, a file or a folder; never an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def whole(path: Path, then: str = CONTINUES) -> Iterator[Path]:
    """Yield where to write a file or a folder that then becomes `path`, flushed to the disk.

    Whatever stops the block removes what it wrote. A file replaces the one that stood there.

    Raises:
        WriteError: it could not be written.
    """
    temporary = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    with writing(path, then):
        for left in path.parent.glob(f"{UNFINISHED}*"):
            pid, _, name = left.name.removeprefix(UNFINISHED).partition("-")
            if name == path.name and not _is_alive(pid):  # of a process that was killed
                discard(left)
        try:
            yield temporary
            if temporary.is_file():
                flush(temporary)
            temporary.replace(path)
        except BaseException:
            discard(temporary)  # half a file would only fill the disk further
            raise


def _is_alive(pid: str) -> bool:
    """Return whether another process has this number, on this machine."""
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def write_text(path: Path, text: str, then: str = CONTINUES) -> Path:
    """Write a text as UTF-8, whole or not at all; return `path`.

    Raises:
        WriteError: it could not be written.
    """
    with whole(path, then) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def make_folder(path: Path, then: str = CONTINUES) -> Path:
    """Make a folder and those above it where they do not exist; return it.

    Raises:
        WriteError: it cannot be made.
    """
    with writing(path, then):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def filling(folder: Path, then: str = CONTINUES) -> Iterator[Path]:
    """Yield a folder for files that then stand in `folder`, all of them or none.

    Files of other names stay there. For libraries that write a folder as they like.

    Raises:
        WriteError: one could not be written.
    """
    is_new = not folder.exists()
    temporary = folder / f"{UNFINISHED}{os.getpid()}-"
    with writing(folder, then):
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        try:
            temporary.mkdir()
            yield temporary
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                flush(path)
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
        except BaseException:
            discard(temporary)
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        discard(temporary)


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left half written in a folder."""
    for path in folder.glob(f"{UNFINISHED}*"):
        discard(path)
