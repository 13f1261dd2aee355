"""The messages' own checks, and arrays as bytes."""

import msgspec
import numpy as np
import pytest

from protocol.messages.arrays import floats_bytes, floats_view, ids_bytes, ids_view
from protocol.messages.parts import PolicySpan, Sampling, Segment
from tests.protocol.examples import COMPLETION, GROUP, LEARNER_MESSAGES, TASK

replace = msgspec.structs.replace


def test_arrays_are_little_endian_and_views_are_free():
    data = ids_bytes([1, 256, -1])
    assert data == b"\x01\x00\x00\x00\x00\x01\x00\x00\xff\xff\xff\xff"
    assert ids_view(data).tolist() == [1, 256, -1]
    assert not ids_view(data).flags.owndata
    assert ids_bytes(np.array([1, 256, -1], dtype=np.int64)) == data
    assert floats_bytes([1.0, -2.0]) == b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    assert np.isnan(floats_view(floats_bytes([float("nan")]))[0])
    assert ids_bytes(iter([3])) == b"\x03\x00\x00\x00"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_generations": 0}, "num_generations"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
    ],
)
def test_sampling_is_checked(change, reason):
    sampling = Sampling(num_generations=1, max_completion_length=1, temperature=0.0, min_p=1.0)
    with pytest.raises(ValueError, match=reason):
        replace(sampling, **change)


def span(start):
    return PolicySpan(start=start, version=start, digest="")


def part(start):
    return Segment(start=start, sampled=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": b""}, "at least one int32"),
        ({"token_ids": b"123"}, "at least one int32"),
        ({"sampling_logprobs": b"1234"}, "must align with token_ids"),
        ({"kept_logmass": b"1234"}, "kept_logmass"),
        ({"policy_spans": []}, "begin at token 0"),
        ({"policy_spans": [span(1)]}, "begin at token 0"),
        ({"policy_spans": [span(0), span(2), span(1)]}, "ascend"),
        ({"policy_spans": [span(0), span(0)]}, "ascend"),
        ({"policy_spans": [span(0), span(3)]}, "inside the completion"),
        ({"segments": [part(1)]}, "lie inside"),
        ({"segments": [part(0), part(3)]}, "lie inside"),
        ({"segments": [part(0), part(0)]}, "ascend"),
    ],
)
def test_completions_are_checked(change, reason):
    with pytest.raises(ValueError, match=reason):
        replace(COMPLETION, **change)


def test_whole_completions_are_accepted():
    assert replace(COMPLETION, kept_logmass=bytes(12)).kept_logmass == bytes(12)
    assert len(replace(COMPLETION, segments=[part(0), part(2)]).segments) == 2


def test_groups_and_tasks_are_checked():
    with pytest.raises(ValueError, match="must not be empty"):
        replace(GROUP, completions=[])
    with pytest.raises(ValueError, match=r"must be \(G, F\)"):
        replace(GROUP, completions=[COMPLETION])
    task = LEARNER_MESSAGES[2]
    for prompt_ids in (b"", b"12345"):
        with pytest.raises(ValueError, match="prompt_ids"):
            replace(task, prompt_ids=prompt_ids)


def test_task_ids_order_by_number_within_an_incarnation():
    assert replace(TASK, number=8) > TASK
    assert len({TASK, replace(TASK), replace(TASK, number=8)}) == 2
