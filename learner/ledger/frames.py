"""Frames: how a journal's entries stand in a file, each with checksums of its own.

    length of the payload   u32, little-endian
    CRC-32 of the payload   u32
    CRC-32 of these 8 bytes u32
    payload

The checksum of the length tells a frame that was not written to its end from a damaged one.
"""

import struct
import zlib

HEAD = struct.Struct("<III")


def frame(payload: bytes) -> bytes:
    """Return the frame of a payload."""
    head = struct.pack("<II", len(payload), zlib.crc32(payload))
    return head + struct.pack("<I", zlib.crc32(head)) + payload


def is_frame_head(data: memoryview, position: int) -> bool:
    """Whether the head of a frame, perhaps of one that was cut off, is at a position."""
    if len(data) - position < HEAD.size:
        return False
    head = data[position : position + 8]
    return HEAD.unpack_from(data, position)[2] == zlib.crc32(head)


def frame_at(data: memoryview, position: int) -> tuple[memoryview | None, int] | None:
    """Return the payload and the end of the frame at a position; None if no whole one is there.

    The payload is None if its checksum is wrong.
    """
    if not is_frame_head(data, position):
        return None
    length, checksum, _ = HEAD.unpack_from(data, position)
    start = position + HEAD.size
    if length > len(data) - start:
        return None
    payload = data[start : start + length]
    return (payload if zlib.crc32(payload) == checksum else None), start + length
