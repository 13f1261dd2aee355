"""What a peer may say is bounded: names are refused with their field, texts are cut and cleaned."""

import tracemalloc

import msgspec
import pytest

from protocol.errors import WireError
from protocol.messages import wire
from protocol.messages.limits import (
    COMPLETIONS,
    LOG_EXTRA_BYTES,
    LOG_METRICS,
    NAME_CHARS,
    TEXT_CHARS,
    printable,
)
from protocol.messages.messages import Failed, Group, Hello, Refuse, Release, WithReason
from protocol.messages.rewards import RewardFault, ScoreRefusal
from tests.protocol.builders import a_completion, a_group, a_reward, task_id

GROUP = msgspec.to_builtins(a_group([a_completion([5, 6])]), builtin_types=(bytes,))
HELLO = {"type": "Hello", "protocol_version": 4, "actor_id": "a", "actor_incarnation": "i"}


def changed(message, path, value):
    """Return a copy of a message, as builtins, with another value at a path such as `reward.names`.

    A path's last name may be new.
    """
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    *parents, last = path.split(".")
    inner = copy
    for name in parents:
        inner = inner[int(name) if name.isdecimal() else name]
    inner[last] = value
    return copy


@pytest.mark.parametrize(
    ("message", "path", "value", "where"),
    [
        (HELLO, "actor_id", "x" * (NAME_CHARS + 1), "length <= 256 - at `$.actor_id`"),
        (HELLO, "actor_id", "a\x1b[2J", "at `$.actor_id`"),
        (HELLO, "host", "a\nb", "at `$.host`"),
        (HELLO, "model_digest", "a\u202eb", "at `$.model_digest`"),
        (GROUP, "actor_id", "\x9b31m", "at `$.actor_id`"),
        (GROUP, "task.incarnation", "x" * 1000, "at `$.task.incarnation`"),
        (GROUP, "completions.0.policy_spans.0", {"start": 0, "version": 1, "digest": "x\0"},
         "at `$.completions[0].policy_spans[0].digest`"),
        (GROUP, "completions", [{}] * (COMPLETIONS + 1), "$.completions"),
        (GROUP, "reward.names", ["f\r"], "at `$.reward.names[0]`"),
        (GROUP, "reward.log_metric", {"x" * 300: 1.0}, "at `key` in `$.reward.log_metric`"),
        (GROUP, "reward.log_metric", {str(n): 1.0 for n in range(LOG_METRICS + 1)},
         "length <= 256 - at `$.reward.log_metric`"),
        (GROUP, "reward.log_metric", {"m": float("nan")}, "log_metric must be finite"),
        (GROUP, "reward.log_extra", b"x" * (LOG_EXTRA_BYTES + 1), "at `$.reward.log_extra`"),
        (GROUP, "started_at", float("inf"), "times of a Group must be finite"),
        ({"type": "Request"}, "free_completions", -1, ">= 0 - at `$.free_completions`"),
    ],
)  # fmt: skip
def test_what_is_too_long_or_not_printable_is_refused_with_its_field(message, path, value, where):
    if path.rpartition(".")[2].isdecimal():
        path, _, index = path.rpartition(".")
        assert index == "0"
        value = [value]
    data = msgspec.msgpack.encode(changed(message, path, value))
    with pytest.raises(WireError, match="invalid message") as caught:
        wire.decode_actor(data)
    assert where in str(caught.value)


def test_valid_messages_with_the_longest_names_pass():
    longest = changed(HELLO, "actor_id", "ä" * NAME_CHARS)
    decoded = wire.decode_actor(msgspec.msgpack.encode(longest))
    assert isinstance(decoded, Hello)
    assert decoded.actor_id == "ä" * NAME_CHARS
    assert isinstance(wire.decode_actor(msgspec.msgpack.encode(GROUP)), Group)


@pytest.mark.parametrize(
    "make",
    [
        lambda text: Failed(task=task_id(), attempt=1, reason=text),
        lambda text: Release(reason=text),
        lambda text: Refuse(code="invalid", reason=text),
    ],
)
def test_reasons_are_cut_and_made_printable_when_built_and_when_decoded(make):
    text = "out of\x1b[31m memory\n\u202e" + "x" * TEXT_CHARS
    cleaned = "out of [31m memory  " + "x" * (TEXT_CHARS - 20)
    built: WithReason = make(text)
    assert built.reason == cleaned
    raw = msgspec.to_builtins(built, builtin_types=(bytes,)) | {"reason": text}
    assert msgspec.convert(raw, type(built)).reason == cleaned


def test_texts_of_reward_servers_are_cut_and_made_printable():
    fault = RewardFault(function="f\x07" * 200, kind="died", message="a\n\x1bb" * 2000)
    assert fault.function == "f " * (NAME_CHARS // 2)
    assert fault.message == ("a\n b" * 2000)[:TEXT_CHARS]
    assert ScoreRefusal(reason="no\x1b").reason == "no "


def test_printable_keeps_what_people_write():
    assert printable("KeyError: 'größe' — 答え (f.py:3)") == "KeyError: 'größe' — 答え (f.py:3)"


def test_what_functions_logged_takes_no_more_memory_than_its_bytes():
    nested = b'{"a":[' + b"[]," * ((LOG_EXTRA_BYTES - 16) // 3) + b"1]}"
    data = wire.encode(a_group([a_completion([5, 6])], reward=a_reward([1.0], log_extra=nested)))
    tracemalloc.start()
    try:
        wire.decode_actor(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * len(data)
