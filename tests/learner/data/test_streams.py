"""Streams that a function makes: taken as needed, read again in every pass."""

import itertools
import logging
import sys

import pytest

from learner.data.examples import sequences
from learner.offline.source import open_offline
from protocol.config.settings import ExampleData
from protocol.errors import DataError
from tests.rows import ByteTokenizer


def _source(tmp_path, text, *, max_steps):
    (tmp_path / "made.py").write_text(text)
    path = f"{tmp_path}/made.py:rows"
    settings = ExampleData(path=path, streaming=True, shuffle_buffer=8)
    build = sequences(settings, ByteTokenizer())
    return open_offline(settings, build, seed=0, batch_size=4, max_steps=max_steps)


def test_a_streamed_function_is_asked_only_for_the_rows_that_are_trained_on(tmp_path):
    source = _source(
        tmp_path,
        "taken = []\n"
        "def rows():\n"
        "    for i in range(10**9):\n"
        "        taken.append(i)\n"
        "        yield {'text': f'row {i}'}\n",
        max_steps=5,
    )
    taken = sys.modules["pippin_prepare_made"].taken
    taken.clear()  # the rows whose keys stand for the columns
    batches = list(iter(source.next_batch, None))
    assert [len(batch) for batch in batches] == [4] * 5
    assert taken == list(range(8 + 5 * 4))  # the buffer and five batches


def test_every_pass_over_a_streamed_function_calls_it_again(tmp_path):
    text = "def rows():\n    return [{'text': f'row {i}'} for i in range(6)]\n"
    source = _source(tmp_path, text, max_steps=4)
    rows = [[example.row for example in batch] for batch in iter(source.next_batch, None)]
    assert [len(batch) for batch in rows] == [4, 2, 4, 2]
    assert sorted(itertools.chain(*rows[:2])) == sorted(itertools.chain(*rows[2:]))


def test_a_stream_that_can_be_read_once_only_says_so(tmp_path):
    source = _source(
        tmp_path,
        "made = ({'text': f'row {i}'} for i in range(200))\ndef rows():\n    return made\n",
        max_steps=100,
    )
    with pytest.raises(DataError, match=r"made.py:rows: the stream gave no row in pass 2"):
        list(iter(source.next_batch, None))


def test_a_row_that_is_no_mapping_is_named(tmp_path):
    with pytest.raises(DataError, match=r"made.py:rows: row 1 must be a dict, not str"):
        _source(tmp_path, "def rows():\n    return [{'text': 'a'}, 'b']\n", max_steps=1)


def test_rows_that_a_stream_drops_are_logged_once_as_they_come_and_summed_up(tmp_path, caplog):
    caplog.set_level(logging.INFO, "pippin.data")
    text = "def rows():\n    return [{'text': 't' if i != 3 else 5} for i in range(6)]\n"
    source = _source(tmp_path, text, max_steps=4)
    line = (
        "    row 3: text must be a string or a list of messages, not int; dropped from the stream"
    )
    for step in range(1, 5):
        assert source.poll() is not None
        source.publish(step)
        if step == 3:
            assert caplog.messages == [line]  # in the first pass, not in the second
            assert caplog.records[0].name == "pippin.data.rows"
    assert caplog.messages[1:] == [
        f"{tmp_path}/made.py:rows: 10 rows kept, 2 dropped, 0 truncated",
        "  dropped for mixed_types: 2",
    ]
    assert {record.name for record in caplog.records[1:]} == {"pippin.data"}
