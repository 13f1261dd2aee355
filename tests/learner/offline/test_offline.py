"""Offline batches: bad rows, order, exact resume, streams."""

import itertools
import json
import time
import tracemalloc
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from learner.data import sets
from learner.data.examples import answers, pairs, sequences
from learner.data.rows import Rows
from learner.offline.source import open_offline
from protocol.config.settings import ExampleData
from protocol.errors import CheckpointError, ConfigError, DataError
from tests.rows import ByteTokenizer, data_of


def _pair(number):
    return {"prompt": f"{number}: ", "chosen": "yes" * (number % 5 + 1), "rejected": "no"}


def _open(settings, *, seed=0, batch_size=4, **options):
    build = pairs(settings, ByteTokenizer())
    return open_offline(settings, build, seed=seed, batch_size=batch_size, **options)


def _numbers(source):
    return [[example.row for example in batch] for batch in iter(source.next_batch, None)]


def _first(source):
    batch = source.next_batch()
    assert batch is not None
    return batch


BAD = [
    ({"prompt": "a", "chosen": "b"}, "missing_column"),
    ({"prompt": "a", "chosen": "b", "rejected": 3}, "mixed_types"),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, "empty_answer"),
    ({"prompt": "a" * 64, "chosen": "b", "rejected": "c"}, "prompt_too_long"),
    (
        {
            "prompt": [{"role": "robot", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
        "invalid_role",
    ),
    ({"prompt": "a\ud800", "chosen": "b", "rejected": "c"}, "invalid_text"),
]


def test_a_hundred_bad_rows_among_a_thousand_are_reported_and_the_rest_train(tmp_path):
    rows = [_pair(number) for number in range(1000)]
    bad = dict(zip(range(5, 1100, 11), itertools.cycle(BAD), strict=False))
    for number, (row, _) in list(bad.items())[:100]:
        rows.insert(number, row)
    settings = data_of(tmp_path, rows, max_length=64)
    source = _open(settings)
    trained = sorted(itertools.chain(*_numbers(source)))
    assert len(trained) == source.report.kept == 1000
    assert set(trained).isdisjoint(bad)
    assert [(b.row, b.kind) for b in source.report.dropped_rows] == [
        (number, kind) for number, (_, kind) in bad.items()
    ]
    text = "\n".join(source.report.lines())
    assert "1000 rows kept, 100 dropped" in text
    assert "row 5: no rejected; the row has ['chosen', 'prompt']" in text


def test_a_score_that_weighs_no_loss_is_a_bad_row(tmp_path):
    scores = [10**400, 10**300, -0.5, float("nan"), float("-inf"), "2", 0]
    rows = [{**_pair(at), "preference_score": score} for at, score in enumerate(scores)]
    source = _open(data_of(tmp_path, rows, order="sequential"))
    assert [(bad.row, bad.kind) for bad in source.report.dropped_rows] == [
        (0, "mixed_types"), (2, "invalid_score"), (3, "mixed_types"), (4, "mixed_types"),
        (5, "mixed_types"),
    ]  # fmt: skip
    assert "must be at least 0, not -0.5" in source.report.dropped_rows[1].reason
    assert [example.score for example in _first(source)] == [1e300, 0.0]


def test_on_bad_row_error_stops_at_the_first(tmp_path):
    rows = [_pair(0), *(row for row, _ in BAD)]
    with pytest.raises(DataError, match=r"row 1 .*no rejected.*data\.on_bad_row"):
        _open(data_of(tmp_path, rows, on_bad_row="error"))


def test_sequential_follows_the_file_and_the_last_batch_is_what_is_left(tmp_path):
    rows = [_pair(number) for number in range(10)]
    source = _open(data_of(tmp_path, rows, order="sequential"), epochs=1.5)
    assert source.total == 5  # 1.5 of 3 batches, rounded up
    first = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert _numbers(source) == first + first[:2]


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_resume_exactly(tmp_path, streaming):
    rows = [_pair(number) for number in range(22)]
    settings = data_of(tmp_path, rows, streaming=streaming, shuffle_buffer=6)
    source = _open(settings, epochs=3)
    before = [source.next_batch() for _ in range(8)]
    state = source.state()
    rest = _numbers(source)
    again = _open(settings, epochs=3)
    again.restore(state)
    assert _numbers(again) == rest
    assert len(before) + len(rest) == 18
    assert _numbers(_open(settings, epochs=3, seed=1))[8:] != rest


def test_max_steps_goes_on_over_epochs(tmp_path):
    rows = [_pair(number) for number in range(8)]
    source = _open(data_of(tmp_path, rows), max_steps=7)
    batches = _numbers(source)
    assert source.total == len(batches) == 7
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(8))


def test_the_first_batches_are_known_beforehand_and_can_be_replaced(tmp_path):
    settings = data_of(tmp_path, [_pair(number) for number in range(10)])
    source = _open(settings, epochs=2)
    batches = source.first_batches()
    assert [len(batch) for batch in batches] == [4, 4, 2]
    source.replace_first([[replace(e, score=float(e.row)) for e in batch] for batch in batches])
    trained = list(iter(source.next_batch, None))
    assert [[e.row for e in batch] for batch in trained[:3]] == [
        [e.row for e in batch] for batch in batches
    ]
    assert all(e.score == e.row for batch in trained for e in batch)
    assert len(_open(settings, max_steps=2).first_batches()) == 2
    streamed = _open(data_of(tmp_path, [_pair(0)], streaming=True), max_steps=1)
    with pytest.raises(ConfigError, match=r"data\.streaming"):
        streamed.first_batches()


def test_examples_hold_the_tokens_and_their_context(tmp_path):
    row = {"prompt": "ab", "chosen": "c", "rejected": "dd", "preference_score": 2}
    example = _first(_open(data_of(tmp_path, [row])))[0]
    assert (example.prompt_ids, example.chosen_ids) == ([97, 98], [99, 4])
    assert (example.rejected_prompt_ids, example.rejected_ids) == ([97, 98], [100, 100, 4])
    assert (example.score, example.length) == (2.0, 5)
    settings = data_of(tmp_path, [row], max_length=3, truncation_mode="keep_end")
    source = _open(settings)
    example = _first(source)[0]
    # Rejected is cut to its three answer tokens: the first of them is the context of the rest.
    assert (example.prompt_ids, example.chosen_ids) == ([98], [99, 4])
    assert (example.rejected_prompt_ids, example.rejected_ids) == ([100], [100, 4])
    assert source.report.truncated_rows == [0]


def test_answers_carry_their_label_and_sequences_their_mask(tmp_path):
    settings = data_of(tmp_path, [{"prompt": "a", "completion": "b", "label": False}])
    judged = open_offline(settings, answers(settings, ByteTokenizer()), seed=0, batch_size=1)
    example = _first(judged)[0]
    assert (example.prompt_ids, example.completion_ids, example.label) == ([97], [98, 4], False)
    settings = data_of(tmp_path, [{"text": "ab"}, {"prompt": "a", "completion": "b"}])
    build = sequences(settings, ByteTokenizer())
    rows = sorted(
        _first(open_offline(settings, build, seed=0, batch_size=2)),
        key=lambda example: example.row,
    )
    assert [(row.input_ids, row.completion_mask) for row in rows] == [
        ([97, 98, 4], [1, 1, 1]),
        ([97, 98, 4], [0, 1, 1]),
    ]


OTHER = {
    "edited": ({"rows": [_pair(1), *map(_pair, range(1, 20))]}, r"20 other rows"),
    "reordered": ({"rows": [*map(_pair, reversed(range(20)))]}, r"in another order"),
    "seed": ({"seed": 1}, r"shuffled, run.seed 0; this run's is: shuffled, run.seed 1"),
    "order": ({"order": "sequential"}, r"this run's is: sequential, run.seed 0"),
}


@pytest.mark.parametrize("change", OTHER)
def test_other_rows_or_another_order_are_refused_on_resume(tmp_path, change):
    changes, words = OTHER[change]
    given = {"rows": [_pair(number) for number in range(20)], "seed": 0, "order": "shuffled"}
    source = _open(data_of(tmp_path, given["rows"]))
    _first(source)
    state = source.state()
    given |= changes
    settings = data_of(tmp_path, given["rows"], order=given["order"])
    with pytest.raises(CheckpointError, match=words):
        _open(settings, seed=given["seed"]).restore(state)


@pytest.mark.parametrize("judged", [False, True])
def test_a_streams_order_is_kept_on_resume(tmp_path, judged):
    settings = data_of(tmp_path, [_pair(number) for number in range(20)], streaming=True)

    def open_source(seed):
        build: Any = (answers if judged else pairs)(settings, ByteTokenizer())
        return open_offline(settings, build, seed=seed, batch_size=4, max_steps=9)

    source = open_source(0)
    _first(source)
    words = r"run.seed 0, data.shuffle_buffer 10000; this run's is: .*run.seed 1"
    with pytest.raises(CheckpointError, match=words):
        open_source(1).restore(source.state())


def test_rows_that_are_all_held_out_are_refused(tmp_path):
    data = data_of(tmp_path, [_pair(number) for number in range(5)], eval_rows=5)
    with pytest.raises(DataError, match=r"data.eval_rows = 5 takes all 5 rows"):
        _open(data)


def test_held_out_pairs_are_not_trained_on(tmp_path):
    sets = _open(data_of(tmp_path, [_pair(number) for number in range(20)], eval_rows=5))
    held_out = [example.row for example in sets.evaluation]
    assert sorted([*held_out, *itertools.chain(*_numbers(sets))]) == list(range(20))


def test_a_long_stream_starts_at_once_in_bounded_memory(monkeypatch):
    read = itertools.count()

    def scan(start):
        for number in range(start, 1_000_000):
            next(read)
            yield _pair(number)

    rows = Rows("generated", ["prompt", "chosen", "rejected"], scan)
    monkeypatch.setattr(sets, "open_rows", lambda settings: rows)
    settings = ExampleData(path="generated", streaming=True, shuffle_buffer=1000)
    tracemalloc.start()
    began = time.monotonic()
    source = _open(settings, max_steps=100)
    batches = _numbers(source)
    seconds = time.monotonic() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(batches), next(read)) == (100, 1400)  # the buffer and what was trained on
    assert seconds < 5
    assert peak < 10_000_000


