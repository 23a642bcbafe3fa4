"""One process at a time: locks of the system, and files in their place where it has none.

A system's lock is freed with its process, and holds between machines on a file system whose locks
do (NFS 4, Lustre with ``flock``). Elsewhere a file says which process works (`filelock`'s
`SoftFileLock`): that of a process of this machine that has ended is taken over; of one on another
machine nobody here can know, so `advice` says what to remove.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

#: ends the name of the file that stands for a lock.
SOFT = ".soft"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

logger = logging.getLogger(__name__)
_told: set[Path] = set()


def take(path: Path, *, wait: bool) -> BaseFileLock | None:
    """Take a lock, and return it; None where another process has it.

    Args:
        path: of the lock's file; its folder exists.
        wait: wait for the other process.

    Raises:
        OSError: the file cannot be written.
    """
    held: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        held.acquire(blocking=wait)
        return held
    except Timeout:
        return None
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    if path.parent not in _told:
        _told.add(path.parent)
        logger.warning(
            "the file system of %s has no locks; %s stands for one", path.parent, soft(path)
        )
    held = SoftFileLock(soft(path))
    try:
        held.acquire(blocking=wait)
    except Timeout:
        return None
    return held


def soft(path: Path) -> Path:
    """Return the file that stands for a lock where the file system has none."""
    return path.with_name(f"{path.name}{SOFT}")


def advice(path: Path) -> str:
    """Return what to do, behind ``wait for it``, where a process that is gone holds a lock."""
    file = soft(path)
    return f", or, if it is gone, remove {file}" if file.exists() else ""
