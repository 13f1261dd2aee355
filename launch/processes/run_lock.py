"""One learner a run folder: a lock that the kernel lets go of with the process, however it ends."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import ConfigError

log = logging.getLogger("pippin.learner")
LOCK = "learner.pid"


@contextmanager
def sole_learner(folder: Path) -> Iterator[None]:
    """Hold the run folder inside the context; raise ConfigError where another learner does.

    Two of them would write the same records and checkpoints. A learner whose launcher was killed
    works on for a step before it saves and ends.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{folder}: another learner (process {file.read().strip() or 'unknown'}) works in "
                "this run folder; wait for its end, or stop it, and resume then"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked against a second learner: %s", folder, error)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