ASKED = [{"role": "user", "content": "Hi"}]


def _assistant(text):
    return [{"role": "assistant", "content": text}]


class Chat(ByteTokenizer):
    """ByteTokenizer of messages one after another, each ended by a newline."""

    chat_template = "made below"

    def apply_chat_template(self, messages, *, add_generation_prompt=False, **options):
        text = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return {"input_ids": self.encode(text + "assistant:" * add_generation_prompt)}


@pytest.mark.parametrize(
    ("build", "row", "kept"),
    [
        (pairs, {"prompt": "a", "chosen": "b", "rejected": "c", "answer": 7},
         {"prompt": "a", "chosen": "b", "rejected": "c", "answer": 7}),
        (pairs,
         {"chosen": ASKED + _assistant("b"), "rejected": ASKED + _assistant("c"), "raw": "\ud800"},
         {"prompt": ASKED, "chosen": _assistant("b"), "rejected": _assistant("c")}),
        (answers, {"chosen": "ab", "rejected": "ac"},
         {"prompt": "a", "chosen": "b", "rejected": "c"}),
        (answers, {"prompt": ASKED, "completion": _assistant("b"), "label": True},
         {"prompt": ASKED, "completion": _assistant("b"), "label": True}),
        (sequences, {"prompt": "a", "completion": "b", "data": {"k": [1.5]}},
         {"prompt": "a", "completion": "b", "data": {"k": [1.5]}}),
        (sequences, {"text": "ab", "chosen": "b", "rejected": "c"},
         {"text": "ab", "chosen": "b", "rejected": "c"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("own_file", [False, True])
def test_held_out_examples_alone_hold_their_rows(tmp_path, build, row, kept, own_file):
    settings = data_of(tmp_path, [row] * 4, eval_rows=2)
    settings = msgspec.structs.replace(settings, eval_path=settings.path if own_file else "")
    sets = open_offline(settings, build(settings, Chat()), seed=0, batch_size=9)
    assert all(example.row_json is None for example in _first(sets))
    several = build is answers and "chosen" in row
    rows = [json.loads(example.row_json or b"") for example in sets.evaluation]
    assert rows == [kept] * (4 if several else 2)


def test_a_system_prompt_is_part_of_the_row(tmp_path):
    settings = data_of(tmp_path, [_pair(0)] * 2, eval_rows=1, system_prompt="Be.")
    example = open_offline(settings, pairs(settings, Chat()), seed=0, batch_size=1).evaluation[0]
    assert json.loads(example.row_json or b"")["prompt"] == [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": "0: "},
    ]
