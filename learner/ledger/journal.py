"""The journal: the ledger's events and the groups that were accepted, on disk before anyone knows.

`journal/` holds segments, each named after the number of its first entry. A segment is a sequence
of frames (`frames.py`) in msgpack: a `SegmentHeader`, then events and groups. `journal_reader.py`
reads them.

A group stands before the `GroupReceived` that accepts it. Every checkpoint begins a segment, so
what follows a checkpoint is whole segments. A killed writer leaves a torn frame at the end at most:
nobody was told of it, and it is cut off.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from learner.ledger.events import AnyEvent
from learner.ledger.frames import frame
from protocol.messages.messages import PROTOCOL_VERSION, Group
from protocol.run_record import sync_folder

FORMAT = 1
SEGMENT_BYTES = 64 << 20  # a segment that has grown to this size is followed by another

Entry = AnyEvent | Group

_encoder = msgspec.msgpack.Encoder()


class JournalIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What two parts of a journal must share to belong together.

    `settings` is a digest of the settings that decide what is trained; `boot` identifies the start
    of the machine, since when written data cannot have been lost (see `protocol.hosts.boot_id`).
    """

    run: str
    model_digest: str
    tokenizer_digest: str
    settings: str
    boot: str


class SegmentHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame of a segment: whose it is, and where it begins.

    `first` is the number of its first entry, counted over the whole journal. `checkpoint`: the
    checkpoint of this step holds what all earlier entries led to.
    """

    identity: JournalIdentity
    first: int
    checkpoint: int | None
    format: int = FORMAT
    protocol: int = PROTOCOL_VERSION  # of the groups


class JournalWriter:
    """Appends entries to the newest segment of `folder`; `number` is that of the next entry.

    The first segment is made when the first entry is appended.
    """

    def __init__(self, folder: Path, identity: JournalIdentity, number: int) -> None:
        self.number = number
        self._folder = folder
        self.identity = identity
        self._checkpoint: int | None = None
        self._descriptor: int | None = None
        self._size = 0
        self._synced = True
        self._closing = threading.Lock()  # so that no descriptor is closed while it is synced

    def append(self, entries: Sequence[Entry]) -> None:
        """Append entries, all or none; raises OSError if the disk does not take them.

        Afterwards they survive the end of this process, however it comes. See `sync` for more.
        """
        if not entries:
            return
        if self._descriptor is None or self._size >= SEGMENT_BYTES:
            self._open_segment()

        self._write(b"".join(frame(_encoder.encode(entry)) for entry in entries))
        self.number += len(entries)

    def begin_segment(self, checkpoint: int) -> int:
        """Have the next entry begin a segment, that of a checkpoint; return the entry's number."""
        self.close()
        self._checkpoint = checkpoint
        return self.number

    def sync(self) -> None:
        """Make what was appended survive a power cut as well. Another thread may call this."""
        with self._closing:
            if self._descriptor is not None and not self._synced:
                self._synced = True
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the segment; a further entry begins another."""
        self.sync()
        with self._closing:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _open_segment(self) -> None:
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        # Of that name there may be a segment without entries: its writer was killed at once.
        path = self._folder / segment_name(self.number)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._size = 0

        header = SegmentHeader(
            identity=self.identity, first=self.number, checkpoint=self._checkpoint
        )
        try:
            self._write(frame(_encoder.encode(header)))
        except OSError:
            self.close()  # the next append begins it again
            raise
        self._checkpoint = None
        sync_folder(self._folder)

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        rest, offset = memoryview(data), self._size
        try:
            while rest:
                written = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError:
            # A part of it may be there; a reader would take it for a torn end, and stop.
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size = offset
        self._synced = False


def segments(folder: Path) -> list[Path]:
    """Return the segments of a journal, oldest first."""
    return sorted(folder.glob("*.seg"))


def segment_name(number: int) -> str:
    """Return the name of the segment that begins with this entry."""
    return f"{number:012d}.seg"


def set_aside(folder: Path, start: int) -> None:
    """Move the segments from entry `start` on to `undone/`: another history follows there."""
    later = [path for path in segments(folder) if segment_number(path) >= start]
    if not later:
        return
    aside = folder / "undone"
    aside.mkdir(exist_ok=True)
    for path in later:
        os.replace(path, _unused(aside / path.name))
    sync_folder(folder)


def segment_number(path: Path) -> int:
    """Return the number of the first entry of a segment."""
    return int(path.stem)


def _unused(path: Path) -> Path:
    """Return `path`, or a name beside it that is free."""
    count = 1
    found = path
    while found.exists():
        count += 1
        found = path.with_name(f"{path.name}.{count}")
    return found
