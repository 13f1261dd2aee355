"""The journal's files: what is appended is read, torn ends are cut, damage is found and named."""

import errno
import os
from pathlib import Path

import msgspec
import pytest

from learner.ledger import journal
from learner.ledger.events import AnyEvent, BatchConsumed
from learner.ledger.frames import HEAD, frame, frame_at
from learner.ledger.journal import (
    Entry,
    JournalWriter,
    SegmentHeader,
    segment_name,
    segments,
    set_aside,
)
from learner.ledger.journal_reader import JournalReader, cut, drop_before, read_header
from protocol.errors import JournalError
from protocol.messages.messages import Group
from tests.learner.small_run import IDENTITY
from tests.protocol.builders import a_completion, a_group


def event(number: int) -> AnyEvent:
    return BatchConsumed(version=number)


def a_received_group() -> Group:
    return a_group(completions=[a_completion([5, 1], version=0)] * 2)


def read(folder: Path, start: int = 0) -> tuple[list[Entry], JournalReader]:
    reader = JournalReader(folder, start)
    return [entry for _, entry in reader], reader


def written(folder: Path, *parts: list[Entry]) -> list[Entry]:
    """Write each part as a segment of its own; return all entries."""
    writer = JournalWriter(folder, IDENTITY, 0)
    for step, part in enumerate(parts):
        if step:
            writer.begin_segment(step)
        writer.append(part)
    writer.close()
    return [entry for part in parts for entry in part]


def test_a_frame_is_length_checksums_and_payload():
    # CRC-32 of "123456789", the check value of its catalogue entry
    assert frame(b"123456789")[:8] == bytes.fromhex("09000000 2639f4cb")
    data = memoryview(b"xx" + frame(b"abc") + frame(b""))
    assert frame_at(data, 2) == (b"abc", 2 + HEAD.size + 3)
    assert frame_at(data, 2 + HEAD.size + 3) == (b"", len(data))
    assert frame_at(data, 1) is None


def test_entries_come_back_from_any_segment_on(tmp_path: Path):
    parts: list[list[Entry]] = [[event(1), a_received_group()], [event(2)], [event(3), event(4)]]
    entries = written(tmp_path, *parts)
    assert [path.name for path in segments(tmp_path)] == [
        segment_name(0), segment_name(2), segment_name(3)
    ]  # fmt: skip
    found, reader = read(tmp_path)
    assert found == entries
    assert (reader.end.number, reader.end.torn, reader.end.damage) == (5, 0, "")
    assert read(tmp_path, 3)[0] == entries[3:]
    headers = [read_header(path) for path in segments(tmp_path)]
    assert [header and header.checkpoint for header in headers] == [None, 1, 2]
    with pytest.raises(JournalError, match="required a segment that begins with entry 1"):
        read(tmp_path, 1)


def test_a_large_segment_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 400)
    writer = JournalWriter(tmp_path, IDENTITY, 7)
    for number in range(20):
        writer.append([event(number)])
    writer.close()
    assert len(segments(tmp_path)) > 1
    assert read(tmp_path, 7)[0] == [event(number) for number in range(20)]


def test_a_torn_end_is_cut_at_every_byte_and_the_journal_goes_on(tmp_path: Path):
    whole = written(tmp_path / "whole", [event(1), event(2), a_received_group()])
    (path,) = segments(tmp_path / "whole")
    data = path.read_bytes()
    last = len(frame(msgspec.msgpack.encode(whole[-1])))
    for size in range(len(data) - last, len(data)):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / path.name).write_bytes(data[:size])
        found, reader = read(folder)
        assert found == whole[:2]
        assert (reader.end.damage, reader.end.torn) == ("", size - (len(data) - last))
        cut(folder, reader.end)
        assert (folder / path.name).read_bytes() == data[:-last]
        writer = JournalWriter(folder, IDENTITY, reader.end.number)
        writer.append([event(9)])
        writer.close()
        again, reader = read(folder)
        assert again == [*whole[:2], event(9)]
        assert reader.end.damage == ""


def test_blocks_that_a_power_cut_left_empty_are_a_torn_end(tmp_path: Path):
    whole = written(tmp_path, [event(1)])
    (path,) = segments(tmp_path)
    with path.open("ab") as file:
        file.write(bytes(4096))
    found, reader = read(tmp_path)
    assert found == whole
    assert (reader.end.damage, reader.end.torn) == ("", 4096)


