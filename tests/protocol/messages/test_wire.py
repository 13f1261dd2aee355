"""Messages to bytes and back, and every kind of refusal."""

import random

import msgspec
import pytest

from protocol.errors import WireError
from protocol.messages import wire
from protocol.messages.messages import Heartbeat, Release
from tests.protocol.examples import ACTOR_MESSAGES, GROUP, LEARNER_MESSAGES, SNAPSHOT_MESSAGES

pack = msgspec.msgpack.encode


@pytest.mark.parametrize(
    ("decode", "examples"),
    [
        (wire.decode_actor, ACTOR_MESSAGES),
        (wire.decode_learner, LEARNER_MESSAGES),
        (wire.decode_snapshot, SNAPSHOT_MESSAGES),
    ],
)
def test_every_message_survives_its_wire(decode, examples):
    for message in examples:
        assert decode(wire.encode(message)) == message


def kind_of(data, decode=wire.decode_actor, **limits):
    with pytest.raises(WireError) as caught:
        decode(data, **limits)
    return caught.value.kind


def test_refusals_have_kinds():
    assert kind_of(b"") == "undecodable"
    assert kind_of(b"\xc1") == "undecodable"
    assert kind_of(b"\x82\xa4ty") == "undecodable"
    assert kind_of(pack([1])) == "invalid"
    assert kind_of(pack({"progress": 1})) == "invalid"
    assert kind_of(pack({"type": "Nonsense"})) == "unknown"
    assert kind_of(pack({"type": "Heartbeat", "progress": 1, "extra": 0})) == "invalid"
    assert kind_of(pack({"type": "Heartbeat", "progress": "1"})) == "invalid"
    assert kind_of(b"\x82\xa4type\xa9Heartbeat\xa8progress\xc1") == "undecodable"
    assert kind_of(b"\x82\xa4type\xa7Release\xa6reason\xa1\xff") == "undecodable"


def test_a_message_of_the_other_direction_is_unknown():
    assert kind_of(wire.encode(LEARNER_MESSAGES[0])) == "unknown"
    assert kind_of(wire.encode(ACTOR_MESSAGES[0]), wire.decode_learner) == "unknown"


def test_constraints_hold_on_arrival():
    fields = msgspec.to_builtins(GROUP, builtin_types=(bytes,))
    fields["completions"][0]["sampling_logprobs"] = b"1234"
    data = pack(fields)
    with pytest.raises(WireError, match=r"must align with token_ids.*completions") as caught:
        wire.decode_actor(data)
    assert caught.value.kind == "invalid"


def test_sizes_are_bounded_both_ways():
    heartbeat = wire.encode(Heartbeat(progress=1))
    size = len(heartbeat)
    assert wire.decode_actor(heartbeat, max_bytes=size) == Heartbeat(progress=1)
    assert kind_of(heartbeat, max_bytes=size - 1) == "oversized"
    with pytest.raises(WireError, match=f"at most {size} bytes.*max_message_mb"):
        wire.encode(Release(reason="x" * size), max_bytes=size)


def test_nesting_and_false_lengths_are_refused():
    head = b"\x83\xa4type\xa5Group\xa4task\xc0\xa6reward\x81\xa9log_extra\x81\xa1a"
    deep = head.replace(b"\xa4task\xc0", b"").replace(b"\x83", b"\x82") + b"\x91" * 100_000
    assert kind_of(deep) == "invalid"
    for claim in (b"\xdd", b"\xdf", b"\xdb", b"\xc6"):
        assert kind_of(claim + b"\xff" * 4) in ("undecodable", "invalid")


def test_mutated_messages_raise_nothing_else():
    rng = random.Random(0)
    valid = [wire.encode(message) for message in ACTOR_MESSAGES]
    refused = 0
    for _ in range(5_000):
        data = bytearray(rng.choice(valid))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            end = rng.choice((len(data), rng.randint(1, len(data))))
            wire.decode_actor(bytes(data[:end]))
        except WireError:
            refused += 1
    assert 4_000 < refused < 5_000
