"""A child's log while it is written: what it says to the user, and what it says when it fails.

Our processes log `date time LEVEL message`; other lines (tracebacks, libraries) stay in the file.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from launch.run_folder.tail import LineTail

LISTED = 5  # bad rows shown one after another; the log has them all
ROW = "    row "
UNSAID = ("saved ", "stopping ")  # the display says as much in its own way
_RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ (INFO|WARNING|ERROR) (.*)")


class LogTail:
    """Yields the messages, INFO and WARNING, that were written after this object was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = LineTail(path, path.stat().st_size if path.exists() else 0)
        self._rows = 0

    def read(self) -> list[str]:
        """Return the messages that were completed since the last call."""
        text = self._lines.read().decode("utf-8", errors="replace")
        return list(self._shown(text.splitlines()))

    def _shown(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            record = _RECORD.match(line)
            if record is None or record[1] == "ERROR" or record[2].startswith(UNSAID):
                continue
            self._rows = self._rows + 1 if record[2].startswith(ROW) else 0
            if self._rows <= LISTED:
                yield record[2]
            elif self._rows == LISTED + 1:
                yield f"    … all of them: {self.path}"


def ending(text: str, count: int = 20) -> str:
    """Return at most `count` lines that say why a process failed: from its last ERROR on.

    Of a longer message the middle is left out; without an ERROR, the last lines are returned.
    """
    lines = text.splitlines()
    errors = [
        index
        for index, line in enumerate(lines)
        if (record := _RECORD.match(line)) and record[1] == "ERROR"
    ]
    if not errors:
        return "\n".join(lines[-count:])
    lines = lines[errors[-1] :]
    if len(lines) > count:
        half = count // 2
        lines = [*lines[:half], f"… {len(lines) - 2 * half} lines …", *lines[-half:]]
    return "\n".join(lines)
