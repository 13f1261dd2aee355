"""One learner per run folder: a lock that the kernel releases when the process ends, however."""

import fcntl
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import ConfigError

log = logging.getLogger("pippin.learner")
LOCK = "learner.pid"


@contextmanager
def hold_run_folder(folder: Path) -> Generator[None]:
    """Hold the run folder inside the context; raise ConfigError if another learner does.

    Two of them would write the same records and checkpoints. A learner whose launcher was killed
    may still finish a step and save before it ends.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{folder}: another learner (process {file.read().strip() or 'unknown'}) is "
                "working in this run folder; stop it or wait for its end, then resume"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked against a second learner: %s", folder, error)

        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
