"""Reads a run's files while they are written: partial and damaged lines are left out."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec

from protocol.run_record import EVENTS, AnyEvent, decode_lines, parse_events

_object: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


class LineTail:
    """Reads a file's new lines at each call, from byte `offset` on.

    A last line without its end waits for the next call. A file that was replaced by another is read
    from its beginning.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self._offset = offset
        self._inode: int | None = None

    def lines(self) -> Generator[bytes]:
        """Read the lines that were completed since the last call, one at a time."""
        if not self.path.exists():
            return

        with self.path.open("rb") as file:
            # A resume that leaves lines out replaces the file: another inode.
            inode = os.fstat(file.fileno()).st_ino
            if self._inode not in (None, inode):
                self._offset = 0
            self._inode = inode
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is still being written
                self._offset += len(line)
                yield line


class JsonTail:
    """Reads a JSONL file's new objects at each call.

    A resume replaces the file by one that lacks some lines; the others are not returned again.
    """

    def __init__(self, path: Path) -> None:
        self._lines = LineTail(path)
        self._seen: set[int] = set()

    def skip(self) -> None:
        """Count what is there as returned."""
        self._seen.update(map(hash, self._lines.lines()))

    def read(self) -> list[dict[str, Any]]:
        """Return the objects that were completed since the last call."""
        lines = [line for line in self._lines.lines() if hash(line) not in self._seen]
        self._seen.update(map(hash, lines))
        return parse_lines(b"".join(lines))


class StepTail:
    """Tells whether a run has come further than ever before since the last call."""

    def __init__(self, folder: Path) -> None:
        self._lines = JsonTail(folder / "metrics.jsonl")
        self._furthest = 0.0
        self.advanced()

    def advanced(self) -> bool:
        """Return whether a later step than all before was recorded since the last call."""
        steps = [number(line, "step") or 0.0 for line in self._lines.read()]
        before, self._furthest = self._furthest, max(self._furthest, *steps, 0.0)
        return self._furthest > before


class EventTail:
    """Reads the events of a run folder that are recorded after this object was made."""

    def __init__(self, folder: Path) -> None:
        path = folder / EVENTS
        self._lines = LineTail(path, path.stat().st_size if path.exists() else 0)

    def read(self) -> list[AnyEvent]:
        """Return the events that were completed since the last call."""
        return parse_events(b"".join(self._lines.lines()))


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """Parse one JSON object per line; lines that hold anything else are left out."""
    return decode_lines(data, _object)


def number(line: dict[str, Any], name: str) -> float | None:
    """Return a metric if it is there and a number."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else None
