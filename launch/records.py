"""Reading a run's records while they are written: lines that are partial or broken are left out."""

from pathlib import Path
from typing import Any

import msgspec


class LineTail:
    """A file's new lines at each call, from byte `offset` on; a last line without its end waits."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self._offset = offset

    def read(self) -> bytes:
        """Return the lines that were completed since the last call."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return data[:end]


class Tail:
    """Yields a JSONL file's new objects at each call."""

    def __init__(self, path: Path) -> None:
        self._lines = LineTail(path)

    def read(self) -> list[dict[str, Any]]:
        """Return the objects that were completed since the last call."""
        return parse_lines(self._lines.read())


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
