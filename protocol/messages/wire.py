"""Encodes messages as msgpack and decodes them: one encoder, one decoder per direction.

Bytes that arrive become a message of their direction or a `WireError` with a kind; nothing that a
peer sends can raise anything else. Decoding `Any` fields can take about 70 times the message's
size in memory, so the size is checked first.
"""

from typing import TypeVar

import msgspec

from protocol.errors import WireError
from protocol.messages.limits import MESSAGE_BYTES
from protocol.messages.messages import ActorMessage, AnyMessage, Chunk, Fetch, LearnerMessage

MIB = 1 << 20
MAX_MESSAGE_BYTES = MESSAGE_BYTES
MAX_CHUNK_BYTES = 8 * MIB
MAX_SNAPSHOT_MESSAGE_BYTES = MAX_CHUNK_BYTES + 4096

SnapshotMessage = Fetch | Chunk
T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_actor_decoder: msgspec.msgpack.Decoder[ActorMessage] = msgspec.msgpack.Decoder(ActorMessage)
_learner_decoder: msgspec.msgpack.Decoder[LearnerMessage] = msgspec.msgpack.Decoder(LearnerMessage)
_snapshot_decoder: msgspec.msgpack.Decoder[SnapshotMessage] = msgspec.msgpack.Decoder(
    SnapshotMessage
)


def encode(message: AnyMessage, *, max_bytes: int = MAX_MESSAGE_BYTES) -> bytes:
    """Encode a message as msgpack; raise `WireError("oversized")` above `max_bytes`."""
    data = _encoder.encode(message)
    _check_size(len(data), max_bytes, type(message).__name__)
    return data


def decode_actor(data: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES) -> ActorMessage:
    """Decode what an actor sent to the learner, or raise `WireError` with its kind."""
    return _decode(_actor_decoder, data, max_bytes, "actor to learner")


def decode_learner(data: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES) -> LearnerMessage:
    """Decode what the learner sent to an actor, or raise `WireError` with its kind."""
    return _decode(_learner_decoder, data, max_bytes, "learner to actor")


def decode_snapshot(data: bytes, *, max_bytes: int = MAX_SNAPSHOT_MESSAGE_BYTES) -> SnapshotMessage:
    """Decode a message of the snapshot socket, or raise `WireError` with its kind."""
    return _decode(_snapshot_decoder, data, max_bytes, "snapshot socket")


def _check_size(size: int, max_bytes: int, what: str) -> None:
    if size > max_bytes:
        raise WireError(
            f"{what}: a message may have at most {max_bytes} bytes, got {size}; "
            "raise transport.max_message_mb if that is intended",
            kind="oversized",
        )


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes, max_bytes: int, wire: str) -> T:
    _check_size(len(data), max_bytes, wire)
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        reason = str(error)
        known_tag = not (reason.startswith("Invalid value") and reason.endswith("`$.type`"))
        kind = "invalid" if known_tag else "unknown"
        raise WireError(f"{wire}: {kind} message: {reason}", kind=kind) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(
            f"{wire}: required a msgpack message, got {len(data)} bytes that are not: {error}",
            kind="undecodable",
        ) from error
