"""JSON files as rows: what is no row is a bad one, in its place, whichever way the file is read."""

import json

import pytest

from learner.data.dataset import open_rows
from learner.data.examples import pairs
from learner.data.rows import RowError
from learner.offline.source import open_offline
from protocol.config.settings import ExampleData
from protocol.errors import DataError
from tests.rows import ByteTokenizer

GOOD = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(4)]
TEXT = [json.dumps(row).encode() for row in GOOD]
BAD = {
    b"not json": "malformed JSON: Expecting value at column 1",
    b'{"prompt": ': "malformed JSON: Expecting value at column 12",
    b'{"prompt": "\xff"}': "malformed JSON: 'utf-8' codec can't decode byte 0xff",
    b'["prompt"]': "list; it must be an object",
    b"[" * 100_000: "malformed JSON: maximum recursion",
}
# rows 0, 1, 3 and 5 are good; an empty line is no row
LINES = [TEXT[0], TEXT[1], b"not json", b"", TEXT[2], b'{"prompt": "\xff"}', TEXT[3]]


def put(path, lines):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("line", BAD)
@pytest.mark.parametrize("place", [0, 2])
def test_a_line_that_is_no_object_is_a_bad_row(tmp_path, line, place, streaming):
    lines = [*TEXT[:place], line, b"  ", *TEXT[place:]]
    path = put(tmp_path / "a.jsonl", [b"\xef\xbb\xbf" + lines[0], *lines[1:]])
    rows = open_rows(ExampleData(path=path, streaming=streaming))
    found = list(rows.scan(0))
    bad = found.pop(place)
    assert isinstance(bad, RowError)
    assert bad.kind == "malformed"
    assert bad.reason.startswith(f"a.jsonl, line {place + 1} is {BAD[line]}")
    assert found == GOOD
    assert rows.columns == ["prompt", "chosen", "rejected"]
    assert list(rows.scan(place + 1)) == GOOD[place:]
    if rows.get is not None:
        assert rows.length == 5
        assert isinstance(rows.get(place), RowError)
        assert rows.get(4) == GOOD[3]


def test_an_array_may_hold_bad_rows_and_a_jsonl_file_may_be_one(tmp_path):
    mixed = tmp_path / "a.json"
    mixed.write_text(json.dumps([GOOD[0], 3, GOOD[1]]))
    first, bad, second = open_rows(ExampleData(path=str(mixed))).scan(0)
    assert [first, second] == GOOD[:2]
    assert str(bad) == "row 1 is int; it must be an object"
    misnamed = tmp_path / "b.jsonl"
    misnamed.write_text(json.dumps(GOOD, indent=1))
    assert list(open_rows(ExampleData(path=str(misnamed))).scan(0)) == GOOD


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["", "/*.jsonl"])
def test_the_files_of_a_folder_are_read_row_by_row(tmp_path, name, streaming):
    put(tmp_path / "part-0.jsonl", [TEXT[0], b"no", TEXT[1]])
    put(tmp_path / "part-1.jsonl", [b'{"prompt": 3, "more": 1}', TEXT[2]])
    (tmp_path / "README.md").write_text("Rows.\n")
    path = f"{tmp_path}{name}"
    rows = open_rows(ExampleData(path=path, streaming=streaming))
    found = list(rows.scan(0))
    assert str(found[1]).startswith("part-0.jsonl, line 2 is malformed JSON")
    assert [*found[:1], *found[2:]] == [*GOOD[:2], {"prompt": 3, "more": 1}, GOOD[2]]
    assert rows.columns == ["prompt", "chosen", "rejected", "more"]
    assert list(rows.scan(3)) == found[3:]
    if rows.get is not None:
        assert rows.length == 5
        assert [str(rows.get(index)) for index in range(5)] == [str(row) for row in found]


def opened(path, *, batch_size=1, **settings):
    settings = ExampleData(path=path, **settings)
    build = pairs(settings, ByteTokenizer())
    return open_offline(settings, build, seed=1, batch_size=batch_size, max_steps=8)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_bad_lines_are_reported_and_a_resume_goes_on_behind_them(tmp_path, order, streaming):
    path = put(tmp_path / "a.jsonl", LINES)
    settings = {"order": order, "streaming": streaming, "shuffle_buffer": 2}
    train = opened(path, **settings)
    batches = [train.next_batch() for _ in range(8)]
    numbers = [batch[0].row for batch in batches if batch]
    assert sorted(numbers[:4]) == sorted(numbers[4:]) == [0, 1, 3, 5]
    if order == "sequential":
        assert numbers[:4] == [0, 1, 3, 5]
    if not streaming:  # the second pass of a shuffled stream may end before its bad lines do
        assert train.report.dropped == {"malformed": 2}
    listed = [(bad.row, bad.reason[:20]) for bad in train.report.dropped_rows]
    assert sorted(set(listed)) == [(2, "a.jsonl, line 3 is m"), (4, "a.jsonl, line 6 is m")]
    for taken in range(1, 8):
        before, after = opened(path, **settings), opened(path, **settings)
        for _ in range(taken):
            before.next_batch()
        after.restore(before.state())
        assert after.next_batch() == batches[taken]


def test_the_first_bad_line_ends_a_run_that_wants_none(tmp_path):
    path = put(tmp_path / "a.jsonl", LINES)
    words = (
        r'row 2 \(counted from 0\): a\.jsonl, line 3 is malformed JSON: .*data\.on_bad_row = "drop"'
    )
    with pytest.raises(DataError, match=words):
        opened(path, on_bad_row="error")


def test_a_file_without_a_good_line_names_some_of_the_bad_ones(tmp_path):
    path = put(tmp_path / "a.jsonl", [b"{", b'"prompt": 1', b"}"])
    with pytest.raises(
        DataError, match=r"none of 3 rows can be used(.|\n)*row 0: a\.jsonl, line 1"
    ):
        opened(path)
