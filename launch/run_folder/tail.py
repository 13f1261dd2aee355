"""Reading a run's records while they are written: lines that are partial or broken are left out."""

import os
from pathlib import Path
from typing import Any

import msgspec


class LineTail:
    """A file's new lines at each call, from byte `offset` on; a last line without its end waits.

    A file that another has replaced is read from its beginning.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self._offset = offset
        self._file: int | None = None  # its inode

    def read(self) -> bytes:
        """Return the lines that were completed since the last call."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            found = os.fstat(file.fileno()).st_ino
            if self._file not in (None, found):
                self._offset = 0
            self._file = found
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return data[:end]


class Tail:
    """Yields a JSONL file's new objects at each call; of a file that was rewritten, as by a resume
    that leaves lines out, those that were not there before."""

    def __init__(self, path: Path) -> None:
        self._lines = LineTail(path)
        self._seen: set[int] = set()

    def read(self) -> list[dict[str, Any]]:
        """Return the objects that were completed since the last call."""
        lines = [line for line in self._lines.read().splitlines() if hash(line) not in self._seen]
        self._seen.update(map(hash, lines))
        return parse_lines(b"\n".join(lines))


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """Parse JSON objects, one a line; what is not an object is left out."""
    found: list[dict[str, Any]] = []
    for line in data.splitlines():
        try:
            value = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def number(line: dict[str, Any], name: str) -> float | None:
    """Return a metric if it is there and a number."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else None
