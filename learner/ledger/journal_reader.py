"""Reads a journal: its entries in order, and how it ended."""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from learner.ledger.frames import HEAD, frame_at, is_frame_head
from learner.ledger.journal import (
    FORMAT,
    Entry,
    SegmentHeader,
    segment_number,
    segments,
)
from protocol.errors import JournalError
from protocol.messages.messages import PROTOCOL_VERSION
from protocol.run_record import sync_folder

_headers = msgspec.msgpack.Decoder(SegmentHeader)
_entries: msgspec.msgpack.Decoder[Entry] = msgspec.msgpack.Decoder(Entry)


@dataclass
class JournalEnd:
    """Where reading a journal ended: `number` is that of the next entry.

    `path` and `size`: the last segment that was read, and how much of it is whole. `torn`: bytes of
    a last frame that was not written to its end. `damage`: what is wrong, if the journal does not
    end there; `lost` are the entries after the damage that can still be read.
    """

    number: int
    path: Path | None = None
    size: int = 0
    torn: int = 0
    damage: str = ""
    lost: list[Entry] = field(default_factory=list[Entry])


class JournalReader:
    """Reads a journal's entries from number `start` on; `end` says how far that was possible.

    Raises JournalError if `start` is not in the journal.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        self.end = JournalEnd(number=start)
        self._paths = [path for path in segments(folder) if segment_number(path) >= start]
        found = segment_number(self._paths[0]) if self._paths else start
        if found != start:
            raise JournalError(
                f"{folder}: required a segment that begins with entry {start}, where the "
                f"checkpoint was made; the first one after it begins with {found}. Put back the "
                "missing segments, or delete the journal to continue from the checkpoint alone"
            )

    def __iter__(self) -> Iterator[tuple[SegmentHeader, Entry]]:
        for index, path in enumerate(self._paths):
            last = index + 1 == len(self._paths)
            segment = _Segment(path)
            try:
                if segment.header is not None and segment.header.first != self.end.number:
                    segment.problem = f"entries {self.end.number} to {segment.header.first - 1}"
                    segment.problem += " are missing before it"
                elif segment.header is not None:
                    for entry in segment:
                        self.end.number += 1
                        yield segment.header, entry
            finally:
                self.end.path, self.end.size = path, segment.whole

            if segment.problem or (segment.torn and not last):
                what = segment.problem or "it ends in the middle of an entry"
                self.end.damage = f"{path.name}: {what}"
                self.end.lost = [*segment.rest(), *_salvage(self._paths[index + 1 :])]
                return
            self.end.torn = segment.torn


def read_header(path: Path) -> SegmentHeader | None:
    """Return a segment's header, or None if it has no whole one; nothing else of it is read."""
    with path.open("rb") as file:
        head = file.read(HEAD.size)
        length = HEAD.unpack(head)[0] if is_frame_head(memoryview(head), 0) else 0
        found = frame_at(memoryview(head + file.read(length)), 0)
    if found is None or found[0] is None:
        return None

    try:
        header = _headers.decode(found[0])
    except msgspec.MsgspecError:
        return None
    _require_version(path, header)
    return header


def drop_before(folder: Path, step: int) -> None:
    """Delete the segments that came before the checkpoint of `step`."""
    paths = segments(folder)
    for index, path in reversed(list(enumerate(paths))):
        header = read_header(path)
        if header is not None and header.checkpoint == step:
            for old in paths[:index]:
                old.unlink(missing_ok=True)
            return


def cut(folder: Path, end: JournalEnd) -> None:
    """End the journal where reading it ended; damaged segments are kept aside in `damaged/`."""
    if end.path is None:
        return
    if end.damage:
        aside = folder / "damaged"
        aside.mkdir(exist_ok=True)
        for path in segments(folder):
            if path >= end.path:
                shutil.copyfile(path, aside / path.name)
            if path > end.path:
                path.unlink()

    if end.size == 0:
        end.path.unlink()
    else:
        os.truncate(end.path, end.size)
    sync_folder(folder)


# ---- inside --------------------------------------------------------------------------------------


class _Segment:
    """The frames of one segment: iterate over its entries once, then see how it ended.

    `whole` counts the bytes of its whole frames, `torn` those of an incomplete last one. `problem`
    says what is wrong with a frame that was complete once.
    """

    def __init__(self, path: Path) -> None:
        self.problem = ""
        self.whole = 0
        self.torn = 0
        self.header: SegmentHeader | None = None
        self._data = memoryview(path.read_bytes())

        payload = self._next()
        if payload is not None:
            try:
                self.header = _headers.decode(payload)
            except msgspec.MsgspecError as error:
                self.problem = f"its header cannot be read: {error}"
        if self.header is not None:
            _require_version(path, self.header)

    def __iter__(self) -> Iterator[Entry]:
        while (payload := self._next()) is not None:
            try:
                entry = _entries.decode(payload)
            except (msgspec.MsgspecError, ValueError) as error:
                self._take_back(payload)
                self.problem = f"an entry at byte {self.whole} cannot be read: {error}"
                return
            yield entry

    def rest(self) -> list[Entry]:
        """Return the entries after the problem that can be read."""
        found: list[Entry] = []
        position = self.whole
        while (frame := frame_at(self._data, position)) is not None:
            payload, position = frame
            if payload is not None:
                found += _decoded(payload)
        return found

    def _next(self) -> memoryview | None:
        """Return the next payload; None at the end, or where the segment is torn or damaged."""
        left = len(self._data) - self.whole
        if left == 0:
            return None

        frame = frame_at(self._data, self.whole)
        if frame is None:
            # Unwritten blocks of a file are zeros after a power cut.
            cut_short = left < HEAD.size or not any(self._data[self.whole :])
            if cut_short or is_frame_head(self._data, self.whole):
                self.torn = left
            else:
                self.problem = f"damaged at byte {self.whole}"
            return None

        payload, end = frame
        if payload is None:
            if end == len(self._data):
                self.torn = left
            else:
                self.problem = f"an entry at byte {self.whole} does not have its checksum"
            return None
        self.whole = end
        return payload

    def _take_back(self, payload: memoryview) -> None:
        self.whole -= len(payload) + HEAD.size


def _require_version(path: Path, header: SegmentHeader) -> None:
    ours, theirs = (FORMAT, PROTOCOL_VERSION), (header.format, header.protocol)
    if ours != theirs:
        raise JournalError(
            f"{path}: required a journal of format {ours[0]} with groups of protocol version "
            f"{ours[1]}, got format {theirs[0]} and version {theirs[1]}; go on with the version of "
            "Pippin that wrote it"
        )


def _decoded(payload: memoryview) -> list[Entry]:
    try:
        return [_entries.decode(payload)]
    except (msgspec.MsgspecError, ValueError):
        return []


def _salvage(paths: Iterable[Path]) -> list[Entry]:
    """Return what can be read of segments that come after a damaged one."""
    found: list[Entry] = []
    for path in paths:
        segment = _Segment(path)
        found += segment
        found += segment.rest() if segment.problem else []
    return found
