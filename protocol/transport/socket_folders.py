"""Folders of local sockets under /tmp: which belong to a living run, and which can be removed.

A launcher locks its folder, and the system releases the lock however the launcher ends. As its
children may outlive it for a while, a folder is also in use while one of its sockets answers.
"""

import fcntl
import os
import shutil
import socket
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

PARENT = Path("/tmp")
PREFIX = "pippin-"
# A folder that was made a moment ago may not be locked yet.
DEAD_AFTER_S = 600.0


@contextmanager
def held(folder: Path) -> Generator[None]:
    """Keep `folder` from being removed as a dead run's, inside the block."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def remove_dead(parent: Path, *, older_than_s: float = DEAD_AFTER_S) -> list[Path]:
    """Remove our folders of runs that have ended, however much is left of them; return these.

    A folder that cannot be read or removed stays.
    """
    removed: list[Path] = []
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if _is_dead(folder, time.time() - older_than_s):
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


def _is_dead(folder: Path, before: float) -> bool:
    """Whether a folder of ours, unchanged since `before`, belongs to no living process."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return False
    if status.st_mtime > before:
        return False

    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)

    # Only sockets: another program may use the same prefix for its files.
    entries = list(folder.iterdir())
    return all(entry.is_socket() and not answers(entry) for entry in entries)


def answers(path: Path) -> bool:
    """Whether a process listens at a socket's path."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True
