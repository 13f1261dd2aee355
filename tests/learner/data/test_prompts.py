"""Prompts: order, exact resume, held-out rows, and rows that cannot be used."""

import datetime

import numpy as np
import pytest

from learner.data.prompts import open_prompts
from learner.data.rows import RowError, json_row
from protocol.errors import CheckpointError, DataError
from tests.rows import ByteTokenizer
from tests.rows import prompt_data_of as data_of


def _rows(count):
    return [{"prompt": f"row {n}", "answer": n} for n in range(count)]


def _keys(source, count):
    return [source.next().row_key for _ in range(count)]


def _all(source):
    return [prompt.row_key for prompt in iter(source.next, None)]


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_resume_exactly_and_epochs_differ(tmp_path, streaming):
    settings = data_of(tmp_path, _rows(20), streaming=streaming, shuffle_buffer=8)
    source = open_prompts(settings, ByteTokenizer(), seed=3, epochs=3)
    keys = _keys(source, 27)
    state = source.state()
    rest = _all(source)
    again = open_prompts(settings, ByteTokenizer(), seed=3, epochs=3)
    again.restore(state)
    assert _all(again) == rest
    epochs = [(keys + rest)[at : at + 20] for at in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]
    assert len(keys + rest) == 60


def test_prompts_without_an_end_have_no_total(tmp_path):
    source = open_prompts(data_of(tmp_path, _rows(7)), ByteTokenizer(), seed=1, epochs=None)
    keys = _keys(source, 15)
    assert sorted(keys[:7]) == sorted(keys[7:14]) == list(range(7))
    assert (source.epochs.size, source.total) == (7, None)


def test_parts_of_epochs_are_counted(tmp_path):
    source = open_prompts(data_of(tmp_path, _rows(7)), ByteTokenizer(), seed=1, epochs=1.5)
    assert source.total == len(_all(source)) == 11


def test_another_dataset_is_not_resumed(tmp_path):
    state = open_prompts(data_of(tmp_path, _rows(7)), ByteTokenizer(), seed=1).state()
    source = open_prompts(data_of(tmp_path, _rows(8)), ByteTokenizer(), seed=1)
    with pytest.raises(CheckpointError, match="7 usable rows, the dataset now has 8"):
        source.restore(state)


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_rows_are_never_trained_on(tmp_path, streaming):
    settings = data_of(tmp_path, _rows(30), eval_rows=6, streaming=streaming, shuffle_buffer=4)
    first, second = (open_prompts(settings, ByteTokenizer(), seed=seed) for seed in (1, 2))
    held_out = [prompt.row_key for prompt in first.evaluation]
    assert len(held_out) == 6
    assert held_out == [prompt.row_key for prompt in second.evaluation]
    assert sorted(_all(first) + held_out) == list(range(30))


def test_other_files_can_be_held_out(tmp_path):
    settings = data_of(tmp_path, _rows(3), eval_path=str(tmp_path / "eval.jsonl"), eval_rows=2)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}')
    sets = open_prompts(settings, ByteTokenizer(), seed=0)
    assert [prompt.prompt_ids for prompt in sets.evaluation] == [[97], [98]]
    assert sets.epochs.size == 3


def test_overlong_prompts_are_dropped_and_counted_or_refused(tmp_path):
    rows = [*_rows(3), {"prompt": "x" * 11}]
    source = open_prompts(data_of(tmp_path, rows, max_prompt_length=10), ByteTokenizer(), seed=0)
    assert (source.epochs.size, dict(source.report.dropped)) == (3, {"prompt_too_long": 1})
    assert source.report.dropped_rows[0].row == 3
    strict = data_of(tmp_path, rows, max_prompt_length=10, overlong_prompts="error")
    with pytest.raises(DataError, match=r"row 3 .*11 tokens.*data.overlong_prompts"):
        open_prompts(strict, ByteTokenizer(), seed=0)


def test_a_cap_takes_rows_by_order(tmp_path):
    capped = open_prompts(data_of(tmp_path, _rows(50), max_rows=5), ByteTokenizer(), seed=0)
    assert sorted(_all(capped)) != [0, 1, 2, 3, 4]
    settings = data_of(tmp_path, _rows(50), max_rows=5, order="sequential")
    assert _all(open_prompts(settings, ByteTokenizer(), seed=0)) == [0, 1, 2, 3, 4]


def test_a_dataset_without_usable_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none of 2 rows can be used(.|\n)*no prompt"):
        open_prompts(data_of(tmp_path, [{"a": 1}, {"a": 2}]), ByteTokenizer(), seed=0)
    stream = open_prompts(data_of(tmp_path, [{"a": 1}], streaming=True), ByteTokenizer(), seed=0)
    with pytest.raises(DataError, match="none of 1 rows can be used"):
        stream.next()


def test_rows_travel_as_json():
    row = {
        "when": datetime.date(2026, 1, 2),
        "numbers": np.array([1, 2]),
        "one": np.float32(0.5),
        "gap": float("nan"),
        "nested": {"t": (1, None)},
    }
    assert json_row(row) == {
        "when": "2026-01-02",
        "numbers": [1, 2],
        "one": 0.5,
        "gap": None,
        "nested": {"t": [1, None]},
    }
    with pytest.raises(RowError, match=r"column nested\.raw holds bytes"):
        json_row({"nested": {"raw": b"x"}})
    with pytest.raises(RowError, match=r"nested\.raw holds the lone surrogate '\\ud800' at char"):
        json_row({"nested": {"raw": "x\ud800"}})