@pytest.mark.parametrize("where", ["payload", "length"])
def test_damage_in_the_middle_ends_reading_there_and_lists_what_follows(tmp_path: Path, where: str):
    entries = written(tmp_path, [event(1), event(2), event(3)], [event(4), event(5)])
    first, second = segments(tmp_path)
    data = bytearray(first.read_bytes())
    one = len(frame(msgspec.msgpack.encode(event(2))))
    at = len(data) - 2 * one
    data[at + (HEAD.size + 3 if where == "payload" else 1)] ^= 0xFF
    first.write_bytes(data)

    found, reader = read(tmp_path)
    assert found == entries[:1]
    assert reader.end.number == 1
    problem = "an entry at byte" if where == "payload" else "damaged at byte"
    assert f"{first.name}: {problem} {at}" in reader.end.damage
    # Nothing says where the next frame begins after a damaged length.
    assert reader.end.lost == (entries[2:] if where == "payload" else entries[3:])

    cut(tmp_path, reader.end)
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == [
        first.name, second.name
    ]  # fmt: skip
    assert (tmp_path / "damaged" / first.name).read_bytes() == data
    again, reader = read(tmp_path)
    assert (again, reader.end.damage) == (entries[:1], "")


def test_a_missing_segment_is_damage(tmp_path: Path):
    entries = written(tmp_path, [event(1)], [event(2), event(3)], [event(4)])
    segments(tmp_path)[1].unlink()
    found, reader = read(tmp_path)
    assert found == entries[:1]
    assert "entries 1 to 2 are missing before it" in reader.end.damage
    assert reader.end.lost == entries[3:]


class FullDisk:
    """Stands in for os.pwrite: takes `room` bytes, then no more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.pwrite = os.pwrite

    def __call__(self, descriptor: int, data: memoryview, offset: int) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.pwrite(descriptor, data[: self.room], offset)
        self.room -= taken
        return taken


@pytest.mark.parametrize("room", range(0, 60, 7))
def test_a_full_disk_leaves_whole_entries_and_the_next_try_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
):
    writer = JournalWriter(tmp_path, IDENTITY, 0)
    writer.append([event(1)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", FullDisk(room))
        with pytest.raises(OSError, match="No space left"):
            writer.append([event(2), event(3)])
        assert read(tmp_path)[0] == [event(1)]
    writer.append([event(2), event(3)])
    writer.close()
    found, reader = read(tmp_path)
    assert found == [event(1), event(2), event(3)]
    assert (writer.number, reader.end.torn) == (3, 0)


def test_a_segment_that_could_not_be_begun_is_begun_at_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    writer = JournalWriter(tmp_path, IDENTITY, 0)
    assert writer.begin_segment(5) == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", FullDisk(10))
        with pytest.raises(OSError, match="No space left"):
            writer.append([event(1)])
    writer.append([event(1)])
    writer.close()
    assert read(tmp_path)[0] == [event(1)]
    header = read_header(segments(tmp_path)[0])
    assert header is not None
    assert header.checkpoint == 5


def test_segments_before_a_checkpoint_are_dropped(tmp_path: Path):
    entries = written(tmp_path, [event(1)], [event(2)], [event(3)])
    drop_before(tmp_path, 2)
    assert read(tmp_path, 2)[0] == entries[2:]
    assert len(segments(tmp_path)) == 1
    drop_before(tmp_path, 7)
    assert len(segments(tmp_path)) == 1


def test_another_history_from_an_entry_on_keeps_the_old_one_aside(tmp_path: Path):
    entries = written(tmp_path, [event(1)], [event(2)], [event(3)])
    for _ in range(2):
        set_aside(tmp_path, 1)
        writer = JournalWriter(tmp_path, IDENTITY, 1)
        writer.append([event(9)])
        writer.close()
    assert read(tmp_path)[0] == [entries[0], event(9)]
    assert sorted(path.name for path in (tmp_path / "undone").iterdir()) == [
        segment_name(1), f"{segment_name(1)}.2", segment_name(2)
    ]  # fmt: skip


@pytest.mark.parametrize(("field", "said"), [("format", "got format 99 and"), ("protocol", "99;")])
def test_the_journal_of_another_version_is_refused_by_name(tmp_path: Path, field: str, said: str):
    header = SegmentHeader(identity=IDENTITY, first=0, checkpoint=None)
    other = msgspec.structs.replace(header, **{field: 99})
    (tmp_path / segment_name(0)).write_bytes(frame(msgspec.msgpack.encode(other)))
    with pytest.raises(JournalError, match=f"required a journal of format 1 with .*{said}"):
        read(tmp_path)
